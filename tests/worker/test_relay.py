"""The relay's loop, its steps, and the process: what fails or hangs in one step holds up no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared import jobs, queries, queueing
from shared.db import Database, clock
from shared.errors import BrokerUnavailable, DatabaseUnavailable
from shared.models import Job, JobState
from shared.outbox import Broker
from shared.settings import ENV_PREFIX, Settings
from shared.workers import WorkerFacts, enlist, seen
from tests.conftest import wait_until
from tests.factories import a_claim, a_job, a_key
from worker import relay
from worker.relay import Step

ROOT = Path(__file__).resolve().parents[2]


def job(database: Database, job_id: str) -> Job:
    with database.transaction() as session:
        return session.get_one(Job, job_id)


def a_lapsed_job(database: Database) -> str:
    """A job whose worker has let its lease pass."""
    with database.transaction() as session:
        now = clock(session) - timedelta(seconds=60)
        made = a_job(session, a_key(session, now), now)
        a_claim(session, made.id, now)
    return made.id


def test_auto_jobs_of_a_gpu_that_is_lost_go_to_the_cpu_and_come_back_with_it(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "ROWS_AT_ONCE", 2)
    silence_seconds = settings.worker_lost_after_seconds + 1

    def facts(device: str) -> WorkerFacts:
        return WorkerFacts(device, "images", device, 1, (f"{device}.interactive", f"{device}.bulk"), device)

    def waiting() -> dict[str, int]:
        with database.reading() as session:
            return dict(Counter(session.scalars(select(Job.queue))))

    # Given five jobs for whatever device there is, two for a GPU, and a GPU that says nothing any more,
    with database.transaction() as session:
        now = clock(session)
        key = a_key(session, now)
        enlist(session, facts("cpu"), now=now)
        enlist(session, facts("gpu"), now=now - timedelta(seconds=silence_seconds))
        for number in range(7):
            device = "auto" if number < 5 else "gpu"
            queue = queueing.image_queue("gpu", ("interactive", "bulk")[number % 2], gpu_alive=True)
            a_job(session, key, now, queue=queue, device=device)
    # when the relay looks, then those that may go to the CPU;
    relay.route(database, settings)
    assert waiting() == {"cpu.interactive": 3, "cpu.bulk": 2, "gpu.interactive": 1, "gpu.bulk": 1}
    # and when the GPU is heard of again, back.
    with database.transaction() as session:
        seen(session, "gpu", models_loaded=[], now=clock(session))
    relay.route(database, settings)
    assert waiting() == {"gpu.interactive": 4, "gpu.bulk": 3}


def test_a_step_that_cannot_be_done_is_tried_again_and_the_others_go_on() -> None:
    stopping = threading.Event()
    done = {"well": 0, "unwell": 0}

    def well() -> None:
        done["well"] += 1
        if min(done.values()) >= 3:
            stopping.set()

    def unwell() -> None:
        done["unwell"] += 1
        raise BrokerUnavailable("away") if done["unwell"] % 2 else DatabaseUnavailable("away")

    assert relay.run([Step("well", 0.005, well), Step("unwell", 0.005, unwell)], stopping)
    assert min(done.values()) >= 3


def test_a_step_that_hangs_holds_up_no_other_nor_the_end() -> None:
    stopping, never = threading.Event(), threading.Event()
    turns = 0

    def count() -> None:
        nonlocal turns
        turns += 1
        if turns == 5:
            stopping.set()

    started = time.monotonic()
    assert relay.run(
        [Step("hangs", 0.005, lambda: bool(never.wait()) and None), Step("counts", 0.005, count)], stopping
    )
    assert time.monotonic() - started < 5
    never.set()


def test_a_fault_of_ours_ends_the_relay_so_that_its_supervisor_starts_it_afresh() -> None:
    def faulty() -> None:
        raise ZeroDivisionError

    assert not relay.run([Step("faulty", 0.005, faulty), Step("well", 0.005, lambda: None)], threading.Event())


def test_a_job_whose_lease_has_passed_is_given_back(database: Database, settings: Settings) -> None:
    job_id = a_lapsed_job(database)
    relay.rescue(database, settings, relay.ClockWatch())
    assert job(database, job_id).state == JobState.QUEUED


def test_a_queued_job_whose_deadline_has_passed_expires(database: Database, settings: Settings) -> None:
    with database.transaction() as session:
        now = clock(session) - timedelta(seconds=60)
        overdue = a_job(session, a_key(session, now), now, deadline_seconds=30)
    relay.rescue(database, settings, relay.ClockWatch())
    assert job(database, overdue.id).state == JobState.EXPIRED


def a_watch(session: Session, moved: timedelta) -> relay.ClockWatch:
    """One that knew the database's clock before it was set by `moved`."""
    watch = relay.ClockWatch(lambda: 0.0)
    watch.jumped_seconds(clock(session) - moved)
    watch.accept()
    return watch


def test_a_clock_set_back_does_not_hold_the_job_of_a_dead_worker(database: Database, settings: Settings) -> None:
    # Given a job that was claimed when the clock was an hour ahead,
    with database.transaction() as session:
        watch = a_watch(session, timedelta(hours=-1))
        before = clock(session) + timedelta(hours=1)
        made = a_job(session, a_key(session, before), before)
        a_claim(session, made.id, before, lease_seconds=0.05)
    settings = settings.model_copy(update={"lease_seconds": 0.05})

    # when the clock is set right, then its lease passes as soon as a fresh one would,
    def is_rescued() -> bool:
        relay.rescue(database, settings, watch)
        return job(database, made.id).state == JobState.QUEUED

    wait_until(is_rescued, seconds=60, what="the rescue")
    # and the next attempt does not wait for the hour either.
    with database.transaction() as session:
        a_claim(session, made.id, clock(session))


def test_a_clock_set_forward_takes_no_job_from_a_living_worker(database: Database, settings: Settings) -> None:
    with database.transaction() as session:
        watch = a_watch(session, timedelta(hours=1))
        before = clock(session) - timedelta(hours=1)
        made = a_job(session, a_key(session, before), before)
        claim = a_claim(session, made.id, before)
    relay.rescue(database, settings, watch)
    assert job(database, made.id).state == JobState.RUNNING
    with database.transaction() as session:
        now = clock(session)
        jobs.heartbeat(session, claim, lease_seconds=20, now=now)
        # Nothing is moved twice.
        assert watch.jumped_seconds(now) == 0.0


def test_a_clock_that_is_steered_has_not_jumped(now: datetime) -> None:
    monotonic = iter([0.0, 1.0, 2.0, 3.0])
    watch = relay.ClockWatch(lambda: next(monotonic))
    looks = []
    for at_seconds in (0.0, 1.5, 2.0, 30.0):
        looks.append(watch.jumped_seconds(now + timedelta(seconds=at_seconds)))
        watch.accept()
    assert looks == [0.0, 0.0, 0.0, pytest.approx(27.0)]


def test_more_lost_jobs_than_one_transaction_takes_are_all_given_back(
    sqlite_database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "ROWS_AT_ONCE", 2)
    lost = [a_lapsed_job(sqlite_database) for _ in range(5)]
    relay.rescue(sqlite_database, settings, relay.ClockWatch())
    assert {job(sqlite_database, job_id).state for job_id in lost} == {JobState.QUEUED}


def test_jobs_are_rescued_while_redis_hangs(sqlite_database: Database, settings: Settings, redis_server: Any) -> None:
    job_id = a_lapsed_job(sqlite_database)
    settings = settings.model_copy(
        update={"redis_url": redis_server.url, "rescue_interval_seconds": 0.05, "relay_interval_seconds": 0.05}
    )
    broker = Broker(settings)
    stopping = threading.Event()
    os.kill(redis_server.process.pid, signal.SIGSTOP)
    try:
        steps = relay.steps(sqlite_database, broker, settings, stopping)
        # A publish to a frozen Redis takes many seconds to fail: the bound is far below that.
        loop = threading.Thread(target=relay.run, args=(steps, stopping))
        loop.start()
        wait_until(lambda: job(sqlite_database, job_id).state == JobState.QUEUED, seconds=3, what="the rescue")
    finally:
        os.kill(redis_server.process.pid, signal.SIGCONT)
        stopping.set()
        loop.join()
    # The steps that hung see Redis back; wait for them, or they would use what is closed below.
    for thread in threading.enumerate():
        if thread.name.startswith("relay-"):
            thread.join(30)
    broker.close()


def test_a_turn_that_finds_nothing_to_do_waits_for_no_writer(
    sqlite_database: Database, settings: Settings, redis_url: str
) -> None:
    # Given a job that runs, a process that writes, and SQLite, which has one writer,
    with sqlite_database.transaction() as session:
        now = clock(session)
        a_claim(session, a_job(session, a_key(session, now), now).id, now)
    busy = Database(settings.sqlalchemy_url)
    with closing(Broker(settings)) as broker, closing(busy), busy.transaction() as session:
        session.execute(select(Job.id))
        # then the relay gets through its turn; to write it would wait until that raises.
        relay.rescue(sqlite_database, settings, relay.ClockWatch())
        relay.publish(sqlite_database, broker, settings, threading.Event())


def test_a_queued_job_is_sent_when_redis_is_there(
    sqlite_database: Database, settings: Settings, redis_url: str
) -> None:
    with sqlite_database.transaction() as session:
        now = clock(session)
        queued = a_job(session, a_key(session, now), now)
    broker = Broker(settings)
    relay.publish(sqlite_database, broker, settings, threading.Event())
    broker.close()
    assert job(sqlite_database, queued.id).published_count == 1


def test_the_process_enlists_works_and_stops_within_seconds_of_sigterm(
    sqlite_database: Database, settings: Settings
) -> None:
    job_id = a_lapsed_job(sqlite_database)
    environment = {
        **os.environ,
        f"{ENV_PREFIX}DATABASE_URL": settings.database_url,
        f"{ENV_PREFIX}REDIS_URL": settings.redis_url,
    }
    process = subprocess.Popen([sys.executable, "-m", "worker.relay"], cwd=ROOT, env=environment)
    try:
        wait_until(lambda: job(sqlite_database, job_id).state == JobState.QUEUED, seconds=60, what="the rescue")
        started = time.monotonic()
        process.terminate()
        assert process.wait(30) == 0
        # One second is what we aim at; the rest is a busy machine's.
        assert time.monotonic() - started < 5
    finally:
        process.kill()
        process.wait()
    with sqlite_database.transaction() as session:
        (relay_row,) = queries.recent_workers(session, now=clock(session))
        assert relay_row.kind == "relay"
        assert relay_row.stopped_at is not None
        assert jobs.rescue_lost(session, retry_delay_seconds=1, now=clock(session)) == []
