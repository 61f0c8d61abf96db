"""How near an enlarged picture is to the true one: PSNR and SSIM as the super-resolution papers print them.

Only luma counts (Y of ITU-R BT.601, as MATLAB's rgb2ycbcr; a gray picture as it is), and a border of as many px as the
scale is left out. Published tables come in two conventions, 0.02 dB apart: Y rounded to 8 bits, as MATLAB gives it for
8-bit pictures, and Y as the formula gives it, as most Python code has it. `rounded` chooses; the first is the default.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.catalog import card
from worker.networks import Network, load
from worker.upscale import enlarge

BICUBIC = "bicubic (Pillow)"
"""The baseline's name says whose: MATLAB's imresize, which papers use, differs by some hundredths of a dB."""

SSIM_WINDOW_PX = 11
SSIM_SIGMA_PX = 1.5
PEAK = 255.0


@dataclass(frozen=True)
class Score:
    """One picture by one model, or the mean over the pictures."""

    picture: str
    model: str
    psnr: float
    """dB; infinite for equal pictures."""
    ssim: float
    seconds: float
    """What the enlarging took."""


@dataclass(frozen=True)
class Table:
    rows: tuple[Score, ...]
    means: tuple[Score, ...]
    """One for each model, with the picture `mean`."""


def luma(picture: NDArray[np.uint8], *, rounded: bool = True) -> NDArray[np.float64]:
    """(H, W, 3) uint8 -> (H, W) float64, 16 to 235: Y of BT.601. Gray, (H, W) uint8, stays as it is, 0 to 255."""
    if picture.dtype != np.uint8 or (picture.ndim != 2 and picture.shape[2:] != (3,)):
        raise ValueError(f"Luma is taken from (H, W, 3) or (H, W) uint8; this is {picture.shape} {picture.dtype}.")
    if picture.ndim == 2:
        return picture.astype(np.float64)
    weighted: NDArray[np.float64] = picture @ np.array([65.481, 128.553, 24.966]) / PEAK + 16.0
    # Halves up, as MATLAB rounds: numpy's own rounding takes them to the even number.
    return np.floor(weighted + 0.5) if rounded else weighted


def psnr(picture: NDArray[np.uint8], truth: NDArray[np.uint8], border_px: int, *, rounded: bool = True) -> float:
    """Peak signal-to-noise ratio of luma in dB, `border_px` on each side left out; infinite for equal pictures.

    Both (H, W, 3) or both (H, W), uint8, of one size. Raises ValueError for others, or if the border leaves nothing.
    """
    a, b = _lumas(picture, truth, border_px, rounded, least_px=1)
    mean_squared_error = float(np.mean((a - b) ** 2))
    if mean_squared_error == 0:
        return float("inf")
    return float(10 * np.log10(PEAK**2 / mean_squared_error))


def ssim(picture: NDArray[np.uint8], truth: NDArray[np.uint8], border_px: int, *, rounded: bool = True) -> float:
    """Structural similarity of luma (Wang et al. 2004, with its 11 px Gaussian window of sigma 1.5), mean of its map.

    Both (H, W, 3) or both (H, W), uint8, of one size, at least 11 px a side without the border; raises ValueError for
    others. The map covers only places where the window lies inside the picture, as in the authors' own code.
    """
    a, b = _lumas(picture, truth, border_px, rounded, least_px=SSIM_WINDOW_PX)
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    mean_a, mean_b = _blurred(a), _blurred(b)
    variance_a, variance_b = _blurred(a * a) - mean_a**2, _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    )
    return float(similarity.mean())


def evaluate(
    folder: Path,
    models: Sequence[str],
    *,
    device: str = "cpu",
    rounded: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Table:
    """Each model's scores over a benchmark folder, with `bicubic` (Pillow's) as a model like the others.

    The folder holds `HR/*.png` and `LRx4/*.png` of the same names (other scales by the folder's name): true and small
    pictures. A true picture that is no multiple of the scale is cropped to it. `on_progress` is called with (pictures
    done, pictures in all). Raises ValueError if the folder is not so; ModelUnavailable for an unknown model.
    """
    scale, pairs = _pairs(folder)
    # All are loaded before the first minute of work: a wrong name shows at once.
    networks = {name: None if name == "bicubic" else load(card(name), device) for name in models}
    rows: list[Score] = []
    means: list[Score] = []
    for name, network in networks.items():
        of_model: list[Score] = []
        for small_path, truth_path in pairs:
            small, truth = _read(small_path), _read(truth_path)
            started = time.perf_counter()
            picture = _bicubic(small, scale) if network is None else _enlarged(network, small, scale)
            seconds = time.perf_counter() - started
            truth = truth[: picture.shape[0], : picture.shape[1]]
            of_model.append(
                Score(
                    small_path.stem,
                    BICUBIC if network is None else name,
                    psnr(picture, truth, scale, rounded=rounded),
                    ssim(picture, truth, scale, rounded=rounded),
                    seconds,
                )
            )
            if on_progress is not None:
                on_progress(len(rows) + len(of_model), len(networks) * len(pairs))
        rows += of_model
        means.append(
            Score(
                "mean",
                of_model[0].model,
                fmean(score.psnr for score in of_model),
                fmean(score.ssim for score in of_model),
                fmean(score.seconds for score in of_model),
            )
        )
    return Table(tuple(rows), tuple(means))


def _bicubic(small: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    size = (small.shape[1] * scale, small.shape[0] * scale)
    return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))


def _enlarged(network: Network, small: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """By the network; gray goes in as three equal channels and comes back as their mean weighted by BT.601."""
    colours = small if small.ndim == 3 else np.repeat(small[:, :, None], 3, axis=2)
    picture = np.concatenate([rows.pixels for rows in enlarge(network, colours, scale, dtype=np.uint8)])
    return picture if small.ndim == 3 else np.asarray(Image.fromarray(picture).convert("L"))


def _pairs(folder: Path) -> tuple[int, list[tuple[Path, Path]]]:
    """(scale, pairs of small and true picture, by name)."""
    small_folders = sorted(path for path in folder.glob("LRx*") if re.fullmatch(r"LRx\d+", path.name))
    if len(small_folders) != 1:
        raise ValueError(f"{folder} needs one folder LRx<scale> of small pictures; it has {len(small_folders)}.")
    scale = int(small_folders[0].name.removeprefix("LRx"))
    small = sorted(small_folders[0].glob("*.png"))
    pairs = [(path, folder / "HR" / path.name) for path in small]
    missing = [truth.name for _, truth in pairs if not truth.is_file()]
    if not pairs or missing:
        raise ValueError(f"{folder} has {len(pairs)} small pictures, and these have no true one in HR: {missing}.")
    return scale, pairs


def _read(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3), or (H, W) for a gray file."""
    with Image.open(path, formats=["PNG"]) as picture:
        return np.asarray(picture.convert("L" if picture.mode == "L" else "RGB"))


def _lumas(
    picture: NDArray[np.uint8], truth: NDArray[np.uint8], border_px: int, rounded: bool, least_px: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if picture.shape != truth.shape:
        raise ValueError(f"Pictures of one size and kind are compared; these are {picture.shape} and {truth.shape}.")
    height, width = truth.shape[0] - 2 * border_px, truth.shape[1] - 2 * border_px
    if min(height, width) < least_px:
        raise ValueError(f"At least {least_px} px a side are compared; without the border {width} x {height} are left.")
    inside = np.s_[border_px : border_px + height, border_px : border_px + width]
    return luma(picture, rounded=rounded)[inside], luma(truth, rounded=rounded)[inside]


def _blurred(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian mean around each place whose window lies inside: (H, W) -> (H - 10, W - 10)."""
    offsets = np.arange(SSIM_WINDOW_PX) - SSIM_WINDOW_PX // 2
    weights = np.exp(-(offsets**2) / (2 * SSIM_SIGMA_PX**2))
    weights /= weights.sum()
    height, width = values.shape[0] - SSIM_WINDOW_PX + 1, values.shape[1] - SSIM_WINDOW_PX + 1
    down: NDArray[Any] = sum((w * values[i : i + height] for i, w in enumerate(weights)), np.zeros((height, 1)))
    both: NDArray[Any] = sum((w * down[:, i : i + width] for i, w in enumerate(weights)), np.zeros((height, 1)))
    return both
