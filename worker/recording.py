"""What attempts came to, written down: in SQL, and in storage where a result came too late."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, assert_never

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared import jobs, shards, workers
from shared.db import Database, clock
from shared.errors import DatabaseUnavailable, StaleAttempt, StorageUnavailable
from shared.jobs import Claim
from shared.models import Job
from shared.settings import Settings
from shared.shards import ShardClaim
from shared.storage import Storage
from shared.telemetry import log
from worker.outcomes import Canceled, Fatal, Helped, Outcome, Released, Retryable, Succeeded, Superseded, name_of

SERVER_AWAY_SECONDS = 10.0
"""How long a job waits that met a server which did not answer."""

RETRY_RECORDING_SECONDS = (0.1, 2.0)
"""First and longest wait before what an attempt came to is written again, where the database is away."""


class Recording:
    """Of the attempts of one process, also of several at once."""

    def __init__(self, database: Database, storage: Storage, settings: Settings, worker_id: str) -> None:
        self._database, self._storage, self._settings, self._worker_id = database, storage, settings, worker_id

    def record(self, claim: Claim, outcome: Outcome, trace: Mapping[str, Any]) -> None:
        """Writes down what the attempt came to. A database that is away is waited for as long as a lease lasts: after
        that the job is somebody else's."""
        wait_seconds, longest_seconds = RETRY_RECORDING_SECONDS
        ends_at = time.monotonic() + self._settings.lease_seconds
        while True:
            try:
                self._record_once(claim, outcome, trace)
                return
            except DatabaseUnavailable as error:
                if time.monotonic() + wait_seconds > ends_at:
                    log.warning("job.not_recorded", outcome=name_of(outcome), detail=error.detail)
                    return
            # Nobody sets it: the wait is only a wait.
            threading.Event().wait(wait_seconds)
            wait_seconds = min(2 * wait_seconds, longest_seconds)

    def give_shard_back(self, job_id: str, claim: ShardClaim | None, outcome: Outcome) -> None:
        """What a helper could not make is somebody else's; where the database cannot be told, once the lease passes.
        `claim` is None where there was nothing left to make."""
        try:
            with self._database.transaction() as session:
                workers.done_with(session, self._worker_id, job_id, now=clock(session))
                match outcome:
                    case Retryable(error) | Fatal(error) if claim is not None:
                        shards.give_back(session, claim, error)
                    case Released() if claim is not None:
                        shards.give_back(session, claim)
        except StaleAttempt as error:
            log.info("shard.superseded", detail=error.detail)
        except DatabaseUnavailable as error:
            log.warning("shard.not_recorded", detail=error.detail)

    def _record_once(self, claim: Claim, outcome: Outcome, trace: Mapping[str, Any]) -> None:
        try:
            with self._database.transaction() as session:
                now = clock(session)
                self._write(session, claim, outcome, now)
                jobs.keep_trace(session, claim, trace)
                workers.done_with(session, self._worker_id, claim.job_id, now=now)
            return
        except StaleAttempt as error:
            log.info("job.superseded", detail=error.detail)
        with self._database.transaction() as session:
            now = clock(session)
            workers.done_with(session, self._worker_id, claim.job_id, now=now)
            if isinstance(outcome, Succeeded):
                # Perhaps it came too late in another way: a job that is being canceled cannot succeed any more.
                with contextlib.suppress(StaleAttempt):
                    jobs.acknowledge_cancel(session, claim, now=now)
                kept_key = session.scalar(select(Job.result_key).where(Job.id == claim.job_id))
        # Not where it is the job's after all: the commit before may have lost its reply and nothing else.
        if isinstance(outcome, Succeeded) and outcome.result.key != kept_key:
            with contextlib.suppress(StorageUnavailable):
                self._storage.remove(outcome.result.key)

    def _write(self, session: Session, claim: Claim, outcome: Outcome, now: datetime) -> None:
        match outcome:
            case Succeeded(result):
                jobs.succeed(session, claim, result, now=now)
            case Retryable(error, queue):
                jobs.fail(
                    session,
                    claim,
                    error,
                    retry_delay_seconds=self._settings.retry_delay_seconds,
                    now=now,
                    queue=queue,
                )
            case Fatal(error):
                jobs.fail(session, claim, error, retry_delay_seconds=self._settings.retry_delay_seconds, now=now)
            case Canceled():
                jobs.acknowledge_cancel(session, claim, now=now)
            case Released(error):
                jobs.release(session, claim, error=error, delay_seconds=SERVER_AWAY_SECONDS if error else 0.0, now=now)
            case Superseded() | Helped():
                pass
            case _:
                assert_never(outcome)
