"""Several jobs at once in one network, as on a GPU: real SQL, storage and torch, on a CPU that goes a GPU's way."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from PIL import Image
from torch import Tensor

from shared import jobs, workers
from shared.db import Database, clock
from shared.models import Job, JobState
from shared.settings import Settings
from shared.storage import Storage
from tests.conftest import wait_until
from tests.worker.a_bench import Bench
from tests.worker.test_batching import Gate, Noting, holding, one_thread  # noqa: F401  (a fixture for all of these)
from tests.worker.test_upscale import not_a_number, picture
from worker import enlarging, lifeline
from worker.enlarging import Engine
from worker.execute import Executor

SIZE = (24, 16)


class Beside(Bench):
    """Three jobs handed in and an executor with three slots. The first call is held until the gate is opened."""

    def __init__(
        self,
        database: Database,
        storage: Storage,
        settings: Settings,
        monkeypatch: pytest.MonkeyPatch,
        *,
        tile_px: int = 40,
    ) -> None:
        super().__init__(database, storage, settings, monkeypatch)
        self.network = Noting()
        # As if it had been measured: a probe is a call too.
        self.network._runtime, self.network._pixels_per_second = "torch", 1e9
        monkeypatch.setattr(enlarging, "load", lambda card, device: self.network)
        self.settings = self.settings.model_copy(update={"tile_px": tile_px})
        self.engine = Engine("cpu", max_input_px=10**6, max_output_px=10**8, tile_px=tile_px, batched=True)
        facts = self.executor.presence.facts
        self.plain = Executor(database, storage, self.settings, {"cpu": Engine.of(self.settings, "cpu")}, facts)
        self.executor = Executor(database, storage, self.settings, {"cpu": self.engine}, facts, slots={"cpu": 3})
        self.gate = Gate(self.network)
        assert self.engine.batcher is not None
        self.batcher = self.engine.batcher
        self.pictures = [picture(*SIZE, seed=seed) for seed in range(4)]

    def hand_in(self, number: int, **asked: Any) -> str:
        return self.submit(_png(self.pictures[number]), **asked)

    @contextmanager
    def when(self, tiles: int, do: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Opens the gate when so many tiles wait beside the first call's, and `do` is done."""

        def open_gate() -> None:
            try:
                assert self.gate.is_held.wait(30)
                holding(self.batcher, tiles)
                do()
            finally:
                self.gate.open.set()

        opener = threading.Thread(target=open_gate)
        opener.start()
        try:
            yield
        finally:
            opener.join(60)

    def one_by_one(self, *job_ids: str) -> None:
        """Each job is begun when the one before it waits, and the first has a call to itself: order decides."""
        for job_id in job_ids:
            self.executor.run_network(job_id, "cpu.interactive")
            assert self.gate.is_held.wait(30)

    def states(self, *job_ids: str) -> list[JobState]:
        return [self.job(job_id).state for job_id in job_ids]


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def beside(
    sqlite_database: Database, storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch, request: Any
) -> Beside:
    return Beside(sqlite_database, storage, settings, monkeypatch, tile_px=getattr(request, "param", 40))


SMALL_TILES = pytest.mark.parametrize("beside", [8], indirect=True)


@pytest.mark.parametrize("beside", [40, 8], indirect=True)
def test_three_jobs_at_once_come_out_as_one_by_one_and_share_calls(beside: Beside) -> None:
    together = [beside.hand_in(number) for number in range(3)]
    tiles = 1 if beside.settings.tile_px == 40 else 6
    with beside.when(3 * tiles - (1 if tiles == 1 else 2)):
        beside.one_by_one(*together)
    beside.executor.stop()
    assert beside.states(*together) == [JobState.SUCCEEDED] * 3
    assert sum(beside.network.calls) == 3 * tiles
    if tiles == 1:
        assert beside.network.calls == [1, 2], "the tiles of two jobs in one call"
    else:
        assert max(beside.network.calls) > 2, "no job has more than two tiles of one kind"
    beside.network.before_call = lambda tile, half: None
    alone = [beside.hand_in(number) for number in range(3)]
    for job_id in alone:
        beside.plain.run(job_id)
    for one, other in zip(together, alone, strict=True):
        assert _levels_apart(beside, one, other) <= 1
    assert len({beside.job(job_id).result_sha256 for job_id in together}) == 3


def _levels_apart(bench: Bench, one: str, other: str) -> int:
    made = []
    for job_id in (one, other):
        file = io.BytesIO()
        key = bench.job(job_id).result_key
        assert key is not None
        bench.storage.get(key, file)
        made.append(np.asarray(Image.open(file)).astype(int))
    return int(np.abs(made[0] - made[1]).max())


def test_a_job_more_than_there_are_slots_is_begun_when_one_has_left_the_network(beside: Beside) -> None:
    made = [beside.hand_in(number) for number in range(4)]
    begun = threading.Thread(target=beside.one_by_one, args=made)
    begun.start()
    assert beside.gate.is_held.wait(30)
    holding(beside.batcher, 2)
    begun.join(0.1)
    assert begun.is_alive()
    assert beside.states(*made) == [JobState.RUNNING] * 3 + [JobState.QUEUED]
    beside.gate.open.set()
    begun.join(30)
    beside.executor.stop()
    assert beside.states(*made) == [JobState.SUCCEEDED] * 4
    assert beside.current_job_id is None


def test_a_worker_shows_one_of_its_jobs_as_long_as_there_is_one(beside: Beside) -> None:
    first, second = beside.hand_in(0), beside.hand_in(1)
    for job_id in (first, second):
        beside.change(
            lambda session, job_id=job_id: jobs.claim(
                session, job_id, worker_id=beside.worker_id, device="cpu", lease_seconds=60, now=clock(session)
            )
        )
        beside.change(
            lambda session, job_id=job_id: workers.working_on(session, beside.worker_id, job_id, now=clock(session))
        )
    assert beside.current_job_id == second
    beside.change(lambda session: setattr(session.get_one(Job, second), "state", JobState.SUCCEEDED))
    beside.change(lambda session: workers.done_with(session, beside.worker_id, second, now=clock(session)))
    assert beside.current_job_id == first


@SMALL_TILES
def test_a_cancel_of_one_of_three_harms_no_other(beside: Beside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "PROGRESS_SECONDS", 0.0)
    made = [beside.hand_in(number) for number in range(3)]

    def cancel() -> None:
        beside.change(lambda session: jobs.cancel(session, made[1], now=clock(session)))

    with beside.when(15, cancel):
        beside.one_by_one(*made)
    beside.executor.stop()
    assert beside.states(*made) == [JobState.SUCCEEDED, JobState.CANCELED, JobState.SUCCEEDED]
    assert beside.results(made[1]) == []


def test_what_is_not_finite_in_one_of_three_is_mended_for_it_alone(beside: Beside) -> None:
    beside.network._prefers_half = True
    beside.pictures[1][0, 0] = (255, 0, 255)

    def spoil(tile: Tensor, answer: Tensor, half: bool) -> Tensor:
        answer = answer.clone()
        for index in range(tile.shape[0]):
            if half and tile[index, :, 0, 0].tolist() == [1, 0, 1]:
                answer[index : index + 1] = not_a_number(answer[index : index + 1])
        return answer

    beside.network.spoil = spoil
    made = [beside.hand_in(number) for number in range(3)]
    with beside.when(2):
        beside.one_by_one(*made)
    beside.executor.stop()
    assert beside.states(*made) == [JobState.SUCCEEDED] * 3
    reports = [beside.job(job_id).report or {} for job_id in made]
    assert [report["tiles_not_finite"] for report in reports] == [0, 1, 0]


@pytest.mark.parametrize("beside", [40], indirect=True)
def test_memory_that_does_not_suffice_for_three_suffices_for_each(beside: Beside) -> None:
    hold = beside.network.before_call

    def full(tile: Tensor, half: bool) -> None:
        hold(tile, half)
        if tile.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    beside.network.before_call = full
    made = [beside.hand_in(number) for number in range(3)]
    with beside.when(2):
        beside.one_by_one(*made)
    beside.executor.stop()
    assert beside.states(*made) == [JobState.SUCCEEDED] * 3
    assert beside.network.calls == [1, 2, 1, 1]


def test_a_device_that_breaks_ends_all_and_only_who_may_have_broken_it_loses_an_attempt(beside: Beside) -> None:
    hold = beside.network.before_call

    def broken(tile: Tensor, half: bool) -> None:
        hold(tile, half)
        raise torch.AcceleratorError("an illegal memory access was encountered")

    beside.network.before_call = broken
    made = [beside.hand_in(number) for number in range(3)]
    with structlog.testing.capture_logs(), beside.when(2):
        beside.one_by_one(*made)
        wait_until(lambda: not beside.executor._lifelines, seconds=30, what="all attempts to end")
    assert beside.executor.must_end
    assert beside.states(*made) == [JobState.QUEUED] * 3
    assert sorted(beside.job(job_id).tries_used for job_id in made) == [0, 0, 1]
    # A message that comes before the process has ended is for another one.
    late = beside.hand_in(3)
    for job_id in (*made, late):
        beside.change(
            lambda session, job_id=job_id: setattr(session.get_one(Job, job_id), "published_at", clock(session))
        )
    beside.executor.run_network(late)
    beside.executor.run_network("job_that_is_gone")
    assert beside.job(late).attempt == 0
    assert sum(beside.job(job_id).published_at is None for job_id in (*made, late)) == 1
    beside.executor.stop()


@SMALL_TILES
def test_a_process_that_stops_gives_all_of_them_back(beside: Beside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "FINISH_RATHER_THAN_RELEASE_SECONDS", -1.0)
    made = [beside.hand_in(number) for number in range(3)]
    with beside.when(15, beside.executor.ask_to_stop):
        beside.one_by_one(*made)
    beside.executor.stop()
    assert beside.states(*made) == [JobState.QUEUED] * 3
    assert [beside.job(job_id).tries_used for job_id in made] == [0] * 3
    assert beside.current_job_id is None


@SMALL_TILES
def test_a_process_that_ends_without_notice_gives_back_what_has_the_network(
    beside: Beside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifeline, "FINISH_RATHER_THAN_RELEASE_SECONDS", -1.0)
    made = [beside.hand_in(number) for number in range(2)]
    beside.one_by_one(*made)
    holding(beside.batcher, 9)

    def open_when_told() -> None:
        wait_until(beside.executor._stopping.is_set, seconds=30, what="the notice")
        beside.gate.open.set()

    opener = threading.Thread(target=open_when_told)
    opener.start()
    beside.executor.stop()
    opener.join(30)
    assert beside.states(*made) == [JobState.QUEUED] * 2


def test_the_last_of_their_limits_counts_and_the_first_of_their_leases(beside: Beside) -> None:
    limits: list[float] = []
    beside.executor.set_limit = limits.append
    made = [beside.hand_in(0, expected_seconds=1000.0), beside.hand_in(1), beside.hand_in(2)]
    alive: list[bool] = []

    def look() -> None:
        alive.append(beside.executor._is_alive())
        first, *_ = beside.executor._lifelines
        first._lease_ends = 0.0
        alive.append(beside.executor._is_alive())

    with beside.when(2, look):
        beside.one_by_one(*made)
    beside.executor.stop()
    assert alive == [True, False]
    assert [round(limit, -1) for limit in limits[:3]] == [10_000] * 3
    assert limits[-1] == 0
    # The long one may end before the others: their own limit counts then.
    assert all(round(limit, -1) in (10_000, 1800) for limit in limits[3:-1])


def test_pictures_are_the_same_bytes_however_often_they_run_beside_others(beside: Beside) -> None:
    """What goes together differs from run to run; on a CPU a small network's answer does not."""
    beside.gate.open.set()
    made = [beside.hand_in(number % 2) for number in range(6)]
    beside.one_by_one(*made)
    beside.executor.stop()
    assert beside.states(*made) == [JobState.SUCCEEDED] * 6
    assert len({beside.job(job_id).result_sha256 for job_id in made}) == 2
