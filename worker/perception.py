"""How good a picture looks, as far as a number can say: a distance in a classifier's features, and NIQE.

The usual perceptual score is LPIPS (Zhang et al. 2018, https://arxiv.org/abs/1801.03924). Its AlexNet and VGG weights
come in no package and would have to be downloaded, so `PerceptualDistance` is made the same way from the classifier
that is here anyway, EfficientNet-Lite0, without LPIPS's learnt weights for channels. Its values are its own, and are
not to be set beside published LPIPS.

NIQE (Mittal et al. 2013, "Making a completely blind image quality analyzer") needs no true picture: it tells how far a
picture's local statistics are from those of undisturbed photographs. `niqe_pristine.npz` holds the authors' own model
of those; under which terms, `niqe_pristine.txt` says.
"""

from __future__ import annotations

import functools
import importlib.resources
import io
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from worker.bicubic import imresize
from worker.classify import Classifier

NIQE_BLOCK_PX = 96
NIQE_WINDOW_PX = 7
NIQE_SIGMA_PX = 7 / 6
FIRST_STAGE = 2
"""The stages at an eighth of the picture's size and below are compared. Those nearer to the pixels measure once more
what PSNR does: on Set5 and Set14 they put SRResNet before SRGAN, and the first one even bicubic."""

SHAPES = np.arange(0.2, 10.001, 0.001)
"""Shapes of the generalized Gaussian among which the fitting one is sought."""


class PerceptualDistance:
    """0 for equal pictures, larger for pictures that look more different."""

    def __init__(self, device: str) -> None:
        self._classifier = Classifier.load(device)
        self._device = torch.device(device)

    def __call__(self, picture: NDArray[np.uint8], truth: NDArray[np.uint8], border_px: int) -> float:
        """Both (H, W, 3) or (H, W) uint8 of one size; `border_px` on each side left out. On one torch device."""
        with torch.inference_mode():
            a, b = (self._tensor(each[border_px:-border_px, border_px:-border_px]) for each in (picture, truth))
            return float(self.between(a, b))

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        """(N, 3, H, W) each, in [0, 1] -> scalar, the mean over the N; gradients flow back to both.

        At each place of each stage the squared difference of the two unit vectors of features; mean over the places,
        sum over the stages: equation 1 of Zhang et al. with all channels weighing the same.
        """
        stages = (self._classifier.features(each)[FIRST_STAGE:] for each in (a, b))
        layers = zip(*stages, strict=True)
        return torch.stack([(_unit(x) - _unit(y)).square().sum(dim=1).mean() for x, y in layers]).sum()

    def _tensor(self, picture: NDArray[np.uint8]) -> Tensor:
        colours = picture if picture.ndim == 3 else np.repeat(picture[:, :, None], 3, axis=2)
        return torch.from_numpy(np.ascontiguousarray(colours)).to(self._device).permute(2, 0, 1)[None].float() / 255


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1, eps=1e-6)


def niqe(luma: NDArray[np.float64]) -> float | None:
    """NIQE of luma (H, W), 0 to 255; lower is better, undisturbed photographs have 2 to 4.

    None for a picture of fewer than two blocks of 96 px: their spread cannot be told.
    """
    rows, columns = (length // NIQE_BLOCK_PX for length in luma.shape)
    if rows * columns < 2:
        return None
    values = luma[: rows * NIQE_BLOCK_PX, : columns * NIQE_BLOCK_PX]
    coarse = imresize(values, values.shape[1] // 2, values.shape[0] // 2, mirrored=True)
    features = np.concatenate(
        [_block_features(values, NIQE_BLOCK_PX), _block_features(coarse, NIQE_BLOCK_PX // 2)], axis=1
    )
    # A block of one colour has no statistics.
    features = features[np.isfinite(features).all(axis=1)]
    if len(features) < 2:
        return None
    mean, covariance = _pristine()
    apart = mean - features.mean(axis=0)
    inverse = np.linalg.pinv((covariance + np.cov(features, rowvar=False)) / 2)
    return math.sqrt(float(apart @ inverse @ apart))


@functools.cache
def _pristine() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    content = (importlib.resources.files(__package__ or "worker") / "niqe_pristine.npz").read_bytes()
    with np.load(io.BytesIO(content)) as file:
        return file["mean"], file["covariance"]


def _block_features(values: NDArray[np.float64], side_px: int) -> NDArray[np.float64]:
    """(blocks, 18): of each block's normalized values and of their products with four neighbours."""
    mean = _blurred(values)
    deviation = np.sqrt(np.abs(_blurred(values**2) - mean**2))
    normalized = (values - mean) / (deviation + 1)
    features = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for left in range(0, normalized.shape[1], side_px):
            for top in range(0, normalized.shape[0], side_px):
                block = normalized[top : top + side_px, left : left + side_px]
                shape, low, high = _fitted(block)
                of_block = [shape, (low + high) / 2]
                for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
                    shape, low, high = _fitted(block * np.roll(block, shift, axis=(0, 1)))
                    mean_of_products = (high - low) * _gamma(2 / shape) / _gamma(1 / shape)
                    of_block += [shape, mean_of_products, low, high]
                features.append(of_block)
    return np.array(features)


def _fitted(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Shape and the two widths of the asymmetric generalized Gaussian with the moments of `values`."""
    low = math.sqrt(np.mean(values[values < 0] ** 2)) if (values < 0).any() else math.nan
    high = math.sqrt(np.mean(values[values > 0] ** 2)) if (values > 0).any() else math.nan
    if not (low > 0 and high > 0):
        return math.nan, math.nan, math.nan
    skew = low / high
    ratio = np.mean(np.abs(values)) ** 2 / np.mean(values**2) * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shape = float(SHAPES[np.argmin((_ratios() - ratio) ** 2)])
    width = math.sqrt(_gamma(1 / shape) / _gamma(3 / shape))
    return shape, low * width, high * width


@functools.cache
def _ratios() -> NDArray[np.float64]:
    return np.array([_gamma(2 / s) ** 2 / (_gamma(1 / s) * _gamma(3 / s)) for s in SHAPES])


def _gamma(x: float) -> float:
    return math.gamma(x) if math.isfinite(x) else math.nan


def _blurred(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian mean around each place, the outermost values going on."""
    reach = NIQE_WINDOW_PX // 2
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * NIQE_SIGMA_PX**2))
    weights /= weights.sum()
    padded = np.pad(values, reach, mode="edge")
    height, width = values.shape
    down: NDArray[Any] = sum((w * padded[i : i + height] for i, w in enumerate(weights)), np.zeros((height, 1)))
    both: NDArray[Any] = sum((w * down[:, i : i + width] for i, w in enumerate(weights)), np.zeros((height, 1)))
    return both
