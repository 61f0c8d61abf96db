"""Rows of a result in pages of their own, which the system has back as soon as nobody holds them.

Among the blocks of the process's allocator they leave holes, since another thread lets go of them than made them: the
next ones, a row higher, do not fit there.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import OutOfMemory

OWN_PAGES_BYTES = 2**20
"""From so many on. Smaller ones are the allocator's, whose holes are then as small."""


def new_rows(rows: int, columns: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """(rows, columns, 3), with nothing in it yet. Raises OutOfMemory."""
    shape = (rows, columns, 3)
    size = rows * columns * 3 * dtype.itemsize
    try:
        if size < OWN_PAGES_BYTES:
            return np.empty(shape, dtype)
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (MemoryError, OSError) as error:
        # Smaller tiles do not make a result smaller.
        raise OutOfMemory(
            f"There is no memory for {columns} x {rows} px of the result.", width_px=columns, height_px=rows
        ) from error
    # Fresh pages come 2 MB at a time, as to numpy's own large arrays, where the system has such.
    with contextlib.suppress(AttributeError, OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)
