"""Standing webhook addresses and deliveries, as a customer sees them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from api.schemas import DeliveryPage, DeliveryView, EndpointView
from shared import deliveries
from shared.models import Delivery, DeliveryState
from tests.api.conftest import Api, Caller

PUBLIC = "https://1.1.1.1/hook"


def test_endpoints_are_added_listed_tested_and_removed(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    made = caller.post("/v1/webhook-endpoints", json={"url": PUBLIC, "events": ["job.succeeded"]})
    assert made.status_code == 201
    view = EndpointView.model_validate(made.json)
    assert made.headers["Location"] == f"/v1/webhook-endpoints/{view.id}"
    assert (view.secret[:6], view.events) == ("whsec_", ["job.succeeded"])
    assert caller.get("/v1/webhook-endpoints").json["data"] == [made.json]
    assert caller.get(f"/v1/webhook-endpoints/{view.id}").json == made.json
    tested = caller.post(f"/v1/webhook-endpoints/{view.id}/test")
    assert tested.status_code == 202
    owed = DeliveryView.model_validate(tested.json)
    assert (owed.type, owed.status, owed.endpoint_id, owed.url) == ("endpoint.test", "pending", view.id, PUBLIC)
    assert caller.delete(f"/v1/webhook-endpoints/{view.id}").status_code == 204
    assert caller.delete(f"/v1/webhook-endpoints/{view.id}").status_code == 404
    # What was owed to it is not sent any more.
    (left,) = DeliveryPage.model_validate(caller.get("/v1/webhook-deliveries").json).data
    assert (left.id, left.status, left.endpoint_id) == (owed.id, "abandoned", None)


def test_endpoints_of_a_key_are_bounded(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.v1.webhooks.MAX_ENDPOINTS_PER_KEY", 2)
    codes = [caller.post("/v1/webhook-endpoints", json={"url": PUBLIC}).status_code for _ in range(3)]
    assert codes == [201, 201, 422]
    for body in ({"url": PUBLIC, "events": []}, {"url": PUBLIC, "events": ["x"]}, {}, {"url": "https://é.example"}):
        assert caller.post("/v1/webhook-endpoints", json=body).json["code"] == "invalid-request"


def test_deliveries_are_listed_by_job_and_can_be_sent_again(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    job_id = caller.job(webhook_url=PUBLIC, webhook_events="job.started,job.succeeded")
    other = caller.job(webhook_url=PUBLIC)
    api_on_both.succeed(job_id)
    api_on_both.succeed(other)
    page = DeliveryPage.model_validate(caller.get(f"/v1/webhook-deliveries?job_id={job_id}").json)
    assert sorted(delivery.type for delivery in page.data) == ["job.started", "job.succeeded"]
    paged = caller.get("/v1/webhook-deliveries?limit=2").json
    assert len(paged["data"]) == 2
    rest = caller.get("/v1/webhook-deliveries", query_string={"cursor": paged["next_cursor"]}).json
    assert [len(rest["data"]), rest["next_cursor"]] == [1, None]
    one = page.data[0].id
    with api_on_both.database.transaction() as session:
        now = datetime.now(UTC)
        claim = deliveries.claim(session, one, lease_seconds=30, now=now)
        assert claim is not None
        deliveries.delivered(session, claim, status=204, seconds=0.1, now=now)
    again = caller.post(f"/v1/webhook-deliveries/{one}/resend")
    assert (again.status_code, again.json["status"]) == (202, "pending")
    assert again.json["tries"][0]["status"] == 204
    with api_on_both.database.reading() as session:
        assert session.get_one(Delivery, one).state == DeliveryState.PENDING
