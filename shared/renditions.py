"""A Rendition's life: ask, due, claim, made, failed. A stored result in another form, made by the chores worker.

Renditions are made from the result, never by the network again, and only when somebody asks: a second format of every
result, or its pyramid of tiles, would be storage that hardly anybody looks at. The rules are those of jobs, smaller:
the row is the truth, the message a hint, and the number of the try decides who may write. What is made lies under the
job's prefix and goes with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import and_, func, or_, select, update
from sqlalchemy.orm import Session

from shared.errors import EnlargerError, NotFound, StaleAttempt, WorkerLost
from shared.models import Job, Rendition
from shared.views import iso

ZOOM = "zoom"
"""A pyramid of tiles, for looking at a result that no browser should load whole."""
FORMATS = ("png", "jpeg", "webp", "tiff", "avif")
KINDS = (*FORMATS, ZOOM)

TILE_PX = 512
"""Side of a pyramid's tiles; they do not overlap."""

MAX_TRIES = 3
AT_ONCE = 2
"""So many are made at a time in the whole deployment: they are long, and webhooks go through the same workers."""
LEASE_SECONDS = 60.0
LEASE_SECONDS_PER_MEGAPIXEL = 2.0
"""Nothing renews this lease: it is several times what the slowest kind takes (AVIF, 0.1 s a megapixel)."""
RETRY_SECONDS = 5.0


@dataclass(frozen=True)
class RenditionClaim:
    job_id: str
    kind: str
    number: int


def ask(session: Session, job: Job, kind: str, *, now: datetime) -> Rendition:
    """The rendition of this job's result: the one there is, or a new one, owed; one that failed is owed again."""
    # Locked first, so that two who ask at once make one row. Raises NotFound where the job has just been deleted.
    if session.scalar(select(Job.id).where(Job.id == job.id).with_for_update()) is None:
        raise NotFound("There is no such job.")
    found = session.get(Rendition, (job.id, kind), populate_existing=True)
    if found is None:
        found = Rendition(job_id=job.id, kind=kind, asked_at=now, number=0, tries_used=0)
        session.add(found)
    elif found.error_code is not None:
        found.asked_at, found.published_at, found.lease_until, found.finished_at = now, None, None, None
        found.tries_used, found.error_code, found.error_detail = 0, None, None
    session.flush()
    return found


def found(session: Session, job_id: str, kind: str) -> Rendition:
    """Raises NotFound where nobody has asked for it."""
    rendition = session.get(Rendition, (job_id, kind))
    if rendition is None:
        raise NotFound("Nobody has asked for this rendition; POST to the job's renditions first.", kind=kind)
    return rendition


def due(session: Session, *, resend_after_seconds: float, now: datetime) -> list[tuple[str, str]]:
    """(job id, kind) of those to send a message for, marked as sent. No more than may be made at once.

    One whose lease has passed is due again, and has failed when its tries are used up.
    """
    given_up = WorkerLost("The chores worker was lost while it made this, more than once.")
    session.execute(
        update(Rendition)
        .where(Rendition.finished_at.is_(None), Rendition.lease_until < now, Rendition.tries_used >= MAX_TRIES)
        .values(finished_at=now, error_code=given_up.code, error_detail=given_up.detail)
    )
    underway = or_(
        Rendition.lease_until >= now,
        and_(
            Rendition.lease_until.is_(None),
            Rendition.published_at >= now - timedelta(seconds=resend_after_seconds),
        ),
    )
    busy = session.scalar(select(func.count()).where(Rendition.finished_at.is_(None), underway)) or 0
    waiting = session.execute(
        select(Rendition.job_id, Rendition.kind)
        .where(
            Rendition.finished_at.is_(None),
            or_(Rendition.lease_until.is_(None), Rendition.lease_until < now),
            or_(
                Rendition.published_at.is_(None),
                Rendition.published_at < now - timedelta(seconds=resend_after_seconds),
                # Tried since, and given back.
                Rendition.lease_until < now,
            ),
        )
        .order_by(Rendition.asked_at)
        .limit(max(0, AT_ONCE - busy))
    ).all()
    for row in waiting:
        session.execute(
            update(Rendition)
            .where(Rendition.job_id == row.job_id, Rendition.kind == row.kind)
            .values(published_at=now, lease_until=None)
        )
    return [(row.job_id, row.kind) for row in waiting]


def not_sent(session: Session, owed: Sequence[tuple[str, str]]) -> None:
    """Takes back what `due` marked: the broker refused, so there is no message to wait for."""
    for job_id, kind in owed:
        session.execute(
            update(Rendition)
            .where(Rendition.job_id == job_id, Rendition.kind == kind, Rendition.finished_at.is_(None))
            .values(published_at=None)
        )


def claim(session: Session, job_id: str, kind: str, *, now: datetime) -> RenditionClaim | None:
    """Takes an owed rendition, counting the try. None where there is nothing to make: a duplicate message, a job that
    is gone or has been swept."""
    job = session.get(Job, job_id)
    if job is None or job.swept_at is not None or job.result_key is None:
        return None
    megapixels = (job.result_width or 0) * (job.result_height or 0) / 1e6
    lease = timedelta(seconds=LEASE_SECONDS + LEASE_SECONDS_PER_MEGAPIXEL * megapixels)
    row = session.execute(
        update(Rendition)
        .where(
            Rendition.job_id == job_id,
            Rendition.kind == kind,
            Rendition.finished_at.is_(None),
            or_(Rendition.lease_until.is_(None), Rendition.lease_until < now),
            Rendition.tries_used < MAX_TRIES,
        )
        .values(number=Rendition.number + 1, tries_used=Rendition.tries_used + 1, lease_until=now + lease)
        .returning(Rendition.number)
    ).one_or_none()
    return None if row is None else RenditionClaim(job_id, kind, row.number)


def made(session: Session, claim: RenditionClaim, *, key: str, bytes: int, now: datetime) -> None:
    """It lies in storage. Raises StaleAttempt where another try owns it, or nobody wants it any more."""
    _write(session, claim, {"key": key, "bytes": bytes, "finished_at": now, "lease_until": None})


def failed(session: Session, claim: RenditionClaim, error: EnlargerError, *, now: datetime) -> None:
    """It could not be made: tried again soon where that can help and tries are left, else failed for good.

    Raises StaleAttempt.
    """
    rendition = session.get(Rendition, (claim.job_id, claim.kind), populate_existing=True)
    if error.retryable and rendition is not None and rendition.tries_used < MAX_TRIES:
        _write(session, claim, {"lease_until": now + timedelta(seconds=RETRY_SECONDS)})
        return
    changes = {"error_code": error.code, "error_detail": error.detail, "finished_at": now, "lease_until": None}
    _write(session, claim, changes)


def _write(session: Session, claim: RenditionClaim, changes: dict[str, Any]) -> None:
    changed = session.execute(
        update(Rendition)
        .where(
            Rendition.job_id == claim.job_id,
            Rendition.kind == claim.kind,
            Rendition.number == claim.number,
            Rendition.finished_at.is_(None),
        )
        .values(**changes)
        .returning(Rendition.number)
    ).one_or_none()
    if changed is None:
        raise StaleAttempt(f"Try {claim.number} does not own the {claim.kind} of {claim.job_id} any more.")


def view(rendition: Rendition) -> dict[str, Any]:
    """The rendition as the contract shows it. JSON values."""
    path = f"/v1/jobs/{rendition.job_id}/renditions/{rendition.kind}"
    status = "made" if rendition.key is not None else "failed" if rendition.error_code is not None else "pending"
    return {
        "kind": rendition.kind,
        "status": status,
        "asked_at": iso(rendition.asked_at),
        "finished_at": iso(rendition.finished_at),
        "bytes": rendition.bytes,
        "url": f"{path}/file" if status == "made" and rendition.kind != ZOOM else None,
        "error": None
        if rendition.error_code is None
        else {"code": rendition.error_code, "detail": rendition.error_detail, "retryable": True},
    }
