"""The application on real servers, and callers with keys."""

from __future__ import annotations

import atexit
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from unittest import mock

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.serving import make_server
from werkzeug.test import TestResponse

from api.app import create_app
from api.context import Context
from shared import jobs, keys
from shared.db import Database
from shared.sandbox import Sandbox
from shared.settings import Settings
from shared.storage import Storage
from tests.factories import a_claim, a_png


@dataclass(frozen=True)
class Caller:
    """A client that sends its key with every request."""

    key_id: str
    secret: str
    http: FlaskClient

    def send(self, method: str, path: str, *, headers: dict[str, str] | None = None, **more: Any) -> TestResponse:
        sent = {"Authorization": f"Bearer {self.secret}", **(headers or {})}
        # Buffered: read to the end and closed, as a server does.
        return self.http.open(path, method=method, headers=sent, buffered=True, **more)

    def get(self, path: str, **more: Any) -> TestResponse:
        return self.send("GET", path, **more)

    def post(self, path: str, **more: Any) -> TestResponse:
        return self.send("POST", path, **more)

    def delete(self, path: str, **more: Any) -> TestResponse:
        return self.send("DELETE", path, **more)

    def submit(
        self, picture: bytes | None = None, *, name: str = "bird.png", headers: Any = None, **fields: Any
    ) -> TestResponse:
        """POST /v1/jobs as a form."""
        from io import BytesIO

        data = {"image": (BytesIO(a_png() if picture is None else picture), name), **fields}
        return self.post("/v1/jobs", data=data, headers=headers)

    def job(self, **fields: Any) -> str:
        """The id of a job just submitted."""
        answer = self.submit(**fields)
        assert answer.status_code == 202, answer.text
        return str(answer.json["id"])


@dataclass(frozen=True)
class Api:
    app: Flask
    context: Context

    @property
    def database(self) -> Database:
        return self.context.database

    def caller(self, *scopes: str, name: str = "tester") -> Caller:
        with self.database.transaction() as session:
            key, secret = keys.create(session, name=name, scopes=scopes or ("jobs",), now=datetime.now(UTC))
        return Caller(key.id, secret, self.app.test_client(use_cookies=False))

    def work(self, job_id: str, change: Callable[..., Any]) -> jobs.Claim:
        """Claims the job as a worker does and lets `change(session, claim, now)` say what comes of it."""
        now = datetime.now(UTC)
        with self.database.transaction() as session:
            claim = a_claim(session, job_id, now)
            change(session, claim, now)
        return claim

    def succeed(self, job_id: str, result: bytes = b"the picture", **facts: Any) -> None:
        """Finishes a queued job as a worker does, with `result` in storage."""
        import io

        def store(session: Any, claim: jobs.Claim, now: datetime) -> None:
            job = session.get_one(jobs.Job, job_id)
            key = f"{job.blob_prefix}/result-{claim.attempt}.png"
            self.context.storage.put(key, io.BytesIO(result), "image/png")
            outcome = jobs.JobResult(
                key=key,
                width=job.input_width * job.scale,
                height=job.input_height * job.scale,
                bytes=len(result),
                sha256="cd" * 32,
                **facts,
            )
            jobs.succeed(session, claim, outcome, now=now)

        self.work(job_id, store)


class _Lasting(Sandbox):
    """Outlives the applications that have it."""

    def close(self) -> None:
        pass


@functools.cache
def _sandbox() -> Sandbox:
    made = _Lasting("shared.pictures")
    made.start()
    atexit.register(Sandbox.close, made)
    return made


def an_app(settings: Settings) -> Flask:
    """The application. Only the process that reads pictures is one for all: to start it takes as long as a test."""
    with mock.patch("api.app.Sandbox", return_value=_sandbox()):
        return create_app(settings)


@contextmanager
def running(settings: Settings) -> Iterator[Api]:
    app = an_app(settings)
    app.testing = True
    context = app.extensions["enlarger"]
    try:
        yield Api(app, context)
    finally:
        context.close()


@pytest.fixture
def api(settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str) -> Iterator[Api]:
    """The application over SQLite, S3 and Redis."""
    with running(settings) as made:
        yield made


@pytest.fixture
def api_on_both(settings: Settings, database: Database, storage: Storage, redis_url: str) -> Iterator[Api]:
    """As `api`, once over SQLite and once over PostgreSQL."""
    with running(settings) as made:
        yield made


@pytest.fixture
def caller(api: Api) -> Caller:
    return api.caller()


@contextmanager
def served(app: Flask) -> Iterator[str]:
    """The application behind a real socket; yields its address."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    server.daemon_threads = True  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
