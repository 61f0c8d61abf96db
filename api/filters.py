"""The filter of the operator's list of jobs, as it is typed and as it stands in the address.

    status:failed,expired model:srgan after:2h cat

Terms are joined by "and", values after one colon by "or"; a word without a colon is looked for in the picture's name
and at the end of the job's id.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from shared.errors import InvalidRequest
from shared.models import JobState
from shared.queries import JobFilter
from shared.queueing import IMAGE_QUEUES

COLUMNS = {
    "status": "state",
    "model": "model",
    "id": "id",
    "external": "external_id",
    "queue": "queue",
    "worker": "worker_id",
    "error": "error_code",
    "batch": "batch_id",
    "format": "format",
}
TERMS = (*COLUMNS, "key", "after", "before")
_KNOWN_VALUES = {"status": tuple(map(str, JobState)), "queue": IMAGE_QUEUES}
_SPAN = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def read(text: str, *, now: datetime) -> JobFilter:
    """What is typed as a filter. Raises InvalidRequest, which says what there is instead."""
    any_of: list[tuple[str, tuple[str, ...]]] = []
    words: list[str] = []
    given: dict[str, str] = {}
    for term in _terms(text):
        name, colon, value = term.partition(":")
        if not colon:
            words.append(term)
            continue
        if name not in TERMS:
            raise InvalidRequest(f"There is no filter `{name}:`. There are {', '.join(f'{t}:' for t in TERMS)}.")
        if not value:
            raise InvalidRequest(f"`{name}:` needs a value right after the colon, as in `{_EXAMPLES[name]}`.")
        if name in COLUMNS:
            values = tuple(filter(None, value.split(",")))
            for unknown in set(values) - set(_KNOWN_VALUES.get(name, values)):
                raise InvalidRequest(f"There is no {name} `{unknown}`. There are {', '.join(_KNOWN_VALUES[name])}.")
            any_of.append((COLUMNS[name], values))
        else:
            given[name] = value
    return JobFilter(
        any_of=tuple(any_of),
        words=tuple(words),
        owner=given.get("key"),
        created_after=_moment("after", given.get("after"), now),
        created_before=_moment("before", given.get("before"), now),
    )


_EXAMPLES = {
    "status": "status:failed,expired",
    "model": "model:srgan",
    "id": "id:job_01",
    "external": "external:order-7",
    "queue": "queue:cpu.bulk",
    "worker": "worker:images-host-1",
    "error": "error:out-of-memory",
    "batch": "batch:batch_01",
    "format": "format:png",
    "key": 'key:"the shop"',
    "after": "after:2h",
    "before": "before:2026-01-31",
}


@dataclass(frozen=True)
class Help:
    """A line of what the page says about its filter."""

    example: str
    means: str


HELP = (
    Help("status:failed,expired", "in one of these states"),
    Help("model:srgan", "of a model; likewise queue:, format:, error:, worker:, batch:"),
    Help('key:"the shop"', "handed in with a key, by its name or id"),
    Help("external:order-7", "with an id of the customer's own"),
    Help("after:2h before:30m", "handed in then; also dates, as in after:2026-01-31"),
    Help("cat", "part of the picture's name, or the end of the job's id"),
)


def _terms(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InvalidRequest("A quotation mark in the filter has no partner.") from error


def _moment(name: str, value: str | None, now: datetime) -> datetime | None:
    if value is None:
        return None
    span = _SPAN.fullmatch(value)
    try:
        if span is not None:
            return now - timedelta(**{_UNITS[span[2]]: int(span[1])})
        moment = datetime.fromisoformat(value)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(
            f"`{name}:{value}` is no time: write a span (30s, 20m, 2h, 7d) or a date (2026-01-31, 2026-01-31T08:00)."
        ) from error
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
