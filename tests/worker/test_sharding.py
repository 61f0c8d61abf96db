"""One picture by many workers: the result is that of one, and whoever is lost costs a shard.

On real SQL and storage; where it is a matter of who does what, the network is the fake, and a helper works while the
attempt that holds the job is in the middle of a call.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import redis
import torch
from PIL import Image

from api.schemas import ReportView
from shared import jobs, shards, thumbnails, workers
from shared.catalog import card
from shared.db import Database, clock
from shared.errors import BadOutput, DatabaseUnavailable, OutOfMemory, StorageUnavailable, WorkerLost
from shared.models import BlobRemoval, Job, JobState, Shard
from shared.outbox import HELP_JOB, Broker
from shared.previews import strips_of, strips_prefix
from shared.settings import Settings
from shared.storage import Storage
from shared.workers import WorkerFacts, enlist
from tests.conftest import closed_port, wait_until
from tests.factories import a_png
from tests.worker import a_network
from tests.worker.a_bench import Bench
from worker import chores, claiming, lifeline, previews, sharding
from worker.codec import Samples, parts
from worker.enlarging import Engine, Making, Unwatched, Wanted
from worker.execute import Executor
from worker.fidelity import Sums
from worker.outcomes import Canceled, Fatal, Helped, Released, Retryable, Succeeded, Superseded
from worker.tiling import plan
from worker.upscale import Work

WIDTH, HEIGHT = 24, 64
"""Eight bands of three tiles, as the bench cuts them."""


# --- the same pixels ------------------------------------------------------------------------------------------------


def picture_file(kind: str) -> bytes:
    """A picture of 40 x 56 px of that kind: noise over a slope."""
    noise = np.random.default_rng(5).integers(0, 60, (56, 40, 4))
    samples = (np.add.outer(np.arange(56) * 2, np.arange(40))[..., None] + noise).astype(np.uint8)
    samples[..., 3] = np.where(np.arange(40) < 20, samples[..., 3], 255)
    file = io.BytesIO()
    match kind:
        case "gray":
            Image.fromarray(samples[..., 0]).save(file, "PNG")
        case "gray-16":
            Image.fromarray(samples[..., 0].astype(np.uint16) * 201).save(file, "PNG")
        case "colour-16":
            image = pyvips.Image.new_from_memory(
                (samples[..., :3].astype(np.uint16) * 201).tobytes(), 40, 56, 3, "ushort"
            )
            file.write(image.copy(interpretation="rgb16").pngsave_buffer())
        case "alpha":
            Image.fromarray(samples).save(file, "PNG", dpi=(300, 300))
        case "even-alpha":
            samples[..., 3] = 77
            Image.fromarray(samples).save(file, "PNG")
        case _:
            exif = Image.Exif()
            exif[0x013B] = "Somebody"
            Image.fromarray(samples[..., :3]).save(file, "PNG", exif=exif, dpi=(150, 150))
    return file.getvalue()


def made_in_parts(making: Making, folder: Path, pieces: int) -> bytes:
    runs = sharding.cut(making.work, making.width * making.height // pieces)
    assert len(runs) > 2
    rows = [sum(band.region.height for band in run) * making.wanted.scale for run in runs]
    strip = parts.rows_in_strip(rows[:-1], making.width * 4)
    body, facts = b"", []
    # As a helper has them: out of a row, and in any order.
    for run in runs:
        bands = sharding.unpacked(sharding.packed(run))
        assert [band.tiles for band in bands] == [band.tiles for band in run]
        made = making.write_part(
            folder / "part", bands, in_strips=making.work.plans[0].in_strips, rows_in_strip=strip, precise=True
        )
        body += (folder / "part").read_bytes()
        facts.append(made.facts)
    head, tail = parts.joined(making.layout(strip), facts, making.metadata)
    return head + body + tail


def read(file: bytes) -> tuple[Samples, dict[str, Any]]:
    image = pyvips.Image.new_from_buffer(file, "", fail_on="warning")
    samples = np.ndarray(
        buffer=image.write_to_memory(),
        dtype=np.uint8 if image.format == "uchar" else np.uint16,
        shape=(image.height, image.width, image.bands),
    )
    return samples, {name: image.get(name) for name in image.get_fields()}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """With one thread: tiles are small, and threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Engine("cpu", max_input_px=10**6, max_output_px=10**8, tile_px=16)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("colour", {"metadata_policy": "keep"}),
        ("colour", {"model": "srcnn", "scale": 2}),
        ("colour", {"format": "tiff"}),
        ("colour-16", {}),
        ("colour-16", {"format": "tiff"}),
        ("gray", {}),
        ("gray", {"format": "tiff"}),
        ("gray-16", {}),
        ("alpha", {}),
        ("alpha", {"alpha": "lanczos", "format": "tiff"}),
        ("alpha", {"alpha": "flatten"}),
        ("even-alpha", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "png",
)
def test_a_picture_made_in_parts_is_the_one_made_at_once(
    kind: str, asked: dict[str, Any], engine: Engine, tmp_path: Path
) -> None:
    wanted = Wanted(**{"model": "fsrcnn", **asked})
    file = io.BytesIO(picture_file(kind))
    engine.enlarge_file(file, tmp_path / "whole", wanted)
    whole, whole_says = read((tmp_path / "whole").read_bytes())
    joined, joined_says = read(made_in_parts(engine.opened(file, wanted, Unwatched()), tmp_path, 4))
    difference = np.abs(joined.astype(int) - whole)
    assert difference.max() == 0, f"greatest {difference.max()}, mean {difference.mean()}"
    assert joined_says == whole_says


def test_the_bands_are_cut_into_shards_of_about_one_size() -> None:
    whole = plan(100, 1000, halo_px=2, tile_px=50, band_height_px=30)
    work = Work(100, 1000, 2, (whole,), 1, 1)
    runs = sharding.cut(work, 100_000)
    assert [band for run in runs for band in run] == list(whole.bands)
    assert len(runs) == 4
    assert all(abs(sum(band.region.height for band in run) - 250) <= 30 for run in runs)
    assert len(sharding.cut(work, 10**9)) == 1
    assert len(sharding.cut(work, 1)) == len(whole.bands), "a band is never cut"
    assert len(sharding.cut(work, 1, least_rows=300)) == 2
    twice = Work(100, 1000, 4, (whole, whole), 1, 1)
    assert len(sharding.cut(twice, 100_000)) == 1


def test_a_report_of_parts_is_that_of_the_whole_but_where_they_meet() -> None:
    one = Sums(10.0, 100, 8.0, 2.0, 10, 3.0, 3.0, 2, 1)
    both = one + one
    assert both == Sums(20.0, 200, 16.0, 4.0, 20, 6.0, 6.0, 2, 2)
    assert both.fidelity().seams == 4
    assert both.fidelity().psnr_db == one.fidelity().psnr_db


# --- a bench with a second worker -----------------------------------------------------------------------------------


class SharedBench(Bench):
    """A job that is large by its settings, an executor that holds it, and another that helps."""

    helper_id = "images-host-2-def"

    def __init__(
        self, database: Database, storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Four shards of two bands.
        shared = settings.model_copy(update={"split_above_px": 100, "shard_output_px": 24 * 16 * 16})
        super().__init__(database, storage, shared, monkeypatch)
        facts = WorkerFacts(self.helper_id, "images", "host", 2, ("cpu.interactive", "cpu.bulk"), "cpu")
        engines = {"cpu": Engine.of(self.settings, "cpu")}
        self.helper = Executor(database, storage, self.settings, engines, facts)
        self.change(lambda session: enlist(session, facts, now=clock(session)))
        self.picture = a_png(WIDTH, HEIGHT)

    def hand_in(self, **asked: Any) -> str:
        return self.submit(self.picture, **asked)

    def at_call(self, number: int, act: Callable[[], object]) -> None:
        """Once, as the network is called for the n-th time; calls made by `act` count too."""
        waiting = [act]

        def before(call: int) -> None:
            if call >= number and waiting:
                waiting.pop()()

        self.before_call = before

    def result(self, job_id: str) -> bytes:
        job, file = self.job(job_id), io.BytesIO()
        assert job.result_key is not None
        self.storage.get(job.result_key, file)
        assert job.result_bytes == len(file.getvalue())
        assert job.result_sha256 == hashlib.sha256(file.getvalue()).hexdigest()
        return file.getvalue()

    def shards(self, job_id: str) -> list[Shard]:
        with self.database.reading() as session:
            return list(shards.of_job(session, job_id))

    def parts(self, job_id: str) -> list[str]:
        return self.storage.keys(jobs.parts_prefix(self.job(job_id).blob_prefix))

    def sweep(self) -> None:
        chores.sweep(self.database, self.storage, self.settings)

    def lose(self, job_id: str) -> None:
        """Whoever holds the job or a shard of it has not been heard of for longer than a lease."""

        def lapse(session: Any) -> None:
            past = session.get_one(Job, job_id).created_at
            for shard in shards.of_job(session, job_id):
                if shard.lease_until is not None:
                    shard.lease_until = past
            job = session.get_one(Job, job_id)
            if job.lease_until is not None:
                job.lease_until = past

        self.change(lapse)
        with self.database.transaction() as session:
            jobs.rescue_lost(session, retry_delay_seconds=0, now=clock(session))

    def assert_right(self, job_id: str) -> None:
        with Image.open(io.BytesIO(self.picture)) as image:
            wanted = np.asarray(image).repeat(4, axis=0).repeat(4, axis=1)
        samples, _ = read(self.result(job_id))
        assert np.array_equal(samples, wanted)


@pytest.fixture
def bench(
    sqlite_database: Database, storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> SharedBench:
    return SharedBench(sqlite_database, storage, settings, monkeypatch)


def test_a_large_job_is_shared_and_looks_like_any_other(
    database: Database, storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(previews, "BETWEEN_STRIPS_SECONDS", 0.0)
    bench = SharedBench(database, storage, settings, monkeypatch)
    job_id = bench.hand_in(classify=True)
    helped: list[object] = []
    seen: list[Job] = []

    def help() -> None:
        seen.append(bench.job(job_id))
        helped.append(bench.helper.help(job_id))
        # From the middle down, so that each of the two goes on below its own; the picture is decoded once.
        assert bench.parts(job_id) == [
            f"{jobs.parts_prefix(bench.job(job_id).blob_prefix)}{position:04}-1.part{more}"
            for position in (1, 2, 3)
            for more in ("", ".npy")
        ]

    bench.at_call(2, help)
    assert isinstance(bench.executor.run(job_id), Succeeded)
    assert helped == [Helped()]
    bench.assert_right(job_id)

    # To the customer it is a running job, of all its bands.
    assert (seen[0].state, seen[0].phase, seen[0].bands_total) == (JobState.RUNNING, "upscale", 8)
    job = bench.job(job_id)
    assert (job.state, job.bands_done, job.bands_total, job.split) == (JobState.SUCCEEDED, 8, 8, None)
    assert job.timings is not None
    assert job.timings["shards"] == 4
    assert {"queued_seconds", "fetch_seconds", "upscale_seconds", "store_seconds", "tiles", "bands"} <= set(job.timings)
    assert job.report is not None
    ReportView.model_validate({"job_id": job_id, "model": "srgan", "scale": 4, **job.report})
    assert (job.report["psnr_db"], job.report["ssim"], job.report["tiles"]) == (None, 1.0, 24)
    assert job.labels is not None
    for side in ("input", "result"):
        found = thumbnails.stream(storage, job, side)
        assert found is not None
        with Image.open(io.BytesIO(b"".join(found[1]))) as image:
            assert image.size == ((WIDTH, HEIGHT) if side == "input" else (WIDTH * 4, HEIGHT * 4))
    strips = strips_of(storage.keys(strips_prefix(job.blob_prefix, 1)))
    assert sum(strip.height * strip.factor for strip in strips) <= HEIGHT * 4
    assert all(a.y_px + a.height * a.factor <= b.y_px for a, b in itertools.pairwise(strips))

    # Its parts go when the sweeper comes by.
    assert bench.shards(job_id) == []
    bench.sweep()
    assert bench.parts(job_id) == []
    assert bench.helper.help(job_id) is None


@pytest.mark.parametrize("asked", [{"format": "jpeg"}, {"scale": 2}, {"scale": 8}], ids=str)
def test_what_cannot_be_joined_is_made_by_one_worker(bench: SharedBench, asked: dict[str, Any]) -> None:
    job_id = bench.hand_in(**asked)
    bench.at_call(1, lambda: bench.helper.help(job_id))
    assert isinstance(bench.executor.run(job_id), Succeeded)
    assert "shards" not in (bench.job(job_id).timings or {})


def test_a_job_of_one_shard_is_not_shared(bench: SharedBench) -> None:
    bench.executor._settings = bench.settings.model_copy(update={"shard_output_px": 10**9})
    job_id = bench.hand_in(model="auto")
    assert isinstance(bench.executor.run(job_id), Succeeded)
    bench.assert_right(job_id)
    assert "shards" not in (bench.job(job_id).timings or {})


def test_a_job_whose_model_is_unknown_fails_as_any_other(bench: SharedBench) -> None:
    job_id = bench.hand_in(model="gone")
    assert isinstance(bench.executor.run(job_id), Fatal)
    assert bench.job(job_id).error_code == "model-unavailable"


def test_a_helper_that_is_lost_costs_its_shard(bench: SharedBench) -> None:
    job_id = bench.hand_in()

    def vanish() -> None:
        with bench.database.transaction() as session:
            taken = shards.claim_to_help(
                session, job_id, worker_id="lost", max_tries=3, lease_seconds=0.2, now=clock(session)
            )
        assert taken is not None
        assert taken.position == 2

    bench.at_call(1, vanish)
    assert isinstance(bench.executor.run(job_id), Succeeded)
    bench.assert_right(job_id)
    assert bench.networks["cpu"].calls == 24, "nothing was computed twice"
    assert bench.attempts(job_id) == ["succeeded"]


def test_the_loss_of_the_worker_that_holds_the_job_costs_its_shard(bench: SharedBench) -> None:
    job_id = bench.hand_in()

    def die() -> None:
        # As after SIGKILL: nothing is written any more.
        bench.executor._recording._database = _Gone()  # type: ignore[assignment]
        raise SystemExit(1)

    def help_once() -> None:
        bench.helper.ask_to_stop()
        assert bench.helper.help(job_id) == Helped()
        bench.helper._stopping.clear()

    # In the middle of its second shard; the helper has made one, the third from the top.
    bench.at_call(4, help_once)
    helped = bench.before_call

    def before(call: int) -> None:
        helped(call)
        if call == 14:
            # It is on its way while the next is made.
            wait_until(lambda: bench.shards(job_id)[0].finished_at, seconds=10, what="the first shard to be recorded")
            die()

    bench.before_call = before
    bench.executor._recording._settings = bench.settings.model_copy(update={"lease_seconds": 0.5})
    bench.executor.run(job_id)
    assert [shard.finished_at is not None for shard in bench.shards(job_id)] == [True, False, True, False]

    bench.lose(job_id)
    assert bench.job(job_id).state == JobState.QUEUED
    assert isinstance(bench.helper.run(job_id), Succeeded)
    bench.assert_right(job_id)
    assert bench.networks["cpu"].calls == 14 + 12, "what was made was not made again"
    assert bench.attempts(job_id) == ["lost", "succeeded"]


class _Gone:
    """A database that this process does not reach any more."""

    def transaction(self, **_: Any) -> Any:
        raise DatabaseUnavailable("gone")

    reading = transaction


def test_a_worker_that_stops_gives_back_the_job_and_its_shard(bench: SharedBench) -> None:
    job_id = bench.hand_in()

    def stop() -> None:
        (lifeline,) = bench.executor._lifelines
        lifeline._first = (-1000.0, 0)  # type: ignore[attr-defined]
        bench.executor.ask_to_stop()

    bench.at_call(8, stop)
    assert isinstance(bench.executor.run(job_id), Released)
    job = bench.job(job_id)
    assert (job.state, job.tries_used) == (JobState.QUEUED, 0)
    assert [shard.lease_until for shard in bench.shards(job_id)] == [None] * 4
    assert [shard.tries_used for shard in bench.shards(job_id)] == [1, 0, 0, 0]
    assert isinstance(bench.helper.run(job_id), Succeeded)
    bench.assert_right(job_id)


def test_a_cancel_in_the_middle_leaves_no_part_behind(bench: SharedBench) -> None:
    job_id = bench.hand_in()
    outcomes: list[object] = []

    def help_and_cancel() -> None:
        # After its first shard it is asked to stop, and goes no further.
        bench.helper.ask_to_stop()
        bench.helper.help(job_id)
        assert len(bench.parts(job_id)) == 2 * 2
        bench.helper._stopping.clear()

        def cancel_within() -> None:
            with bench.database.transaction() as session:
                jobs.cancel(session, job_id, now=clock(session))

        bench.at_call(14, cancel_within)
        outcomes.append(bench.helper.help(job_id))

    bench.at_call(8, help_and_cancel)
    assert isinstance(bench.executor.run(job_id), Canceled)
    assert outcomes == [Superseded()]
    assert bench.job(job_id).state == JobState.CANCELED
    bench.sweep()
    assert bench.parts(job_id) == []
    assert bench.results(job_id) == []


def test_a_deletion_in_the_middle_removes_everything(bench: SharedBench) -> None:
    job_id = bench.hand_in()
    prefix = bench.job(job_id).blob_prefix

    def delete() -> None:
        with bench.database.transaction() as session:
            jobs.remove(session, job_id, now=clock(session))
        bench.sweep()

    bench.at_call(8, delete)
    assert isinstance(bench.executor.run(job_id), Superseded)
    # Late writers are swept after the hour they may take.
    with bench.database.transaction() as session:
        session.query(BlobRemoval).update({"due_at": clock(session)})
    bench.sweep()
    assert bench.storage.keys(prefix) == []


@pytest.mark.parametrize("position", [0, 2], ids=["of the attempt that holds the job", "of a helper"])
def test_a_part_that_comes_late_to_storage_does_not_stay(
    bench: SharedBench, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    job_id = bench.hand_in()
    real_put = bench.storage.put
    taken: list[shards.ShardClaim | None] = []

    def put(key: str, *others: Any, **named: Any) -> None:
        if key.endswith(f"{position:04}-1.part"):
            # While it is on its way its lease passes, and another worker takes the shard and is lost.
            with bench.database.transaction() as session:
                session.get_one(Shard, (job_id, position)).lease_until = session.get_one(Job, job_id).created_at
                session.flush()
                taken.append(
                    shards.claim_to_help(
                        session,
                        job_id,
                        worker_id="w3",
                        max_tries=3,
                        lease_seconds=0.0,
                        now=clock(session),
                        below=position - 1,
                    )
                )
        real_put(key, *others, **named)

    monkeypatch.setattr(bench.storage, "put", put)
    bench.at_call(2, lambda: bench.helper.help(job_id))
    assert isinstance(bench.executor.run(job_id), Succeeded)
    assert [None if each is None else (each.position, each.number) for each in taken] == [(position, 2)]
    names = [key.rsplit("/", 1)[1] for key in bench.parts(job_id)]
    assert f"{position:04}-3.part" in names
    assert f"{position:04}-1.part" not in names
    assert len(names) == 8
    bench.assert_right(job_id)


def test_what_a_helper_fails_at_is_the_jobs_own_error(bench: SharedBench) -> None:
    job_id = bench.hand_in()
    network = bench.networks.setdefault(
        "cpu", a_network.Repeating(card("srgan"), "cpu", lambda n: bench.before_call(n))
    )
    outcomes: list[object] = []

    def fail() -> None:
        # From now on nothing fits.
        def no_memory(_: int) -> None:
            raise RuntimeError("out of memory")

        bench.before_call = no_memory
        outcomes.append(bench.helper.help(job_id))

    bench.at_call(2, fail)
    outcome = bench.executor.run(job_id)
    assert [type(each) for each in [*outcomes, outcome]] == [Retryable, Retryable]
    assert isinstance(outcome, Retryable)
    assert isinstance(outcome.error, OutOfMemory)
    assert bench.shards(job_id)[2].error_code == "out-of-memory"
    assert network.calls > 2

    # It passes: the next attempt does what the helper could not.
    bench.before_call = lambda _: None
    bench.make_due(job_id)
    assert isinstance(bench.executor.run(job_id), Succeeded)
    bench.assert_right(job_id)


def test_a_shard_that_kills_its_workers_fails_the_job(bench: SharedBench) -> None:
    job_id = bench.hand_in()

    def spoil() -> None:
        def use_up(session: Any) -> None:
            shard = session.get_one(Shard, (job_id, 2))
            shard.tries_used = 3

        bench.change(use_up)

    bench.at_call(1, spoil)
    for _ in range(3):
        outcome = bench.executor.run(job_id)
        assert isinstance(outcome, Retryable)
        assert isinstance(outcome.error, WorkerLost)
        bench.make_due(job_id)
    assert (bench.job(job_id).state, bench.job(job_id).error_code) == (JobState.FAILED, "worker-lost")
    bench.sweep()
    assert bench.parts(job_id) == []


@pytest.mark.parametrize("mends", [True, False])
def test_a_result_that_is_another_picture_is_made_again_in_full_precision(
    bench: SharedBench, monkeypatch: pytest.MonkeyPatch, mends: bool
) -> None:
    job_id = bench.hand_in()
    network = bench.networks.setdefault("cpu", a_network.Repeating(card("srgan"), "cpu"))
    monkeypatch.setattr(a_network.Repeating, "prefers_half", True)
    calls = 24 if mends else 10**6
    network.answers_with = lambda answer: answer if network.calls > calls else 1 - answer
    outcome = bench.executor.run(job_id)
    assert network.calls == 48
    if mends:
        assert isinstance(outcome, Succeeded)
        bench.assert_right(job_id)
        assert (bench.job(job_id).report or {})["precision"] == "float32"
    else:
        assert isinstance(outcome, Retryable)
        assert isinstance(outcome.error, BadOutput)


def test_a_job_that_waits_comes_before_the_shards_of_another(bench: SharedBench) -> None:
    large, small = bench.hand_in(), ""
    outcomes: list[object] = []
    given_back: list[int] = []

    def help() -> None:
        nonlocal small
        with bench.database.transaction() as session:
            due = shards.due(session, max_tries=3, resend_after_seconds=60, now=clock(session))
        assert len(due) == 3
        small = bench.submit()
        outcomes.append(bench.helper.help(large, "cpu.interactive"))
        given_back.extend(row.position for row in bench.shards(large) if row.published_at is None)
        outcomes.append(bench.helper.help(large, "cpu.interactive"))

    bench.at_call(1, help)
    assert isinstance(bench.executor.run(large), Succeeded)
    assert [type(outcome) for outcome in outcomes] == [Succeeded, Helped]
    assert bench.job(small).state == JobState.SUCCEEDED
    # The first is the executor's own, and was never asked for.
    assert given_back == [0, 1]
    bench.assert_right(large)


def test_a_helper_goes_on_with_the_shard_below_until_a_job_waits(bench: SharedBench) -> None:
    large = bench.hand_in()
    made: list[int] = []

    def help() -> None:
        bench.at_call(9, bench.submit)
        assert bench.helper.help(large) == Helped()
        made.extend(row.position for row in bench.shards(large) if row.finished_at is not None)

    bench.at_call(1, help)
    assert isinstance(bench.executor.run(large), Succeeded)
    assert made == [2, 3]
    bench.assert_right(large)


def test_a_helper_stops_where_the_shards_are_to_be_made_on_other_terms(bench: SharedBench) -> None:
    job_id = bench.hand_in()

    def help() -> None:
        def begin_again() -> None:
            with bench.database.transaction() as session:
                session.get_one(Job, job_id).split = {**(session.get_one(Job, job_id).split or {}), "precise": False}

        bench.at_call(5, begin_again)
        assert bench.helper.help(job_id) == Helped()
        assert [row.tries_used for row in bench.shards(job_id)] == [1, 0, 1, 0]

    bench.at_call(1, help)
    assert isinstance(bench.executor.run(job_id), Succeeded)
    bench.assert_right(job_id)


def test_a_drained_worker_does_not_help(bench: SharedBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claiming, "HELD_LOOK_SECONDS", 0.01)
    job_id = bench.hand_in()
    bench.change(lambda session: workers.drain(session, bench.helper_id, now=clock(session)))
    bench.helper.ask_to_stop()
    outcomes: list[object] = []
    bench.at_call(1, lambda: outcomes.append(bench.helper.help(job_id)))
    assert isinstance(bench.executor.run(job_id), Succeeded)
    assert outcomes == [None]


def test_a_worker_that_lacks_the_model_does_not_help(bench: SharedBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claiming, "HELD_LOOK_SECONDS", 0.01)
    job_id = bench.hand_in()
    claims = bench.helper._claiming
    claims._facts = replace(claims._facts, models=("lanczos",))
    given_back: list[int] = []

    def help() -> None:
        with bench.database.transaction() as session:
            shards.due(session, max_tries=3, resend_after_seconds=60, now=clock(session))
        assert bench.helper.help(job_id) is None
        given_back.extend(row.position for row in bench.shards(job_id) if row.published_at is None)

    bench.at_call(1, help)
    assert isinstance(bench.executor.run(job_id), Succeeded)
    assert given_back == [0, 1]


def test_nobody_helps_a_job_of_another_device_or_without_a_database(bench: SharedBench) -> None:
    job_id = bench.hand_in(queue="gpu.bulk")
    assert bench.helper.help(job_id) is None
    assert bench.helper.help("job_none") is None
    bench.helper._claiming._database = _Gone()  # type: ignore[assignment]
    assert bench.helper.help(job_id) is None


def test_a_database_that_is_away_for_a_moment_ends_no_shared_attempt(
    bench: SharedBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = bench.hand_in()
    real, failing = bench.executor._database.transaction, [True, True]

    def sometimes(**named: Any) -> Any:
        if bench.executor._lifelines and bench.networks["cpu"].calls == 6:
            with contextlib.suppress(IndexError):
                failing.pop()
                raise DatabaseUnavailable("away for a moment")
        return real(**named)

    bench.networks.setdefault("cpu", a_network.Repeating(card("srgan"), "cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.executor._database, "transaction", sometimes)
        assert isinstance(bench.executor.run(job_id), Succeeded)
    assert failing == []
    bench.assert_right(job_id)


def test_storage_that_is_away_gives_the_shard_back_uncounted(
    bench: SharedBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = bench.hand_in()
    outcomes: list[object] = []

    def away(*_: Any, **__: Any) -> None:
        raise StorageUnavailable("away")

    def help() -> None:
        # As it fetches the picture; then as it stores a part, while it makes the next.
        for name in ("get", "put"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(bench.helper._storage, name, away)
                outcomes.append(bench.helper.help(job_id))
            assert [row.tries_used for row in bench.shards(job_id)] == [1, 0, 0, 0]
            assert [row.lease_until is None for row in bench.shards(job_id)] == [False, True, True, True]

    bench.helper._storage = Storage(bench.settings)
    bench.at_call(1, help)
    assert isinstance(bench.executor.run(job_id), Succeeded)
    assert [type(each) for each in outcomes] == [Released, Released]
    bench.assert_right(job_id)

    # The same of the attempt that holds the job.
    job_id = bench.hand_in()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.executor._storage, "put", away)
        assert isinstance(bench.executor.run(job_id), Released)
    assert [row.tries_used for row in bench.shards(job_id)] == [0] * 4
    bench.make_due(job_id)
    assert isinstance(bench.executor.run(job_id), Succeeded)
    bench.assert_right(job_id)


def test_a_part_is_stored_and_joined_while_the_next_is_made(
    bench: SharedBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = bench.hand_in()
    monkeypatch.setattr(lifeline, "BAND_SECONDS", 0.0)
    real_put, real_stream = bench.storage.put, bench.storage.stream
    may_go, joined = threading.Event(), threading.Event()

    def put(key: str, *others: Any, **named: Any) -> None:
        if key.endswith("0000-1.part"):
            assert may_go.wait(10)
        real_put(key, *others, **named)

    def stream(key: str) -> Any:
        joined.set()
        return real_stream(key)

    monkeypatch.setattr(bench.storage, "put", put)
    monkeypatch.setattr(bench.storage, "stream", stream)

    def look() -> None:
        # In the middle of the second shard: both are leased, and the first counts as made where tiles are counted.
        first, second, *_ = bench.shards(job_id)
        assert (first.finished_at, second.finished_at) == (None, None)
        assert first.lease_until is not None
        assert second.lease_until is not None
        assert first.tiles_done == first.tiles_total
        may_go.set()
        assert joined.wait(10)

    bench.at_call(11, look)
    assert isinstance(bench.executor.run(job_id), Succeeded)
    assert joined.is_set()
    bench.assert_right(job_id)


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_storage_that_is_away_while_parts_are_joined_costs_no_attempt(bench: SharedBench, format: str) -> None:
    job_id = bench.hand_in(format=format)
    real, failing = bench.storage.begin, [True]

    def begin(*given: Any) -> Any:
        if format == "png" and failing:
            failing.pop()
            raise StorageUnavailable("away for a moment")
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.storage, "begin", begin)
        assert isinstance(bench.executor.run(job_id), Succeeded)
    assert failing == ([] if format == "png" else [True])
    bench.assert_right(job_id)


def test_helpers_are_called_as_soon_as_a_job_is_shared(
    bench: SharedBench, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker(bench.settings.model_copy(update={"redis_url": redis_url}))
    nobody = Broker(bench.settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{closed_port()}/0"}))

    def are_sent(job_id: str) -> bool:
        return all(row.published_at is not None for row in bench.shards(job_id)[1:])

    for each in (broker, nobody):
        job_id = bench.hand_in()
        monkeypatch.setattr(bench.executor, "_broker", each)
        if each is broker:
            bench.at_call(
                1, lambda job_id=job_id: wait_until(lambda: are_sent(job_id), seconds=10, what="messages to be sent")
            )
        assert isinstance(bench.executor.run(job_id), Succeeded)
        bench.assert_right(job_id)
    with redis.Redis.from_url(redis_url) as client:
        sent = [json.loads(message)["headers"]["task"] for message in client.lrange("cpu.interactive", 0, -1)]
    assert len(sent) >= 3
    assert set(sent) == {HELP_JOB}
    broker.close()
    nobody.close()
