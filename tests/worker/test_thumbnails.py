"""Thumbnails: small, true to the picture, and never a reason for a job to fail."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from shared.storage import Storage
from shared.thumbnails import LONGEST_SIDE_PX, key
from worker.thumbnails import Thumbnails, webp


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_kind_of_picture_becomes_a_small_webp(channels: int, dtype: type) -> None:
    full = np.iinfo(dtype).max
    samples = np.full((300, 600, channels), full // 2, dtype)
    with Image.open(io.BytesIO(webp(samples))) as image:
        assert image.format == "WEBP"
        assert image.size == (LONGEST_SIDE_PX, LONGEST_SIDE_PX // 2)
        assert image.mode == ("RGBA" if channels in (2, 4) else "RGB")
        assert abs(image.convert("RGB").getpixel((10, 10))[0] - 127) <= 3  # type: ignore[index]


def test_a_small_picture_is_not_enlarged() -> None:
    with Image.open(io.BytesIO(webp(np.zeros((5, 7, 3), np.uint8)))) as image:
        assert image.size == (7, 5)


def test_a_results_thumbnail_is_made_of_the_rows_as_they_pass(storage: Storage) -> None:
    storage.ensure_bucket()
    # Wide enough that not every row is kept, in bands that no step of rows divides.
    width, height = 2500, 1900
    rows = np.zeros((height, width, 3), np.uint8)
    rows[height // 2 :, :, 0] = 255
    with Thumbnails(storage, "jobs/j/random", 3) as thumbnails:
        thumbnails.begins(rows[:475, :625], width, height)
        for top in range(0, height, 333):
            thumbnails.made(rows[top : top + 333])
        with thumbnails.storing_result():
            pass
    assert storage.keys() == [key("jobs/j/random", "input", 3), key("jobs/j/random", "result", 3)]
    file = io.BytesIO()
    storage.get(key("jobs/j/random", "result", 3), file)
    with Image.open(file) as image:
        assert max(image.size) == LONGEST_SIDE_PX
        assert abs(image.height - LONGEST_SIDE_PX * height / width) <= 1
        top, bottom = (np.asarray(image)[row].mean(axis=0) for row in (5, image.height - 5))
        assert top[0] < 20, "the upper half is black"
        assert bottom[0] > 235, "the lower half is red"


def test_storage_that_is_away_costs_the_inputs_thumbnail_and_nothing_else(settings: object) -> None:
    away = Storage(settings, silence_seconds=0.2, tries=1)  # type: ignore[arg-type]
    with Thumbnails(away, "jobs/j/random", 1) as thumbnails:
        thumbnails.begins(np.zeros((8, 8, 3), np.uint8), 32, 32)
    away.close()
