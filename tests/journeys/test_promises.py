"""A promise at a time, with the real network: what is killed, frozen or raced against is watched step by step.

Each test breaks the running service from outside, by signals alone. Leases here last seconds (`STACK_SETTINGS`), so
that rescue can be waited for. Everything at once, and often, is the chaos of `tests/chaos`.
"""

from __future__ import annotations

import io
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import select

from shared import shards
from shared.db import Database
from shared.models import Attempt, Job, JobState, Shard, Worker
from shared.stack import Stack
from shared.storage import Storage
from tests.conftest import STACK_SETTINGS, Receiver, Service, wait_until
from tests.journeys.test_main_job import of_type, photograph

LEASE_SECONDS = STACK_SETTINGS["lease_seconds"]
# A machine with other things to do may take several times as long as a quiet one.
PATIENCE_SECONDS = 120


def worker_of(database: Database, job_id: str) -> Worker | None:
    """The row of the image process that holds this job now; None while it waits."""
    with database.reading() as session:
        return session.scalar(
            select(Worker)
            .join(Job, Job.worker_id == Worker.id)
            .where(Job.id == job_id, Job.state == JobState.RUNNING, Worker.current_job_id == job_id)
        )


def attempts(database: Database, job_id: str) -> list[tuple[int, str | None]]:
    with database.reading() as session:
        rows = session.execute(
            select(Attempt.number, Attempt.outcome).where(Attempt.job_id == job_id).order_by(Attempt.number)
        )
        return [(row.number, row.outcome) for row in rows]


def live_image_processes(database: Database, stack: Stack) -> list[int]:
    """Process ids of enlisted image processes that there still are."""
    with database.reading() as session:
        pids = session.scalars(select(Worker.pid).where(Worker.kind == "images", Worker.stopped_at.is_(None))).all()
    return [pid for pid in pids if is_child_of(pid, stack.process("images").pid)]


def is_child_of(pid: int, group: int) -> bool:
    try:
        return os.getpgid(pid) == group
    except ProcessLookupError:
        return False


@pytest.fixture
def whole(stack: Stack, stack_database: Database) -> Iterator[None]:
    """What a test has broken is whole again before the next one begins."""
    yield
    wait_until(
        lambda: len(live_image_processes(stack_database, stack)) == STACK_SETTINGS["worker_concurrency"],
        seconds=PATIENCE_SECONDS,
        what="the image processes to be back",
    )


def running(job: dict[str, Any]) -> bool:
    """In the middle: something is done, and much is not."""
    return bool(job["status"] == "running" and 0.02 < job["progress"]["fraction"] < 0.7)


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """The process is stopped as by a debugger: its connections stay open and say nothing."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_g1_a_job_whose_process_is_killed_starts_again_and_succeeds(
    stack: Stack, service: Service, stack_database: Database, receiver: Receiver, whole: None
) -> None:
    job = service.submit(photograph(160, 120), webhook_url=receiver.url)
    service.wait(job["id"], until=running)
    worker = worker_of(stack_database, job["id"])
    assert worker is not None

    # The control: without the relay, and so without rescue, the job would be lost for good.
    stack.hold("relay")
    killed_at = time.monotonic()
    os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: time.monotonic() - killed_at > LEASE_SECONDS + 1, seconds=60, what="the lease to pass")
    lost = service.job(job["id"])
    assert (lost["status"], lost["attempt"]) == ("running", 1), "nobody has noticed"
    stack.release("relay")

    done = service.wait(job["id"], seconds=PATIENCE_SECONDS)
    assert (done["status"], done["attempt"]) == ("succeeded", 2)
    assert attempts(stack_database, job["id"]) == [(1, "lost"), (2, "succeeded")]
    assert len(service.result(job["id"])) == done["result"]["bytes"]
    assert len(receiver.wait_for(where=of_type("job.succeeded"))) == 1


def test_g1_a_process_that_is_killed_in_the_middle_of_a_shard_costs_that_shard(
    stack: Stack, service: Service, stack_database: Database, whole: None
) -> None:
    job = service.submit(photograph(240, 180), model="real-esrgan-video")
    tries: dict[int, int] = {}

    def looked() -> list[Shard]:
        with stack_database.reading() as session:
            rows = list(shards.of_job(session, job["id"]))
        tries.update({row.position: row.number for row in rows})
        return rows

    def a_helper() -> Worker | None:
        """Whoever is in the middle of a shard of a job that somebody else holds."""
        busy = {row.worker_id for row in looked() if row.finished_at is None and row.tiles_done > 0}
        with stack_database.reading() as session:
            holder = session.get_one(Job, job["id"]).worker_id
            return session.scalar(select(Worker).where(Worker.id.in_(busy - {None, holder})))

    helper = wait_until(a_helper, seconds=PATIENCE_SECONDS, what="a process that helps")
    os.kill(helper.pid, signal.SIGKILL)
    done = service.wait(
        job["id"], seconds=PATIENCE_SECONDS, until=lambda view: looked() is not None and view["finished_at"]
    )

    assert (done["status"], done["attempt"]) == ("succeeded", 1), "the attempt that holds the job went on"
    assert done["timings"]["shards"] == len(tries)
    assert sorted(tries.values()) == [1] * (len(tries) - 1) + [2], "one shard was done again"
    with Image.open(io.BytesIO(service.result(job["id"]))) as result:
        assert result.size == (960, 720)
        result.load()


def test_g2_a_worker_that_wakes_up_after_its_lease_is_refused(
    stack: Stack, service: Service, stack_database: Database, receiver: Receiver, whole: None
) -> None:
    # Given a worker that is frozen in the middle of a job,
    job = service.submit(photograph(160, 120), webhook_url=receiver.url)
    service.wait(job["id"], until=running)
    late = worker_of(stack_database, job["id"])
    assert late is not None
    with frozen(late.pid):
        frozen_at = time.monotonic()
        # When another has taken the job over and brought it to its end,
        done = service.wait(job["id"], seconds=PATIENCE_SECONDS)
        assert time.monotonic() - frozen_at > LEASE_SECONDS - 1, "it was taken away before its lease had passed"
        assert (done["status"], done["attempt"]) == ("succeeded", 2)
        winner = service.result(job["id"])
        assert worker_is_on(stack_database, late.id, job["id"]), "the frozen one still believes that it has the job"
    # and the first goes on,
    wait_until(
        lambda: not worker_is_on(stack_database, late.id, job["id"]),
        seconds=PATIENCE_SECONDS,
        what="the late worker to learn that it is late",
    )
    # Then it has changed nothing: one result, one end.
    assert service.job(job["id"]) == done
    assert service.result(job["id"]) == winner
    assert attempts(stack_database, job["id"]) == [(1, "lost"), (2, "succeeded")]
    log = (stack.settings.data_dir / "logs" / "images.log").read_text().splitlines()
    assert [line for line in log if job["id"] in line and "outcome=superseded" in line], "no stale write was refused"
    # What comes after it has been told: had there been a second event, it would have come before.
    other = service.submit(photograph(8, 8), webhook_url=receiver.url)
    receiver.wait_for(where=lambda request: request.json["data"]["id"] == other["id"])
    told = [request.json["type"] for request in receiver.requests if request.json["data"]["id"] == job["id"]]
    assert told == ["job.succeeded"]
    storage = Storage(stack.settings)
    try:
        stored = [key.rpartition("/")[2] for key in storage.keys(f"jobs/{job['id']}/")]
    finally:
        storage.close()
    # Beside them lie small pictures of how it looked on the way.
    assert [name for name in stored if name.startswith(("input", "result-"))] == ["input", "result-2.png"]


def worker_is_on(database: Database, worker_id: str, job_id: str) -> bool:
    with database.reading() as session:
        return bool(session.get_one(Worker, worker_id).current_job_id == job_id)


def test_g10_no_result_appears_after_a_cancel_was_accepted(
    service: Service, stack_database: Database, receiver: Receiver
) -> None:
    """Cancels that come at every moment of a job's life, from before its claim to its last write."""
    rounds, chance = 30, random.Random(10)
    small = photograph(16, 16)
    # How long such a job takes here: the cancels are spread over that.
    began = time.monotonic()
    service.wait(service.submit(small)["id"])
    usual_seconds = time.monotonic() - began
    accepted: list[str] = []
    refused: list[str] = []

    def go(delays: list[float]) -> None:
        for delay_seconds in delays:
            job_id = service.submit(small, webhook_url=receiver.url)["id"]
            threading.Event().wait(delay_seconds)
            answer = service.http.post(f"/v1/jobs/{job_id}/cancel")
            assert answer.status_code in (202, 409), answer.text
            (accepted if answer.status_code == 202 else refused).append(job_id)

    go([chance.uniform(0, 1.5 * usual_seconds) for _ in range(rounds)])
    ended = {job_id: service.wait(job_id, seconds=PATIENCE_SECONDS) for job_id in accepted + refused}
    assert {ended[job_id]["status"] for job_id in accepted} <= {"canceled"}
    assert {ended[job_id]["status"] for job_id in refused} <= {"succeeded"}
    assert accepted, "every cancel came too late: nothing was tried"
    with stack_database.reading() as session:
        for job in session.scalars(select(Job).where(Job.id.in_(accepted))):
            assert (job.result_key, job.result_sha256) == (None, None)
    told = receiver.wait_for(rounds, seconds=PATIENCE_SECONDS)
    assert Counter((request.json["data"]["id"], request.json["type"]) for request in told) == Counter(
        [(job_id, "job.canceled") for job_id in accepted] + [(job_id, "job.succeeded") for job_id in refused]
    )
