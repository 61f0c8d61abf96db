"""Where the strips of a job's preview lie in storage: what the worker writes and the API reads.

A strip's key carries its geometry, so that a listing of keys is all there is to know, and no row is written for
pictures that nothing depends on. All lie under the job's prefix and go with its other blobs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

_NAME = re.compile(r"(\d{1,10})-(\d{1,5})x(\d{1,5})-(\d{1,7})\.(jpeg|webp)")


@dataclass(frozen=True)
class Strip:
    """Some rows of a result, made smaller by `factor`."""

    y_px: int
    """First row, in px of the result."""
    width: int
    """Of the strip's own picture, in its own px; times `factor` it covers the result's width or a little more."""
    height: int
    factor: int
    format: Literal["jpeg", "webp"]

    @property
    def name(self) -> str:
        # Zeros in front: keys are listed by their letters, and strips are wanted from the top.
        return f"{self.y_px:010}-{self.width}x{self.height}-{self.factor}.{self.format}"


def strips_prefix(blob_prefix: str, attempt: int) -> str:
    """What the keys of an attempt's strips begin with: a late worker's strips are not its successor's."""
    return f"{blob_prefix}/preview-{attempt}/"


def strip_key(blob_prefix: str, attempt: int, strip: Strip) -> str:
    return strips_prefix(blob_prefix, attempt) + strip.name


def strip_named(name: str) -> Strip | None:
    """The strip that a key's last part tells of; None for any other name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    y_px, width, height, factor = (int(found[number]) for number in (1, 2, 3, 4))
    return Strip(y_px, width, height, factor, "webp" if found[5] == "webp" else "jpeg")


def strips_of(keys: Iterable[str]) -> list[Strip]:
    """The strips among listed keys, from the top."""
    named = (strip_named(key.rsplit("/", 1)[-1]) for key in keys)
    return sorted((strip for strip in named if strip is not None), key=lambda strip: strip.y_px)
