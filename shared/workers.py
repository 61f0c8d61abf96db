"""Who works: the rows of worker processes, and the thread that keeps a process's own row fresh.

A row says that its process is alive, what it runs and which queues it serves. It decides where `auto` jobs go, which
models are offered and what the dashboard shows. It decides nothing about a job: that is the lease's business.

Beside the row each beat leaves a file on this host, which `enlarger alive` reads: who supervises a container must learn
that a process hangs, and must not start it afresh because SQL is away.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import BindParameter, Update, bindparam, case, delete, func, insert, literal, select, update
from sqlalchemy.orm import Session

from shared.db import Database, UtcDateTime, clock
from shared.errors import DatabaseUnavailable, NotFound
from shared.models import Job, JobState, Worker
from shared.telemetry import Samples, log, tallies

KEPT_SECONDS = 7 * 86400
"""A process not heard of for this long is forgotten."""

_HOST_NAME_KEPT = 60
_BEAT_PREFIX = "enlarger-beat-"
_BEAT_KEPT_SECONDS = 3600


@dataclass(frozen=True)
class WorkerFacts:
    """What one process says about itself; none of it changes while it lives."""

    id: str
    kind: str
    """images, chores, relay or api."""
    host: str
    pid: int
    queues: tuple[str, ...] = ()
    device: str | None = None
    """cpu or gpu, of image workers."""
    device_name: str | None = None
    models: tuple[str, ...] | None = None
    """What an image worker can run (`catalog.runnable` and its own); None: whatever is asked for."""


def this_process(
    kind: str,
    *,
    queues: Sequence[str] = (),
    device: str | None = None,
    device_name: str | None = None,
    models: Sequence[str] | None = None,
) -> WorkerFacts:
    """The facts of the process that calls, under an id no other process has had: hosts use process ids again."""
    host = socket.gethostname()[:_HOST_NAME_KEPT]
    pid = os.getpid()
    worker_id = f"{kind}-{host}-{pid}-{secrets.token_hex(3)}"
    runs = None if models is None else tuple(models)
    return WorkerFacts(worker_id, kind, host, pid, tuple(queues), device, device_name, runs)


def enlist(
    session: Session,
    facts: WorkerFacts,
    *,
    models_loaded: Sequence[str] = (),
    samples: Samples | None = None,
    now: datetime,
) -> None:
    """Writes the row of a process that has just become ready. Its id must be new."""
    session.execute(
        insert(Worker).values(
            id=facts.id,
            kind=facts.kind,
            host=facts.host,
            pid=facts.pid,
            device=facts.device,
            device_name=facts.device_name,
            queues=list(facts.queues),
            models_loaded=list(models_loaded),
            models=None if facts.models is None else list(facts.models),
            tallies=samples,
            started_at=now,
            seen_at=now,
        )
    )


def seen(
    session: Session,
    worker_id: str,
    *,
    models_loaded: Sequence[str],
    now: datetime,
    usage: Mapping[str, float] | None = None,
    samples: Samples | None = None,
    speeds: Mapping[str, Mapping[str, Any]] | None = None,
) -> bool:
    """The process is alive, and has counted these. One UPDATE. False where it has no row (yet, or any more)."""
    told = None if usage is None else dict(usage)
    values = {"models_loaded": list(models_loaded), "usage": told, "tallies": samples, "speeds": speeds}
    return _change(session, worker_id, seen_at=now, **values)


def drain(session: Session, worker_id: str, *, now: datetime) -> None:
    """The process is to take no more jobs (`jobs.claim` sees to it); the one it has it finishes. Raises NotFound."""
    if not _change(session, worker_id, drained_at=func.coalesce(Worker.drained_at, literal(now, UtcDateTime))):
        raise NotFound("There is no such worker.")


def resume(session: Session, worker_id: str) -> None:
    """A drained process may take jobs again. Raises NotFound."""
    if not _change(session, worker_id, drained_at=None):
        raise NotFound("There is no such worker.")


def is_drained(session: Session, worker_id: str) -> bool:
    return session.scalar(select(Worker.drained_at).where(Worker.id == worker_id)) is not None


def working_on(session: Session, worker_id: str, job_id: str, *, now: datetime) -> None:
    """The process has taken this job. Belongs in the job's transaction."""
    session.execute(_working(), {"of_id": worker_id, "now": now, "job_id": job_id})


def done_with(session: Session, worker_id: str, job_id: str, *, now: datetime) -> None:
    """The process has ended this job, and may have others. Belongs in the job's transaction,
    behind what ends it."""
    session.execute(_done(), {"of_id": worker_id, "now": now, "job_id": job_id})


def stopped(session: Session, worker_id: str, *, samples: Samples | None = None, now: datetime) -> None:
    """The process ends in order."""
    _change(session, worker_id, seen_at=now, stopped_at=now, current_job_id=None, tallies=samples)


def forget_lost(session: Session, *, now: datetime) -> int:
    """Deletes rows of processes not heard of for KEPT_SECONDS. Returns how many."""
    gone = session.execute(
        delete(Worker).where(Worker.seen_at < now - timedelta(seconds=KEPT_SECONDS)).returning(Worker.id)
    )
    return len(gone.all())


def silent_for_seconds(folder: Path | None = None) -> dict[int, float]:
    """Every process of this host that has begun to beat and still runs: its id, and how long ago its last beat was.

    `folder` is where beats are left; None is the folder for temporary files.
    """
    left = _beats(folder or Path(tempfile.gettempdir()))
    return {pid: silent_seconds for _, pid, runs, silent_seconds in left if runs}


def _forget_beats(folder: Path) -> None:
    """Removes what processes that were killed have left there, as far as it is ours to remove."""
    for path, _, runs, silent_seconds in _beats(folder):
        # Old, too: a process may share the folder with us and not the list of processes, as in another container.
        if not runs and silent_seconds > _BEAT_KEPT_SECONDS:
            with contextlib.suppress(OSError):
                path.unlink()


def _beats(folder: Path) -> Iterator[tuple[Path, int, bool, float]]:
    """Each beat that was left there: its file, the process, whether that still runs, and seconds since."""
    for path in folder.glob(f"{_BEAT_PREFIX}*"):
        # Gone meanwhile, or named so by somebody else: the folder is everybody's.
        with contextlib.suppress(FileNotFoundError, ValueError):
            silent_seconds = max(0.0, time.time() - path.stat().st_mtime)
            pid, _, started = path.name.removeprefix(_BEAT_PREFIX).partition("-")
            # The process id may be another's today.
            runs = started != "" and started == _started(int(pid))
            yield path, int(pid), runs, silent_seconds


def _started(pid: int) -> str:
    """The moment at which a process was started, in ticks of the kernel's clock; empty where there is none."""
    try:
        # After the name, which may hold spaces and brackets: proc(5), field 22.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


class Presence:
    """Keeps the row of this process fresh, from a thread of its own, while `is_alive` says yes.

    A database that is away is waited for: the row is written, or written anew, when it is back.
    """

    def __init__(
        self,
        database: Database,
        facts: WorkerFacts,
        *,
        interval_seconds: float,
        is_alive: Callable[[], bool] = lambda: True,
        models_loaded: Callable[[], Sequence[str]] = tuple,
        usage: Callable[[], Mapping[str, float] | None] = lambda: None,
        speeds: Callable[[], Mapping[str, Mapping[str, Any]] | None] = lambda: None,
        on_enlist: Callable[[Session, datetime], None] = lambda _session, _now: None,
    ) -> None:
        """`is_alive` is asked before each beat: a process that hangs in its work must come to look lost. `on_enlist`
        writes what the process has to tell beside its row, in the same transaction."""
        self.facts = facts
        self._database = database
        self._interval_seconds = interval_seconds
        self._is_alive = is_alive
        self._models_loaded = models_loaded
        self._usage, self._speeds = usage, speeds
        self._on_enlist = on_enlist
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)
        self._beat_file = Path(tempfile.gettempdir()) / f"{_BEAT_PREFIX}{facts.pid}-{_started(facts.pid)}"

    def start(self, *, at_once: bool = True) -> None:
        """Enlists and begins to beat; where the database is away, enlists when it is back. With `at_once` false no
        server is asked before the first interval is over."""
        _forget_beats(self._beat_file.parent)
        if at_once:
            self._beat()
        self._thread.start()

    def stop(self) -> None:
        """Says that the process ends, where the database can be told; waits for the thread at most 1 s."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(1)
        self._beat_file.unlink(missing_ok=True)
        try:
            with self._database.transaction() as session:
                stopped(session, self.facts.id, samples=tallies.samples(), now=clock(session))
        except DatabaseUnavailable as error:
            log.warning("worker.stop_not_told", worker_id=self.facts.id, detail=error.detail)

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_seconds):
            self._beat()

    def _beat(self) -> None:
        if not self._is_alive():
            log.warning("worker.hangs", worker_id=self.facts.id)
            return
        self._beat_file.touch()
        usage = self._usage()
        try:
            with self._database.transaction() as session:
                now = clock(session)
                models = self._models_loaded()
                told: dict[str, Any] = {"models_loaded": models, "samples": tallies.samples()}
                if not seen(session, self.facts.id, **told, usage=usage, speeds=self._speeds(), now=now):
                    enlist(session, self.facts, **told, now=now)
                    self._on_enlist(session, now)
        except DatabaseUnavailable as error:
            log.warning("worker.not_seen", worker_id=self.facts.id, detail=error.detail)


# Two that each attempt runs, put together once.


@functools.cache
def _working() -> Update:
    return _seen_now().values(current_job_id=bindparam("job_id"))


@functools.cache
def _done() -> Update:
    ended_id: BindParameter[str] = bindparam("job_id")
    running = select(Job.id).where(Job.state == JobState.RUNNING, Job.worker_id == Worker.id, Job.id != ended_id)
    other = case((Worker.current_job_id != ended_id, Worker.current_job_id), else_=running.limit(1).scalar_subquery())
    return _seen_now().values(current_job_id=other)


def _seen_now() -> Update:
    of_worker = update(Worker).where(Worker.id == bindparam("of_id")).values(seen_at=bindparam("now"))
    return of_worker.execution_options(synchronize_session=False)


def _change(session: Session, worker_id: str, **values: object) -> bool:
    changed = session.execute(update(Worker).where(Worker.id == worker_id).values(**values).returning(Worker.id))
    return changed.one_or_none() is not None
