"""What a process takes, and what it does with a message that leads to nothing: on real SQL."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy.orm import Session

from shared import jobs, workers
from shared.db import Database, clock
from shared.models import Job, JobState
from shared.settings import Settings
from shared.storage import Storage
from tests.conftest import wait_until
from tests.factories import a_key
from tests.worker.a_bench import Bench, away
from worker import claiming
from worker.outcomes import Succeeded


@pytest.mark.parametrize("overtakes_its_mark", [False, True])
def test_a_drained_worker_gives_its_message_back_and_takes_no_other_until_it_is_resumed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, overtakes_its_mark: bool
) -> None:
    monkeypatch.setattr(claiming, "HELD_LOOK_SECONDS", 0.01)
    job_id = bench.submit()
    bench.change(lambda session: workers.drain(session, bench.worker_id, now=clock(session)))
    bench.change(lambda session: setattr(session.get_one(Job, job_id), "published_at", clock(session)))
    if overtakes_its_mark:
        bench.change(lambda session: setattr(session.get_one(Job, job_id), "published_at", None))
    drained = threading.Thread(target=bench.executor.run, args=(job_id,))
    drained.start()
    if overtakes_its_mark:
        # The API marks as sent what it has sent, after some milliseconds.
        wait_until(
            lambda: bench.executor._claiming._owed_queues, seconds=30, what="the drained worker to hold the message"
        )
        bench.change(lambda session: setattr(session.get_one(Job, job_id), "published_at", clock(session)))
    wait_until(lambda: bench.job(job_id).published_at is None, seconds=30, what="the message to be given back")
    assert drained.is_alive(), "it holds on, so that the broker hands it no other message"
    assert bench.attempts(job_id) == []
    bench.change(lambda session: workers.resume(session, bench.worker_id))
    drained.join(30)
    assert not drained.is_alive()
    assert isinstance(bench.executor.run(job_id), Succeeded)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_worker_that_can_run_nothing_of_what_waits_holds_its_message_until_there_is_something(
    sqlite_database: Database, storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(claiming, "HELD_LOOK_SECONDS", 0.01)
    served = {"devices": ("gpu", "cpu"), "queues": ("gpu.interactive", "cpu.interactive")} if device == "gpu" else {}
    bench = Bench(sqlite_database, storage, settings, monkeypatch, **served, models=("srgan", "preview"))  # type: ignore[arg-type]
    beyond = bench.submit(model="mine", needs="mine", queue=f"{device}.interactive")
    bench.change(lambda session: setattr(session.get_one(Job, beyond), "published_at", clock(session)))
    outcomes: list[object] = []
    held = threading.Thread(target=lambda: outcomes.append(bench.executor.run(beyond)))
    held.start()
    wait_until(lambda: bench.job(beyond).published_at is None, seconds=30, what="the message to be given back")
    assert held.is_alive(), "the broker hands it no other message of that kind"
    # When a job comes that it can run, of whatever device it serves, it takes it; the message of that is for another.
    plain = bench.submit(queue="cpu.interactive")
    held.join(30)
    assert [type(outcome) for outcome in outcomes] == [Succeeded]
    assert bench.job(plain).state == JobState.SUCCEEDED
    assert bench.attempts(beyond) == []
    # When nothing waits any more it lets go.
    held = threading.Thread(target=lambda: outcomes.append(bench.executor.run(beyond, f"{device}.interactive")))
    held.start()
    bench.change(lambda session: jobs.cancel(session, beyond, now=clock(session)))
    held.join(30)
    assert outcomes[1:] == [None]
    # A worker that is drained while it holds a message holds on for that.
    beyond = bench.submit(model="mine", needs="mine")
    held = threading.Thread(target=lambda: outcomes.append(bench.executor.run(beyond, "cpu.interactive")))
    held.start()
    bench.change(lambda session: workers.drain(session, bench.worker_id, now=clock(session)))
    plain = bench.submit()
    bench.executor.ask_to_stop()
    held.join(30)
    assert outcomes[2:] == [None]
    assert bench.job(plain).state == JobState.QUEUED


def test_a_drained_worker_can_be_stopped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claiming, "HELD_LOOK_SECONDS", 0.01)
    job_id = bench.submit()
    bench.change(lambda session: workers.drain(session, bench.worker_id, now=clock(session)))
    bench.executor.ask_to_stop()
    assert bench.executor.run(job_id) is None
    assert bench.job(job_id).state == JobState.QUEUED


def test_a_duplicate_message_finds_nothing(bench: Bench) -> None:
    job_id = bench.submit()
    assert isinstance(bench.executor.run(job_id), Succeeded)
    assert bench.executor.run(job_id) is None
    assert bench.attempts(job_id) == ["succeeded"]


def test_a_message_for_a_job_that_is_gone_is_harmless(bench: Bench) -> None:
    assert bench.executor.run("job_none") is None


def test_a_message_leads_to_the_job_whose_turn_it_is(bench: Bench) -> None:
    first = [bench.submit() for _ in range(3)]
    with bench.database.transaction() as session:
        bench.key = a_key(session, clock(session))
    other = bench.submit()
    taken = []
    # Newest first: whose messages they are decides nothing.
    for job_id in [other, *first[::-1]]:
        assert isinstance(bench.executor.run(job_id, "cpu.interactive"), Succeeded)
        taken.append(next(each for each in [*first, other] if each not in taken and bench.job(each).finished_at))
    assert taken.index(other) <= 1
    assert sorted(taken) == sorted([*first, other])
    assert bench.executor.run(other, "cpu.interactive") is None


def test_interactive_jobs_come_first_and_bulk_jobs_come(bench: Bench) -> None:
    """A steady load: an interactive job waits at every claim."""
    bulk = [bench.submit(queue="cpu.bulk", priority="bulk") for _ in range(2)]
    turns = []
    for _ in range(11):
        urgent = bench.submit()
        bench.executor.run(urgent, "cpu.interactive")
        turns.append(sum(bench.job(job_id).state == JobState.SUCCEEDED for job_id in bulk))
    assert turns == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2]


def test_a_claim_that_met_another_worker_looks_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, next_due, met = bench.submit(), jobs.next_due, []

    def just_taken(session: Session, queues: Any, *, now: Any, runs: Any) -> str | None:
        met.append(queues)
        return (
            "job_that_another_took" if len(met) in (1, 3, 4, 5, 6, 7) else next_due(session, queues, now=now, runs=runs)
        )

    monkeypatch.setattr(jobs, "next_due", just_taken)
    assert isinstance(bench.executor.run(job_id), Succeeded)
    assert len(met) == 2
    assert bench.executor.run(job_id, "cpu.interactive") is None
    assert len(met) == 2 + claiming.CLAIM_TRIES


def test_a_late_message_does_not_take_a_job_that_was_moved_to_another_device(bench: Bench) -> None:
    job_id = bench.submit(queue="gpu.interactive")
    assert bench.executor.run(job_id) is None
    assert bench.executor.run(job_id, "cpu.interactive") is None
    assert bench.job(job_id).state == JobState.QUEUED


def test_a_database_that_is_away_at_the_claim_leaves_the_job_queued(bench: Bench, monkeypatch: Any) -> None:
    job_id = bench.submit()
    with away(bench.database, monkeypatch):
        assert bench.executor.run(job_id) is None
    assert bench.job(job_id).state == JobState.QUEUED
