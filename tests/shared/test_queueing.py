"""Which queue a job stands in, its place there, who serves it, and how long it waits."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.orm import Session

from shared import queries, queueing
from shared.db import Database
from shared.models import JobState, Worker
from tests.factories import a_claim, a_job, a_job_in, a_key

SECOND = timedelta(seconds=1)
LOST_AFTER = {"worker_lost_after_seconds": 30.0}


def a_worker(session: Session, worker_id: str, now: datetime, **changes: Any) -> Worker:
    facts: dict[str, Any] = {
        "id": worker_id,
        "kind": "images",
        "host": "h",
        "pid": 1,
        "device": "cpu",
        "queues": ["cpu.interactive", "cpu.bulk"],
        "models_loaded": [],
        "started_at": now,
        "seen_at": now,
    }
    worker = Worker(**facts | changes)
    session.add(worker)
    session.flush()
    return worker


def test_a_queued_job_knows_its_place(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        first, second, third = (a_job(session, key, now + n * SECOND) for n in range(3))
        a_job(session, key, now, queue="cpu.bulk")
        places = [queueing.queue_position(session, job) for job in (first, second, third)]
        assert places == [1, 2, 3]
        assert queries.pulse(session, third.id, key.id).queue_position == 3
        a_claim(session, first.id, now)
        for job in (first, second):
            session.refresh(job)
        assert [queueing.queue_position(session, job) for job in (first, second)] == [None, 1]
        assert queries.pulse(session, first.id, key.id).queue_position is None


def test_depths_tell_how_many_wait_run_and_serve(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)
        a_job(session, key, now - 5 * SECOND)
        a_job(session, key, now - 3 * SECOND)
        a_job_in(JobState.RUNNING, session, key, now)
        a_job(session, key, now, queue="gpu.bulk")
        a_worker(session, "w1", now)
        a_worker(session, "w2", now - 31 * SECOND)
        a_worker(session, "w3", now, stopped_at=now)
        depths = {depth.queue: depth for depth in queueing.queue_depths(session, **LOST_AFTER, now=now)}
        assert tuple(depths) == queueing.IMAGE_QUEUES
        busy = depths["cpu.interactive"]
        assert (busy.queued, busy.oldest_seconds, busy.running, busy.live_workers) == (2, 5.0, 1, 1)
        unserved = depths["gpu.bulk"]
        assert (unserved.queued, unserved.oldest_seconds, unserved.live_workers) == (1, 0.0, 0)
        assert (depths["cpu.bulk"].queued, depths["cpu.bulk"].oldest_seconds) == (0, None)
        assert [worker.id for worker in queueing.live_workers(session, **LOST_AFTER, now=now)] == ["w1"]
        assert {worker.id for worker in queries.recent_workers(session, now=now)} == {"w1", "w2", "w3"}


@pytest.mark.parametrize(
    ("device", "gpu_alive", "queue"),
    [
        ("auto", True, "gpu.bulk"),
        ("auto", False, "cpu.bulk"),
        ("cpu", True, "cpu.bulk"),
        ("gpu", False, "gpu.bulk"),
    ],
)
def test_the_queue_follows_from_the_device_and_from_who_is_alive(device: str, gpu_alive: bool, queue: str) -> None:
    assert queueing.image_queue(device, "bulk", gpu_alive=gpu_alive) == queue
    assert queue in queueing.IMAGE_QUEUES


def test_a_gpu_is_alive_while_its_worker_is_heard_of(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        a_worker(session, "cpu-1", now)
        assert not queueing.gpu_is_alive(session, **LOST_AFTER, now=now)
        a_worker(session, "gpu-1", now, device="gpu", queues=["gpu.interactive", "gpu.bulk"])
        assert queueing.gpu_is_alive(session, **LOST_AFTER, now=now + 29 * SECOND)
        assert not queueing.gpu_is_alive(session, **LOST_AFTER, now=now + 30 * SECOND)


def test_the_expected_wait_is_the_work_ahead_over_those_who_do_it(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        key = a_key(session, now)

        def wait() -> float:
            return queueing.expected_wait_seconds(session, "cpu.interactive", **LOST_AFTER, now=now)

        assert wait() == 0.0
        a_job(session, key, now, expected_seconds=10)
        a_job_in(JobState.RUNNING, session, key, now, expected_seconds=20)
        a_job(session, key, now, expected_seconds=500, queue="cpu.bulk")
        a_job_in(JobState.SUCCEEDED, session, key, now, expected_seconds=1000)
        assert wait() == 30.0
        a_worker(session, "w1", now)
        a_worker(session, "w2", now)
        a_worker(session, "w3", now, queues=["gpu.bulk"])
        assert wait() == 15.0
