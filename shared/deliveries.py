"""A Delivery's life: owed with the event, tried on a schedule, then delivered or visibly abandoned.

    owe --> PENDING --claim--> (a try) --delivered--> DELIVERED
               ^                  |--defer, tries left--> PENDING, due later
               |                  '--defer, none left, or abandon--> ABANDONED
               '--resend, from DELIVERED and ABANDONED

Each write after `claim` names the number of the try: the same fence as a job's attempt. Nothing here sends anything;
`worker.webhooks` does, and reports back. Functions take a session and the present moment and never commit.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Select, bindparam, delete, or_, select, update
from sqlalchemy.orm import Session

from shared.db import new_id
from shared.errors import NotFound, StaleAttempt
from shared.models import Batch, Delivery, DeliveryState, Endpoint, Job
from shared.views import batch_view, job_view

TERMINAL_EVENTS = ("job.succeeded", "job.failed", "job.canceled", "job.expired")
EVENT_TYPES = ("job.started", "job.progress", *TERMINAL_EVENTS, "batch.completed")
TEST_EVENT = "endpoint.test"

# Keep the log of a delivery readable: the oldest tries of a long row of resends are dropped.
TRIES_KEPT = 50

# Retry-After of a receiver is honoured up to this; beyond it the schedule's own longest step is long enough.
LONGEST_RETRY_AFTER_SECONDS = 86400


@dataclass(frozen=True)
class DeliveryClaim:
    """The right to make one try: later writes must name `number`."""

    id: str
    number: int
    url: str
    secret_id: str
    type: str
    payload: Mapping[str, Any]


def signing_secret(secret_key: str, secret_id: str) -> str:
    """The `whsec_...` that signs for an endpoint or a key (Standard Webhooks 1.0: 32 bytes, base64).

    Derived by HMAC-SHA256 from the deployment's secret key, so that no webhook secret lies in SQL.
    """
    digest = hmac.digest(secret_key.encode(), f"webhook:{secret_id}".encode(), hashlib.sha256)
    return "whsec_" + base64.b64encode(digest).decode()


def owe(session: Session, job: Job, event_type: str, now: datetime) -> list[str]:
    """Records one Delivery per address that wants this event of this job; in the caller's transaction.

    The payload is the job as it stands in `session` now. Returns the ids.
    """
    addresses = _wanting(session, job, event_type)
    if not addresses:
        return []
    payload = _payload(event_type, job_view(job), now)
    return [_add(session, job.owner_key_id, address, event_type, payload, now, job_id=job.id) for address in addresses]


def owe_batch(session: Session, batch: Batch, now: datetime) -> list[str]:
    """Records `batch.completed` for the batch's own address and the endpoints that want it."""
    addresses = _addresses(session, batch.owner_key_id, batch.webhook_url, "batch.completed")
    if not addresses:
        return []
    payload = _payload("batch.completed", batch_view(session, batch), now)
    return [
        _add(session, batch.owner_key_id, address, "batch.completed", payload, now, batch_id=batch.id)
        for address in addresses
    ]


def owe_test(session: Session, endpoint: Endpoint, now: datetime) -> str:
    """Records one test event for the endpoint, whatever its filter says. Returns the delivery's id."""
    payload = _payload(TEST_EVENT, {"endpoint_id": endpoint.id}, now)
    return _add(session, endpoint.owner_key_id, _Address.of(endpoint), TEST_EVENT, payload, now)


def wants(session: Session, job: Job, event_type: str) -> bool:
    """Somebody is to be told of this event of this job."""
    return bool(_wanting(session, job, event_type))


def due(session: Session, *, resend_after_seconds: float, now: datetime, limit: int = 200) -> list[str]:
    """Ids of deliveries to be tried now that no message is on its way for, oldest first; marks them as sent."""
    ids = session.scalars(
        select(Delivery.id)
        .where(
            Delivery.state == DeliveryState.PENDING,
            Delivery.due_at <= now,
            or_(Delivery.lease_until.is_(None), Delivery.lease_until < now),
            or_(
                Delivery.published_at.is_(None),
                Delivery.published_at < now - timedelta(seconds=resend_after_seconds),
            ),
        )
        .order_by(Delivery.due_at)
        .limit(limit)
    ).all()
    if ids:
        session.execute(update(Delivery).where(Delivery.id.in_(ids)).values(published_at=now))
    return list(ids)


def clock_jumped(session: Session, seconds: float, *, now: datetime) -> None:
    """The database's clock was set back by -`seconds`, or forward; `now` is what it says since. What is owed keeps its
    schedule, and none waits until a clock set back has caught up. Forward, a delivery is only tried too soon."""
    if seconds >= 0:
        return
    moved = timedelta(seconds=seconds)
    pending = session.scalars(
        select(Delivery).where(
            Delivery.state == DeliveryState.PENDING,
            or_(Delivery.due_at > now, Delivery.lease_until > now, Delivery.published_at > now),
        )
    )
    for delivery in pending:
        session.execute(
            update(Delivery)
            .where(Delivery.id == delivery.id, Delivery.number == delivery.number, Delivery.due_at == delivery.due_at)
            .values(
                due_at=max(delivery.due_at + moved, now) if delivery.due_at > now else delivery.due_at,
                lease_until=delivery.lease_until and delivery.lease_until + moved,
                published_at=None,
            )
        )


def not_sent(session: Session, delivery_ids: Sequence[str]) -> None:
    """Takes back what `due` marked: the broker refused, so there is no message to wait for."""
    session.execute(
        update(Delivery)
        .where(Delivery.id.in_(delivery_ids), Delivery.state == DeliveryState.PENDING)
        .values(published_at=None)
    )


def claim(session: Session, delivery_id: str, *, lease_seconds: float, now: datetime) -> DeliveryClaim | None:
    """Takes a due delivery for one try, by one UPDATE. None where it is not due, taken, done or its endpoint is off."""
    row = session.execute(
        update(Delivery)
        .where(
            Delivery.id == delivery_id,
            Delivery.state == DeliveryState.PENDING,
            Delivery.due_at <= now,
            or_(Delivery.lease_until.is_(None), Delivery.lease_until < now),
        )
        .values(
            number=Delivery.number + 1,
            tries_used=Delivery.tries_used + 1,
            lease_until=now + timedelta(seconds=lease_seconds),
        )
        .returning(
            Delivery.id,
            Delivery.number,
            Delivery.url,
            Delivery.secret_id,
            Delivery.type,
            Delivery.payload,
            Delivery.owner_key_id,
        )
    ).one_or_none()
    if row is None:
        return None
    taken = DeliveryClaim(row.id, row.number, row.url, row.secret_id, row.type, row.payload)
    # Signed by another secret than the key's: owed to a standing endpoint, which may be gone by now.
    if row.secret_id != row.owner_key_id:
        endpoint = session.get(Endpoint, row.secret_id, populate_existing=True)
        if endpoint is None or endpoint.disabled_at is not None:
            abandon(session, taken, error="the endpoint is off", now=now)
            return None
    return taken


def delivered(session: Session, claim: DeliveryClaim, *, status: int, seconds: float, now: datetime) -> None:
    """PENDING -> DELIVERED: the receiver answered 2xx. Raises StaleAttempt."""
    _close_try(session, claim, now, status=status, error=None, seconds=seconds, state=DeliveryState.DELIVERED)


def defer(
    session: Session,
    claim: DeliveryClaim,
    *,
    status: int | None,
    error: str,
    seconds: float,
    schedule_seconds: Sequence[float],
    retry_after_seconds: float | None,
    jitter: float,
    now: datetime,
) -> DeliveryState:
    """The try failed: due again after the schedule's next step, or ABANDONED where the schedule is used up.

    `schedule_seconds[n]` is the wait before try n + 1; `jitter` in [0, 1) lengthens it by up to a tenth, so that many
    deliveries to one receiver do not come back in step. A receiver's Retry-After is waited for where it is longer.
    Raises StaleAttempt.
    """
    tries_used = session.scalar(select(Delivery.tries_used).where(*_held(claim)))
    if tries_used is None:
        raise _stale(claim)
    if tries_used >= len(schedule_seconds):
        _close_try(session, claim, now, status=status, error=error, seconds=seconds, state=DeliveryState.ABANDONED)
        return DeliveryState.ABANDONED
    wait_seconds = schedule_seconds[tries_used] * (1 + jitter / 10)
    if retry_after_seconds is not None:
        wait_seconds = max(wait_seconds, min(retry_after_seconds, LONGEST_RETRY_AFTER_SECONDS))
    due_at = now + timedelta(seconds=wait_seconds)
    _close_try(
        session, claim, now, status=status, error=error, seconds=seconds, state=DeliveryState.PENDING, due_at=due_at
    )
    return DeliveryState.PENDING


def abandon(
    session: Session,
    claim: DeliveryClaim,
    *,
    error: str,
    now: datetime,
    status: int | None = None,
    seconds: float = 0.0,
) -> None:
    """PENDING -> ABANDONED at once: another try cannot help. Raises StaleAttempt."""
    _close_try(session, claim, now, status=status, error=error, seconds=seconds, state=DeliveryState.ABANDONED)


def turn_off_endpoint(session: Session, claim: DeliveryClaim, *, reason: str, now: datetime) -> None:
    """The receiver answered 410 Gone: nothing more is owed to its endpoint."""
    endpoint_id = select(Delivery.endpoint_id).where(Delivery.id == claim.id).scalar_subquery()
    session.execute(
        update(Endpoint)
        .where(Endpoint.id == endpoint_id, Endpoint.disabled_at.is_(None))
        .values(disabled_at=now, disabled_reason=reason)
    )


def turn_on_endpoint(session: Session, endpoint_id: str) -> Endpoint:
    """It is told of events again; what was given up meanwhile stays so until it is resent. Raises NotFound."""
    endpoint = session.get(Endpoint, endpoint_id)
    if endpoint is None:
        raise NotFound("There is no such endpoint.")
    endpoint.disabled_at = endpoint.disabled_reason = None
    session.flush()
    return endpoint


def remove_endpoint(session: Session, endpoint_id: str, *, now: datetime) -> None:
    """Deletes a standing address. What is still owed to it is ABANDONED: its owner does not want it any more.

    A try under way loses its fence. Raises NotFound.
    """
    session.execute(
        update(Delivery)
        .where(Delivery.endpoint_id == endpoint_id, Delivery.state == DeliveryState.PENDING)
        .values(state=DeliveryState.ABANDONED, number=Delivery.number + 1, finished_at=now, lease_until=None)
    )
    session.execute(update(Delivery).where(Delivery.endpoint_id == endpoint_id).values(endpoint_id=None))
    removed = session.execute(delete(Endpoint).where(Endpoint.id == endpoint_id).returning(Endpoint.id))
    if removed.one_or_none() is None:
        raise NotFound("There is no such endpoint.")


def resend(session: Session, delivery_id: str, *, now: datetime) -> Delivery:
    """-> PENDING, due now, with the whole schedule again and the same `webhook-id`. Raises NotFound."""
    changed = session.execute(
        update(Delivery)
        .where(Delivery.id == delivery_id)
        .values(
            state=DeliveryState.PENDING,
            due_at=now,
            finished_at=None,
            tries_used=0,
            # A try under way loses its fence: what it comes to is no longer this delivery's answer.
            number=Delivery.number + 1,
            lease_until=None,
            published_at=None,
        )
        .returning(Delivery.id)
    ).one_or_none()
    if changed is None:
        raise NotFound("There is no such delivery.")
    return session.get_one(Delivery, delivery_id, populate_existing=True)


@dataclass(frozen=True)
class _Address:
    url: str
    secret_id: str
    endpoint_id: str | None
    """None for the address that a job or batch brought along; its key's secret signs for it."""

    @staticmethod
    def of(endpoint: Endpoint) -> _Address:
        return _Address(endpoint.url, endpoint.id, endpoint.id)


def _wanting(session: Session, job: Job, event_type: str) -> list[_Address]:
    own_url = job.webhook_url if event_type in job.webhook_events else None
    return _addresses(session, job.owner_key_id, own_url, event_type)


def _addresses(session: Session, owner_key_id: str, own_url: str | None, event_type: str) -> list[_Address]:
    """`own_url`, where there is one, and the key's standing endpoints that want this event."""
    # Held until the caller commits: an endpoint deleted between this look and the new row, which names it, would
    # fail the whole transaction, and with it a job's end.
    standing = session.scalars(_standing(), {"owner_key_id": owner_key_id})
    own = [_Address(own_url, owner_key_id, None)] if own_url else []
    return own + [_Address.of(endpoint) for endpoint in standing if event_type in endpoint.events]


@functools.cache
def _standing() -> Select[Endpoint]:
    # Put together once: each step of each job asks.
    return (
        select(Endpoint)
        .where(Endpoint.owner_key_id == bindparam("owner_key_id"), Endpoint.disabled_at.is_(None))
        .with_for_update(read=True, key_share=True)
    )


def _payload(event_type: str, data: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    return {"type": event_type, "timestamp": now.isoformat().replace("+00:00", "Z"), "data": dict(data)}


def _add(
    session: Session,
    owner_key_id: str,
    address: _Address,
    event_type: str,
    payload: dict[str, Any],
    now: datetime,
    *,
    job_id: str | None = None,
    batch_id: str | None = None,
) -> str:
    delivery = Delivery(
        id=new_id("msg", now),
        owner_key_id=owner_key_id,
        job_id=job_id,
        batch_id=batch_id,
        endpoint_id=address.endpoint_id,
        url=address.url,
        secret_id=address.secret_id,
        type=event_type,
        payload=payload,
        state=DeliveryState.PENDING,
        created_at=now,
        due_at=now,
    )
    session.add(delivery)
    session.flush()
    return delivery.id


def _held(claim: DeliveryClaim) -> list[Any]:
    return [
        Delivery.id == claim.id,
        Delivery.state == DeliveryState.PENDING,
        Delivery.number == claim.number,
    ]


def _stale(claim: DeliveryClaim) -> StaleAttempt:
    return StaleAttempt(f"Try {claim.number} of {claim.id} does not own the delivery any more.", delivery_id=claim.id)


def _close_try(
    session: Session,
    claim: DeliveryClaim,
    now: datetime,
    *,
    status: int | None,
    error: str | None,
    seconds: float,
    state: DeliveryState,
    due_at: datetime | None = None,
) -> None:
    tries = session.scalar(select(Delivery.tries).where(*_held(claim)))
    if tries is None:
        raise _stale(claim)
    entry = {"at": now.isoformat(), "status": status, "error": error, "seconds": round(seconds, 3)}
    values: dict[str, Any] = {
        "state": state,
        "tries": [*tries, entry][-TRIES_KEPT:],
        "lease_until": None,
        "published_at": None,
        "finished_at": None if state == DeliveryState.PENDING else now,
    }
    if due_at is not None:
        values["due_at"] = due_at
    changed = session.execute(update(Delivery).where(*_held(claim)).values(**values).returning(Delivery.id))
    if changed.one_or_none() is None:
        raise _stale(claim)
