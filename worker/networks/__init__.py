"""A ModelCard becomes a Network: verified weights, on a device, ready to be called with tiles.

This room knows tensors and cards, and nothing of jobs, SQL, storage or Celery.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared import calibration
from shared.catalog import ModelCard, OwnFile
from shared.errors import ModelUnavailable
from worker.networks import compact, own, resampling, rrdb, srresnet, strips, trained
from worker.networks.architecture import Architecture, Keep, nothing
from worker.networks.lanes import Lanes
from worker.networks.pool import Pool
from worker.networks.strips import Passage, Promised, Strips
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

STRIP_PX = 6_144
"""Input px of a strip for each thread that computes it, about: in fewer, too much is done once for each strip; more do
not stay in the processor's cache."""
STRIP_THREADS = 2
"""For no more than so many: strips take memory."""
STRIP_COLUMNS = 2048
"""Columns of a strip at most. A wider picture is cut into parts with halos between them, lest the memory of a strip
grow with the width: a twenty-fifth more work for a halo of 40 px. Very wide ones are cut narrower (`Network.columns`).
"""
LATER_STRIP_PX = STRIP_PX // 2
"""The same of the graphs behind the first, which work on more values for each px of the input."""
MOST_LANES = 4
"""Strips are computed in so many lanes at most, each by an equal part of the threads: each takes memory for one."""
FEW_LANES = 2
"""So few have memory for strips twice as high as they must be where the picture is wide, which is quicker."""
STEP_SECONDS = 0.05
"""How often `on_step` is called while strips are computed."""
POOL_KEPT_BYTES = 250_000_000
"""Memory that is kept for the next picture: enough for small ones, of which fresh pages would be a part of the work."""
WINOGRAD_ROWS = 6
"""Rows that Winograd's method makes at once; a strip of other heights computes some for nothing."""


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
        self._strips: tuple[Strips, ...] = ()
        self._strips_threads = 0

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
        """Memory that `rows` takes for a picture so wide, its result not counted."""
        return self._strips_bytes(self.columns(width))

    def _strips_bytes(self, spans: list[tuple[slice, slice]]) -> int:
        read: list[int] = [span.stop - span.start for _, span in spans]
        kept = sum(each.kept_bytes_per_column for each in self._ready_strips())
        # Each lane computes one strip of one part and one graph.
        computing = max(each.bytes_per_column(self._strip_rows(each, max(read))) for each in self._ready_strips())
        # What the graphs have made of a strip waits in the pool, for as many turns as are planned ahead.
        waiting, grid = 0, 1
        for each in self._ready_strips():
            grid *= each.output.grid
            waiting += 4 * each.output.channels * grid**2 * self._strip_rows(self._strips[0], max(read))
        return sum(read) * kept + max(read) * (computing + waiting) * lane_count()

    def columns(self, width: int) -> list[tuple[slice, slice]]:
        """The columns whose result each part of a picture so wide keeps, and those that it reads.

        The fewest parts with which a picture takes no more memory than one of two parts does, or else those that take
        least; but none so narrow that halos are more than a tenth of the work. What is kept from strip to strip grows
        with the width, and narrower parts make up for it while they can.
        """
        fewest = math.ceil(width / STRIP_COLUMNS)
        most = max(fewest, width // max(1, 20 * self.halo_px))
        if fewest <= 2:
            return strip_columns(width, fewest, self.halo_px)
        enough = self._strips_bytes(strip_columns(2 * STRIP_COLUMNS, 2, self.halo_px))
        cuts = [strip_columns(width, count, self.halo_px) for count in range(fewest, most + 1)]
        return next((cut for cut in cuts if self._strips_bytes(cut) <= enough), min(cuts, key=self._strips_bytes))

    def rows(
        self, pieces: Iterable[NDArray[np.float32]], convert: Callable[[Tensor], Tensor] = lambda made: made
    ) -> Iterator[Tensor]:
        """A whole picture from its top down, in strips over its whole width: every row of every layer is computed once.

        pieces: (3, h, W) in [0, 1], with `h` as it comes -> (3, h' * scale, W * scale) in [0, 1], finished rows, of
        another `h'`, whose memory is in the order of rows, columns, channels. `convert` makes of a part of them what is
        held until those beside it are made: (3, h, w) -> the same, of another dtype. Calls `on_step` meanwhile. Only
        where `runtime` is `ncnn`. Raises OutOfMemory, and what `convert` raises.
        """
        pieces = iter(pieces)
        first = next(pieces)
        width = first.shape[2] * self.scale
        spans = self.columns(first.shape[2])
        pieces = itertools.chain([first], pieces)
        del first
        lanes = Lanes(lane_count())
        try:
            # Of parts that stand side by side all strips are equally high.
            widest = max(read.stop - read.start for _, read in spans)
            given = _in_columns(pieces, [read for _, read in spans])
            parts = [self._part(each, read, widest, lanes) for each, (_, read) in zip(given, spans, strict=True)]
            finished = [self._finished() for _ in parts]
            whole = torch.empty(0)
            for index, promised in _ahead(parts, lanes.count):
                keep, read = spans[index]
                columns = slice((keep.start - read.start) * self.scale, (keep.stop - read.start) * self.scale)
                drawn = [finished[index](self._awaited(each)) for each in promised]
                made = [convert(piece[:, :, columns]) for piece in drawn if piece.shape[1]]
                # Not while the next is waited for.
                del drawn, promised
                if not made:
                    continue
                if index == 0:
                    whole = torch.empty(sum(piece.shape[1] for piece in made), width, 3, dtype=made[0].dtype)
                top = 0
                for piece in made:
                    beside = whole[top : top + piece.shape[1], keep.start * self.scale : keep.stop * self.scale]
                    beside.copy_(piece.permute(1, 2, 0))
                    top += piece.shape[1]
                if index == len(parts) - 1:
                    yield whole.permute(2, 0, 1)
        finally:
            lanes.close()
            for each in self._ready_strips():
                if each.pool.held_bytes > POOL_KEPT_BYTES:
                    each.pool.clear()

    def _part(self, pieces: Iterable[NDArray[np.float32]], columns: slice, widest: int, lanes: Lanes) -> Iterator[Turn]:
        """What the strips will make of some columns, turn by turn."""
        width, passages = columns.stop - columns.start, list[Passage]()
        for each in self._ready_strips():
            passages.append(each.passage(width, rows=self._strip_rows(each, widest), lanes=lanes))
            width *= each.output.grid

        def through(made: Iterable[Promised], *, is_last: bool) -> Turn:
            for passage in passages[1:]:
                made = passage.feed(made, is_last=is_last)
            return list(made)

        for strip in passages[0].feed(map(Promised.of, pieces), is_last=True):
            yield through([strip], is_last=False)
        if passages[1:]:
            yield through([], is_last=True)

    def _finished(self) -> Callable[[NDArray[np.float32]], Tensor]:
        """What `Architecture.finish` makes of the drawn rows that come one after the other, for one part."""
        kept = torch.empty(0)
        count = self.module.drawn_rows_kept

        def finished(piece: NDArray[np.float32]) -> Tensor:
            nonlocal kept
            drawn = torch.from_numpy(piece)
            whole = torch.cat([kept, drawn], dim=1) if len(kept) else drawn
            # Copied: it would keep the whole.
            kept = whole[:, whole.shape[1] - count :].clone()
            return self.module.finish(whole) if whole.shape[1] > count else torch.empty(3, 0, 0)

        return finished

    def _awaited(self, promised: Promised) -> NDArray[np.float32]:
        self.on_step()
        while not wait([promised.values], timeout=STEP_SECONDS).done:
            self.on_step()
        return promised.values.result()

    def _ready_strips(self) -> tuple[Strips, ...]:
        threads = lane_threads()
        if self._strips_threads != threads:
            # One for all lanes and graphs.
            pool = Pool()
            self._strips = tuple(
                Strips(graph, output, threads=threads, pool=pool) for graph, output in self.module.draw()
            )
            self._strips_threads = threads
        return self._strips

    def _strip_rows(self, each: Strips, width: int) -> int:
        # So many that on the output's grid, where most of the work is, they are a multiple of what is made at once.
        step = WINOGRAD_ROWS // math.gcd(WINOGRAD_ROWS, each.output.grid)
        px = (STRIP_PX if each is self._strips[0] else LATER_STRIP_PX) * min(self._strips_threads, STRIP_THREADS)
        is_cheap = each is self._strips[0] or width <= STRIP_COLUMNS // 2
        least = 2 * step if is_cheap and lane_count() <= FEW_LANES else step
        return max(least, px // width // step * step)

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


def lane_threads() -> int:
    """The threads of each lane."""
    return math.ceil(torch.get_num_threads() / MOST_LANES)


def lane_count() -> int:
    return torch.get_num_threads() // lane_threads()


Turn = list[Promised]
"""Of some columns all that one strip of the first graph brings, or at last what is left."""


def _ahead(parts: Sequence[Iterator[Turn]], count: int) -> Iterator[tuple[int, Turn]]:
    """Turn by turn, with the part's number; `count` turns are planned beyond the one that is handed out."""

    def turns() -> Iterator[tuple[int, Turn]]:
        while True:
            for index, part in enumerate(parts):
                turn = next(part, None)
                if turn is None:
                    return
                yield index, turn

    planned: deque[tuple[int, Turn]] = deque()
    for each in turns():
        planned.append(each)
        if len(planned) > count:
            yield planned.popleft()
    while planned:
        yield planned.popleft()


def strip_columns(width: int, count: int, halo_px: int) -> list[tuple[slice, slice]]:
    """`count` parts of a picture so wide: the columns whose result each keeps, and those that it reads."""
    edges = [index * width // count for index in range(count + 1)]
    return [
        (slice(left, right), slice(max(0, left - halo_px), min(width, right + halo_px)))
        for left, right in itertools.pairwise(edges)
    ]


def _in_columns(pieces: Iterable[NDArray[np.float32]], reads: Sequence[slice]) -> list[Iterator[NDArray[np.float32]]]:
    """For each of `reads` an iterator over those columns of every piece. What all have taken is let go of, where
    `itertools.tee` would keep up to 57 pieces."""
    source = iter(pieces)
    waiting: list[deque[NDArray[np.float32]]] = [deque() for _ in reads]

    def taken(number: int) -> Iterator[NDArray[np.float32]]:
        while True:
            if not waiting[number]:
                piece = next(source, None)
                if piece is None:
                    return
                for queue, read in zip(waiting, reads, strict=True):
                    queue.append(piece[:, :, read])
                del piece
            yield waiting[number].popleft()

    return [taken(number) for number in range(len(reads))]


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
