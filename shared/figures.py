"""How the service has done lately: jobs, megapixels, waits and runs over an hour, a day or a week.

Hours that are over are kept as one row each (`roll_up`, by the relay); only what is newer is read from the jobs. A
week of a hundred thousand jobs is thus read from under two hundred rows, and what has been deleted since still counts.

Spans are counted in buckets, each 15 % wider than the one before, so that the percentiles of many hours can be had from
their sums; they are within 8 % of the exact ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from shared.models import TERMINAL_STATES, HourOfJobs, Job, JobState

HOUR = timedelta(hours=1)
# A transaction that ended a job at the hour's last moment may commit a little later.
HOUR_CLOSES_AFTER = timedelta(minutes=5)
# The longest window, and what an upgraded service catches up with.
LONGEST = timedelta(days=7)
KEPT = timedelta(days=30)

_SHORTEST_SECONDS = 0.001
_WIDER = math.log(1.15)


@dataclass(frozen=True)
class Window:
    """A span of time up to now, cut into slots that begin at full multiples of their length."""

    slots: int
    slot: timedelta


WINDOWS: Mapping[str, Window] = {
    "1h": Window(12, timedelta(minutes=5)),
    "24h": Window(24, HOUR),
    "7d": Window(28, timedelta(hours=6)),
}


@dataclass
class Spans:
    """Seconds, counted in buckets."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, seconds: float) -> None:
        self.counts[math.floor(math.log(max(seconds, _SHORTEST_SECONDS)) / _WIDER)] += 1

    def percentile(self, share: float) -> float | None:
        """Nearest rank, as the middle of its bucket; None where nothing was counted."""
        rank = math.ceil(share * self.counts.total())
        for bucket in sorted(self.counts):
            rank -= self.counts[bucket]
            if rank <= 0:
                return math.exp((bucket + 0.5) * _WIDER)
        return None


@dataclass
class Slot:
    """What ended within one stretch of time."""

    start: datetime
    length: timedelta
    ended: Counter[str] = field(default_factory=Counter)
    """Jobs by final state."""
    output_px: int = 0
    """Pixels of the results made."""
    waits: Spans = field(default_factory=Spans)
    """Before the first start, of jobs that started."""
    runs: Spans = field(default_factory=Spans)
    """From the first start to success."""

    def add(self, other: Slot) -> None:
        self.ended += other.ended
        self.output_px += other.output_px
        self.waits.counts += other.waits.counts
        self.runs.counts += other.runs.counts

    @property
    def jobs(self) -> int:
        return self.ended.total()

    @property
    def error_share(self) -> float | None:
        """Failed, of those that succeeded or failed; None where there were none."""
        judged = self.ended[JobState.SUCCEEDED] + self.ended[JobState.FAILED]
        return self.ended[JobState.FAILED] / judged if judged else None

    @property
    def megapixels_per_hour(self) -> float:
        return self.output_px / 1e6 / (self.length / HOUR)


@dataclass(frozen=True)
class Figures:
    """A window: its slots, oldest first, and all of them as one."""

    slots: Sequence[Slot]
    total: Slot


def figures(session: Session, window: Window, *, now: datetime) -> Figures:
    """What ended within the window that ends now. Reads kept hours where the slots are whole hours."""
    last = _floor(now, window.slot)
    starts = [last - window.slot * back for back in reversed(range(window.slots))]
    slots = {start: Slot(start, window.slot) for start in starts}
    live_from = starts[0]
    if window.slot >= HOUR:
        kept = session.scalars(select(HourOfJobs).where(HourOfJobs.start >= starts[0]).order_by(HourOfJobs.start)).all()
        for hour in kept:
            slots[_floor(hour.start, window.slot)].add(_slot_of(hour))
        if kept:
            live_from = kept[-1].start + HOUR
    for start, slot in _ended(session, live_from, now + HOUR, window.slot).items():
        # Another host's clock may be a little ahead of `now`.
        slots[min(start, last)].add(slot)
    total = Slot(starts[0], now - starts[0])
    for slot in slots.values():
        total.add(slot)
    return Figures(list(slots.values()), total)


def roll_up(session: Session, *, now: datetime) -> int:
    """Keeps a row for every hour that is over and has none yet. Returns how many. Two at once do no harm: the second
    finds the rows there."""
    newest = session.scalar(select(func.max(HourOfJobs.start)))
    session.execute(delete(HourOfJobs).where(HourOfJobs.start < now - KEPT))
    # After a longer stop than any window looks back, what lies between is nobody's question.
    earliest = _floor(now - LONGEST, HOUR)
    start = max(newest + HOUR, earliest) if newest else earliest
    end = _floor(now - HOUR_CLOSES_AFTER, HOUR)
    if start >= end:
        return 0
    ended = _ended(session, start, end, HOUR)
    hours = [start + HOUR * number for number in range((end - start) // HOUR)]
    try:
        with session.begin_nested():
            session.add_all(_hour_of(ended.get(hour, Slot(hour, HOUR))) for hour in hours)
    except IntegrityError:
        # Another sweep has kept them in this very moment.
        return 0
    return len(hours)


def _ended(session: Session, start: datetime, end: datetime, slot: timedelta) -> dict[datetime, Slot]:
    """What ended from `start` until before `end`, read from the jobs."""
    slots: dict[datetime, Slot] = {}
    rows = session.execute(
        select(
            Job.state,
            Job.created_at,
            Job.queued_at,
            Job.started_at,
            Job.finished_at,
            Job.result_width,
            Job.result_height,
        ).where(Job.state.in_(TERMINAL_STATES), Job.finished_at >= start, Job.finished_at < end)
    )
    for row in rows:
        at = _floor(row.finished_at, slot)
        found = slots.setdefault(at, Slot(at, slot))
        found.ended[row.state] += 1
        if row.started_at is not None:
            # A job that was given back was queued again after its first start; one retried by hand, before it.
            waited_since = row.queued_at if row.queued_at <= row.started_at else row.created_at
            found.waits.add((row.started_at - waited_since).total_seconds())
        if row.state == JobState.SUCCEEDED:
            found.runs.add((row.finished_at - row.started_at).total_seconds())
            found.output_px += row.result_width * row.result_height
    return slots


def _floor(moment: datetime, slot: timedelta) -> datetime:
    """The slot's beginning: full multiples since midnight UTC, of which every slot is a part."""
    midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight + (moment - midnight) // slot * slot


def _hour_of(slot: Slot) -> HourOfJobs:
    return HourOfJobs(
        start=slot.start,
        ended=dict(slot.ended),
        output_px=slot.output_px,
        waits=_written(slot.waits),
        runs=_written(slot.runs),
    )


def _slot_of(hour: HourOfJobs) -> Slot:
    return Slot(
        hour.start, HOUR, Counter(hour.ended), hour.output_px, _read(hour.waits.items()), _read(hour.runs.items())
    )


def _written(spans: Spans) -> dict[str, int]:
    # JSON knows only words as names.
    return {str(bucket): count for bucket, count in spans.counts.items()}


def _read(items: Iterable[tuple[str, int]]) -> Spans:
    return Spans(Counter({int(bucket): count for bucket, count in items}))
