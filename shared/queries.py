"""Read-only questions: a job as customers see it, pages of jobs, depths, ages, rates. Nothing here writes."""

from __future__ import annotations

import base64
import binascii
import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, NamedTuple, TypeVar, TypeVarTuple

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Row,
    Select,
    and_,
    bindparam,
    case,
    exists,
    func,
    literal,
    or_,
    select,
    tuple_,
    union_all,
)
from sqlalchemy.orm import Session, aliased

from shared.db import UtcDateTime
from shared.errors import InvalidRequest, NotFound
from shared.models import (
    TERMINAL_STATES,
    ApiKey,
    Attempt,
    Batch,
    BlobRemoval,
    Delivery,
    DeliveryState,
    Endpoint,
    Job,
    JobState,
    QueuePause,
    Rendition,
    Shard,
    Worker,
)

_NOW = bindparam("now", type_=UtcDateTime)

SENT_AGAIN_EACH = timedelta(hours=1)
"""The last, unconditional age of a message: however many copies of it were sent, one more goes out."""

IMAGE_QUEUES = ("gpu.interactive", "gpu.bulk", "cpu.interactive", "cpu.bulk")


def job_view(job: Job, *, queue_position: int | None = None, waits_for: str | None = None) -> dict[str, Any]:
    """The job as the contract shows it: the body of `GET /v1/jobs/{id}` and the `data` of webhooks. JSON values."""
    return {
        "id": job.id,
        "status": str(job.state),
        "model": job.model,
        "routing": {"model": job.model, "reason": job.routing_reason},
        "scale": job.scale,
        "classify": job.classify,
        "device": job.running_device or job.device,
        "priority": job.priority,
        "attempt": job.attempt,
        "created_at": iso(job.created_at),
        "started_at": iso(job.started_at),
        "finished_at": iso(job.finished_at),
        "expires_at": iso(job.expires_at),
        "deadline_at": iso(job.deadline_at),
        "cancel_requested_at": iso(job.cancel_requested_at),
        "queue_position": queue_position,
        "waits_for": waits_for,
        "progress": {
            "fraction": round(job.fraction, 4),
            "phase": job.phase,
            "bands_done": job.bands_done,
            "bands_total": job.bands_total,
            "eta_seconds": None if job.eta_seconds is None else round(job.eta_seconds, 1),
        },
        "input": {
            "width": job.input_width,
            "height": job.input_height,
            "format": job.input_format,
            "bytes": job.input_bytes,
            "sha256": job.input_sha256,
            "name": job.input_name,
        },
        "result": None
        if job.state != JobState.SUCCEEDED
        else {
            "width": job.result_width,
            "height": job.result_height,
            "format": job.format,
            "bytes": job.result_bytes,
            "sha256": job.result_sha256,
            "url": f"/v1/jobs/{job.id}/result",
        },
        "labels": job.labels if job.state == JobState.SUCCEEDED else None,
        "timings": job.timings if job.state == JobState.SUCCEEDED else None,
        "report_url": f"/v1/jobs/{job.id}/report" if has_report(job) else None,
        "preview": job.preview,
        "warnings": list(job.warnings or ()),
        "error": None
        if job.error_code is None
        else {"code": job.error_code, "detail": job.error_detail, "retryable": bool(job.error_retryable)},
        "external_id": job.external_id,
        "batch_id": job.batch_id,
    }


def has_report(job: Job) -> bool:
    """Previews have none, and neither have jobs from before there were reports."""
    return job.state == JobState.SUCCEEDED and job.report is not None


def iso(moment: datetime | None) -> str | None:
    """As the contract writes moments: UTC, milliseconds, `Z`."""
    return None if moment is None else moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def batch_view(session: Session, batch: Batch) -> dict[str, Any]:
    """The batch as the contract shows it, with a state per item in the order they were handed in."""
    items = session.execute(
        select(Job.id, Job.state, Job.external_id, Job.error_code).where(Job.batch_id == batch.id).order_by(Job.id)
    ).all()
    return {
        "id": batch.id,
        "status": "completed" if batch.remaining == 0 else "running",
        "created_at": iso(batch.created_at),
        "total": batch.total,
        "remaining": batch.remaining,
        "items": [
            {"id": i.id, "status": str(i.state), "external_id": i.external_id, "error_code": i.error_code}
            for i in items
        ],
    }


def delivery_view(delivery: Delivery) -> dict[str, Any]:
    return {
        "id": delivery.id,
        "type": delivery.type,
        "job_id": delivery.job_id,
        "batch_id": delivery.batch_id,
        "endpoint_id": delivery.endpoint_id,
        "url": delivery.url,
        "status": str(delivery.state),
        "created_at": iso(delivery.created_at),
        "next_try_at": iso(delivery.due_at) if delivery.state == DeliveryState.PENDING else None,
        "finished_at": iso(delivery.finished_at),
        "tries": list(delivery.tries),
    }


def owned_job(session: Session, job_id: str, owner_key_id: str) -> Job:
    """The job, where it belongs to this key. Raises NotFound, the same for a stranger's job as for none at all."""
    job = session.scalar(_owned_job(), {"job_id": job_id, "owner_key_id": owner_key_id})
    if job is None:
        raise NotFound("There is no such job.")
    return job


# Here and below, what each submit and each poll ask is put together once: SQLAlchemy takes longer to build a statement
# than SQLite to answer it. Once, but not while modules load: the first statement has every row's mapper made.
@functools.cache
def _owned_job() -> Select[Job]:
    return select(Job).where(Job.id == bindparam("job_id"), Job.owner_key_id == bindparam("owner_key_id"))


def any_job(session: Session, job_id: str) -> Job:
    """The job, whoever owns it: the operator's look. Raises NotFound."""
    job = session.get(Job, job_id)
    if job is None:
        raise NotFound("There is no such job.")
    return job


def attempts(session: Session, job_id: str) -> Sequence[Attempt]:
    """Every attempt at the job, newest first."""
    return session.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.number.desc())).all()


def key_names(session: Session, key_ids: Iterable[str]) -> dict[str, str]:
    """The names of these keys, by id."""
    found = session.execute(select(ApiKey.id, ApiKey.name).where(ApiKey.id.in_(set(key_ids))))
    return {row.id: row.name for row in found}


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


@dataclass(frozen=True)
class Pulse:
    """The few columns a watcher of a job compares with those it saw last."""

    version: int
    state: JobState
    is_canceling: bool
    queue_position: int | None

    @property
    def is_finished(self) -> bool:
        return self.state in TERMINAL_STATES


def pulse(session: Session, job_id: str, owner_key_id: str) -> Pulse:
    """One SELECT, whatever the queue's length. Raises NotFound as `owned_job` does."""
    row = session.execute(_pulse(), {"job_id": job_id, "owner_key_id": owner_key_id}).one_or_none()
    if row is None:
        raise NotFound("There is no such job.")
    return Pulse(row.version, JobState(row.state), row.cancel_requested_at is not None, row.queue_position)


@functools.cache
def _pulse() -> Select[int, JobState, datetime | None, int | None]:
    other = aliased(Job)
    ahead = (
        select(func.count())
        .where(
            other.state == JobState.QUEUED,
            other.queue == Job.queue,
            or_(other.needs == "", other.needs == Job.needs),
            tuple_(other.start_tag_px, other.id) < tuple_(Job.start_tag_px, Job.id),
        )
        .scalar_subquery()
    )
    return select(
        Job.version,
        Job.state,
        Job.cancel_requested_at,
        case((Job.state == JobState.QUEUED, ahead + 1)).label("queue_position"),
    ).where(Job.id == bindparam("job_id"), Job.owner_key_id == bindparam("owner_key_id"))


Ts = TypeVarTuple("Ts")


@dataclass(frozen=True)
class JobFilter:
    """What a page of jobs is narrowed to; None means any."""

    owner_key_id: str | None = None
    status: str | None = None
    model: str | None = None
    external_id: str | None = None
    created_after: datetime | None = None
    id: str | None = None
    input_sha256: str | None = None
    # What only the operator's list is narrowed by.
    any_of: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Column -> values of which the job has one."""
    owner: str | None = None
    """Id or name of the key."""
    created_before: datetime | None = None
    words: tuple[str, ...] = ()
    """Each occurs in the picture's name or is the end of the job's id."""
    up_to_id: str | None = None
    """No job newer than this one."""
    before_id: str | None = None
    """Only jobs older than this one."""
    unswept: bool = False

    def apply(self, query: Select[*Ts]) -> Select[*Ts]:
        conditions = [
            (self.owner_key_id, Job.owner_key_id),
            (self.status, Job.state),
            (self.model, Job.model),
            (self.external_id, Job.external_id),
            (self.id, Job.id),
            (self.input_sha256, Job.input_sha256),
        ]
        for value, column in conditions:
            if value is not None:
                query = query.where(column == value)
        if self.created_after is not None:
            query = query.where(Job.created_at > self.created_after)
        if self.created_before is not None:
            query = query.where(Job.created_at < self.created_before)
        for name, values in self.any_of:
            query = query.where(getattr(Job, name).in_(values))
        if self.owner is not None:
            named = select(ApiKey.id).where(or_(ApiKey.id == self.owner, ApiKey.name == self.owner))
            query = query.where(Job.owner_key_id.in_(named))
        for word in self.words:
            in_name = Job.input_name.icontains(word, autoescape=True)
            query = query.where(or_(in_name, Job.id.endswith(word, autoescape=True)))
        if self.up_to_id is not None:
            query = query.where(Job.id <= self.up_to_id)
        if self.before_id is not None:
            query = query.where(Job.id < self.before_id)
        if self.unswept:
            query = query.where(Job.swept_at.is_(None))
        return query


RowT = TypeVar("RowT", Job, Delivery)


@dataclass(frozen=True)
class Page(Generic[RowT]):
    rows: Sequence[RowT]
    next_cursor: str | None


def page_of_jobs(session: Session, wanted: JobFilter, *, limit: int, cursor: str | None) -> Page[Job]:
    """Newest first. Ids sort by time, so the cursor is the last id seen and new jobs do not shift pages.

    Raises InvalidRequest where the cursor is not one we gave.
    """
    query = wanted.apply(select(Job)).order_by(Job.id.desc()).limit(limit + 1)
    if cursor is not None:
        query = query.where(Job.id < _read_cursor(cursor))
    rows = session.scalars(query).all()
    return _page(rows, limit)


def count_jobs(session: Session, wanted: JobFilter) -> int:
    """How many jobs the filter lets through."""
    return session.scalar(wanted.apply(select(func.count(Job.id)))) or 0


def page_of_deliveries(
    session: Session,
    *,
    owner_key_id: str | None,
    job_id: str | None,
    limit: int,
    cursor: str | None,
    state: str | None = None,
) -> Page[Delivery]:
    """Newest first. Raises InvalidRequest where the cursor is not one we gave."""
    query = select(Delivery).order_by(Delivery.id.desc()).limit(limit + 1)
    if owner_key_id is not None:
        query = query.where(Delivery.owner_key_id == owner_key_id)
    if job_id is not None:
        query = query.where(Delivery.job_id == job_id)
    if state is not None:
        query = query.where(Delivery.state == state)
    if cursor is not None:
        query = query.where(Delivery.id < _read_cursor(cursor))
    return _page(session.scalars(query).all(), limit)


def _page(rows: Sequence[RowT], limit: int) -> Page[RowT]:
    more = len(rows) > limit
    rows = rows[:limit]
    cursor = base64.urlsafe_b64encode(rows[-1].id.encode()).decode().rstrip("=") if more else None
    return Page(rows, cursor)


def _read_cursor(cursor: str) -> str:
    try:
        row_id = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
        # PostgreSQL refuses NUL with an error of its own.
        if not row_id.isprintable():
            raise ValueError("not an id")
        return row_id
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(
            "The cursor is not one this list gave out; start without it.", parameter="cursor"
        ) from error


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


def _is_met(needs: str, workers: Sequence[Worker]) -> bool:
    return any(can_run(worker.models, needs) for worker in workers)


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
            *due(_NOW),
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


def can_run(models: Collection[str] | None, needs: str) -> bool:
    """Whether a worker whose row says `models` can run a job with these needs; one that says nothing takes any."""
    return not needs or models is None or needs in models


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


def tallies(session: Session, *, now: datetime, within_seconds: float = 600) -> Sequence[Row[Any]]:
    """(id, kind, tallies) of every process heard of lately, those that have stopped included: their last numbers count
    too, and a scrape must have time to see them."""
    return session.execute(
        select(Worker.id, Worker.kind, Worker.tallies)
        .where(Worker.seen_at > now - timedelta(seconds=within_seconds), Worker.tallies.is_not(None))
        .order_by(Worker.id)
    ).all()


def recent_workers(session: Session, *, now: datetime, within_seconds: float = 86400) -> Sequence[Worker]:
    """Every worker process seen within a day, newest first: the dashboard shows the lost ones too."""
    return session.scalars(
        select(Worker)
        .where(Worker.seen_at > now - timedelta(seconds=within_seconds))
        .order_by(Worker.started_at.desc())
    ).all()


def counts_by_state(session: Session) -> dict[str, int]:
    """How many jobs stand in each state; every state is named."""
    rows = session.execute(select(Job.state, func.count().label("jobs")).group_by(Job.state))
    found = {row.state: row.jobs for row in rows}
    return {str(state): found.get(state, 0) for state in JobState}


def gpu_is_alive(session: Session, *, worker_lost_after_seconds: float, now: datetime, needs: str = "") -> bool:
    """A live GPU worker serves the gpu queues, and has the model that is needed: `auto` jobs go there. Asked at each
    submit, so of SQL and without rows: those carry all that their processes have counted."""
    since = now - timedelta(seconds=worker_lost_after_seconds)
    if needs:
        return any(can_run(models, needs) for models in session.scalars(_live_gpus(), {"since": since}))
    return session.execute(_live_gpus().limit(1), {"since": since}).one_or_none() is not None


@functools.cache
def _live_gpus() -> Select[list[str] | None]:
    return select(Worker.models).where(
        Worker.device == "gpu",
        Worker.stopped_at.is_(None),
        Worker.drained_at.is_(None),
        Worker.seen_at > bindparam("since"),
    )


def image_queue(device: str, priority: str, *, gpu_alive: bool) -> str:
    """The queue for a job: its device (`auto`: a GPU where one is alive, else CPU) and its priority."""
    kind = device if device != "auto" else ("gpu" if gpu_alive else "cpu")
    return f"{kind}.{priority}"


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


@dataclass(frozen=True)
class RunHistory:
    """What finished jobs took, carried over to a job that is expected to take so long; None where there are none."""

    jobs: int
    p50_seconds: float | None
    p95_seconds: float | None


# Of a job of another size the fixed costs weigh otherwise: those up to this many times smaller or larger count, unless
# they are too few to say anything.
LIKE_SIZE = 4.0
FEWEST_OF_LIKE_SIZE = 5


def run_history(session: Session, model: str, *, device: str, expected_seconds: float, sample: int = 200) -> RunHistory:
    """From the newest `sample` successes of the model on `device` (cpu or gpu): what estimates are made of.

    `expected_seconds` is the new job's, by the same arithmetic that every job's was written down with at submit: the
    scale and the size of the picture are in it.
    """
    rows = session.execute(
        select(Job.timings, Job.expected_seconds)
        .where(
            Job.state == JobState.SUCCEEDED,
            Job.model == model,
            Job.running_device == device,
            Job.expected_seconds > 0,
        )
        .order_by(Job.finished_at.desc())
        .limit(sample)
    ).all()
    like = [row for row in rows if 1 / LIKE_SIZE <= row.expected_seconds / expected_seconds <= LIKE_SIZE]
    ratios = sorted(
        sum(v for k, v in (row.timings or {}).items() if k != "queued_seconds" and k.endswith("_seconds"))
        / row.expected_seconds
        for row in (like if len(like) >= FEWEST_OF_LIKE_SIZE else rows)
    )
    if not ratios:
        return RunHistory(0, None, None)
    return RunHistory(
        len(ratios), percentile(ratios, 0.5) * expected_seconds, percentile(ratios, 0.95) * expected_seconds
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest-rank percentile of values in ascending order."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def lapsed_leases(session: Session, *, now: datetime) -> int:
    """How many running jobs have a lease that has passed and have not been given back."""
    lapsed = select(func.count()).where(Job.state == JobState.RUNNING, Job.lease_until < now)
    return session.scalar(lapsed) or 0


def ended_by_state(session: Session, *, since: datetime) -> dict[str, int]:
    """How many jobs ended after `since`, in each final state."""
    rows = session.execute(
        select(Job.state, func.count().label("jobs"))
        .where(Job.state.in_(TERMINAL_STATES), Job.finished_at > since)
        .group_by(Job.state)
    )
    found = {row.state: row.jobs for row in rows}
    return {str(state): found.get(state, 0) for state in JobState if state in TERMINAL_STATES}


@dataclass(frozen=True)
class StorageUsed:
    """What the jobs' pictures take, by their rows: thumbnails and uploads without a job are not counted."""

    jobs: int
    input_bytes: int
    result_bytes: int


def storage_used(session: Session) -> StorageUsed:
    row = session.execute(
        select(
            func.count(Job.id),
            func.coalesce(func.sum(Job.input_bytes), 0),
            func.coalesce(func.sum(Job.result_bytes), 0),
        ).where(Job.swept_at.is_(None))
    ).one()
    # PostgreSQL sums bigints to a numeric.
    return StorageUsed(row[0], int(row[1] or 0), int(row[2] or 0))


@dataclass(frozen=True)
class EndpointLine:
    endpoint: Endpoint
    key_name: str
    pending: int
    abandoned: int


def endpoints(session: Session) -> list[EndpointLine]:
    """Every standing webhook address, newest first, with what is owed to it and what was given up."""
    counted: dict[tuple[str | None, str], int] = {
        (row.endpoint_id, row.state): row.deliveries
        for row in session.execute(
            select(Delivery.endpoint_id, Delivery.state, func.count().label("deliveries"))
            .where(Delivery.state != DeliveryState.DELIVERED, Delivery.endpoint_id.is_not(None))
            .group_by(Delivery.endpoint_id, Delivery.state)
        )
    }
    rows = session.execute(
        select(Endpoint, ApiKey.name).join(ApiKey, ApiKey.id == Endpoint.owner_key_id).order_by(Endpoint.id.desc())
    )
    return [
        EndpointLine(
            endpoint,
            name,
            counted.get((endpoint.id, DeliveryState.PENDING), 0),
            counted.get((endpoint.id, DeliveryState.ABANDONED), 0),
        )
        for endpoint, name in rows
    ]


def endpoint(session: Session, endpoint_id: str) -> Endpoint:
    """The standing address, whoever owns it: the operator's look. Raises NotFound."""
    found = session.get(Endpoint, endpoint_id)
    if found is None:
        raise NotFound("There is no such endpoint.")
    return found


def blob_removals_due(session: Session, *, now: datetime) -> int:
    """How many prefixes of storage should have been emptied by now."""
    return session.scalar(select(func.count()).select_from(BlobRemoval).where(BlobRemoval.due_at < now)) or 0


def deliveries_pending(session: Session) -> int:
    return session.scalar(select(func.count()).where(Delivery.state == DeliveryState.PENDING)) or 0


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


class MaybeOwed(NamedTuple):
    """Of what there may be messages to send; where it is False there are none."""

    jobs: bool
    shards: bool
    deliveries: bool
    renditions: bool


def maybe_owed(session: Session, *, generation: str, resend_after_seconds: float, now: datetime) -> MaybeOwed:
    """The relay's look at each turn, of which most find nothing: one statement, in place of a transaction for each.

    `resend_after_seconds`: no message is sent again sooner. Where it was sent to another `generation` of Redis it is.
    """
    stale = now - min(timedelta(seconds=resend_after_seconds), SENT_AGAIN_EACH)
    asked = {"now": now, "stale": stale, "generation": generation}
    return MaybeOwed(*session.execute(_maybe_owed(), asked).one())


@functools.cache
def _maybe_owed() -> Select[bool, bool, bool, bool]:
    return select(
        exists().where(
            Job.state == JobState.QUEUED,
            or_(
                Job.published_at.is_(None),
                Job.published_generation != bindparam("generation"),
                Job.published_at < bindparam("stale", type_=UtcDateTime),
            ),
        ),
        exists().where(Shard.finished_at.is_(None)),
        exists().where(Delivery.state == DeliveryState.PENDING, Delivery.due_at <= _NOW),
        exists().where(Rendition.finished_at.is_(None)),
    )


def is_any_late(session: Session, *, now: datetime) -> bool:
    """Whether a running job's lease has passed, or a queued one's deadline."""
    return bool(session.scalar(_late(), {"now": now}))


@functools.cache
def _late() -> Select[bool]:
    return select(
        or_(
            exists().where(Job.state == JobState.RUNNING, Job.lease_until < _NOW),
            exists().where(Job.state == JobState.QUEUED, Job.deadline_at <= _NOW),
        )
    )


def unpublished(
    session: Session, *, generation: str | None, resend_after: Mapping[str, float], now: datetime, limit: int = 500
) -> Sequence[Job]:
    """Queued, due jobs with no message believed on its way: never sent, sent to a Redis since wiped, or long ago.

    `resend_after` gives seconds per queue. Each further copy waits twice as long (to a limit), so that a long
    backlog is not flooded with copies. Oldest first.
    """
    stale = [
        and_(
            Job.queue == queue,
            Job.published_count == copies,
            Job.published_at < now - timedelta(seconds=s * 2 ** (copies - 1)),
        )
        for queue, s in resend_after.items()
        for copies in (1, 2, 3, 4)
    ]
    never = Job.published_at.is_(None)
    wiped = Job.published_generation != generation if generation is not None else never
    hourly = Job.published_at < now - SENT_AGAIN_EACH
    return session.scalars(
        select(Job)
        .where(
            Job.state == JobState.QUEUED,
            or_(Job.run_after.is_(None), Job.run_after <= now),
            or_(never, wiped, hourly, *stale),
            # A message for a paused queue finds nothing to claim; `jobs.resume_queue` has them all sent.
            Job.queue.not_in(select(QueuePause.queue)),
        )
        .order_by(Job.id)
        .limit(limit)
    ).all()


def is_finished(job: Job) -> bool:
    return job.state in TERMINAL_STATES
