from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from worker.bicubic import imresize


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)


def keys(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0


def line_by_the_book(line: NDArray[Any], new_length: int) -> NDArray[np.float64]:
    """One pixel after the other, from the definition; shares no code with the module."""
    scale = new_length / len(line)
    squeeze = min(1.0, scale)
    result = []
    for index in range(new_length):
        centre = (index + 0.5) / scale - 0.5
        weights = {place: keys(squeeze * (centre - place)) for place in range(-20, len(line) + 20)}
        total = sum(weights.values())
        result.append(sum(w * float(line[min(max(p, 0), len(line) - 1)]) for p, w in weights.items()) / total)
    return np.array(result)


@pytest.mark.parametrize("new_length", [4, 5, 8, 16, 17, 48])
def test_a_line_is_resized_as_the_definition_says(new_length: int) -> None:
    line = noise(1, 16)
    expected = line_by_the_book(line[0], new_length)
    assert imresize(line.astype(np.float64), new_length, 1)[0] == pytest.approx(expected, abs=1e-9)
    rounded = np.floor(expected.clip(0, 255) + 0.5)
    assert np.abs(imresize(line, new_length, 1)[0] - rounded).max() == 0


def test_each_pass_is_rounded_to_8_bits_rows_first() -> None:
    picture = noise(16, 16)
    down = np.stack([imresize(column[None], 4, 1)[0] for column in picture.T], axis=1)
    assert np.array_equal(imresize(picture, 4, 4), imresize(down, 4, 4))


def test_the_direction_that_shrinks_more_comes_first() -> None:
    picture = noise(16, 16)
    assert np.array_equal(imresize(picture, 4, 8), imresize(picture.T, 8, 4).T)


def test_mirrored_edges_are_those_of_a_mirrored_picture() -> None:
    line = noise(1, 16).astype(np.float64)
    twice = np.concatenate([line[:, ::-1], line, line[:, ::-1]], axis=1)
    assert imresize(line, 8, 1, mirrored=True)[0] == pytest.approx(imresize(twice, 24, 1)[0, 8:16])
    assert imresize(line, 8, 1)[0] != pytest.approx(imresize(twice, 24, 1)[0, 8:16])


def test_colours_are_resized_each_for_itself() -> None:
    picture = np.stack([noise(9, 12, seed) for seed in range(3)], axis=2)
    assert np.array_equal(imresize(picture, 24, 18)[:, :, 1], imresize(picture[:, :, 1].copy(), 24, 18))


@pytest.mark.parametrize("picture", [noise(4, 4).astype(np.uint16), noise(4, 4)[0], noise(0, 4)])
def test_what_is_no_picture_is_refused(picture: Any) -> None:
    with pytest.raises(ValueError, match="Resized is"):
        imresize(picture, 2, 2)


def test_the_small_pictures_of_the_published_sets_come_out_bit_for_bit(samples: Path) -> None:
    compared = 0
    for small_path in sorted((samples / "sr").glob("set*/LRx4/*.png")):
        with Image.open(small_path) as small, Image.open(small_path.parents[1] / "HR" / small_path.name) as truth:
            cropped = np.asarray(truth)[: truth.height // 4 * 4, : truth.width // 4 * 4]
            assert np.array_equal(imresize(cropped, small.width, small.height), np.asarray(small)), small_path.name
            compared += 1
    assert compared == 19
