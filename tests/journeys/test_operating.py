"""An operator over real workers: what is paused or drained does nothing, and goes on where it stopped."""

from __future__ import annotations

from shared import jobs, queueing, workers
from shared.db import Database, clock
from shared.models import Attempt
from shared.stack import Stack
from tests.conftest import Service, wait_until
from tests.factories import a_png


def test_drained_workers_take_nothing_and_when_one_is_resumed_the_job_is_done(
    service: Service, stack: Stack, stack_database: Database
) -> None:
    lost_after = stack.settings.worker_lost_after_seconds

    def image_workers() -> list[str]:
        with stack_database.reading() as session:
            # Those of tests before this one that were killed never said that they stopped.
            alive = queueing.live_workers(session, worker_lost_after_seconds=lost_after, now=clock(session))
            return [worker.id for worker in alive if worker.kind == "images"]

    both = wait_until(lambda: found if len(found := image_workers()) == 2 else None, seconds=60, what="two workers")
    with stack_database.transaction() as session:
        for worker_id in both:
            workers.drain(session, worker_id, now=clock(session))
    first, second = service.submit(a_png(16, 12)), service.submit(a_png(12, 16))

    def given_back() -> bool:
        with stack_database.reading() as session:
            found = [session.get_one(jobs.Job, job["id"]) for job in (first, second)]
            return all(job.published_count > 0 and job.attempt == 0 for job in found)

    wait_until(given_back, seconds=30, what="the messages to come and be given back")
    with stack_database.transaction() as session:
        workers.resume(session, both[0])
    for job in (first, second):
        assert service.wait(job["id"])["status"] == "succeeded"
    with stack_database.transaction() as session:
        taken = {session.get_one(Attempt, (job["id"], 1)).worker_id for job in (first, second)}
        for worker_id in both[1:]:
            workers.resume(session, worker_id)
    assert taken == {both[0]}


def test_a_paused_queue_holds_its_jobs_until_it_is_resumed(service: Service, stack_database: Database) -> None:
    with stack_database.transaction() as session:
        jobs.pause_queue(session, "cpu.bulk", now=clock(session))
    held = service.submit(a_png(16, 12), priority="bulk")
    # A job of another queue is done meanwhile, which shows that somebody was there to take this one.
    assert service.wait(service.submit(a_png(16, 12), priority="interactive")["id"])["status"] == "succeeded"
    assert service.job(held["id"])["attempt"] == 0
    with stack_database.transaction() as session:
        jobs.resume_queue(session, "cpu.bulk")
    done = service.wait(held["id"])
    assert done["status"] == "succeeded"
    small = service.http.get(f"/v1/jobs/{held['id']}/thumbnail")
    assert (small.status_code, small.headers["Content-Type"]) == (200, "image/webp")
    with stack_database.reading() as session:
        trace = session.get_one(Attempt, (held["id"], 1)).trace
    assert trace is not None
    assert [phase for phase, _ in trace["phases"]][-1] == "store"
