"""What waits: which queue a job stands in, whose turn it is, who is there to take it, and how long that takes.

Only read, like `shared.queries`; `shared.jobs` writes.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Row,
    Select,
    and_,
    bindparam,
    func,
    literal,
    or_,
    select,
    tuple_,
    union_all,
)
from sqlalchemy.orm import Session

from shared.db import NOW
from shared.models import Job, JobState, QueuePause, Worker

IMAGE_QUEUES = ("gpu.interactive", "gpu.bulk", "cpu.interactive", "cpu.bulk")

# --- which queue -----------------------------------------------------------------------------------------------------


def image_queue(device: str, priority: str, *, gpu_alive: bool) -> str:
    """The queue for a job: its device (`auto`: a GPU where one is alive, else CPU) and its priority."""
    kind = device if device != "auto" else ("gpu" if gpu_alive else "cpu")
    return f"{kind}.{priority}"


def gpu_is_alive(session: Session, *, worker_lost_after_seconds: float, now: datetime, needs: str = "") -> bool:
    """A live GPU worker serves the gpu queues, and has the model that is needed: `auto` jobs go there. Asked at each
    submit, so of SQL and without rows: those carry all that their processes have counted."""
    since = now - timedelta(seconds=worker_lost_after_seconds)
    if needs:
        return any(can_run(models, needs) for models in session.scalars(_live_gpus(), {"since": since}))
    return session.execute(_live_gpus().limit(1), {"since": since}).one_or_none() is not None


# Here and below each statement is put together once, at its first use: see `shared.queries`.
@functools.cache
def _live_gpus() -> Select[list[str] | None]:
    return select(Worker.models).where(
        Worker.device == "gpu",
        Worker.stopped_at.is_(None),
        Worker.drained_at.is_(None),
        Worker.seen_at > bindparam("since"),
    )


def can_run(models: Collection[str] | None, needs: str) -> bool:
    """Whether a worker whose row says `models` can run a job with these needs; one that says nothing takes any."""
    return not needs or models is None or needs in models


# --- whose turn ------------------------------------------------------------------------------------------------------


def start_tag_px(session: Session, owner_key_id: str, queue: str, needs: str = "") -> int:
    """Where the next job of this key would stand in the queue: the start tag of start-time fair queueing (Goyal, Vin
    and Cheng, 1996), in px of results. One SELECT of index look-ups.

    A job starts where the key's one before it ends, but not before the queue's present: keys that have jobs waiting
    are served as many px each, and one that has had none for a while gains nothing by it. The present is the tag of
    what runs; where jobs run that were given back, of what is next. That looks at jobs with no needs and with those of
    the new one: what waits for a worker that is away says nothing of the present. All of it is read from the jobs, so
    that a job taken back or deleted is no burden to its key.
    """
    place = {"owner_key_id": owner_key_id, "queue": queue, "needs": needs}
    running, waiting, waiting_alike, done, *ends = session.execute(_tags(), place).one()
    under_way = [tag for tag in (running, waiting, waiting_alike) if tag is not None]
    present = min(under_way) if under_way else (done or 0)
    return max(present, *(end or 0 for end in ends))


@functools.cache
def _tags() -> Select[Any]:
    """In the queue, the tag that runs, those that wait first with no needs and with these, and the one that was done
    last; then where the key's jobs of each of these states end."""
    of_queue = [
        select(found(Job.start_tag_px))
        .where(Job.state == state, Job.queue == bindparam("queue"), *alike)
        .scalar_subquery()
        for state, found, alike in (
            (JobState.RUNNING, func.max, []),
            (JobState.QUEUED, func.min, [Job.needs == ""]),
            (JobState.QUEUED, func.min, [Job.needs == bindparam("needs")]),
            (JobState.SUCCEEDED, func.max, []),
        )
    ]
    of_key = [
        select(Job.start_tag_px + Job.output_px)
        .where(Job.owner_key_id == bindparam("owner_key_id"), Job.state == state, Job.queue == bindparam("queue"))
        .order_by(Job.start_tag_px.desc())
        .limit(1)
        .scalar_subquery()
        for state in (JobState.RUNNING, JobState.QUEUED, JobState.SUCCEEDED)
    ]
    return select(*of_queue, *of_key)


def due(now: datetime | BindParameter[datetime]) -> list[ColumnElement[bool]]:
    """What a job must be like to be claimed."""
    return [
        Job.state == JobState.QUEUED,
        Job.tries_used < Job.max_attempts,
        or_(Job.run_after.is_(None), Job.run_after <= now),
        or_(Job.deadline_at.is_(None), Job.deadline_at > now),
        # NOT IN and not NOT EXISTS: of that PostgreSQL expects so few rows that it reads and sorts the whole queue.
        Job.queue.not_in(select(QueuePause.queue)),
    ]


def heads(session: Session, queue: str, needs: tuple[str, ...], *, now: datetime) -> Sequence[Row[str, str, str]]:
    """(id, model, needs) of the first job due with each of these needs, in their order. One SELECT with an index
    look-up for each, however long the queue is."""
    return session.execute(_heads(needs), {"queue": queue, "now": now}).all()


@functools.cache
def _heads(needs: tuple[str, ...]) -> Select[str, str, str]:
    firsts = [
        select(Job.id, Job.model, Job.needs, Job.start_tag_px)
        .where(
            *due(NOW),
            Job.queue == bindparam("queue"),
            Job.needs == literal(each),
        )
        .order_by(Job.start_tag_px, Job.id)
        .limit(1)
        .subquery()
        for each in needs
    ]
    found = union_all(*(select(first) for first in firsts)).subquery()
    return select(found.c.id, found.c.model, found.c.needs).order_by(found.c.start_tag_px, found.c.id)


def likely_next(
    session: Session,
    queues: Sequence[str],
    *,
    worker_id: str,
    worker_lost_after_seconds: float,
    now: datetime,
    runs: Collection[str] | None = None,
) -> Job | None:
    """The job that this worker will probably be sent next: the first of its first queue that holds any.

    A guess, for work that may be in vain. None where nothing waits, or where another worker serves one of the queues:
    who of them will be sent which job is the broker's to say.
    """
    for worker in serving_workers(session, worker_lost_after_seconds=worker_lost_after_seconds, now=now):
        if worker.id != worker_id and not set(queues).isdisjoint(worker.queues):
            return None
    for queue in queues:
        job = session.scalar(
            select(Job)
            .where(
                *due(now),
                Job.queue == queue,
                *([] if runs is None else [Job.model.in_(runs), Job.needs.in_(("", *runs))]),
            )
            .order_by(Job.start_tag_px, Job.id)
            .limit(1)
        )
        if job is not None:
            return job
    return None


def queue_position(session: Session, job: Job) -> int | None:
    """1 for the queued job that is next on its queue; None for a job that is not queued.

    It grows where somebody hands in a job whose share comes first. Jobs that need what this one does not are not
    counted: the worker that takes this one may not be able to run them.
    """
    if job.state != JobState.QUEUED:
        return None
    place = {"queue": job.queue, "needs": job.needs, "start_tag_px": job.start_tag_px, "job_id": job.id}
    return (session.scalar(_ahead(), place) or 0) + 1


@functools.cache
def _ahead() -> Select[int]:
    return select(func.count()).where(
        Job.state == JobState.QUEUED,
        Job.queue == bindparam("queue"),
        Job.needs.in_(("", bindparam("needs"))),
        tuple_(Job.start_tag_px, Job.id)
        < tuple_(bindparam("start_tag_px", type_=Job.start_tag_px.type), bindparam("job_id")),
    )


# --- who takes them --------------------------------------------------------------------------------------------------


def live_workers(session: Session, *, worker_lost_after_seconds: float, now: datetime) -> Sequence[Worker]:
    """Worker processes heard of lately and not stopped, newest first."""
    return session.scalars(
        select(Worker)
        .where(Worker.stopped_at.is_(None), Worker.seen_at > now - timedelta(seconds=worker_lost_after_seconds))
        .order_by(Worker.started_at.desc())
    ).all()


def serving_workers(session: Session, *, worker_lost_after_seconds: float, now: datetime) -> list[Worker]:
    """Live worker processes that take jobs: not drained."""
    alive = live_workers(session, worker_lost_after_seconds=worker_lost_after_seconds, now=now)
    return [worker for worker in alive if worker.drained_at is None]


def _is_met(needs: str, workers: Sequence[Worker]) -> bool:
    return any(can_run(worker.models, needs) for worker in workers)


@dataclass(frozen=True)
class QueueDepth:
    queue: str
    queued: int
    oldest_seconds: float | None
    running: int
    live_workers: int
    """Drained ones left out."""
    paused_at: datetime | None = None

    @property
    def is_forsaken(self) -> bool:
        """Jobs wait here and nobody will come for them."""
        return self.queued > 0 and self.live_workers == 0


def queue_depths(session: Session, *, worker_lost_after_seconds: float, now: datetime) -> list[QueueDepth]:
    """Each image queue: how many wait, since when, how many run, how many live workers serve it.

    Since when tells whether more workers would help: jobs for a model that none of those there has are left out of it.
    """
    waiting = session.execute(
        select(Job.queue, Job.needs, func.count().label("queued"), func.min(Job.queued_at).label("oldest"))
        .where(Job.state == JobState.QUEUED)
        .group_by(Job.queue, Job.needs)
    ).all()
    running = {
        row.queue: row.running
        for row in session.execute(
            select(Job.queue, func.count().label("running")).where(Job.state == JobState.RUNNING).group_by(Job.queue)
        )
    }
    workers = serving_workers(session, worker_lost_after_seconds=worker_lost_after_seconds, now=now)
    paused_at = {pause.queue: pause.paused_at for pause in session.scalars(select(QueuePause))}
    depths = []
    for queue in IMAGE_QUEUES:
        serving = [worker for worker in workers if queue in worker.queues]
        of_queue = [row for row in waiting if row.queue == queue]
        takeable = [row.oldest for row in of_queue if not serving or _is_met(row.needs, serving)]
        depths.append(
            QueueDepth(
                queue=queue,
                queued=sum(row.queued for row in of_queue),
                oldest_seconds=(now - min(takeable)).total_seconds() if takeable else None,
                running=running.get(queue, 0),
                live_workers=len(serving),
                paused_at=paused_at.get(queue),
            )
        )
    return depths


# --- what waits in vain, and how long all else does ------------------------------------------------------------------


def waits_for(session: Session, job: Job, *, worker_lost_after_seconds: float, now: datetime) -> str | None:
    """In words, why nobody will come for a queued job: no live worker has the model it needs. None where one has."""
    workers = serving_workers(session, worker_lost_after_seconds=worker_lost_after_seconds, now=now)
    if _is_met(job.needs, [worker for worker in workers if job.queue in worker.queues]):
        return None
    return f"No live worker of {job.queue} has the model {job.needs}: the job waits until one does."


@dataclass(frozen=True)
class ForsakenModel:
    """Jobs wait that need a model which none of the live workers of their queue has. (Where there are no workers at
    all, that is what is wrong.)"""

    queue: str
    needs: str
    queued: int
    oldest_seconds: float


def forsaken_models(session: Session, *, worker_lost_after_seconds: float, now: datetime) -> list[ForsakenModel]:
    waiting = session.execute(
        select(Job.queue, Job.needs, func.count().label("queued"), func.min(Job.queued_at).label("oldest"))
        .where(Job.state == JobState.QUEUED, Job.needs != "")
        .group_by(Job.queue, Job.needs)
        .order_by(Job.queue, Job.needs)
    ).all()
    if not waiting:
        return []
    workers = serving_workers(session, worker_lost_after_seconds=worker_lost_after_seconds, now=now)
    found = []
    for row in waiting:
        serving = [worker for worker in workers if row.queue in worker.queues]
        if serving and not _is_met(row.needs, serving):
            found.append(ForsakenModel(row.queue, row.needs, row.queued, (now - row.oldest).total_seconds()))
    return found


def stranded_queues(session: Session, *, worker_lost_after_seconds: float, now: datetime) -> list[tuple[str, str, str]]:
    """(from, to, needs) of queues whose `auto` jobs with these needs would be served elsewhere: those of GPUs while no
    GPU is left that can run them, those of CPUs while there is one.

    A worker that stopped lately counts as there: it is being replaced, and what waits for a GPU would take a CPU long.
    """
    heard = session.execute(
        select(Worker.queues, Worker.device, Worker.stopped_at, Worker.models).where(
            Worker.seen_at > now - timedelta(seconds=worker_lost_after_seconds), Worker.drained_at.is_(None)
        )
    ).all()
    waiting = session.scalars(
        select(Job.needs).where(Job.state == JobState.QUEUED, Job.needs != "").distinct().order_by(Job.needs)
    )
    found = []
    for needs in ("", *waiting):
        able = [worker for worker in heard if can_run(worker.models, needs)]
        alive = [worker for worker in able if worker.stopped_at is None]
        for priority in ("interactive", "bulk"):
            gpu, cpu = image_queue("gpu", priority, gpu_alive=True), image_queue("cpu", priority, gpu_alive=True)
            if any(worker.device == "gpu" and gpu in worker.queues for worker in alive):
                found.append((cpu, gpu, needs))
            elif any(cpu in worker.queues for worker in alive) and not any(gpu in worker.queues for worker in able):
                found.append((gpu, cpu, needs))
    return found


def expected_wait_seconds(
    session: Session,
    queue: str,
    *,
    worker_lost_after_seconds: float,
    now: datetime,
    before_tag_px: int | None = None,
    needs: str | None = None,
) -> float:
    """Work ahead on a queue over the workers that serve it, from the expectation written at submit.

    Ahead is all that runs and waits there; with `before_tag_px` only what waits before a job with that start tag, and
    with `needs` what a worker that has them takes for one: the jobs with them and those without any. What waits in the
    interactive queue of the same device is ahead of a bulk job too.
    """
    ahead = Job.state == JobState.QUEUED
    if before_tag_px is not None:
        ahead = and_(ahead, Job.start_tag_px <= before_tag_px)
    if needs is not None:
        ahead = and_(ahead, Job.needs.in_(("", needs)))
    of_work = or_(ahead, Job.state == JobState.RUNNING)
    device, _, priority = queue.partition(".")
    of_queue = and_(Job.queue == queue, of_work)
    if priority == "bulk":
        of_queue = or_(of_queue, and_(Job.queue == f"{device}.interactive", Job.state == JobState.QUEUED))
    work = session.scalar(select(func.coalesce(func.sum(Job.expected_seconds), 0.0)).where(of_queue))
    workers = serving_workers(session, worker_lost_after_seconds=worker_lost_after_seconds, now=now)
    serving = sum(queue in worker.queues and can_run(worker.models, needs or "") for worker in workers)
    return float(work or 0.0) / max(1, serving)
