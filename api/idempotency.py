"""Idempotency-Key: the same key and the same request are one job, however often and however much at once it is sent.

    reserve --> in flight --finish, with the job's own INSERT--> answered --> replayed for `idempotency_ttl_seconds`
                    |--free: the request was refused, the key may be used again
                    '--60 s without an end: its process died; the next request takes the reservation over

The reservation is made once the request has been read, so that its hash is known from the start. Taking over gives the
record a new id: the old holder, should it still live, finds nothing to finish and its job is rolled back with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from shared.db import Database, clock, new_id
from shared.errors import DatabaseUnavailable, IdempotencyInProgress, IdempotencyMismatch, InvalidRequest
from shared.models import IdempotencyRecord
from shared.telemetry import log

HEADER = "Idempotency-Key"
LONGEST_KEY = 255
# Longer than any request that lives: fetching a source takes 20 s at most, storing it 30 s.
STALE_SECONDS = 60


@dataclass(frozen=True)
class Replay:
    """The first answer, to be given again."""

    status: int
    body: dict[str, Any]
    location: str | None


@dataclass(frozen=True)
class Reservation:
    """The right to answer for a key. Without a key (`id` None) all of this does nothing."""

    id: str | None

    def finish(self, session: Session, *, status: int, body: dict[str, Any], location: str | None) -> None:
        """Records the answer, in the transaction that makes what it speaks of.

        Raises IdempotencyInProgress where another request has taken the reservation over; roll everything back then.
        """
        if self.id is None:
            return
        changed = session.execute(
            update(IdempotencyRecord)
            .where(IdempotencyRecord.id == self.id, IdempotencyRecord.status.is_(None))
            .values(status=status, body=body, location=location)
            .returning(IdempotencyRecord.id)
        )
        if changed.one_or_none() is None:
            raise IdempotencyInProgress(
                "This request took so long that another one with the same Idempotency-Key has taken its place.",
                retry_after_seconds=1,
            )


def checked_key(key: str | None) -> str | None:
    """The header's value. Raises InvalidRequest where it is empty, too long or not printable ASCII."""
    if key is None:
        return None
    if not key or len(key) > LONGEST_KEY or not (key.isascii() and key.isprintable()):
        raise InvalidRequest(
            f"An {HEADER} has 1 to {LONGEST_KEY} printable ASCII characters.",
            errors=[{"field": HEADER, "message": f"1 to {LONGEST_KEY} printable ASCII characters"}],
        )
    return key


def request_sha256(route: str, asked: dict[str, Any], picture_sha256s: list[str]) -> str:
    """Hash of what makes two requests the same: the route, the options as they were read, the pictures' bytes."""
    text = json.dumps([route, asked, picture_sha256s], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def reserve(database: Database, *, owner_key_id: str, key: str, sha256: str, ttl_seconds: int) -> Reservation | Replay:
    """Takes the key for this request, or finds the answer it was given before.

    Raises IdempotencyMismatch where the key was used for another request, IdempotencyInProgress where the first one
    has not been answered yet.
    """
    try:
        with database.transaction() as session:
            return _reserve(session, owner_key_id, key, sha256, ttl_seconds, clock(session))
    except IntegrityError as error:
        # Two first requests at the same moment: the other one's INSERT was faster.
        raise _in_progress() from error


@contextmanager
def freed_on_error(database: Database, reservation: Reservation) -> Iterator[None]:
    """Gives the key back where the block raises, unless the answer was recorded after all (a lost commit reply)."""
    try:
        yield
    except BaseException:
        if reservation.id is not None:
            _free(database, reservation.id)
        raise


def _reserve(
    session: Session, owner_key_id: str, key: str, sha256: str, ttl_seconds: int, now: datetime
) -> Reservation | Replay:
    record = session.scalar(
        select(IdempotencyRecord).where(IdempotencyRecord.owner_key_id == owner_key_id, IdempotencyRecord.key == key)
    )
    fresh_id = new_id("idem", now)
    if record is None:
        session.execute(
            insert(IdempotencyRecord).values(
                id=fresh_id, owner_key_id=owner_key_id, key=key, created_at=now, request_sha256=sha256
            )
        )
        return Reservation(fresh_id)
    forgotten = record.created_at <= now - timedelta(seconds=ttl_seconds)
    if not forgotten and record.request_sha256 != sha256:
        raise IdempotencyMismatch("This Idempotency-Key was used for another request; take a fresh one.")
    if not forgotten and record.status is not None and record.body is not None:
        return Replay(record.status, record.body, record.location)
    stale_before = now - timedelta(seconds=STALE_SECONDS)
    if not forgotten and record.created_at > stale_before:
        raise _in_progress()
    taken = session.execute(
        update(IdempotencyRecord)
        .where(
            IdempotencyRecord.id == record.id,
            or_(
                IdempotencyRecord.status.is_(None), IdempotencyRecord.created_at <= now - timedelta(seconds=ttl_seconds)
            ),
        )
        .values(id=fresh_id, created_at=now, request_sha256=sha256, status=None, body=None, location=None)
        .returning(IdempotencyRecord.id)
    )
    if taken.one_or_none() is None:
        raise _in_progress()
    return Reservation(fresh_id)


def _free(database: Database, record_id: str) -> None:
    try:
        with database.transaction() as session:
            session.execute(
                delete(IdempotencyRecord).where(IdempotencyRecord.id == record_id, IdempotencyRecord.status.is_(None))
            )
    except DatabaseUnavailable:
        # It goes stale by itself after STALE_SECONDS.
        log.warning("idempotency.not_freed", record_id=record_id)


def _in_progress() -> IdempotencyInProgress:
    return IdempotencyInProgress(
        "The first request with this Idempotency-Key is still being answered.", retry_after_seconds=1
    )
