"""Strips of a result under way, in real storage: whatever the picture, and work never waits."""

from __future__ import annotations

import io
import time
from typing import BinaryIO

import numpy as np
import pytest
from PIL import Image

from shared.errors import StorageUnavailable
from shared.previews import strip_named, strips_of, strips_prefix
from shared.settings import Settings
from shared.storage import Storage
from worker.codec import Samples
from worker.previews import LAST_WAIT_SECONDS, LONGEST_HEIGHT_PX, LONGEST_WIDTH_PX, Previews

PREFIX = "jobs/job_1/random"


def picture_at(storage: Storage, key: str) -> Image.Image:
    file = io.BytesIO()
    storage.get(key, file)
    return Image.open(file)


def put_together(storage: Storage, height: int) -> Image.Image:
    """The result as a page shows it: every strip at its place."""
    keys = storage.keys(strips_prefix(PREFIX, 1))
    strips = strips_of(keys)
    factor = strips[0].factor
    whole = Image.new("RGBA", (strips[0].width, -(-height // factor)))
    for key, strip in zip(keys, strips, strict=True):
        image = picture_at(storage, key)
        assert image.size == (strip.width, strip.height)
        whole.paste(image.convert("RGBA"), (0, strip.y_px // factor))
    return whole


KINDS = [(1, np.uint8), (2, np.uint16), (3, np.uint8), (3, np.uint16), (4, np.uint8)]


@pytest.mark.parametrize(("channels", "dtype"), KINDS)
def test_the_strips_are_the_result_made_small(storage: Storage, channels: int, dtype: type) -> None:
    storage.ensure_bucket()
    height, width = 1000, 2 * LONGEST_WIDTH_PX + 37
    ramp = np.linspace(0, np.iinfo(dtype).max, width).astype(dtype)[None, :, None]
    rows: Samples = np.broadcast_to(ramp, (height, width, channels)).copy()
    if channels in (2, 4):
        rows[..., -1] = np.iinfo(dtype).max
    rows[height // 2 :] = rows[height // 2 :, ::-1]
    with Previews(storage, PREFIX, 1) as previews:
        previews.begins(np.zeros((500, 600, 3), dtype), width, height)
        # Bands of a height that no whole number divides.
        for top in range(0, height, 97):
            previews.made(rows[top : top + 97])
    whole = put_together(storage, height)
    assert whole.size == (-(-width // 3), -(-height // 3))
    pixels = np.asarray(whole).astype(int)
    expected = np.linspace(0, 255, whole.width)
    for row, wanted in ((20, expected), (whole.height - 20, expected[::-1])):
        error = np.abs(pixels[row, :, 0] - wanted)
        assert error.max() < 12, f"max {error.max():.1f} at {error.argmax()}, mean {error.mean():.2f}"
    assert pixels[20, :, 3].min() > 250


def test_parts_of_a_result_made_by_two_workers_leave_no_gap(storage: Storage) -> None:
    storage.ensure_bucket()
    width, cuts = 2 * LONGEST_WIDTH_PX + 37, (0, 388, 701, 1000)
    rows: Samples = np.broadcast_to((np.arange(1000) // 4).astype(np.uint8)[:, None, None], (1000, width, 3))
    with Previews(storage, PREFIX, 1) as one, Previews(storage, PREFIX, 1) as other:
        for number, worker in ((0, one), (1, other), (2, one)):
            part = range(cuts[number], cuts[number + 1])
            worker.begins(np.zeros((500, 600, 3), np.uint8), width, 1000, part)
            for top in range(part.start, part.stop, 97):
                worker.made(rows[top : min(top + 97, part.stop)])
    pixels = np.asarray(put_together(storage, 1000)).astype(int)
    assert pixels[..., 3].min() > 250, f"nothing is shown in row {pixels[..., 3].min(axis=1).argmin()}"
    error = np.abs(pixels[:, 100, 0] - np.linspace(0, 249, len(pixels)))
    assert error.max() < 6, f"max {error.max():.1f} at {error.argmax()}, mean {error.mean():.2f}"


def test_a_tall_result_is_bounded_too(storage: Storage) -> None:
    storage.ensure_bucket()
    with Previews(storage, PREFIX, 1) as previews:
        previews.begins(np.zeros((900, 8, 3), np.uint8), 32, 3 * LONGEST_HEIGHT_PX)
        for _ in range(3):
            previews.made(np.zeros((LONGEST_HEIGHT_PX, 32, 3), np.uint8))
    whole = put_together(storage, 3 * LONGEST_HEIGHT_PX)
    assert whole.size == (11, LONGEST_HEIGHT_PX)


def test_a_result_that_comes_at_once_has_no_strips(storage: Storage) -> None:
    storage.ensure_bucket()
    with Previews(storage, PREFIX, 1) as previews:
        previews.begins(np.zeros((10, 10, 3), np.uint8), 40, 40)
        previews.made(np.zeros((40, 40, 3), np.uint8))
    assert storage.keys(PREFIX) == []


def test_storage_that_is_away_or_hangs_costs_only_the_pictures(settings: Settings) -> None:
    class Away(Storage):
        def put(self, key: str, file: BinaryIO, content_type: str, *, on_bytes: object = None) -> None:
            time.sleep(0.1)
            raise StorageUnavailable("Object storage does not answer.")

    started = time.monotonic()
    with Previews(Away(settings), PREFIX, 1) as previews:
        previews.begins(np.zeros((10, 10, 3), np.uint8), 40, 80)
        for _ in range(40):
            previews.made(np.zeros((2, 40, 3), np.uint8))
        assert time.monotonic() - started < 2, "who makes bands does not wait for storage"
    assert time.monotonic() - started < 2 + LAST_WAIT_SECONDS


def test_only_names_of_strips_are_taken_for_strips() -> None:
    assert strip_named("0000000120-240x60-2.jpeg") is not None
    for name in ("input", "0-1x1-1.png", "../0000000120-240x60-2.jpeg", "0000000120-240x60-2.jpeg/x", "a-1x1-1.webp"):
        assert strip_named(name) is None, name
