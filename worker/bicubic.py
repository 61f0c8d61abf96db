"""MATLAB's imresize, bicubic: what every published super-resolution table was made with.

Shrinking widens the kernel (antialiased); each of the two passes is rounded to 8 bits, as MATLAB does with 8-bit
pictures; beyond an edge the edge's own pixels go on (the clamped edges of the MATLAB that made the classical benchmark
sets). Pillow and OpenCV differ in all three, and with them every score by some hundredths of a dB.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

CUBIC_WIDTH_PX = 4.0

Number = TypeVar("Number", np.uint8, np.float64)


def imresize(picture: NDArray[Number], width: int, height: int, *, mirrored: bool = False) -> NDArray[Number]:
    """(H, W) or (H, W, channels), uint8 or float64 -> the same with `height` x `width`.

    Only uint8 is rounded and clipped. With `mirrored` the picture is thought mirrored at its edges, as the MATLAB of
    today has it, in place of its outermost pixels going on. Raises ValueError for another kind of array.
    """
    if (
        picture.dtype not in (np.uint8, np.float64)
        or picture.ndim not in (2, 3)
        or min(*picture.shape, width, height) < 1
    ):
        raise ValueError(
            f"Resized is (H, W[, C]) of uint8 or float64, to 1 x 1 px or more; this is {picture.shape} "
            f"{picture.dtype}, to {width} x {height} px."
        )
    passes = [(0, picture.shape[0], height), (1, picture.shape[1], width)]
    # MATLAB takes the direction that shrinks most (or grows least) first; rows where both are alike.
    for axis, length, new_length in sorted(passes, key=lambda each: each[2] / each[1]):
        picture = _along(picture, axis, length, new_length, mirrored)
    return picture


def _along(picture: NDArray[Number], axis: int, length: int, new_length: int, mirrored: bool) -> NDArray[Number]:
    positions, weights = _taps(length, new_length)
    if mirrored:
        positions = positions % (2 * length)
        positions = np.minimum(positions, 2 * length - 1 - positions)
    positions = np.clip(positions, 0, length - 1)
    resized: NDArray[Any] = np.zeros((*picture.shape[:axis], new_length, *picture.shape[axis + 1 :]))
    spread = (slice(None),) + (None,) * (picture.ndim - 1 - axis)
    for tap in range(positions.shape[1]):
        resized += picture.take(positions[:, tap], axis=axis) * weights[:, tap][spread]
    if picture.dtype == np.uint8:
        # Halves up, as MATLAB rounds to integers.
        resized = np.floor(np.clip(resized, 0, 255) + 0.5)
    return resized.astype(picture.dtype)


def _taps(length: int, new_length: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each new pixel the old ones it is made of, also beyond the edges, and their weights: (new_length, taps)."""
    scale = new_length / length
    squeeze = min(1.0, scale)
    width = CUBIC_WIDTH_PX / squeeze
    # Centres of pixels, counted from 0: (i + 0.5) / scale - 0.5.
    centres = (np.arange(new_length) + 0.5) / scale - 0.5
    first = np.floor(centres - width / 2).astype(np.int64)
    positions = first[:, None] + np.arange(math.ceil(width) + 2)
    weights = _cubic(squeeze * (centres[:, None] - positions))
    weights /= weights.sum(axis=1, keepdims=True)
    used = np.any(weights != 0, axis=0)
    return positions[:, used], weights[:, used]


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys 1981 with a = -0.5."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    kernel: NDArray[np.float64] = np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
    return kernel
