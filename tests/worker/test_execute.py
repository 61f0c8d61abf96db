"""One attempt: every way it can go, on real SQL and real storage; the network card and time are fakes."""

from __future__ import annotations

import hashlib
import io
import os
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
from shared import jobs, own_models, thumbnails
from shared.catalog import OwnFile, card
from shared.db import Database, clock
from shared.errors import BadOutput, DatabaseUnavailable, DiskFull, StorageUnavailable
from shared.models import Attempt, JobState, Worker
from shared.settings import Settings
from shared.storage import Storage
from shared.workers import WorkerFacts
from tests.conftest import little_room, wait_until
from tests.factories import a_claim, a_png
from tests.worker import a_network
from tests.worker.a_bench import Bench
from worker import execute, lifeline
from worker.ahead import Ahead
from worker.codec.sandboxed import Sandboxed
from worker.enlarging import Engine
from worker.execute import Executor
from worker.outcomes import Canceled, Fatal, Released, Retryable, Succeeded, Superseded

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
    assert [phase for phase, _ in trace["phases"]] == ["fetch", "decode", "load", "upscale", "encode", "store"]
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
    monkeypatch.setattr(lifeline, "TRACE_SECONDS", 0.0)
    job_id = bench.submit()
    seen: list[Any] = []

    def look(_call: int) -> None:
        with bench.database.reading() as session:
            seen.append(session.get_one(Attempt, (job_id, 1)).trace)

    bench.before_call = look
    bench.executor.run(job_id)
    assert any(trace is not None and trace["bands_total"] == 2 for trace in seen)


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


# --- cancel, rescue, deadline, stop ---------------------------------------------------------------------------------


def test_a_cancel_is_seen_at_the_next_tile(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "PROGRESS_SECONDS", 0.0)
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
    monkeypatch.setattr(lifeline, "PROGRESS_SECONDS", 0.0)
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
    monkeypatch.setattr(lifeline, "PROGRESS_SECONDS", 0.0)
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
    monkeypatch.setattr(lifeline, "FINISH_RATHER_THAN_RELEASE_SECONDS", 0.0)
    job_id = bench.submit()
    bench.before_call = lambda _: bench.executor.ask_to_stop()
    assert isinstance(bench.executor.run(job_id), Released)
    job = bench.job(job_id)
    assert (job.state, job.tries_used, job.run_after) == (JobState.QUEUED, 0, None)
    assert bench.networks["cpu"].calls == 1
    assert not bench.executor.must_end


def test_a_worker_that_stops_finishes_what_is_nearly_done(bench: Bench) -> None:
    job_id = bench.submit()

    def stop(call: int) -> None:
        # With one tile to come, which no machine is so busy as to take long for.
        if call == 5:
            bench.executor.ask_to_stop()

    bench.before_call = stop
    assert isinstance(bench.executor.run(job_id), Succeeded)
    assert bench.job(job_id).state == JobState.SUCCEEDED
    assert bench.networks["cpu"].calls == 6


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


def test_a_database_away_for_a_moment_does_not_end_an_attempt(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "PROGRESS_SECONDS", 0.0)
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


def test_an_attempt_has_a_limit_by_what_its_own_job_is_expected_to_take(bench: Bench) -> None:
    limits: list[float] = []
    bench.executor.set_limit = limits.append
    short, long = bench.submit(expected_seconds=1.0), bench.submit(expected_seconds=1000.0)
    bench.executor.run(long)
    bench.executor.run(short)
    assert limits == [1800, 0, 10_000, 0], "the message of the long one led to the short one"


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


def test_a_device_is_called_what_the_kernel_calls_it() -> None:
    assert execute._device_name("gpu") is None or isinstance(execute._device_name("gpu"), str)
    if Path("/proc/cpuinfo").exists() and "model name" in Path("/proc/cpuinfo").read_text():
        assert execute._device_name("cpu")
