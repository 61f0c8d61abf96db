"""The key that calls, as it is told of itself."""

from __future__ import annotations

from flask import Response, jsonify

from api.auth import Caller
from api.context import Context
from api.openapi import operation
from api.schemas import KeyView
from shared import deliveries
from shared.views import iso


@operation("GET", "/v1/key", "Look at the key that calls", tag="keys", answer=KeyView, scope=None)
def get_key(context: Context, caller: Caller) -> Response:
    """Its scopes, and the secret that signs webhooks sent to a job's own `webhook_url`."""
    return jsonify(
        {
            "id": caller.key_id,
            "name": caller.name,
            "scopes": sorted(caller.scopes),
            "expires_at": iso(caller.expires_at),
            "webhook_secret": deliveries.signing_secret(context.settings.secret_key, caller.key_id),
        }
    )
