"""Every arrow between a job's states, and every arrow there must not be; the fence; the races."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared import deliveries, jobs
from shared.db import Database, clock
from shared.errors import (
    EnlargerError,
    Gone,
    InvalidImage,
    JobNotCancelable,
    JobNotRetryable,
    NotFound,
    OutOfMemory,
    QueueFull,
    StaleAttempt,
    StorageUnavailable,
)
from shared.jobs import Claim
from shared.models import TERMINAL_STATES, Attempt, Batch, BlobRemoval, Delivery, Job, JobState
from tests.factories import (
    LEASE_SECONDS,
    a_batch,
    a_claim,
    a_job,
    a_job_in,
    a_key,
    a_result,
    an_endpoint,
    options,
    picture,
    retryable,
)

HOOK = "https://receiver.example/hook"
SECOND = timedelta(seconds=1)
LEASE = timedelta(seconds=LEASE_SECONDS)


def columns(session: Session, job_id: str) -> dict[str, Any]:
    """The whole row as it stands in SQL."""
    session.flush()
    row = session.execute(select(Job.__table__).where(Job.id == job_id)).mappings().one_or_none()
    return {} if row is None else dict(row)


def owed(session: Session, job_id: str | None = None) -> list[str]:
    """The types of the deliveries there are, oldest first; those of one moment in any order."""
    query = select(Delivery.type).order_by(Delivery.created_at, Delivery.id)
    return list(session.scalars(query if job_id is None else query.where(Delivery.job_id == job_id)))


def attempts(session: Session, job_id: str) -> list[tuple[int, str | None]]:
    rows = session.execute(
        select(Attempt.number, Attempt.outcome).where(Attempt.job_id == job_id).order_by(Attempt.number)
    )
    return [(row.number, row.outcome) for row in rows]


# --- submit ---------------------------------------------------------------------------------------------------------


def test_a_submitted_job_is_queued_with_everything_that_was_asked(database: Database, now: datetime) -> None:
    asked = options(
        classify=True,
        quality=80,
        deadline_seconds=60,
        webhook_url=HOOK,
        webhook_events=["job.succeeded"],
        external_id="order-7",
        expected_seconds=2.5,
    )
    handed_in = picture(now, name="cat.png")
    with database.transaction() as session:
        key = a_key(session, now)
        jobs.submit(
            session,
            owner_key_id=key.id,
            options=asked,
            picture=handed_in,
            max_attempts=3,
            max_queued_jobs=10,
            now=now,
        )
    with database.reading() as session:
        job = session.get_one(Job, handed_in.job_id)
        assert job.state == JobState.QUEUED
        assert (job.attempt, job.tries_used, job.max_attempts, job.version) == (0, 0, 3, 1)
        assert (job.created_at, job.queued_at, job.deadline_at) == (now, now, now + 60 * SECOND)
        assert (job.classify, job.quality, job.external_id) == (True, 80, "order-7")
        assert (job.webhook_url, job.webhook_events) == (HOOK, ["job.succeeded"])
        assert (job.input_key, job.input_width, job.input_height) == (handed_in.key, 8, 6)
        assert (job.input_name, job.expected_seconds) == ("cat.png", 2.5)
        assert (job.phase, job.fraction, job.published_at, job.warnings) == ("queued", 0.0, None, [])
        assert owed(session) == []


def test_a_key_may_have_only_so_many_queued_jobs(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key, other = a_key(session, now), a_key(session, now)
        first = a_job(session, key, now, max_queued_jobs=2)
        a_job(session, key, now, max_queued_jobs=2)
        with pytest.raises(QueueFull) as refused:
            a_job(session, key, now, max_queued_jobs=2)
        assert refused.value.facts == {"queued_jobs": 2, "limit_jobs": 2, "retry_after_seconds": 10}
        # Another key's queue is its own, and what runs does not wait.
        a_job(session, other, now, max_queued_jobs=2)
        a_claim(session, first.id, now)
        a_job(session, key, now, max_queued_jobs=2)
        assert session.scalar(select(func.count()).select_from(Job)) == 4


def test_keys_of_blobs_cannot_be_guessed_from_the_job(now: datetime) -> None:
    job_id = jobs.new_job_id(now)
    prefixes = {jobs.blob_prefix(job_id) for _ in range(100)}
    assert len(prefixes) == 100
    assert all(prefix.startswith(f"jobs/{job_id}/") and len(prefix.rpartition("/")[2]) == 32 for prefix in prefixes)


# --- every verb in every state --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """A kind of situation a job can be in; finer than its state where that decides what may happen."""

    make: Callable[[Session, Any, datetime], tuple[Job, Claim]]
    state: JobState


def _in(state: JobState, **asked: Any) -> Standing:
    return Standing(lambda session, key, now: a_job_in(state, session, key, now, **asked), state)


def _retrying(session: Session, key: Any, now: datetime) -> tuple[Job, Claim]:
    job, claim = a_job_in(JobState.RUNNING, session, key, now)
    jobs.fail(session, claim, retryable(), retry_delay_seconds=3600, now=now)
    return job, claim


def _overdue(session: Session, key: Any, now: datetime) -> tuple[Job, Claim]:
    return a_job_in(JobState.QUEUED, session, key, now - 2 * SECOND, deadline_seconds=1)


def _canceling(session: Session, key: Any, now: datetime) -> tuple[Job, Claim]:
    job, claim = a_job_in(JobState.RUNNING, session, key, now)
    jobs.cancel(session, job.id, now=now)
    return job, claim


def _lost(session: Session, key: Any, now: datetime) -> tuple[Job, Claim]:
    return a_job_in(JobState.RUNNING, session, key, now - LEASE - SECOND)


def _lost_for_the_last_time(session: Session, key: Any, now: datetime) -> tuple[Job, Claim]:
    return a_job_in(JobState.RUNNING, session, key, now - LEASE - SECOND, max_attempts=1)


def _lost_while_canceling(session: Session, key: Any, now: datetime) -> tuple[Job, Claim]:
    job, claim = _lost(session, key, now)
    jobs.cancel(session, job.id, now=now)
    return job, claim


def _swept(session: Session, key: Any, now: datetime) -> tuple[Job, Claim]:
    job, claim = a_job_in(JobState.FAILED, session, key, now - 10 * SECOND, ttl_seconds=5)
    assert jobs.sweep_expired(session, now=now) == [job.id]
    return job, claim


STANDINGS: dict[str, Standing] = {
    "queued": _in(JobState.QUEUED),
    "retrying": Standing(_retrying, JobState.QUEUED),
    "overdue": Standing(_overdue, JobState.QUEUED),
    "running": _in(JobState.RUNNING),
    "canceling": Standing(_canceling, JobState.RUNNING),
    "lost": Standing(_lost, JobState.RUNNING),
    "lost for the last time": Standing(_lost_for_the_last_time, JobState.RUNNING),
    "lost while canceling": Standing(_lost_while_canceling, JobState.RUNNING),
    "succeeded": _in(JobState.SUCCEEDED),
    "failed": _in(JobState.FAILED),
    "canceled": _in(JobState.CANCELED),
    "expired": _in(JobState.EXPIRED),
    "swept": Standing(_swept, JobState.FAILED),
}


def _progress(session: Session, claim: Claim, now: datetime) -> bool:
    return jobs.progress(
        session,
        claim,
        phase="upscale",
        fraction=0.5,
        bands_done=1,
        bands_total=2,
        eta_seconds=3.0,
        lease_seconds=LEASE_SECONDS,
        now=now,
    )


VERBS: dict[str, Callable[[Session, Claim, datetime], Any]] = {
    "claim": lambda s, c, now: jobs.claim(
        s, c.job_id, worker_id="w2", device="cpu", lease_seconds=LEASE_SECONDS, now=now
    ),
    "heartbeat": lambda s, c, now: jobs.heartbeat(s, c, lease_seconds=LEASE_SECONDS, now=now),
    "progress": _progress,
    "succeed": lambda s, c, now: jobs.succeed(s, c, a_result(c), now=now),
    "fail, can be tried again": lambda s, c, now: jobs.fail(s, c, retryable(), retry_delay_seconds=2, now=now),
    "fail for good": lambda s, c, now: jobs.fail(s, c, InvalidImage("no"), retry_delay_seconds=2, now=now),
    "fail to another queue": lambda s, c, now: jobs.fail(
        s, c, OutOfMemory("too large"), retry_delay_seconds=2, now=now, queue="cpu.bulk"
    ),
    "release": lambda s, c, now: jobs.release(s, c, now=now),
    "acknowledge_cancel": lambda s, c, now: jobs.acknowledge_cancel(s, c, now=now),
    "cancel": lambda s, c, now: jobs.cancel(s, c.job_id, now=now),
    "retry": lambda s, c, now: jobs.retry(s, c.job_id, now=now),
    "rescue_lost": lambda s, c, now: jobs.rescue_lost(s, retry_delay_seconds=2, now=now),
    "expire_overdue": lambda s, c, now: jobs.expire_overdue(s, now=now),
    "sweep_expired": lambda s, c, now: jobs.sweep_expired(s, now=now),
}

# Verbs of a worker name an attempt and are refused where it does not hold the job; the relay's verbs look for rows they
# may change and find none; the customer is told why not.
WORKERS_VERBS = tuple(list(VERBS)[1:9])
REFUSED: Mapping[str, type[EnlargerError] | None] = {
    "claim": None,
    **dict.fromkeys(WORKERS_VERBS, StaleAttempt),
    "cancel": JobNotCancelable,
    "retry": JobNotRetryable,
    "rescue_lost": None,
    "expire_overdue": None,
    "sweep_expired": None,
}

ALLOWED: dict[tuple[str, str], JobState] = {
    ("queued", "claim"): JobState.RUNNING,
    ("queued", "cancel"): JobState.CANCELED,
    ("retrying", "cancel"): JobState.CANCELED,
    ("overdue", "cancel"): JobState.CANCELED,
    ("overdue", "expire_overdue"): JobState.EXPIRED,
    ("failed", "retry"): JobState.QUEUED,
    ("canceled", "retry"): JobState.QUEUED,
    ("expired", "retry"): JobState.QUEUED,
    ("lost", "rescue_lost"): JobState.QUEUED,
    ("lost for the last time", "rescue_lost"): JobState.FAILED,
    ("lost while canceling", "rescue_lost"): JobState.CANCELED,
}
for _running in ("running", "lost", "lost for the last time"):
    ALLOWED |= {
        (_running, "heartbeat"): JobState.RUNNING,
        (_running, "progress"): JobState.RUNNING,
        (_running, "succeed"): JobState.SUCCEEDED,
        (_running, "fail, can be tried again"): JobState.FAILED if "last" in _running else JobState.QUEUED,
        (_running, "fail for good"): JobState.FAILED,
        (_running, "fail to another queue"): JobState.QUEUED,
        (_running, "release"): JobState.QUEUED,
        (_running, "cancel"): JobState.RUNNING,
    }
for _canceling_now in ("canceling", "lost while canceling"):
    ALLOWED |= {
        (_canceling_now, "heartbeat"): JobState.RUNNING,
        (_canceling_now, "progress"): JobState.RUNNING,
        (_canceling_now, "cancel"): JobState.RUNNING,
        # Whatever the attempt came to, the customer wants none of it.
        (_canceling_now, "fail, can be tried again"): JobState.CANCELED,
        (_canceling_now, "fail for good"): JobState.CANCELED,
        (_canceling_now, "fail to another queue"): JobState.CANCELED,
        (_canceling_now, "release"): JobState.CANCELED,
        (_canceling_now, "acknowledge_cancel"): JobState.CANCELED,
    }


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("standing", STANDINGS)
def test_each_verb_in_each_state_does_what_the_table_says(
    database: Database, now: datetime, standing: str, verb: str
) -> None:
    allowed = ALLOWED.get((standing, verb))
    with database.transaction() as session:
        key = a_key(session, now)
        an_endpoint(session, key, now, url=HOOK, events=deliveries.EVENT_TYPES)
        job, claim = STANDINGS[standing].make(session, key, now)
        job_id, started_as = job.id, columns(session, job.id)
        assert started_as["state"] == STANDINGS[standing].state
        events_before = Counter(owed(session, job_id))

    refusal: type[BaseException] | None = None
    with suppress(EnlargerError), database.transaction() as session:
        try:
            VERBS[verb](session, claim, now)
        except EnlargerError as error:
            refusal = type(error)
            raise

    with database.reading() as session:
        ended_as = columns(session, job_id)
        events = list((Counter(owed(session, job_id)) - events_before).elements())
        history = attempts(session, job_id)
    if allowed is None:
        expected = Gone if (standing, verb) == ("swept", "retry") else REFUSED[verb]
        assert refusal is expected
        assert ended_as == started_as, "a refused verb changed the job"
        assert events == []
        return
    assert refusal is None
    assert ended_as["state"] == allowed
    assert ended_as["attempt"] >= started_as["attempt"]
    if verb != "heartbeat":
        assert ended_as["version"] > started_as["version"], "a change that a customer can see has a new version"
    ends = allowed in TERMINAL_STATES
    assert (ended_as["finished_at"] is not None) == ends
    assert (ended_as["lease_until"] is not None) == (allowed == JobState.RUNNING)
    assert [event for event in events if event in deliveries.TERMINAL_EVENTS] == ([f"job.{allowed}"] if ends else [])
    assert ended_as["result_key"] == (a_result(claim).key if allowed == JobState.SUCCEEDED else None)
    if allowed != JobState.RUNNING and started_as["state"] == JobState.RUNNING:
        assert [outcome for _, outcome in history].count(None) == 0, "the attempt was not closed"


@pytest.mark.parametrize("verb", [*WORKERS_VERBS, "claim", "cancel", "retry", "remove"])
def test_no_verb_works_on_a_job_that_is_not_there(database: Database, now: datetime, verb: str) -> None:
    claim = Claim("job_nobody", 1)
    with database.transaction() as session:
        if verb == "claim":
            assert VERBS[verb](session, claim, now) is None
            return
        expected = StaleAttempt if verb in WORKERS_VERBS else NotFound
        verbs: dict[str, Callable[[Session, Claim, datetime], Any]]
        verbs = {**VERBS, "remove": lambda s, c, now: jobs.remove(s, c.job_id, now=now)}
        with pytest.raises(expected):
            verbs[verb](session, claim, now)


# --- claim and lease ------------------------------------------------------------------------------------------------


def test_a_claim_counts_the_attempt_before_it_runs(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        job = a_job(session, key, now)
        claim = a_claim(session, job.id, now + SECOND, worker_id="gpu-3", device="gpu")
        session.refresh(job)
        assert claim == Claim(job.id, 1, announces_progress=False)
        assert (job.attempt, job.tries_used) == (1, 1)
        assert job.lease_until == now + SECOND + LEASE
        assert (job.started_at, job.worker_id, job.running_device) == (now + SECOND, "gpu-3", "gpu")
        assert attempts(session, job.id) == [(1, None)]


def test_a_job_that_is_to_be_retried_later_cannot_be_claimed_before(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, claim = a_job_in(JobState.RUNNING, session, a_key(session, now), now)
        jobs.fail(session, claim, retryable(), retry_delay_seconds=2, now=now)
        early = now + 2 * SECOND - timedelta(microseconds=1)
        assert VERBS["claim"](session, claim, early) is None
        assert a_claim(session, job.id, now + 2 * SECOND).attempt == 2


def test_a_job_past_its_deadline_cannot_be_claimed(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        in_time = a_job(session, key, now, deadline_seconds=10)
        too_late = a_job(session, key, now, deadline_seconds=10)
        assert VERBS["claim"](session, Claim(too_late.id, 0), now + 10 * SECOND) is None
        a_claim(session, in_time.id, now + 10 * SECOND - timedelta(microseconds=1))


def test_progress_renews_the_lease_and_is_seen(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, claim = a_job_in(JobState.RUNNING, session, a_key(session, now), now)
        version = job.version
        assert _progress(session, claim, now + 5 * SECOND) is False
        session.refresh(job)
        assert (job.phase, job.fraction, job.bands_done, job.bands_total) == ("upscale", 0.5, 1, 2)
        assert (job.eta_seconds, job.lease_until) == (3.0, now + 5 * SECOND + LEASE)
        assert job.version == version + 1
        assert jobs.heartbeat(session, claim, lease_seconds=LEASE_SECONDS, now=now + 6 * SECOND) is False
        session.refresh(job)
        assert (job.lease_until, job.version) == (now + 6 * SECOND + LEASE, version + 1)


def test_progress_tells_the_worker_of_a_cancel(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, claim = a_job_in(JobState.RUNNING, session, a_key(session, now), now)
        jobs.cancel(session, job.id, now=now)
        assert _progress(session, claim, now) is True
        assert jobs.heartbeat(session, claim, lease_seconds=LEASE_SECONDS, now=now) is True


def test_progress_is_announced_only_to_those_who_asked(database: Database, now: datetime) -> None:
    def announce(session: Session, claim: Claim) -> None:
        jobs.progress(
            session,
            claim,
            phase="upscale",
            fraction=0.25,
            bands_done=1,
            bands_total=4,
            eta_seconds=None,
            lease_seconds=LEASE_SECONDS,
            now=now,
            announce=True,
        )

    with database.transaction() as session:
        key = a_key(session, now)
        told = a_job(session, key, now, webhook_url=HOOK, webhook_events=["job.progress"])
        untold = a_job(session, key, now, webhook_url=HOOK)
        for job in (told, untold):
            announce(session, a_claim(session, job.id, now))
        assert owed(session, told.id) == ["job.progress"]
        assert owed(session, untold.id) == []
        said = session.scalar(select(Delivery.payload).where(Delivery.job_id == told.id))
        assert said is not None
        assert said["data"]["progress"]["fraction"] == 0.25
        # Asked for, and not to be announced this time.
        claim = Claim(told.id, 1, announces_progress=True)
        _progress(session, claim, now)
        assert owed(session, told.id) == ["job.progress"]


# --- success --------------------------------------------------------------------------------------------------------


def test_success_records_the_result_and_owes_the_event_in_one_transaction(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job = a_job(session, a_key(session, now), now, webhook_url=HOOK, ttl_seconds=100)
        claim = a_claim(session, job.id, now)
        _progress(session, claim, now)
        jobs.succeed(session, claim, a_result(claim, warnings=["first frame of 3"]), now=now + SECOND)
        session.refresh(job)
        assert (job.result_width, job.result_height, job.result_bytes) == (32, 24, 1000)
        assert job.labels == [{"label": "goldfinch", "index": 11, "probability": 0.93}]
        assert job.timings == {"queued_seconds": 1.0, "upscale_seconds": 2.5}
        assert job.warnings == ["first frame of 3"]
        assert (job.fraction, job.bands_done, job.bands_total, job.eta_seconds) == (1.0, 2, 2, 0.0)
        assert (job.finished_at, job.expires_at) == (now + SECOND, now + 101 * SECOND)
        assert attempts(session, job.id) == [(1, "succeeded")]
        assert owed(session) == ["job.succeeded"]
        delivery = session.scalars(select(Delivery)).one()
        assert delivery.payload["data"]["result"]["url"] == f"/v1/jobs/{job.id}/result"
        assert delivery.payload["data"]["status"] == "succeeded"


def test_a_transaction_that_fails_after_success_leaves_the_job_running_and_owes_nothing(
    database: Database, now: datetime
) -> None:
    with database.transaction() as session:
        job, claim = a_job_in(JobState.RUNNING, session, a_key(session, now), now, webhook_url=HOOK)

    def succeed_and_stumble() -> None:
        with database.transaction() as session:
            jobs.succeed(session, claim, a_result(claim), now=now)
            raise RuntimeError("before the commit")

    with pytest.raises(RuntimeError, match="before the commit"):
        succeed_and_stumble()
    with database.reading() as session:
        assert session.get_one(Job, job.id).state == JobState.RUNNING
        assert owed(session) == []
        assert attempts(session, job.id) == [(1, None)]


def test_a_result_without_labels_has_none(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session:
        job, claim = a_job_in(JobState.RUNNING, session, a_key(session, now), now)
        jobs.succeed(session, claim, a_result(claim, labels=None), now=now)
        session.refresh(job)
        assert job.labels is None


# --- the fence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", WORKERS_VERBS)
@pytest.mark.parametrize("successor", ["waits", "runs", "runs and is to stop", "has finished"])
def test_a_late_worker_can_do_nothing_to_a_rescued_job(
    database: Database, now: datetime, verb: str, successor: str
) -> None:
    # Given a worker whose lease has passed and whose job was rescued,
    with database.transaction() as session:
        key = a_key(session, now)
        an_endpoint(session, key, now, url=HOOK, events=deliveries.EVENT_TYPES)
        job, late = a_job_in(JobState.RUNNING, session, key, now)
        later = now + LEASE + SECOND
        assert jobs.rescue_lost(session, retry_delay_seconds=2, now=later) == [job.id]
        if successor != "waits":
            winner = a_claim(session, job.id, later, worker_id="w2")
            assert winner.attempt == late.attempt + 1
            if successor == "runs and is to stop":
                jobs.cancel(session, job.id, now=later)
            if successor == "has finished":
                jobs.succeed(session, winner, a_result(winner), now=later)
        before = columns(session, job.id)
        events, history = owed(session), attempts(session, job.id)
    # When it wakes up and writes,
    with pytest.raises(StaleAttempt) as refused, database.transaction() as session:
        VERBS[verb](session, late, later)
    # Then it is told that it does not own the job any more, and nothing has changed.
    assert refused.value.facts == {"job_id": job.id, "attempt": 1}
    assert not refused.value.retryable
    with database.reading() as session:
        assert columns(session, job.id) == before
        assert (owed(session), attempts(session, job.id)) == (events, history)


def test_a_late_worker_cannot_finish_a_job_retried_by_hand(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, late = a_job_in(JobState.RUNNING, session, a_key(session, now), now)
        jobs.cancel(session, job.id, now=now)
        jobs.rescue_lost(session, retry_delay_seconds=2, now=now + LEASE + SECOND)
        jobs.retry(session, job.id, now=now + LEASE + SECOND)
        with pytest.raises(StaleAttempt):
            jobs.succeed(session, late, a_result(late), now=now + LEASE + SECOND)
        newest = a_claim(session, job.id, now + LEASE + SECOND)
        assert newest.attempt == 2
        with pytest.raises(StaleAttempt):
            jobs.succeed(session, late, a_result(late), now=now + LEASE + SECOND)


def test_the_fence_is_the_attempt_and_not_the_worker(database: Database, now: datetime) -> None:
    """The same worker process may claim the job again; its first try is as late as a stranger's."""
    with database.transaction() as session:
        job, first = a_job_in(JobState.RUNNING, session, a_key(session, now), now)
        jobs.fail(session, first, retryable(), retry_delay_seconds=0, now=now)
        a_claim(session, job.id, now, worker_id="w1")
        with pytest.raises(StaleAttempt):
            _progress(session, first, now)


# --- failure --------------------------------------------------------------------------------------------------------


def test_a_failure_that_can_be_tried_again_waits_longer_each_time_and_ends(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job = a_job(session, a_key(session, now), now, webhook_url=HOOK)
        waits = []
        for _ in range(2):
            claim = a_claim(session, job.id, now)
            _progress(session, claim, now)
            assert jobs.fail(session, claim, retryable(), retry_delay_seconds=2, now=now) == JobState.QUEUED
            session.refresh(job)
            assert job.run_after is not None
            waits.append((job.run_after - now).total_seconds())
            assert (job.error_code, job.worker_id, job.published_at) == (None, None, None)
            assert (job.phase, job.fraction, job.bands_done, job.bands_total) == ("queued", 0.0, 0, 0)
            assert job.queued_at == now
            now = job.run_after
        claim = a_claim(session, job.id, now)
        assert jobs.fail(session, claim, retryable(), retry_delay_seconds=2, now=now) == JobState.FAILED
        session.refresh(job)
        assert waits == [2, 4]
        assert (job.error_code, job.error_detail, job.error_retryable) == (
            "internal",
            "the attempt went wrong",
            True,
        )
        assert attempts(session, job.id) == [(1, "retryable"), (2, "retryable"), (3, "retryable")]
        assert owed(session) == ["job.failed"]


def test_a_fatal_failure_ends_the_job_at_once(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, claim = a_job_in(JobState.RUNNING, session, a_key(session, now), now, webhook_url=HOOK)
        state = jobs.fail(session, claim, InvalidImage("The file is cut off."), retry_delay_seconds=2, now=now)
        session.refresh(job)
        assert (state, job.state, job.phase) == (JobState.FAILED, JobState.FAILED, "failed")
        assert (job.error_code, job.error_detail, job.error_retryable) == (
            "invalid-image",
            "The file is cut off.",
            False,
        )
        attempt = session.get_one(Attempt, (job.id, 1))
        assert (attempt.outcome, attempt.error_code, attempt.finished_at) == ("fatal", "invalid-image", now)
        payload = session.scalars(select(Delivery.payload)).one()
        assert payload["data"]["error"] == {
            "code": "invalid-image",
            "detail": "The file is cut off.",
            "retryable": False,
        }


def test_a_picture_too_large_for_the_gpu_goes_to_the_cpu_at_once_and_keeps_its_attempts(
    database: Database, now: datetime
) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        job = a_job(session, key, now, queue="gpu.interactive", max_attempts=1)
        claim = a_claim(session, job.id, now, device="gpu")
        error = OutOfMemory("It does not fit.")
        state = jobs.fail(session, claim, error, retry_delay_seconds=2, now=now, queue="cpu.interactive")
        assert state == JobState.QUEUED
        session.refresh(job)
        assert (job.queue, job.run_after, job.tries_used, job.attempt) == ("cpu.interactive", now, 0, 1)
        assert a_claim(session, job.id, now).attempt == 2
        assert attempts(session, job.id) == [(1, "retryable"), (2, None)]


@pytest.mark.parametrize("jump_seconds", [-3600, 3600])
def test_when_the_clock_is_set_leases_and_waits_move_with_it(
    database: Database, now: datetime, jump_seconds: int
) -> None:
    jumped = now + jump_seconds * SECOND
    with database.transaction() as session:
        key = a_key(session, now)
        short, long = a_job(session, key, now), a_job(session, key, now)
        claims = [a_claim(session, short.id, now), a_claim(session, long.id, now)]
        # The long one stores a large file: it has asked for minutes.
        jobs.heartbeat(session, claims[1], lease_seconds=600, now=now)
        waiting, sent = a_job(session, key, now), a_job(session, key, now)
        failed = a_claim(session, waiting.id, now)
        jobs.fail(session, failed, retryable(), retry_delay_seconds=60, now=now)
        sent.published_at = now
        session.flush()
        jobs.clock_jumped(session, jump_seconds, lease_seconds=20, now=jumped)
        session.expire_all()
        assert short.lease_until == jumped + 20 * SECOND
        assert long.lease_until == jumped + 600 * SECOND
        # Set forward, what waits has waited long enough; set back, it does not wait for the clock to catch up.
        assert waiting.run_after == (jumped if jump_seconds < 0 else now + 60 * SECOND)
        assert sent.published_at == (None if jump_seconds < 0 else now)
        for claim in claims:
            jobs.heartbeat(session, claim, lease_seconds=20, now=jumped)


def test_a_poison_job_fails_after_three_attempts_with_worker_lost(database: Database, now: datetime) -> None:
    """Its worker dies each time before it can say anything: only the claim counts."""
    with database.transaction() as session:
        job = a_job(session, a_key(session, now), now, webhook_url=HOOK, max_attempts=3)
        waits = []
        for _ in range(3):
            a_claim(session, job.id, now)
            now += LEASE + SECOND
            assert jobs.rescue_lost(session, retry_delay_seconds=2, now=now) == [job.id]
            session.refresh(job)
            waits.append(None if job.run_after is None else (job.run_after - now).total_seconds())
            now = job.run_after or now
        assert job.state == JobState.FAILED
        assert (job.error_code, job.error_retryable) == ("worker-lost", True)
        assert "attempt 3" in (job.error_detail or "")
        assert "w1" in (job.error_detail or "")
        # The wait after the first loss was the lease itself.
        assert waits == [0, 2, None]
        assert attempts(session, job.id) == [(1, "lost"), (2, "lost"), (3, "lost")]
        assert owed(session) == ["job.failed"]


def test_an_attempt_given_back_at_shutdown_does_not_count(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job = a_job(session, a_key(session, now), now, max_attempts=1)
        for number in range(1, 11):
            claim = a_claim(session, job.id, now)
            jobs.release(session, claim, now=now)
            session.refresh(job)
            assert (job.state, job.attempt, job.tries_used) == (JobState.QUEUED, number, 0)
            assert (job.run_after, job.published_at, job.published_count) == (None, None, 0)
        assert {outcome for _, outcome in attempts(session, job.id)} == {"released"}


def test_a_server_that_is_away_puts_a_job_off_without_counting(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job = a_job(session, a_key(session, now), now, max_attempts=1)
        claim = a_claim(session, job.id, now)
        jobs.release(session, claim, error=StorageUnavailable("away"), delay_seconds=10, now=now)
        session.refresh(job)
        assert (job.state, job.tries_used, job.run_after) == (JobState.QUEUED, 0, now + timedelta(seconds=10))
        attempt = session.scalars(select(Attempt).where(Attempt.job_id == job.id)).one()
        assert (attempt.outcome, attempt.error_code) == ("released", "storage-unavailable")


# --- rescue ---------------------------------------------------------------------------------------------------------


def test_a_lease_is_lost_only_when_it_has_passed(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, claim = a_job_in(JobState.RUNNING, session, a_key(session, now), now)
        assert jobs.rescue_lost(session, retry_delay_seconds=2, now=now + LEASE) == []
        jobs.heartbeat(session, claim, lease_seconds=LEASE_SECONDS, now=now + LEASE)
        assert jobs.rescue_lost(session, retry_delay_seconds=2, now=now + LEASE + SECOND) == []
        later = now + 2 * LEASE + SECOND
        assert jobs.rescue_lost(session, retry_delay_seconds=2, now=later) == [job.id]
        assert jobs.rescue_lost(session, retry_delay_seconds=2, now=later) == []


def test_a_rescued_job_is_told_apart_in_its_history(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, _ = a_job_in(JobState.RUNNING, session, a_key(session, now), now)
        later = now + LEASE + SECOND
        jobs.rescue_lost(session, retry_delay_seconds=2, now=later)
        attempt = session.get_one(Attempt, (job.id, 1))
        assert (attempt.outcome, attempt.error_code, attempt.finished_at) == ("lost", "worker-lost", later)
        session.refresh(job)
        # What the customer sees is a job that is queued again, not an error.
        assert (job.error_code, job.queued_at, job.run_after, job.published_at) == (None, later, later, None)


def test_rescue_takes_a_bounded_number_at_a_time_the_longest_lost_first(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        lost = [a_job_in(JobState.RUNNING, session, key, now - n * SECOND)[0].id for n in range(3)]
        later = now + LEASE + SECOND
        assert set(jobs.rescue_lost(session, retry_delay_seconds=2, now=later, limit=2)) == set(lost[1:])
        assert jobs.rescue_lost(session, retry_delay_seconds=2, now=later, limit=2) == lost[:1]


# --- cancel ---------------------------------------------------------------------------------------------------------


def test_asking_to_cancel_twice_keeps_the_first_moment(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, claim = a_job_in(JobState.RUNNING, session, a_key(session, now), now, webhook_url=HOOK)
        assert jobs.cancel(session, job.id, now=now).cancel_requested_at == now
        assert jobs.cancel(session, job.id, now=now + SECOND).cancel_requested_at == now
        jobs.acknowledge_cancel(session, claim, now=now + 2 * SECOND)
        session.refresh(job)
        assert (job.state, job.phase, job.result_key) == (JobState.CANCELED, "canceled", None)
        assert attempts(session, job.id) == [(1, "canceled")]
        assert owed(session) == ["job.canceled"]


def test_a_cancel_that_comes_too_late_says_how_the_job_ended(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, _ = a_job_in(JobState.SUCCEEDED, session, a_key(session, now), now)
        with pytest.raises(JobNotCancelable) as refused:
            jobs.cancel(session, job.id, now=now)
        assert refused.value.facts == {"status_now": "succeeded"}


def test_no_result_appears_after_cancel_was_asked(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, claim = a_job_in(JobState.RUNNING, session, a_key(session, now), now)
        jobs.cancel(session, job.id, now=now)
        with pytest.raises(StaleAttempt):
            jobs.succeed(session, claim, a_result(claim), now=now)
        session.refresh(job)
        assert (job.state, job.result_key) == (JobState.RUNNING, None)


# --- retry by hand and deadlines ------------------------------------------------------------------------------------


def test_a_retry_by_hand_has_all_attempts_again_and_a_new_deadline(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job = a_job(session, a_key(session, now), now, max_attempts=1, deadline_seconds=60, webhook_url=HOOK)
        claim = a_claim(session, job.id, now)
        jobs.fail(session, claim, retryable(), retry_delay_seconds=2, now=now)
        later = now + 3600 * SECOND
        job = jobs.retry(session, job.id, now=later)
        assert (job.state, job.attempt, job.tries_used) == (JobState.QUEUED, 1, 0)
        assert (job.queued_at, job.deadline_at, job.expires_at) == (later, later + 60 * SECOND, None)
        assert (job.error_code, job.finished_at, job.started_at, job.run_after) == (None, None, None, None)
        assert (job.published_at, job.published_count) == (None, 0)
        winner = a_claim(session, job.id, later)
        jobs.succeed(session, winner, a_result(winner), now=later)
        assert attempts(session, job.id) == [(1, "retryable"), (2, "succeeded")]
        assert owed(session) == ["job.failed", "job.succeeded"]


def test_a_retry_forgets_the_cancel(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, claim = a_job_in(JobState.RUNNING, session, a_key(session, now), now)
        jobs.cancel(session, job.id, now=now)
        jobs.acknowledge_cancel(session, claim, now=now)
        jobs.retry(session, job.id, now=now)
        winner = a_claim(session, job.id, now)
        assert _progress(session, winner, now) is False
        jobs.succeed(session, winner, a_result(winner), now=now)


def test_a_swept_job_cannot_be_retried(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, _ = _swept(session, a_key(session, now), now)
        with pytest.raises(Gone) as refused:
            jobs.retry(session, job.id, now=now)
        assert refused.value.facts == {"swept_at": now.isoformat()}


def test_a_retry_that_loses_a_race_says_so(
    sqlite_database: Database, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row is locked, so nothing can come between; were it not, the UPDATE's own condition still holds the fence."""
    with sqlite_database.transaction() as session:
        job, _ = a_job_in(JobState.FAILED, session, a_key(session, now), now)
        stale = session.get_one(Job, job.id)
        session.expunge(stale)
        jobs.retry(session, job.id, now=now)
        monkeypatch.setattr(session, "scalar", lambda _query: stale)
        with pytest.raises(JobNotRetryable, match="changed at this very moment"):
            jobs.retry(session, job.id, now=now)


def test_an_overdue_job_expires_with_its_reason(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        job = a_job(session, key, now, deadline_seconds=10, webhook_url=HOOK)
        a_job(session, key, now)
        running = a_job(session, key, now, deadline_seconds=10)
        a_claim(session, running.id, now)
        assert jobs.expire_overdue(session, now=now + 10 * SECOND - timedelta(microseconds=1)) == []
        assert jobs.expire_overdue(session, now=now + 10 * SECOND) == [job.id]
        session.refresh(job)
        assert (job.state, job.error_code) == (JobState.EXPIRED, "deadline-exceeded")
        assert owed(session) == ["job.expired"]


def test_expiry_takes_a_bounded_number_at_a_time(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        overdue = {a_job(session, key, now, deadline_seconds=1).id for _ in range(3)}
        first = jobs.expire_overdue(session, now=now + SECOND, limit=2)
        rest = jobs.expire_overdue(session, now=now + SECOND, limit=2)
        assert (len(first), len(rest), {*first, *rest}) == (2, 1, overdue)


# --- remove and sweep -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", JobState)
def test_a_job_can_be_removed_in_any_state_with_all_that_hangs_on_it(
    database: Database, now: datetime, state: JobState
) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        an_endpoint(session, key, now, url=HOOK, events=deliveries.EVENT_TYPES)
        kept, _ = a_job_in(JobState.SUCCEEDED, session, key, now)
        kept_events = owed(session)
        job, claim = a_job_in(state, session, key, now)
        assert jobs.remove(session, job.id, now=now) == job.blob_prefix
    with database.transaction() as session:
        assert session.get(Job, job.id) is None
        assert attempts(session, job.id) == []
        assert owed(session) == kept_events
        assert session.get(Job, kept.id) is not None
        removals = session.execute(select(BlobRemoval.prefix, BlobRemoval.due_at).order_by(BlobRemoval.due_at)).all()
        assert {row.prefix for row in removals} == {job.blob_prefix}
        late = [now + timedelta(seconds=jobs.LATE_WRITER_SECONDS)] if state == JobState.RUNNING else []
        assert [row.due_at for row in removals] == [now, *late]
        if state == JobState.RUNNING:
            with pytest.raises(StaleAttempt):
                jobs.succeed(session, claim, a_result(claim), now=now)
        with pytest.raises(NotFound):
            jobs.remove(session, job.id, now=now)


def test_pictures_of_finished_jobs_are_let_go_of_when_their_time_has_come(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        short, _ = a_job_in(JobState.SUCCEEDED, session, key, now, ttl_seconds=10)
        a_job_in(JobState.SUCCEEDED, session, key, now, ttl_seconds=1000)
        a_job_in(JobState.RUNNING, session, key, now, ttl_seconds=10)
        a_job_in(JobState.QUEUED, session, key, now, ttl_seconds=10)
        assert jobs.sweep_expired(session, now=now + 9 * SECOND) == []
        version = short.version
        assert jobs.sweep_expired(session, now=now + 10 * SECOND) == [short.id]
        assert jobs.sweep_expired(session, now=now + 10 * SECOND) == []
        session.refresh(short)
        assert (short.state, short.swept_at) == (JobState.SUCCEEDED, now + 10 * SECOND)
        assert short.version == version + 1
        assert session.scalars(select(BlobRemoval.prefix)).all() == [short.blob_prefix]


def test_a_retried_job_is_not_swept(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job, _ = a_job_in(JobState.FAILED, session, a_key(session, now), now, ttl_seconds=10)
        jobs.retry(session, job.id, now=now + 5 * SECOND)
        assert jobs.sweep_expired(session, now=now + 100 * SECOND) == []


# --- batches --------------------------------------------------------------------------------------------------------


def _batch_of(session: Session, now: datetime, size: int) -> tuple[Batch, list[Job]]:
    key = a_key(session, now)
    batch = a_batch(session, key, now, total=size, webhook_url=HOOK)
    return batch, [a_job(session, key, now, batch_id=batch.id) for _ in range(size)]


def test_the_last_job_of_a_batch_to_end_completes_it_however_each_ended(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        batch, (one, two, three, four) = _batch_of(session, now, 4)
        claim = a_claim(session, one.id, now)
        jobs.succeed(session, claim, a_result(claim), now=now)
        claim = a_claim(session, two.id, now)
        jobs.fail(session, claim, InvalidImage("no"), retry_delay_seconds=2, now=now)
        jobs.cancel(session, three.id, now=now)
        session.refresh(batch)
        assert (batch.remaining, owed(session)) == (1, [])
        claim = a_claim(session, four.id, now)
        jobs.fail(session, claim, retryable(), retry_delay_seconds=0, now=now)
        assert owed(session) == [], "an attempt that is tried again ends no job"
        claim = a_claim(session, four.id, now)
        jobs.succeed(session, claim, a_result(claim), now=now)
        session.refresh(batch)
        assert (batch.remaining, owed(session)) == (0, ["batch.completed"])
        payload = session.scalars(select(Delivery.payload)).one()
        assert payload["data"]["status"] == "completed"
        assert Counter(item["status"] for item in payload["data"]["items"]) == {
            "succeeded": 2,
            "failed": 1,
            "canceled": 1,
        }


def test_a_retry_reopens_its_batch(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        batch, (job,) = _batch_of(session, now, 1)
        jobs.cancel(session, job.id, now=now)
        assert owed(session) == ["batch.completed"]
        jobs.retry(session, job.id, now=now)
        session.refresh(batch)
        assert batch.remaining == 1
        jobs.cancel(session, job.id, now=now)
        assert owed(session) == ["batch.completed", "batch.completed"]


def test_removing_the_job_a_batch_was_waiting_for_completes_it(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        batch, (done, waiting) = _batch_of(session, now, 2)
        jobs.cancel(session, done.id, now=now)
        jobs.remove(session, waiting.id, now=now)
        session.refresh(batch)
        assert (batch.total, batch.remaining) == (1, 0)
        assert owed(session) == ["batch.completed"]
        jobs.remove(session, done.id, now=now)
        session.refresh(batch)
        assert (batch.total, batch.remaining) == (0, 0)
        assert owed(session) == ["batch.completed"]


def test_a_count_that_was_read_before_others_counted_down_is_not_believed(
    postgresql_database: Database, now: datetime
) -> None:
    with postgresql_database.transaction() as session:
        batch, (one, two) = _batch_of(session, now, 2)
    with postgresql_database.transaction() as early:
        assert early.get_one(Batch, batch.id).remaining == 2
        with postgresql_database.transaction() as other:
            jobs.cancel(other, one.id, now=now)
        jobs.cancel(early, two.id, now=now)
    with postgresql_database.reading() as session:
        assert session.get_one(Batch, batch.id).remaining == 0
        assert owed(session) == ["batch.completed"]


# --- races ----------------------------------------------------------------------------------------------------------


def run_together(*acts: Callable[[], None]) -> list[BaseException]:
    """Runs each in a thread of its own, started at one moment; returns what they raised."""
    raised: list[BaseException] = []
    start = threading.Barrier(len(acts))

    def run(act: Callable[[], None]) -> None:
        try:
            start.wait(30)
            act()
        except BaseException as error:  # noqa: BLE001  (judged by the test's own thread)
            raised.append(error)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a racing thread hangs"
    return raised


def test_of_eight_workers_that_claim_one_job_exactly_one_has_it(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        contested = [a_job(session, key, now).id for _ in range(10)]
    for job_id in contested:
        won: list[Claim] = []

        def take(job_id: str = job_id, won: list[Claim] = won) -> None:
            with database.transaction() as session:
                claim = jobs.claim(
                    session,
                    job_id,
                    worker_id=threading.current_thread().name,
                    device="cpu",
                    lease_seconds=LEASE_SECONDS,
                    now=now,
                )
            if claim is not None:
                won.append(claim)

        assert run_together(*[take] * 8) == []
        assert won == [Claim(job_id, 1)]
        with database.reading() as session:
            assert attempts(session, job_id) == [(1, None)]


def race(
    database: Database,
    job_ids: list[str],
    left: Callable[[Session, str], Any],
    right: Callable[[Session, str], Any],
    *,
    seed: int,
) -> dict[str, list[str]]:
    """Two threads go over the same jobs, each in its own transaction per job, meeting at each; what each said of each.

    "done", or the name of the refusal. Anything that is not one of our refusals fails the test.
    """
    said: dict[str, list[str]] = {job_id: ["", ""] for job_id in job_ids}
    meeting = threading.Barrier(2)

    def go(side: int, act: Callable[[Session, str], Any]) -> None:
        # Some microseconds more or less, drawn anew for each job: either side comes first about as often.
        chance = random.Random(seed + side)
        for job_id in job_ids:
            meeting.wait(30)
            sum(range(chance.randrange(20_000)))
            try:
                with database.transaction() as session:
                    act(session, job_id)
                said[job_id][side] = "done"
            except (StaleAttempt, JobNotCancelable, JobNotRetryable, NotFound) as refused:
                said[job_id][side] = type(refused).__name__

    raised = run_together(lambda: go(0, left), lambda: go(1, right))
    assert raised == []
    return said


@pytest.mark.parametrize("rounds", [100])
def test_of_a_cancel_and_a_success_at_one_moment_the_first_wins_and_the_other_knows(
    database: Database, now: datetime, rounds: int
) -> None:
    """Run on both databases; a thousand more are in `test_races.py`. After a cancel was accepted no result appears."""
    with database.transaction() as session:
        key = a_key(session, now)
        an_endpoint(session, key, now, url=HOOK, events=deliveries.TERMINAL_EVENTS)
        claims = [a_job_in(JobState.RUNNING, session, key, now)[1] for _ in range(rounds)]
    ids = [claim.job_id for claim in claims]

    def finish(session: Session, job_id: str) -> None:
        claim = Claim(job_id, 1)
        jobs.succeed(session, claim, a_result(claim), now=now)

    said = race(database, ids, lambda s, job_id: jobs.cancel(s, job_id, now=now), finish, seed=1)

    outcomes = Counter(tuple(each) for each in said.values())
    assert set(outcomes) <= {("done", "StaleAttempt"), ("JobNotCancelable", "done")}, outcomes
    with database.reading() as session:
        for job in session.scalars(select(Job)):
            canceled = said[job.id][0] == "done"
            assert job.state == (JobState.RUNNING if canceled else JobState.SUCCEEDED)
            assert (job.result_key is None) == canceled
            assert owed(session, job.id) == ([] if canceled else ["job.succeeded"])


@pytest.mark.parametrize("give_back", ["release", "fail, can be tried again", "fail to another queue"])
def test_a_cancel_is_never_refused_because_the_worker_gives_the_job_back(
    postgresql_database: Database, now: datetime, give_back: str
) -> None:
    """RUNNING to one UPDATE and QUEUED to the other: a cancel between them must not be told that the job has ended."""
    with postgresql_database.transaction() as session:
        key = a_key(session, now)
        ids = [a_job_in(JobState.RUNNING, session, key, now)[0].id for _ in range(100)]
    said = race(
        postgresql_database,
        ids,
        lambda s, job_id: jobs.cancel(s, job_id, now=now),
        lambda s, job_id: VERBS[give_back](s, Claim(job_id, 1), now),
        seed=2,
    )
    assert {tuple(each) for each in said.values()} == {("done", "done")}
    with postgresql_database.reading() as session:
        assert set(session.scalars(select(Job.state))) == {JobState.CANCELED}


def test_a_rescue_and_a_worker_that_wakes_up_do_not_both_win(database: Database, now: datetime) -> None:
    later = now + LEASE + SECOND
    with database.transaction() as session:
        key = a_key(session, now)
        an_endpoint(session, key, now, url=HOOK, events=deliveries.TERMINAL_EVENTS)
        ids = [a_job_in(JobState.RUNNING, session, key, now)[0].id for _ in range(100)]
    rescued: list[str] = []

    def finish(session: Session, job_id: str) -> None:
        claim = Claim(job_id, 1)
        jobs.succeed(session, claim, a_result(claim), now=later)

    def rescue(session: Session, _: str) -> None:
        rescued.extend(jobs.rescue_lost(session, retry_delay_seconds=2, now=later, limit=2))

    said = race(database, ids, rescue, finish, seed=3)
    with database.reading() as session:
        for job in session.scalars(select(Job)):
            finished = said[job.id][1] == "done"
            assert job.state in ((JobState.SUCCEEDED,) if finished else (JobState.QUEUED, JobState.RUNNING))
            assert (job.id in rescued) == (not finished)
            assert owed(session, job.id) == (["job.succeeded"] if finished else [])
    assert len(rescued) == len(set(rescued))


def test_two_rescuers_give_back_each_job_once(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        lost = [a_job_in(JobState.RUNNING, session, key, now)[0].id for _ in range(40)]
    rescued: list[str] = []

    def rescue() -> None:
        for _ in range(10):
            with database.transaction() as session:
                rescued.extend(jobs.rescue_lost(session, retry_delay_seconds=2, now=now + LEASE + SECOND, limit=7))

    assert run_together(rescue, rescue) == []
    assert sorted(rescued) == sorted(lost)
    with database.reading() as session:
        assert all(attempts(session, job_id) == [(1, "lost")] for job_id in lost)


def test_jobs_of_one_batch_that_end_together_complete_it_once(database: Database, now: datetime) -> None:
    for _ in range(5):
        with database.transaction() as session:
            batch, members = _batch_of(session, now, 8)
            claims = [a_claim(session, job.id, now) for job in members]

        def end(claim: Claim) -> Callable[[], None]:
            def run() -> None:
                with database.transaction() as session:
                    jobs.succeed(session, claim, a_result(claim), now=now)

            return run

        assert run_together(*[end(claim) for claim in claims]) == []
        with database.reading() as session:
            assert session.get_one(Batch, batch.id).remaining == 0
            completed = select(func.count()).where(Delivery.batch_id == batch.id)
            assert session.scalar(completed) == 1


def test_those_who_end_many_jobs_of_many_batches_do_not_lock_each_other_out(
    postgresql_database: Database, now: datetime
) -> None:
    """Two rescuers and an expirer, ending jobs of the same batches in one transaction, while workers finish others."""
    database, later = postgresql_database, now + LEASE + SECOND
    with database.transaction() as session:
        key = a_key(session, now)
        batches = [a_batch(session, key, now, total=9) for _ in range(6)]
        finishing: list[Claim] = []
        for number in range(9):
            for batch in batches if number % 2 else reversed(batches):
                if number % 3 == 0:
                    a_job(session, key, now, batch_id=batch.id, deadline_seconds=1)
                else:
                    job = a_job(session, key, now, batch_id=batch.id, max_attempts=1)
                    claim = a_claim(session, job.id, now)
                    if number % 3 == 2:
                        finishing.append(claim)

    def rescue() -> None:
        for _ in range(20):
            with database.transaction() as session:
                jobs.rescue_lost(session, retry_delay_seconds=2, now=later, limit=12)

    def expire() -> None:
        with database.transaction() as session:
            jobs.expire_overdue(session, now=later)

    def work() -> None:
        for claim in finishing:
            with suppress(StaleAttempt), database.transaction() as session:
                jobs.succeed(session, claim, a_result(claim), now=later)

    assert run_together(rescue, expire, work, rescue) == [], "a deadlock is ended by the server with an error"
    rescue()
    with database.reading() as session:
        assert session.scalar(select(func.count()).where(Job.state.not_in(TERMINAL_STATES))) == 0
        assert set(session.scalars(select(Batch.remaining))) == {0}


def test_the_present_moment_of_both_databases_works_as_now(database: Database) -> None:
    """All above moves `now` by hand; here the database's own clock is given, as the product does."""
    with database.transaction() as session:
        key = a_key(session, clock(session))
        job = a_job(session, key, clock(session))
        claim = a_claim(session, job.id, clock(session))
        assert _progress(session, claim, clock(session)) is False
        assert jobs.rescue_lost(session, retry_delay_seconds=2, now=clock(session)) == []
        jobs.succeed(session, claim, a_result(claim), now=clock(session))
        session.refresh(job)
        assert job.finished_at is not None
        assert job.created_at <= job.finished_at
