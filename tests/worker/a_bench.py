"""A job handed in, an executor to make attempts at it, and a database that goes away."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy.orm import Session

from shared import jobs
from shared.db import Database, clock
from shared.errors import DatabaseUnavailable
from shared.jobs import JobInput
from shared.models import Attempt, Job, Worker
from shared.settings import Settings
from shared.storage import Storage
from shared.workers import WorkerFacts, enlist
from tests.factories import a_key, a_png, options
from tests.worker import a_network
from worker.enlarging import Engine
from worker.execute import Executor


class Bench:
    """A job handed in, an executor to make attempts at it, and eyes on what became of both."""

    worker_id = "images-host-1-abc"

    def __init__(
        self,
        database: Database,
        storage: Storage,
        settings: Settings,
        monkeypatch: pytest.MonkeyPatch,
        *,
        devices: tuple[str, ...] = ("cpu",),
        queues: tuple[str, ...] = ("cpu.interactive", "cpu.bulk"),
        models: tuple[str, ...] | None = None,
    ) -> None:
        self.database, self.storage = database, storage
        self.before_call: Callable[[int], None] = lambda _: None
        self.networks = a_network.install(monkeypatch, lambda call: self.before_call(call))
        # Several bands and tiles in a small picture.
        self.settings = settings.model_copy(update={"tile_px": 8, "retry_delay_seconds": 5.0})
        engines = {device: Engine.of(self.settings, device) for device in devices}
        facts = WorkerFacts(self.worker_id, "images", "host", 1, queues, devices[0], models=models)
        self.executor = Executor(database, storage, self.settings, engines, facts)
        with database.transaction() as session:
            now = clock(session)
            enlist(session, facts, now=now)
            self.key = a_key(session, now)

    def submit(self, body: bytes | None = None, *, stored: bool = True, **asked: Any) -> str:
        data = body or a_png(24, 16)
        with self.database.transaction() as session:
            now = clock(session)
            job_id = jobs.new_job_id(now)
            prefix = jobs.blob_prefix(job_id)
            picture = JobInput(
                job_id, prefix, f"{prefix}/input", 24, 16, "png", len(data), hashlib.sha256(data).hexdigest()
            )
            jobs.submit(
                session,
                owner_key_id=self.key.id,
                options=options(**asked),
                picture=picture,
                max_attempts=3,
                max_queued_jobs=100,
                now=now,
            )
        if stored:
            self.storage.put(picture.key, io.BytesIO(data), "image/png")
        return job_id

    def job(self, job_id: str) -> Job:
        with self.database.transaction() as session:
            return session.get_one(Job, job_id)

    def attempts(self, job_id: str) -> list[str | None]:
        with self.database.transaction() as session:
            rows = session.query(Attempt).filter_by(job_id=job_id).order_by(Attempt.number)
            return [attempt.outcome for attempt in rows]

    def change(self, change: Callable[[Session], object]) -> None:
        with self.database.transaction() as session:
            change(session)

    def make_due(self, job_id: str) -> None:
        self.change(lambda session: setattr(session.get_one(Job, job_id), "run_after", None))

    @property
    def current_job_id(self) -> str | None:
        with self.database.transaction() as session:
            return session.get_one(Worker, self.worker_id).current_job_id

    def results(self, job_id: str) -> list[str]:
        return [key for key in self.storage.keys(self.job(job_id).blob_prefix) if "/result-" in key]


@contextmanager
def away(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Inside, the database cannot be reached. Gives the list of tries made."""
    tries: list[int] = []

    def transaction(**_: Any) -> Any:
        tries.append(1)
        raise DatabaseUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(database, "transaction", transaction)
        yield tries
