"""What customers see of a job, a batch and a delivery is what the contract says."""

from __future__ import annotations

import json
from datetime import datetime, timedelta

from shared import deliveries, jobs, queries
from shared.db import Database
from shared.models import TERMINAL_STATES, JobState
from shared.views import batch_view, delivery_view, job_view
from tests.factories import a_batch, a_job, a_job_in, a_key, retryable

HOOK = "https://receiver.example/hook"
SECOND = timedelta(seconds=1)


def test_a_job_is_shown_as_the_contract_says_in_every_state(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session:
        key = a_key(session, now)
        for state in JobState:
            job, _ = a_job_in(state, session, key, now, classify=True, external_id="order-7")
            view = job_view(job, queue_position=3)
            assert json.loads(json.dumps(view)) == view, "JSON values only"
            assert (view["id"], view["status"], view["external_id"]) == (job.id, state, "order-7")
            assert view["created_at"] == "2026-03-04T05:06:07.891Z"
            assert view["queue_position"] == 3
            assert (view["result"] is not None) == (state == JobState.SUCCEEDED)
            assert (view["labels"] is not None) == (state == JobState.SUCCEEDED)
            assert (view["timings"] is not None) == (state == JobState.SUCCEEDED)
            assert (view["error"] is not None) == (state in (JobState.FAILED, JobState.EXPIRED))
            assert (view["finished_at"] is not None) == (state in TERMINAL_STATES)
            assert set(view["progress"]) == {"fraction", "phase", "bands_done", "bands_total", "eta_seconds"}
            assert job.blob_prefix not in json.dumps(view), "where blobs lie is nobody's business"


def test_a_job_that_waits_to_be_tried_again_shows_no_error(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session:
        job, claim = a_job_in(JobState.RUNNING, session, a_key(session, now), now)
        jobs.fail(session, claim, retryable(), retry_delay_seconds=2, now=now)
        session.refresh(job)
        view = job_view(job)
        assert (view["status"], view["attempt"], view["error"], view["device"]) == ("queued", 1, None, "cpu")


def test_a_batch_shows_its_items_in_the_order_they_were_handed_in(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        batch = a_batch(session, key, now, total=3)
        members = [a_job(session, key, now + n * SECOND, batch_id=batch.id, external_id=str(n)) for n in range(3)]
        assert batch_view(session, batch)["status"] == "running"
        jobs.cancel(session, members[1].id, now=now)
        view = batch_view(session, batch)
        assert (view["total"], view["remaining"], view["status"]) == (3, 2, "running")
        assert [(item["external_id"], item["status"]) for item in view["items"]] == [
            ("0", "queued"),
            ("1", "canceled"),
            ("2", "queued"),
        ]


def test_a_delivery_shows_when_it_is_tried_next_only_while_it_is_pending(
    sqlite_database: Database, now: datetime
) -> None:
    with sqlite_database.transaction() as session:
        job = a_job(session, a_key(session, now), now, webhook_url=HOOK)
        jobs.cancel(session, job.id, now=now)
        (delivery,) = queries.page_of_deliveries(session, owner_key_id=None, job_id=job.id, limit=5, cursor=None).rows
        assert delivery_view(delivery)["next_try_at"] == "2026-03-04T05:06:07.891Z"
        claim = deliveries.claim(session, delivery.id, lease_seconds=5, now=now)
        assert claim is not None
        deliveries.delivered(session, claim, status=200, seconds=0.5, now=now)
        session.refresh(delivery)
        view = delivery_view(delivery)
        assert (view["status"], view["next_try_at"]) == ("delivered", None)
        assert [entry["status"] for entry in view["tries"]] == [200]
        assert json.loads(json.dumps(view)) == view
