"""What every architecture answers: the one shape in which the engine meets a network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from worker.networks.strips import Blob, Graph

Keep = tuple[int, int, int, int]
"""x, y, width, height of the part of a tile whose result is wanted; input px from the tile's corner."""


class Architecture(nn.Module):
    """A drawn network, and what it costs to run. Each of ours is a subclass in a file of its own.

    A subclass hands its costs to `__init__` and defines `forward`, the network as its paper draws it: (N, 3, H, W) RGB
    in [0, 1] -> (N, 3, H * scale, W * scale); values a little outside [0, 1] are clipped. What it does inside is its
    own affair: it may turn the picture to luma and enlarge the chroma plainly, or begin by enlarging everything. Where
    it has something better than computing all and throwing the halo away, it overrides `enlarge`. Tiles of one call
    know nothing of each other: what comes of each is what would come of it alone.
    """

    def __init__(
        self,
        *,
        scale: int,
        reach_px: int,
        body_multiply_adds: int,
        bytes_per_px: int,
        fixed_bytes: int = 0,
        tail_multiply_adds: int = 0,
        tail_reach_px: int = 0,
    ) -> None:
        super().__init__()
        self.on_step: Callable[[], None] = nothing
        """Called now and then within `forward` and `enlarge` by a network whose calls take long: a sign of life."""
        self.supports_half = True
        self.precise_layers: tuple[str, ...] = ()
        """Of the first, those that `halved` leaves in float32: where what they read is rounded all later ones see the
        difference, and generators make much of it. What they hand on is rounded by whoever reads it."""
        self.scale = scale
        self.reach_px = reach_px
        """Input px beyond its own place that an output pixel can depend on, on each side."""
        self.body_multiply_adds = body_multiply_adds
        """For each input pixel, of the part that runs over all that is read: of everything where there is no tail."""
        self.tail_multiply_adds = tail_multiply_adds
        """For each input pixel, of the part that runs only over what is kept and `tail_reach_px` around it."""
        self.tail_reach_px = tail_reach_px
        self.bytes_per_px = bytes_per_px
        """Memory of a call for each input pixel it reads, in float32; the result is counted in."""
        self.fixed_bytes = fixed_bytes
        """Memory of a call for each of its tiles, whatever their size; weights not counted."""
        self.drawn_rows_kept = 0
        """Rows of the last drawing's output that `finish` wants to see again with those that follow them."""

    @property
    def half_takes(self) -> torch.dtype:
        """Of the tiles that `halved` is given."""
        return torch.float32 if self.precise_layers else torch.float16

    def halved(self) -> Self:
        """A copy that computes in half precision."""
        half = copy.deepcopy(self).half()
        for name in self.precise_layers:
            # From the original: its copy has been rounded.
            half.get_submodule(name).float().load_state_dict(self.get_submodule(name).state_dict())
        return half

    def draw(self) -> list[tuple[Graph, Blob]]:
        """The network as graphs, one fed with the output of the one before, for `worker.networks.strips`; none where
        it has no such form. More than one where a part works on more channels or pixels: each has strips of its own
        height, and memory is that of the largest."""
        return []

    def finish(self, drawn: Tensor) -> Tensor:
        """drawn: (C, h + drawn_rows_kept, w), rows of the last graph's output -> (3, rows, W * scale) in [0, 1]."""
        return drawn.clamp(0, 1)

    def enlarge(self, x: Tensor, keep: Keep | None = None) -> Tensor:
        """x: (N, 3, H, W) in [0, 1], float32 or float16 -> (N, 3, H * scale, W * scale) float32 in [0, 1], same device.

        With `keep` only that part of the result, the same of each tile.
        """
        left, top, width, height = keep or (0, 0, x.shape[3], x.shape[2])
        rows = slice(top * self.scale, (top + height) * self.scale)
        columns = slice(left * self.scale, (left + width) * self.scale)
        result: Tensor = self(x)[:, :, rows, columns]
        # Out of place: where all is kept the result may be a view of what the network still holds.
        return result.float().clamp(0, 1)


def nothing() -> None:
    pass
