"""Models of your own, as the workers found them in ENLARGER_MODELS_DIR: how the API, which loads no torch, knows them.

Each worker writes down its own cards beside its row when it starts, and hosts may have different ones: offered is what
any of them has, or had until lately, so that a job is taken also in the minute of a deploy. Who runs it is
`jobs.next_due`'s to say, by `Job.needs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from shared.catalog import ModelCard, OwnFile
from shared.models import OwnModel, Worker, WorkerModel
from shared.telemetry import log

OFFERED_SECONDS = 300.0
"""A model is offered so long after the last worker that has it was heard of: while workers are replaced."""


def offer(
    session: Session, worker_id: str, cards: Sequence[ModelCard], *, worker_lost_after_seconds: float, now: datetime
) -> None:
    """Writes down the cards of a worker whose row has just been written. Where another host's file of the same name is
    a different one, the log says so: results would depend on where a job runs."""
    if not cards:
        return
    session.execute(
        insert(WorkerModel),
        [
            {"worker_id": worker_id, "name": card.name, "sha256": _sha256(card), "card": asdict(card)}
            for card in sorted(cards, key=lambda card: card.name)
        ],
    )
    names = {card.name for card in cards}
    for clash in clashes(session, worker_lost_after_seconds=worker_lost_after_seconds, now=now):
        if clash.name in names:
            log.warning("model.differs_by_host", model=clash.name, detail=clash.told)


def offered(session: Session, *, now: datetime, name: str | None = None) -> tuple[ModelCard, ...]:
    """The card of each model, or only of `name`, that a worker has or had within OFFERED_SECONDS, by name.

    Of hosts with different files of one name, that of the worker which has been there longest: it does not change when
    another comes.
    """
    lately = (Worker.kind == "images", Worker.seen_at > now - timedelta(seconds=OFFERED_SECONDS))
    turn = func.row_number().over(
        partition_by=WorkerModel.name, order_by=(Worker.stopped_at.is_not(None), Worker.started_at, Worker.id)
    )
    ranked = select(WorkerModel.worker_id, WorkerModel.name, turn.label("turn")).join(Worker).where(*lately)
    if name is not None:
        ranked = ranked.where(WorkerModel.name == name)
    first = ranked.subquery()
    rows = session.execute(
        select(WorkerModel.name, WorkerModel.card)
        .join(first, (WorkerModel.worker_id == first.c.worker_id) & (WorkerModel.name == first.c.name))
        .where(first.c.turn == 1)
    )
    cards = {row.name: row.card for row in rows}
    if name is None or name not in cards:
        # Workers of the code before say nothing of what they can run, and write their cards where they always did.
        told = session.scalars(select(Worker.models).where(*lately)).all()
        if any(models is None for models in told):
            before = session.scalars(select(OwnModel)).all()
            cards = {**{row.name: row.card for row in before if name in (None, row.name)}, **cards}
    return tuple(_read(cards[each]) for each in sorted(cards))


@dataclass(frozen=True)
class Clash:
    """Live workers have different files under one name."""

    name: str
    hosts_by_sha256: dict[str, tuple[str, ...]]

    @property
    def told(self) -> str:
        files = (f"{sha256[:12]} on {', '.join(hosts)}" for sha256, hosts in self.hosts_by_sha256.items())
        return f"different files of that name, by sha256: {'; '.join(files)}"


def clashes(session: Session, *, worker_lost_after_seconds: float, now: datetime) -> list[Clash]:
    """Names of which the files of two live workers differ, in order."""
    rows = session.execute(
        select(WorkerModel.name, WorkerModel.sha256, Worker.host)
        .join(Worker)
        .where(Worker.stopped_at.is_(None), Worker.seen_at > now - timedelta(seconds=worker_lost_after_seconds))
        .distinct()
        .order_by(WorkerModel.name, WorkerModel.sha256, Worker.host)
    )
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for row in rows:
        files = found.setdefault(row.name, {})
        files[row.sha256] = (*files.get(row.sha256, ()), row.host)
    return [Clash(name, files) for name, files in found.items() if len(files) > 1]


def by_worker(session: Session) -> dict[str, tuple[str, ...]]:
    """worker -> the names of its own models."""
    found: dict[str, tuple[str, ...]] = {}
    rows = session.execute(select(WorkerModel.worker_id, WorkerModel.name).order_by(WorkerModel.name))
    for row in rows:
        found[row.worker_id] = (*found.get(row.worker_id, ()), row.name)
    return found


def _sha256(card: ModelCard) -> str:
    assert card.weights is not None, "a model of one's own is a file"
    return card.weights.sha256


def _read(card: dict[str, object]) -> ModelCard:
    values: dict[str, object] = {**card, "weights": OwnFile(**card["weights"]), "others": ()}  # type: ignore[arg-type]
    return ModelCard(**values)  # type: ignore[arg-type]
