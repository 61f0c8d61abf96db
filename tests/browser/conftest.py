"""The pages in a real browser over the real API, SQL, Redis and S3. Only the worker is played: by the verbs of
`shared.jobs`, so that a test decides when a job moves."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pytest
from flask import Flask
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Request, Response, expect, sync_playwright
from sqlalchemy import select
from werkzeug.serving import ThreadedWSGIServer

from shared import jobs, keys, renditions, workers
from shared.db import Database, clock
from shared.errors import EnlargerError
from shared.jobs import Claim, JobResult
from shared.models import Job
from shared.settings import Settings
from shared.storage import Storage
from shared.workers import WorkerFacts
from tests.api.conftest import an_app
from tests.browser.looking import keep_picture, serious_faults
from tests.conftest import wait_until
from tests.factories import a_png, options, picture
from worker.previews import Previews
from worker.renditions import make
from worker.thumbnails import Thumbnails

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
# Quiet: a browser that asks its maker for updates would fail where nothing may be reached.
CHROMIUM_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WAIT_MS = 15_000
LABELS = (
    {"label": "goldfinch", "index": 11, "probability": 0.93},
    {"label": "house finch", "index": 12, "probability": 0.04},
)


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.browser)


# Until the last test of this folder, not of the session: Playwright keeps an event loop in this thread meanwhile.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("there is no Chromium on PATH, and CI must not skip the pages")
        pytest.skip("there is no Chromium on PATH")
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=CHROMIUM_OPTIONS)
        yield launched
        launched.close()


class _Server(ThreadedWSGIServer):
    """Werkzeug's server, whose requests all end with it: nothing of a test runs on into the next."""

    daemon_threads = False
    block_on_close = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._connections: list[socket.socket] = []
        super().__init__(*arguments, **options)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def server_close(self) -> None:
        # As a cable that is pulled out does; without it a stream would be waited for until its job ends.
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()


def _read_at_once(app: Flask) -> WSGIApplication:
    """The application with every body but an event stream read before it is sent: where a browser drops a connection,
    Werkzeug's server can forget to close what it was sending, and the open file would fail some later test."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        body = app(environ, start_response)
        if str(environ["PATH_INFO"]).endswith("/events"):
            return body
        try:
            return [b"".join(body)]
        finally:
            body.close()  # type: ignore[attr-defined]

    return answer


class Site:
    """The running service and the hands of a test in it."""

    def __init__(self, settings: Settings, database: Database, storage: Storage) -> None:
        self.settings = settings
        self.database = database
        self.storage = storage
        self._app = an_app(settings)
        self._server: _Server | None = None
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Also again, on the port it had."""
        self._server = _Server("127.0.0.1", self._port, _read_at_once(self._app))
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="site")
        self._thread.start()

    def stop(self) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._thread.join()

    def close(self) -> None:
        self.stop()
        self._app.extensions["enlarger"].close()

    def key(self, *scopes: str, name: str = "tester") -> tuple[str, str]:
        """A new key: its id and its secret."""
        with self.database.transaction() as session:
            key, secret = keys.create(session, name=name, scopes=scopes, now=clock(session))
        return key.id, secret

    def sign_in_link(self, key_id: str) -> str:
        return f"{self.url}/sign-in?token={keys.sign_in_token(self.settings.secret_key, key_id)}"

    def newest_job(self) -> Job:
        with self.database.reading() as session:
            return session.scalars(select(Job).order_by(Job.id.desc()).limit(1)).one()

    def job(self, job_id: str) -> Job:
        with self.database.reading() as session:
            return session.get_one(Job, job_id)

    def hand_in(self, key_id: str, name: str, **asked: Any) -> str:
        """A queued job with a small picture in storage, as the API makes it; `asked` are fields of JobOptions."""
        now = datetime.now(UTC)
        handed_in = picture(now, name=name, width=16, height=12)
        self.storage.put(handed_in.key, io.BytesIO(a_png(16, 12)), "image/png")
        with self.database.transaction() as session:
            jobs.submit(
                session,
                owner_key_id=key_id,
                options=options(**asked),
                picture=handed_in,
                max_attempts=3,
                max_queued_jobs=1000,
                now=now,
            )
        return handed_in.job_id

    # --- the worker's part ---

    def enlist_worker(self, worker_id: str = "images-1", queues: tuple[str, ...] = ("cpu.interactive",)) -> None:
        with self.database.transaction() as session:
            facts = WorkerFacts(worker_id, "images", "here", 1, queues, "cpu", "a processor")
            workers.enlist(session, facts, now=clock(session))

    def claim(self, job_id: str) -> Claim:
        with self.database.transaction() as session:
            claim = jobs.claim(
                session, job_id, worker_id="images-1", device="cpu", lease_seconds=600, now=clock(session)
            )
        assert claim is not None
        return claim

    def progress(self, claim: Claim, bands_done: int, bands_total: int) -> None:
        """So many bands are finished; before the first, the worker has read the picture and made it small."""
        job = self.job(claim.job_id)
        with Thumbnails(self.storage, job.blob_prefix, claim.attempt) as thumbnails:
            thumbnails.begins(np.asarray(self._input(job)), 1, 1)
        with self.database.transaction() as session:
            jobs.progress(
                session,
                claim,
                phase="upscale",
                fraction=bands_done / bands_total,
                bands_done=bands_done,
                bands_total=bands_total,
                eta_seconds=3.0,
                lease_seconds=600,
                now=clock(session),
            )

    def make_bands(self, claim: Claim, done: int, total: int) -> None:
        """Previews of the first `done` of `total` bands, as the worker makes them, and the progress they are."""
        job = self.job(claim.job_id)
        rows = np.asarray(self._enlarged(job))
        height = len(rows)
        with Previews(self.storage, job.blob_prefix, claim.attempt) as previews:
            previews.begins(rows[:: job.scale, :: job.scale], rows.shape[1], height)
            for number in range(done):
                previews.made(rows[number * height // total : (number + 1) * height // total])
        self.progress(claim, done, total)

    def make_renditions(self) -> None:
        """The relay's and the chores worker's part: what is owed, once the page has asked for it."""

        def owed() -> list[tuple[str, str]]:
            with self.database.transaction() as session:
                return renditions.due(session, resend_after_seconds=60, now=clock(session))

        for job_id, kind in wait_until(owed, seconds=30, what="a rendition to be asked for"):
            make(self.database, self.storage, job_id, kind)

    def succeed(self, claim: Claim, *, at: datetime | None = None, report: Mapping[str, Any] | None = None) -> bytes:
        """Enlarges the input, plainly, and ends the job with it, now or `at`. Returns the result's bytes."""
        job = self.job(claim.job_id)
        file = io.BytesIO()
        enlarged = self._enlarged(job)
        size = enlarged.size
        enlarged.save(file, "PNG", compress_level=1)
        result = file.getvalue()
        key = f"{job.blob_prefix}/result-{claim.attempt}.png"
        self.storage.put(key, io.BytesIO(result), "image/png")
        facts: dict[str, Any] = {
            "key": key,
            "width": size[0],
            "height": size[1],
            "bytes": len(result),
            "sha256": hashlib.sha256(result).hexdigest(),
            "labels": list(LABELS) if job.classify else None,
            "timings": {"queued_seconds": 0.1, "upscale_seconds": 2.5, "store_seconds": 0.05},
            "report": report,
        }
        with self.database.transaction() as session:
            jobs.succeed(session, claim, JobResult(**facts), now=at or clock(session))
        return result

    def _input(self, job: Job) -> Image.Image:
        handed_in = io.BytesIO()
        self.storage.get(job.input_key, handed_in)
        with Image.open(handed_in) as image:
            return image.convert("RGB")

    def _enlarged(self, job: Job) -> Image.Image:
        image = self._input(job)
        return image.resize((image.width * job.scale, image.height * job.scale), Image.Resampling.LANCZOS)

    def fail(self, claim: Claim, error: EnlargerError) -> None:
        with self.database.transaction() as session:
            jobs.fail(session, claim, error, retry_delay_seconds=2, now=clock(session))

    def cancel_acknowledged(self, claim: Claim) -> None:
        with self.database.transaction() as session:
            jobs.acknowledge_cancel(session, claim, now=datetime.now(UTC))


@pytest.fixture
def site(sqlite_database: Database, redis_url: str, storage: Storage, settings: Settings) -> Iterator[Site]:
    storage.ensure_bucket()
    # A stream notices that its reader has gone when it next writes.
    quick = settings.model_copy(update={"event_ping_seconds": 0.2, "event_poll_seconds": 0.05})
    made = Site(quick, sqlite_database, storage)
    yield made
    made.close()


SERVICE_AWAY = [
    "ERR_CONNECTION_REFUSED",
    "ERR_CONNECTION_RESET",
    "ERR_EMPTY_RESPONSE",
    "ERR_INCOMPLETE_CHUNKED_ENCODING",
    # A connection kept open that was about to be used again.
    "ERR_SOCKET_NOT_CONNECTED",
]
"""For `Watched.expected`: what Chromium calls a request to a service that has just stopped."""


@dataclass
class Watched:
    """What went wrong in a page that nobody sees: every console error, exception, failed request and 4xx or 5xx."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    """Regular expressions of complaints that belong to the test."""

    def __post_init__(self) -> None:
        self.page.on("console", lambda said: self._complain(f"console: {said.text}", said.type in ("error", "warning")))
        self.page.on("pageerror", lambda error: self._complain(f"exception: {error}"))
        self.page.on("requestfailed", self._failed)
        self.page.on("response", self._answered)

    def look(self, name: str, *, full_page: bool = False) -> None:
        """Keeps a picture of the page as it stands, and lets axe-core look for what keeps people from using it."""
        keep_picture(self.page, name, full_page=full_page)
        assert serious_faults(self.page) == [], name

    def unexpected(self) -> list[str]:
        return [told for told in self.complaints if not any(re.search(wanted, told) for wanted in self.expected)]

    def _complain(self, told: str, is_one: bool = True) -> None:
        if is_one:
            self.complaints.append(told)

    def _failed(self, request: Request) -> None:
        # A page that is left, or a stream that is closed, gives up what it had asked for.
        if request.failure != "net::ERR_ABORTED":
            self._complain(f"failed: {request.method} {request.url} {request.failure}")

    def _answered(self, response: Response) -> None:
        if response.status >= 400:
            self._complain(f"answered: {response.request.method} {response.url} {response.status}")


@pytest.fixture
def open_page(site: Site, browser: Browser) -> Iterator[Callable[..., Watched]]:
    """Opens a page of the site in a browser of its own, signed in with `key_id` where one is given.

    The test fails at its end where anything in a page went wrong that it did not expect.
    """
    contexts: list[BrowserContext] = []
    opened: list[Watched] = []

    def open_one(key_id: str | None = None, path: str = "/", **options: Any) -> Watched:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(WAIT_MS)
        contexts.append(context)
        watched = Watched(context.new_page())
        opened.append(watched)
        address = site.url + path if key_id is None else f"{site.sign_in_link(key_id)}&next={quote(path)}"
        watched.page.goto(address)
        return watched

    yield open_one
    for context in contexts:
        context.close()
    assert [complaint for watched in opened for complaint in watched.unexpected()] == []
