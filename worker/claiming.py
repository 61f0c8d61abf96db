"""What a process takes: the job whose turn it is or, where none waits, a shard of a job that another attempt holds.

A message says that there is work for a device; which job that is, SQL says. Whoever can do nothing with a message gives
it back, and holds it so that the broker hands over no other.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared import jobs, shards, workers
from shared.db import Database, clock
from shared.errors import DatabaseUnavailable
from shared.jobs import Claim
from shared.models import Job
from shared.settings import Settings
from shared.shards import ShardClaim
from shared.telemetry import log
from shared.workers import WorkerFacts
from worker import sharding

CLAIM_TRIES = 5
"""So often a claim tries again that met other workers at every job that is due."""

HELD_LOOK_SECONDS = 1.0
"""A worker that holds a message looks this often whether there is something for it to do ..."""
HELD_SPELL_SECONDS = 1200.0
"""... and ends the task it waits in after this: the broker gives a message that is held for two hours to another."""


@dataclass(frozen=True)
class ClaimedJob:
    """A job that is this process's to make an attempt at."""

    claim: Claim
    job: Job
    at: datetime
    device: str
    """Which of the process's devices is to make it: `cpu` or `gpu`."""

    @property
    def queued_seconds(self) -> float:
        return max(0.0, (self.at - self.job.queued_at).total_seconds())


@dataclass(frozen=True)
class ClaimedShard:
    """A shard that is this process's to make, of a job that another attempt holds."""

    claim: ShardClaim
    job: Job
    at: datetime
    device: str
    """As of a ClaimedJob."""


class Claiming:
    """Takes jobs and shards for one process. Its messages come one at a time, and one thread calls all this."""

    def __init__(
        self, database: Database, settings: Settings, facts: WorkerFacts, *, is_stopping: Callable[[], bool]
    ) -> None:
        self._database, self._settings, self._facts = database, settings, facts
        self._is_stopping = is_stopping
        self._is_drained = False
        self._lacks = False
        """Jobs waited at the last look, and this process can run none of them."""
        self._owed_queues: list[str] = []
        """Of a process that holds a message: where it belongs, while it could not be given back yet."""
        self._interactive_in_a_row = 0

    def claim(self, job_id: str, queue: str | None) -> ClaimedJob | None:
        """The job whose turn it is. The message of `job_id` has come from `queue` (None: the one the job waits in).

        None where there is nothing to claim, and where the database does not answer: nothing has happened then. Where
        jobs wait and none is for this process, that is known only after the message was held for a while.
        """
        claimed: ClaimedJob | None = None
        with _unless_away("job.not_claimed", job_id):
            claimed = self._claim(job_id, queue)
            if claimed is None:
                log.info("job.nothing_to_claim", drained=self._is_drained, lacks=self._lacks)
                claimed = self._claim_while_held()
        return claimed

    def claim_or_help(self, job_id: str, queue: str | None) -> ClaimedJob | ClaimedShard | None:
        """As `claim`, of a message that asks for help with `job_id`: where no job waits, a shard of that one."""
        claimed: ClaimedJob | ClaimedShard | None = None
        with _unless_away("shard.not_claimed", job_id):
            claimed = self._claim(job_id, queue)
            if claimed is not None:
                # Where that fails, the relay sends another when this one has not come to anything for long.
                with contextlib.suppress(DatabaseUnavailable), self._database.transaction() as session:
                    shards.give_message_back(session, job_id)
                return claimed
            claimed = self._claim_to_help(job_id)
            if claimed is None:
                log.info("shard.nothing_to_claim", drained=self._is_drained, lacks=self._lacks)
                claimed = self._claim_while_held()
        return claimed

    def claim_below(self, made: ShardClaim, job: Job) -> ShardClaim | None:
        """Another shard of the job, for whoever has made this one. None where there is none, or this process has
        something better to do."""
        if self._is_stopping():
            return None
        with contextlib.suppress(DatabaseUnavailable):
            claimed = self._claim_to_help(made.job_id, below=made.position)
            if claimed is None:
                return None
            if claimed.job.split == job.split:
                return claimed.claim
            # What holds for all shards has changed since the picture was opened: on other terms it is opened anew.
            sharding.give_back(self._database, claimed.claim)
        return None

    def pass_on(self, job_id: str, queue: str | None) -> None:
        """The message is another process's: it is given back without a look at what it leads to."""
        with contextlib.suppress(DatabaseUnavailable), self._database.transaction() as session:
            served = self._served(queue or session.scalar(select(Job.queue).where(Job.id == job_id)) or "")
            if served:
                self._give_message_back(session, served, clock(session))

    def _claim(self, job_id: str, queue: str | None, *, holds: bool = False) -> ClaimedJob | None:
        """A job that this process can run, of the queues of its message's device. Where there is none for it while
        others wait, or it is drained, the message is given back: once, not by one who `holds` it already."""
        worker_id = self._facts.id
        for _ in range(CLAIM_TRIES):
            # A claim that a power cut undoes was of a worker of this very host.
            with self._database.transaction(passing=True) as session:
                now = clock(session)
                # A message of before a job was moved to another device leads to the jobs of its own.
                served = self._served(queue or session.scalar(select(Job.queue).where(Job.id == job_id)) or "")
                if not holds:
                    self._owed_queues = []
                next_id = jobs.next_due(session, served, runs=self._runs, now=now) if served else None
                self._is_drained = self._lacks = False
                if next_id is None:
                    self._is_drained = workers.is_drained(session, worker_id)
                    if not self._is_drained and self._runs is not None and jobs.is_any_due(session, served, now=now):
                        self._lacks = True
                        if not holds:
                            self._give_message_back(session, served, now)
                    return None
                device = "cpu" if served[0].startswith("cpu.") else "gpu"
                claim = jobs.claim(
                    session,
                    next_id,
                    worker_id=worker_id,
                    device=device,
                    lease_seconds=self._settings.lease_seconds,
                    now=now,
                )
                if claim is not None:
                    workers.working_on(session, worker_id, claim.job_id, now=now)
                    job = session.get_one(Job, claim.job_id)
                    self._interactive_in_a_row = 0 if job.queue.endswith(".bulk") else self._interactive_in_a_row + 1
                    return ClaimedJob(claim, job, now, device)
                self._is_drained = workers.is_drained(session, worker_id)
                if self._is_drained:
                    if not holds:
                        self._give_message_back(session, served, now)
                    return None
            # Another worker was taking it: what it left behind is seen by a new transaction.
        return None

    def _claim_to_help(self, job_id: str, below: int | None = None) -> ClaimedShard | None:
        """`below`: of a helper that has made this shard and would go on; None then also where a job waits for it."""
        worker_id = self._facts.id
        with self._database.transaction() as session:
            now = clock(session)
            asked = session.execute(select(Job.queue, Job.model).where(Job.id == job_id)).one_or_none()
            # The job may have been moved to another device's queue since.
            if asked is None or asked.queue not in self._facts.queues:
                return None
            if self._runs is not None and asked.model not in self._runs:
                self._lacks = True
                shards.give_message_back(session, job_id)
                return None
            if below is not None:
                served = self._served(asked.queue)
                if jobs.next_due(session, served, runs=self._runs, now=now) is not None:
                    return None
            device = "cpu" if asked.queue.startswith("cpu.") else "gpu"
            claim = shards.claim_to_help(
                session,
                job_id,
                worker_id=worker_id,
                max_tries=self._settings.max_attempts,
                lease_seconds=self._settings.lease_seconds,
                now=now,
                below=below,
            )
            if claim is None and below is not None:
                return None
            if claim is None:
                self._is_drained = workers.is_drained(session, worker_id)
                if self._is_drained:
                    shards.give_message_back(session, job_id)
                return None
            workers.working_on(session, worker_id, job_id, now=now)
            return ClaimedShard(claim, session.get_one(Job, job_id), now, device)

    def _claim_while_held(self) -> ClaimedJob | None:
        """Holds the message, which has been given back, so that the broker hands this process no other: while it is
        drained, and while only jobs wait that it cannot run. The first that it can it takes, whoever's message it was;
        None where there is nothing to hold it for any more."""
        ends_at = time.monotonic() + HELD_SPELL_SECONDS
        while (self._is_drained or self._lacks) and time.monotonic() < ends_at and not self._is_stopping():
            # Nobody sets it: a signal handler that did would wait for a lock this very thread holds.
            threading.Event().wait(HELD_LOOK_SECONDS)
            with contextlib.suppress(DatabaseUnavailable):
                if self._owed_queues:
                    with self._database.transaction() as session:
                        self._give_message_back(session, self._owed_queues, clock(session))
                if self._is_drained:
                    with self._database.reading() as session:
                        self._is_drained = workers.is_drained(session, self._facts.id)
                elif (claimed := self._claim_of_any_device()) is not None:
                    return claimed
        return None

    def _claim_of_any_device(self) -> ClaimedJob | None:
        lacks = False
        for device in dict.fromkeys(queue.partition(".")[0] for queue in self._facts.queues):
            claimed = self._claim("", f"{device}.", holds=True)
            if claimed is not None or self._is_drained:
                return claimed
            lacks = lacks or self._lacks
        self._lacks = lacks
        return None

    def _give_message_back(self, session: Session, queues: list[str], now: datetime) -> None:
        """That of one of these queues; one that is faster than its mark in SQL is owed until that is there."""
        self._owed_queues = [] if jobs.give_message_back(session, queues, now=now) else queues

    def _served(self, queue: str) -> list[str]:
        """The queues of this one's device that the process serves, in the order in which jobs are taken from them."""
        device = queue.partition(".")[0]
        served = [each for each in self._facts.queues if each.partition(".")[0] == device]
        if self._interactive_in_a_row >= self._settings.bulk_after_interactive_jobs:
            served.sort(key=lambda each: not each.endswith(".bulk"))
        return served

    @property
    def _runs(self) -> tuple[str, ...] | None:
        return self._facts.models


@contextlib.contextmanager
def _unless_away(event: str, job_id: str) -> Iterator[None]:
    """Breaks the block off, and logs that, where the database does not answer."""
    with structlog.contextvars.bound_contextvars(job_id=job_id):
        try:
            yield
        except DatabaseUnavailable as error:
            log.warning(event, detail=error.detail)
