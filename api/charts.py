"""Charts as the server draws them: the geometry of bars and lines, for `admin/_chart.html` to write down as SVG.

Everything is in the chart's own units, WIDTH by HEIGHT, y downwards. No styles and no scripts: colours come from the
sheet by class, and every point's value is in a title that browsers show and screen readers read.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from shared.models import Shard

WIDTH, HEIGHT = 600.0, 160.0
_GAP_SHARE = 0.2


@dataclass(frozen=True)
class Mark:
    """One bar, or the column of a moment that only carries its title."""

    kind: str
    """The class that gives its colour."""
    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Chart:
    marks: Sequence[Mark]
    lines: Sequence[tuple[str, str]]
    """(kind, points of a polyline)"""
    top: str
    """What the upper rim stands for."""


def bars(
    series: Sequence[tuple[str, Sequence[float]]], titles: Sequence[str], *, said: Callable[[float], str]
) -> Chart:
    """Bars side by side in time, the series of one moment on top of each other. `said` writes a value."""
    columns = list(zip(*(values for _, values in series), strict=True))
    top = round_up(max(map(sum, columns), default=0))
    step = WIDTH / max(1, len(columns))
    marks = []
    for number, column in enumerate(columns):
        base = HEIGHT
        for (kind, _), value in zip(series, column, strict=True):
            height = HEIGHT * value / top
            base -= height
            if value:
                marks.append(
                    Mark(
                        kind,
                        round(step * (number + _GAP_SHARE / 2), 2),
                        round(base, 2),
                        round(step * (1 - _GAP_SHARE), 2),
                        round(height, 2),
                        f"{titles[number]}: {said(value)} {kind}",
                    )
                )
    return Chart(marks, (), said(top))


def lines(
    series: Sequence[tuple[str, Sequence[float | None]]], titles: Sequence[str], *, said: Callable[[float], str]
) -> Chart:
    """A line for each series, broken where there is no value; a column over each moment carries its values."""
    moments = list(zip(*(values for _, values in series), strict=True))
    kinds = [kind for kind, _ in series]
    top = round_up(max((value for values in moments for value in values if value is not None), default=0))
    step = WIDTH / max(1, len(moments))
    marks = []
    for number, values in enumerate(moments):
        known = [f"{kind} {said(value)}" for kind, value in zip(kinds, values, strict=True) if value is not None]
        if known:
            title = f"{titles[number]}: {', '.join(known)}"
            marks.append(Mark("moment", round(step * number, 2), 0, round(step, 2), HEIGHT, title))
    drawn = []
    for kind, line in series:
        for has_value, piece in itertools.groupby(enumerate(line), key=lambda point: point[1] is not None):
            if has_value:
                # A single moment is drawn as wide as its column, or it would not be seen.
                drawn.append((kind, " ".join(_across(step, number, value or 0.0, top) for number, value in piece)))
    return Chart(marks, drawn, said(top))


def _across(step: float, number: int, value: float, top: float) -> str:
    """Two points of a polyline: the value over the whole of its moment."""
    y = round(HEIGHT * (1 - value / top), 2)
    return f"{step * number:.2f},{y} {step * (number + 1):.2f},{y}"


def round_up(value: float) -> float:
    """The least of 1, 2, 5, 10, ... (and tenths) that is not below; 1 for nothing at all."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 5, 10) if power * step >= value * 0.999999)


# --- one attempt -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A line of an attempt's waterfall."""

    name: str
    seconds: float
    x: float
    width: float


def waterfall(trace: Mapping[str, Any]) -> list[Phase]:
    """The phases of an attempt, in order, across WIDTH."""
    whole = max(trace["seconds"], 0.001)
    starts = [*trace["phases"], ["", whole]]
    return [
        Phase(
            name,
            max(0.0, end - start),
            round(WIDTH * start / whole, 2),
            # Wide enough to be seen, however short.
            round(max(2.0, WIDTH * (end - start) / whole), 2),
        )
        for (name, start), (_, end) in itertools.pairwise(starts)
    ]


@dataclass(frozen=True)
class BandMap:
    """The bands of a picture from the top, each as deep in colour as it was slow."""

    width: float
    height: float
    marks: Sequence[Mark]
    said: str


HEATS = 5
_MAP_WIDTH = 160.0


def band_map(trace: Mapping[str, Any], width_px: int, height_px: int, *, said: Callable[[float], str]) -> BandMap:
    """Of a picture of that size; bands that are not done yet are empty."""
    seconds: Sequence[float] = trace["band_seconds"]
    redone: Sequence[int] = trace["tiles_redone"]
    each, total = trace["bands_each"], trace["bands_total"]
    height = _map_height(width_px, height_px)
    step = height * each / max(1, total)
    slowest = max(seconds, default=0.0)
    marks = []
    for number, (took, tiles) in enumerate(zip(seconds, redone, strict=True)):
        first, last = number * each + 1, min((number + 1) * each, total)
        what = f"band {first}" if first == last else f"bands {first} to {last}"
        again = f", {tiles} tiles more than planned" if tiles else ""
        heat = min(HEATS - 1, int(HEATS * took / slowest)) if slowest else 0
        marks.append(
            Mark(
                f"heat{heat}{' again' if tiles else ''}",
                0,
                round(step * number, 3),
                _MAP_WIDTH,
                round(min(step, height - step * number), 3),
                f"{what} of {total}: {said(took)}{again}",
            )
        )
    done = min(len(seconds) * each, total)
    told = f"{done} of {total} bands done"
    if seconds:
        told += f", the slowest in {said(slowest / each)}"
    if sum(map(bool, redone)):
        told += f", {sum(map(bool, redone))} done again in smaller tiles"
    return BandMap(_MAP_WIDTH, round(height, 2), marks, told)


@dataclass(frozen=True)
class Hand:
    """A worker at a shared picture."""

    worker_id: str
    made: int
    now_at: Shard | None
    """What it is in the middle of."""


@dataclass(frozen=True)
class ShardMap:
    """The shards of a picture from the top, where they lie on it, and who works on them."""

    width: float
    height: float
    marks: Sequence[Mark]
    said: str
    hands: Sequence[Hand]
    """Who has made most comes first."""
    failed: Sequence[Shard]
    """Those that a helper could not make and nobody has made since."""


def shard_map(shards: Sequence[Shard], width_px: int, height_px: int, now: datetime) -> ShardMap | None:
    """Of a picture of that size; None where it is not shared. A shard that is free has no mark, one under way is filled
    as far as it has come."""
    if not shards:
        return None
    height = _map_height(width_px, height_px)
    marks = []
    made, at = Counter[str](), dict[str, Shard]()
    for shard in shards:
        top, bottom = shard.bands[0][0][1], max(tile[1] + tile[3] for tile in shard.bands[-1])
        y, tall = height * top / height_px, height * (bottom - top) / height_px
        what = f"shard {shard.position + 1} of {len(shards)}"
        tried = f", try {shard.number}" if shard.number > 1 else ""
        if shard.finished_at is not None:
            made[shard.worker_id or ""] += 1
            marks.append(Mark("made", 0, round(y, 3), _MAP_WIDTH, round(tall, 3), f"{what}: made{tried}"))
        elif shard.lease_until is not None and shard.lease_until >= now:
            at[shard.worker_id or ""] = shard
            told = f"{what}: under way, {shard.bands_done} of {len(shard.bands)} bands{tried}"
            share = min(1.0, shard.tiles_done / max(1, shard.tiles_total))
            marks.append(Mark("busy", 0, round(y, 3), _MAP_WIDTH, round(tall, 3), told))
            if share:
                marks.append(Mark("made", 0, round(y, 3), _MAP_WIDTH, round(tall * share, 3), told))
        elif shard.error_code is not None:
            told = f"{what}: a helper failed, {shard.error_code}"
            marks.append(Mark("failed", 0, round(y, 3), _MAP_WIDTH, round(tall, 3), told))
    said = f"{made.total()} of {len(shards)} made, {len(at)} under way"
    hands = [Hand(worker_id, made[worker_id], at.get(worker_id)) for worker_id in {**made, **at}]
    failed = [shard for shard in shards if shard.error_code is not None and shard.finished_at is None]
    return ShardMap(
        _MAP_WIDTH, round(height, 2), marks, said, sorted(hands, key=lambda hand: (-hand.made, hand.worker_id)), failed
    )


def _map_height(width_px: int, height_px: int) -> float:
    # A very long picture would be a thread, or a mile.
    return _MAP_WIDTH * min(3.0, max(0.3, height_px / width_px))


@dataclass(frozen=True)
class MemoryTrace:
    points: str
    vram_points: str
    """Empty where there is no GPU."""
    peak_bytes: int
    vram_peak_bytes: int | None
    top_bytes: float


def memory_trace(trace: Mapping[str, Any]) -> MemoryTrace | None:
    """Bytes over the time of an attempt; None where nothing was sampled."""
    samples: Sequence[tuple[float, int, int | None]] = trace["memory"]
    if not samples:
        return None
    whole = max(trace["seconds"], 0.001)
    peak = max(held for _, held, _ in samples)
    on_gpu = [(at, held) for at, _, held in samples if held is not None]
    vram_peak = max((held for _, held in on_gpu), default=None)
    top = round_up(float(max(peak, vram_peak or 0)))

    def points(values: Sequence[tuple[float, int]]) -> str:
        # To the end of the attempt: the last sample holds until then.
        held = [*values, (whole, values[-1][1])] if values else []
        return " ".join(f"{WIDTH * min(at, whole) / whole:.1f},{HEIGHT * (1 - bytes / top):.1f}" for at, bytes in held)

    return MemoryTrace(points([(at, held) for at, held, _ in samples]), points(on_gpu), peak, vram_peak, top)
