"""What tests stand on: real servers, started once a session and cleaned between tests, and one HTTP receiver.

A test names what it needs. `settings` then points at exactly the servers that the test has asked for (by `database`,
`redis_url` or `storage`); everything started here is stopped when the session ends.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import resource
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from sqlalchemy import event, text
from sqlalchemy.engine import make_url

import migrations
from shared.db import Database, Row
from shared.servers import Server, free_port, start_postgresql, start_redis, start_s3
from shared.settings import Settings
from shared.stack import Stack
from shared.storage import Storage

# Examples are the same in every run and take the time they take: a red test means the code, not the machine.
hypothesis_settings.register_profile(
    "enlarger",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
hypothesis_settings.load_profile("enlarger")

S3_ACCESS_KEY, S3_SECRET_KEY, S3_BUCKET = "tests", "tests-secret-key", "enlarger-tests"


def wait_until(condition: Callable[[], Any], *, seconds: float, what: str) -> Any:
    """The first true value of `condition`; fails, saying `what` was waited for, when `seconds` have passed."""
    ends_at = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > ends_at:
            pytest.fail(f"waited {seconds:g} s for {what}")
        threading.Event().wait(0.02)


def has_ended(pid: int) -> bool:
    """The process is gone, or dead and only not collected yet by whoever inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextmanager
def little_room(most_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond that: to a program what a full disk is, without a disk of our own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure of networks is not this machine's calibration, nor the other way round."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


# --- which tests run by themselves, and which beside which ----------------------------------------------------------

# `make test` records which lines these run, and no others: what must be covered completely is covered by them, and
# Python takes half as long again where lines are recorded. They have processes of their own, lest what is made once in
# a process be made by a test of which nothing is recorded.
COVERING = (
    *(f"tests/shared/test_{name}.py" for name in ("fairness", "jobs", "needs", "operating", "outbox", "shards")),
    *(f"tests/worker/test_{name}.py" for name in ("batching", "claiming", "sharding", "strips", "tiling", "upscale")),
)

# Whole services, whose processes are killed, frozen and raced against: two at once would starve each other, and their
# patience would run out. They are the longest, too, so they begin first, and what is short fills up the end.
# Here is every folder of such tests, and every other file that asks for `stack`.
WHOLE_SERVICES = ("tests/chaos/", "tests/journeys/", "tests/api/test_cli.py", "tests/worker/test_commands.py")
_STACK = pytest.StashKey[Stack]()


def needs_whole_service(nodeid: str) -> bool:
    return nodeid.startswith(WHOLE_SERVICES)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of what `-m covering` leaves out nothing is loaded."""
    if config.getoption("markexpr") != "covering":
        return None
    path = collection_path.relative_to(config.rootpath).as_posix()
    return None if any(each.startswith(path) for each in COVERING) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what `-m` chooses, and puts whole services first.

    Raises UsageError where a test asks for `stack` and is not known to.
    """
    for item in items:
        if "stack" in getattr(item, "fixturenames", ()) and not needs_whole_service(item.nodeid):
            raise pytest.UsageError(f"{item.nodeid} asks for `stack`: name its file in WHOLE_SERVICES of {__file__}")
        if item.nodeid.startswith(COVERING):
            item.add_marker("covering")
    items.sort(key=lambda item: not needs_whole_service(item.nodeid))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Stops the running service behind the last test that may want it, so that it does not poll beside all others."""
    yield
    running = item.session.stash.get(_STACK, None)
    if running is not None and nextitem is not None and not needs_whole_service(nextitem.nodeid):
        running.stop()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out files as wholes, since their tests may share what a module has made, and whole services as one."""
    from xdist.scheduler import LoadFileScheduling

    # Not by xdist's own groups: 3.8 writes them into an attribute of items that pytest 9.2 does not read any more.
    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if needs_whole_service(nodeid):
                return "whole services"
            # One browser at a time: it draws without a graphics card, and takes what processor there is.
            return "browser" if nodeid.startswith("tests/browser/") else str(super()._split_scope(nodeid))

    return Files(config, log)


@pytest.fixture
def now() -> datetime:
    """The moment at which tests begin; they move it instead of sleeping."""
    return datetime(2026, 3, 4, 5, 6, 7, 891234, UTC)


@pytest.fixture
def samples() -> Path:
    """The folder of sample pictures that ENLARGER_SAMPLES names; without it the test is skipped."""
    named = os.environ.get("ENLARGER_SAMPLES")
    if not named:
        pytest.skip("ENLARGER_SAMPLES names no folder of sample pictures")
    return Path(named)


# --- SQL ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgresql_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with start_postgresql(tmp_path_factory.mktemp("postgresql")) as server:
        yield server


@pytest.fixture(scope="session")
def _migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    migrations.upgrade(f"sqlite:///{path}")
    # Everything into the one file, so that a plain copy of it is a whole database.
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


@pytest.fixture(scope="session")
def _migrated_postgresql(postgresql_server: Server) -> Iterator[Database]:
    """One for all tests, and open until the last: an engine remembers the statements that it has compiled, which takes
    longer than to run them, and a connection takes as long to make as ten statements."""
    with new_postgresql_database(postgresql_server.url, "enlarger_tests") as url:
        migrations.upgrade(url)
        made = Database(url)
        yield made
        made.close()


@contextmanager
def new_postgresql_database(server_url: str, name: str) -> Iterator[str]:
    """An empty database of that name; dropped at the end."""
    server = Database(server_url)
    outside = server.engine.execution_options(isolation_level="AUTOCOMMIT")
    try:
        with outside.connect() as connection:
            connection.execute(text(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))
            connection.execute(text(f'CREATE DATABASE "{name}"'))
        yield make_url(server_url).set(database=name).render_as_string(hide_password=False)
        with outside.connect() as connection:
            connection.execute(text(f'DROP DATABASE "{name}" WITH (FORCE)'))
    finally:
        server.close()


def _empty_tables(database: Database) -> None:
    # DELETE and not TRUNCATE: a few rows go in a few ms, a truncation writes new files. All in one message.
    statements = [f'DELETE FROM "{table.name}"' for table in reversed(Row.metadata.sorted_tables)]
    with database.transaction() as session:
        session.connection().exec_driver_sql("; ".join(statements))


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    """A database with the schema the migrations make and no rows; the test runs once on each kind."""
    made: Database = request.getfixturevalue(f"{request.param}_database")
    return made


@pytest.fixture
def sqlite_database(_migrated_sqlite: Path, tmp_path: Path) -> Iterator[Database]:
    """As `database`, SQLite only: for tests in which the kind cannot matter."""
    path = tmp_path / "enlarger.db"
    shutil.copyfile(_migrated_sqlite, path)
    made = Database(f"sqlite:///{path}")
    yield made
    made.close()


@pytest.fixture
def postgresql_database(_migrated_postgresql: Database) -> Database:
    """As `database`, PostgreSQL only: for races that SQLite's one writer cannot have."""
    _empty_tables(_migrated_postgresql)
    return _migrated_postgresql


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without any table."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
    else:
        with new_postgresql_database(request.getfixturevalue("postgresql_server").url, "enlarger_empty") as url:
            yield url


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    """The SQL sent to this database inside the block, but for what begins transactions."""
    sent: list[str] = []

    def hear(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith(("BEGIN", "PRAGMA")):
            sent.append(statement)

    event.listen(database.engine, "before_cursor_execute", hear)
    try:
        yield sent
    finally:
        event.remove(database.engine, "before_cursor_execute", hear)


# --- Redis and S3 ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with start_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: Server) -> str:
    """The address of an empty Redis."""
    with closing(redis.Redis.from_url(redis_server.url, socket_timeout=60)) as client:
        client.flushall()
    return str(redis_server.url)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with start_s3(tmp_path_factory.mktemp("s3"), S3_BUCKET, S3_ACCESS_KEY, S3_SECRET_KEY) as server:
        yield server


@pytest.fixture
def storage(s3: Server, settings: Settings) -> Iterator[Storage]:
    """The test bucket, empty."""
    made = Storage(settings)
    made.remove("")
    yield made
    made.close()


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings that name the servers this test asked for; what it did not ask for is an address where nothing is."""
    values: dict[str, Any] = {
        "data_dir": tmp_path,
        "secret_key": "a secret key for tests only",
        "redis_url": f"redis://127.0.0.1:{closed_port()}/0",
        "storage_endpoint_url": f"http://127.0.0.1:{closed_port()}",
        "storage_access_key": S3_ACCESS_KEY,
        "storage_secret_key": S3_SECRET_KEY,
        "storage_bucket": S3_BUCKET,
        "log_format": "text",
    }
    wanted = set(request.fixturenames)
    for name in ("database", "sqlite_database", "postgresql_database"):
        if name in wanted:
            values["database_url"] = request.getfixturevalue(name).url.render_as_string(hide_password=False)
    if "redis_url" in wanted:
        values["redis_url"] = request.getfixturevalue("redis_url")
    if "s3" in wanted:
        values["storage_endpoint_url"] = request.getfixturevalue("s3").url
    return Settings(**values)


@functools.cache
def _bound() -> socket.socket:
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    atexit.register(bound.close)
    return bound


def closed_port() -> int:
    """A port of 127.0.0.1 on which nothing listens: connecting to it is refused."""
    # Held as long as the tests run: given back, it could be drawn by a server of the tests beside these.
    port: int = _bound().getsockname()[1]
    return port


# --- the other end of webhooks and source URLs ----------------------------------------------------------------------


@dataclass(frozen=True)
class Received:
    """One request as it came in."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Reply:
    """What the receiver says: a status, headers, a body."""

    status: int = 204
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class Receiver:
    """A real HTTP server of the loopback. Records every request; answers `pages[path]`, else what `replies` says
    next, else 204."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.requests: list[Received] = []
        self.replies: list[Reply] = []
        self.pages: dict[str, Reply] = {}
        self._changed = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                reply = receiver._take(Received(self.command, self.path, dict(self.headers.items()), body))
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                if reply.status >= 200 and reply.status not in (204, 304):
                    self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(reply.body)

            do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = answer

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((host, 0), Handler)
        # A client that keeps its connection open must not hold up the end of the test.
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.port: int = self._server.server_address[1]
        self.url = f"http://{host}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="receiver")
        self._thread.start()

    def _take(self, request: Received) -> Reply:
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
            if request.path in self.pages:
                return self.pages[request.path]
            return self.replies.pop(0) if self.replies else Reply()

    def wait_for(
        self, count: int = 1, *, seconds: float = 30, where: Callable[[Received], bool] = lambda _: True
    ) -> list[Received]:
        """The first requests for which `where` holds, once there are `count` of them; fails after `seconds`."""
        with self._changed:
            if not self._changed.wait_for(lambda: len([r for r in self.requests if where(r)]) >= count, seconds):
                seen = [f"{r.method} {r.path}" for r in self.requests]
                pytest.fail(f"waited {seconds:g} s for {count} requests; got {seen}")
            return [r for r in self.requests if where(r)]

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as made:
        yield made


# --- the whole service ----------------------------------------------------------------------------------------------


class Service:
    """A customer of a running service, over HTTP and nothing else."""

    def __init__(self, url: str, api_key: str) -> None:
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {api_key}"}, timeout=60)

    def submit(self, picture: bytes, **asked: Any) -> dict[str, Any]:
        """Hands a picture in, as a form; returns the job. Fails on any answer but 202."""
        fields = {name: json.dumps(value) if isinstance(value, bool) else value for name, value in asked.items()}
        answer = self.http.post("/v1/jobs", files={"image": ("picture.png", picture, "image/png")}, data=fields)
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
        return job

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def wait(
        self,
        job_id: str,
        *,
        seconds: float = 120,
        until: Callable[[dict[str, Any]], Any] = lambda job: job["finished_at"],
    ) -> dict[str, Any]:
        """Polls until the job has finished, or `until` holds; returns it."""

        def looked() -> dict[str, Any] | None:
            job = self.job(job_id)
            return job if until(job) else None

        found: dict[str, Any] = wait_until(looked, seconds=seconds, what=f"{job_id} to come where it should")
        return found

    def result(self, job_id: str) -> bytes:
        answer = self.http.get(f"/v1/jobs/{job_id}/result", follow_redirects=True)
        assert answer.status_code == 200, answer.text
        return answer.content


# Short lives, so that what dies is missed within seconds; small tiles, so that even a busy machine shows progress well
# within a lease and a job of a few hundred px a side runs long enough to be met in the middle.
STACK_SETTINGS: dict[str, Any] = {
    "lease_seconds": 5.0,
    "lease_renew_seconds": 0.5,
    "rescue_interval_seconds": 0.2,
    "relay_interval_seconds": 0.2,
    "retry_delay_seconds": 0.2,
    "resend_after_seconds": 3.0,
    "sweep_interval_seconds": 1.0,
    "event_poll_seconds": 0.05,
    "tile_px": 24,
    # No picture of a test is shared that does not mean to be.
    "split_above_px": 40_000,
    "shard_output_px": 100_000,
    # Two, so that one can be stopped or killed while the other goes on.
    "worker_concurrency": 2,
    "log_format": "text",
    # The tests' own receivers.
    "allow_private_addresses": ("127.0.0.0/8",),
}


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The whole embedded service, in processes of its own: Redis, S3, SQL, API, image worker, chores and relay.

    Whoever kills a part of it waits until the supervisor has it back.
    """
    settings = Settings(data_dir=tmp_path_factory.mktemp("stack"), **STACK_SETTINGS)
    with Stack(settings, port=free_port()) as running:
        request.session.stash[_STACK] = running
        yield running


@pytest.fixture
def service(stack: Stack) -> Iterator[Service]:
    """A customer of `stack`, with its own key."""
    made = Service(stack.url, stack.api_key)
    yield made
    made.http.close()


@pytest.fixture
def stack_database(stack: Stack) -> Iterator[Database]:
    """The database of `stack`: what its processes see."""
    made = Database(stack.settings.sqlalchemy_url)
    yield made
    made.close()
