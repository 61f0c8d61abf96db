"""The comparison of a result with its input: what it counts, that it counts the same in any bands, what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from worker.fidelity import Comparison, Fidelity
from worker.tiling import Plan, plan


def a_picture(height: int = 40, width: int = 48, seed: int = 0) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).normal(0, 8, (height, width, 3))
    soft = np.stack([120 + 80 * np.sin(x / 9), 120 + 80 * np.cos(y / 7), 60 + 2.5 * x], axis=2)
    return np.clip(soft + noise, 0, 255).astype(np.uint8)


def enlarged(picture: NDArray[Any], scale: int = 4) -> NDArray[Any]:
    return picture.repeat(scale, 0).repeat(scale, 1)


def compared(
    picture: NDArray[Any], result: NDArray[Any], scale: int = 4, *, rows: int = 1000, plans: tuple[Plan, ...] = ()
) -> Fidelity:
    comparison = Comparison(picture, scale, plans)
    for top in range(0, len(result), rows):
        comparison.add(result[top : top + rows])
    return comparison.result()


def test_a_result_that_shrinks_to_its_input_has_no_error() -> None:
    picture = a_picture()
    fidelity = compared(picture, enlarged(picture))
    assert fidelity == Fidelity(psnr_db=None, ssim=1.0, colour_difference=0.0, seam_score=None, seams=0)
    assert fidelity.is_sane


def test_psnr_is_that_of_the_whole_picture() -> None:
    picture = a_picture()
    noise = np.random.default_rng(1).integers(-9, 10, picture.shape)
    other = np.clip(picture + noise, 0, 255).astype(np.uint8)
    error = float(((other.astype(float) - picture) ** 2).mean())
    assert compared(picture, enlarged(other)).psnr_db == pytest.approx(10 * np.log10(255**2 / error), abs=0.01)


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rows", [1, 5, 32, 33])
def test_the_figures_do_not_depend_on_how_the_rows_come(rows: int, scale: int) -> None:
    picture, other = a_picture(), a_picture(seed=5)
    result = enlarged(other, scale)
    cut = plan(48, 40, halo_px=2, tile_px=16)
    whole = compared(picture, result, scale, plans=(cut,))
    # Windows are not cut where the rows come in pieces; only their sums are added in another order.
    assert compared(picture, result, scale, rows=rows, plans=(cut,)) == whole
    assert whole.seams == 4


def test_gray_and_alpha_and_sixteen_bits_are_compared_in_the_colours_that_are_seen() -> None:
    picture = a_picture()
    gray = np.repeat(picture[..., :1], 3, axis=2)
    alpha = np.zeros((160, 192, 1), np.uint8)
    assert compared(gray, enlarged(gray)[..., :1]).psnr_db is None
    assert compared(gray, np.concatenate([enlarged(gray)[..., :1], alpha], axis=2)).psnr_db is None
    assert compared(picture, np.concatenate([enlarged(picture), alpha], axis=2)).psnr_db is None
    assert compared(picture.astype(np.uint16) * 257, enlarged(picture).astype(np.uint16) * 257).psnr_db is None


def test_a_difference_of_colour_is_in_cie_lab() -> None:
    white = np.full((16, 16, 3), 255, np.uint8)
    black = np.zeros_like(white)
    red = np.zeros_like(white)
    red[..., 0] = 255
    assert compared(white, enlarged(black)).colour_difference == pytest.approx(100, abs=0.05)
    # L*a*b* of sRGB's red under D65 is 53.24, 80.09, 67.20.
    far = np.sqrt((100 - 53.24) ** 2 + 80.09**2 + 67.20**2)
    assert compared(white, enlarged(red)).colour_difference == pytest.approx(far, abs=0.2)


def test_a_seam_is_seen_and_a_step_that_is_none_is_not() -> None:
    picture = a_picture()
    cut = plan(48, 40, halo_px=2, tile_px=24)
    smooth = np.asarray(enlarged(picture), np.float32)
    smooth = (np.roll(smooth, 1, 0) + np.roll(smooth, 1, 1) + np.roll(smooth, -1, 0) + np.roll(smooth, -1, 1)) / 4
    good = smooth.clip(0, 255).astype(np.uint8)
    score = compared(picture, good, plans=(cut,)).seam_score
    assert score is not None
    assert 0.5 < score < 2.5
    bad = good.copy()
    bad[:, 96:] = np.clip(bad[:, 96:].astype(int) + 40, 0, 255)
    worse = compared(picture, bad, plans=(cut,)).seam_score
    assert worse is not None
    assert worse > 2 * score
    assert compared(picture, good).seam_score is None


def test_a_picture_smaller_than_a_window_has_a_psnr_only() -> None:
    tiny = a_picture(5, 7)
    fidelity = compared(tiny, enlarged(255 - tiny))
    assert fidelity.ssim is None
    assert fidelity.colour_difference is None
    assert fidelity.psnr_db is not None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda picture: 255 - picture,
        lambda picture: np.zeros_like(picture),
        lambda picture: np.full_like(picture, 255),
        lambda picture: picture[..., ::-1] // 2,
    ],
)
def test_another_picture_is_not_sane(spoil: Any) -> None:
    picture = a_picture()
    assert not compared(picture, enlarged(spoil(picture))).is_sane


@pytest.mark.parametrize("seed", range(3))
def test_noise_that_comes_out_smooth_is_sane(seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    means = noise.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3)).astype(np.uint8)
    assert compared(noise, enlarged(means, 16)).is_sane
