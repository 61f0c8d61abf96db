"""Weights as ncnn (https://github.com/Tencent/ncnn) keeps them: so the packages of Real-ESRGAN and RealSR carry theirs.

A `.bin` file is what the layers of its `.param` file own, in their order and nothing between. Of a Convolution: a word
that says how the kernel is stored, the kernel (OIHW, as torch has it), padded to 4 bytes, then the bias in float32. Of
a PReLU: its slopes in float32. Our modules make their layers in the same order, so the file alone suffices; that it
ends with the last layer shows that no other network was taken for this one.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from shared.errors import ModelUnavailable

FLOAT16, FLOAT32 = 0x01306B47, 0


def fill(network: nn.Module, content: bytes) -> None:
    """Sets every convolution and slope of the network from the bytes, in the order in which its modules were made.

    Raises ModelUnavailable if the bytes are not those of such a network.
    """
    at = 0

    def read(count: int, dtype: type[np.generic]) -> Tensor:
        nonlocal at
        size = count * np.dtype(dtype).itemsize
        if at + size > len(content):
            raise ModelUnavailable("The ncnn weights end before the network does.", bytes=len(content))
        values = np.frombuffer(content, np.dtype(dtype).newbyteorder("<"), count, at).astype(np.float32)
        at += size + -size % 4
        return torch.from_numpy(values)

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            stored_as = int.from_bytes(content[at : at + 4], "little")
            at += 4
            if stored_as not in (FLOAT16, FLOAT32):
                raise ModelUnavailable(f"The ncnn weights hold a kernel of an unknown kind: {stored_as:#x}.")
            kernel = read(layer.weight.numel(), np.float16 if stored_as == FLOAT16 else np.float32)
            layer.weight.data.copy_(kernel.view_as(layer.weight))
            cast(Tensor, layer.bias).data.copy_(read(layer.out_channels, np.float32))
        elif isinstance(layer, nn.PReLU):
            layer.weight.data.copy_(read(layer.num_parameters, np.float32))
    if at != len(content):
        raise ModelUnavailable(f"The ncnn weights go on for {len(content) - at} bytes after the network's last layer.")
