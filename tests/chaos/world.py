"""A whole Enlarger to be broken: real servers behind proxies, real processes, customers, a receiver, and SQL's own
record of every arrow.

    with World(folder, seed=1, sql="postgresql") as world:
        world.submit_all(200)
        ...  # break things
        world.settle()
        violations = check(world.history)
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import queue
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Self
from unittest import mock

import httpx
import redis
from PIL import Image
from sqlalchemy import func, inspect, select, text
from sqlalchemy.engine import make_url
from standardwebhooks import Webhook, WebhookVerificationError

from shared import stack as stack_module
from shared.db import Database
from shared.models import TERMINAL_STATES, Attempt, Delivery, DeliveryState, Job, JobState, Shard, Worker
from shared.servers import Server, free_port, start_postgresql, start_redis, start_s3
from shared.settings import Settings
from shared.stack import Stack, prepare
from shared.storage import Storage
from tests.chaos import processes
from tests.chaos.history import History
from tests.chaos.proxy import Proxy
from tests.conftest import Received, Receiver, Reply

# Short lives, so that minutes of chaos hold as many rescues as days of life. What is under test is their logic; the
# product's own numbers are measured apart (`recovery`).
SHORT_LIVES: dict[str, Any] = {
    "lease_seconds": 3.0,
    "lease_renew_seconds": 0.75,
    "rescue_interval_seconds": 0.3,
    "relay_interval_seconds": 0.3,
    "retry_delay_seconds": 0.2,
    "resend_after_seconds": 4.0,
    "worker_lost_after_seconds": 10.0,
    "storage_timeout_seconds": 3.0,
    "webhook_timeout_seconds": 3.0,
    "webhook_retry_seconds": (0, 0.5, 1, 1, 2, 2, 4, 4, 8, 8),
}
STEADY: dict[str, Any] = {
    "tile_px": 24,
    "torch_threads": 1,
    "worker_device": "cpu",
    "chores_concurrency": 2,
    "api_threads": 16,
    "max_queued_jobs_per_key": 100_000,
    "rate_limit_per_minute": 1_000_000,
    "log_format": "text",
    "allow_private_addresses": ("127.0.0.0/8",),
}
PATIENCE_SECONDS = 90.0
"""Without a step forward, once nothing is broken any more: well above the longest wait there is, the lease of a webhook
try that could not be recorded (48 s here). Generous: the machine may be busy."""
SUBMIT_PATIENCE_SECONDS = 120.0
"""For one picture to be accepted, however often it takes."""
CUSTOMERS = 8

# Sides in px: one tile, some tiles, many tiles.
SIZES = {"small": (8, 8), "middle": (72, 48), "long": (120, 96), "wide": (240, 192), "endless": (480, 360)}
SHARED: dict[str, Any] = {"split_above_px": 10_000, "shard_output_px": 24 * 120 * 4**2}
"""Settings with which pictures from `long` on are shared: in shards of one band each."""

_SHARDS = (
    "CREATE TABLE chaos_shards (seq {serial}, job TEXT, position INTEGER, old_number INTEGER, new_number INTEGER,"
    " old_made BOOLEAN, new_made BOOLEAN, part TEXT)"
)
_SHARD_MOVED = "OLD.number <> NEW.number OR OLD.finished_at IS NOT NULL OR NEW.finished_at IS NOT NULL"
_SHARD_NOTE = (
    "INSERT INTO chaos_shards (job, position, old_number, new_number, old_made, new_made, part) VALUES (NEW.job_id,"
    " NEW.position, OLD.number, NEW.number, OLD.finished_at IS NOT NULL, NEW.finished_at IS NOT NULL, NEW.key)"
)
_SHARD_GONE = (
    "INSERT INTO chaos_shards (job, position, old_number, old_made) VALUES (OLD.job_id, OLD.position, OLD.number,"
    " OLD.finished_at IS NOT NULL)"
)
_WATCH = {
    "sqlite": [
        "CREATE TABLE chaos_changes (seq INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT, old_state TEXT, new_state TEXT,"
        " old_attempt INTEGER, new_attempt INTEGER)",
        "CREATE TRIGGER chaos_new AFTER INSERT ON jobs BEGIN INSERT INTO chaos_changes"
        " (job, new_state, new_attempt) VALUES (NEW.id, NEW.state, NEW.attempt); END",
        "CREATE TRIGGER chaos_moved AFTER UPDATE OF state ON jobs BEGIN INSERT INTO chaos_changes"
        " (job, old_state, new_state, old_attempt, new_attempt)"
        " VALUES (NEW.id, OLD.state, NEW.state, OLD.attempt, NEW.attempt); END",
        _SHARDS.format(serial="INTEGER PRIMARY KEY AUTOINCREMENT"),
        f"CREATE TRIGGER chaos_shard_moved AFTER UPDATE ON shards WHEN {_SHARD_MOVED} BEGIN {_SHARD_NOTE}; END",
        f"CREATE TRIGGER chaos_shard_gone AFTER DELETE ON shards BEGIN {_SHARD_GONE}; END",
    ],
    "postgresql": [
        "CREATE TABLE chaos_changes (seq BIGSERIAL PRIMARY KEY, job TEXT, old_state TEXT, new_state TEXT,"
        " old_attempt INTEGER, new_attempt INTEGER)",
        "CREATE FUNCTION chaos_note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF TG_OP = 'INSERT' THEN INSERT INTO chaos_changes (job, new_state, new_attempt)"
        " VALUES (NEW.id, NEW.state, NEW.attempt);"
        " ELSE INSERT INTO chaos_changes (job, old_state, new_state, old_attempt, new_attempt)"
        " VALUES (NEW.id, OLD.state, NEW.state, OLD.attempt, NEW.attempt); END IF; RETURN NULL; END $$",
        "CREATE TRIGGER chaos_watch AFTER INSERT OR UPDATE OF state ON jobs FOR EACH ROW EXECUTE FUNCTION chaos_note()",
        _SHARDS.format(serial="BIGSERIAL PRIMARY KEY"),
        "CREATE FUNCTION chaos_note_shard() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF TG_OP = 'DELETE' THEN {_SHARD_GONE};"
        f" ELSIF {_SHARD_MOVED} THEN {_SHARD_NOTE}; END IF; RETURN NULL; END $$",
        "CREATE TRIGGER chaos_watch_shards AFTER UPDATE OR DELETE ON shards"
        " FOR EACH ROW EXECUTE FUNCTION chaos_note_shard()",
    ],
}


class World:
    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        sql: Literal["sqlite", "postgresql"] = "sqlite",
        image_processes: int = 2,
        tile_seconds: float = 0.05,
        fence: bool = True,
        receiver_faults: float = 0.3,
        tell: Callable[[str], None] = lambda _: None,
        restore: Callable[[World], None] = lambda _: None,
        **settings: Any,
    ) -> None:
        """`restore` may fill the empty servers before anything of ours starts. `settings` are the product's; what they
        leave open is SHORT_LIVES and STEADY."""
        self.seed = seed
        self.chance = random.Random(seed)
        self.folder = folder
        self.history = History(folder / "history.jsonl")
        self.proxies: dict[str, Proxy] = {}
        self.servers: dict[str, Server] = {}
        self.sleeping: set[int] = set()
        """Image processes that are stopped just now."""
        self.tell = tell
        self._sql = sql
        self._told = {processes.TILE_SECONDS: str(tile_seconds), processes.FENCE: "on" if fence else "off"}
        self._receiver_faults, self._restore = receiver_faults, restore
        self._given = {**STEADY, **SHORT_LIVES, "worker_concurrency": image_processes, **settings}
        self._closing = ExitStack()
        self._customers: list[threading.Thread] = []
        self._waiting: queue.Queue[tuple[int, str] | None] = queue.Queue()
        self._background: list[threading.Thread] = []
        self._is_closing = threading.Event()
        self._numbers = itertools.count()

    # --- beginning and end ------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closing.set()
        self._closing.close()
        self.history.close()

    def _start(self) -> None:
        enter, folder = self._closing.enter_context, self.folder
        secret = "chaos-secret-key"
        self._starters: dict[str, Callable[[int | None], Server]] = {
            "redis": lambda port: start_redis(folder / "redis", port),
            "s3": lambda port: start_s3(folder / "s3", "enlarger", "chaos", secret, port),
        }
        if self._sql == "postgresql":
            self._starters["sql"] = lambda port: start_postgresql(folder / "postgresql", port)
        self._closing.callback(self._stop_servers)
        for name, start in self._starters.items():
            self.servers[name] = start(None)
            self.proxies[name] = enter(Proxy(_port(self.servers[name]), latency_seconds=0.2))
        given = self._given | {
            "data_dir": folder / "data",
            "secret_key": "a secret key for chaos only",
            "redis_url": self._proxied("redis"),
            "storage_endpoint_url": self._proxied("s3"),
            "storage_access_key": "chaos",
            "storage_secret_key": secret,
        }
        if self._sql == "postgresql":
            given["database_url"] = self._proxied("sql")
        self.settings = Settings(**given)
        # Past the proxies: the eyes of the harness must not be hurt by its hands.
        direct = {"storage_endpoint_url": self.servers["s3"].url}
        if self._sql == "postgresql":
            direct["database_url"] = self.servers["sql"].url
        unhurt = self.settings.model_copy(update=direct)
        self.storage = Storage(unhurt)
        self._closing.callback(self.storage.close)
        self._restore(self)
        prepare(unhurt)
        self.database = Database(unhurt.sqlalchemy_url)
        self._closing.callback(self.database.close)
        if not inspect(self.database.engine).has_table("chaos_changes"):
            with self.database.engine.begin() as connection:
                for statement in _WATCH[self._sql]:
                    connection.execute(text(statement))
        self.redis = redis.Redis.from_url(self.servers["redis"].url, socket_timeout=5)
        self._closing.callback(self.redis.close)

        enter(mock.patch.object(stack_module, "command", _Commands(stack_module.command)))
        enter(mock.patch.object(stack_module, "RESTART_DELAYS_SECONDS", (0.0,)))
        enter(mock.patch.dict(os.environ, self._told))
        self.stack = enter(Stack(self.settings, port=free_port(), tell=self.tell))
        # Its history has been judged by then, and how a service stops in order is tested elsewhere.
        self._closing.callback(self.stack.kill)
        self.http = httpx.Client(
            base_url=self.stack.url, headers={"Authorization": f"Bearer {self.stack.api_key}"}, timeout=30
        )
        self._closing.callback(self.http.close)
        signs = self.http.get("/v1/key").raise_for_status().json()["webhook_secret"]
        self.receiver = enter(_Unreliable(self.history, signs, self._receiver_faults, random.Random(self.seed)))

    def _stop_servers(self) -> None:
        for server in self.servers.values():
            server.stop()

    def _proxied(self, name: str) -> str:
        """The server's address, through its proxy."""
        url = self.servers[name].url
        return url.replace(f":{_port(self.servers[name])}", f":{self.proxies[name].port}")

    # --- servers ----------------------------------------------------------------------------------------------------

    def restart(self, name: str) -> None:
        """Starts a server again that was killed, on its port and with its data."""
        server = self.servers[name]
        self.servers[name] = self._starters[name](_port(server))

    def in_background(self, work: Callable[[], None]) -> None:
        """Goes on while other things happen; `settle` waits for it."""
        thread = threading.Thread(target=work, name="background", daemon=True)
        thread.start()
        self._background.append(thread)

    # --- customers --------------------------------------------------------------------------------------------------

    def submit_each(self, kinds: Sequence[str]) -> None:
        """One picture of each of these kinds is handed in from now on, until it is accepted; does not wait for that."""
        for kind in kinds:
            self._waiting.put((next(self._numbers), kind))
        while len(self._customers) < CUSTOMERS:
            thread = threading.Thread(target=self._be_a_customer, name="customer", daemon=True)
            thread.start()
            self._customers.append(thread)

    def _be_a_customer(self) -> None:
        with httpx.Client(base_url=self.stack.url, headers=self.http.headers, timeout=30) as http:
            while (given := self._waiting.get()) is not None:
                job_id = self._submit(http, *given)
                if job_id is not None:
                    self._perhaps_cancel(http, job_id)

    def submit(self, kind: str) -> str:
        """One picture, until it is accepted; returns the job's id."""
        job_id = self._submit(self.http, next(self._numbers), kind)
        assert job_id is not None, "nobody takes a picture"
        return job_id

    def try_to_submit(self, kind: str) -> tuple[int | None, str | None]:
        """One picture, once: the answer's status and the job's id, None where there is none."""
        return self._try_submit(self.http, f"{self.seed}-{next(self._numbers)}", kind)

    def _submit(self, http: httpx.Client, number: int, kind: str) -> str | None:
        key = f"{self.seed}-{number}"
        chance = random.Random(key)
        ends_at = time.monotonic() + SUBMIT_PATIENCE_SECONDS
        while True:
            status, job_id = self._try_submit(http, key, kind)
            if job_id is not None:
                break
            if time.monotonic() > ends_at or self._is_closing.is_set():
                self.history.record("gave_up", key=key, status=status)
                return None
            threading.Event().wait(chance.uniform(0.05, 0.6))
        return job_id

    def _perhaps_cancel(self, http: httpx.Client, job_id: str) -> None:
        """Every few jobs are taken back, at whatever moment of their life that is."""
        chance = random.Random(job_id)
        if chance.random() < 0.03:
            threading.Event().wait(chance.uniform(0, 0.3))
            with suppress(httpx.TransportError):
                answer = http.post(f"/v1/jobs/{job_id}/cancel")
                self.history.record("cancel", id=job_id, status=answer.status_code)

    def _try_submit(self, http: httpx.Client, key: str, kind: str) -> tuple[int | None, str | None]:
        began = time.monotonic()
        facts: dict[str, Any] = {"status": None, "id": None, "retry_after": None, "error": None}
        try:
            answer = http.post(
                "/v1/jobs",
                headers={"Idempotency-Key": key},
                files={"image": ("picture.png", picture(kind), "image/png")},
                data={"external_id": key, "webhook_url": self.receiver.url, "format": "png"},
            )
            facts |= {"status": answer.status_code, "retry_after": answer.headers.get("Retry-After")}
            if answer.status_code == 202:
                facts["id"] = answer.json()["id"]
            else:
                facts["error"] = answer.text[:500]
        except httpx.TransportError as error:
            facts["error"] = type(error).__name__
        self.history.record("submit", key=key, picture=kind, seconds=round(time.monotonic() - began, 4), **facts)
        return facts["status"], facts["id"]

    def wait_for_customers(self) -> None:
        for _ in self._customers:
            self._waiting.put(None)
        for thread in self._customers:
            thread.join()
        self._customers.clear()

    # --- what there is to break -------------------------------------------------------------------------------------

    def holders(self, *, after: float = 0.0) -> list[tuple[int, str, int]]:
        """(pid, job, attempt) of each image process that is in the middle of a job, at least `after` of it done."""
        with self.database.reading() as session:
            rows = session.execute(
                select(Worker.pid, Job.id, Job.attempt)
                .join(Job, Job.worker_id == Worker.id)
                .where(Job.state == JobState.RUNNING, Job.fraction >= after, Worker.current_job_id == Job.id)
            ).all()
        return [(row.pid, row.id, row.attempt) for row in rows if self._is_image_process(row.pid)]

    def helpers(self, job_id: str) -> list[int]:
        """The pid of each image process that is in the middle of a shard of the job, which another one holds."""
        with self.database.reading() as session:
            pids = session.scalars(
                select(Worker.pid)
                .join(Shard, Shard.worker_id == Worker.id)
                .join(Job, Job.id == Shard.job_id)
                .where(
                    Job.id == job_id,
                    Job.state == JobState.RUNNING,
                    Job.worker_id != Worker.id,
                    Shard.finished_at.is_(None),
                    Shard.lease_until.is_not(None),
                )
            ).all()
        return [pid for pid in pids if self._is_image_process(pid)]

    def image_processes(self) -> list[int]:
        with self.database.reading() as session:
            pids = session.scalars(select(Worker.pid).where(Worker.kind == "images", Worker.stopped_at.is_(None))).all()
        return [pid for pid in set(pids) if self._is_image_process(pid)]

    def sleep(self, pid: int, seconds: float) -> None:
        """The process does not run for so long."""
        self.sleeping.add(pid)
        with stopped(pid):
            threading.Event().wait(seconds)
        self.sleeping.discard(pid)

    def stop_until(self, pid: int, done: Callable[[], object], *, seconds: float) -> None:
        """The process sleeps until `done`; raises TimeoutError."""
        with stopped(pid):
            self.wait_until(done, seconds=seconds)

    def wait_until_idle(self, pid: int, *, seconds: float) -> None:
        """Until the process says that it has no job any more; raises TimeoutError."""

        def is_idle() -> bool:
            with self.database.reading() as session:
                mine = select(Worker.current_job_id).where(Worker.pid == pid).order_by(Worker.started_at.desc())
                return session.scalars(mine).first() is None

        self.wait_until(is_idle, seconds=seconds)

    def wait_until(self, done: Callable[[], object], *, seconds: float) -> None:
        ends_at = time.monotonic() + seconds
        while not done():
            if time.monotonic() > ends_at:
                raise TimeoutError(f"waited {seconds:g} s in vain")
            threading.Event().wait(0.05)

    def _is_image_process(self, pid: int) -> bool:
        try:
            return os.getpgid(pid) == self.stack.process("images").pid
        except ProcessLookupError:
            return False

    # --- the end ----------------------------------------------------------------------------------------------------

    def settle(self, *, seconds: float = PATIENCE_SECONDS) -> bool:
        """`rest`, and then writes down the rows and blobs there are. Where it was in vain the checker says what is
        open."""
        self.wait_for_customers()
        for thread in self._background:
            thread.join()
        self._background.clear()
        rested = self.rest(seconds=seconds)
        self._write_ledger()
        return rested

    def rest(self, *, seconds: float = PATIENCE_SECONDS) -> bool:
        """Waits until every job and every event has ended, as long as one has ended or been tried within the last
        `seconds`; False where that was in vain."""
        seen, ends_at = self._open_ends(), time.monotonic() + seconds
        while seen[0] and time.monotonic() < ends_at:
            threading.Event().wait(0.1)
            now_seen = self._open_ends()
            if now_seen != seen:
                seen, ends_at = now_seen, time.monotonic() + seconds
        return seen[0] == 0

    def open_jobs(self) -> int:
        with self.database.reading() as session:
            return session.scalar(select(func.count()).where(Job.state.not_in(TERMINAL_STATES))) or 0

    def states(self, job_ids: Sequence[str]) -> Counter[str]:
        with self.database.reading() as session:
            return Counter(str(state) for state in session.scalars(select(Job.state).where(Job.id.in_(job_ids))))

    def outcomes(self, job_ids: Sequence[str]) -> Counter[str]:
        """Of the attempts at these jobs that have ended."""
        with self.database.reading() as session:
            found = select(Attempt.outcome).where(Attempt.job_id.in_(job_ids), Attempt.outcome.is_not(None))
            return Counter(str(outcome) for outcome in session.scalars(found))

    def _open_ends(self) -> tuple[int, int]:
        """How many jobs and events have not ended, and how many tries there have been at either."""
        with self.database.reading() as session:
            pending = session.scalar(select(func.count()).where(Delivery.state == DeliveryState.PENDING)) or 0
            tries = session.scalar(select(func.sum(Delivery.number))) or 0
            attempts = session.scalar(select(func.sum(Job.attempt))) or 0
        return self.open_jobs() + pending, tries + attempts

    def _write_ledger(self) -> None:
        record = self.history.record
        with self.database.reading() as session:
            for row in session.execute(text("SELECT * FROM chaos_changes ORDER BY seq")).mappings():
                record("change", **{name: value for name, value in row.items() if name != "seq"})
            for row in session.execute(text("SELECT * FROM chaos_shards ORDER BY seq")).mappings():
                facts = {name: value for name, value in row.items() if name != "seq"}
                # SQLite has no booleans.
                record("shard", **facts | {name: bool(facts[name]) for name in ("old_made", "new_made")})
            for kind in SIZES:
                record("picture", picture=kind, pixels_sha256=pixels_by_one_worker(kind))
            found = session.scalars(select(Job).order_by(Job.id)).all()
            for job in found:
                record(
                    "job",
                    id=job.id,
                    key=job.external_id,
                    state=str(job.state),
                    attempt=job.attempt,
                    error_code=job.error_code,
                    result_key=job.result_key,
                    result_sha256=job.result_sha256,
                    published_count=job.published_count,
                )
            for attempt in session.scalars(select(Attempt).order_by(Attempt.job_id, Attempt.number)):
                record(
                    "attempt",
                    job=attempt.job_id,
                    number=attempt.number,
                    outcome=attempt.outcome,
                    started_at=attempt.started_at,
                    finished_at=attempt.finished_at,
                    error_code=attempt.error_code,
                )
            for delivery in session.scalars(select(Delivery).order_by(Delivery.id)):
                record(
                    "delivery",
                    id=delivery.id,
                    job=delivery.job_id,
                    type=delivery.type,
                    state=str(delivery.state),
                    tries_used=delivery.tries_used,
                    tries_allowed=len(self.settings.webhook_retry_seconds),
                )
        for job in found:
            if job.result_key:
                file = io.BytesIO()
                self.storage.get(job.result_key, file)
                sha256, pixels_sha256 = hashlib.sha256(file.getvalue()).hexdigest(), _pixels_sha256(file)
                record("blob", key=job.result_key, sha256=sha256, pixels_sha256=pixels_sha256)

    def refused_late_writes(self) -> int:
        """How often a late worker was told that its attempt is over: by the images' own log."""
        log = (self.settings.data_dir / "logs" / "images.log").read_text(errors="replace")
        return log.count("outcome=superseded")

    def forced_stops(self) -> int:
        """How often a worker told to stop did not, and had its processes killed."""
        log = (self.settings.data_dir / "logs" / "images.log").read_text(errors="replace")
        return log.count("worker.stop_forced")


class _Commands:
    """`shared.stack.command`, but with the processes of `tests.chaos.processes`, and two of the API: one can be killed
    while the other answers."""

    def __init__(self, products: Callable[..., list[str]]) -> None:
        self._products = products

    def __call__(self, name: str, settings: Settings, **given: Any) -> list[str]:
        words = self._products(name, settings, **{**given, "processes": 2} if name == "api" else given)
        ours = {
            "worker.app:images": f"{processes.__name__}:images",
            "api.app:create_app()": f"{processes.__name__}:api()",
        }
        return [ours.get(word, word) for word in words]


class _Unreliable(Receiver):
    """A customer's receiver that fails as often as asked, checks every signature and records every call."""

    def __init__(self, history: History, secret: str, faults: float, chance: random.Random) -> None:
        self._history, self._faults, self._chance = history, faults, chance
        self._webhook = Webhook(secret)
        super().__init__()

    def _take(self, request: Received) -> Reply:
        headers = {name.lower(): value for name, value in request.headers.items()}
        try:
            self._webhook.verify(request.body, headers)
            is_signed = True
        except WebhookVerificationError:
            is_signed = False
        reply = Reply(self._chance.choice((500, 502, 429))) if self._chance.random() < self._faults else Reply()
        event = request.json
        self._history.record(
            "heard",
            delivery=headers["webhook-id"],
            type=event["type"],
            id=event["data"]["id"],
            answered=reply.status,
            sha256=hashlib.sha256(request.body).hexdigest(),
            is_signed=is_signed,
        )
        return reply


def picture(kind: str) -> bytes:
    """A PNG of one of SIZES, or a small one that is `poison`. The same bytes each time."""
    if kind not in _pictures:
        file = io.BytesIO()
        if kind == "poison":
            image = Image.new("RGB", SIZES["small"], tuple(round(255 * value) for value in processes.POISON))
        else:
            image = Image.effect_mandelbrot(SIZES[kind], (-2, -1.5, 1, 1.5), 100).convert("RGB")
        image.save(file, "PNG")
        _pictures[kind] = file.getvalue()
    return _pictures[kind]


_pictures: dict[str, bytes] = {}


def pixels_by_one_worker(kind: str) -> str:
    """What a single worker makes of `picture(kind)`, with a network that repeats pixels: SHA-256 of its pixels."""
    with Image.open(io.BytesIO(picture(kind))) as image:
        larger = image.resize((image.width * 4, image.height * 4), Image.Resampling.NEAREST)
    return hashlib.sha256(larger.tobytes()).hexdigest()


def _pixels_sha256(file: io.BytesIO) -> str:
    with Image.open(file) as image:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process does not run in the block: its connections stay open and say nothing."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _port(server: Server) -> int:
    port = make_url(server.url).port if server.name != "s3" else int(server.url.rpartition(":")[2])
    assert port is not None, server.url
    return port
