"""What the routes work with, put together once in `app.py` and handed to every blueprint."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.orm import Session

from api.limits import RateLimits
from api.zooms import Zooms
from shared import queueing
from shared.db import Database, clock
from shared.models import Job, JobState
from shared.outbox import Broker, Hurrier
from shared.outgoing import GuardedClient
from shared.sandbox import Sandbox
from shared.settings import Settings
from shared.storage import Storage
from shared.traces import Traces

# Threads of a process that nobody who waits for a job may hold.
THREADS_KEPT_FREE = 8


class Seats:
    """How many may watch jobs in one process at once: each watcher holds a thread, and others must find some free."""

    def __init__(self, threads: int) -> None:
        self._free = threading.Semaphore(max(1, threads - THREADS_KEPT_FREE))

    def take(self) -> Callable[[], None] | None:
        """The function that gives the seat back (calling it again is harmless), or None where there is no seat."""
        if not self._free.acquire(blocking=False):
            return None
        given_back = threading.Lock()

        def give_back() -> None:
            # A lock and not a flag: the server may close a response in another thread than the one that sends it.
            if given_back.acquire(blocking=False):
                self._free.release()

        return give_back


@dataclass(frozen=True)
class Context:
    """The parts of one API process. Each is thread-safe; none has connected to anything when this is made."""

    settings: Settings
    database: Database
    storage: Storage
    broker: Broker
    hurrier: Hurrier
    outgoing: GuardedClient
    seats: Seats
    limits: RateLimits
    sandbox: Sandbox
    """Where pictures' headers are read."""
    traces: Traces
    zooms: Zooms

    def waits_for(self, session: Session, job: Job) -> str | None:
        """In words, why nobody will come for a queued job; None where somebody may. Asks nothing of most jobs."""
        if job.state != JobState.QUEUED or not job.needs:
            return None
        lost_after_seconds = self.settings.worker_lost_after_seconds
        return queueing.waits_for(session, job, worker_lost_after_seconds=lost_after_seconds, now=clock(session))

    def warm_up(self) -> None:
        """Starts and loads what the first request would have to wait for; connects to nothing."""
        # What `/readyz` asks with comes first: a sandbox is a process that starts, and takes a core from it.
        self.storage.warm_up()
        self.limits.warm_up()
        self.sandbox.start()
        self.broker.warm_up()

    def close(self) -> None:
        """Sends what still waits and gives back connections. Requests under way fail; call it when no more come."""
        self.hurrier.close()
        self.sandbox.close()
        self.limits.close()
        self.broker.close()
        self.storage.close()
        self.database.close()
        self.traces.close()
