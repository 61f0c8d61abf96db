"""Runs a plan: tiles through the network, finished Bands out, in order. Owns memory, precision and the retry of a band.

What fails is one band, and only that band is done again: with smaller tiles when the device is out of memory, in
float32 when half precision overflowed. What cannot be mended that way is raised as an error of `shared.errors`.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from PIL import Image

from shared.errors import BadOutput, DeviceBroken, ModelUnavailable, OutOfMemory
from shared.telemetry import tallies
from worker.batching import (
    Asked,
    Batcher,
    DoesNotFit,
    Lane,
    Piece,
    host_array,
    is_of_the_device,
    is_out_of_memory,
    rounded,
)
from worker.networks import Network
from worker.networks.architecture import Keep
from worker.networks.pages import new_rows
from worker.tiling import SMALLEST_TILE_PX, Band, Plan, Region, Tile, choose_plan, evened, plan, plan_strips, smaller

OnTile = Callable[[int, int], None]
"""Called after every tile with (tiles done, tiles in all), and again within a tile that takes long; a band done again
adds to both. May raise to stop all."""

SECONDS_PER_TILE = 5.0
"""Progress renews a lease, and progress is a finished tile: the lease is several times this."""
LEAST_KEPT_PX = 96
"""Side of what a tile keeps, below which time is no reason to cut it smaller."""
TILE_MEMORY_BYTES = 1_000_000_000

LEAST_HALOS = 20
"""A tile so many halos wide or high is large enough: less than a tenth of it is computed twice, and what is saved
beyond that is not worth its memory."""
LEAST_HALOS_OF_BAND = {"cpu": 12, "cuda": 20}
"""The same of a band's height. On a CPU networks of large halos run in strips, where there is ncnn, and those of small
ones are limited by the encoder."""
ENOUGH_TILE_PX = {"cpu": 192, "cuda": 512}
"""Side that a tile may have however small its halo. On a GPU calls of fewer px cost more than they do; on a CPU the
layers of larger ones leave the cache, and the smallest networks are two to three times as slow."""
BAND_RESULT_BYTES = 32 * 2**20
"""A band's result in 8 bits may take so much however high its halo would have it. It is held up to three times: while
it is made, while it waits and while it is encoded."""

STRIPS_BAND_PX = 32_768
"""Input px of a band where the network runs in strips: what is told, shown and encoded at once, some tenths of a second
of work."""
STRIPS_MEMORY = 1.2
"""Strips may hold so many times what a tile may: they keep rows of every layer, and are worth it."""
FED_ROWS = 16
"""Rows of the picture handed to such a network at once: it takes what it needs."""

FLAT_INPUT_RANGE = 16 / 255
"""A band of the input that differs by more than this within a channel has something to show ..."""
FLAT_OUTPUT_RANGE = 0.5 / 255
"""... and if its result does not differ by even half a level, the network has failed silently."""

LANCZOS_RADIUS = 3


@dataclass(frozen=True)
class UpscaledBand:
    """A finished band. pixels: (band height * scale, width * scale, 3), float32 in [0, 1] or the dtype asked for."""

    band: Band
    y_px: int
    """First output row."""
    pixels: NDArray[Any]


@dataclass(frozen=True)
class EnlargedRows:
    """Some finished rows of the result. pixels: (rows, width * scale, 3), float32 in [0, 1] or the dtype asked for."""

    y_px: int
    """First row, in px of the result."""
    pixels: NDArray[Any]
    bands_done: int
    """Bands finished so far, those of an earlier pass included."""
    bands_total: int


@dataclass
class Repairs:
    """What went wrong on the way and was mended, counted."""

    tiles_not_finite: int = 0
    bands_flat: int = 0
    bands_done_again: int = 0


@dataclass(frozen=True)
class Work:
    """All that will be done to enlarge one picture, known before any pixel is touched."""

    width: int
    height: int
    scale: int
    plans: tuple[Plan, ...]
    """One for each pass of a network; the second pass runs over the first one's result."""
    multiply_adds_needed: int
    """What the passes would take with nothing computed twice."""
    multiply_adds_done: int
    """What the plans take, halos included."""

    @property
    def tile_count(self) -> int:
        return sum(each.tile_count for each in self.plans)

    @property
    def band_count(self) -> int:
        return sum(len(each.bands) for each in self.plans)

    @property
    def waste(self) -> float:
        """Work done for each unit needed; 1.0 is none wasted."""
        return self.multiply_adds_done / self.multiply_adds_needed

    def expected_seconds(self, pixels_per_second: float) -> float:
        """On a device that does so many input pixels a second (`Network.pixels_per_second`)."""
        needed_px = sum(each.width * each.height for each in self.plans)
        return needed_px * self.waste / pixels_per_second


class Descent:
    """A network on its way down a picture in strips, and where it stands: who asks for the rows that come next goes on
    from there, and no row of any layer is computed twice. Of one picture, one network and one dtype."""

    def __init__(self) -> None:
        self._next_row: int | None = None
        self._finished: Iterator[torch.Tensor] = iter(())
        self._rest = torch.empty(3, 0, 0)

    def go_to(self, network: Network, image: NDArray[Any], row: int, dtype: np.dtype[Any]) -> None:
        """The next rows are to be those from `row` of the picture on.

        Elsewhere than where it stands it begins as far above as the network sees, and throws that away. Strips then
        begin at other rows than in the whole, so that some levels are rounded the other way.
        """
        if row == self._next_row:
            return
        first = max(0, row - network.reach_px)
        pieces = (
            _unit_floats(image[y : y + FED_ROWS]).transpose(2, 0, 1) for y in range(first, image.shape[0], FED_ROWS)
        )

        def convert(made: torch.Tensor) -> torch.Tensor:
            # Here: what has become whole numbers is finite.
            low, high = (float(value) for value in made.aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise _NotFinite(f"The network answered NaN or infinity below row {first}.")
            return rounded(made, dtype)

        self._finished = network.rows(pieces, convert)
        self._rest = self._rest[:, :0]
        self._next_row = first
        if row > first:
            self.take(row - first, network.scale)

    def take(self, rows: int, scale: int) -> torch.Tensor:
        """The next rows of the picture, (3, rows * scale, W * scale) as `rounded` has them. What it raises ends the
        way down: it then stands nowhere."""
        assert self._next_row is not None
        after, self._next_row = self._next_row + rows, None
        parts, wanted = [], rows * scale
        while wanted:
            if not self._rest.shape[1]:
                self._rest = next(self._finished)
            parts.append(self._rest[:, :wanted])
            self._rest = self._rest[:, parts[-1].shape[1] :]
            wanted -= parts[-1].shape[1]
            if wanted:
                # Copied, lest it keep all that it was made with while more is made.
                parts[-1] = parts[-1].clone()
        self._next_row = after
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def choose_device(wanted: str) -> str:
    """The torch device for the setting `auto`, `cpu` or `gpu`; auto is a GPU where there is one.

    Raises ModelUnavailable if a GPU is wanted and torch sees none.
    """
    if wanted not in ("auto", "cpu", "gpu"):
        raise ValueError(f"The device is auto, cpu or gpu, not {wanted!r}.")
    if wanted == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda:0"
    if wanted == "gpu":
        raise ModelUnavailable("A GPU is asked for and torch sees none here.", device=wanted, torch=torch.__version__)
    return "cpu"


def prepare_process(threads: int) -> int:
    """Sets, once in a process, how many threads a network call uses; 0 is one for each core. Returns their number."""
    if threads == 0:
        # The cores this process may use, not those the machine has.
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads)
    # Values near zero would otherwise be computed in microcode, many times slower, and are nothing in 255 levels.
    torch.set_flush_denormal(True)
    return threads


def plan_work(
    network: Network,
    width: int,
    height: int,
    scale: int,
    *,
    tile_px: int = 0,
    memory_bytes: int = TILE_MEMORY_BYTES,
) -> Work:
    """How a picture of `width` x `height` will be enlarged `scale` times (1 to 16).

    The card's networks run as often as it takes to reach the scale (`ModelCard.passes`). `tile_px` is the longest side
    of a tile; with 0 the tiles are the ones that waste least of all that fit `memory_bytes` and take at most
    SECONDS_PER_TILE each on this device (a whole picture may take twice that), whose speed is measured the first time.
    Raises ValueError for a scale that is not offered.
    """
    plans: list[Plan] = []
    needed = done = 0
    grown = 1
    for each in network.passes(scale):
        one = _plan_pass(each, width * grown, height * grown, tile_px, memory_bytes)
        needed += one.width * one.height * each.multiply_adds_per_px
        done += sum(_multiply_adds(each, one, tile) for band in one.bands for tile in band.tiles)
        plans.append(one)
        grown *= each.scale
    return Work(width, height, scale, tuple(plans), needed, done)


def _multiply_adds(network: Network, whole: Plan, tile: Tile) -> int:
    if whole.in_strips:
        return network.multiply_adds(tile.read.area_px, tile.read.area_px)
    tail = tile.keep.grown(network.tail_reach_px, whole.width, whole.height)
    return network.multiply_adds(tile.read.area_px, tail.area_px)


def _plan_pass(network: Network, width: int, height: int, tile_px: int, memory_bytes: int) -> Plan:
    if tile_px:
        return plan(width, height, halo_px=network.halo_px, tile_px=tile_px)
    if network.runtime == "ncnn" and network.strips_bytes(width) <= STRIPS_MEMORY * memory_bytes:
        return plan_strips(width, height, band_px=STRIPS_BAND_PX, columns=network.columns(width))
    by_memory = (memory_bytes - network.fixed_bytes) // network.bytes_per_px
    # However slow the device was when it was measured, a tile is not cut so small that it is nearly all halo: at a busy
    # moment a 256 px picture once became 56 tiles and twelve times the work.
    by_time = max(int(network.pixels_per_second() * SECONDS_PER_TILE), (LEAST_KEPT_PX + 2 * network.halo_px) ** 2)
    # A picture cut in two is a third more work. One that takes a little longer than a tile should stays whole, even if
    # the speed was measured at a busy moment; twice as long is still half a lease.
    if width * height <= 2 * by_time:
        by_time = width * height
    enough_px = LEAST_HALOS * network.halo_px
    by_halo = (max(ENOUGH_TILE_PX[network.device.type], enough_px) + 2 * network.halo_px) ** 2
    # A band is held as RGB at the network's scale, for gray pictures as float32.
    values_per_px = 3 * network.scale**2
    return choose_plan(
        width,
        height,
        halo_px=network.halo_px,
        most_read_px=max(1, min(by_memory, by_time, by_halo)),
        most_band_px=min(
            memory_bytes // (4 * values_per_px),
            max(BAND_RESULT_BYTES // values_per_px, width * LEAST_HALOS_OF_BAND[network.device.type] * network.halo_px),
        ),
    )


def enlarge(
    network: Network,
    image: NDArray[Any],
    scale: int,
    *,
    work: Work | None = None,
    on_tile: OnTile | None = None,
    dtype: DTypeLike = np.float32,
    precise: bool = False,
    repairs: Repairs | None = None,
    descent: Descent | None = None,
    batcher: Batcher | None = None,
) -> Iterator[EnlargedRows]:
    """The picture at exactly `scale` times its size, rows from the top down, as they are finished.

    image: (H, W, 3), uint8, uint16, or float32 in [0, 1] -> rows of (H * scale, W * scale, 3) of `dtype`: float32 in
    [0, 1], or uint8 or uint16 over their full range, rounded. At a network's own scale nothing else happens; below it,
    one Lanczos step goes down; above it, a network of the same card runs again over the result first. `work` is what
    `plan_work` gave for this picture, and is made here if left out. `on_tile` is called after every tile; what it
    raises passes through. `precise` computes in float32 also where half precision would do; `repairs` counts what had
    to be mended. `descent` is of an earlier call for the same picture and network, whose work ended where this begins.
    Through `batcher` tiles go together with those of others, and those of the next bands before their turn.

    Only some bands are held, never the whole result; where the network runs twice, the result of the first pass is held
    once, in uint16: half of float32, and 256 times finer than the 8-bit levels the network was trained on.

    Raises ValueError for an array of another kind; what `upscale` raises.
    """
    height, width = image.shape[:2]
    work = work or plan_work(network, width, height, scale)
    if (work.width, work.height, work.scale) != (width, height, scale):
        raise ValueError(
            f"The work was planned for {work.width} x {work.height} px x {work.scale}; "
            f"the picture is {width} x {height} px and the scale {scale}."
        )
    count = _Count(work.tile_count, on_tile, precise=precise, repairs=repairs)
    descent = descent or Descent()
    bands_done = 0
    *first, last = zip(network.passes(scale), work.plans, strict=True)
    for each, whole in first:
        held = np.empty((whole.height * each.scale, whole.width * each.scale, 3), np.uint16)
        for finished in _bands(each, image, whole, count, np.dtype(np.uint16), batcher=batcher):
            held[finished.y_px : finished.y_px + len(finished.pixels)] = finished.pixels
            bands_done += 1
        image = held

    each, whole = last
    reached_width, reached_height = whole.width * each.scale, whole.height * each.scale
    if (reached_width, reached_height) == (width * scale, height * scale):
        for finished in _bands(each, image, whole, count, np.dtype(dtype), descent, batcher):
            bands_done += 1
            yield EnlargedRows(finished.y_px, finished.pixels, bands_done, work.band_count)
            # Who was given it may be done with it before the next is made.
            del finished
        return
    reduction = _Reduction(reached_width, reached_height, width * scale, height * scale)
    for finished in _bands(each, image, whole, count, np.dtype(np.float32), batcher=batcher):
        bands_done += 1
        y_px, rows = reduction.add(finished.pixels)
        if len(rows):
            yield EnlargedRows(y_px, _quantize(rows, np.dtype(dtype)), bands_done, work.band_count)


def upscale(
    network: Network,
    image: NDArray[Any],
    *,
    plan: Plan,
    on_tile: OnTile | None = None,
    dtype: DTypeLike = np.float32,
    batcher: Batcher | None = None,
) -> Iterator[UpscaledBand]:
    """One pass of the network over a picture: its bands at `network.scale` times their size, in order.

    image: (H, W, 3), uint8, uint16, or float32 in [0, 1]. Each band is yielded as soon as it is finished, and is the
    caller's to keep. With the card's halo in the plan the result is that of the whole picture within 1 level of 255.

    Raises ValueError for another kind of array or a plan for another size; OutOfMemory if even the smallest tiles do
    not fit; BadOutput if the result, also in float32, is not finite or is flat where the input is not; DeviceBroken if
    the GPU failed in any other way, after which the process must end; and whatever `on_tile` raises.
    """
    yield from _bands(network, image, plan, _Count(plan.tile_count, on_tile), np.dtype(dtype), batcher=batcher)


class _Count:
    """Tiles done, of how many, told to the caller after each; and what else holds for all bands of a picture."""

    def __init__(
        self, total: int, on_tile: OnTile | None, *, precise: bool = False, repairs: Repairs | None = None
    ) -> None:
        self.done = 0
        self.total = total
        self.precise = precise
        self.repairs = repairs or Repairs()
        self._on_tile = on_tile

    def tile_done(self) -> None:
        self.done += 1
        self.tell()

    def tell(self) -> None:
        """Also called within a tile that takes long: all that is told then is that the work goes on."""
        if self._on_tile is not None:
            self._on_tile(self.done, self.total)


class _NotPlausible(Exception):
    """The result is not right. Carries the sentence for BadOutput."""


class _NotFinite(_NotPlausible):
    """NaN or infinity."""


class _Flat(_NotPlausible):
    """Flat where the input is not."""


def _bands(
    network: Network,
    image: NDArray[Any],
    whole: Plan,
    count: _Count,
    dtype: np.dtype[Any],
    descent: Descent | None = None,
    batcher: Batcher | None = None,
) -> Iterator[UpscaledBand]:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype not in (np.uint8, np.uint16, np.float32):
        raise ValueError(f"A picture is (H, W, 3) uint8, uint16 or float32; this is {image.shape} {image.dtype}.")
    if image.shape[:2] != (whole.height, whole.width):
        raise ValueError(
            f"The plan is for {whole.width} x {whole.height} px; the picture is {image.shape[1]} x {image.shape[0]} px."
        )
    if whole.in_strips:
        yield from _in_strips(network, image, whole, count, dtype, descent or Descent())
        return
    if batcher is None:
        yield from _mended_bands(_Single(network, image, count, dtype), network, image, whole, count, dtype)
        return
    with batcher.lane() as lane:
        calls = _Batched(lane, network, image, whole, count, dtype)
        yield from _mended_bands(calls, network, image, whole, count, dtype)


def _mended_bands(
    calls: _Calls, network: Network, image: NDArray[Any], whole: Plan, count: _Count, dtype: np.dtype[Any]
) -> Iterator[UpscaledBand]:
    for band in whole.bands:
        pixels = _mended(calls, network, image, whole, band, count, dtype)
        yield UpscaledBand(band, band.region.y * network.scale, pixels)


class _Calls(Protocol):
    """How the tiles of a band get through the network."""

    def pieces(self, band: Band, half: bool) -> Generator[Piece, None, None]:
        """What came of each tile's `keep`, in the order of the tiles. Raises DoesNotFit, _NotFinite, DeviceBroken, and
        what `on_tile` raises."""


class _Single:
    """One tile after another, in the thread that asks: as a CPU does it."""

    def __init__(self, network: Network, image: NDArray[Any], count: _Count, dtype: np.dtype[Any]) -> None:
        self._network, self._image, self._count, self._dtype = network, image, count, dtype

    def pieces(self, band: Band, half: bool) -> Generator[Piece, None, None]:
        for tile in band.tiles:
            self._network.on_step = self._count.tell
            yield _one_tile(self._network, self._image, tile, half, self._dtype)


class _Batched:
    """All tiles of a band at once through the door they share with others', and those of some bands ahead: what is
    ahead takes BAND_RESULT_BYTES of memory, or is one band."""

    def __init__(
        self, lane: Lane, network: Network, image: NDArray[Any], whole: Plan, count: _Count, dtype: np.dtype[Any]
    ) -> None:
        self._lane, self._network, self._image, self._count, self._dtype = lane, network, image, count, dtype
        self._whole = whole
        # As every band begins.
        self._half = network.prefers_half and not count.precise
        self._not_begun = deque(whole.bands)
        self._ahead: deque[tuple[Band, list[tuple[Tile, Asked]]]] = deque()
        self._side = _largest_keep([tile for band in whole.bands for tile in band.tiles])

    def pieces(self, band: Band, half: bool) -> Generator[Piece, None, None]:
        asked = self._taken(band, half)
        try:
            self._look_ahead()
            for tile, (window, each) in zip(band.tiles, asked, strict=True):
                piece = each.result(self._count.tell)
                _check_finite(piece.low, piece.high, tile.keep)
                yield Piece(_part(piece.pixels, window, tile, self._network.scale), piece.low, piece.high)
        finally:
            # Where one of them has failed, or nobody wants them any more.
            self._lane.withdraw([each for _, each in asked])

    def _taken(self, band: Band, half: bool) -> list[tuple[Tile, Asked]]:
        """The band's tiles, where they are under way; else they are begun now."""
        if self._ahead and self._ahead[0][0] is band:
            return self._ahead.popleft()[1]
        if self._not_begun and self._not_begun[0] is band:
            self._not_begun.popleft()
        return self._begun(band, half)

    def _look_ahead(self) -> None:
        while self._not_begun:
            band = self._not_begun[0]
            if (
                self._ahead
                and sum(map(self._result_bytes, (*(each for each, _ in self._ahead), band))) > BAND_RESULT_BYTES
            ):
                return
            try:
                asked = self._begun(band, self._half)
            except DoesNotFit:
                # No memory on the host: when that band's turn comes, this one is out of the way.
                return
            self._ahead.append((self._not_begun.popleft(), asked))

    def _result_bytes(self, band: Band) -> int:
        return 3 * band.region.area_px * self._network.scale**2 * self._dtype.itemsize

    def _begun(self, band: Band, half: bool) -> list[tuple[Tile, Asked]]:
        bands = self._whole.bands
        is_planned = bands[band.index - bands[0].index] is band
        side = self._side if is_planned else _largest_keep(band.tiles)
        asked: list[tuple[Tile, Asked]] = []
        try:
            for window in evened(self._whole, band.tiles, *side):
                given, keep = _staged(self._network, self._image, window)
                asked.append((window, self._lane.ask(self._network, given, keep, half=half, dtype=self._dtype)))
        except (RuntimeError, MemoryError) as error:
            self._lane.withdraw([each for _, each in asked])
            if (translated := _translated(error, self._network)) is error:
                raise
            raise translated from error
        return asked


def _largest_keep(tiles: Sequence[Tile]) -> tuple[int, int]:
    return max(tile.keep.width for tile in tiles), max(tile.keep.height for tile in tiles)


def _part(pixels: NDArray[Any], window: Tile, tile: Tile, scale: int) -> NDArray[Any]:
    """Of what came of `window.keep` what belongs to `tile.keep`."""
    left, top = (tile.keep.x - window.keep.x) * scale, (tile.keep.y - window.keep.y) * scale
    return pixels[top : top + tile.keep.height * scale, left : left + tile.keep.width * scale]


def _in_strips(
    network: Network, image: NDArray[Any], whole: Plan, count: _Count, dtype: np.dtype[Any], descent: Descent
) -> Iterator[UpscaledBand]:
    """Bands as the network finishes their rows. On a CPU, in float32: what is not right now will not be at another try,
    and memory does not depend on how the picture is cut."""
    scale = network.scale
    network.on_step = count.tell
    started, seconds, made_px = time.perf_counter(), 0.0, 0
    for band in whole.bands:
        try:
            # The plan may be of some bands in the middle of the picture.
            descent.go_to(network, image, band.region.y, dtype)
            made = descent.take(band.region.height, scale).permute(1, 2, 0)
            pixels = made.numpy().astype(dtype, copy=False)
            low, high = (float(value) / _top_of(dtype) for value in (pixels.min(), pixels.max()))
            _check_not_flat(low, high, image, band.region)
        except _NotPlausible as error:
            count.repairs.tiles_not_finite += isinstance(error, _NotFinite)
            count.repairs.bands_flat += isinstance(error, _Flat)
            raise BadOutput(str(error), model=network.card.name, device=str(network.device)) from error
        # Of all so far: several bands are made at once, and cost the first of them all and the others nothing.
        seconds += time.perf_counter() - started
        made_px += band.region.area_px
        network.observe(network.multiply_adds(made_px, made_px), seconds)
        for _ in band.tiles:
            count.tile_done()
        yield UpscaledBand(band, band.region.y * scale, pixels)
        # What the caller did with the band meanwhile is not the network's time.
        started = time.perf_counter()


def _mended(
    calls: _Calls, network: Network, image: NDArray[Any], whole: Plan, band: Band, count: _Count, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """The band's pixels, by whatever cut and precision the device can do."""
    half = network.prefers_half and not count.precise
    while True:
        done_before = count.done
        try:
            return _tried(calls, network, image, band, half, count, dtype)
        except DoesNotFit as error:
            band_before = band
            longest_px = max(max(tile.keep.width, tile.keep.height) for tile in band.tiles)
            if longest_px <= SMALLEST_TILE_PX:
                raise OutOfMemory(
                    f"Not even tiles of {longest_px} px fit in the memory of {network.device}.",
                    device=str(network.device),
                    tile_px=longest_px,
                ) from error
            tallies.count("enlarger_oom_retries_total")
            band = smaller(whole, band, max(SMALLEST_TILE_PX, longest_px // 2))
        except _NotPlausible as error:
            count.repairs.tiles_not_finite += isinstance(error, _NotFinite)
            count.repairs.bands_flat += isinstance(error, _Flat)
            if not half:
                raise BadOutput(str(error), model=network.card.name, device=str(network.device)) from error
            tallies.count("enlarger_band_reruns_total")
            band_before, half = band, False
        count.repairs.bands_done_again += 1
        # The tiles finished in vain stay counted, as done and as work: progress never falls.
        count.total += len(band.tiles) - (len(band_before.tiles) - (count.done - done_before))
        if network.device.type == "cuda":
            # Here and not in the handler: the error's traceback holds the tensors of the failed call.
            torch.cuda.empty_cache()


def _tried(
    calls: _Calls, network: Network, image: NDArray[Any], band: Band, half: bool, count: _Count, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """The band's pixels, cut and computed as told. Raises DoesNotFit or _NotPlausible, which `_mended` answers."""
    scale, region = network.scale, band.region
    pixels = new_rows(region.height * scale, region.width * scale, dtype)
    darkest, brightest = math.inf, -math.inf
    with contextlib.closing(calls.pieces(band, half)) as pieces:
        for tile, piece in zip(band.tiles, pieces, strict=True):
            darkest, brightest = min(darkest, piece.low), max(brightest, piece.high)
            top, left = (tile.keep.y - region.y) * scale, (tile.keep.x - region.x) * scale
            rows, columns = piece.pixels.shape[:2]
            pixels[top : top + rows, left : left + columns] = piece.pixels
            count.tile_done()
    _check_not_flat(darkest, brightest, image, region)
    return pixels


def _check_not_flat(darkest: float, brightest: float, image: NDArray[Any], region: Region) -> None:
    """Raises _Flat where the result's rows, of which the least and greatest value are given, show nothing and the
    input's do."""
    if brightest - darkest < FLAT_OUTPUT_RANGE:
        shown = image[region.y : region.bottom]
        # Channel by channel: a picture of one colour is flat too.
        if float(np.ptp(shown.astype(np.float32), axis=(0, 1)).max()) / _top_of(image.dtype) > FLAT_INPUT_RANGE:
            raise _Flat(f"The network's answer for rows {region.y} to {region.bottom} is flat; the input is not.")


def _check_finite(low: float, high: float, keep: Region) -> None:
    # NaN and infinity pass through aminmax, so that one pass over the pixels serves both checks.
    if not (math.isfinite(low) and math.isfinite(high)):
        raise _NotFinite(
            f"The network answered NaN or infinity for {keep.width} x {keep.height} px at ({keep.x}, {keep.y})."
        )


def _one_tile(network: Network, image: NDArray[Any], tile: Tile, half: bool, dtype: np.dtype[Any]) -> Piece:
    """One call of the network, for what the tile keeps.

    Raises DoesNotFit, _NotPlausible or DeviceBroken; an error of torch that is none of the device's is a fault of ours
    and passes as it is.
    """
    read, keep = tile.read, tile.keep
    started = time.perf_counter()
    try:
        given, wanted = _staged(network, image, tile)
        kept = network(given[None], keep=wanted, half=half)[0].permute(1, 2, 0)
        low, high = (float(value) for value in kept.aminmax())
        _check_finite(low, high, keep)
        piece = _quantized(kept, dtype)
    except (RuntimeError, MemoryError) as error:
        if (translated := _translated(error, network)) is error:
            raise
        raise translated from error
    network.observe(network.multiply_adds(read.area_px, keep.area_px), time.perf_counter() - started)
    return Piece(piece, low, high)


def _staged(network: Network, image: NDArray[Any], tile: Tile) -> tuple[torch.Tensor, Keep]:
    """What the tile reads, (3, H, W) float32 in [0, 1] on the host, and the part of it that it keeps."""
    read, keep = tile.read, tile.keep
    # Over memory in the order of rows, columns, channels: what torch calls channels_last.
    given = torch.from_numpy(_unit_floats(image[read.y : read.bottom, read.x : read.right])).permute(2, 0, 1)
    if network.device.type == "cuda":
        given = given.pin_memory()
    return given, (keep.x - read.x, keep.y - read.y, keep.width, keep.height)


def _translated(error: Exception, network: Network) -> Exception:
    """DoesNotFit or DeviceBroken, where the error says that; else the error itself."""
    if is_out_of_memory(error):
        return DoesNotFit(str(error))
    if is_of_the_device(error):
        return DeviceBroken(f"{network.device} failed: {error}", device=str(network.device))
    return error


def _unit_floats(values: NDArray[Any]) -> NDArray[np.float32]:
    """uint8, uint16 or float32 as contiguous float32 in [0, 1], a copy: torch takes no array that is read-only."""
    if values.dtype.kind == "f":
        return np.array(values, np.float32, order="C")
    # Division, as the network was trained: multiplying by 1/255 is not the same number.
    floats: NDArray[np.float32] = np.divide(values, np.float32(np.iinfo(values.dtype).max), dtype=np.float32, order="C")
    return floats


def _quantized(values: torch.Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    """float32 in [0, 1] on any device -> `dtype` on the host: itself, or rounded to uint8 or uint16."""
    return host_array(rounded(values, dtype), dtype)


def _top_of(dtype: np.dtype[Any]) -> int:
    """What stands for 1."""
    return int(np.iinfo(dtype).max) if dtype.kind == "u" else 1


def _quantize(rows: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    return _quantized(torch.from_numpy(rows), dtype)


class _Reduction:
    """One Lanczos step down, fed with bands from the top and answering with the rows that can be finished.

    The same as Pillow's `resize` of the whole picture in float32, but holding only the rows that rows to come can still
    see: three times the ratio above and below.
    """

    def __init__(self, width: int, height: int, new_width: int, new_height: int) -> None:
        self._width, self._height = width, height
        self._new_width, self._new_height = new_width, new_height
        self._ratio = height / new_height
        self._held = np.empty((0, width, 3), np.float32)
        self._held_from = 0
        self._finished = 0

    def add(self, pixels: NDArray[np.float32]) -> tuple[int, NDArray[np.float32]]:
        """(first row, rows) of the result that the next rows of the source complete; perhaps none."""
        self._held = np.concatenate([self._held, pixels])
        known = self._held_from + len(self._held)
        first, ratio = self._finished, self._ratio
        # Row j is made of the rows at most LANCZOS_RADIUS * ratio from (j + 0.5) * ratio; one more for its rounding.
        end = self._new_height
        if known < self._height:
            end = max(first, math.floor((known - 1) / ratio - 0.5 - LANCZOS_RADIUS) + 1)
        if end == first:
            return first, np.empty((0, self._new_width, 3), np.float32)
        top, bottom = first * ratio - self._held_from, min(end * ratio - self._held_from, len(self._held))
        size, box = (self._new_width, end - first), (0, top, self._width, bottom)
        planes = (Image.fromarray(np.ascontiguousarray(self._held[:, :, channel])) for channel in range(3))
        reduced = [np.asarray(plane.resize(size, Image.Resampling.LANCZOS, box=box)) for plane in planes]
        # Lanczos overshoots at edges.
        rows = np.clip(np.stack(reduced, axis=2), 0, 1)
        needed_from = max(self._held_from, math.floor((end + 0.5 - LANCZOS_RADIUS) * ratio) - 1)
        self._held = self._held[needed_from - self._held_from :].copy()
        self._held_from, self._finished = needed_from, end
        return first, rows
