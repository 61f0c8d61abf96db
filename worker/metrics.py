"""How near an enlarged picture is to the true one: PSNR and SSIM as the super-resolution papers print them; `evaluate`.

Only luma counts (Y of ITU-R BT.601, as MATLAB's rgb2ycbcr; a gray picture as it is), and a border of as many px as the
scale is left out. Published tables come in two conventions, 0.02 dB apart: Y rounded to 8 bits, as MATLAB gives it for
8-bit pictures, and Y as the formula gives it, as most Python code has it. `rounded` chooses; the first is the default.
"""

from __future__ import annotations

import contextlib
import re
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from shared.catalog import card
from worker.bicubic import imresize
from worker.networks import Network, load
from worker.perception import PerceptualDistance, niqe
from worker.upscale import enlarge

BICUBIC = "bicubic-matlab"
"""The baseline of every published table. It is no card: the card `bicubic` is Pillow's, which rounds but once."""

SSIM_WINDOW_PX = 11
SSIM_SIGMA_PX = 1.5
PEAK = 255.0
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Score:
    """One picture by one model, or the mean over the pictures."""

    picture: str
    model: str
    psnr: float
    """dB; infinite for equal pictures."""
    ssim: float
    perceptual: float
    """`worker.perception.PerceptualDistance`: 0 for equal pictures, lower is better."""
    niqe: float | None
    """Lower is better; None for pictures that are too small for it."""
    seconds: float
    """What the enlarging took."""
    megapixels_per_second: float
    """Of the result."""
    peak_bytes: int
    """The most memory held meanwhile: on a GPU the device's, else the whole process's. A mean holds the greatest."""


@dataclass(frozen=True)
class Table:
    scale: int
    made_small: bool
    """Whether the small pictures were made here, by MATLAB's bicubic; else the folder had them."""
    truth_niqe: float | None
    """Mean over the true pictures: what NIQE has to be seen beside."""
    rows: tuple[Score, ...]
    means: tuple[Score, ...]
    """One for each model, with the picture `mean`."""


class OnPicture(Protocol):
    """Hears of each picture that is scored."""

    def __call__(self, score: Score, picture: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None: ...


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
    scale: int | None = None,
    device: str = "cpu",
    rounded: bool = True,
    on_picture: OnPicture | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Table:
    """Each model's scores over a folder of true pictures; `bicubic-matlab` is a model like the others.

    The folder holds `HR/*.png` and `LRx4/*.png` of the same names (other scales by the folder's name), or pictures
    alone, in `HR` or directly; those are made small here as the published sets were, `scale` times (4). A true picture
    that is no multiple of the scale is cropped to it. `on_progress` is called with (pictures done, pictures in all).
    Raises ValueError if the folder is not so; ModelUnavailable for an unknown model.
    """
    scale, pairs = _pairs(folder, scale)
    # All are loaded before the first minute of work: a wrong name shows at once.
    networks = {name: None if name == BICUBIC else load(card(name), device) for name in models}
    distance = PerceptualDistance(device)
    rows: list[Score] = []
    for name, network in networks.items():
        if network is not None:
            # Where the device's speed is not yet known, planning the first picture would take the time to measure it.
            network.pixels_per_second()
        for small_path, truth_path in pairs:
            truth = _read(truth_path)
            small = _shrunk(truth, scale) if small_path is None else _read(small_path)
            memory = _PeakMemory(device)
            started = time.perf_counter()
            picture = _bicubic(small, scale) if network is None else _enlarged(network, small, scale)
            seconds = time.perf_counter() - started
            peak_bytes = memory.peak_bytes()
            truth = truth[: picture.shape[0], : picture.shape[1]]
            score = Score(
                picture=truth_path.stem,
                model=name,
                psnr=psnr(picture, truth, scale, rounded=rounded),
                ssim=ssim(picture, truth, scale, rounded=rounded),
                perceptual=distance(picture, truth, scale),
                niqe=niqe(luma(picture)),
                seconds=seconds,
                megapixels_per_second=picture.shape[0] * picture.shape[1] / 1e6 / seconds,
                peak_bytes=peak_bytes,
            )
            rows.append(score)
            if on_picture is not None:
                on_picture(score, picture, truth)
            if on_progress is not None:
                on_progress(len(rows), len(networks) * len(pairs))
    means = tuple(_mean([row for row in rows if row.model == name]) for name in networks)
    truth_niqe = _mean_or_none([niqe(luma(_read(truth))) for _, truth in pairs])
    return Table(scale, pairs[0][0] is None, truth_niqe, tuple(rows), means)


def _mean(scores: Sequence[Score]) -> Score:
    return Score(
        picture="mean",
        model=scores[0].model,
        psnr=fmean(score.psnr for score in scores),
        ssim=fmean(score.ssim for score in scores),
        perceptual=fmean(score.perceptual for score in scores),
        niqe=_mean_or_none([score.niqe for score in scores]),
        seconds=fmean(score.seconds for score in scores),
        megapixels_per_second=fmean(score.megapixels_per_second for score in scores),
        peak_bytes=max(score.peak_bytes for score in scores),
    )


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return fmean(told) if told else None


class _PeakMemory:
    """The most memory held from here on."""

    def __init__(self, device: str) -> None:
        self._device = device
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # Linux forgets the highest mark of the process when told so; elsewhere it is that since the start.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        if self._device.startswith("cuda"):
            return torch.cuda.max_memory_allocated(self._device)
        with contextlib.suppress(OSError):
            found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
            if found:
                return int(found.group(1)) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _bicubic(small: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    return imresize(small, small.shape[1] * scale, small.shape[0] * scale)


def _shrunk(truth: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    height, width = (length // scale for length in truth.shape[:2])
    return imresize(truth[: height * scale, : width * scale], width, height)


def _enlarged(network: Network, small: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """By the network; gray goes in as three equal channels and comes back as their mean weighted by BT.601."""
    colours = small if small.ndim == 3 else np.repeat(small[:, :, None], 3, axis=2)
    picture = np.concatenate([rows.pixels for rows in enlarge(network, colours, scale, dtype=np.uint8)])
    return picture if small.ndim == 3 else np.asarray(Image.fromarray(picture).convert("L"))


def benchmarks(folder: Path) -> list[Path]:
    """The folders that `evaluate` takes: this one, or those directly in it."""
    if _pictures(folder) or _pictures(folder / "HR") or any(folder.glob("LRx*")):
        return [folder]
    return sorted(each for each in folder.iterdir() if each.is_dir() and (each / "HR").is_dir())


def _pairs(folder: Path, scale: int | None) -> tuple[int, list[tuple[Path | None, Path]]]:
    """(scale, pairs of small and true picture); None for a small one that is to be made."""
    small_folders = sorted(path for path in folder.glob("LRx*") if re.fullmatch(r"LRx\d+", path.name))
    if scale is not None:
        small_folders = [path for path in small_folders if path.name == f"LRx{scale}"]
    if len(small_folders) > 1:
        names = ", ".join(path.name for path in small_folders)
        raise ValueError(f"{folder} has {names}: say by the scale which is meant.")
    if small_folders:
        scale = int(small_folders[0].name.removeprefix("LRx"))
        small = _pictures(small_folders[0])
        truths = {path.stem: path for path in _pictures(folder / "HR")}
        missing = [path.name for path in small if path.stem not in truths]
        if not small or missing:
            raise ValueError(f"{folder} has {len(small)} small pictures, and these have no true one in HR: {missing}.")
        return scale, [(path, truths[path.stem]) for path in small]
    scale = scale or 4
    pictures = _pictures(folder / "HR") or _pictures(folder)
    if not pictures:
        raise ValueError(f"{folder} holds no pictures, and no folder HR of them.")
    return scale, [(None, path) for path in pictures]


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURES)


def _read(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3), or (H, W) for a gray file. Raises ValueError for what is no picture."""
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("L" if picture.mode == "L" else "RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


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
