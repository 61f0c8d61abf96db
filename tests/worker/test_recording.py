"""What an attempt came to is written down, also where the database is away."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import DatabaseUnavailable
from shared.jobs import Claim
from shared.models import JobState
from tests.worker.a_bench import Bench, away
from worker import recording
from worker.outcomes import Released, Succeeded


def test_what_an_attempt_came_to_is_written_when_the_database_is_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "RETRY_RECORDING_SECONDS", (0.001, 0.002))
    job_id = bench.submit()
    put, transaction = bench.storage.put, bench.database.transaction
    failures_left = 0

    def flaky(**named: Any) -> Any:
        nonlocal failures_left
        if failures_left:
            failures_left -= 1
            raise DatabaseUnavailable("away")
        return transaction(**named)

    def put_then_lose_the_database(*positional: Any, **named: Any) -> None:
        nonlocal failures_left
        put(*positional, **named)
        failures_left = 4

    monkeypatch.setattr(bench.database, "transaction", flaky)
    monkeypatch.setattr(bench.storage, "put", put_then_lose_the_database)
    assert isinstance(bench.executor.run(job_id), Succeeded)
    assert failures_left == 0
    assert bench.job(job_id).state == JobState.SUCCEEDED


def test_recording_is_given_up_when_the_lease_is_surely_over(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "RETRY_RECORDING_SECONDS", (0.02, 0.02))
    bench.executor._recording._settings = bench.settings.model_copy(update={"lease_seconds": 0.1})
    with away(bench.database, monkeypatch) as tries:
        bench.executor._recording.record(Claim("job_1", 1), Released(), trace={})
    assert 1 < len(tries) < 10
