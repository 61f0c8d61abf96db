"""Bicubic and Lanczos interpolation as networks without weights: what every other model is compared with.

The numbers are those of Pillow's `resize` of the whole picture in float32: bicubic with a = -0.5 (Keys 1981), which is
MATLAB's too, and Lanczos with three lobes; at the edges of the picture the weights that fall outside are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.networks.architecture import Architecture

Kernel = Callable[[float], float]


class Resampling(Architecture):
    """One filter in both directions, which is zero beyond `radius` px."""

    # (scale, taps): row p makes the output pixels that lie at phase p of their input pixel.
    taps: Tensor

    def __init__(self, scale: int, kernel: Kernel, radius: int) -> None:
        taps = 2 * radius + 1
        super().__init__(
            scale=scale,
            reach_px=radius,
            # Down over the input, then across over rows that are `scale` times as many.
            body_multiply_adds=3 * taps * (scale + scale**2),
            # Across over rows that are `scale` times as many: those, their phases, and the result.
            bytes_per_px=4 * 3 * (4 + (1 + max(scale, _phases_at_once())) * scale + scale**2),
        )
        centres = [(phase + 0.5) / scale - 0.5 for phase in range(scale)]
        rows = [[kernel(centre - offset) for offset in range(-radius, radius + 1)] for centre in centres]
        self.register_buffer("taps", torch.tensor(rows, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) -> (N, 3, H * scale, W * scale), same dtype and device; overshoots where the filter does."""
        return self._across(self._across(x.transpose(2, 3)).transpose(2, 3))

    def _across(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 3, H, W * scale)."""
        height, width = x.shape[2:]
        taps = self.taps[:, None, None, :]
        padding = (0, self.taps.shape[1] // 2)
        # Pillow leaves out what lies beyond the edge and makes up for it: the weights that are left add up to 1.
        weight = F.conv2d(x.new_ones(1, 1, 1, width), taps, padding=padding)
        phases = F.conv2d(x.reshape(-1, 1, height, width), taps, padding=padding) / weight
        return phases.permute(0, 2, 3, 1).reshape(*x.shape[:3], width * self.scale)


def _phases_at_once() -> int:
    """oneDNN makes as many channels, at least, as a register holds."""
    return 16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8


def bicubic(_weights: bytes, scale: int) -> Resampling:
    return Resampling(scale, _bicubic, 2)


def lanczos(_weights: bytes, scale: int) -> Resampling:
    return Resampling(scale, _lanczos, 3)


def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if abs(x) < 3 else 0.0


def _sinc(x: float) -> float:
    return 1.0 if x == 0 else math.sin(math.pi * x) / (math.pi * x)
