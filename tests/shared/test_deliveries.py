"""Every event is delivered or visibly abandoned: owed with the event, tried on a schedule, fenced by the try."""

from __future__ import annotations

import base64
import itertools
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from standardwebhooks import Webhook

from shared import deliveries, jobs
from shared.db import Database
from shared.deliveries import DeliveryClaim
from shared.errors import NotFound, StaleAttempt
from shared.models import ApiKey, Delivery, DeliveryState, Endpoint
from shared.settings import Settings
from tests.factories import a_batch, a_claim, a_job, a_key, a_result, an_endpoint

HOOK = "https://receiver.example/hook"
SECOND = timedelta(seconds=1)
SCHEDULE = Settings().webhook_retry_seconds
LEASE_SECONDS = 30.0


def owe_one(session: Session, now: datetime, *, key: ApiKey | None = None) -> str:
    """One pending delivery of a job's own address."""
    job = a_job(session, key or a_key(session, now), now, webhook_url=HOOK)
    jobs.cancel(session, job.id, now=now)
    return session.scalars(select(Delivery.id).where(Delivery.job_id == job.id)).one()


def take(session: Session, delivery_id: str, now: datetime) -> DeliveryClaim:
    claim = deliveries.claim(session, delivery_id, lease_seconds=LEASE_SECONDS, now=now)
    assert claim is not None, f"{delivery_id} cannot be claimed"
    return claim


def defer(session: Session, claim: DeliveryClaim, now: datetime, **changes: Any) -> DeliveryState:
    said: dict[str, Any] = {
        "status": 500,
        "error": "the receiver answered 500",
        "seconds": 0.25,
        "schedule_seconds": SCHEDULE,
        "retry_after_seconds": None,
        "jitter": 0.0,
    }
    return deliveries.defer(session, claim, now=now, **said | changes)


# --- what is owed ---------------------------------------------------------------------------------------------------


def test_an_event_is_owed_to_the_jobs_own_address_and_to_each_endpoint_that_wants_it(
    database: Database, now: datetime
) -> None:
    with database.transaction() as session:
        key, stranger = a_key(session, now), a_key(session, now)
        wanting = an_endpoint(session, key, now, url="https://a.example", events=("job.canceled", "job.failed"))
        an_endpoint(session, key, now, url="https://b.example", events=("job.succeeded",))
        an_endpoint(session, stranger, now, url="https://c.example", events=deliveries.EVENT_TYPES)
        off = an_endpoint(session, key, now, url="https://d.example", events=deliveries.EVENT_TYPES)
        off.disabled_at = now
        job = a_job(session, key, now, webhook_url=HOOK)
        jobs.cancel(session, job.id, now=now)
        owed = session.scalars(select(Delivery).order_by(Delivery.url)).all()
        assert [(each.url, each.secret_id, each.endpoint_id) for each in owed] == [
            ("https://a.example", wanting.id, wanting.id),
            (HOOK, key.id, None),
        ]
        for each in owed:
            assert (each.type, each.state, each.due_at, each.job_id) == ("job.canceled", "pending", now, job.id)
            assert each.payload["type"] == "job.canceled"
            assert each.payload["timestamp"] == "2026-03-04T05:06:07.891234Z"
            assert each.payload["data"]["id"] == job.id
            assert each.payload["data"]["status"] == "canceled"


def test_nothing_is_owed_where_nobody_asked(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        an_endpoint(session, key, now, url=HOOK, events=())
        job = a_job(session, key, now)
        batch = a_batch(session, key, now, total=0)
        jobs.cancel(session, job.id, now=now)
        assert deliveries.owe_batch(session, batch, now) == []
        assert session.scalars(select(Delivery.id)).all() == []


def test_the_payload_is_the_job_as_it_was_when_the_event_happened(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        job = a_job(session, key, now, webhook_url=HOOK, webhook_events=("job.started", "job.succeeded"))
        claim = a_claim(session, job.id, now)
        jobs.succeed(session, claim, a_result(claim), now=now + SECOND)
        said = {each.type: each.payload["data"] for each in session.scalars(select(Delivery))}
        assert said["job.started"]["status"] == "running"
        assert said["job.started"]["result"] is None
        assert said["job.succeeded"]["status"] == "succeeded"
        assert said["job.succeeded"]["labels"][0]["label"] == "goldfinch"


def test_a_completed_batch_is_told_to_its_own_address_and_to_endpoints(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        an_endpoint(session, key, now, url="https://a.example", events=("batch.completed",))
        batch = a_batch(session, key, now, total=1, webhook_url=HOOK)
        job = a_job(session, key, now, batch_id=batch.id, external_id="first")
        jobs.cancel(session, job.id, now=now)
        owed = session.scalars(select(Delivery).order_by(Delivery.url)).all()
        assert [(each.url, each.batch_id, each.job_id) for each in owed] == [
            ("https://a.example", batch.id, None),
            (HOOK, batch.id, None),
        ]
        item = {"id": job.id, "status": "canceled", "external_id": "first", "error_code": None}
        assert owed[0].payload["data"]["items"] == [item]


def test_a_test_event_reaches_an_endpoint_whatever_it_filters(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        endpoint = an_endpoint(session, a_key(session, now), now, url=HOOK, events=("job.failed",))
        delivery_id = deliveries.owe_test(session, endpoint, now)
        claim = take(session, delivery_id, now)
        assert (claim.type, claim.url, claim.secret_id) == ("endpoint.test", HOOK, endpoint.id)
        assert claim.payload["data"] == {"endpoint_id": endpoint.id}


def test_a_secret_signs_what_the_library_of_the_receiver_verifies(now: datetime) -> None:
    secret = deliveries.signing_secret("the deployment's key", "we_1")
    assert secret.startswith("whsec_")
    assert len(base64.b64decode(secret.removeprefix("whsec_"))) == 32
    signed = Webhook(secret).sign("msg_1", now, '{"a": 1}')
    assert Webhook(secret).sign("msg_1", now, '{"a": 1}') == signed
    others = {
        deliveries.signing_secret("the deployment's key", "we_2"),
        deliveries.signing_secret("another deployment's key", "we_1"),
        deliveries.signing_secret("the deployment's key", "key_1"),
    }
    assert len({secret, *others}) == 4


# --- tries ----------------------------------------------------------------------------------------------------------


def test_a_delivery_that_is_answered_is_done(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        delivery_id = owe_one(session, now)
        claim = take(session, delivery_id, now)
        assert (claim.id, claim.number, claim.url) == (delivery_id, 1, HOOK)
        deliveries.delivered(session, claim, status=204, seconds=0.1234567, now=now + SECOND)
        delivery = session.get_one(Delivery, delivery_id, populate_existing=True)
        assert (delivery.state, delivery.finished_at, delivery.lease_until) == ("delivered", now + SECOND, None)
        assert delivery.tries == [{"at": (now + SECOND).isoformat(), "status": 204, "error": None, "seconds": 0.123}]
        assert deliveries.claim(session, delivery_id, lease_seconds=30, now=now + SECOND) is None
        assert deliveries.due(session, resend_after_seconds=60, now=now + 3600 * SECOND) == []


def test_a_delivery_is_tried_on_the_whole_schedule_and_then_visibly_abandoned(
    database: Database, now: datetime
) -> None:
    with database.transaction() as session:
        delivery_id = owe_one(session, now)
        tried_at = []
        started = now
        for number in range(1, len(SCHEDULE) + 1):
            early = now - timedelta(microseconds=1)
            assert deliveries.claim(session, delivery_id, lease_seconds=30, now=early) is None
            claim = take(session, delivery_id, now)
            assert (claim.id, claim.number) == (delivery_id, number), "the webhook-id is the same over all tries"
            tried_at.append((now - started).total_seconds())
            state = defer(session, claim, now)
            delivery = session.get_one(Delivery, delivery_id, populate_existing=True)
            assert delivery.state == state
            now = delivery.due_at
        assert state == DeliveryState.ABANDONED
        assert [later - before for before, later in itertools.pairwise(tried_at)] == list(SCHEDULE[1:])
        assert delivery.finished_at is not None
        assert [entry["status"] for entry in delivery.tries] == [500] * len(SCHEDULE)
        assert deliveries.claim(session, delivery_id, lease_seconds=30, now=now + 10**6 * SECOND) is None


@pytest.mark.parametrize(
    ("retry_after", "jitter", "wait_seconds"),
    [
        (None, 0.0, 5.0),
        (None, 0.5, 5.25),
        (3.0, 0.0, 5.0),
        (120.0, 0.0, 120.0),
        (10.0**9, 0.0, 86400.0),
        (0.0, 0.9, 5.45),
    ],
)
def test_the_wait_before_the_next_try_is_the_schedules_or_the_receivers(
    sqlite_database: Database, now: datetime, retry_after: float | None, jitter: float, wait_seconds: float
) -> None:
    with sqlite_database.transaction() as session:
        delivery_id = owe_one(session, now)
        defer(session, take(session, delivery_id, now), now, retry_after_seconds=retry_after, jitter=jitter)
        delivery = session.get_one(Delivery, delivery_id, populate_existing=True)
        assert (delivery.due_at - now).total_seconds() == pytest.approx(wait_seconds)


def test_a_receiver_that_cannot_be_reached_ever_is_given_up_at_once(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        delivery_id = owe_one(session, now)
        deliveries.abandon(session, take(session, delivery_id, now), error="blocked address", now=now)
        delivery = session.get_one(Delivery, delivery_id, populate_existing=True)
        assert (delivery.state, delivery.finished_at) == ("abandoned", now)
        assert delivery.tries[0]["error"] == "blocked address"


def test_the_log_of_a_delivery_stays_short(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session:
        delivery_id = owe_one(session, now)
        for number in range(deliveries.TRIES_KEPT + 5):
            defer(session, take(session, delivery_id, now), now, status=number)
            deliveries.resend(session, delivery_id, now=now)
        tries = session.get_one(Delivery, delivery_id, populate_existing=True).tries
        assert [entry["status"] for entry in tries] == list(range(5, deliveries.TRIES_KEPT + 5))


# --- the fence ------------------------------------------------------------------------------------------------------

REPORTS: dict[str, Callable[[Session, DeliveryClaim, datetime], Any]] = {
    "delivered": lambda s, c, now: deliveries.delivered(s, c, status=200, seconds=1, now=now),
    "defer": defer,
    "abandon": lambda s, c, now: deliveries.abandon(s, c, error="no", now=now),
}


@pytest.mark.parametrize("report", REPORTS)
@pytest.mark.parametrize("since", ["another try", "a resend", "delivered", "abandoned", "deleted"])
def test_a_late_try_changes_nothing(database: Database, now: datetime, report: str, since: str) -> None:
    with database.transaction() as session:
        delivery_id = owe_one(session, now)
        late = take(session, delivery_id, now)
        now += timedelta(seconds=LEASE_SECONDS + 1)
        if since == "a resend":
            deliveries.resend(session, delivery_id, now=now)
        elif since == "deleted":
            jobs.remove(session, session.get_one(Delivery, delivery_id).job_id or "", now=now)
        else:
            winner = take(session, delivery_id, now)
            if since == "delivered":
                deliveries.delivered(session, winner, status=200, seconds=1, now=now)
            if since == "abandoned":
                deliveries.abandon(session, winner, error="no", now=now)
    before = _columns(database, delivery_id)
    with pytest.raises(StaleAttempt), database.transaction() as session:
        REPORTS[report](session, late, now)
    assert _columns(database, delivery_id) == before


def _columns(database: Database, delivery_id: str) -> dict[str, Any] | None:
    with database.reading() as session:
        row = session.execute(select(Delivery.__table__).where(Delivery.id == delivery_id)).mappings().one_or_none()
        return None if row is None else dict(row)


def test_a_report_whose_row_changes_under_it_changes_nothing(
    sqlite_database: Database, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look at the log and the write are two statements; the write's own condition is the fence."""
    with sqlite_database.transaction() as session:
        delivery_id = owe_one(session, now)
        late = take(session, delivery_id, now)
        deliveries.resend(session, delivery_id, now=now)
        monkeypatch.setattr(session, "scalar", lambda _query: [])
        with pytest.raises(StaleAttempt):
            deliveries.delivered(session, late, status=200, seconds=1, now=now)


def test_of_eight_chores_that_take_one_delivery_exactly_one_sends_it(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        ids = [owe_one(session, now) for _ in range(5)]
    for delivery_id in ids:
        taken: list[DeliveryClaim] = []
        start = threading.Barrier(8)

        def run(delivery_id: str = delivery_id, taken: Any = taken, start: Any = start) -> None:
            start.wait(30)
            with database.transaction() as session:
                claim = deliveries.claim(session, delivery_id, lease_seconds=30, now=now)
            if claim is not None:
                taken.append(claim)

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [(claim.id, claim.number) for claim in taken] == [(delivery_id, 1)]


def test_a_try_whose_sender_died_is_made_again_when_its_lease_has_passed(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        delivery_id = owe_one(session, now)
        take(session, delivery_id, now)
        assert deliveries.claim(session, delivery_id, lease_seconds=30, now=now + 30 * SECOND) is None
        assert deliveries.due(session, resend_after_seconds=5, now=now + 30 * SECOND) == []
        assert deliveries.due(session, resend_after_seconds=5, now=now + 31 * SECOND) == [delivery_id]
        assert take(session, delivery_id, now + 31 * SECOND).number == 2


# --- what is due ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump_seconds", [-3600, 3600])
def test_when_the_clock_is_set_what_is_owed_keeps_its_schedule(
    database: Database, now: datetime, jump_seconds: int
) -> None:
    jumped = now + jump_seconds * SECOND
    with database.transaction() as session:
        first, later, tried = (owe_one(session, now) for _ in range(3))
        defer(session, take(session, later, now), now, retry_after_seconds=300)
        take(session, tried, now)
        assert set(deliveries.due(session, resend_after_seconds=60, now=now)) == {first}
        deliveries.clock_jumped(session, jump_seconds, now=jumped)
        soon = deliveries.due(session, resend_after_seconds=60, now=jumped)
        in_time = deliveries.due(session, resend_after_seconds=60, now=jumped + 400 * SECOND)
        # Set forward, everything is due and what is under way is taken for lost: tried too soon, never too late.
        assert (set(soon), set(soon + in_time)) == (
            ({first}, {first, later, tried}) if jump_seconds < 0 else ({first, later, tried}, {first, later, tried})
        )


def test_what_is_due_is_named_once_until_nothing_comes_of_its_message(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        first = owe_one(session, now)
        second = owe_one(session, now + SECOND)
        assert deliveries.due(session, resend_after_seconds=60, now=now - SECOND) == []
        assert deliveries.due(session, resend_after_seconds=60, now=now) == [first]
        assert deliveries.due(session, resend_after_seconds=60, now=now + SECOND) == [second]
        assert deliveries.due(session, resend_after_seconds=60, now=now + 60 * SECOND) == []
        assert deliveries.due(session, resend_after_seconds=60, now=now + 60.5 * SECOND) == [first]


def test_a_message_that_was_not_sent_is_not_waited_for(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        sent, unsent = owe_one(session, now), owe_one(session, now)
        assert set(deliveries.due(session, resend_after_seconds=60, now=now)) == {sent, unsent}
        deliveries.not_sent(session, [unsent])
        assert deliveries.due(session, resend_after_seconds=60, now=now) == [unsent]


def test_what_is_due_comes_in_bounded_numbers_the_oldest_first(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session:
        key = a_key(session, now)
        owed = [owe_one(session, now + n * SECOND, key=key) for n in range(3)]
        later = now + 10 * SECOND
        assert deliveries.due(session, resend_after_seconds=60, now=later, limit=2) == owed[:2]
        assert deliveries.due(session, resend_after_seconds=60, now=later, limit=2) == owed[2:]


# --- endpoints ------------------------------------------------------------------------------------------------------


def _owed_to(session: Session, endpoint: Endpoint, now: datetime) -> str:
    return deliveries.owe_test(session, endpoint, now)


def test_an_endpoint_that_is_gone_is_turned_off_and_owed_nothing_more(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        endpoint = an_endpoint(session, key, now, url=HOOK, events=deliveries.EVENT_TYPES)
        first, second = _owed_to(session, endpoint, now), _owed_to(session, endpoint, now)
        claim = take(session, first, now)
        deliveries.turn_off_endpoint(session, claim, reason="410 Gone", now=now)
        deliveries.abandon(session, claim, error="410 Gone", status=410, now=now)
        session.refresh(endpoint)
        assert (endpoint.disabled_at, endpoint.disabled_reason) == (now, "410 Gone")
        # What was owed before is abandoned when its turn comes, with the reason in its log.
        assert deliveries.claim(session, second, lease_seconds=30, now=now) is None
        delivery = session.get_one(Delivery, second, populate_existing=True)
        assert (delivery.state, delivery.tries[0]["error"]) == ("abandoned", "the endpoint is off")
        job = a_job(session, key, now)
        jobs.cancel(session, job.id, now=now)
        assert session.scalars(select(Delivery.id).where(Delivery.job_id == job.id)).all() == []
        deliveries.turn_off_endpoint(session, claim, reason="again", now=now + SECOND)
        session.refresh(endpoint)
        assert (endpoint.disabled_at, endpoint.disabled_reason) == (now, "410 Gone")


def test_an_address_of_a_job_cannot_be_turned_off(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        endpoint = an_endpoint(session, key, now, url="https://a.example", events=())
        deliveries.turn_off_endpoint(session, take(session, owe_one(session, now, key=key), now), reason="x", now=now)
        session.refresh(endpoint)
        assert endpoint.disabled_at is None


def test_nothing_more_is_sent_to_an_endpoint_that_was_removed(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        endpoint = an_endpoint(session, a_key(session, now), now, url=HOOK, events=deliveries.EVENT_TYPES)
        pending, trying, done = (_owed_to(session, endpoint, now) for _ in range(3))
        under_way = take(session, trying, now)
        deliveries.delivered(session, take(session, done, now), status=200, seconds=1, now=now)
        deliveries.remove_endpoint(session, endpoint.id, now=now)
        assert session.get(Endpoint, endpoint.id) is None
        states = {row.id: row.state for row in session.execute(select(Delivery.id, Delivery.state))}
        assert states == {pending: "abandoned", trying: "abandoned", done: "delivered"}
        with pytest.raises(StaleAttempt):
            deliveries.delivered(session, under_way, status=200, seconds=1, now=now)
        # Resent by hand, it still has nowhere to go.
        deliveries.resend(session, pending, now=now)
        assert deliveries.claim(session, pending, lease_seconds=30, now=now) is None
        assert session.get_one(Delivery, pending, populate_existing=True).state == DeliveryState.ABANDONED
        with pytest.raises(NotFound):
            deliveries.remove_endpoint(session, endpoint.id, now=now)


def test_a_job_can_end_while_its_owner_removes_an_endpoint(postgresql_database: Database, now: datetime) -> None:
    """The new delivery names the endpoint: deleted in between, it would fail the transaction that ends the job."""
    database = postgresql_database
    failures: list[BaseException] = []
    with database.transaction() as session:
        key = a_key(session, now)
        ids = [
            (
                an_endpoint(session, key, now, url=HOOK, events=deliveries.EVENT_TYPES).id,
                a_job(session, key, now).id,
            )
            for _ in range(60)
        ]
    meeting = threading.Barrier(2)

    def go(act: Any) -> None:
        try:
            for endpoint_id, job_id in ids:
                meeting.wait(30)
                with database.transaction() as session:
                    act(session, endpoint_id, job_id)
        except BaseException as error:  # noqa: BLE001  (judged by the test's own thread)
            failures.append(error)
            meeting.abort()

    threads = [
        threading.Thread(target=go, args=(lambda s, _, job_id: jobs.cancel(s, job_id, now=now),)),
        threading.Thread(target=go, args=(lambda s, one, _: deliveries.remove_endpoint(s, one, now=now),)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


# --- resend ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", ["delivered", "abandoned", "pending"])
def test_a_resend_has_the_whole_schedule_again_and_the_same_id(database: Database, now: datetime, ended: str) -> None:
    with database.transaction() as session:
        delivery_id = owe_one(session, now)
        claim = take(session, delivery_id, now)
        if ended == "delivered":
            deliveries.delivered(session, claim, status=200, seconds=1, now=now)
        elif ended == "abandoned":
            deliveries.abandon(session, claim, error="no", now=now)
        else:
            defer(session, claim, now)
        later = now + 3600 * SECOND
        delivery = deliveries.resend(session, delivery_id, now=later)
        assert (delivery.state, delivery.due_at, delivery.finished_at) == ("pending", later, None)
        assert deliveries.due(session, resend_after_seconds=60, now=later) == [delivery_id]
        again = take(session, delivery_id, later)
        assert (again.id, again.payload) == (claim.id, claim.payload)
        assert again.number > claim.number
        assert defer(session, again, later) == DeliveryState.PENDING
        delivery = session.get_one(Delivery, delivery_id, populate_existing=True)
        assert delivery.due_at == later + 5 * SECOND
        assert len(delivery.tries) == 2, "the log keeps what was before"


def test_resending_what_is_not_there_says_so(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session, pytest.raises(NotFound):
        deliveries.resend(session, "msg_nobody", now=now)
