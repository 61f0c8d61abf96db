"""The one fake of the worker's tests: a network card that enlarges by repeating pixels, at once and exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shared.catalog import ModelCard
from worker import enlarging
from worker.networks import Network


class Repeating(Network):
    """A Network without weights: each pixel becomes a square. `before_call` is told the number of each call, from 1,
    and may raise what a real device would."""

    def __init__(
        self, card: ModelCard, device: str = "cpu", before_call: Callable[[int], None] = lambda _: None
    ) -> None:
        self.card = card
        # Computed on the host, whatever device it stands for.
        self.device = torch.device("cpu")
        self.stands_for = device
        self.calls = 0
        self._before_call = before_call
        self.answers_with: Callable[[Tensor], Tensor] = lambda answer: answer

    bytes_per_px = 1
    fixed_bytes = 0
    multiply_adds_per_px = 1
    tail_reach_px = 0
    runtime = "torch"
    is_calibrated = True

    def multiply_adds(self, body_px: int, tail_px: int) -> int:
        return body_px

    def pixels_per_second(self) -> float:
        return 1e6

    def observe(self, multiply_adds: int, seconds: float) -> None:
        pass

    def __call__(self, tile: Tensor, *, keep: tuple[int, int, int, int] | None = None, half: bool = False) -> Tensor:
        self.calls += 1
        self._before_call(self.calls)
        x, y, width, height = keep or (0, 0, tile.shape[3], tile.shape[2])
        kept = tile[:, :, y : y + height, x : x + width]
        return self.answers_with(kept.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3))


def install(
    monkeypatch: pytest.MonkeyPatch, before_call: Callable[[int], None] = lambda _: None
) -> dict[str, Repeating]:
    """Puts Repeating in every card's place; returns what is loaded, by device."""
    loaded: dict[str, Repeating] = {}

    def load(card: ModelCard, device: str) -> Network:
        if device not in loaded:
            loaded[device] = Repeating(card, device, before_call)
        return loaded[device]

    monkeypatch.setattr(enlarging, "load", load)
    return loaded
