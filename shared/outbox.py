"""The only door to the broker: task names, the message's shape, publishing, and the relay's promise to publish.

A message is a hint. It carries an id and nothing else; SQL says whether there is anything to do. Publishing is
ambiguous both ways (a lost reply can leave no copy or two), so a publish error means nothing and neither does a
duplicate: `relay_due` sends again what did not come to anything.
"""

from __future__ import annotations

import functools
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import case, update
from sqlalchemy.orm import Session

from shared import deliveries, queries, queueing, renditions, shards
from shared.db import Database, clock
from shared.errors import BrokerUnavailable, DatabaseUnavailable
from shared.models import Job
from shared.queueing import IMAGE_QUEUES
from shared.settings import Settings
from shared.telemetry import log

if TYPE_CHECKING:
    import redis
    from celery import Celery

T = TypeVar("T")

RUN_JOB = "enlarger.run_job"
HELP_JOB = "enlarger.help_job"
DELIVER_WEBHOOK = "enlarger.deliver_webhook"
MAKE_RENDITION = "enlarger.make_rendition"
SWEEP_BLOBS = "enlarger.sweep_blobs"
TASKS = (RUN_JOB, HELP_JOB, DELIVER_WEBHOOK, MAKE_RENDITION, SWEEP_BLOBS)

CHORES_QUEUE = "chores"

# A key of random value that lives in Redis beside the messages. When it is gone, so are they: Redis was wiped.
GENERATION_KEY = "enlarger:generation"

# What was published in a moment is marked in one transaction: with one for each job, marks would be half of all commits
# of a busy API. Long enough for several jobs at 100/s, and so short that the relay, which looks each second and sends
# once more what is not marked, finds few.
MARK_AFTER_SECONDS = 0.05
MARKED_TOGETHER = 100


def celery_app(settings: Settings) -> Celery:
    """Celery with every setting that reliability depends on, each with its reason; no tasks, no connection made.

    Producers (API, relay) use it as it is; `worker.app` adds tasks and what only consumers need.
    """
    # Here and below not at the top: whoever only asks SQL imports this module too, and a tenth of the API's start would
    # be Celery and Redis.
    from celery import Celery
    from kombu import Queue

    app = Celery("enlarger", broker=settings.redis_url, set_as_current=False)
    app.conf.update(
        broker_transport_options={
            # Recovery is SQL's; a redelivery is only a hint, so it may be late: two hours, longer than any job.
            "visibility_timeout": 7200,
            # Look for messages of dead consumers every 10 s and at every sweep (the default skips 9 of 10).
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
            # The default None hangs a publish for ever on a frozen Redis.
            "socket_timeout": 5,
            "socket_connect_timeout": 2,
            # A peer that went away without a word (a pulled cable, a lost NAT entry) is noticed; a blocking BRPOP says
            # nothing for as long as the queue is empty.
            "socket_keepalive": True,
            "health_check_interval": 10,
            # A retry after a lost reply would repeat the LPUSH: one more duplicate for nothing.
            "retry_on_timeout": False,
            # Interactive queues come first in the worker's list. Which job a message leads to is SQL's to say.
            "queue_order_strategy": "priority",
        },
        # A worker outlives any outage of Redis, also one in which it is started: the default gives up after 100 tries.
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # A publisher that finds every connection in use fails, and the relay sends later; the default waits for ever.
        broker_pool_acquire_timeout=2,
        # The relay retries, in one place.
        task_publish_retry=False,
        # A message is acknowledged when its task has ended, however it ended: what comes next is SQL's decision.
        task_acks_late=True,
        task_acks_on_failure=True,
        task_acks_on_timeout=True,
        # A poison job put back by the broker crashed 55 children in 12 s; SQL counts attempts instead.
        task_reject_on_worker_lost=False,
        # A message held back by a busy worker could be running on an idle one.
        worker_prefetch_multiplier=1,
        # Solo loses the running job at a soft shutdown and knows no hard limit.
        worker_pool="prefork",
        # The default of 4 s is an endless kill loop where the child imports torch.
        worker_proc_alive_timeout=120,
        # True re-ran the job that was going well: the lease decides who owns it, not the broker connection.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # On SIGTERM (with REMAP_SIGTERM=SIGQUIT) the running job gets this long to give its lease back.
        worker_soft_shutdown_timeout=30,
        # Nothing of ours asks workers through Redis: SQL knows who is alive.
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        # What a job came to is a row. A result in Redis would be a second truth that nobody reads.
        task_ignore_result=True,
        result_backend=None,
        # Pickle would let whoever can write to Redis run code in workers.
        task_serializer="json",
        accept_content=["json"],
        # A typing error in a queue's name must fail, not make a queue nobody reads.
        task_create_missing_queues=False,
        task_queues=[Queue(name) for name in (*IMAGE_QUEUES, CHORES_QUEUE)],
        task_default_queue=CHORES_QUEUE,
        timezone="UTC",
        # Our own structured logs stay as they are.
        worker_hijack_root_logger=False,
    )
    return app


@dataclass(frozen=True)
class JobMessage:
    """What is needed to send a job's message; all of it can be looked up again."""

    job_id: str
    queue: str


def message_of(job: Job) -> JobMessage:
    return JobMessage(job.id, job.queue)


class Broker:
    """Publishes. One per process; connects when first used."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @functools.cached_property
    def _celery(self) -> Celery:
        return celery_app(self._settings)

    @functools.cached_property
    def _redis(self) -> redis.Redis:
        import redis

        return redis.Redis.from_url(
            self._settings.redis_url, socket_timeout=5, socket_connect_timeout=2, decode_responses=True
        )

    def publish_job(self, message: JobMessage, *, task: str = RUN_JOB) -> None:
        """`task` is HELP_JOB to ask for help with one shard of it. Raises BrokerUnavailable; the message may or may not
        have been queued then."""
        self._send(task, [message.job_id], message.queue)

    def publish_chore(self, task: str, *args: str) -> None:
        """Raises BrokerUnavailable; the message may or may not have been queued then."""
        self._send(task, list(args), CHORES_QUEUE)

    def generation(self) -> str:
        """The value of GENERATION_KEY, made where it is missing. Raises BrokerUnavailable."""
        import redis

        try:
            self._redis.set(GENERATION_KEY, secrets.token_hex(8), nx=True)
            return str(self._redis.get(GENERATION_KEY))
        except redis.RedisError as error:
            raise BrokerUnavailable("Redis does not answer.") from error

    def ping(self) -> None:
        """Raises BrokerUnavailable."""
        import redis

        try:
            self._redis.ping()
        except redis.RedisError as error:
            raise BrokerUnavailable("Redis does not answer.") from error

    def warm_up(self) -> None:
        """Loads what the first message would; connects to nothing."""
        _ = self._celery, self._redis

    def close(self) -> None:
        for name in ("_celery", "_redis"):
            if name in self.__dict__:
                getattr(self, name).close()

    def _send(self, task: str, args: Sequence[str], queue_name: str) -> None:
        import redis
        from kombu.exceptions import KombuError, OperationalError

        try:
            self._celery.send_task(task, args=list(args), queue=queue_name, ignore_result=True)
        except (KombuError, OperationalError, redis.RedisError, OSError) as error:
            raise BrokerUnavailable("The message could not be sent.") from error


class Hurrier:
    """Publishes fresh jobs from a thread of its own, so that no request ever waits for Redis.

    It only hurries: what it drops (a full queue, a dead Redis, the end of the process) the relay sends within seconds.
    """

    def __init__(self, broker: Broker, database: Database, *, backlog: int = 1000) -> None:
        self._broker = broker
        self._database = database
        self._waiting: queue.Queue[JobMessage | None] = queue.Queue(backlog)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def publish(self, message: JobMessage) -> None:
        """Returns at once; call it after the commit."""
        # Started here and not in __init__: a thread made before gunicorn forks does not exist in its children.
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="outbox-hurrier", daemon=True)
                self._thread.start()
        try:
            self._waiting.put_nowait(message)
        except queue.Full:
            log.warning("outbox.hurrier_full", job_id=message.job_id)

    def close(self, *, patience_seconds: float = 15.0) -> None:
        """Lets the thread send what waits, and ends it; gives up on it after `patience_seconds` (a dead Redis)."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is None:
            return
        ends_at = time.monotonic() + patience_seconds
        with suppress(queue.Full):
            self._waiting.put(None, timeout=patience_seconds)
        thread.join(max(0.0, ends_at - time.monotonic()))

    def _run(self) -> None:
        ended = False
        while not ended:
            first = self._waiting.get()
            ended = first is None or self._hurry(first)

    def _hurry(self, first: JobMessage) -> bool:
        """Publishes this job and those that come within MARK_AFTER_SECONDS, each at once, and marks them together. True
        where the end was announced."""
        mark_at = time.monotonic() + MARK_AFTER_SECONDS
        sent: list[str] = []
        message: JobMessage | None = first
        ended = False
        try:
            generation = self._broker.generation()
            while message is not None:
                self._broker.publish_job(message)
                sent.append(message.job_id)
                left_seconds = mark_at - time.monotonic()
                if left_seconds <= 0 or len(sent) == MARKED_TOGETHER:
                    break
                try:
                    message = self._waiting.get(timeout=left_seconds)
                except queue.Empty:
                    break
                ended = message is None
        except BrokerUnavailable as error:
            # Those that wait would fail likewise, each after its own time.
            unsent, ended = self._drop()
            log.warning("outbox.hurry_failed", unsent=1 + unsent, detail=error.detail)
        if sent:
            self._mark(sent, generation)
        return ended

    def _drop(self) -> tuple[int, bool]:
        """Throws away what waits, at most MARKED_TOGETHER; (how many, whether the end was announced)."""
        for count in range(MARKED_TOGETHER):
            try:
                if self._waiting.get_nowait() is None:
                    return count, True
            except queue.Empty:
                return count, False
        return MARKED_TOGETHER, False

    def _mark(self, sent: Sequence[str], generation: str) -> None:
        try:
            with self._database.transaction() as session:
                mark_published(session, sent, generation, clock(session))
        except DatabaseUnavailable as error:
            # Unmarked means sent once more by the relay: harmless.
            log.warning("outbox.mark_failed", jobs=len(sent), detail=error.detail)


def mark_published(session: Session, job_ids: Sequence[str], generation: str, now: datetime) -> None:
    """Writes that a copy of each job's message was sent to this Redis at `now`.

    Copies that went with a wiped Redis count no more: the waits between copies would grow although there is only one.
    """
    copies = case((Job.published_generation == generation, Job.published_count + 1), else_=1)
    session.execute(
        update(Job)
        .where(Job.id.in_(job_ids))
        .values(published_at=now, published_count=copies, published_generation=generation)
    )


def call_helpers(database: Database, broker: Broker, settings: Settings) -> int:
    """Sends a message for every free shard that has none on its way. Returns how many. Raises BrokerUnavailable."""
    with database.transaction() as session:
        free = shards.due(
            session,
            max_tries=settings.max_attempts,
            resend_after_seconds=settings.resend_after_seconds,
            now=clock(session),
        )
    return _send_marked(
        database,
        free,
        lambda shard: broker.publish_job(JobMessage(shard.job_id, shard.queue), task=HELP_JOB),
        shards.not_sent,
    )


def relay_due(database: Database, broker: Broker, settings: Settings, *, stopping: Callable[[], bool]) -> int:
    """Sends the message of every queued, due job, free shard, due delivery and owed rendition that has none on its way.
    Returns how many.

    Loses nothing and doubles harmlessly: sends first, marks after, and two relays at once only send copies. Where
    Redis was wiped (another generation key), everything queued is sent again; otherwise only what has waited longer
    than max(`resend_after_seconds`, twice the expected wait). Raises BrokerUnavailable and changes nothing more.
    """
    generation = broker.generation()
    with database.reading() as session:
        owed = queries.maybe_owed(
            session,
            generation=generation,
            resend_after_seconds=settings.resend_after_seconds,
            now=clock(session),
        )
    sent = _send_jobs(database, broker, settings, generation, stopping) if owed.jobs else 0
    if owed.shards:
        sent += call_helpers(database, broker, settings)
    if owed.deliveries:
        sent += _send_deliveries(database, broker, settings)
    if owed.renditions:
        sent += _send_renditions(database, broker, settings)
    return sent


def _send_jobs(
    database: Database, broker: Broker, settings: Settings, generation: str, stopping: Callable[[], bool]
) -> int:
    sent = 0
    while not stopping():
        with database.reading() as session:
            now = clock(session)
            resend_after = {
                name: max(
                    settings.resend_after_seconds,
                    2
                    * queueing.expected_wait_seconds(
                        session, name, worker_lost_after_seconds=settings.worker_lost_after_seconds, now=now
                    ),
                )
                for name in IMAGE_QUEUES
            }
            messages = [
                message_of(job)
                for job in queries.unpublished(session, generation=generation, resend_after=resend_after, now=now)
            ]
        if not messages:
            break
        for message in messages:
            broker.publish_job(message)
        with database.transaction() as session:
            mark_published(session, [message.job_id for message in messages], generation, clock(session))
        sent += len(messages)
    return sent


def _send_deliveries(database: Database, broker: Broker, settings: Settings) -> int:
    with database.transaction() as session:
        due = deliveries.due(session, resend_after_seconds=settings.resend_after_seconds, now=clock(session))
    return _send_marked(database, due, lambda id: broker.publish_chore(DELIVER_WEBHOOK, id), deliveries.not_sent)


def _send_renditions(database: Database, broker: Broker, settings: Settings) -> int:
    with database.transaction() as session:
        due = renditions.due(session, resend_after_seconds=settings.resend_after_seconds, now=clock(session))
    return _send_marked(database, due, lambda each: broker.publish_chore(MAKE_RENDITION, *each), renditions.not_sent)


def _send_marked(
    database: Database,
    due: Sequence[T],
    send: Callable[[T], None],
    not_sent: Callable[[Session, Sequence[T]], None],
) -> int:
    """Sends what is marked as sent, and takes the mark from what the broker did not take. Returns how many there were.

    Marked first, other than jobs: a webhook's try that fails at once is due again in seconds, and a mark that came
    after it would hold it back. Raises BrokerUnavailable.
    """
    for position, each in enumerate(due):
        try:
            send(each)
        except BrokerUnavailable:
            with database.transaction() as session:
                not_sent(session, due[position:])
            raise
    return len(due)
