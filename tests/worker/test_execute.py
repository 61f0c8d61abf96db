"""One attempt: every way it can go, on real SQL and real storage; the network card and time are fakes."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import structlog
import torch
from PIL import Image
from sqlalchemy.orm import Session

from api.schemas import ReportView
from shared import jobs, own_models, thumbnails, workers
from shared.catalog import OwnFile, card
from shared.db import Database, clock
from shared.errors import (
    BadOutput,
    BlobMissing,
    DatabaseUnavailable,
    DeadlineExceeded,
    DeviceBroken,
    DiskFull,
    InternalError,
    InvalidImage,
    ModelUnavailable,
    OutOfMemory,
    StaleAttempt,
    StorageUnavailable,
)
from shared.jobs import Claim, JobInput
from shared.models import Attempt, Delivery, Job, JobState, Worker
from shared.settings import Settings
from shared.storage import Storage
from shared.workers import WorkerFacts, enlist
from tests.conftest import little_room, wait_until
from tests.factories import LEASE_SECONDS, a_claim, a_job, a_key, a_png, options
from tests.worker import a_network
from worker import execute
from worker.ahead import Ahead
from worker.decoding import Sandboxed
from worker.enlarging import Engine, Progress
from worker.execute import (
    Canceled,
    CancelSeen,
    Executor,
    Fatal,
    Lifeline,
    Released,
    Retryable,
    StopSeen,
    Succeeded,
    Superseded,
    decide,
    scratch_folder,
    sweep_scratch,
)

# --- deciding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (StaleAttempt("late"), Superseded),
        (CancelSeen(), Canceled),
        (StopSeen(), Released),
        (SystemExit(1), Released),
        (KeyboardInterrupt(), Released),
        (InvalidImage("broken"), Fatal),
        (ModelUnavailable("none"), Fatal),
        (DeadlineExceeded("late"), Fatal),
        (BlobMissing("gone"), Fatal),
        (OutOfMemory("small"), Retryable),
        (BadOutput("NaN"), Retryable),
        (StorageUnavailable("away"), Released),
        (DatabaseUnavailable("away"), Released),
        (DeviceBroken("broken"), Retryable),
        (MemoryError(), Retryable),
        (OSError(errno.ENOSPC, "No space left on device"), Released),
        (OSError(errno.EIO, "Input/output error"), Retryable),
        (ZeroDivisionError(), Retryable),
    ],
)
def test_whatever_is_raised_comes_to_one_outcome(error: BaseException, outcome: type) -> None:
    assert type(decide(error, on_gpu=False, priority="bulk")) is outcome


def test_what_does_not_fit_a_gpu_goes_to_a_cpu_of_the_same_priority() -> None:
    error = OutOfMemory("small")
    assert decide(error, on_gpu=True, priority="bulk") == Retryable(error, queue="cpu.bulk")
    assert decide(error, on_gpu=False, priority="bulk") == Retryable(error, queue=None)


def test_the_customer_of_an_unforeseen_error_learns_its_kind_and_not_its_words() -> None:
    outcome = decide(ValueError("a secret path"), on_gpu=False, priority="bulk")
    assert isinstance(outcome, Retryable)
    assert isinstance(outcome.error, InternalError)
    assert "ValueError" in outcome.error.detail
    assert "secret" not in outcome.error.detail


def test_memory_that_runs_out_on_the_host_is_out_of_memory() -> None:
    outcome = decide(MemoryError(), on_gpu=False, priority="bulk")
    assert isinstance(outcome, Retryable)
    assert isinstance(outcome.error, OutOfMemory)


# --- a bench to make attempts on ------------------------------------------------------------------------------------


class Bench:
    """A job handed in, an executor to make attempts at it, and eyes on what became of both."""

    worker_id = "images-host-1-abc"

    def __init__(
        self,
        database: Database,
        storage: Storage,
        settings: Settings,
        monkeypatch: pytest.MonkeyPatch,
        *,
        devices: tuple[str, ...] = ("cpu",),
        queues: tuple[str, ...] = ("cpu.interactive", "cpu.bulk"),
        models: tuple[str, ...] | None = None,
    ) -> None:
        self.database, self.storage = database, storage
        self.before_call: Callable[[int], None] = lambda _: None
        self.networks = a_network.install(monkeypatch, lambda call: self.before_call(call))
        # Several bands and tiles in a small picture.
        self.settings = settings.model_copy(update={"tile_px": 8, "retry_delay_seconds": 5.0})
        engines = {device: Engine.of(self.settings, device) for device in devices}
        facts = WorkerFacts(self.worker_id, "images", "host", 1, queues, devices[0], models=models)
        self.executor = Executor(database, storage, self.settings, engines, facts)
        with database.transaction() as session:
            now = clock(session)
            enlist(session, facts, now=now)
            self.key = a_key(session, now)

    def submit(self, body: bytes | None = None, *, stored: bool = True, **asked: Any) -> str:
        data = body or a_png(24, 16)
        with self.database.transaction() as session:
            now = clock(session)
            job_id = jobs.new_job_id(now)
            prefix = jobs.blob_prefix(job_id)
            picture = JobInput(
                job_id, prefix, f"{prefix}/input", 24, 16, "png", len(data), hashlib.sha256(data).hexdigest()
            )
            jobs.submit(
                session,
                owner_key_id=self.key.id,
                options=options(**asked),
                picture=picture,
                max_attempts=3,
                max_queued_jobs=100,
                now=now,
            )
        if stored:
            self.storage.put(picture.key, io.BytesIO(data), "image/png")
        return job_id

    def job(self, job_id: str) -> Job:
        with self.database.transaction() as session:
            return session.get_one(Job, job_id)

    def attempts(self, job_id: str) -> list[str | None]:
        with self.database.transaction() as session:
            rows = session.query(Attempt).filter_by(job_id=job_id).order_by(Attempt.number)
            return [attempt.outcome for attempt in rows]

    def change(self, change: Callable[[Session], object]) -> None:
        with self.database.transaction() as session:
            change(session)

    def make_due(self, job_id: str) -> None:
        self.change(lambda session: setattr(session.get_one(Job, job_id), "run_after", None))

    @property
    def current_job_id(self) -> str | None:
        with self.database.transaction() as session:
            return session.get_one(Worker, self.worker_id).current_job_id

    def results(self, job_id: str) -> list[str]:
        return [key for key in self.storage.keys(self.job(job_id).blob_prefix) if "/result-" in key]


@pytest.fixture
def bench(
    sqlite_database: Database, storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    yield Bench(sqlite_database, storage, settings, monkeypatch)
    # This process's only: another run of the tests, or a service, may be at work on the same machine.
    left = list(Path(tempfile.gettempdir()).glob(f"enlarger-*-{os.getpid()}-*"))
    assert not left, f"an attempt left files behind: {left}"


# --- attempts that go well ------------------------------------------------------------------------------------------


def test_an_attempt_turns_a_queued_job_into_a_stored_result(
    database: Database, storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(database, storage, settings, monkeypatch)
    job_id = bench.submit()
    assert isinstance(bench.executor.run(job_id), Succeeded)

    job = bench.job(job_id)
    assert (job.state, job.attempt, job.running_device, job.phase) == (JobState.SUCCEEDED, 1, "cpu", "done")
    assert (job.result_width, job.result_height) == (96, 64)
    assert job.result_key == f"{job.blob_prefix}/result-1.png"
    file = io.BytesIO()
    storage.get(job.result_key, file)
    assert job.result_bytes == len(file.getvalue())
    assert job.result_sha256 == hashlib.sha256(file.getvalue()).hexdigest()
    assert Image.open(file).size == (96, 64)
    assert storage.facts(job.result_key).content_type == "image/png"
    assert job.timings is not None
    assert {
        "queued_seconds", "fetch_seconds", "decode_seconds", "load_seconds", "upscale_seconds", "encode_seconds",
        "store_seconds", "tiles", "bands", "waste",
    } <= set(job.timings)  # fmt: skip
    assert job.timings["tiles"] == 6
    assert job.labels is None
    assert bench.attempts(job_id) == ["succeeded"]
    assert bench.current_job_id is None


def test_an_attempt_takes_the_picture_that_was_fetched_while_the_one_before_ran(bench: Bench) -> None:
    decoder = Sandboxed(1_000_000)
    first, second = bench.submit(), bench.submit()
    ahead = Ahead(decoder, bench.storage, lambda: bench.job(second))
    engines = {"cpu": Engine.of(bench.settings, "cpu", ahead)}
    executor = Executor(
        bench.database, bench.storage, bench.settings, engines, bench.executor.presence.facts, decoder, ahead=ahead
    )
    try:
        assert isinstance(executor.run(first), Succeeded)
        assert bench.job(second).state == JobState.QUEUED
        wait_until(lambda: ahead._look is not None and ahead._look.ready, seconds=20, what="the next picture")
        bench.storage.remove(bench.job(second).input_key)
        assert isinstance(executor.run(second), Succeeded)
    finally:
        decoder.close()
    assert bench.job(second).result_sha256 == bench.job(first).result_sha256


def test_an_attempt_leaves_its_trace_and_both_thumbnails(bench: Bench) -> None:
    job_id = bench.submit()
    assert isinstance(bench.executor.run(job_id), Succeeded)
    job = bench.job(job_id)
    with bench.database.reading() as session:
        trace = session.get_one(Attempt, (job_id, 1)).trace
    assert trace is not None
    assert [phase for phase, _ in trace["phases"]] == ["fetch", "decode", "upscale", "encode", "store"]
    assert trace["bands_total"] == len(trace["band_seconds"]) == 2
    assert trace["memory"][0][1] > 1_000_000
    assert thumbnails.expected(job) == ("input", "result")
    for side in thumbnails.SIDES:
        assert bench.storage.facts(thumbnails.key(job.blob_prefix, side, 1)).content_type == "image/webp"


def test_an_attempt_that_fails_leaves_its_trace_too(bench: Bench) -> None:
    job_id = bench.submit(b"this is no picture at all, whatever it says")
    assert isinstance(bench.executor.run(job_id), Fatal)
    with bench.database.reading() as session:
        trace = session.get_one(Attempt, (job_id, 1)).trace
    assert trace is not None
    assert [phase for phase, _ in trace["phases"]] == ["fetch"]


def test_a_running_attempt_shows_its_trace_before_it_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "TRACE_SECONDS", 0.0)
    job_id = bench.submit()
    seen: list[Any] = []

    def look(_call: int) -> None:
        with bench.database.reading() as session:
            seen.append(session.get_one(Attempt, (job_id, 1)).trace)

    bench.before_call = look
    bench.executor.run(job_id)
    assert any(trace is not None and trace["bands_total"] == 2 for trace in seen)


@pytest.mark.parametrize("overtakes_its_mark", [False, True])
def test_a_drained_worker_gives_its_message_back_and_takes_no_other_until_it_is_resumed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, overtakes_its_mark: bool
) -> None:
    monkeypatch.setattr(execute, "HELD_LOOK_SECONDS", 0.01)
    job_id = bench.submit()
    bench.change(lambda session: workers.drain(session, bench.worker_id, now=clock(session)))
    bench.change(lambda session: setattr(session.get_one(Job, job_id), "published_at", clock(session)))
    if overtakes_its_mark:
        bench.change(lambda session: setattr(session.get_one(Job, job_id), "published_at", None))
    drained = threading.Thread(target=bench.executor.run, args=(job_id,))
    drained.start()
    if overtakes_its_mark:
        # The API marks as sent what it has sent, after some milliseconds.
        wait_until(lambda: bench.executor._owed_queues, seconds=30, what="the drained worker to hold the message")
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
    monkeypatch.setattr(execute, "HELD_LOOK_SECONDS", 0.01)
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


def test_a_worker_says_what_it_can_run_and_how_quickly(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.of(bench.settings, "cpu")
    monkeypatch.setattr(engine, "_networks", {"srgan": Measured("ncnn"), "srresnet": Measured(None)})
    facts = WorkerFacts("images-host-2", "images", "host-2", 1, (), "cpu", models=("mine", "srgan"))
    own = [replace(card("srgan"), name="mine", weights=OwnFile("/models/mine.pth", "ef" * 32), others=())]
    executor = Executor(bench.database, bench.storage, bench.settings, {"cpu": engine}, facts, own_cards=own)
    for _ in range(2):
        executor.presence._beat()
    with bench.database.reading() as session:
        worker = session.get_one(Worker, "images-host-2")
        assert worker.models == ["mine", "srgan"]
        assert worker.speeds == {"srgan": {"runtime": "ncnn", "pixels_per_second": 12346}}
        offered = own_models.offered(session, now=clock(session))
    assert [each.name for each in offered] == ["mine"]


class Measured:
    """A network as `Engine.speeds` sees it."""

    def __init__(self, runtime: str | None) -> None:
        self.runtime, self.is_calibrated = runtime, runtime is not None

    def pixels_per_second(self) -> float:
        return 12345.6


def test_a_drained_worker_can_be_stopped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "HELD_LOOK_SECONDS", 0.01)
    job_id = bench.submit()
    bench.change(lambda session: workers.drain(session, bench.worker_id, now=clock(session)))
    bench.executor.ask_to_stop()
    assert bench.executor.run(job_id) is None
    assert bench.job(job_id).state == JobState.QUEUED


def test_a_worker_says_what_it_takes_of_its_machine(bench: Bench) -> None:
    bench.executor.presence._beat()
    with bench.database.reading() as session:
        usage = session.get_one(Worker, bench.worker_id).usage
    assert usage is not None
    assert usage["memory_bytes"] > 1_000_000
    assert usage["cpu_share"] >= 0


def test_every_result_has_a_report_of_how_true_it_is(bench: Bench) -> None:
    job_id = bench.submit()
    bench.executor.run(job_id)
    report = bench.job(job_id).report
    assert report is not None
    assert ReportView.model_validate({"job_id": job_id, "model": "srgan", "scale": 4, **report})
    # Pixels repeated shrink to what they were.
    assert (report["psnr_db"], report["ssim"], report["colour_difference"]) == (None, 1.0, 0.0)
    assert (report["tiles"], report["seams"], report["precision"]) == (6, 3, "float32")


def test_a_result_that_is_another_picture_is_not_delivered(bench: Bench) -> None:
    job_id = bench.submit()
    network = bench.networks.setdefault("cpu", a_network.Repeating(card("srgan")))
    network.answers_with = lambda answer: 1 - answer
    for attempt in (1, 2, 3):
        outcome = bench.executor.run(job_id)
        assert isinstance(outcome, Retryable), attempt
        assert isinstance(outcome.error, BadOutput)
        bench.make_due(job_id)
    job = bench.job(job_id)
    assert (job.state, job.error_code, job.result_key) == (JobState.FAILED, "bad-output", None)
    assert job.error_detail is not None
    assert "is not the picture handed in" in job.error_detail
    assert bench.results(job_id) == []


def test_auto_is_resolved_when_the_picture_has_been_seen(bench: Bench) -> None:
    job_id = bench.submit(model="auto", routing_reason="auto")
    assert isinstance(bench.executor.run(job_id), Succeeded)
    job = bench.job(job_id)
    assert job.model == "real-esrgan"
    assert job.routing_reason.startswith("auto: a tiny picture, 24 x 16 px")


def test_a_preview_is_an_attempt_like_any_other(bench: Bench) -> None:
    asked = {"crop": {"x": 4, "y": 4, "width": 10, "height": 8}, "models": ["srgan", "lanczos"]}
    job_id = bench.submit(model="preview", preview=asked)
    assert isinstance(bench.executor.run(job_id), Succeeded)
    job = bench.job(job_id)
    assert job.preview is not None
    assert job.report is None
    assert [cell["model"] for cell in job.preview["cells"]] == ["srgan", "lanczos"]
    file = io.BytesIO()
    assert job.result_key is not None
    bench.storage.get(job.result_key, file)
    assert Image.open(file).size == (job.result_width, job.result_height)


def test_labels_come_with_the_result_when_asked_for(bench: Bench) -> None:
    job_id = bench.submit(classify=True)
    bench.executor.run(job_id)
    labels = bench.job(job_id).labels
    assert labels is not None
    assert len(labels) == 5
    assert set(labels[0]) == {"label", "index", "probability"}


def test_what_the_customer_asked_for_reaches_the_picture(bench: Bench) -> None:
    clear = io.BytesIO()
    Image.new("RGBA", (24, 16), (0, 0, 0, 0)).save(clear, "PNG")
    job_id = bench.submit(clear.getvalue(), scale=2, format="jpeg", background="#ff0000", quality=100)
    bench.executor.run(job_id)
    job = bench.job(job_id)
    assert job.result_key is not None
    assert job.result_key.endswith("/result-1.jpg")
    file = io.BytesIO()
    bench.storage.get(job.result_key, file)
    result = Image.open(file)
    assert (result.format, result.size) == ("JPEG", (48, 32))
    red, green, blue = result.getpixel((20, 20))  # type: ignore[misc]
    assert red > 250
    assert max(green, blue) < 5
    assert job.warnings == ["JPEG holds no transparency; the picture was laid on #ff0000."]


@pytest.mark.parametrize("room_bytes", [20_000, 200_000], ids=["for the input", "for the result"])
def test_a_job_that_finds_no_room_on_the_disk_waits_and_uses_up_no_attempt(
    postgresql_database: Database,
    storage: Storage,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    room_bytes: int,
) -> None:
    bench = Bench(postgresql_database, storage, settings, monkeypatch)
    noise = io.BytesIO()
    Image.effect_noise((320, 160), 100).convert("RGB").save(noise, "PNG")
    assert 20_000 < len(noise.getvalue()) < 200_000
    # Lossless and incompressible enough to be larger than its input.
    job_id = bench.submit(noise.getvalue(), format="tiff", scale=8)
    with little_room(room_bytes):
        outcome = bench.executor.run(job_id)
    assert isinstance(outcome, Released)
    assert isinstance(outcome.error, DiskFull)
    job = bench.job(job_id)
    assert (job.state, job.tries_used) == (JobState.QUEUED, 0)
    assert bench.results(job_id) == []
    # There is room again.
    bench.make_due(job_id)
    assert isinstance(bench.executor.run(job_id), Succeeded)
    assert bench.attempts(job_id) == ["released", "succeeded"]


# --- two attempts, one network --------------------------------------------------------------------------------------


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

    monkeypatch.setattr(execute, "LAST_FIRST_SECONDS", 30.0)
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
    job_id, begun, wait_for_all = bench.submit(), threading.Event(), execute.wait

    def interrupted(*_: object, **__: object) -> None:
        # Once: what follows waits for the attempt to end.
        monkeypatch.setattr(execute, "wait", wait_for_all)
        assert begun.wait(30)
        raise SystemExit(1)

    def wait_for_notice(_: int) -> None:
        (lifeline,) = bench.executor._lifelines
        lifeline._last = Progress(1, 6, 0, 2, 60.0)
        begun.set()
        wait_until(bench.executor._stopping.is_set, seconds=30, what="the notice")

    monkeypatch.setattr(execute, "FINISH_RATHER_THAN_RELEASE_SECONDS", -1.0)
    bench.before_call = wait_for_notice
    monkeypatch.setattr(execute, "wait", interrupted)
    with pytest.raises(SystemExit):
        bench.executor.run_network(job_id)
    assert (bench.job(job_id).state, bench.job(job_id).tries_used) == (JobState.QUEUED, 0)


def test_an_attempt_that_ends_as_nobody_foresaw_is_logged_and_the_next_one_begins(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = bench.submit(), bench.submit()
    record = bench.executor._record

    def broken(*args: Any) -> None:
        monkeypatch.setattr(bench.executor, "_record", record)
        raise ZeroDivisionError

    monkeypatch.setattr(bench.executor, "_record", broken)
    with structlog.testing.capture_logs() as logged:
        bench.executor.run_network(first)
        bench.executor.run_network(second)
        bench.executor.stop()
    assert "ZeroDivisionError" in next(each["error"] for each in logged if each["event"] == "job.attempt_unforeseen")
    assert bench.job(second).state == JobState.SUCCEEDED


def test_a_result_that_is_made_again_waits_for_the_network_that_another_attempt_has() -> None:
    network = threading.Semaphore(1)
    first, second = execute.Turn(network), execute.Turn(network)
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


# --- nothing to claim -----------------------------------------------------------------------------------------------


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


def test_an_attempt_has_a_limit_by_what_its_own_job_is_expected_to_take(bench: Bench) -> None:
    limits: list[float] = []
    bench.executor.set_limit = limits.append
    short, long = bench.submit(expected_seconds=1.0), bench.submit(expected_seconds=1000.0)
    bench.executor.run(long)
    bench.executor.run(short)
    assert limits == [1800, 0, 10_000, 0], "the message of the long one led to the short one"


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
    assert len(met) == 2 + execute.CLAIM_TRIES


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


# --- cancel, rescue, deadline, stop ---------------------------------------------------------------------------------


def test_a_cancel_is_seen_at_the_next_tile(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "PROGRESS_SECONDS", 0.0)
    job_id = bench.submit()

    def cancel(call: int) -> None:
        if call == 2:
            bench.change(lambda session: jobs.cancel(session, job_id, now=clock(session)))

    bench.before_call = cancel
    assert isinstance(bench.executor.run(job_id), Canceled)
    assert bench.job(job_id).state == JobState.CANCELED
    assert bench.networks["cpu"].calls == 2
    assert bench.results(job_id) == []
    assert bench.attempts(job_id) == ["canceled"]
    assert bench.current_job_id is None


def test_no_result_appears_for_a_cancel_asked_during_the_upload(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = bench.submit()
    put = bench.storage.put

    def put_and_cancel(key: str, file: BinaryIO, content_type: str, **options: Any) -> None:
        put(key, file, content_type, **options)
        bench.change(lambda session: jobs.cancel(session, job_id, now=clock(session)))

    monkeypatch.setattr(bench.storage, "put", put_and_cancel)
    bench.executor.run(job_id)
    job = bench.job(job_id)
    assert (job.state, job.result_key) == (JobState.CANCELED, None)
    assert bench.attempts(job_id) == ["canceled"]


def test_a_late_worker_stops_quietly_and_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "PROGRESS_SECONDS", 0.0)
    job_id = bench.submit()

    def rescue_and_claim(call: int) -> None:
        if call != 2:
            return

        def change(session: Session) -> None:
            now = clock(session)
            later = now + timedelta(seconds=bench.settings.lease_seconds + 1)
            assert jobs.rescue_lost(session, retry_delay_seconds=0, now=later) == [job_id]
            a_claim(session, job_id, later, worker_id="another")

        bench.change(change)

    bench.before_call = rescue_and_claim
    assert isinstance(bench.executor.run(job_id), Superseded)
    job = bench.job(job_id)
    assert (job.state, job.attempt, job.worker_id) == (JobState.RUNNING, 2, "another")
    assert bench.attempts(job_id) == ["lost", None]
    assert bench.results(job_id) == []
    assert bench.current_job_id is None


def test_a_late_worker_cannot_finish_with_its_result_in_hand(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = bench.submit()
    put = bench.storage.put

    def put_and_rescue(key: str, file: BinaryIO, content_type: str, **options: Any) -> None:
        put(key, file, content_type, **options)
        if "/result-" not in key:
            return

        def change(session: Session) -> None:
            later = clock(session) + timedelta(seconds=bench.settings.lease_seconds + 1)
            assert jobs.rescue_lost(session, retry_delay_seconds=0, now=later) == [job_id]

        bench.change(change)

    monkeypatch.setattr(bench.storage, "put", put_and_rescue)
    bench.executor.run(job_id)
    job = bench.job(job_id)
    assert (job.state, job.result_key) == (JobState.QUEUED, None)
    assert bench.current_job_id is None


def test_a_job_deleted_in_the_middle_is_let_go(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "PROGRESS_SECONDS", 0.0)
    job_id = bench.submit()

    def remove(call: int) -> None:
        if call == 2:
            bench.change(lambda session: jobs.remove(session, job_id, now=clock(session)))

    bench.before_call = remove
    assert isinstance(bench.executor.run(job_id), Superseded)


def test_a_deadline_that_passes_between_tiles_fails_the_job(bench: Bench) -> None:
    job_id = bench.submit(deadline_seconds=3600)

    def pass_deadline(_: int) -> None:
        (lifeline,) = bench.executor._lifelines
        lifeline._deadline = 0.0

    bench.before_call = pass_deadline
    assert isinstance(bench.executor.run(job_id), Fatal)
    job = bench.job(job_id)
    assert (job.state, job.error_code) == (JobState.FAILED, "deadline-exceeded")
    assert bench.networks["cpu"].calls == 1


def test_a_worker_that_stops_gives_the_job_back_and_the_attempt_does_not_count(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "FINISH_RATHER_THAN_RELEASE_SECONDS", 0.0)
    job_id = bench.submit()
    bench.before_call = lambda _: bench.executor.ask_to_stop()
    assert isinstance(bench.executor.run(job_id), Released)
    job = bench.job(job_id)
    assert (job.state, job.tries_used, job.run_after) == (JobState.QUEUED, 0, None)
    assert bench.networks["cpu"].calls == 1
    assert not bench.executor.must_end


def test_a_worker_that_stops_finishes_what_is_nearly_done(bench: Bench) -> None:
    job_id = bench.submit()
    bench.before_call = lambda _: bench.executor.ask_to_stop()
    assert isinstance(bench.executor.run(job_id), Succeeded)
    assert bench.job(job_id).state == JobState.SUCCEEDED


def test_a_process_told_to_exit_gives_the_job_back_and_exits(bench: Bench) -> None:
    job_id = bench.submit()

    def exit_now(_: int) -> None:
        raise SystemExit(1)

    bench.before_call = exit_now
    assert isinstance(bench.executor.run(job_id), Released)
    assert bench.job(job_id).state == JobState.QUEUED
    assert bench.executor.must_end


# --- attempts that go wrong -----------------------------------------------------------------------------------------


def test_a_picture_that_is_none_fails_the_job_at_once(bench: Bench) -> None:
    job_id = bench.submit(a_png()[:60])
    assert isinstance(bench.executor.run(job_id), Fatal)
    job = bench.job(job_id)
    assert (job.state, job.error_code, job.attempt) == (JobState.FAILED, "invalid-image", 1)


def test_an_unforeseen_error_is_logged_once_and_tried_three_times(bench: Bench) -> None:
    job_id = bench.submit()

    def fault(_: int) -> None:
        raise ZeroDivisionError("ours")

    bench.before_call = fault
    for attempt in (1, 2, 3):
        with structlog.testing.capture_logs() as logged:
            assert isinstance(bench.executor.run(job_id), Retryable)
        warned = [entry for entry in logged if entry["log_level"] == "warning"]
        assert [entry["event"] for entry in warned] == ["job.attempt_broken_off"]
        assert isinstance(warned[0]["exc_info"], ZeroDivisionError)
        job = bench.job(job_id)
        assert job.attempt == attempt
        if attempt < 3:
            assert job.state == JobState.QUEUED
            assert job.run_after is not None
            bench.make_due(job_id)
    assert (job.state, job.error_code) == (JobState.FAILED, "internal")


def test_a_missing_input_fails_the_job(bench: Bench) -> None:
    job_id = bench.submit(stored=False)
    bench.executor.run(job_id)
    job = bench.job(job_id)
    assert (job.state, job.error_code) == (JobState.FAILED, "blob-missing")


def test_storage_that_is_away_puts_the_job_off(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = bench.submit()

    def put(*_: Any, **__: Any) -> None:
        raise StorageUnavailable("away")

    monkeypatch.setattr(bench.storage, "put", put)
    bench.executor.run(job_id)
    job = bench.job(job_id)
    # However long it stays away, the job uses up none of its attempts.
    assert (job.state, job.attempt, job.tries_used) == (JobState.QUEUED, 1, 0)
    assert job.run_after is not None
    assert bench.attempts(job_id) == ["released"]


def test_output_that_is_bad_is_tried_again(bench: Bench) -> None:
    job_id = bench.submit()

    def bad(_: int) -> None:
        raise BadOutput("NaN")

    bench.before_call = bad
    bench.executor.run(job_id)
    assert (bench.job(job_id).state, bench.attempts(job_id)) == (JobState.QUEUED, ["retryable"])


def test_a_picture_too_large_for_the_gpu_is_made_on_the_cpu_and_says_so(
    sqlite_database: Database, storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    queues = ("gpu.interactive", "gpu.bulk", "cpu.interactive", "cpu.bulk")
    bench = Bench(sqlite_database, storage, settings, monkeypatch, devices=("gpu", "cpu"), queues=queues)
    job_id = bench.submit(queue="gpu.interactive", device="gpu")

    def out_of_memory(_: int) -> None:
        if "cpu" not in bench.networks:
            raise torch.OutOfMemoryError("CUDA out of memory")

    bench.before_call = out_of_memory
    outcome = bench.executor.run(job_id)
    assert isinstance(outcome, Retryable)
    job = bench.job(job_id)
    # At once, and the attempt does not count: the picture had come to the wrong place.
    assert (job.state, job.queue, job.tries_used) == (JobState.QUEUED, "cpu.interactive", 0)
    # Smaller tiles were tried first.
    assert bench.networks["gpu"].calls >= 1

    bench.make_due(job_id)
    assert isinstance(bench.executor.run(job_id), Succeeded)
    job = bench.job(job_id)
    assert (job.state, job.attempt, job.running_device) == (JobState.SUCCEEDED, 2, "cpu")
    assert job.warnings == ["A GPU was asked for; its memory did not suffice, so a CPU did the work."]


def test_a_broken_device_ends_the_process_after_the_attempt_is_recorded(bench: Bench) -> None:
    job_id = bench.submit()

    def broken(_: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bench.before_call = broken
    with structlog.testing.capture_logs():
        bench.executor.run(job_id)
    assert bench.executor.must_end
    assert bench.job(job_id).state == JobState.QUEUED
    with bench.database.transaction() as session:
        (attempt,) = session.query(Attempt)
        assert (attempt.outcome, attempt.error_code) == ("retryable", "internal")
    # An attempt that was being finished beside it and fails otherwise does not change that.
    assert isinstance(bench.executor.run(bench.submit(b"no picture at all")), Fatal)
    assert bench.executor.must_end


# --- a database that is away ----------------------------------------------------------------------------------------


@contextmanager
def away(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Inside, the database cannot be reached. Gives the list of tries made."""
    tries: list[int] = []

    def transaction(**_: Any) -> Any:
        tries.append(1)
        raise DatabaseUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(database, "transaction", transaction)
        yield tries


def test_a_database_away_for_a_moment_does_not_end_an_attempt(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "PROGRESS_SECONDS", 0.0)
    job_id = bench.submit()
    transaction, failed = bench.database.transaction, []

    def flaky(**named: Any) -> Any:
        if "cpu" in bench.networks and bench.networks["cpu"].calls in (2, 3):
            failed.append(1)
            raise DatabaseUnavailable("away")
        return transaction(**named)

    monkeypatch.setattr(bench.database, "transaction", flaky)
    assert isinstance(bench.executor.run(job_id), Succeeded)
    assert failed
    assert bench.job(job_id).state == JobState.SUCCEEDED


def test_what_an_attempt_came_to_is_written_when_the_database_is_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "RETRY_RECORDING_SECONDS", (0.001, 0.002))
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
    monkeypatch.setattr(execute, "RETRY_RECORDING_SECONDS", (0.02, 0.02))
    bench.executor._settings = bench.settings.model_copy(update={"lease_seconds": 0.1})
    with away(bench.database, monkeypatch) as tries:
        bench.executor._record(Claim("job_1", 1), Released(), trace={})
    assert 1 < len(tries) < 10


# --- the lifeline ---------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Line:
    """A running attempt and its lifeline, with a clock to move."""

    def __init__(self, database: Database, settings: Settings, **asked: Any) -> None:
        self.database = database
        with database.transaction() as session:
            now = clock(session)
            self.job_id = a_job(session, a_key(session, now), now, **asked).id
            self.claim = a_claim(session, self.job_id, now)
        self.clock = Clock()
        self.is_stopping = False
        self.lifeline = Lifeline(
            database,
            settings,
            self.claim,
            deadline_in_seconds=None,
            is_stopping=lambda: self.is_stopping,
            monotonic=self.clock,
        )

    @property
    def job(self) -> Job:
        with self.database.transaction() as session:
            return session.get_one(Job, self.job_id)

    def lease_left(self) -> float:
        with self.database.transaction() as session:
            lease_until = session.get_one(Job, self.job_id).lease_until
            assert lease_until is not None
            return (lease_until - clock(session)).total_seconds()


def progress(tiles_done: int, bands_done: int = 0, eta_seconds: float = 9.0) -> Progress:
    return Progress(tiles_done, 20, bands_done, 5, eta_seconds)


@pytest.fixture
def line(sqlite_database: Database, settings: Settings) -> Line:
    return Line(sqlite_database, settings)


def test_progress_is_written_at_once_then_by_time_and_at_bands(line: Line) -> None:
    def written(told: Progress, after_seconds: float) -> bool:
        line.clock.seconds += after_seconds
        before = line.job.version
        line.lifeline.progressed(told)
        return line.job.version > before

    line.lifeline.begins("upscale")
    assert written(progress(0), 0.0)
    assert (line.job.phase, line.job.bands_total, line.job.eta_seconds) == ("upscale", 5, 9.0)
    assert not written(progress(1), 0.4)
    assert written(progress(2), 0.11)
    assert written(progress(4, bands_done=1), 0.2)
    assert not written(progress(8, bands_done=2), 0.05)
    assert line.job.bands_done == 1
    # A tenth of the way and a little for what came before.
    assert line.job.fraction == pytest.approx(0.02 + 0.93 * 4 / 20)


def test_progress_renews_the_lease(line: Line) -> None:
    line.lifeline.begins("upscale")
    line.lifeline.progressed(progress(0))
    line.clock.seconds += 15
    assert line.lifeline.is_alive
    line.lifeline.progressed(progress(1))
    line.clock.seconds += LEASE_SECONDS - 1
    assert line.lifeline.is_alive
    line.clock.seconds += 2
    assert not line.lifeline.is_alive


def test_before_a_long_silence_the_lease_is_made_to_cover_it(line: Line) -> None:
    line.lifeline.begins("decode", expected_seconds=1.0)
    assert line.lease_left() <= LEASE_SECONDS
    line.lifeline.begins("encode", expected_seconds=100.0)
    assert 100 < line.lease_left() <= 105
    assert line.job.phase == "encode"
    line.clock.seconds += 99
    assert line.lifeline.is_alive


def test_a_worker_that_stops_gives_up_what_takes_long_and_nothing_else(line: Line) -> None:
    line.is_stopping = True
    line.lifeline.begins("upscale")
    line.lifeline.progressed(progress(19, eta_seconds=1.0))
    with pytest.raises(StopSeen):
        line.lifeline.progressed(progress(1, eta_seconds=60.0))


def test_progress_is_announced_at_most_each_tenth(sqlite_database: Database, settings: Settings) -> None:
    line = Line(sqlite_database, settings, webhook_url="https://example.com/", webhook_events=("job.progress",))
    line.claim = Claim(line.job_id, line.claim.attempt, announces_progress=True)
    line.lifeline._claim = line.claim
    for tile in range(21):
        line.clock.seconds += 1
        line.lifeline.progressed(progress(tile))
    with sqlite_database.transaction() as session:
        announced = [d.payload["data"]["progress"]["fraction"] for d in session.query(Delivery).order_by(Delivery.id)]
    # From 0.02 to 0.95 there are nine whole tenths.
    assert [int(fraction * 10) for fraction in announced] == list(range(1, 10))


def test_an_upload_renews_the_lease_as_bytes_go_and_not_at_each(line: Line, settings: Settings) -> None:
    version = line.job.version
    for _ in range(10):
        line.lifeline.sent(1)
    assert line.job.version == version
    line.clock.seconds += settings.lease_renew_seconds + 0.1
    line.lifeline.sent(1)
    line.lifeline.sent(1)
    assert line.job.version == version + 1
    line.clock.seconds += LEASE_SECONDS - 1
    assert line.lifeline.is_alive


def test_an_upload_of_a_late_worker_hears_it_once_and_does_not_break(
    line: Line, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with line.database.transaction() as session:
        jobs.release(session, line.claim, now=clock(session))
    line.lifeline.raise_if_stale()
    line.clock.seconds += settings.lease_renew_seconds + 0.1
    line.lifeline.sent(1)
    line.lifeline.sent(1)
    with pytest.raises(StaleAttempt):
        line.lifeline.raise_if_stale()


def test_an_upload_goes_on_through_a_cancel_and_without_a_database(
    line: Line, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with line.database.transaction() as session:
        jobs.cancel(session, line.job_id, now=clock(session))
    line.clock.seconds += settings.lease_renew_seconds + 0.1
    line.lifeline.sent(1)
    with away(line.database, monkeypatch):
        line.clock.seconds += 2 * LEASE_SECONDS
        line.lifeline.sent(1)
    line.lifeline.raise_if_stale()


def test_without_a_database_an_attempt_lasts_as_long_as_its_lease(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    with away(line.database, monkeypatch):
        line.lifeline.progressed(progress(1))
        line.clock.seconds += LEASE_SECONDS - 1
        line.lifeline.progressed(progress(2))
        line.clock.seconds += 2
        with pytest.raises(DatabaseUnavailable):
            line.lifeline.progressed(progress(3))


def test_a_process_looks_lost_when_the_lease_of_its_attempt_has_passed(bench: Bench) -> None:
    seen = []

    def look(_: int) -> None:
        (lifeline,) = bench.executor._lifelines
        seen.append(bench.executor._is_alive())
        lifeline._lease_ends = 0.0
        seen.append(bench.executor._is_alive())
        # The next progress renews it: the attempt was only slow.

    bench.before_call = look
    bench.executor.run(bench.submit())
    assert seen[:2] == [True, False]
    assert bench.executor._is_alive()


# --- the process ----------------------------------------------------------------------------------------------------


def test_a_process_that_starts_enlists_with_its_network_loaded_and_says_when_it_ends(
    sqlite_database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_network.install(monkeypatch)
    threads = torch.get_num_threads()
    started = Executor.start(
        settings.model_copy(update={"worker_device": "cpu", "torch_threads": 1}), queues=["cpu.interactive"]
    )
    torch.set_num_threads(threads)
    with sqlite_database.transaction() as session:
        (worker,) = session.query(Worker)
        assert (worker.kind, worker.device, worker.queues, worker.models_loaded, worker.pid) == (
            "images", "cpu", ["cpu.interactive"], ["srgan"], os.getpid(),
        )  # fmt: skip
        assert worker.stopped_at is None
    started.stop()
    with sqlite_database.transaction() as session:
        assert session.query(Worker).one().stopped_at is not None


def test_files_of_a_killed_process_are_removed_and_those_of_a_live_one_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = execute._scratch_prefix() + "999999999-x"
    for name in (dead, execute._scratch_prefix() + f"{os.getppid()}-x", "enlarger-elsewhere-1-x", "other"):
        (tmp_path / name).mkdir()
    with scratch_folder() as mine:
        assert sweep_scratch() == 1
        assert mine.is_dir()
        assert not (tmp_path / dead).exists()
        assert len(list(tmp_path.iterdir())) == 4
    assert not mine.exists()


def test_an_init_process_counts_as_running() -> None:
    # Another user's process may not be signalled, and is there all the same.
    assert execute._is_running(1)


def test_a_device_is_called_what_the_kernel_calls_it() -> None:
    assert execute._device_name("gpu") is None or isinstance(execute._device_name("gpu"), str)
    if Path("/proc/cpuinfo").exists() and "model name" in Path("/proc/cpuinfo").read_text():
        assert execute._device_name("cpu")
