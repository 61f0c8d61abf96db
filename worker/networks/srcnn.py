"""SRCNN 9-5-5 (Dong et al. 2014, https://arxiv.org/abs/1501.00092): three convolutions over bicubic luma."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.networks.luma import BICUBIC_REACH_PX, LumaNetwork

KERNELS = (9, 5, 5)
CHANNELS = (64, 32)
CONVOLUTIONS_REACH_PX = sum(kernel // 2 for kernel in KERNELS)
"""On the enlarged grid."""


class Srcnn(LumaNetwork):
    """The architecture is the paper's. Where it begins is not: as the bicubic picture, let through unchanged."""

    def __init__(self, scale: int) -> None:
        weights = 81 * CHANNELS[0] + 25 * CHANNELS[0] * CHANNELS[1] + 25 * CHANNELS[1]
        super().__init__(
            scale=scale,
            reach_px=BICUBIC_REACH_PX + math.ceil(CONVOLUTIONS_REACH_PX / scale),
            multiply_adds=scale**2 * weights,
            # The first layer's answer and the second's, at the size of the result.
            bytes_per_px=4 * scale**2 * (CHANNELS[0] + CHANNELS[1]),
        )
        self.patches = nn.Conv2d(1, CHANNELS[0], KERNELS[0])
        self.mapping = nn.Conv2d(CHANNELS[0], CHANNELS[1], KERNELS[1])
        self.out = nn.Conv2d(CHANNELS[1], 1, KERNELS[2])

    def begin(self, generator: torch.Generator) -> None:
        """The first channel carries the bicubic picture; the others are random, and count for little at first."""
        for conv in (self.patches, self.mapping, self.out):
            deviation = 1e-3 if conv is self.out else math.sqrt(2 / conv.weight[0].numel())
            conv.weight.data.normal_(0, deviation, generator=generator)
            cast(Tensor, conv.bias).data.zero_()
            if conv is not self.out:
                conv.weight.data[0] = 0
            conv.weight.data[0, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 1

    def valid(self, y: Tensor) -> Tensor:
        x = self.bicubic_valid(y)
        # What the whole px of `reach_px` give beyond what the convolutions see.
        spare = self.scale * (self.reach_px - BICUBIC_REACH_PX) - CONVOLUTIONS_REACH_PX
        x = x[:, :, spare : x.shape[2] - spare, spare : x.shape[3] - spare]
        x = F.relu_(self.patches(x))
        x = F.relu_(self.mapping(x))
        return cast(Tensor, self.out(x))
