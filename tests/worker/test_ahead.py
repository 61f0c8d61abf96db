"""The next job's picture ahead of its turn: the same picture, no claim, and no harm where the guess is wrong."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from sqlalchemy.orm import Session

from shared import queueing, workers
from shared.db import Database, clock
from shared.errors import DatabaseUnavailable
from shared.models import Job, JobState
from shared.storage import Storage
from shared.workers import WorkerFacts
from tests.factories import a_claim, a_job, a_key, a_png
from worker import ahead as ahead_module
from worker.ahead import Ahead
from worker.codec.decode import decode
from worker.codec.sandboxed import Sandboxed

NO_ROWS = np.zeros((0, 1, 3), np.uint8)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Sandboxed]:
    made = Sandboxed(1_000_000)
    yield made
    made.close()


@pytest.fixture
def job(sqlite_database: Database, storage: Storage) -> Job:
    with sqlite_database.transaction() as session:
        now = clock(session)
        made = a_job(session, a_key(session, now), now)
    storage.ensure_bucket()
    storage.put(made.input_key, io.BytesIO(a_png(40, 30)), "image/png")
    return made


def looked(ahead: Ahead) -> None:
    ahead.begins(NO_ROWS, 1, 1)
    assert ahead._look is not None
    assert ahead._look.ended.wait(20)


def test_an_attempt_finds_its_picture_fetched_and_decoded(decoder: Sandboxed, storage: Storage, job: Job) -> None:
    ahead = Ahead(decoder, storage, lambda: job)
    looked(ahead)
    storage.remove("")
    spent = decoder.sandbox.last_spent
    source = ahead.take(job.id)
    assert source is not None
    with source:
        facts = ahead.inspect(source)
        picture = ahead.decode(source, facts)
        assert decoder.sandbox.last_spent is spent, "nothing is decoded twice"
        assert (facts.width, facts.height) == (40, 30)
        assert np.array_equal(picture.rgb, decode(io.BytesIO(a_png(40, 30)), max_input_px=10_000).rgb)
        # Asked once more, it is decoded once more: the picture was given away.
        assert np.array_equal(ahead.decode(source, facts).rgb, picture.rgb)
    assert ahead.take(job.id) is None


def test_what_is_half_way_there_is_waited_for(decoder: Sandboxed, storage: Storage, job: Job) -> None:
    asked, answer = threading.Event(), threading.Event()

    def next_job() -> Job:
        asked.set()
        assert answer.wait(20)
        return job

    ahead = Ahead(decoder, storage, next_job)
    ahead.begins(NO_ROWS, 1, 1)
    assert asked.wait(20)
    threading.Timer(0.1, answer.set).start()
    source = ahead.take(job.id)
    assert source is not None
    source.close()


def test_a_picture_of_another_job_is_dropped(decoder: Sandboxed, storage: Storage, job: Job) -> None:
    ahead = Ahead(decoder, storage, lambda: job)
    looked(ahead)
    assert ahead._look is not None
    ready = ahead._look.ready
    assert ready is not None
    assert ahead.take("job_another") is None
    assert ready.source.closed
    assert ahead.take(job.id) is None


def test_a_look_that_fails_harms_nobody(decoder: Sandboxed, storage: Storage, job: Job, monkeypatch: Any) -> None:
    def away() -> Job:
        raise DatabaseUnavailable("away", retry_after_seconds=1)

    for next_job in (away, lambda: None):
        ahead = Ahead(decoder, storage, next_job)
        looked(ahead)
        assert ahead.take(job.id) is None
    storage.put(job.input_key, io.BytesIO(b"no picture"), "image/png")
    for most_px in (ahead_module.MOST_PX, 10):
        monkeypatch.setattr(ahead_module, "MOST_PX", most_px)
        ahead = Ahead(decoder, storage, lambda: job)
        looked(ahead)
        assert ahead.take(job.id) is None
    # A file that is no picture is for its own attempt to refuse.
    with pytest.raises(Exception, match="not a"):
        ahead.inspect(io.BytesIO(b"no picture"))


def test_the_first_that_is_due_is_the_next_where_no_other_worker_serves_its_queue(sqlite_database: Database) -> None:
    def an_image_worker(session: Session, name: str, queues: tuple[str, ...]) -> WorkerFacts:
        facts = WorkerFacts(name, "images", "host", 1, queues, "cpu")
        workers.enlist(session, facts, now=clock(session))
        return facts

    def likely(session: Session) -> str | None:
        job = queueing.likely_next(session, mine, worker_id="w1", worker_lost_after_seconds=30, now=clock(session))
        return None if job is None else job.id

    mine = ("cpu.interactive", "cpu.bulk")
    with sqlite_database.transaction() as session:
        now = clock(session)
        an_image_worker(session, "w1", mine)
        an_image_worker(session, "other", ("gpu.interactive",))
        key = a_key(session, now)
        assert likely(session) is None
        bulk = a_job(session, key, now, queue="cpu.bulk")
        assert likely(session) == bulk.id
        first, second = a_job(session, key, now), a_job(session, key, now)
        assert likely(session) == first.id
        a_claim(session, first.id, now)
        assert likely(session) == second.id
        assert session.get_one(Job, second.id).state == JobState.QUEUED
        an_image_worker(session, "w2", mine)
        assert likely(session) is None
