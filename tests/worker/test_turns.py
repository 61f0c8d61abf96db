"""Attempts side by side: the next job has the network while a result is stored."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import structlog

from shared.models import JobState
from tests.conftest import wait_until
from tests.worker.a_bench import Bench
from worker import lifeline, turns
from worker.enlarging import Progress


def test_the_next_job_has_the_network_while_a_result_is_stored(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = bench.submit(), bench.submit()
    at_work = threading.Event()
    put = bench.storage.put
    seen: list[tuple[str | None, JobState]] = []
    stored: list[str] = []

    def slow_put(key: str, *args: Any, **named: Any) -> None:
        assert "/result-" not in key or key.startswith(bench.job(second).blob_prefix) or at_work.wait(30)
        put(key, *args, **named)
        stored.append(key)

    def look(_: int) -> None:
        if bench.job(second).state == JobState.RUNNING and not at_work.is_set():
            seen.append((bench.current_job_id, bench.job(first).state))
            at_work.set()

    monkeypatch.setattr(turns, "LAST_FIRST_SECONDS", 30.0)
    monkeypatch.setattr(bench.storage, "put", slow_put)
    bench.before_call = look
    bench.executor.run_network(first)
    assert (bench.job(first).state, bench.job(first).phase) == (JobState.RUNNING, "upscale")
    bench.executor.run_network(second)
    assert seen == [(second, JobState.RUNNING)]
    assert bench.job(first).state == JobState.SUCCEEDED, "one at most is finished beside another"
    bench.executor.stop()
    assert bench.job(second).state == JobState.SUCCEEDED, "a process that stops finishes what has left the network"
    assert bench.job(first).result_sha256 == bench.job(second).result_sha256
    of_second = [key.startswith(bench.job(second).blob_prefix) for key in stored]
    assert of_second == sorted(of_second), "what is done beside a network lets the last attempt be finished first"
    assert bench.current_job_id is None
    assert bench.executor._is_alive()


def test_who_is_interrupted_while_the_network_runs_gives_the_job_back_first(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, begun, wait_for_all = bench.submit(), threading.Event(), turns.wait

    def interrupted(*_: object, **__: object) -> None:
        # Once: what follows waits for the attempt to end.
        monkeypatch.setattr(turns, "wait", wait_for_all)
        assert begun.wait(30)
        raise SystemExit(1)

    def wait_for_notice(_: int) -> None:
        (lifeline,) = bench.executor._lifelines
        lifeline._last = Progress(1, 6, 0, 2, 60.0)
        begun.set()
        wait_until(bench.executor._stopping.is_set, seconds=30, what="the notice")

    monkeypatch.setattr(lifeline, "FINISH_RATHER_THAN_RELEASE_SECONDS", -1.0)
    bench.before_call = wait_for_notice
    monkeypatch.setattr(turns, "wait", interrupted)
    with pytest.raises(SystemExit):
        bench.executor.run_network(job_id)
    assert (bench.job(job_id).state, bench.job(job_id).tries_used) == (JobState.QUEUED, 0)


def test_an_attempt_that_ends_as_nobody_foresaw_is_logged_and_the_next_one_begins(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = bench.submit(), bench.submit()
    record = bench.executor._recording.record

    def broken(*args: Any) -> None:
        monkeypatch.setattr(bench.executor._recording, "record", record)
        raise ZeroDivisionError

    monkeypatch.setattr(bench.executor._recording, "record", broken)
    with structlog.testing.capture_logs() as logged:
        bench.executor.run_network(first)
        bench.executor.run_network(second)
        bench.executor.stop()
    assert "ZeroDivisionError" in next(each["error"] for each in logged if each["event"] == "job.attempt_unforeseen")
    assert bench.job(second).state == JobState.SUCCEEDED


def test_a_result_that_is_made_again_waits_for_the_network_that_another_attempt_has() -> None:
    network = threading.Semaphore(1)
    first, second = turns.Turn(network), turns.Turn(network)
    first.begins("decode")
    first.begins("upscale")
    assert not first.over.done()
    first.begins("encode")
    assert first.over.done()
    second.begins("upscale")
    again = threading.Thread(target=first.begins, args=("upscale",))
    again.start()
    again.join(0.05)
    assert again.is_alive()
    with second:
        pass
    again.join(30)
    assert not network.acquire(blocking=False)
    with first:
        pass
    assert network.acquire(blocking=False)
