"""A ModelCard becomes a Network: verified weights, on a device, ready to be called with tiles.

This room knows tensors and cards, and nothing of jobs, SQL, storage or Celery.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared import calibration
from shared.catalog import ModelCard, OwnFile
from shared.errors import ModelUnavailable
from worker.networks import compact, own, resampling, rrdb, srresnet, strips, trained
from worker.networks.architecture import Architecture, Keep, nothing
from worker.networks.rowwise import Rowwise
from worker.networks.weights import read_verified

ARCHITECTURES: tuple[tuple[str, Callable[[bytes, int], Architecture]], ...] = (
    ("bicubic", resampling.bicubic),
    ("lanczos", resampling.lanczos),
    ("own", own.read),
    ("compact", compact.read_ncnn),
    ("rrdb-6", functools.partial(rrdb.read_ncnn, blocks=6)),
    ("rrdb-23", functools.partial(rrdb.read_ncnn, blocks=23)),
    ("srresnet", srresnet.read_keras),
    ("trained", trained.read),
)
"""Every architecture that is ours: the card's key, and what makes a module of the bytes of its weights and its scale.
Where a card has no weights the bytes are none."""

PROBE_PX = 64
"""Side of the square that is timed to learn a device's speed: some 0.1 s on two cores."""

CALIBRATION_PX = 192
"""Side of the square by which runtimes are compared: of a smaller one strips have too few rows to show what they do."""
CALIBRATION_MULTIPLY_ADDS = 10**11
"""What that may take, about a second of two cores: of a network that takes more for a px the square is smaller."""


class Network:
    """A loaded torch module on a device.

    Calls are stateless, so the tiles of a picture may come in any order. Any thread may make one: there is one at a
    time. `on_step` is of the thread that makes the calls, and `rows` of one thread.
    """

    def __init__(self, card: ModelCard, device: str, module: Architecture) -> None:
        self.card = card
        self.device = torch.device(device)
        self.module = module.eval().requires_grad_(False).to(self.device).to(memory_format=torch.channels_last)
        """The frozen module. To enlarge, call the Network: it sees to device, precision and layout."""
        self.on_step: Callable[[], None] = nothing
        """Called now and then within a call that takes long, between two layers; may raise to break it off."""
        self._calling, self._calibrating = threading.Lock(), threading.Lock()
        self._half_module: Architecture | None = None
        self._pixels_per_second = 0.0
        self._runtime: calibration.Runtime | None = None
        self._rowwise = Rowwise(module, card.halo_px)

    @property
    def scale(self) -> int:
        return self.card.scale

    @property
    def halo_px(self) -> int:
        return self.card.halo_px

    @property
    def reach_px(self) -> int:
        """How far the network sees: the halo of a card may be less."""
        return self.module.reach_px

    @property
    def bytes_per_px(self) -> int:
        """Memory one call takes for each input pixel that its tiles read, in float32; the result is counted in."""
        return self.module.bytes_per_px

    @property
    def fixed_bytes(self) -> int:
        """Memory one call takes for each of its tiles, whatever their size; weights not counted."""
        return self.module.fixed_bytes

    @property
    def multiply_adds_per_px(self) -> int:
        """What one input pixel takes where nothing is computed twice."""
        return self.module.body_multiply_adds + self.module.tail_multiply_adds

    @property
    def tail_reach_px(self) -> int:
        """How far around what is kept the tail of the network computes; the body computes all that is read."""
        return self.module.tail_reach_px

    def multiply_adds(self, body_px: int, tail_px: int) -> int:
        """What a call takes whose body runs over `body_px` input pixels and whose tail over `tail_px`."""
        return body_px * self.module.body_multiply_adds + tail_px * self.module.tail_multiply_adds

    @property
    def prefers_half(self) -> bool:
        """Whether half precision pays on this device: on a GPU. CPUs of today emulate it."""
        return self.device.type == "cuda" and self.module.supports_half

    @property
    def runtime(self) -> calibration.Runtime:
        """What computes this network here: `torch`, in tiles, or `ncnn`, in strips; see `shared.calibration`.

        Decided when it is first asked for, by what was measured on this machine, then or before.
        """
        with self._calibrating:
            if self._runtime is None:
                self._runtime = self._calibrated()
            return self._runtime

    def _calibrated(self) -> calibration.Runtime:
        candidates: dict[calibration.Runtime, Callable[[], None]]
        if self.device.type == "cpu" and strips.is_available() and self.module.draw():
            affordable = math.isqrt(CALIBRATION_MULTIPLY_ADDS // self.multiply_adds_per_px)
            side = min(CALIBRATION_PX, max(PROBE_PX, affordable))
            candidates = {
                # With its halo: what a tile of a larger picture takes.
                "torch": functools.partial(self._torch_probe, side, self.halo_px),
                "ncnn": functools.partial(self._strips_probe, side),
            }
        else:
            side, candidates = PROBE_PX, {"torch": self._torch_probe}
        device = "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        threads = torch.get_num_threads()
        found = calibration.choose(self.card, device, threads, candidates, side**2)
        self._pixels_per_second = max(self._pixels_per_second, found.pixels_per_second[found.runtime])
        return found.runtime

    @property
    def is_calibrated(self) -> bool:
        """`runtime` has been decided: to ask for it measures nothing."""
        return self._runtime is not None

    def strips_bytes(self, width: int) -> int:
        """As `Rowwise.memory_bytes`."""
        return self._rowwise.memory_bytes(width)

    def columns(self, width: int) -> list[tuple[slice, slice]]:
        """As `Rowwise.columns`."""
        return self._rowwise.columns(width)

    def rows(
        self, pieces: Iterable[NDArray[np.float32]], convert: Callable[[Tensor], Tensor] = lambda made: made
    ) -> Iterator[Tensor]:
        """A whole picture from its top down, as `Rowwise.rows`. Only where `runtime` is `ncnn`."""
        return self._rowwise.rows(pieces, convert, on_step=lambda: self.on_step())

    def __call__(self, tile: Tensor, *, keep: Keep | None = None, half: bool = False) -> Tensor:
        """Enlarges one tile, or some of one size that keep the same part of themselves.

        tile: (N, 3, H, W) float32 in [0, 1], on any device -> (N, 3, H * scale, W * scale) float32 in [0, 1], on the
        network's device. With `keep` (x, y, width, height; input px from a tile's corner) only that part of the
        result is made: (N, 3, height * scale, width * scale). With `half` the layers compute in float16, some tenths of
        a level of 255 off and not safe from overflow: the caller checks for NaN and infinity.

        Raises ValueError for another shape, and what torch raises when the device fails.
        """
        if tile.ndim != 4 or tile.shape[1] != 3 or tile.numel() == 0:
            raise ValueError(f"A tile is (N, 3, H, W), N, H and W at least 1; this is {tuple(tile.shape)}.")
        dtype = self.module.half_takes if half else torch.float32
        with self._calling:
            module = self._half() if half else self.module
            self.module.on_step = module.on_step = self.on_step
            try:
                with torch.inference_mode():
                    on_device = tile.to(self.device, dtype, non_blocking=True)
                    return module.enlarge(on_device.contiguous(memory_format=torch.channels_last), keep)
            finally:
                self.module.on_step = module.on_step = nothing

    def passes(self, scale: int) -> tuple[Network, ...]:
        """The networks of this card that, each run over the result of the one before, reach `scale` or go beyond it.

        Those at another scale than this one are loaded here. Raises ModelUnavailable, ValueError as `ModelCard.passes`.
        """
        steps = self.card.passes(scale)
        return tuple(self if card == self.card else load(card, str(self.device)) for card in steps)

    def pixels_per_second(self) -> float:
        """Input pixels a second this network does on this device, with the threads torch has now.

        Measured when `runtime` is decided, and remembered; `observe` corrects it.
        """
        assert self.runtime
        return self._pixels_per_second

    def warm_up(self) -> None:
        """Makes one call of the kind that pictures will make, so that the first need not wait for what comes once."""
        if self.runtime == "ncnn":
            self._strips_probe()
        else:
            self._torch_probe()

    def _torch_probe(self, side: int = PROBE_PX, halo_px: int = 0) -> None:
        read = side + 2 * halo_px
        # Copying to the host waits for a GPU to finish.
        self(torch.full((1, 3, read, read), 0.5), keep=(halo_px, halo_px, side, side), half=self.prefers_half).cpu()

    def _strips_probe(self, side: int = PROBE_PX) -> None:
        for _ in self.rows([np.full((3, side, side), 0.5, np.float32)]):
            pass

    def observe(self, multiply_adds: int, seconds: float) -> None:
        """Learns from a finished call: a network measured at a busy moment is not thought slow for ever."""
        rate = multiply_adds / self.multiply_adds_per_px / max(seconds, 1e-9)
        self._pixels_per_second = max(self._pixels_per_second, rate)

    def _half(self) -> Architecture:
        if self._half_module is None:
            self._half_module = self.module.halved()
        return self._half_module


def load(card: ModelCard, device: str) -> Network:
    """The Network of a card on a torch device ("cpu", "cuda:0"). Loaded once in a process, then remembered.

    Raises ModelUnavailable if the architecture is unknown, the package that carries the weights is not installed, or
    their hash is not the card's.
    """
    # A cache by itself lets two threads load the same at once, each its own.
    with _LOADING:
        return _loaded(card, device)


_LOADING = threading.Lock()


@functools.cache
def _loaded(card: ModelCard, device: str) -> Network:
    wanted = "own" if isinstance(card.weights, OwnFile) else card.architecture
    for key, read in ARCHITECTURES:
        if key == wanted:
            content = b"" if card.weights is None else read_verified(card.weights)
            return Network(card, device, read(content, card.scale))
    raise ModelUnavailable(
        f"The model {card.name} is of the architecture {card.architecture!r}, which this worker does not have.",
        model=card.name,
        architecture=card.architecture,
        architectures=[key for key, _ in ARCHITECTURES],
    )
