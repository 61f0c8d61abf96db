"""A decoder that a picture has taken over: what it says of itself is made up. The tasks of `test_sandboxed.py`."""

from __future__ import annotations

from typing import Any, BinaryIO

from shared import pictures

TALES: dict[str, Any] = {
    "nothing": None,
    "a list": [1, 2],
    "no size": {},
    "no pixels": {"width": 0, "height": 5, "format": "png"},
    "more than there is": {"width": 5000, "height": 5000, "format": "png"},
    "less than nothing": {"width": -4, "height": -4, "format": "png"},
    "a profile that is not there": {"width": 1, "height": 1, "format": "png", "icc_bytes": -1},
    "another depth": {"width": 2, "height": 2, "bits": 32, "format": "png"},
    "a format there is not": {"width": 1, "height": 1, "format": "../../etc/passwd"},
    "an alpha that is too much": {"width": 1, "height": 1, "format": "png", "constant_alpha": 10**9},
    "words for numbers": {"width": "many", "height": 1, "format": "png"},
}


def _decode(file: BinaryIO, output: BinaryIO, *, max_px: int) -> Any:
    output.write(b"x" * 12)
    return TALES[file.read().rpartition(b"tale:")[2].decode()]


SANDBOXED = {**pictures.SANDBOXED, "decode": _decode}
