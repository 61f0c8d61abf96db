"""The Celery apps of the two kinds of worker, and how their processes start and stop.

    celery -A worker.app:images worker     pictures: spawned processes with torch, one job each at a time
    celery -A worker.app:chores worker     webhooks and sweeps: forked processes without torch

Importing this module makes nothing: an app is put together, from the environment, when it is asked for by name. The
main process of a worker never loads torch; only its children do.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import signal
import subprocess
import sys
import threading
from types import FrameType
from typing import Any, ClassVar

from celery import Celery, signals
from celery import Task as CeleryTask
from celery.loaders.app import AppLoader
from celery.worker import state
from celery.worker.request import Request as CeleryRequest
from kombu import Queue
from kombu.asynchronous import Hub

from shared.errors import ModelUnavailable
from shared.outbox import CHORES_QUEUE, celery_app
from shared.queueing import IMAGE_QUEUES
from shared.settings import Settings, load
from shared.telemetry import configure_logs, log

STOP_NOTICE = signal.SIGURG
"""Tells an image process that its worker is stopping. Of the signals that billiard leaves to us, this one is ignored by
a process that has no handler for it (yet)."""

# They tell of each message, and of each picture broken off, what our own events tell with job and attempt.
_LEAST_LEVELS = {
    "celery.app.trace": logging.WARNING,
    "celery.worker.strategy": logging.WARNING,
    "pyvips": logging.ERROR,
}

_LAST_WORDS_SECONDS = 0.1
_TORCH_SEES_GPU = "import torch; raise SystemExit(0 if torch.cuda.is_available() else 1)"


class Request(CeleryRequest):
    """A message under way, which makes the worker connect anew where it cannot be acknowledged.

    Celery logs that and goes on; the message then counts for ever against what the worker may hold. An image process
    holds one: Redis away at the wrong moment, and it would look alive and take no job again. The message itself may
    stay where it is, in Redis: a hint at a job that has ended.
    """

    loop: ClassVar[Hub | None] = None
    """Of this process's worker, once it is ready."""

    def acknowledge(self) -> None:
        super().acknowledge()
        if self.loop is not None:
            # Celery acknowledges in the loop's next turn; what came of it is known in the one after.
            self.loop.call_soon(self.loop.call_soon, self._connect_anew_unless_acknowledged)

    def _connect_anew_unless_acknowledged(self) -> None:
        if not self.message.acknowledged:
            # Raised in the loop it makes Celery drop its connection, and with it what it believes to hold.
            raise ConnectionError("A message could not be acknowledged.")


def use_loop(sender: Any, **_: Any) -> None:
    """Called when a worker is ready, in its main process."""
    Request.loop = sender.hub


class Task(CeleryTask):  # type: ignore[type-arg]  # generic in its stubs only
    Request = f"{__name__}:Request"


class ProcessLoader(AppLoader):
    """Start and end of a worker's processes. Celery makes one in the main process and one in each child.

    Celery finds it by name also in a spawned child, which shares nothing with its parent but the environment.
    """

    def __init__(self, app: Celery, **options: Any) -> None:
        super().__init__(app, **options)
        self.settings = load()
        # With a receiver of this signal Celery leaves logging alone, in the main process and in every child.
        signals.setup_logging.connect(self._configure_logs, weak=False)
        signals.worker_ready.connect(stop_promptly, weak=False)
        signals.worker_ready.connect(use_loop, weak=False)
        signals.worker_process_shutdown.connect(self._process_ends, weak=False)

    def on_worker_process_init(self) -> None:
        # Before Celery does: what happens here is logged too, and a logger once used keeps the form it had.
        self._configure_logs()
        self.process_started()

    def process_started(self) -> None:
        """Called in a child that is to take tasks. Where it raises, the child ends."""

    def process_stopped(self) -> None:
        """Called in a child that ends in order."""

    def _configure_logs(self, **_: Any) -> None:
        configure_logs(self.settings.log_level, self.settings.log_format)
        for name, level in _LEAST_LEVELS.items():
            logging.getLogger(name).setLevel(level)

    def _process_ends(self, exitcode: int, **_: Any) -> None:
        self.process_stopped()
        # Behind this, billiard tells its parent that the child ends and sleeps a second, lest the pipe be closed before
        # that is read. It is in the pipe at once; each ^C and each fresh process would wait for the rest of the second.
        ends = threading.Timer(_LAST_WORDS_SECONDS, os._exit, (exitcode,))
        ends.daemon = True
        ends.start()


def images_app(settings: Settings) -> Celery:
    """The app of an image worker. Raises ModelUnavailable where it is to use a GPU and torch sees none."""
    app = celery_app(settings)
    app.task_cls = f"{__name__}:Task"
    app.loader_cls = "worker.images:ImagesLoader"
    app.conf.update(
        include=["worker.images"],
        task_queues=[Queue(name) for name in image_queues(settings.worker_device, gpu=_has_gpu(settings))],
        # CUDA does not survive a fork, and torch's thread pool is not at home in one.
        worker_pool_start_method="spawn",
        worker_concurrency=settings.worker_concurrency,
    )
    return app


def chores_app(settings: Settings) -> Celery:
    app = celery_app(settings)
    app.task_cls = f"{__name__}:Task"
    app.loader_cls = "worker.chores:ChoresLoader"
    app.conf.update(
        include=["worker.chores"],
        task_queues=[Queue(CHORES_QUEUE)],
        worker_pool_start_method="fork",
        worker_concurrency=settings.chores_concurrency,
    )
    return app


def image_queues(worker_device: str, *, gpu: bool) -> tuple[str, ...]:
    """The queues an image worker serves, the more urgent first.

    A worker told to use its GPU leaves the CPU queues to CPU workers. One left to choose is taken for the only one
    there is: with a GPU it serves those queues too, on its CPU, lest a picture that does not fit the GPU wait for ever.
    """
    kinds = {"cpu": ("cpu",), "gpu": ("gpu",), "auto": ("gpu", "cpu") if gpu else ("cpu",)}[worker_device]
    return tuple(name for name in IMAGE_QUEUES if name.partition(".")[0] in kinds)


def stop_promptly(sender: Any, **_: Any) -> None:
    """Takes SIGTERM, SIGINT and SIGQUIT over from Celery, once, in the main process of a worker that is ready.

    Celery's soft shutdown sleeps `worker_soft_shutdown_timeout` to its end in the signal's handler, also when the last
    task ends at once. Here the children are told to stop: an attempt gives its lease back at its next tile, the task
    ends as any other, and Celery's warm shutdown, which waits for tasks, is over. What does not end within the timeout
    is killed; its lease passes.
    A second signal is Celery's to answer.
    """
    worker = sender.controller
    celerys_own = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)}

    def kill_children() -> None:
        log.warning("worker.stop_forced", worker=worker.hostname)
        _signal_children(worker, signal.SIGKILL)

    def stop(number: int, _frame: FrameType | None) -> None:
        for each, handler in celerys_own.items():
            signal.signal(each, handler)
        log.info("worker.stopping", worker=worker.hostname, signal=signal.Signals(number).name)
        _signal_children(worker, STOP_NOTICE)
        # Celery declares it None and means an exit status.
        state.should_stop = os.EX_OK  # type: ignore[assignment]
        last_net = threading.Timer(worker.app.conf.worker_soft_shutdown_timeout, kill_children)
        last_net.daemon = True
        last_net.start()

    for number in celerys_own:
        signal.signal(number, stop)


def _signal_children(worker: Any, number: signal.Signals) -> None:
    for pid in worker.pool.info["processes"]:
        # None is one that is just being started in the place of one that was lost.
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _has_gpu(settings: Settings) -> bool:
    if settings.worker_device == "cpu":
        return False
    found = _driver_sees_gpu() and _torch_sees_gpu()
    if settings.worker_device == "gpu" and not found:
        raise ModelUnavailable("A GPU is asked for and torch sees none here.", device="gpu")
    return found


def _driver_sees_gpu() -> bool:
    """Whether the NVIDIA driver is there and has a device: a matter of milliseconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _torch_sees_gpu() -> bool:
    """Whether torch can use that device: asked in a process of its own, since this one is to stay without torch."""
    return subprocess.run([sys.executable, "-c", _TORCH_SEES_GPU], check=False, timeout=120).returncode == 0


@functools.cache
def _from_environment(name: str) -> Celery:
    settings = load()
    return images_app(settings) if name == "images" else chores_app(settings)


def __getattr__(name: str) -> Celery:
    if name in ("images", "chores"):
        return _from_environment(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
