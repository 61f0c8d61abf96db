"""Models of your own, as the workers found them in ENLARGER_MODELS_DIR: how the API, which loads no torch, knows them.

A worker writes down its cards when it starts. They stay while workers come and go, so that a job is taken for one also
in the minute of a deploy; a card whose file is gone goes with the next worker that starts and looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from shared.catalog import ModelCard, OwnFile
from shared.models import OwnModel


def offer(session: Session, cards: Sequence[ModelCard], *, now: datetime) -> None:
    """Writes the cards of one folder down in place of those there were. The folder is the same for every worker."""
    # Not at the top: the API, which only reads here, would load both dialects with every driver there is.
    from sqlalchemy.dialects import postgresql, sqlite

    session.execute(delete(OwnModel).where(OwnModel.name.not_in([card.name for card in cards])))
    # Workers start together and say the same: by name, so that none waits for one that waits for it.
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    for card in sorted(cards, key=lambda card: card.name):
        told = {"card": asdict(card), "seen_at": now}
        session.execute(
            insert(OwnModel).values(name=card.name, **told).on_conflict_do_update(index_elements=["name"], set_=told)
        )


def offered(session: Session) -> tuple[ModelCard, ...]:
    """Every card written down, by name."""
    rows = session.scalars(select(OwnModel).order_by(OwnModel.name)).all()
    return tuple(_read(row.card) for row in rows)


def _read(card: dict[str, object]) -> ModelCard:
    values: dict[str, object] = {**card, "weights": OwnFile(**card["weights"]), "others": ()}  # type: ignore[arg-type]
    return ModelCard(**values)  # type: ignore[arg-type]
