"""Read-only questions about jobs and all that is kept beside them: one, pages, counts, rates. Nothing here writes.

Those about what waits, and for whom, are in `shared.queueing`.
"""

from __future__ import annotations

import base64
import binascii
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, NamedTuple, TypeVar, TypeVarTuple

from sqlalchemy import Row, Select, and_, bindparam, case, exists, func, or_, select, tuple_
from sqlalchemy.orm import Session, aliased

from shared.db import NOW, UtcDateTime
from shared.errors import InvalidRequest, NotFound
from shared.models import (
    TERMINAL_STATES,
    ApiKey,
    Attempt,
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

SENT_AGAIN_EACH = timedelta(hours=1)
"""The last, unconditional age of a message: however many copies of it were sent, one more goes out."""


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
        exists().where(Delivery.state == DeliveryState.PENDING, Delivery.due_at <= NOW),
        exists().where(Rendition.finished_at.is_(None)),
    )


def is_any_late(session: Session, *, now: datetime) -> bool:
    """Whether a running job's lease has passed, or a queued one's deadline."""
    return bool(session.scalar(_late(), {"now": now}))


@functools.cache
def _late() -> Select[bool]:
    return select(
        or_(
            exists().where(Job.state == JobState.RUNNING, Job.lease_until < NOW),
            exists().where(Job.state == JobState.QUEUED, Job.deadline_at <= NOW),
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
