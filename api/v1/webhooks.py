"""Standing webhook addresses, and what was sent to them and to those of single jobs."""

from __future__ import annotations

from typing import Any

from flask import Response, jsonify
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api import asked
from api.auth import Caller
from api.context import Context
from api.openapi import operation
from api.schemas import DeliveriesQuery, DeliveryPage, DeliveryView, EndpointPage, EndpointRequest, EndpointView
from api.v1 import answers
from shared import deliveries, queries
from shared.db import clock, new_id
from shared.errors import BlockedUrl, FetchFailed, NotFound
from shared.models import Delivery, Endpoint
from shared.views import delivery_view, iso

MAX_ENDPOINTS_PER_KEY = 50


@operation(
    "POST",
    "/v1/webhook-endpoints",
    "Add a standing webhook address",
    tag="webhooks",
    status=201,
    answer=EndpointView,
    body=EndpointRequest,
    problems=(BlockedUrl, FetchFailed),
)
def create_endpoint(context: Context, caller: Caller) -> Response:
    """It is told of the named events of all your jobs. `secret` verifies them (Standard Webhooks 1.0)."""
    wanted = asked.json_body(EndpointRequest)
    context.outgoing.check(wanted.url)
    with context.database.transaction() as session:
        now = clock(session)
        standing = session.scalar(select(func.count()).where(Endpoint.owner_key_id == caller.key_id)) or 0
        if standing >= MAX_ENDPOINTS_PER_KEY:
            raise asked.invalid("url", f"a key has at most {MAX_ENDPOINTS_PER_KEY} webhook endpoints")
        endpoint = Endpoint(
            id=new_id("ep", now), owner_key_id=caller.key_id, url=wanted.url, events=list(wanted.events), created_at=now
        )
        session.add(endpoint)
    return answers.json(_endpoint_view(context, endpoint), 201, location=f"/v1/webhook-endpoints/{endpoint.id}")


@operation("GET", "/v1/webhook-endpoints", "List standing webhook addresses", tag="webhooks", answer=EndpointPage)
def list_endpoints(context: Context, caller: Caller) -> Response:
    """All of them, oldest first. One that answered 410 is shown as disabled."""
    with context.database.reading() as session:
        found = session.scalars(
            select(Endpoint).where(Endpoint.owner_key_id == caller.key_id).order_by(Endpoint.id)
        ).all()
        return answers.page([_endpoint_view(context, endpoint) for endpoint in found], None)


@operation(
    "GET",
    "/v1/webhook-endpoints/{endpoint_id}",
    "Look at a standing webhook address",
    tag="webhooks",
    answer=EndpointView,
)
def get_endpoint(context: Context, caller: Caller, endpoint_id: str) -> Response:
    """With its secret."""
    with context.database.reading() as session:
        return jsonify(_endpoint_view(context, _owned_endpoint(session, endpoint_id, caller)))


@operation(
    "DELETE",
    "/v1/webhook-endpoints/{endpoint_id}",
    "Remove a standing webhook address",
    tag="webhooks",
    status=204,
)
def delete_endpoint(context: Context, caller: Caller, endpoint_id: str) -> Response:
    """What is still owed to it is not sent any more."""
    with context.database.transaction() as session:
        _owned_endpoint(session, endpoint_id, caller)
        deliveries.remove_endpoint(session, endpoint_id, now=clock(session))
    return answers.empty(204)


@operation(
    "POST",
    "/v1/webhook-endpoints/{endpoint_id}/test",
    "Send a test event",
    tag="webhooks",
    status=202,
    answer=DeliveryView,
)
def send_test_event(context: Context, caller: Caller, endpoint_id: str) -> Response:
    """An event `endpoint.test`, whatever the endpoint's filter says; look for it in the deliveries."""
    with context.database.transaction() as session:
        endpoint = _owned_endpoint(session, endpoint_id, caller)
        delivery_id = deliveries.owe_test(session, endpoint, clock(session))
        return answers.json(delivery_view(session.get_one(Delivery, delivery_id)), 202)


@operation(
    "GET",
    "/v1/webhook-deliveries",
    "List deliveries, newest first",
    tag="webhooks",
    answer=DeliveryPage,
    query=DeliveriesQuery,
)
def list_deliveries(context: Context, caller: Caller) -> Response:
    """Each with every try: when, what the receiver said, and when it is tried next."""
    wanted = asked.query(DeliveriesQuery)
    with context.database.reading() as session:
        page = queries.page_of_deliveries(
            session, owner_key_id=caller.key_id, job_id=wanted.job_id, limit=wanted.limit, cursor=wanted.cursor
        )
        return answers.page([delivery_view(delivery) for delivery in page.rows], page.next_cursor)


@operation(
    "POST",
    "/v1/webhook-deliveries/{delivery_id}/resend",
    "Send a delivery again",
    tag="webhooks",
    status=202,
    answer=DeliveryView,
)
def resend_delivery(context: Context, caller: Caller, delivery_id: str) -> Response:
    """With the same `webhook-id` and the whole schedule again."""
    with context.database.transaction() as session:
        owned = session.scalar(
            select(Delivery.id).where(Delivery.id == delivery_id, Delivery.owner_key_id == caller.key_id)
        )
        if owned is None:
            raise NotFound("There is no such delivery.")
        return answers.json(delivery_view(deliveries.resend(session, delivery_id, now=clock(session))), 202)


def _owned_endpoint(session: Session, endpoint_id: str, caller: Caller) -> Endpoint:
    found = session.scalar(select(Endpoint).where(Endpoint.id == endpoint_id, Endpoint.owner_key_id == caller.key_id))
    if found is None:
        raise NotFound("There is no such webhook endpoint.")
    return found


def _endpoint_view(context: Context, endpoint: Endpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "url": endpoint.url,
        "events": list(endpoint.events),
        "created_at": iso(endpoint.created_at),
        "disabled_at": iso(endpoint.disabled_at),
        "disabled_reason": endpoint.disabled_reason,
        "secret": deliveries.signing_secret(context.settings.secret_key, endpoint.id),
    }
