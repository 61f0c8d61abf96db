"""The one task of the image queues, and the processes that run it: a few lines around `worker.execute`."""

from __future__ import annotations

import functools
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
        # The kernel's own way of ending the process: no Python is needed for it, which may be stuck inside one C call.
        # Not Celery's limit: it comes with a message, and which job a message leads to is not known when it is sent.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self.executor.set_limit = functools.partial(signal.setitimer, signal.ITIMER_REAL)

    def process_stopped(self) -> None:
        self.executor.stop()


@shared_task(name=RUN_JOB, bind=True)
def run_job(self: Any, job_id: str) -> None:
    """One attempt at the job whose turn it is, as far as it needs the network: what is left goes on beside the next.
    Nothing where there is nothing to claim."""
    executor: Executor = self.app.loader.executor
    executor.run_network(job_id, _queue_of(self.request))
    _end_where_asked(executor)


@shared_task(name=HELP_JOB, bind=True)
def help_job(self: Any, job_id: str) -> None:
    """A job that waits, or one shard of this job, which another process holds; nothing where there is neither."""
    executor: Executor = self.app.loader.executor
    executor.help(job_id, _queue_of(self.request))
    _end_where_asked(executor)


def _queue_of(request: Any) -> str | None:
    """Where the message came from; None where the task is called and was not sent."""
    queue: str | None = (request.delivery_info or {}).get("routing_key")
    return queue


def _end_where_asked(executor: Executor) -> None:
    if executor.must_end:
        # The pool starts a fresh process with a clean device in this one's place.
        raise SystemExit(1)
