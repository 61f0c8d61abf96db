"""The processes of Enlarger: each one's command line, and the launcher that runs them all on this machine.

`serve` becomes one process (containers, one each). `Stack` is the whole service in one go: Redis and S3 from wheels,
SQLite, and the four processes, on free ports, started again where one dies, stopped in order, its data kept in one
folder for the next time.

    with Stack(Settings(data_dir=folder)) as stack:
        ...  # stack.url, stack.api_key
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self
from urllib.parse import urlsplit

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

import migrations
from shared import keys
from shared.db import Database, clock
from shared.errors import DatabaseUnavailable, StartFailed, Unauthorized
from shared.models import ApiKey, Worker
from shared.servers import (
    LOOPBACK,
    Server,
    Started,
    are_free,
    did_not_start,
    free_port,
    kept_secret,
    spawn,
    start_redis,
    start_s3,
    write_private,
)
from shared.settings import ENV_PREFIX, Settings
from shared.storage import Storage

PROCESSES = ("api", "images", "chores", "relay")
SERVICE_FILE = "service.json"
"""In the data folder while the service runs: its url, api_key and sign_in_url, for this user's other commands."""

USUAL_PORT = 8000
API_PROCESSES = min(2, os.cpu_count() or 1)
"""Of the API, where a whole service runs on one machine: Python keeps one of them on one core."""
# Importing torch from a cold disk takes most of a minute on a slow machine.
START_TIMEOUT_SECONDS = 180.0
# An image worker gives its job back between two tiles, which take at most 5 s each.
STOP_TIMEOUT_SECONDS = 40.0
UNREADY_STOP_TIMEOUT_SECONDS = 2.0
RESTART_DELAYS_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
# A process that has lived this long died of something new: the delays begin again.
STEADY_AFTER_SECONDS = 60.0
# Deaths before the service was ever ready: then it will not be.
DEATHS_AT_START = 3
LOG_BYTES_KEPT = 10_000_000
_POLL_SECONDS = 0.05

# Event streams and waits end within this when the API is told to stop: behind a load balancer in their own time, at a
# terminal at once.
GRACEFUL_SECONDS = 60
GRACEFUL_AT_TERMINAL_SECONDS = 2


def command(
    name: str,
    settings: Settings,
    *,
    host: str = LOOPBACK,
    port: int = USUAL_PORT,
    processes: int = 1,
    graceful_seconds: int = GRACEFUL_SECONDS,
) -> list[str]:
    """The command line of one of PROCESSES. The last four arguments are the API's: where it listens, and with how many
    processes of `api_threads` threads each."""
    celery = [sys.executable, "-m", "celery", "--quiet", "-A"]
    # Options, since Celery has no settings for them: nothing of ours asks workers through Redis.
    quiet = ["worker", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    gunicorn = [
        *(sys.executable, "-m", "gunicorn", "api.app:create_app()"),
        *("--bind", f"[{host}]:{port}" if ":" in host else f"{host}:{port}"),
        *("--worker-class", "gthread", "--threads", str(settings.api_threads), "--workers", str(processes)),
        *("--graceful-timeout", str(graceful_seconds), "--keep-alive", "30"),
        *("--config", "python:api.processes"),
        # It would listen on a socket in the user's home for commands nobody sends.
        "--no-control-socket",
    ]
    if Path("/dev/shm").is_dir():
        # Its heartbeat is a file's time; on a busy disk a beat can be late enough to be killed for.
        gunicorn += ["--worker-tmp-dir", "/dev/shm"]
    return {
        "api": gunicorn,
        "images": [*celery, "worker.app:images", *quiet],
        "chores": [*celery, "worker.app:chores", *quiet],
        "relay": [sys.executable, "-m", "worker.relay"],
    }[name]


def environ_for(name: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of one of PROCESSES."""
    # SIGTERM then begins Celery's soft shutdown: the running attempt is told to stop instead of waited for.
    return {**environ, "REMAP_SIGTERM": "SIGQUIT"} if name == "images" else dict(environ)


def serve(name: str, settings: Settings, *, host: str, port: int, processes: int) -> NoReturn:
    """Becomes one of PROCESSES, with settings from the environment. Raises StartFailed."""
    if not settings.secret_key:
        raise StartFailed(
            "ENLARGER_SECRET_KEY is empty. It signs sessions and webhooks and must be long, random and the same in "
            "every process: `openssl rand -base64 32` makes one."
        )
    line = command(name, settings, host=host, port=port, processes=processes)
    os.execve(line[0], line, environ_for(name, os.environ))


def running_service(data_dir: Path) -> dict[str, str] | None:
    """What `enlarger up` left in this folder: `url`, `api_key`, `sign_in_url`; None where none runs on it."""
    try:
        service: dict[str, str] = json.loads((data_dir / SERVICE_FILE).read_text())
    except (OSError, ValueError):
        return None
    return service


def prepare(settings: Settings) -> None:
    """Brings SQL to the newest schema, makes the bucket, and the bootstrap key where one is set. Harmless to repeat.

    Raises DatabaseUnavailable, StorageUnavailable.
    """
    prepare_sql(settings)
    _make_bucket(settings)


def prepare_sql(settings: Settings) -> None:
    """The part of `prepare` that is SQL's. Raises DatabaseUnavailable."""
    if not settings.database_url:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    try:
        migrations.upgrade(settings.sqlalchemy_url)
    except SQLAlchemyError as error:
        raise DatabaseUnavailable(f"The database could not be brought to the newest schema: {error}") from error
    if settings.bootstrap_admin_key:
        database = Database(settings.sqlalchemy_url)
        try:
            with database.transaction() as session:
                keys.ensure(
                    session, settings.bootstrap_admin_key, name="bootstrap", scopes=keys.EVERYTHING, now=clock(session)
                )
        finally:
            database.close()


def _make_bucket(settings: Settings) -> None:
    storage = Storage(settings)
    try:
        storage.ensure_bucket()
    finally:
        storage.close()


def environ_of(settings: Settings) -> dict[str, str]:
    """The environment that reads back as these settings, in any folder: paths are made absolute."""
    environ = {}
    for name in Settings.model_fields:
        value = getattr(settings, name)
        if isinstance(value, Path) or (name == "models_dir" and value):
            text = str(Path(value).absolute())
        elif isinstance(value, str):
            text = value
        else:
            text = json.dumps(value)
        environ[ENV_PREFIX + name.upper()] = text
    return environ


@dataclass
class _Child:
    """One supervised process or server."""

    name: str
    start: Callable[[], Started]
    running: Started
    held: bool = False
    # Guards `running` and `held`: nothing is started while another thread stops it.
    turn: threading.Condition = field(default_factory=threading.Condition)


class Stack:
    """The whole service on this machine. On Linux all it starts ends with it, also where this process is killed.

    What `settings` name already (Redis, storage, SQL) is used as it is; what they leave open is started. One Stack at
    a time has a data folder, and a Stack is started once.
    """

    def __init__(
        self, settings: Settings, *, port: int | None = None, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        """`port` is the API's; None is 8000, or a free one where that is taken. `tell` hears what happens, a sentence
        at a time, also from other threads."""
        self.settings = settings
        """With every address and secret filled in, once started."""
        self.url = ""
        self.api_key = ""
        """Of an administrator."""
        self.sign_in_url = ""
        self._port = port
        self._tell = tell
        self._directory = settings.data_dir.absolute()
        self._children: dict[str, _Child] = {}
        self._keepers: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._is_ready = False
        self._hopeless: _Child | None = None
        self._closing = contextlib.ExitStack()
        # Redis and storage start side by side, and each fills in its address.
        self._completing = threading.Lock()

    def start(self) -> None:
        """Returns when jobs can be submitted and are worked on. Raises StartFailed; then nothing is left running."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout_seconds: float = STOP_TIMEOUT_SECONDS) -> None:
        """Stops our processes, then the servers they use. A running job is given back to the queue, not lost.

        What has not ended after `timeout_seconds` is killed. Harmless to repeat.
        """
        self._stopping.set()
        if not self._is_ready:
            # Nobody has handed in anything yet, and a worker that is just starting is slow to hear.
            timeout_seconds = min(timeout_seconds, UNREADY_STOP_TIMEOUT_SECONDS)
        ours = [child for child in self._children.values() if child.name in PROCESSES]
        servers = [child for child in self._children.values() if child.name not in PROCESSES]
        for children in (ours, servers):
            _all_at_once([partial(_stop, child, timeout_seconds) for child in children])
        for keeper in self._keepers:
            keeper.join()
        self._keepers.clear()
        self._closing.close()

    def kill(self) -> None:
        """SIGKILL to everything, for a person who will not wait. Takes no lock: a signal's handler may call it while
        `stop` is under way. `stop` is still needed to tidy up."""
        self._stopping.set()
        for child in list(self._children.values()):
            child.running.process.kill()

    def wait(self) -> None:
        """Returns when somebody stops it; a signal's handler may raise out of here."""
        self._stopping.wait()

    def process(self, name: str) -> subprocess.Popen[bytes]:
        """The present process of one of PROCESSES, `redis` or `s3`: another one after it was started again."""
        return self._children[name].running.process

    def hold(self, name: str) -> None:
        """Kills one of them and keeps it dead until `release`: outages, on purpose."""
        child = self._children[name]
        with child.turn:
            child.held = True
            child.running.kill()

    def release(self, name: str) -> None:
        """Starts what `hold` killed; a server has its address and its data again when this returns."""
        child = self._children[name]
        with child.turn:
            child.running = child.start()
            child.held = False
            child.turn.notify_all()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        began = time.monotonic()
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._closing.enter_context(_only_one_on(self._directory))
        port = self._choose_port()
        given = self.settings.model_fields_set
        self._complete(secret_key=self.settings.secret_key or kept_secret(self._directory / "secret_key"))
        own_storage = "storage_endpoint_url" not in given
        if own_storage:
            self._complete(
                storage_access_key=kept_secret(self._directory / "storage_access_key"),
                storage_secret_key=kept_secret(self._directory / "storage_secret_key"),
            )
        steps: list[Callable[[], None]] = [partial(prepare_sql, self.settings)]
        if "redis_url" not in given:
            steps.append(partial(self._add, "redis", self._start_redis))
        if own_storage:
            steps.append(partial(self._add, "s3", self._start_s3))
        else:
            steps.append(partial(_make_bucket, self.settings))
        _all_at_once(steps)
        self._tell(f"Redis, storage and SQL are ready after {time.monotonic() - began:.1f} s.")

        self.url = f"http://{LOOPBACK}:{port}"
        database = Database(self.settings.sqlalchemy_url)
        self._closing.callback(database.close)
        with database.transaction() as session:
            now = clock(session)
            key = self._admin_key(session, now)
        self.sign_in_url = f"{self.url}/sign-in?token={keys.sign_in_token(self.settings.secret_key, key.id)}"
        for name in PROCESSES:
            self._add(name, partial(self._start_process, name))
        self._wait_until_ready(database, now)
        self._is_ready = True
        self._tell(f"The service is ready after {time.monotonic() - began:.1f} s.")
        service = {"url": self.url, "api_key": self.api_key, "sign_in_url": self.sign_in_url}
        write_private(self._directory / SERVICE_FILE, json.dumps(service, indent=2) + "\n")
        self._closing.callback((self._directory / SERVICE_FILE).unlink, missing_ok=True)

    def _complete(self, **values: object) -> None:
        with self._completing:
            self.settings = self.settings.model_copy(update=values)

    def _start_redis(self) -> Started:
        server = start_redis(self._directory / "redis", _port_of(self._children.get("redis")))
        self._complete(redis_url=server.url)
        return server

    def _start_s3(self) -> Started:
        server = start_s3(
            self._directory / "s3",
            self.settings.storage_bucket,
            self.settings.storage_access_key,
            self.settings.storage_secret_key,
            _port_of(self._children.get("s3")),
        )
        self._complete(storage_endpoint_url=server.url)
        return server

    def _start_process(self, name: str) -> Started:
        line = command(
            name,
            self.settings,
            port=int(self.url.rpartition(":")[2]),
            processes=API_PROCESSES,
            graceful_seconds=GRACEFUL_AT_TERMINAL_SECONDS,
        )
        log_path = self._directory / "logs" / f"{name}.log"
        # Its own folder, so that it cannot take a stranger's `api` or `worker` beside it for ours.
        process = spawn(
            line,
            log_path=log_path,
            environ=environ_for(name, _child_environ(self.settings)),
            folder=self._directory,
            # Where we die, Redis dies with us, and a Celery told to stop would wait for it to come back. Its children
            # end when it is gone; a job they had is given back when its lease has passed.
            death_signal=signal.SIGKILL if name in ("images", "chores") else signal.SIGTERM,
        )
        return Started(name=name, process=process, log_path=log_path)

    def _add(self, name: str, start: Callable[[], Started]) -> None:
        if name in PROCESSES:
            turn_over(self._directory / "logs" / f"{name}.log")
        child = _Child(name, start, start())
        self._children[name] = child
        keeper = threading.Thread(target=self._keep, args=(child,), name=f"keep-{name}", daemon=True)
        self._keepers.append(keeper)
        keeper.start()

    def _keep(self, child: _Child) -> None:
        """Starts the child again whenever it has ended, until the stack stops; each time a little later."""
        deaths = 0
        while True:
            running, began = child.running, time.monotonic()
            status = running.process.wait()
            with child.turn:
                child.turn.wait_for(lambda: self._stopping.is_set() or not child.held)
            if self._stopping.is_set():
                return
            if child.running is not running:
                continue
            deaths = 1 if time.monotonic() - began > STEADY_AFTER_SECONDS else deaths + 1
            if not self._is_ready and deaths >= DEATHS_AT_START:
                self._hopeless = child
                return
            delay_seconds = RESTART_DELAYS_SECONDS[min(deaths, len(RESTART_DELAYS_SECONDS)) - 1]
            self._tell(
                f"{child.name} ended ({_in_words(status)}); it is started again"
                + (f" in {delay_seconds:g} s." if delay_seconds else ".")
                + f" Its log: {running.log_path}"
            )
            if self._stopping.wait(delay_seconds):
                return
            with child.turn:
                if self._stopping.is_set() or child.held or child.running is not running:
                    continue
                # What it left of its own: children of a killed worker would go on as if nothing had happened.
                running.kill()
                try:
                    child.running = child.start()
                except StartFailed as error:
                    self._tell(error.detail)

    def _choose_port(self) -> int:
        if self._port is None:
            return USUAL_PORT if are_free([USUAL_PORT]) else free_port()
        if not are_free([self._port]):
            raise StartFailed(f"Port {self._port} is taken; name another one, or none for any that is free.")
        return self._port

    def _admin_key(self, session: Session, now: datetime) -> ApiKey:
        """The stack's own key, in a file of the data folder; another one where it was revoked."""
        path = self._directory / "admin_key"
        self.api_key = self.settings.bootstrap_admin_key or (path.read_text().strip() if path.exists() else "")
        if self.api_key:
            with contextlib.suppress(Unauthorized):
                return keys.authenticate(session, self.api_key, now=now)
        key, self.api_key = keys.create(session, name="enlarger up", scopes=keys.EVERYTHING, now=now)
        write_private(path, self.api_key + "\n")
        return key

    def _wait_until_ready(self, database: Database, since: datetime) -> None:
        """Raises StartFailed where a process dies again and again, or all of it takes too long."""
        ends_at = time.monotonic() + START_TIMEOUT_SECONDS
        while True:
            api_answers = answers(f"{self.url}/readyz")
            if api_answers and _image_workers(database, since) >= self.settings.worker_concurrency:
                return
            missing = self._hopeless
            if time.monotonic() > ends_at:
                # A worker's own children may die without end, and it starts others.
                missing = self._children["images" if api_answers else "api"]
            if missing is not None:
                raise did_not_start(missing.name, missing.running.log_path)
            time.sleep(_POLL_SECONDS)


def _stop(child: _Child, timeout_seconds: float) -> None:
    with child.turn:
        child.running.stop(timeout_seconds)
        child.turn.notify_all()


def _all_at_once(steps: Sequence[Callable[[], None]]) -> None:
    """Runs each in a thread. All have ended when this returns or raises the first error there was."""
    if not steps:
        return
    with ThreadPoolExecutor(len(steps)) as threads:
        ended = [threads.submit(step) for step in steps]
    for step in ended:
        step.result()


def _port_of(child: _Child | None) -> int | None:
    """The port a server has had, and must have again: every process was told of it."""
    return urlsplit(child.running.url).port if child is not None and isinstance(child.running, Server) else None


def _child_environ(settings: Settings) -> dict[str, str]:
    # Our settings are complete: what the environment says of them has been read, and must not be read once more.
    others = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith((ENV_PREFIX, "CELERY_", "GUNICORN_CMD_ARGS"))
    }
    source = str(Path(__file__).resolve().parent.parent)
    # A proxy for the world outside must not be asked for our own servers. Both spellings: libraries differ in theirs.
    unproxied = ",".join(filter(None, (others.get("no_proxy") or others.get("NO_PROXY"), LOOPBACK)))
    return {
        **others,
        **environ_of(settings),
        "PYTHONPATH": os.pathsep.join(filter(None, (source, others.get("PYTHONPATH", "")))),
        "NO_PROXY": unproxied,
        "no_proxy": unproxied,
    }


def answers(url: str) -> bool:
    """Whether a GET of this address on our own machine is answered with 200."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or LOOPBACK, parts.port, timeout=5)
    try:
        connection.request("GET", parts.path)
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _image_workers(database: Database, since: datetime) -> int:
    """How many image worker processes have enlisted since then and are still there."""
    with database.reading() as session:
        return (
            session.scalar(
                select(func.count()).where(
                    Worker.kind == "images", Worker.started_at >= since, Worker.stopped_at.is_(None)
                )
            )
            or 0
        )


@contextmanager
def _only_one_on(directory: Path) -> Iterator[None]:
    """Holds the folder's lock, which ends with this process at the latest. Raises StartFailed where another has it."""
    with (directory / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise StartFailed(
                f"The service is running on {directory} already (process {file.read().strip() or 'unknown'}). "
                "Stop it, or name another folder with --data-dir."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def turn_over(log_path: Path) -> None:
    """Keeps a long log as `.1`, in place of the one kept before."""
    if log_path.exists() and log_path.stat().st_size > LOG_BYTES_KEPT:
        log_path.replace(log_path.with_name(log_path.name + ".1"))


def _in_words(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit {status}"
