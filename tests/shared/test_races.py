"""A cancel and an end that come at the same moment, a thousand times, on PostgreSQL, where they really do (G10)."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
from sqlalchemy import select

from shared import jobs
from shared.db import Database, clock
from shared.errors import JobNotCancelable, StaleAttempt
from shared.models import Delivery, Job, JobState
from tests.factories import a_claim, a_job, a_key, a_result

RACES = 1000


# A quarter of a minute on a quiet machine; each commit waits for a disk, and on a busy one they all do.
@pytest.mark.timeout(900)
def test_a_thousand_races_of_cancel_and_success_have_one_winner_each(
    postgresql_database: Database, now: datetime
) -> None:
    database = postgresql_database
    with database.transaction() as session:
        key = a_key(session, now)
        claims = []
        for _ in range(RACES):
            job = a_job(session, key, now, webhook_url="https://1.1.1.1/hook", max_queued_jobs=RACES + 1)
            claims.append(a_claim(session, job.id, now))
    gate = threading.Barrier(2)
    gate_of_nobody = threading.Event()

    def cancels() -> list[bool]:
        """Whether each cancel was answered 202."""
        accepted = []
        for claim in claims:
            gate.wait(60)
            try:
                with database.transaction() as session:
                    jobs.cancel(session, claim.job_id, now=clock(session))
                accepted.append(True)
            except JobNotCancelable:
                accepted.append(False)
        return accepted

    def succeeds() -> list[bool]:
        """Whether each worker could finish; where not, it acknowledges the cancel, as workers do."""
        finished = []
        for number, claim in enumerate(claims):
            gate.wait(60)
            # Head starts for the other side, of all lengths, so that neither always wins.
            if number % 3:
                gate_of_nobody.wait(number % 10 / 5000)
            try:
                with database.transaction() as session:
                    jobs.succeed(session, claim, a_result(claim), now=clock(session))
                finished.append(True)
            except StaleAttempt:
                finished.append(False)
                with database.transaction() as session:
                    jobs.acknowledge_cancel(session, claim, now=clock(session))
        return finished

    with ThreadPoolExecutor(2) as threads:
        canceling, succeeding = threads.submit(cancels), threads.submit(succeeds)
        accepted, finished = canceling.result(), succeeding.result()

    outcomes = Counter(zip(accepted, finished, strict=True))
    # Never both, never neither.
    assert set(outcomes) <= {(True, False), (False, True)}, outcomes
    assert outcomes[True, False] > 0, "no cancel was ever first: nothing was raced"
    assert outcomes[False, True] > 0, "no worker was ever first: nothing was raced"
    with database.reading() as session:
        states = {job.id: job for job in session.scalars(select(Job))}
        events = Counter((row.job_id, row.type) for row in session.execute(select(Delivery.job_id, Delivery.type)))
    for claim, was_accepted in zip(claims, accepted, strict=True):
        job = states[claim.job_id]
        if was_accepted:
            assert (job.state, job.result_key, job.result_sha256) == (JobState.CANCELED, None, None)
        else:
            assert (job.state, job.result_key) == (JobState.SUCCEEDED, a_result(claim).key)
        assert events[claim.job_id, f"job.{job.state}"] == 1
    assert len(events) == RACES, "one event each, and no other"
