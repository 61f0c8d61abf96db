"""The public JSON routes. Each reads the request, asks or changes through `shared`, commits, and answers.

Ownership is decided in one place (`queries.owned_job` and its like for other rows): what belongs to another key is
answered 404, as if it were not there. No route waits for Redis.
"""

from __future__ import annotations

from flask import Blueprint

from api import openapi
from api.context import Context
from api.openapi import Handler
from api.v1 import batches, estimates, jobs, key, models, results, submit, webhooks

# The one table of routes: registered by `blueprint`, described in /openapi.json.
HANDLERS: tuple[Handler, ...] = (
    submit.create_job,
    submit.create_preview,
    jobs.list_jobs,
    jobs.get_job,
    jobs.cancel_job,
    jobs.retry_job,
    jobs.delete_job,
    results.get_result,
    results.get_input,
    results.get_thumbnail,
    results.get_preview,
    results.get_preview_strip,
    results.get_report,
    jobs.follow_job,
    results.ask_rendition,
    results.get_rendition,
    results.get_rendition_file,
    results.get_tile,
    submit.create_upload,
    batches.create_batch,
    batches.get_batch,
    models.list_models,
    models.get_model,
    estimates.create_estimate,
    webhooks.create_endpoint,
    webhooks.list_endpoints,
    webhooks.get_endpoint,
    webhooks.delete_endpoint,
    webhooks.send_test_event,
    webhooks.list_deliveries,
    webhooks.resend_delivery,
    key.get_key,
)


def blueprint(context: Context) -> Blueprint:
    v1 = Blueprint("v1", __name__)
    openapi.register(v1, context, HANDLERS)
    return v1
