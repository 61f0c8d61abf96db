"""Numbers as people say them, for what the server draws; `static/js/words.js` says the same for what scripts draw."""

from __future__ import annotations

from datetime import datetime


def ago(moment: datetime, now: datetime) -> str:
    """`3 min ago`; what lies ahead is `in 3 min`."""
    past_seconds = (now - moment).total_seconds()
    if past_seconds < -0.5:
        return f"in {seconds(-past_seconds)}"
    return "now" if past_seconds < 1 else f"{seconds(past_seconds)} ago"


def seconds(count: float | None) -> str:
    """A span as people say it, to two figures or so."""
    if count is None:
        return "–"
    for limit, unit, size in ((0.9995, "ms", 0.001), (90, "s", 1), (5400, "min", 60), (129600, "h", 3600)):
        if count < limit:
            value = count / size
            return f"{value:.1f} {unit}" if unit == "s" and value < 9.95 else f"{value:.0f} {unit}"
    return f"{count / 86400:.0f} d"


def size_of_file(count: int | None) -> str:
    """Bytes in decimal units, to two figures or so."""
    if count is None:
        return "–"
    value = float(count)
    for unit in ("bytes", "kB", "MB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "bytes" or value >= 9.95 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def megapixels(width: int, height: int) -> str:
    """The area of a picture."""
    value = width * height / 1e6
    if value < 0.95:
        return f"{value:.2g} MP"
    return f"{value:,.1f} MP" if value < 9.95 else f"{value:,.0f} MP"
