"""A Shard's life: begin, claim, progress, made, give_back. A large picture shared by many workers.

One attempt holds the job as any other is held, by its lease. It plans the bands, cuts them into Shards, works on those
nobody else has, and joins the parts when all are made. Other image workers help: each takes one Shard at a time. So a
worker that is lost costs its Shard: a helper's is taken by somebody else when its lease has passed, and when the one is
lost that held the job, the next attempt finds every part that was made. One worker alone, without a broker, gets there
too: messages only bring helpers.

The rules are those of jobs, smaller: the row is the truth, the message a hint, and the number of the try decides who
may write. Shards are there while their job lives (`shared.jobs` lets go of them); a write that finds no live job raises
StaleAttempt, which is how a cancel, an end or a deletion reaches a helper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, exists, func, literal, or_, select, update
from sqlalchemy.orm import Session

from shared import jobs
from shared.db import UtcDateTime
from shared.errors import EnlargerError, StaleAttempt
from shared.models import Job, JobState, QueuePause, Shard, Worker

Bands = Sequence[Sequence[Sequence[int]]]
"""Of each band its tiles; of each tile x, y, width and height of what it keeps, then of what it reads, in input px."""


@dataclass(frozen=True)
class ShardClaim:
    """The right to work on a shard."""

    job_id: str
    position: int
    number: int
    bands: Bands
    """What is to be computed."""

    @property
    def part_name(self) -> str:
        """The last piece of the part's key. It names the try: a late worker must not overwrite the winner's part."""
        return f"{self.position:04}-{self.number}.part"


@dataclass(frozen=True)
class Standing:
    """How far the shards of one job have come, all together."""

    shards: int
    shards_made: int
    tiles_done: int
    tiles_total: int
    bands_done: int
    bands_total: int
    lost: int | None
    """Position of a shard that has cost a worker with each of its tries; nobody may take it any more."""

    @property
    def all_made(self) -> bool:
        return self.shards_made == self.shards > 0


def begin(session: Session, claim: jobs.Claim, pieces: Sequence[Bands], terms: Mapping[str, Any]) -> None:
    """Shares the job that `claim` holds: one shard for each of `pieces`, from the top. Raises StaleAttempt."""
    jobs.split(session, claim, terms)
    session.add_all(
        Shard(
            job_id=claim.job_id,
            position=position,
            bands=[[list(tile) for tile in band] for band in bands],
            tiles_total=sum(len(band) for band in bands),
        )
        for position, bands in enumerate(pieces)
    )
    session.flush()


def begin_again(session: Session, claim: jobs.Claim, terms: Mapping[str, Any]) -> None:
    """Every shard is to be made anew, on other `terms`; whoever works on one is late. Raises StaleAttempt."""
    jobs.split(session, claim, terms)
    session.execute(
        update(Shard)
        .where(Shard.job_id == claim.job_id)
        .values(
            number=Shard.number + 1,
            tries_used=0,
            lease_until=None,
            published_at=None,
            tiles_done=0,
            bands_done=0,
            finished_at=None,
            error_code=None,
        )
    )


def claim(
    session: Session,
    held: jobs.Claim,
    *,
    worker_id: str,
    max_tries: int,
    lease_seconds: float,
    now: datetime,
    below: int | None = None,
) -> ShardClaim | None:
    """A free shard for the attempt that holds the job, counting the try; the one under the shard `below`, which this
    worker has made last, where that is free. None where none is.

    It may also take one that a helper has failed at: what is wrong with it will then show as the job's own error.
    """
    takeable = or_(Shard.tries_used < max_tries, Shard.error_code.is_not(None))
    return _take(session, held.job_id, [takeable], worker_id, lease_seconds, now, below)


def claim_to_help(
    session: Session,
    job_id: str,
    *,
    worker_id: str,
    max_tries: int,
    lease_seconds: float,
    now: datetime,
    below: int | None = None,
) -> ShardClaim | None:
    """A free shard for a worker that helps, as for `claim`, counting the try. None where there is nothing to take, as
    with `jobs.claim`: a duplicate message, a job that ends, a queue that is paused, a worker that is drained."""
    conditions = [
        Shard.tries_used < max_tries,
        Shard.error_code.is_(None),
        _is_live(job_id),
        ~exists().where(Job.id == job_id, QueuePause.queue == Job.queue),
        ~exists().where(Worker.id == worker_id, Worker.drained_at.is_not(None)),
    ]
    return _take(session, job_id, conditions, worker_id, lease_seconds, now, below)


def progress(
    session: Session,
    claim: ShardClaim,
    *,
    tiles_done: int,
    tiles_total: int,
    bands_done: int,
    lease_seconds: float,
    now: datetime,
) -> None:
    """Renews the shard's lease and writes how far it has come. One UPDATE. Raises StaleAttempt."""
    lease_until = now + timedelta(seconds=lease_seconds)
    _write(
        session,
        claim,
        {"lease_until": lease_until, "tiles_done": tiles_done, "tiles_total": tiles_total, "bands_done": bands_done},
    )


def keep(session: Session, claim: ShardClaim, *, lease_seconds: float, now: datetime) -> None:
    """Renews the lease of a shard that is made and on its way to storage, and counts it as done. One UPDATE, of no row
    where it is not held any more: that shows when it is recorded."""
    session.execute(
        update(Shard)
        .where(
            *_tried_by(claim),
            # Unlike `progress`: beside whoever calls this another thread may just have given it back.
            Shard.lease_until.is_not(None),
        )
        .values(
            lease_until=now + timedelta(seconds=lease_seconds),
            tiles_done=Shard.tiles_total,
            bands_done=len(claim.bands),
        )
    )


def made(
    session: Session,
    claim: ShardClaim,
    *,
    key: str,
    bytes: int,
    facts: Mapping[str, Any],
    now: datetime,
) -> None:
    """The shard's part lies in storage. Raises StaleAttempt where another try owns it, or its job has ended."""
    _write(
        session,
        claim,
        {
            "key": key,
            "bytes": bytes,
            "facts": dict(facts),
            "finished_at": now,
            "lease_until": None,
            "tiles_done": Shard.tiles_total,
            "bands_done": len(claim.bands),
            "error_code": None,
        },
    )


def give_back(session: Session, claim: ShardClaim, error: EnlargerError | None = None) -> None:
    """Whoever is next may take the shard. Without an `error` the try does not count: its worker was asked to stop, or
    a server is away. Raises StaleAttempt."""
    changes: dict[str, Any] = {"lease_until": None, "published_at": None, "tiles_done": 0, "bands_done": 0}
    if error is None:
        changes["tries_used"] = Shard.tries_used - 1
    else:
        changes["error_code"] = error.code
    _write(session, claim, changes)


def standing(
    session: Session, job_id: str, *, max_tries: int, now: datetime, without: ShardClaim | None = None
) -> Standing:
    """Of all shards, or all but one. One SELECT, of some tens of rows."""
    rows = [row for row in of_job(session, job_id) if without is None or row.position != without.position]
    lost = [
        row.position
        for row in rows
        if row.finished_at is None
        and row.error_code is None
        and row.tries_used >= max_tries
        and (row.lease_until is None or row.lease_until < now)
    ]
    return Standing(
        shards=len(rows),
        shards_made=sum(row.finished_at is not None for row in rows),
        tiles_done=sum(row.tiles_done for row in rows),
        tiles_total=sum(row.tiles_total for row in rows),
        bands_done=sum(row.bands_done for row in rows),
        bands_total=sum(len(row.bands) for row in rows),
        lost=min(lost, default=None),
    )


def of_job(session: Session, job_id: str) -> Sequence[Shard]:
    """Every shard of the job, from the top; none where it is not shared, or has ended."""
    return session.scalars(
        select(Shard).where(Shard.job_id == job_id).order_by(Shard.position).execution_options(populate_existing=True)
    ).all()


def keys_from(session: Session, job_id: str, position: int) -> Sequence[str]:
    """Keys of the parts made from this position on, as far down as there is none missing."""
    made = session.execute(
        select(Shard.position, Shard.key)
        .where(Shard.job_id == job_id, Shard.position >= position, Shard.finished_at.is_not(None))
        .order_by(Shard.position)
    ).all()
    return [str(row.key) for expected, row in enumerate(made, position) if row.position == expected]


def due(
    session: Session, *, max_tries: int, resend_after_seconds: float, now: datetime
) -> Sequence[Row[str, int, str]]:
    """(job_id, position, queue) of each shard to send a message for, marked as sent.

    Those are free and have no message on its way: never sent, sent long ago, or taken since by a worker that was lost.
    """
    waiting = session.execute(
        select(Shard.job_id, Shard.position, Job.queue)
        .join(Job, Job.id == Shard.job_id)
        .where(
            Job.state == JobState.RUNNING,
            Job.cancel_requested_at.is_(None),
            ~exists().where(QueuePause.queue == Job.queue),
            Shard.tries_used < max_tries,
            Shard.error_code.is_(None),
            *_free(now),
            or_(
                Shard.published_at.is_(None),
                Shard.published_at < now - timedelta(seconds=resend_after_seconds),
                Shard.lease_until < now,
            ),
        )
        .order_by(Shard.job_id, Shard.position)
        .limit(100)
    ).all()
    for row in waiting:
        session.execute(
            update(Shard)
            .where(Shard.job_id == row.job_id, Shard.position == row.position, *_free(now))
            .values(published_at=now, lease_until=None)
        )
    return waiting


def not_sent(session: Session, owed: Sequence[Row[str, int, str]]) -> None:
    """Takes back what `due` marked: the broker refused, so there is no message to wait for."""
    for row in owed:
        session.execute(
            update(Shard).where(Shard.job_id == row.job_id, Shard.position == row.position).values(published_at=None)
        )


def give_message_back(session: Session, job_id: str) -> None:
    """A message has come to a worker that takes no shard: the relay is to send another. Messages of one job's shards
    are worth the same."""
    given_back = (
        select(Shard.position)
        .where(
            Shard.job_id == job_id,
            Shard.finished_at.is_(None),
            Shard.lease_until.is_(None),
            Shard.published_at.is_not(None),
        )
        .order_by(Shard.position)
        .limit(1)
        .with_for_update()
        .scalar_subquery()
    )
    session.execute(update(Shard).where(Shard.job_id == job_id, Shard.position == given_back).values(published_at=None))


def clock_jumped(session: Session, *, lease_seconds: float, now: datetime) -> None:
    """The database's clock was set; `now` is what it says since. A shard somebody works on is leased anew."""
    session.execute(
        update(Shard)
        .where(Shard.finished_at.is_(None), Shard.lease_until.is_not(None))
        .values(lease_until=now + timedelta(seconds=lease_seconds))
    )
    session.execute(update(Shard).where(Shard.published_at > now).values(published_at=None))


def _free(now: datetime) -> list[ColumnElement[bool]]:
    return [Shard.finished_at.is_(None), or_(Shard.lease_until.is_(None), Shard.lease_until < now)]


def _worked_on(now: datetime) -> ColumnElement[bool]:
    return and_(Shard.finished_at.is_(None), Shard.lease_until.is_not(None), Shard.lease_until >= now)


def _is_live(job_id: str) -> ColumnElement[bool]:
    """The job goes on, also while it waits for another attempt."""
    return exists().where(
        Job.id == job_id,
        Job.state.in_((JobState.RUNNING, JobState.QUEUED)),
        Job.cancel_requested_at.is_(None),
    )


def _take(
    session: Session,
    job_id: str,
    conditions: Sequence[ColumnElement[bool]],
    worker_id: str,
    lease_seconds: float,
    now: datetime,
    below: int | None,
) -> ShardClaim | None:
    takeable = and_(*_free(now), *conditions)
    rows = session.execute(
        select(Shard.position, takeable.label("is_free"), _worked_on(now).label("is_worked_on"))
        .where(Shard.job_id == job_id)
        .order_by(Shard.position)
    ).all()
    free = [row.position for row in rows if row.is_free]
    worked_on = {row.position for row in rows if row.is_worked_on}
    while free:
        chosen = _choose(free, worked_on, below)
        row = session.execute(
            update(Shard)
            .where(Shard.job_id == job_id, Shard.position == chosen, takeable)
            .values(
                number=Shard.number + 1,
                tries_used=Shard.tries_used + 1,
                worker_id=worker_id,
                lease_until=now + timedelta(seconds=lease_seconds),
                started_at=func.coalesce(Shard.started_at, literal(now, UtcDateTime)),
                tiles_done=0,
                bands_done=0,
            )
            .returning(Shard.position, Shard.number, Shard.bands)
        ).one_or_none()
        if row is not None:
            return ShardClaim(job_id, row.position, row.number, row.bands)
        # Another worker has come first: ten that come at once get ten shards.
        free.remove(chosen)
        worked_on.add(chosen)
    return None


def _choose(free: Sequence[int], worked_on: Set[int], below: int | None) -> int:
    """Which of the `free` shards a worker takes that has made the one at `below` last.

    The next one down, where it goes on without decoding or computing anything twice. Else the top of a run that nobody
    is about to walk into; else the lower half of the longest, of which who works above it keeps the upper.
    """
    if below is not None and below + 1 in free:
        return below + 1
    runs: list[list[int]] = []
    for position in free:
        if runs and runs[-1][-1] == position - 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    longest = max(runs, key=lambda run: (run[0] - 1 not in worked_on, len(run)))
    return longest[len(longest) // 2 if longest[0] - 1 in worked_on else 0]


def _tried_by(claim: ShardClaim) -> list[ColumnElement[bool]]:
    """Its try is the newest, of a job that goes on."""
    return [
        Shard.job_id == claim.job_id,
        Shard.position == claim.position,
        Shard.number == claim.number,
        Shard.finished_at.is_(None),
        _is_live(claim.job_id),
    ]


def _write(session: Session, claim: ShardClaim, changes: Mapping[str, Any]) -> None:
    changed = session.execute(
        update(Shard).where(*_tried_by(claim)).values(**changes).returning(Shard.position)
    ).one_or_none()
    if changed is None:
        raise StaleAttempt(
            f"Try {claim.number} does not own shard {claim.position} of {claim.job_id} any more.", job_id=claim.job_id
        )
