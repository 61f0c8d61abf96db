"""The two Celery apps: what is set, what they serve, and real processes that work and stop."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from celery import Celery
from PIL import Image

from shared import deliveries, jobs, queueing
from shared.db import Database, clock
from shared.errors import ModelUnavailable
from shared.jobs import JobInput
from shared.models import ApiKey, BlobRemoval, Delivery, DeliveryState, Job, JobState, Worker
from shared.outbox import DELIVER_WEBHOOK, HELP_JOB, RUN_JOB, SWEEP_BLOBS, Broker, message_of
from shared.settings import ENV_PREFIX, Settings
from shared.storage import Storage
from tests.chaos.proxy import Proxy
from tests.conftest import Received, Receiver, Reply, wait_until
from tests.factories import a_job, a_key, options
from worker import app as worker_app

ROOT = Path(__file__).resolve().parents[2]


def queue_names(app: Celery) -> list[str]:
    return [queue.name for queue in app.conf.task_queues]


# --- what is set ----------------------------------------------------------------------------------------------------


def test_importing_the_module_makes_nothing_and_naming_an_app_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}WORKER_DEVICE", "cpu")
    worker_app._from_environment.cache_clear()
    assert "images" not in vars(worker_app)
    assert worker_app.images is worker_app.images
    assert worker_app.images is not worker_app.chores
    with pytest.raises(AttributeError, match="others"):
        _ = worker_app.others
    worker_app._from_environment.cache_clear()


def test_image_workers_spawn_one_process_for_each_job_at_once(settings: Settings) -> None:
    app = worker_app.images_app(settings.model_copy(update={"worker_device": "cpu", "worker_concurrency": 3}))
    assert (app.conf.worker_pool, app.conf.worker_pool_start_method) == ("prefork", "spawn")
    assert (app.conf.worker_concurrency, app.conf.worker_prefetch_multiplier) == (3, 1)
    assert (app.conf.task_acks_late, app.conf.task_reject_on_worker_lost) == (True, False)
    assert app.conf.worker_soft_shutdown_timeout == 30


def test_chores_workers_fork_and_serve_the_chores_queue(settings: Settings) -> None:
    app = worker_app.chores_app(settings)
    assert (app.conf.worker_pool, app.conf.worker_pool_start_method) == ("prefork", "fork")
    assert queue_names(app) == ["chores"]


@pytest.mark.parametrize(
    ("device", "gpu", "queues"),
    [
        ("cpu", True, ("cpu.interactive", "cpu.bulk")),
        ("gpu", True, ("gpu.interactive", "gpu.bulk")),
        ("auto", False, ("cpu.interactive", "cpu.bulk")),
        ("auto", True, ("gpu.interactive", "gpu.bulk", "cpu.interactive", "cpu.bulk")),
    ],
)
def test_a_worker_serves_the_queues_of_its_device_the_urgent_ones_first(
    device: str, gpu: bool, queues: tuple[str, ...]
) -> None:
    assert worker_app.image_queues(device, gpu=gpu) == queues


@pytest.mark.parametrize(
    ("driver", "torch", "has_gpu"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_there_is_a_gpu_where_both_the_driver_and_torch_see_one(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, driver: bool, torch: bool, has_gpu: bool
) -> None:
    monkeypatch.setattr(worker_app, "_driver_sees_gpu", lambda: driver)
    monkeypatch.setattr(worker_app, "_torch_sees_gpu", lambda: torch)
    app = worker_app.images_app(settings)
    assert ("gpu.interactive" in queue_names(app)) == has_gpu
    told = settings.model_copy(update={"worker_device": "gpu"})
    if has_gpu:
        assert queue_names(worker_app.images_app(told)) == ["gpu.interactive", "gpu.bulk"]
    else:
        with pytest.raises(ModelUnavailable):
            worker_app.images_app(told)


def test_the_driver_and_torch_of_this_machine_agree() -> None:
    assert not worker_app._torch_sees_gpu() or worker_app._driver_sees_gpu()


def test_every_task_that_is_published_is_registered_with_the_app_whose_queue_it_goes_to(settings: Settings) -> None:
    for made, names in (
        (worker_app.images_app(settings.model_copy(update={"worker_device": "cpu"})), {RUN_JOB, HELP_JOB}),
        (worker_app.chores_app(settings), {DELIVER_WEBHOOK, SWEEP_BLOBS}),
    ):
        made.loader.import_default_modules()
        assert names <= set(made.tasks)


@pytest.mark.parametrize("task", [RUN_JOB, HELP_JOB])
@pytest.mark.parametrize("must_end", [False, True])
def test_a_process_whose_device_is_broken_ends_after_its_job(settings: Settings, must_end: bool, task: str) -> None:
    ran = []

    class Executor:
        def run_network(self, job_id: str, queue: str | None) -> None:
            ran.append((RUN_JOB, job_id))

        def help(self, job_id: str, queue: str | None) -> None:
            ran.append((HELP_JOB, job_id))

    executor = Executor()
    executor.must_end = must_end  # type: ignore[attr-defined]
    app = worker_app.images_app(settings.model_copy(update={"worker_device": "cpu"}))
    app.loader.import_default_modules()
    app.loader.executor = executor
    if must_end:
        with pytest.raises(SystemExit):
            app.tasks[task]("job_1")
    else:
        app.tasks[task]("job_1")
    assert ran == [(task, "job_1")]


# --- real processes -------------------------------------------------------------------------------------------------


def environment(settings: Settings, **more: str) -> dict[str, str]:
    told = {name: getattr(settings, name) for name in settings.model_fields_set}
    return {
        **os.environ,
        **{f"{ENV_PREFIX}{name.upper()}": str(value) for name, value in told.items()},
        "REMAP_SIGTERM": "SIGQUIT",
        **{f"{ENV_PREFIX}{name.upper()}": value for name, value in more.items()},
    }


@contextmanager
def celery(name: str, log: Path, variables: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "celery", "--quiet", "-A", f"worker.app:{name}", "worker", "--loglevel=INFO"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    with log.open("ab") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    except BaseException:
        sys.stderr.write(log.read_text())
        raise
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def live(database: Database, kind: str) -> list[str]:
    with database.transaction() as session:
        found = queueing.live_workers(session, worker_lost_after_seconds=30, now=clock(session))
        return [worker.id for worker in found if worker.kind == kind]


def job(database: Database, job_id: str) -> Job:
    with database.transaction() as session:
        return session.get_one(Job, job_id)


def submit(
    database: Database, storage: Storage, broker: Broker, key: ApiKey, size: tuple[int, int], **asked: Any
) -> str:
    file = io.BytesIO()
    Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 100).convert("RGB").save(file, "PNG")
    data = file.getvalue()
    with database.transaction() as session:
        now = clock(session)
        job_id = jobs.new_job_id(now)
        prefix = jobs.blob_prefix(job_id)
        picture = JobInput(job_id, prefix, f"{prefix}/input", *size, "png", len(data), hashlib.sha256(data).hexdigest())
        made = jobs.submit(
            session,
            owner_key_id=key.id,
            options=options(**asked),
            picture=picture,
            max_attempts=3,
            max_queued_jobs=10,
            now=now,
        )
    storage.put(picture.key, io.BytesIO(data), "image/png")
    broker.publish_job(message_of(made))
    return job_id


@pytest.mark.slow
def test_an_image_worker_does_urgent_jobs_first_and_gives_back_what_it_cannot_finish(
    sqlite_database: Database, storage: Storage, redis_url: str, settings: Settings, tmp_path: Path
) -> None:
    with sqlite_database.transaction() as session:
        key = a_key(session, clock(session))
    broker = Broker(settings)
    given = (sqlite_database, storage, broker, key)
    bulk = submit(*given, (24, 20), queue="cpu.bulk", priority="bulk")
    urgent = submit(*given, (24, 20), classify=True)
    variables = environment(settings, worker_device="cpu", tile_px="48", torch_threads="1")
    with celery("images", tmp_path / "images.log", variables) as process:
        wait_until(lambda: job(sqlite_database, bulk).finished_at, seconds=120, what="the bulk job")
        first, second = job(sqlite_database, urgent), job(sqlite_database, bulk)
        assert (first.state, second.state) == (JobState.SUCCEEDED, JobState.SUCCEEDED)
        assert first.started_at is not None
        assert second.started_at is not None
        # The second may begin while the first is encoded and stored.
        assert first.started_at < second.started_at
        assert first.labels

        # Given a job of many tiles, when the worker is told to stop in the middle of it,
        long = submit(*given, (900, 700))
        wait_until(lambda: job(sqlite_database, long).fraction > 0.02, seconds=60, what="a first tile")
        told_at = time.monotonic()
        process.terminate()
        # then the job is queued again within a tile or so, nothing counts against it, and the process ends in order.
        wait_until(lambda: job(sqlite_database, long).state == JobState.QUEUED, seconds=20, what="the release")
        assert process.wait(30) == 0
        assert time.monotonic() - told_at < 25
        released = job(sqlite_database, long)
        assert (released.attempt, released.tries_used, released.run_after) == (1, 0, None)
    assert live(sqlite_database, "images") == []
    with redis.Redis.from_url(redis_url) as client:
        # The message was acknowledged: what comes next is the relay's business.
        assert client.hlen("unacked") == 0
        assert client.llen("cpu.interactive") == 0
    broker.close()


PAST_ITS_LIMIT = """
import sys
from types import SimpleNamespace

executor = SimpleNamespace()
sys.modules["worker.execute"] = SimpleNamespace(Executor=SimpleNamespace(start=lambda settings, queues: executor))
from celery import Celery
from worker.images import ImagesLoader

app = Celery("limited", set_as_current=False)
app.conf.task_queues = []
ImagesLoader(app).process_started()
executor.set_limit(0.1)
executor.set_limit(0)
executor.set_limit(0.2)
sum(range(10**12))
"""


def test_a_worker_is_stopped_also_while_a_lost_child_is_being_replaced() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    worker = SimpleNamespace(pool=SimpleNamespace(info={"processes": [None, child.pid]}))
    worker_app._signal_children(worker, signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL


def test_an_image_process_is_ended_at_its_limit_also_in_the_middle_of_one_c_call() -> None:
    ran = subprocess.run([sys.executable, "-c", PAST_ITS_LIMIT], cwd=ROOT, timeout=120)
    assert ran.returncode == -signal.SIGALRM


def test_a_chores_worker_delivers_sweeps_and_stops(
    sqlite_database: Database,
    storage: Storage,
    redis_url: str,
    settings: Settings,
    receiver: Receiver,
    tmp_path: Path,
) -> None:
    with sqlite_database.transaction() as session:
        now = clock(session)
        made = a_job(session, a_key(session, now), now, webhook_url=receiver.url)
        (delivery_id,) = deliveries.owe(session, made, "job.canceled", now)
        jobs.owe_blob_removal(session, "jobs/gone/", now=now)
    storage.put("jobs/gone/input", io.BytesIO(b"blob"), "image/png")
    broker = Broker(settings)
    variables = environment(settings, chores_concurrency="2", allow_private_addresses='["127.0.0.0/8"]')
    with celery("chores", tmp_path / "chores.log", variables) as process:
        broker.publish_chore(DELIVER_WEBHOOK, delivery_id)
        broker.publish_chore(SWEEP_BLOBS)
        receiver.wait_for(1, seconds=60)
        wait_until(lambda: storage.keys() == [], seconds=60, what="the sweep")
        wait_until(lambda: len(live(sqlite_database, "chores")) == 2, seconds=60, what="both processes")

        def state() -> DeliveryState:
            with sqlite_database.transaction() as session:
                return session.get_one(Delivery, delivery_id).state

        wait_until(lambda: state() == DeliveryState.DELIVERED, seconds=10, what="the delivery's record")
        process.terminate()
        assert process.wait(30) == 0
    broker.close()
    assert live(sqlite_database, "chores") == []
    with sqlite_database.transaction() as session:
        assert session.query(BlobRemoval).count() == 0
        assert all(worker.stopped_at for worker in session.query(Worker))


def test_a_worker_whose_task_ends_while_redis_is_away_takes_messages_again(
    sqlite_database: Database, storage: Storage, redis_url: str, settings: Settings, tmp_path: Path
) -> None:
    """It has one message and may have no more. Where that cannot be acknowledged, it must not wait for ever with it."""
    port = urlsplit(redis_url).port or 0
    begun, may_end = threading.Event(), threading.Event()

    class Slow(Receiver):
        def _take(self, request: Received) -> Reply:
            begun.set()
            may_end.wait(60)
            return super()._take(request)

    with Slow() as receiver, Proxy(port) as proxy:
        with sqlite_database.transaction() as session:
            now = clock(session)
            key = a_key(session, now)
            made = [a_job(session, key, now, webhook_url=receiver.url) for _ in range(3)]
            (first,), (second,), (third,) = (deliveries.owe(session, job, "job.canceled", now) for job in made)
        broker = Broker(settings)
        variables = environment(
            settings.model_copy(update={"redis_url": redis_url.replace(f":{port}", f":{proxy.port}")}),
            chores_concurrency="1",
            allow_private_addresses='["127.0.0.0/8"]',
        )
        with celery("chores", tmp_path / "chores.log", variables):
            broker.publish_chore(DELIVER_WEBHOOK, first)
            assert begun.wait(60)
            # Given a task that ends while nobody listens at Redis's address,
            proxy.set("refuse")
            may_end.set()
            log = tmp_path / "chores.log"
            wait_until(lambda: "Couldn't ack" in log.read_text(), seconds=60, what="an ack in vain")
            # when Redis is back, then the worker goes on.
            proxy.set("pass")
            broker.publish_chore(DELIVER_WEBHOOK, second)
            receiver.wait_for(2, seconds=60)
            # It connects anew for that reason alone, and not after every message.
            broker.publish_chore(DELIVER_WEBHOOK, third)
            receiver.wait_for(3, seconds=60)
            assert log.read_text().count("Connection to broker lost") == 1
        broker.close()


# --- why stopping is ours -------------------------------------------------------------------------------------------

PLAIN_CELERY = """
import os, time
from celery import Celery
from celery.worker.request import Request

app = Celery("plain", broker=os.environ["BROKER"])
app.Task.Request = "plain:TellsOfStart"
app.conf.update(
    task_acks_late=True, task_reject_on_worker_lost=False, worker_prefetch_multiplier=1, worker_concurrency=1,
    worker_soft_shutdown_timeout=6, task_ignore_result=True,
)

# Not told by the task itself: until its main process has heard of the start, Celery takes itself for idle.
class TellsOfStart(Request):
    def on_accepted(self, *heard):
        super().on_accepted(*heard)
        open("begun", "w").close()

@app.task(name="short")
def short():
    time.sleep(1)
    open("ended", "w").close()
"""


def test_celerys_own_soft_shutdown_sleeps_on_when_the_last_task_has_ended(redis_url: str, tmp_path: Path) -> None:
    """The experiment behind `stop_promptly`. Where it fails, Celery has got better, and what is ours may go."""
    (tmp_path / "plain.py").write_text(PLAIN_CELERY)
    variables = {**os.environ, "BROKER": redis_url, "REMAP_SIGTERM": "SIGQUIT"}
    command = [sys.executable, "-m", "celery", "--quiet", "-A", "plain", "worker", "--pool=prefork", "--loglevel=INFO"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    with Celery("plain", broker=redis_url, set_as_current=False) as producer:
        producer.send_task("short")
    log = (tmp_path / "plain.log").open("wb")
    process = subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until((tmp_path / "begun").exists, seconds=60, what="the task to begin")
        told_at = time.monotonic()
        process.terminate()
        wait_until((tmp_path / "ended").exists, seconds=60, what="the task to end")
        ended_at = time.monotonic()
        process.wait(60)
        # The task took a second of the six it was given; Celery slept through the rest of them.
        assert ended_at - told_at < time.monotonic() - ended_at
        assert time.monotonic() - told_at >= 6
    finally:
        log.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
