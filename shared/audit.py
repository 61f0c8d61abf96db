"""What operators did, for whoever asks later: one entry in the transaction that did it, and nothing rewrites it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.db import new_id
from shared.models import AuditEntry

COMMAND_LINE = "command line"
"""In place of a key's name, where it was a command on the service's own machine."""


def record(
    session: Session,
    *,
    key_id: str | None,
    key_name: str,
    action: str,
    subject: str,
    now: datetime,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Writes one entry, in the caller's transaction: what is rolled back was not done. `detail` holds no secrets."""
    session.add(
        AuditEntry(
            id=new_id("audit", now),
            at=now,
            key_id=key_id,
            key_name=key_name,
            action=action,
            subject=subject,
            detail=dict(detail or {}),
        )
    )
    session.flush()


def entries(session: Session, *, before: str | None = None, limit: int = 50) -> Sequence[AuditEntry]:
    """Newest first; `before` is the id of the last entry seen."""
    query = select(AuditEntry).order_by(AuditEntry.id.desc()).limit(limit)
    return session.scalars(query if before is None else query.where(AuditEntry.id < before)).all()
