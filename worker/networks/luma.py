"""What SRCNN and FSRCNN have in common: the network sees luma only, and colours are enlarged by bicubic interpolation.

Luma here is 0.299 R + 0.587 G + 0.114 B over the full range: the Y of the papers apart from a constant and a factor,
and gray for gray. Adding to R, G and B alike what the network makes of luma beyond bicubic leaves Cb and Cr bicubic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.networks.architecture import Architecture

LUMA = (0.299, 0.587, 0.114)
BICUBIC_REACH_PX = 2


class LumaNetwork(Architecture):
    """A network of luma. `forward` takes colours; `valid`, which each architecture defines, takes luma."""

    bicubic_weight: Tensor
    luma_weight: Tensor

    def __init__(self, *, scale: int, reach_px: int, multiply_adds: int, bytes_per_px: int) -> None:
        super().__init__(
            scale=scale,
            reach_px=reach_px,
            body_multiply_adds=multiply_adds + 3 * 25 * scale**2,
            # The network's own and luma; or, when it is done, bicubic colours, luma twice and the result.
            bytes_per_px=max(bytes_per_px, 4 * 8 * scale**2) + 4 * 16,
        )
        self.register_buffer("bicubic_weight", bicubic_kernels(scale), persistent=False)
        self.register_buffer("luma_weight", torch.tensor(LUMA).view(1, 3, 1, 1), persistent=False)

    def begin(self, generator: torch.Generator) -> None:
        """Weights to train from."""
        raise NotImplementedError

    def take_over(self, trained: LumaNetwork) -> list[str]:
        """Begins as another network of the same kind, for any scale. Returns the parameters that it could not give."""
        self.load_state_dict(trained.state_dict())
        return []

    def valid(self, y: Tensor) -> Tensor:
        """y: (N, 1, H, W) in [0, 1] -> (N, 1, (H - 2 reach) * scale, (W - 2 reach) * scale), about [0, 1].

        Nothing is padded: every value of the result is what it would be in the middle of a larger picture.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """At the picture's edge its outermost pixels go on, as in the code of the papers."""
        y = F.conv2d(x, self.luma_weight)
        sharp = self.valid(F.pad(y, (self.reach_px,) * 4, mode="replicate"))
        soft = self.bicubic(x)
        return soft + (sharp - F.conv2d(soft, self.luma_weight))

    def bicubic(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) -> (N, C, H * scale, W * scale) by bicubic interpolation, outermost pixels going on."""
        batch, channels, height, width = x.shape
        padded = F.pad(x, (BICUBIC_REACH_PX,) * 4, mode="replicate").flatten(0, 1)[:, None]
        return self.bicubic_valid(padded).view(batch, channels, height * self.scale, width * self.scale)

    def bicubic_valid(self, y: Tensor) -> Tensor:
        """y: (N, 1, H, W) -> (N, 1, (H - 4) * scale, (W - 4) * scale)."""
        large: Tensor = F.pixel_shuffle(F.conv2d(y, self.bicubic_weight), self.scale)
        return large


def bicubic_kernels(scale: int) -> Tensor:
    """(scale * scale, 1, 5, 5): for each place within an enlarged pixel, in pixel_shuffle's order, its 5x5 weights.

    Keys 1981 with a = -0.5, as MATLAB's imresize and the papers have it.
    """
    centres = (torch.arange(scale, dtype=torch.float64) + 0.5) / scale - 0.5
    x = (centres[:, None] - torch.arange(-BICUBIC_REACH_PX, BICUBIC_REACH_PX + 1)).abs()
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    line = torch.where(x <= 1, near, torch.where(x <= 2, far, torch.zeros_like(x)))
    line /= line.sum(dim=1, keepdim=True)
    return torch.einsum("ai,bj->abij", line, line).reshape(scale**2, 1, 5, 5).float()
