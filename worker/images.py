"""The one task of the image queues, and the processes that run it: a few lines around `worker.execute`."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from celery import shared_task

from shared.outbox import HELP_JOB, RUN_JOB
from worker.app import STOP_NOTICE, ProcessLoader

if TYPE_CHECKING:
    from worker.execute import Executor


class ImagesLoader(ProcessLoader):
    executor: Executor
    """Of a child; the main process has none."""

    def process_started(self) -> None:
        # Here and not above: the main process imports this module too, and is to stay without torch.
        from worker.execute import Executor

        queues = [queue.name for queue in self.app.conf.task_queues]
        self.executor = Executor.start(self.settings, queues=queues)
        signal.signal(STOP_NOTICE, lambda *_: self.executor.ask_to_stop())

    def process_stopped(self) -> None:
        self.executor.stop()


@shared_task(name=RUN_JOB, bind=True)
def run_job(self: Any, job_id: str) -> None:
    """One attempt at the job; nothing where there is nothing to claim."""
    executor: Executor = self.app.loader.executor
    executor.run(job_id)
    _end_where_asked(executor)


@shared_task(name=HELP_JOB, bind=True)
def help_job(self: Any, job_id: str) -> None:
    """One shard of a job that another process holds; nothing where none is free."""
    executor: Executor = self.app.loader.executor
    executor.help(job_id)
    _end_where_asked(executor)


def _end_where_asked(executor: Executor) -> None:
    if executor.must_end:
        # The pool starts a fresh process with a clean device in this one's place.
        raise SystemExit(1)
