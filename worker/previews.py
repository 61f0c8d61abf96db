"""The result of a job under way as far as it has come, made small, strip by strip.

Strips are for somebody who watches, and nothing depends on them: they are made small at once, in the caller's thread (a
few ms a band), and encoded and stored by a thread of their own. Storage that is slow or away costs strips, which are
then put together or left out, and never time of the network.
"""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.errors import StorageUnavailable
from shared.previews import Strip, strip_key
from shared.storage import Storage
from shared.telemetry import log

LONGEST_WIDTH_PX, LONGEST_HEIGHT_PX = 1280, 2560
"""A preview is at most this large; it is made so by one whole number, so that strips fit without a seam."""
BETWEEN_STRIPS_SECONDS = 0.3
"""Bands that come faster than this share a strip: a large picture has hundreds."""
LAST_WAIT_SECONDS = 1.0
"""How long the end of an attempt waits for the last strip, which the result has made unnecessary."""

PIECE_BYTES = 2**20
"""What is made small at a time."""

Samples = NDArray[Any]
"""uint8 or uint16, full range."""


class Previews:
    """An Onlooker (`worker.enlarging`) of one attempt. A context manager: leaving it gives up what is not stored."""

    def __init__(self, storage: Storage, blob_prefix: str, attempt: int) -> None:
        self._storage, self._blob_prefix, self._attempt = storage, blob_prefix, attempt
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._strips: list[tuple[int, Image.Image]] = []
        self._lock = threading.Lock()
        self._left_over: Samples | None = None
        self._y_px = self._bottom_px = self._passed_over = 0
        self._width, self._height = 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="previews", daemon=True)

    def begins(
        self,
        input_rgb: Samples,  # noqa: ARG002  (an Onlooker's)
        width: int,
        height: int,
        rows: range | None = None,
    ) -> None:
        """The picture is decoded, (H, W, 3), and its result, or these rows of it, will be `width` x `height` px."""
        if self._thread.ident is None:
            self._thread.start()
        self._width, self._height = width, height
        rows = range(height) if rows is None else rows
        self._left_over, self._y_px, self._bottom_px = None, rows.start, rows.stop
        # Strips begin where a px of the preview does. What a part leaves out above, the part before it has covered.
        self._passed_over = -rows.start % self.factor

    def made(self, rows: Samples) -> None:
        """The next rows of the result, (h, width, channels) uint8 or uint16."""
        if self._y_px == 0 and self._left_over is None and len(rows) == self._height:
            # The whole result at once: it will be there before a preview of it is.
            return
        dropped = min(self._passed_over, len(rows))
        self._passed_over -= dropped
        self._y_px += dropped
        rows = rows[dropped:]
        # In pieces, of whole px of the preview but for the rows that begin and end this band.
        factor = self.factor
        step = factor * max(1, PIECE_BYTES * len(rows) // max(1, factor * rows.nbytes))
        top = 0
        while top < len(rows):
            bottom = top + step - (0 if self._left_over is None else len(self._left_over))
            self._reduce(rows[top:bottom])
            top = bottom
        if self._strips:
            self._waiting.put(self._store_strips)

    def _reduce(self, rows: Samples) -> None:
        factor, held = self.factor, rows[:0] if self._left_over is None else self._left_over
        ready = len(held) + len(rows)
        is_last = self._y_px + ready >= self._bottom_px
        usable = ready if is_last else ready // factor * factor
        if usable == 0:
            self._left_over = np.concatenate([held, rows])
            return
        # Some columns after others: the rows of one px of the preview take megabytes of a large result, and as much
        # again where they are put together and copied for Pillow.
        width = rows.shape[1]
        step = factor * max(1, PIECE_BYTES * width // (factor * ready * rows[0].nbytes))
        parts = []
        for left in range(0, width, step):
            columns = np.s_[:, left : left + step]
            parts.append(_image(np.concatenate([held[columns], rows[columns]])[:usable]).reduce(factor))
        with self._lock:
            self._strips.append((self._y_px, _side_by_side(parts)))
        # Of these rows alone: those held before them were less than a px.
        self._left_over = rows[len(rows) - (ready - usable) :].copy()
        self._y_px += usable

    @property
    def factor(self) -> int:
        """Result px to one px of the preview, each way."""
        return max(1, -(-self._width // LONGEST_WIDTH_PX), -(-self._height // LONGEST_HEIGHT_PX))

    def end(self) -> None:
        """No more rows come: what has not been stored by now may be left out. Does not wait."""
        self._ended.set()
        self._waiting.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        if self._thread.ident is not None:
            self._thread.join(LAST_WAIT_SECONDS)

    def _run(self) -> None:
        while (store := self._waiting.get()) is not None:
            try:
                store()
            except StorageUnavailable as error:
                log.info("preview.not_stored", detail=error.detail)
            except (OSError, ValueError, MemoryError) as error:
                # What Pillow raises where it cannot write; a picture nobody depends on must not end an attempt.
                log.warning("preview.not_made", error=f"{type(error).__name__}: {error}")

    def _store_strips(self) -> None:
        """All that has come since the last strip, as one; where another part of the result has begun, up to there."""
        with self._lock:
            count = 0
            while count < len(self._strips) and self._follows(count):
                count += 1
            strips, self._strips = self._strips[:count], self._strips[count:]
            if self._strips:
                self._waiting.put(self._store_strips)
        if not strips:
            return
        y_px = strips[0][0]
        width, height = strips[0][1].width, sum(image.height for _, image in strips)
        whole = Image.new(strips[0][1].mode, (width, height))
        top = 0
        for _, image in strips:
            whole.paste(image, (0, top))
            top += image.height
        has_alpha = whole.mode == "RGBA"
        strip = Strip(y_px, width, height, self.factor, "webp" if has_alpha else "jpeg")
        options: dict[str, Any] = {"quality": 80, "method": 0} if has_alpha else {"quality": 85}
        self._put(strip_key(self._blob_prefix, self._attempt, strip), whole, strip.format.upper(), **options)
        self._ended.wait(BETWEEN_STRIPS_SECONDS)

    def _follows(self, number: int) -> bool:
        """Whether this waiting strip continues the one before it, or is the first."""
        if number == 0:
            return True
        (y_px, image), (next_y_px, _) = self._strips[number - 1 : number + 1]
        return next_y_px == y_px + image.height * self.factor

    def _put(self, key: str, picture: Image.Image, format: str, **options: Any) -> None:
        file = io.BytesIO()
        picture.save(file, format, **options)
        file.seek(0)
        self._storage.put(key, file, f"image/{format.lower()}")


def _side_by_side(parts: list[Image.Image]) -> Image.Image:
    """The parts, from the left, as one."""
    whole = Image.new(parts[0].mode, (sum(part.width for part in parts), parts[0].height))
    left = 0
    for part in parts:
        whole.paste(part, (left, 0))
        left += part.width
    return whole


def _image(samples: Samples) -> Image.Image:
    """(h, w, channels) of gray, gray and alpha, RGB or RGBA -> RGB or RGBA of 8 bits."""
    if samples.dtype != np.uint8:
        samples = (samples >> 8).astype(np.uint8)
    if samples.ndim == 2:
        samples = samples[..., None]
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[samples.shape[2]]
    pixels = np.ascontiguousarray(samples[..., 0] if mode == "L" else samples)
    image = Image.fromarray(pixels)
    return image if mode in ("RGB", "RGBA") else image.convert("RGB" if mode == "L" else "RGBA")
