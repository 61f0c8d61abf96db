"""Thumbnails of one attempt: of the picture handed in, stored as soon as it is decoded, and of the result.

They are for looking at. The input's is stored by a thread of its own, so that the network does not wait for storage,
and where it cannot be stored the job goes on. The result's is made of pixels that pass on their way to the encoder, as
soon as the last of them has: no result is ever read again for it, or waits for it.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared import thumbnails
from shared.errors import StorageUnavailable
from shared.storage import Storage
from shared.telemetry import log
from shared.thumbnails import LONGEST_SIDE_PX

SAMPLED_PX = 4 * LONGEST_SIDE_PX
"""Every n-th pixel each way is kept so that about this many remain; a filter takes the last step down."""
LAST_WAIT_SECONDS = 5.0
"""How long the end of an attempt waits for its input's thumbnail: storage that is slower has other troubles."""

Samples = NDArray[Any]
"""(H, W, channels), uint8 or uint16."""


class Thumbnails:
    """An Onlooker (`worker.enlarging`). As a context manager it waits for what is being stored."""

    def __init__(self, storage: Storage, blob_prefix: str, attempt: int) -> None:
        self._storage, self._blob_prefix, self._attempt = storage, blob_prefix, attempt
        self._storing: threading.Thread | None = None
        self._every = 1
        self._y_px = self._height = 0
        self._rows: list[Samples] = []
        # In order: a result that is made again has the last word.
        self._beside = ThreadPoolExecutor(1, "thumbnail")
        self._stored: Future[None] | None = None

    def begins(self, input_rgb: Samples, width: int, height: int, rows: range | None = None) -> None:
        """The picture is decoded, (H, W, 3), and its result will be `width` x `height` px. May come again, also for
        other `rows` of it, which is no occasion to store the input's."""
        self._every = _every(width, height)
        self._rows, self._y_px = [], 0 if rows is None else rows.start
        # A part's last row is no reason to store anything.
        self._height, self._stored = height if rows is None else 0, None
        if self._storing is not None or rows is not None:
            return
        every = _every(*input_rgb.shape[:2])
        # A copy: the thread must not keep the whole picture.
        sampled = input_rgb[::every, ::every].copy()
        self._storing = threading.Thread(target=self._store_input, args=(sampled,), name="thumbnail", daemon=True)
        self._storing.start()

    def made(self, rows: Samples) -> None:
        """The next rows of the result, (h, width, channels) uint8 or uint16."""
        first = -self._y_px % self._every
        if first < len(rows):
            self._rows.append(rows[first :: self._every, :: self._every].copy())
        self._y_px += len(rows)
        if self._y_px == self._height:
            self._stored = self._beside.submit(self._put_result, self._rows)

    def seen(self) -> Samples | None:
        """The px kept of the rows since `begins`, (h, w, channels): a part's, for `storing_result`. None where
        there are none."""
        return np.concatenate(self._rows) if self._rows else None

    @contextmanager
    def storing_result(self, parts: Sequence[Samples] | None = None) -> Iterator[None]:
        """Stores the result's thumbnail while the block runs, or before, once every row has been seen, here or as the
        `parts`. Raises StorageUnavailable at the block's end."""
        stored = self._beside.submit(self._put_result, parts) if parts is not None else self._stored
        assert stored is not None, "every row has been seen"
        yield
        stored.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._storing is not None:
            self._storing.join(LAST_WAIT_SECONDS)
        self._beside.shutdown(wait=False)

    def _store_input(self, sampled: Samples) -> None:
        try:
            self._put("input", sampled)
        except StorageUnavailable as error:
            log.info("thumbnail.not_stored", detail=error.detail)

    def _put_result(self, rows: Sequence[Samples]) -> None:
        self._put("result", np.concatenate(rows))

    def _put(self, side: thumbnails.Side, sampled: Samples) -> None:
        key = thumbnails.key(self._blob_prefix, side, self._attempt)
        self._storage.put(key, io.BytesIO(webp(sampled)), thumbnails.MIME_TYPE)


def webp(samples: Samples) -> bytes:
    """(H, W, channels) of gray, gray and alpha, RGB or RGBA -> a WebP of LONGEST_SIDE_PX at most, never enlarged."""
    in_8_bits = samples if samples.dtype == np.uint8 else (samples >> 8).astype(np.uint8)
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[in_8_bits.shape[2]]
    pixels: NDArray[Any] = np.ascontiguousarray(in_8_bits[..., 0] if mode == "L" else in_8_bits)
    image = Image.fromarray(pixels, mode)
    image = image.convert("RGBA" if "A" in mode else "RGB")
    image.thumbnail((LONGEST_SIDE_PX, LONGEST_SIDE_PX), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80, method=2)
    return file.getvalue()


def _every(width: int, height: int) -> int:
    return max(1, max(width, height) // SAMPLED_PX)
