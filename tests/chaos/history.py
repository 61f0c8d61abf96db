"""The history of a chaos run: every operation as one line of JSON, from many threads, in the order they ended.

The checker reads nothing else, so that a run can be judged again from its file. What each line may say:

    submit    key picture status id retry_after error seconds     one try at handing a picture in
    gave_up   key status                                          a picture that nobody took in all the time there was
    cancel    id status                                           what cancelling was answered
    heard     delivery type id answered sha256 is_signed          a webhook came in, and what it was told
    fault     kind, and facts of its own                          something was broken on purpose
    kill      kind job attempt moment                             SIGKILL to the process that held this attempt
    change    job old_state new_state old_attempt new_attempt     SQL's own trigger saw this arrow, in this order
    shard     job position old_number new_number old_made         the same of shards: taken (another number), made, or
              new_made part                                       gone with the job (no new number)
    job, attempt, delivery                                        the rows at the end
    blob      key sha256 pixels_sha256                            a result in storage at the end
    picture   picture pixels_sha256                               what one worker by itself makes of such a picture
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class History:
    """Appends to a file and remembers. Thread-safe."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("w")
        self._lines: list[Line] = []
        self._lock = threading.Lock()
        self._began = time.monotonic()

    def record(self, what: str, **facts: Any) -> None:
        line = {"at": round(time.monotonic() - self._began, 4), "what": what, **facts}
        with self._lock:
            self._lines.append(line)
            self._file.write(json.dumps(line, default=_as_text) + "\n")

    def lines(self, what: str) -> list[Line]:
        with self._lock:
            return [line for line in self._lines if line["what"] == what]

    def __iter__(self) -> Iterator[Line]:
        with self._lock:
            return iter(list(self._lines))

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[Line]:
    """A history that was written earlier."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def moment(value: Any) -> datetime:
    """A moment as it stands in a line: an aware datetime, or its text after the line was read from a file."""
    return value if isinstance(value, datetime) else datetime.fromisoformat(value)


def _as_text(value: Any) -> str:
    return value.astimezone(UTC).isoformat() if isinstance(value, datetime) else str(value)
