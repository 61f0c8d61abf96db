"""How true a result is to its input: measured while the rows go by, from the very samples that are encoded.

A larger picture shrunk back should be the smaller one. The result is shrunk by taking means and compared in 8 bits:
PSNR over all channels, SSIM of luma and the difference of colours over windows of 8 x 8 px. Where tiles meet, steps
between neighbouring px are compared with those a few px away: a score of 1 is a seam that cannot be seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from worker.tiling import Plan

WINDOW_PX = 8
LUMA = np.array([0.299, 0.587, 0.114], np.float32)

LEAST_PSNR_DB = 6.0
MOST_COLOUR_DIFFERENCE = 25.0
"""Bounds of sanity, not of quality: beyond them a result shows another picture than the input. Real ones keep far off:
noise, which networks smooth away, comes out at 9 dB, and colours of photographs within 2."""

BESIDE_PX = 4
"""Steps this far from a seam, on both sides of it, are what its own is compared with."""


@dataclass(frozen=True)
class Fidelity:
    """What the comparison came to."""

    psnr_db: float | None
    """None for pictures that are equal."""
    ssim: float | None
    """None for pictures under 8 px a side."""
    colour_difference: float | None
    """Mean CIE76 difference of the windows' colours; 2 is just visible. None as for `ssim`."""
    seam_score: float | None
    """Steps across the borders of tiles over steps beside them; None where one tile made the picture."""
    seams: int
    """Borders that were looked at, across and down."""

    @property
    def is_sane(self) -> bool:
        return (self.psnr_db is None or self.psnr_db >= LEAST_PSNR_DB) and (
            self.colour_difference is None or self.colour_difference <= MOST_COLOUR_DIFFERENCE
        )


@dataclass(frozen=True)
class Sums:
    """What a comparison has added up. Those of the parts of a result, added, are those of the result but for the seams
    and windows where two parts meet, which neither sees whole."""

    squares: float
    samples: int
    similarity: float
    difference: float
    windows: int
    across: float
    beside: float
    columns: int
    """Borders of tiles that go down: the same ones in every part."""
    borders: int
    """Borders that go across."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            squares=self.squares + other.squares,
            samples=self.samples + other.samples,
            similarity=self.similarity + other.similarity,
            difference=self.difference + other.difference,
            windows=self.windows + other.windows,
            across=self.across + other.across,
            beside=self.beside + other.beside,
            columns=max(self.columns, other.columns),
            borders=self.borders + other.borders,
        )

    def fidelity(self) -> Fidelity:
        error = self.squares / self.samples
        seams = self.columns + self.borders
        return Fidelity(
            psnr_db=None if error == 0 else round(10 * math.log10(255**2 / error), 2),
            ssim=round(self.similarity / self.windows, 4) if self.windows else None,
            colour_difference=round(self.difference / self.windows, 3) if self.windows else None,
            seam_score=round(min(99.0, (self.across + 1e-6) / (self.beside + 1e-6)), 3) if seams else None,
            seams=seams,
        )


class Comparison:
    """Takes the rows of a result from the top down; holds a few of them and the result shrunk to the input's size."""

    def __init__(self, picture: NDArray[Any], scale: int, plans: Iterable[Plan], *, first_row: int = 0) -> None:
        """picture: (H, W, 3) uint8 or uint16, what went to the network. `plans` say where tiles meet. `first_row`: the
        row of the picture with which the part of the result begins that will come."""
        self._picture, self._scale = picture, scale
        height, width = picture.shape[:2]
        self._width, self._height = width * scale, height * scale
        self._rows_seen = first_row * scale
        self._held: NDArray[np.uint8] | None = None
        self._shrunk: list[NDArray[np.uint8]] = []
        self._compared = first_row
        self._squares = 0.0
        self._samples = 0
        self._windows = 0
        self._similarity = self._difference = 0.0
        columns, rows = set(), set()
        for plan in plans:
            for band in plan.bands:
                rows.add(round(band.region.y * self._height / plan.height))
                for tile in band.tiles:
                    columns.add(round(tile.keep.x * self._width / plan.width))
                    rows.add(round(tile.keep.y * self._height / plan.height))
        # What lies above it is not seen.
        rows.discard(first_row * scale)
        self._columns = np.array(sorted(x for x in columns if BESIDE_PX < x < self._width - BESIDE_PX), int)
        self._borders = [y for y in sorted(rows) if BESIDE_PX < y < self._height - BESIDE_PX]
        self._borders_in_all = len(self._borders)
        self._needed = {y + step for y in self._borders for step in (-BESIDE_PX - 1, -BESIDE_PX, -1, 0, 3, 4)}
        self._kept: dict[int, NDArray[np.int16]] = {}
        self._across = self._beside = 0.0

    @property
    def compared(self) -> int:
        """Rows of the input that are not looked at any more, from the top."""
        return self._compared

    def add(self, samples: NDArray[Any]) -> None:
        """The next rows: (rows, W * scale, channels) uint8 or uint16, as they are encoded; alpha is passed over."""
        colours = samples[..., :3] if samples.shape[2] >= 3 else samples[..., :1]
        if colours.dtype != np.uint8:
            colours = (colours >> 8).astype(np.uint8)
        self._look_at_seams(colours)
        self._rows_seen += len(colours)
        if self._held is not None:
            colours = np.concatenate([self._held, colours])
        whole = len(colours) // self._scale * self._scale
        self._held = colours[whole:].copy() if whole < len(colours) else None
        if whole:
            self._shrunk.append(_shrunk(colours[:whole], self._scale))
            self._compare(last=False)

    def result(self) -> Fidelity:
        """Once all rows are in."""
        return self.sums().fidelity()

    def sums(self) -> Sums:
        """Once all rows are in."""
        self._compare(last=True)
        return Sums(
            squares=self._squares,
            samples=self._samples,
            similarity=self._similarity,
            difference=self._difference,
            windows=self._windows,
            across=self._across,
            beside=self._beside,
            columns=len(self._columns),
            borders=self._borders_in_all,
        )

    def _compare(self, *, last: bool) -> None:
        ready = sum(len(rows) for rows in self._shrunk)
        usable = ready if last else ready // WINDOW_PX * WINDOW_PX
        if usable == 0:
            return
        rows = np.concatenate(self._shrunk)
        made, self._shrunk = rows[:usable], [rows[usable:]]
        given = self._picture[self._compared : self._compared + usable]
        self._compared += usable
        if given.dtype != np.uint8:
            given = (given >> 8).astype(np.uint8)
        given = given[..., : made.shape[2]]
        difference = made.astype(np.int16) - given
        self._squares += float(np.einsum("ijk,ijk->", difference, difference, dtype=np.float64))
        self._samples += difference.size
        down, across = usable // WINDOW_PX, made.shape[1] // WINDOW_PX
        if down and across:
            inside = np.s_[: down * WINDOW_PX, : across * WINDOW_PX]
            self._windows += down * across
            self._similarity += _similarity(_luma(made[inside]), _luma(given[inside]))
            apart = _lab(_means(made[inside])) - _lab(_means(given[inside]))
            self._difference += float(np.sqrt((apart**2).sum(axis=2)).sum())

    def _look_at_seams(self, colours: NDArray[np.uint8]) -> None:
        x = self._columns
        if len(x):
            # A few columns of the block, not the block: this costs next to nothing.
            near = {step: colours[:, x + step].astype(np.int16) for step in (-5, -4, -1, 0, 3, 4)}
            self._add_steps(near, weight=len(colours) / self._height)
        for y in range(self._rows_seen, self._rows_seen + len(colours)):
            if y in self._needed:
                self._kept[y] = colours[y - self._rows_seen].astype(np.int16)
        while self._borders and self._borders[0] + 4 < self._rows_seen + len(colours):
            y = self._borders.pop(0)
            self._add_steps({step: self._kept[y + step] for step in (-5, -4, -1, 0, 3, 4)}, weight=1.0)
            self._kept = {row: kept for row, kept in self._kept.items() if row > y - 5}

    def _add_steps(self, near: dict[int, NDArray[np.int16]], *, weight: float) -> None:
        self._across += weight * float(np.abs(near[0] - near[-1]).mean())
        beside = np.abs(near[-4] - near[-5]).mean() + np.abs(near[4] - near[3]).mean()
        self._beside += weight * float(beside) / 2


def _shrunk(rows: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """(H * scale, W * scale, C) -> (H, W, C): means of squares, rounded."""
    picture = Image.fromarray(rows if rows.shape[2] == 3 else rows[..., 0])
    reduced = np.asarray(picture.reduce(scale))
    return reduced if reduced.ndim == 3 else reduced[..., None]


def _luma(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    if pixels.shape[2] == 1:
        return pixels[..., 0].astype(np.float32)
    luma: NDArray[np.float32] = pixels @ LUMA
    return luma


def _windows(values: NDArray[Any]) -> NDArray[Any]:
    """(H, W) -> (windows down, windows across, 64)."""
    down, across = values.shape[0] // WINDOW_PX, values.shape[1] // WINDOW_PX
    parts = values.reshape(down, WINDOW_PX, across, WINDOW_PX)
    return parts.transpose(0, 2, 1, 3).reshape(down, across, WINDOW_PX**2)


def _similarity(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Sum over the windows of SSIM (Wang et al. 2004), each window weighted evenly."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    a, b = _windows(a), _windows(b)
    mean_a, mean_b = a.mean(axis=2), b.mean(axis=2)
    a, b = a - mean_a[..., None], b - mean_b[..., None]
    variances = (a * a).mean(axis=2) + (b * b).mean(axis=2)
    covariance = (a * b).mean(axis=2)
    similar = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((similar / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))).sum())


def _means(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(H, W, C) -> the windows' mean colours, (down, across, 3); gray is repeated."""
    means = np.stack([_windows(pixels[..., c]).mean(axis=2) for c in range(pixels.shape[2])], axis=2)
    return np.repeat(means, 3, axis=2) if means.shape[2] == 1 else means


def _lab(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """sRGB in 0 to 255 -> CIE L*a*b* under D65 (IEC 61966-2-1)."""
    unit = colours / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=2)
