"""Every change of a job's state. Nothing else writes `jobs.state`.

    QUEUED --claim--> RUNNING --succeed--> SUCCEEDED
      |  ^               |--fail (fatal, or attempts used up)--> FAILED
      |  |-- fail (can be tried again), release, rescue_lost -----'
      |  |<-- retry, from FAILED, CANCELED and EXPIRED
      |--cancel--> CANCELED <--acknowledge_cancel, after cancel--'
      '--expire_overdue--> EXPIRED

Each arrow is one conditional UPDATE on id, state and, once an attempt runs, its number: the fence. A worker that was
believed dead and wakes up names an old number, changes nothing and gets StaleAttempt. A terminal arrow records the
deliveries owed in the same transaction.

Every function takes a session and the present moment (`db.clock`), and never commits: the caller does. If one raises,
the job is unchanged once the caller's transaction has rolled back.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Row,
    Select,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningUpdate

from shared import deliveries, queueing
from shared.db import NOW, UtcDateTime, new_id
from shared.errors import (
    DeadlineExceeded,
    EnlargerError,
    Gone,
    JobNotCancelable,
    JobNotRetryable,
    NotFound,
    QueueFull,
    StaleAttempt,
    WorkerLost,
)
from shared.models import (
    TERMINAL_STATES,
    ApiKey,
    Attempt,
    Batch,
    BlobRemoval,
    Delivery,
    Job,
    JobState,
    QueuePause,
    Shard,
    Worker,
)

RETRYABLE_STATES = (JobState.FAILED, JobState.CANCELED, JobState.EXPIRED)

# A worker that lost its lease may still be uploading; its blobs are looked for once more after this.
LATE_WRITER_SECONDS = 3600


@dataclass(frozen=True)
class JobOptions:
    """What a customer asks for, checked and resolved (`auto` format has become a name; `auto` model may stay)."""

    model: str
    scale: int
    format: str
    queue: str
    routing_reason: str = "asked for by name"
    classify: bool = False
    quality: int = 95
    lossless: bool = False
    metadata_policy: str = "safe"
    alpha: str = "model"
    background: str = "#ffffff"
    device: str = "auto"
    priority: str = "interactive"
    deadline_seconds: int | None = None
    ttl_seconds: int = 7 * 86400
    external_id: str | None = None
    webhook_url: str | None = None
    webhook_events: Sequence[str] = deliveries.TERMINAL_EVENTS
    traceparent: str | None = None
    expected_seconds: float = 0.0
    batch_id: str | None = None
    preview: Mapping[str, Any] | None = None
    needs: str = ""
    """A model of one's own that the job must have: not every worker has it (`Job.needs`)."""


@dataclass(frozen=True)
class JobInput:
    """The stored picture a job starts from. Sizes in px as the picture is seen (orientation applied)."""

    job_id: str
    blob_prefix: str
    key: str
    width: int
    height: int
    format: str
    bytes: int
    sha256: str
    name: str | None = None


@dataclass(frozen=True)
class JobResult:
    """The stored picture an attempt came to."""

    key: str
    width: int
    height: int
    bytes: int
    sha256: str
    labels: Sequence[Mapping[str, Any]] | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    report: Mapping[str, Any] | None = None
    preview: Mapping[str, Any] | None = None
    """Of a preview: what was asked for, and where each model's cell lies."""


@dataclass(frozen=True)
class Claim:
    """The right to work on a job: its id and the attempt's number, which every later write must name."""

    job_id: str
    attempt: int
    announces_progress: bool = False
    """Somebody asked for `job.progress` events."""


def new_job_id(now: datetime) -> str:
    return new_id("job", now)


def blob_prefix(job_id: str) -> str:
    """A fresh prefix for the job's blobs. Its 128 random bits make keys nobody can guess from the job's id."""
    return f"jobs/{job_id}/{secrets.token_hex(16)}"


def submit(
    session: Session,
    *,
    owner_key_id: str,
    options: JobOptions,
    picture: JobInput,
    max_attempts: int,
    max_queued_jobs: int,
    now: datetime,
) -> Job:
    """Writes the row in QUEUED. Once the caller has committed, the job cannot be lost.

    Raises QueueFull where the key has `max_queued_jobs` waiting already.
    """
    waiting = session.scalar(_waiting(), {"owner_key_id": owner_key_id})
    if (waiting or 0) >= max_queued_jobs:
        raise QueueFull(
            f"This key has {waiting} queued jobs; at most {max_queued_jobs} may wait. Try again when some have run.",
            queued_jobs=waiting,
            limit_jobs=max_queued_jobs,
            retry_after_seconds=10,
        )
    job = Job(
        id=picture.job_id,
        owner_key_id=owner_key_id,
        batch_id=options.batch_id,
        external_id=options.external_id,
        model=options.model,
        routing_reason=options.routing_reason,
        scale=options.scale,
        classify=options.classify,
        format=options.format,
        quality=options.quality,
        lossless=options.lossless,
        metadata_policy=options.metadata_policy,
        alpha=options.alpha,
        background=options.background,
        device=options.device,
        priority=options.priority,
        queue=options.queue,
        needs=options.needs,
        output_px=_output_px(options, picture),
        start_tag_px=_start_tag_px(session, owner_key_id, options.queue, options.needs),
        deadline_seconds=options.deadline_seconds,
        deadline_at=_deadline(options.deadline_seconds, now),
        ttl_seconds=options.ttl_seconds,
        webhook_url=options.webhook_url,
        webhook_events=list(options.webhook_events),
        traceparent=options.traceparent,
        expected_seconds=options.expected_seconds,
        preview=None if options.preview is None else dict(options.preview),
        blob_prefix=picture.blob_prefix,
        input_key=picture.key,
        input_width=picture.width,
        input_height=picture.height,
        input_format=picture.format,
        input_bytes=picture.bytes,
        input_sha256=picture.sha256,
        input_name=picture.name,
        state=JobState.QUEUED,
        max_attempts=max_attempts,
        created_at=now,
        queued_at=now,
    )
    session.add(job)
    session.flush()
    return job


@functools.cache
def _waiting() -> Select[int]:
    return select(func.count()).where(Job.owner_key_id == bindparam("owner_key_id"), Job.state == JobState.QUEUED)


def claim(
    session: Session, job_id: str, *, worker_id: str, device: str, lease_seconds: float, now: datetime
) -> Claim | None:
    """Takes a queued job for this worker, counting the attempt before it runs: a job that kills workers runs out.

    One UPDATE, then one INSERT. None where there is nothing to take: a duplicate message, a job that is canceled,
    not due yet, past its deadline or out of attempts, a queue that is paused, a worker that is drained.
    """
    claiming = {
        "claimed_id": job_id,
        "claimer_id": worker_id,
        "claimer_device": device,
        "now": now,
        "leased_until": now + timedelta(seconds=lease_seconds),
    }
    row = session.execute(_claiming(), claiming).one_or_none()
    if row is None:
        return None
    attempt = {"job_id": job_id, "number": row.attempt, "worker_id": worker_id, "device": device, "started_at": now}
    session.execute(insert(Attempt), attempt)
    job = session.get_one(Job, job_id, populate_existing=True)
    deliveries.owe(session, job, "job.started", now)
    return Claim(job_id, row.attempt, announces_progress=deliveries.wants(session, job, "job.progress"))


@functools.cache
def _claiming() -> ReturningUpdate[int]:
    # As `_first_due`, put together once: that takes longer than SQLite takes to run it.
    worker_id: BindParameter[str] = bindparam("claimer_id")
    return (
        update(Job)
        .where(
            Job.id == bindparam("claimed_id"),
            *queueing.due(NOW),
            ~exists().where(Worker.id == worker_id, Worker.drained_at.is_not(None)),
        )
        .values(
            state=JobState.RUNNING,
            attempt=Job.attempt + 1,
            tries_used=Job.tries_used + 1,
            version=Job.version + 1,
            lease_until=bindparam("leased_until", type_=UtcDateTime),
            started_at=func.coalesce(Job.started_at, NOW),
            running_device=bindparam("claimer_device"),
            worker_id=worker_id,
            phase="claimed",
            fraction=0.0,
            bands_done=0,
            bands_total=0,
            eta_seconds=None,
            error_code=None,
            error_detail=None,
            error_retryable=None,
        )
        .returning(Job.attempt)
        # Whoever has the row is given it anew.
        .execution_options(synchronize_session=False)
    )


def next_due(
    session: Session, queues: Sequence[str], *, now: datetime, runs: Collection[str] | None = None
) -> str | None:
    """The id of the job whose turn it is, of the first of `queues` that has one; it is locked, for `claim` to take.

    `runs`: the models that the worker can run; None: whatever is asked for. Within a queue the least start tag comes
    first (`queueing.start_tag_px`): keys have equal shares, whoever hands in most. One SELECT for each queue looked at,
    however long it is, and a few more, as many however many jobs there are, where what is next is not for this worker.
    Jobs that another transaction holds are passed over, so nobody waits for anybody; where all that are due are held,
    it is the first of those, and `claim` waits for it: its message may be being marked as sent at this very moment, and
    nobody else would come for it.
    """
    for queue in queues:
        first = session.execute(_first_due((queue,), locks=True), {"now": now}).one_or_none()
        if first is None:
            continue
        found = first.id if _suits(first, runs) else _next_that_suits(session, queue, runs or (), now)
        if found is not None:
            return found
    held = session.execute(_first_due(tuple(queues)), {"now": now}).one_or_none()
    if held is None or _suits(held, runs):
        return None if held is None else held.id
    heads = (head for queue in queues for head in queueing.heads(session, queue, _needs_met(runs or ()), now=now))
    return next((head.id for head in heads if _suits(head, runs)), None)


def is_any_due(session: Session, queues: Sequence[str], *, now: datetime) -> bool:
    """Whether a job of these queues waits for a worker, whatever it can run. One SELECT."""
    return session.execute(_first_due(tuple(queues)), {"now": now}).one_or_none() is not None


def _next_that_suits(session: Session, queue: str, runs: Collection[str], now: datetime) -> str | None:
    """As `next_due`, of one queue whose first job this worker cannot run: the first job of those with each need that
    it meets, in their order."""
    beyond = True
    while beyond:
        beyond = False
        for head in queueing.heads(session, queue, _needs_met(runs), now=now):
            of_need = _first_due((queue,), needs=head.needs, locks=True)
            first = session.execute(of_need, {"now": now}).one_or_none()
            if first is not None and _suits(first, runs):
                return str(first.id)
            if first is not None and not first.needs:
                _set_aside(session, queue, runs)
                beyond = True
                break
    return None


def _needs_met(runs: Collection[str]) -> tuple[str, ...]:
    return ("", *sorted(runs))


def _suits(row: Row[str, str, str], runs: Collection[str] | None) -> bool:
    """Whether a worker with these models can run the job of this row (id, model, needs)."""
    return runs is None or (row.model in runs and (not row.needs or row.needs in runs))


def _set_aside(session: Session, queue: str, runs: Collection[str], limit: int = 100) -> None:
    """Jobs that were thought to suit every worker, and do not suit this one, need their model from now on: of each it
    is found out once."""
    beyond = (
        select(Job.id)
        .where(Job.state == JobState.QUEUED, Job.queue == queue, Job.needs == "", Job.model.not_in(runs))
        .order_by(Job.start_tag_px, Job.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    found = session.scalars(beyond).all()
    session.execute(update(Job).where(Job.id.in_(found)).values(needs=Job.model, version=Job.version + 1))


def heartbeat(session: Session, claim: Claim, *, lease_seconds: float, now: datetime) -> bool:
    """Renews the lease. One UPDATE. True where the customer has asked to cancel.

    Call it only when the attempt has made progress: a lease that a hung worker renews protects nobody.
    Raises StaleAttempt.
    """
    return _touch(session, claim, {"lease_until": now + timedelta(seconds=lease_seconds)})


def progress(
    session: Session,
    claim: Claim,
    *,
    phase: str,
    fraction: float,
    bands_done: int,
    bands_total: int,
    eta_seconds: float | None,
    lease_seconds: float,
    now: datetime,
    announce: bool = False,
) -> bool:
    """Renews the lease and writes how far the attempt has come. One UPDATE. True where cancel was asked for.

    `announce` owes a `job.progress` event to those who asked for it; the caller decides how often.
    Raises StaleAttempt.
    """
    canceling = _touch(
        session,
        claim,
        {
            "lease_until": now + timedelta(seconds=lease_seconds),
            "phase": phase,
            "fraction": fraction,
            "bands_done": bands_done,
            "bands_total": bands_total,
            "eta_seconds": eta_seconds,
            "version": Job.version + 1,
        },
    )
    if announce and claim.announces_progress:
        job = session.get_one(Job, claim.job_id, populate_existing=True)
        deliveries.owe(session, job, "job.progress", now)
    return canceling


def route(session: Session, claim: Claim, *, model: str, reason: str) -> None:
    """A job that asked for `auto` gets its model. One UPDATE. Raises StaleAttempt."""
    _touch(session, claim, {"model": model, "routing_reason": reason, "version": Job.version + 1})


def split(session: Session, claim: Claim, terms: Mapping[str, Any]) -> None:
    """The attempt is going to share the job with other workers (`shared.shards`). One UPDATE. Raises StaleAttempt."""
    _touch(session, claim, {"split": dict(terms)})


def succeed(session: Session, claim: Claim, result: JobResult, *, now: datetime) -> None:
    """RUNNING -> SUCCEEDED, with the result. Raises StaleAttempt, also where cancel was asked for in the meantime."""
    _finish(
        session,
        [*_held(claim), Job.cancel_requested_at.is_(None)],
        claim,
        JobState.SUCCEEDED,
        now,
        outcome="succeeded",
        phase="done",
        fraction=1.0,
        bands_done=Job.bands_total,
        eta_seconds=0.0,
        result_key=result.key,
        result_width=result.width,
        result_height=result.height,
        result_bytes=result.bytes,
        result_sha256=result.sha256,
        labels=None if result.labels is None else [dict(label) for label in result.labels],
        timings=dict(result.timings),
        warnings=list(result.warnings),
        report=None if result.report is None else dict(result.report),
        preview=None if result.preview is None else dict(result.preview),
    )


def fail(
    session: Session,
    claim: Claim,
    error: EnlargerError,
    *,
    retry_delay_seconds: float,
    now: datetime,
    queue: str | None = None,
) -> JobState:
    """RUNNING -> QUEUED where another attempt can help and is left, else -> FAILED. Returns the new state.

    The wait before the next attempt doubles with each. `queue` moves the job to another device's queue and waits
    not at all: a picture that does not fit a GPU has not failed, it has come to the wrong place.
    A job that is being canceled is CANCELED instead: nobody waits for another attempt.
    Raises StaleAttempt.
    """
    job = _held_job(session, claim)
    if job.cancel_requested_at is not None:
        acknowledge_cancel(session, claim, now=now)
        return JobState.CANCELED
    if not error.retryable or (job.tries_used >= job.max_attempts and queue is None):
        _finish(
            session,
            _held(claim),
            claim,
            JobState.FAILED,
            now,
            outcome="retryable" if error.retryable else "fatal",
            **_error_columns(error),
        )
        return JobState.FAILED
    delay_seconds = 0.0 if queue else retry_delay_seconds * 2 ** (job.tries_used - 1)
    changes: dict[str, Any] = {"run_after": now + timedelta(seconds=delay_seconds)}
    if queue:
        tag = _start_tag_px(session, job.owner_key_id, queue, job.needs)
        changes |= {"queue": queue, "start_tag_px": tag, "tries_used": Job.tries_used - 1}
    _requeue(session, _held(claim), claim, now, "retryable", error, changes)
    return JobState.QUEUED


def release(
    session: Session,
    claim: Claim,
    *,
    now: datetime,
    error: EnlargerError | None = None,
    delay_seconds: float = 0.0,
) -> None:
    """RUNNING -> QUEUED for a reason that is not the job's: the attempt does not count against it.

    The worker is asked to stop, or a server it depends on does not answer; that `error` goes into the attempt's row,
    and the next attempt waits `delay_seconds`. A job that is being canceled is CANCELED instead, as in `fail`. Raises
    StaleAttempt.
    """
    if _held_job(session, claim).cancel_requested_at is not None:
        acknowledge_cancel(session, claim, now=now)
        return
    run_after = now + timedelta(seconds=delay_seconds) if delay_seconds else None
    changes = {"run_after": run_after, "tries_used": Job.tries_used - 1}
    _requeue(session, _held(claim), claim, now, "released", error, changes)


def keep_trace(session: Session, claim: Claim, trace: Mapping[str, Any]) -> None:
    """Puts what the attempt looked like from within into its row, whatever it has come to. One UPDATE."""
    session.execute(
        update(Attempt).where(Attempt.job_id == claim.job_id, Attempt.number == claim.attempt).values(trace=dict(trace))
    )


def acknowledge_cancel(session: Session, claim: Claim, *, now: datetime) -> None:
    """RUNNING -> CANCELED: the worker has seen the request at a band and stopped. Raises StaleAttempt."""
    _finish(
        session,
        [*_held(claim), Job.cancel_requested_at.is_not(None)],
        claim,
        JobState.CANCELED,
        now,
        outcome="canceled",
        phase="canceled",
    )


def cancel(session: Session, job_id: str, *, now: datetime) -> Job:
    """QUEUED -> CANCELED at once; a RUNNING job is asked to stop at its next band (asking twice is harmless).

    Raises JobNotCancelable where it has ended, NotFound where there is none.
    """
    # Locked first: a worker that gives the job back between the two UPDATEs would slip past both.
    if session.scalar(select(Job.id).where(Job.id == job_id).with_for_update()) is None:
        raise NotFound("There is no such job.")
    if _finish_unclaimed(session, [Job.id == job_id, Job.state == JobState.QUEUED], JobState.CANCELED, now):
        return session.get_one(Job, job_id, populate_existing=True)
    asked = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.state == JobState.RUNNING)
        .values(
            cancel_requested_at=func.coalesce(Job.cancel_requested_at, literal(now, UtcDateTime)),
            version=Job.version + 1,
        )
        .returning(Job.id)
    ).one_or_none()
    job = session.get_one(Job, job_id, populate_existing=True)
    if asked is None:
        raise JobNotCancelable(
            f"The job is {job.state} already; only queued and running jobs can be canceled.", status_now=job.state
        )
    return job


def retry(session: Session, job_id: str, *, now: datetime) -> Job:
    """FAILED, CANCELED or EXPIRED -> QUEUED with all its attempts again and a new deadline.

    Raises JobNotRetryable in any other state, Gone where the input has been swept, NotFound where there is no job.
    """
    job = session.scalar(select(Job).where(Job.id == job_id).with_for_update())
    if job is None:
        raise NotFound("There is no such job.")
    if job.state not in RETRYABLE_STATES:
        raise JobNotRetryable(
            f"The job is {job.state}; only failed, canceled and expired jobs can be retried.", status_now=job.state
        )
    if job.swept_at is not None:
        raise Gone("The picture handed in has been swept; hand it in again.", swept_at=job.swept_at.isoformat())
    changed = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.state == job.state, Job.attempt == job.attempt, Job.swept_at.is_(None))
        .values(
            state=JobState.QUEUED,
            version=Job.version + 1,
            tries_used=0,
            # It has had its turn: a thousand retries by hand stand where a thousand new jobs would.
            start_tag_px=_start_tag_px(session, job.owner_key_id, job.queue, job.needs),
            run_after=None,
            lease_until=None,
            cancel_requested_at=None,
            queued_at=now,
            started_at=None,
            finished_at=None,
            expires_at=None,
            deadline_at=_deadline(job.deadline_seconds, now),
            phase="queued",
            fraction=0.0,
            bands_done=0,
            bands_total=0,
            eta_seconds=None,
            published_at=None,
            published_count=0,
            error_code=None,
            error_detail=None,
            error_retryable=None,
        )
        .returning(Job.id)
    ).one_or_none()
    if changed is None:
        raise JobNotRetryable("The job changed at this very moment; look at it again.")
    if job.batch_id is not None:
        session.execute(update(Batch).where(Batch.id == job.batch_id).values(remaining=Batch.remaining + 1))
    session.refresh(job)
    return job


def pause_queue(session: Session, queue: str, *, now: datetime) -> bool:
    """Nothing more is claimed from this queue; what runs goes on. False where it was paused already."""
    if session.get(QueuePause, queue) is not None:
        return False
    session.add(QueuePause(queue=queue, paused_at=now))
    session.flush()
    return True


def resume_queue(session: Session, queue: str) -> bool:
    """Ends a pause. False where there was none.

    Messages that came meanwhile found nothing to claim and are gone, so the relay is to send them all again.
    """
    ended = session.execute(delete(QueuePause).where(QueuePause.queue == queue).returning(QueuePause.queue))
    if ended.one_or_none() is None:
        return False
    session.execute(
        update(Job).where(Job.state == JobState.QUEUED, Job.queue == queue).values(published_at=None, published_count=0)
    )
    return True


def give_message_back(session: Session, queues: Sequence[str], *, now: datetime) -> bool:
    """A message of these queues has come to a worker that may take no job: the relay is to send another.

    False where no job that waits is marked as sent yet: the message has overtaken its own mark, and the caller is to
    ask again.

    Messages of a device's queues are worth the same, so any job that waits with one may be the one that is sent again;
    one that is about to be sent anyway may not, or two messages given back would come back as one.
    """
    given_back = _first_due(tuple(queues)).where(Job.published_at.is_not(None)).with_for_update()
    changed = session.execute(
        update(Job)
        .where(Job.id == session.scalar(given_back, {"now": now}), Job.state == JobState.QUEUED)
        .values(published_at=None)
        .returning(Job.id)
    ).one_or_none()
    return changed is not None


def reroute(
    session: Session, source: str, target: str, *, now: datetime, needs: str = "", limit: int = 100
) -> list[str]:
    """Jobs of device `auto` and with these needs that wait in one queue wait in another from now on: who served the
    first is gone, or who would serve the second is back. Returns their ids.

    Those that have been tried stay off GPUs: memory may have run out there. A paused queue keeps its jobs.
    """
    conditions = [*queueing.due(now), Job.queue == source, Job.needs == needs, Job.device == "auto"]
    if target.startswith("gpu."):
        conditions.append(Job.attempt == 0)
    found = session.execute(
        select(Job.id, Job.owner_key_id)
        .where(*conditions)
        .order_by(Job.start_tag_px, Job.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    # Key after key, as every relay does: two of them never wait for each other.
    for row in sorted(found, key=lambda row: str(row.owner_key_id)):
        session.execute(
            update(Job)
            .where(Job.id == row.id, Job.state == JobState.QUEUED, Job.queue == source)
            .values(
                queue=target,
                start_tag_px=_start_tag_px(session, row.owner_key_id, target, needs),
                version=Job.version + 1,
                published_at=None,
                published_count=0,
            )
        )
    return [row.id for row in found]


def rescue_lost(session: Session, *, retry_delay_seconds: float, now: datetime, limit: int = 100) -> list[str]:
    """Gives back jobs whose lease has passed: RUNNING -> QUEUED, FAILED (attempts used up) or CANCELED (asked for).

    Returns their ids. Rows that another transaction holds are left for the next round: a worker that renews or ends
    its attempt at this moment is not lost, and two rescuers share the work.
    """
    lapsed = session.execute(
        select(
            Job.id,
            Job.batch_id,
            Job.attempt,
            Job.tries_used,
            Job.max_attempts,
            Job.cancel_requested_at,
            Job.worker_id,
        )
        .where(Job.state == JobState.RUNNING, Job.lease_until < now)
        .order_by(Job.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    for row in _in_batch_order(lapsed):
        lost = Claim(row.id, row.attempt)
        still_lost = [*_held(lost), Job.lease_until < now]
        error = WorkerLost(
            f"Worker {row.worker_id} made no progress until its lease passed (attempt {row.attempt}).",
            worker=row.worker_id,
        )
        if row.cancel_requested_at is not None:
            _finish(session, still_lost, lost, JobState.CANCELED, now, outcome="lost", phase="canceled")
        elif row.tries_used >= row.max_attempts:
            _finish(session, still_lost, lost, JobState.FAILED, now, outcome="lost", **_error_columns(error))
        else:
            # The wait that follows a lost worker is the lease itself; only a second loss suggests a bad job.
            delay_seconds = 0.0 if row.tries_used == 1 else retry_delay_seconds
            changes = {"run_after": now + timedelta(seconds=delay_seconds)}
            _requeue(session, still_lost, lost, now, "lost", error, changes)
    return [row.id for row in lapsed]


def clock_jumped(session: Session, seconds: float, *, lease_seconds: float, now: datetime) -> None:
    """The database's clock was set by `seconds` (negative: back); `now` is what it says since. Moves with it what was
    written by the old one: leases keep what was left of them and last `lease_seconds` at least, and no wait is longer
    than it was.

    Without it a clock set forward takes every running job from its worker, and one set back leaves the jobs of a dead
    worker alone until it has caught up.
    """
    moved = timedelta(seconds=seconds)
    fresh = now + timedelta(seconds=lease_seconds)
    running = session.execute(select(Job.id, Job.attempt, Job.lease_until).where(Job.state == JobState.RUNNING)).all()
    for row in running:
        session.execute(
            update(Job)
            # Renewed in the meantime: that was by the new clock.
            .where(*_held(Claim(row.id, row.attempt)), Job.lease_until == row.lease_until)
            .values(lease_until=max(row.lease_until + moved, fresh))
        )
    if seconds < 0:
        waiting = [Job.state == JobState.QUEUED]
        session.execute(update(Job).where(*waiting, Job.run_after > now).values(run_after=now))
        # As if never sent: when it was, is not known any more.
        session.execute(update(Job).where(*waiting, Job.published_at > now).values(published_at=None))


def expire_overdue(session: Session, *, now: datetime, limit: int = 100) -> list[str]:
    """QUEUED -> EXPIRED for jobs whose deadline passed before a worker could start them. Returns their ids."""
    overdue = session.execute(
        select(Job.id, Job.batch_id)
        .where(Job.state == JobState.QUEUED, Job.deadline_at <= now)
        .order_by(Job.deadline_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    error = DeadlineExceeded("The deadline passed before a worker could start the job.")
    return [
        row.id
        for row in _in_batch_order(overdue)
        if _finish_unclaimed(
            session,
            [Job.id == row.id, Job.state == JobState.QUEUED, Job.deadline_at <= now],
            JobState.EXPIRED,
            now,
            **_error_columns(error),
        )
    ]


def remove(session: Session, job_id: str, *, now: datetime) -> str:
    """Deletes the job with its attempts and deliveries, and owes the removal of its blobs. Returns their prefix.

    A worker in the middle of it finds no row at its next write and stops. Raises NotFound.
    """
    row = session.execute(
        select(Job.blob_prefix, Job.state, Job.batch_id, Job.split).where(Job.id == job_id).with_for_update()
    ).one_or_none()
    if row is None:
        raise NotFound("There is no such job.")
    session.execute(delete(Delivery).where(Delivery.job_id == job_id))
    session.execute(delete(Attempt).where(Attempt.job_id == job_id))
    session.execute(delete(Job).where(Job.id == job_id))
    if row.batch_id is not None:
        session.execute(update(Batch).where(Batch.id == row.batch_id).values(total=Batch.total - 1))
        if row.state not in TERMINAL_STATES:
            _count_down(session, row.batch_id, now)
    owe_blob_removal(session, row.blob_prefix, now=now)
    # Shards are worked on also while their job waits for another attempt.
    if row.state == JobState.RUNNING or row.split is not None:
        owe_blob_removal(session, row.blob_prefix, now=now + timedelta(seconds=LATE_WRITER_SECONDS))
    prefix: str = row.blob_prefix
    return prefix


def sweep_expired(session: Session, *, now: datetime, limit: int = 100) -> list[str]:
    """Lets go of the pictures of finished jobs past `expires_at`; their rows stay. Returns the jobs' ids."""
    rows = session.execute(
        update(Job)
        .where(
            Job.id.in_(
                select(Job.id)
                .where(Job.expires_at <= now, Job.swept_at.is_(None), Job.state.in_(TERMINAL_STATES))
                .limit(limit)
            ),
            Job.swept_at.is_(None),
            Job.state.in_(TERMINAL_STATES),
        )
        .values(swept_at=now, version=Job.version + 1)
        .returning(Job.id, Job.blob_prefix)
    ).all()
    for row in rows:
        owe_blob_removal(session, row.blob_prefix, now=now)
    return [row.id for row in rows]


def owe_blob_removal(session: Session, prefix: str, *, now: datetime) -> None:
    """Records that every blob under `prefix` is to be deleted at `now` or later; the chores worker does it."""
    session.add(BlobRemoval(id=new_id("rm", now), prefix=prefix, due_at=now))
    session.flush()


def _output_px(options: JobOptions, picture: JobInput) -> int:
    px, networks = picture.width * picture.height, 1
    if options.preview is not None:
        px = options.preview["crop"]["width"] * options.preview["crop"]["height"]
        networks = len(options.preview["models"])
    return px * options.scale**2 * networks


def _start_tag_px(session: Session, owner_key_id: str, queue: str, needs: str) -> int:
    """Where a job of this key that enters the queue now is to stand."""
    # A key's jobs enter one after the other: two that saw the same ones before them would stand at one place, and who
    # hands in over many connections would have many shares. (FOR NO KEY UPDATE: foreign keys do not wait for it.
    # On SQLite this transaction is the only one that writes.)
    if session.get_bind().dialect.name != "sqlite":
        session.execute(select(ApiKey.id).where(ApiKey.id == owner_key_id).with_for_update(key_share=True))
    return queueing.start_tag_px(session, owner_key_id, queue, needs)


@functools.cache
def _first_due(queues: tuple[str, ...], *, needs: str | None = None, locks: bool = False) -> Select[str, str, str]:
    """(id, model, needs) of the job whose turn it is `now`, of all or of those that need this. `locks`: of those that
    nobody else holds, and held from now on."""
    of_queues = [Job.queue.in_(queues), *queueing.due(NOW), *([] if needs is None else [Job.needs == needs])]
    first = select(Job.id, Job.model, Job.needs).where(*of_queues).order_by(Job.start_tag_px, Job.id).limit(1)
    return first.with_for_update(skip_locked=True) if locks else first


def _in_batch_order(rows: Sequence[Row[*tuple[Any, ...]]]) -> list[Row[*tuple[Any, ...]]]:
    """Rows of jobs in the order in which their batches are to be counted down.

    A transaction that ends many jobs holds many batches; two that take them in one order never wait for each other.
    """
    return sorted(rows, key=lambda row: (row.batch_id or "", row.id))


def _deadline(deadline_seconds: int | None, now: datetime) -> datetime | None:
    return None if deadline_seconds is None else now + timedelta(seconds=deadline_seconds)


def _held(claim: Claim) -> list[ColumnElement[bool]]:
    """The fence: the claim's attempt still owns the job."""
    return [Job.id == claim.job_id, Job.state == JobState.RUNNING, Job.attempt == claim.attempt]


def _held_job(session: Session, claim: Claim) -> Job:
    """The job as it stands, locked, so that no cancel comes between a look and the write. Raises StaleAttempt."""
    job = session.scalar(select(Job).where(*_held(claim)).with_for_update().execution_options(populate_existing=True))
    if job is None:
        raise _stale(claim)
    return job


def _stale(claim: Claim) -> StaleAttempt:
    return StaleAttempt(
        f"Attempt {claim.attempt} of {claim.job_id} does not own the job any more.",
        job_id=claim.job_id,
        attempt=claim.attempt,
    )


def _touch(session: Session, claim: Claim, values: Mapping[str, Any]) -> bool:
    row = session.execute(
        update(Job).where(*_held(claim)).values(**values).returning(Job.cancel_requested_at)
    ).one_or_none()
    if row is None:
        raise _stale(claim)
    return row.cancel_requested_at is not None


def _error_columns(error: EnlargerError) -> dict[str, Any]:
    return {
        "error_code": error.code,
        "error_detail": error.detail,
        "error_retryable": error.retryable,
        "phase": "failed",
    }


def _requeue(
    session: Session,
    condition: Sequence[ColumnElement[bool]],
    claim: Claim,
    now: datetime,
    outcome: str,
    error: EnlargerError | None,
    changes: Mapping[str, Any],
) -> None:
    """RUNNING -> QUEUED. Its message is gone with the attempt, so the relay sends another once `run_after` is past."""
    session.execute(
        update(Job)
        .where(*condition)
        .values(
            state=JobState.QUEUED,
            version=Job.version + 1,
            queued_at=now,
            lease_until=None,
            worker_id=None,
            phase="queued",
            fraction=0.0,
            bands_done=0,
            bands_total=0,
            eta_seconds=None,
            published_at=None,
            published_count=0,
            **changes,
        )
        .returning(Job.id)
    ).one()  # Callers hold the row's lock and have seen that `condition` is true.
    _close_attempt(session, claim, now, outcome, error)


def _finish(
    session: Session,
    condition: Sequence[ColumnElement[bool]],
    claim: Claim,
    state: JobState,
    now: datetime,
    *,
    outcome: str,
    **columns: Any,
) -> None:
    """RUNNING -> a final state, with its attempt closed and its deliveries owed. Raises StaleAttempt."""
    if not _finish_unclaimed(session, condition, state, now, **columns):
        raise _stale(claim)
    _close_attempt(
        session,
        claim,
        now,
        outcome,
        error_code=columns.get("error_code"),
        error_detail=columns.get("error_detail"),
        timings=columns.get("timings"),
    )


def _finish_unclaimed(
    session: Session, condition: Sequence[ColumnElement[bool]], state: JobState, now: datetime, **columns: Any
) -> bool:
    """-> a final state by one UPDATE; where it changed the row, what is owed is recorded. False where it did not."""
    row = session.execute(
        update(Job)
        .where(*condition)
        .values(
            **{
                "state": state,
                "version": Job.version + 1,
                "finished_at": now,
                "lease_until": None,
                "run_after": None,
                "eta_seconds": None,
                "phase": str(state),
                **columns,
            }
        )
        .returning(Job.id)
    ).one_or_none()
    if row is None:
        return False
    job = session.get_one(Job, row.id, populate_existing=True)
    job.expires_at = now + timedelta(seconds=job.ttl_seconds)
    if job.split is not None:
        _let_go_of_shards(session, job, now)
    session.flush()
    deliveries.owe(session, job, f"job.{state}", now)
    if job.batch_id is not None:
        _count_down(session, job.batch_id, now)
    return True


def parts_prefix(blob_prefix: str) -> str:
    """What the keys of a job's stored parts, one for each shard, begin with."""
    return f"{blob_prefix}/parts/"


def _let_go_of_shards(session: Session, job: Job, now: datetime) -> None:
    """The job has ended: whoever still works on a shard of it finds no row at the next write, and stops."""
    job.split = None
    session.execute(delete(Shard).where(Shard.job_id == job.id))
    for late_seconds in (0, LATE_WRITER_SECONDS):
        owe_blob_removal(session, parts_prefix(job.blob_prefix), now=now + timedelta(seconds=late_seconds))


def _count_down(session: Session, batch_id: str, now: datetime) -> None:
    batch = session.scalars(
        update(Batch).where(Batch.id == batch_id).values(remaining=Batch.remaining - 1).returning(Batch),
        execution_options={"populate_existing": True},
    ).one()
    if batch.remaining == 0:
        deliveries.owe_batch(session, batch, now)


def _close_attempt(
    session: Session,
    claim: Claim,
    now: datetime,
    outcome: str,
    error: EnlargerError | None = None,
    *,
    error_code: str | None = None,
    error_detail: str | None = None,
    timings: Mapping[str, float] | None = None,
) -> None:
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == claim.job_id, Attempt.number == claim.attempt)
        .values(
            finished_at=now,
            outcome=outcome,
            error_code=error.code if error else error_code,
            error_detail=error.detail if error else error_detail,
            timings=None if timings is None else dict(timings),
        )
    )
