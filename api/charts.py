"""Charts as the server draws them: the geometry of bars and lines, for `admin/_chart.html` to write down as SVG.

Everything is in the chart's own units, WIDTH by HEIGHT, y downwards. No styles and no scripts: colours come from the
sheet by class, and every point's value is in a title that browsers show and screen readers read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
