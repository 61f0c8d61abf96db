"""What an operator may do to the service as a whole: pause a queue, drain a worker, and be remembered for it."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from sqlalchemy import select

from shared import audit, jobs, queries, queueing, workers
from shared.db import Database
from shared.errors import NotFound
from shared.models import Job
from shared.outbox import mark_published
from shared.workers import WorkerFacts
from tests.factories import LEASE_SECONDS, a_claim, a_job, a_key


def worker(worker_id: str = "w1", device: str = "cpu") -> WorkerFacts:
    return WorkerFacts(worker_id, "images", "host", 1, (f"{device}.interactive", f"{device}.bulk"), device)


def test_nothing_is_claimed_from_a_paused_queue_and_what_runs_goes_on(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        running, waiting = a_job(session, key, now).id, a_job(session, key, now).id
        elsewhere = a_job(session, key, now, queue="cpu.bulk").id
        claim = a_claim(session, running, now)
    with database.transaction() as session:
        assert jobs.pause_queue(session, "cpu.interactive", now=now)
        assert not jobs.pause_queue(session, "cpu.interactive", now=now), "it is paused already"
    with database.transaction() as session:
        taken = jobs.claim(session, waiting, worker_id="w1", device="cpu", lease_seconds=LEASE_SECONDS, now=now)
        assert taken is None
        assert a_claim(session, elsewhere, now).attempt == 1
        assert jobs.heartbeat(session, claim, lease_seconds=LEASE_SECONDS, now=now) is False
        [depth] = [
            depth
            for depth in queueing.queue_depths(session, worker_lost_after_seconds=30, now=now)
            if depth.queue == "cpu.interactive"
        ]
        assert (depth.queued, depth.running, depth.paused_at) == (1, 1, now)
    with database.transaction() as session:
        assert jobs.resume_queue(session, "cpu.interactive")
        assert not jobs.resume_queue(session, "cpu.interactive"), "it was not paused"
        assert a_claim(session, waiting, now).attempt == 1


def test_a_paused_queue_is_sent_no_messages_and_after_the_pause_all_of_them(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        job_id = a_job(session, a_key(session, now), now).id
        jobs.pause_queue(session, "cpu.interactive", now=now)
        # A message that came during the pause found nothing to claim.
        mark_published(session, [job_id], "generation", now)
    later = now + timedelta(hours=2)

    def due() -> list[str]:
        with database.reading() as session:
            resend_after = dict.fromkeys(queueing.IMAGE_QUEUES, 60.0)
            found = queries.unpublished(session, generation="generation", resend_after=resend_after, now=later)
            return [job.id for job in found]

    assert due() == []
    with database.transaction() as session:
        jobs.resume_queue(session, "cpu.interactive")
    assert due() == [job_id]


def test_a_drained_worker_claims_nothing_and_finishes_what_it_has(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        workers.enlist(session, worker("w1"), now=now)
        workers.enlist(session, worker("w2"), now=now)
        running, waiting = a_job(session, key, now).id, a_job(session, key, now).id
        claim = a_claim(session, running, now, worker_id="w1")
        workers.drain(session, "w1", now=now)
        workers.drain(session, "w1", now=now + timedelta(seconds=5))
    with database.transaction() as session:
        assert workers.is_drained(session, "w1")
        assert session.get_one(workers.Worker, "w1").drained_at == now, "twice keeps the first moment"
        taken = jobs.claim(session, waiting, worker_id="w1", device="cpu", lease_seconds=LEASE_SECONDS, now=now)
        assert taken is None
        jobs.heartbeat(session, claim, lease_seconds=LEASE_SECONDS, now=now)
        [depth] = [
            depth
            for depth in queueing.queue_depths(session, worker_lost_after_seconds=30, now=now)
            if depth.queue == "cpu.interactive"
        ]
        assert depth.live_workers == 1
    with database.transaction() as session:
        workers.resume(session, "w1")
        assert a_claim(session, waiting, now, worker_id="w1").attempt == 1


def test_a_queue_whose_every_worker_is_drained_is_forsaken(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        workers.enlist(session, worker("w1", "gpu"), now=now)
        assert queueing.gpu_is_alive(session, worker_lost_after_seconds=30, now=now)
        a_job(session, a_key(session, now), now, queue="gpu.interactive")
        workers.drain(session, "w1", now=now)
    with database.reading() as session:
        assert not queueing.gpu_is_alive(session, worker_lost_after_seconds=30, now=now), "no job is to be sent to it"
        depths = queueing.queue_depths(session, worker_lost_after_seconds=30, now=now)
        assert [depth.queue for depth in depths if depth.is_forsaken] == ["gpu.interactive"]


def test_there_is_no_draining_of_a_worker_there_is_not(sqlite_database: Database, now: datetime) -> None:
    with sqlite_database.transaction() as session, pytest.raises(NotFound):
        workers.drain(session, "nobody", now=now)
    with sqlite_database.transaction() as session, pytest.raises(NotFound):
        workers.resume(session, "nobody")


def test_each_message_given_back_has_another_job_sent_again(database: Database, now: datetime) -> None:
    queues = ("cpu.interactive", "cpu.bulk")
    with database.transaction() as session:
        key = a_key(session, now)
        ids = [a_job(session, key, now, queue=queue).id for queue in ("cpu.interactive", "cpu.bulk", "cpu.bulk")]
        elsewhere = a_job(session, key, now, queue="gpu.bulk").id
        mark_published(session, [*ids, elsewhere], "generation", now)
        # The first is taken by another's message: its own stands for one that waits.
        a_claim(session, ids[0], now)
    unsent = []
    for _ in range(3):
        with database.transaction() as session:
            jobs.give_message_back(session, queues, now=now)
            unsent.append(set(session.scalars(select(Job.id).where(Job.published_at.is_(None)))))
    assert unsent == [{ids[1]}, set(ids[1:]), set(ids[1:])], "what runs, and what waits elsewhere, is not sent again"


def test_what_was_done_is_told_newest_first_and_what_was_rolled_back_was_not_done(
    database: Database, now: datetime
) -> None:
    for number in range(3):
        with database.transaction() as session:
            audit.record(
                session,
                key_id="key_1",
                key_name="operator",
                action="job.cancel",
                subject=f"job_{number}",
                now=now + timedelta(seconds=number),
                detail={"jobs": 1},
            )

    def one_that_fails() -> None:
        with database.transaction() as session:
            audit.record(session, key_id=None, key_name="operator", action="job.delete", subject="job_3", now=now)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        one_that_fails()
    with database.reading() as session:
        first = audit.entries(session, limit=2)
        assert [entry.subject for entry in first] == ["job_2", "job_1"]
        assert (first[0].key_name, first[0].detail) == ("operator", {"jobs": 1})
        assert [entry.subject for entry in audit.entries(session, before=first[-1].id)] == ["job_0"]
