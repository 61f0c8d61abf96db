"""FSRCNN(56,12,4) (Dong et al. 2016, https://arxiv.org/abs/1608.00367): small luma in, enlarged by the last layer.

The last layer is the paper's deconvolution, 9x9 with a stride of the scale. It is computed as what it equals: one
convolution on the small grid with scale x scale outputs, and a shuffle.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.networks.luma import LumaNetwork

FEATURES, SHRUNK, MAPPINGS = 56, 12, 4
DECONVOLUTION_PX = 9


class Fsrcnn(LumaNetwork):
    """The architecture is the paper's, a PReLU after each layer but the last. It begins as linear interpolation."""

    taps: Tensor

    def __init__(self, scale: int) -> None:
        taps = _taps(scale)
        super().__init__(
            scale=scale,
            reach_px=2 + MAPPINGS + taps.shape[1] // 2,
            multiply_adds=FEATURES * (25 + 2 * SHRUNK + DECONVOLUTION_PX**2) + MAPPINGS * 9 * SHRUNK**2,
            # One layer of features before and after its PReLU.
            bytes_per_px=4 * 2 * FEATURES,
        )
        self.features = nn.Conv2d(1, FEATURES, 5)
        self.features_slope = nn.PReLU(FEATURES)
        self.shrink = nn.Conv2d(FEATURES, SHRUNK, 1)
        self.shrink_slope = nn.PReLU(SHRUNK)
        self.mappings = nn.ModuleList(nn.Conv2d(SHRUNK, SHRUNK, 3) for _ in range(MAPPINGS))
        self.mapping_slopes = nn.ModuleList(nn.PReLU(SHRUNK) for _ in range(MAPPINGS))
        self.expand = nn.Conv2d(SHRUNK, FEATURES, 1)
        self.expand_slope = nn.PReLU(FEATURES)
        self.deconvolution = nn.Parameter(torch.zeros(FEATURES, DECONVOLUTION_PX, DECONVOLUTION_PX))
        self.out_bias = nn.Parameter(torch.zeros(1))
        self.register_buffer("taps", taps, persistent=False)

    def begin(self, generator: torch.Generator) -> None:
        """The first channel carries luma to a linear interpolation; the others are random, and count for little."""
        for conv in (self.features, self.shrink, *cast(list[nn.Conv2d], list(self.mappings)), self.expand):
            # He et al. 2015, for PReLU with a slope of 0.25.
            conv.weight.data.normal_(0, math.sqrt(2 / (1.0625 * conv.weight[0].numel())), generator=generator)
            cast(Tensor, conv.bias).data.zero_()
            conv.weight.data[0] = 0
            conv.weight.data[0, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 1
        self.deconvolution.data.normal_(0, 1e-3, generator=generator)
        self.out_bias.data.zero_()
        # Distance, in input px, of each of the 9 weights' places from the middle of the input px it belongs to.
        distance = (torch.arange(DECONVOLUTION_PX) - DECONVOLUTION_PX // 2 - (self.scale - 1) / 2) / self.scale
        line = (1 - distance.abs()).clamp_(min=0)
        for phase in range(self.scale):
            line[phase :: self.scale] /= line[phase :: self.scale].sum()
        self.deconvolution.data[0] += line[:, None] * line[None, :]

    def take_over(self, trained: LumaNetwork) -> list[str]:
        """The deconvolution of another scale is of no use here; all before it is (the paper's section 3.4)."""
        last = [] if trained.scale == self.scale else ["deconvolution", "out_bias"]
        self.load_state_dict({**trained.state_dict(), **{name: self.get_parameter(name).data for name in last}})
        return last

    def valid(self, y: Tensor) -> Tensor:
        x = self.features_slope(self.features(y))
        x = self.shrink_slope(self.shrink(x))
        for mapping, slope in zip(self.mappings, self.mapping_slopes, strict=True):
            x = slope(mapping(x))
        x = self.expand_slope(self.expand(x))
        x = F.conv2d(x, self.out_weight(), self.out_bias.expand(self.scale**2))
        return F.pixel_shuffle(x, self.scale)

    def out_weight(self) -> Tensor:
        """(scale * scale, FEATURES, D, D): the deconvolution's weights, sorted by the place they help to make."""
        padded = F.pad(self.deconvolution, (0, 1, 0, 1))
        sorted_by_place = padded[:, self.taps[:, :, None, None], self.taps[None, None, :, :]]
        depth = self.taps.shape[1]
        return sorted_by_place.permute(1, 3, 0, 2, 4).reshape(self.scale**2, FEATURES, depth, depth)


def _taps(scale: int) -> Tensor:
    """(scale, D): for each place within an enlarged px and each input px around it, which of the 9 weights joins them.

    A transposed convolution with padding 4 gives place y the weight y + 4 - scale * i of input px i. Where there is no
    such weight the entry is 9: the zero that is padded on.
    """
    middle = DECONVOLUTION_PX // 2
    reach = (middle + scale - 1) // scale
    weight = torch.arange(scale)[:, None] + middle - scale * torch.arange(-reach, reach + 1)[None, :]
    inside = (weight >= 0) & (weight < DECONVOLUTION_PX)
    return torch.where(inside, weight, torch.full_like(weight, DECONVOLUTION_PX))
