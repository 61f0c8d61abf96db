"""The one door to a GPU: tiles of all attempts of a process, as many in one call of a network as go together.

A GPU works on many values at once or idles: one small tile after another, each waited for, leaves it idle for most of
the time. Here whoever has tiles hands over several and waits for each when its turn comes. What has come while the last
call ran forms the next one; a tile never waits for company while the device has nothing to do.

Attempts share a call and nothing else: what one of them raises, withdraws or gets wrong is its own.
"""

from __future__ import annotations

import math
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import DeviceBroken
from shared.telemetry import tallies
from worker.networks import Network
from worker.networks.architecture import Keep

MOST_TILES = 32
"""In one call, however small they are."""
SECONDS_PER_CALL = 1.0
"""More tiles than this takes, at the speed that the network has shown, do not go into one call: a tile's owner has no
sign of life from within it."""
CALLS_UNDER_WAY = 2
"""One that the device works on, and one behind it, so that it need not wait for us between two."""
TELL_SECONDS = 0.1
"""Who waits for a tile is told this often that the work goes on, where it does."""


class DoesNotFit(Exception):
    """The device has no memory for this tile, not even by itself."""


@dataclass(frozen=True)
class Piece:
    """What a network made of one tile. pixels: (rows, columns, 3) of the dtype asked for, on the host."""

    pixels: NDArray[Any]
    low: float
    high: float
    """The least and greatest value, before rounding; NaN where there is one."""


class Asked:
    """One tile on its way through the network."""

    def __init__(self, lane: Lane, network: Network, given: Tensor, keep: Keep, half: bool, dtype: np.dtype[Any]):
        self.network, self.given, self.keep, self.half, self.dtype = network, given, keep, half, dtype
        self.goes_alone = False
        """A call with others failed, and nobody knows of whose fault."""
        self.is_withdrawn = False
        self.lane = lane
        self._is_done = threading.Event()
        self._piece: Piece | None = None
        self._error: BaseException | None = None

    @property
    def read_px(self) -> int:
        return self.given.shape[1] * self.given.shape[2]

    def goes_with(self, other: Asked) -> bool:
        """Both can be computed by one call."""
        return (
            self.network is other.network
            and self.half == other.half
            and self.given.shape == other.given.shape
            and self.keep == other.keep
            and not self.goes_alone
            and not other.goes_alone
        )

    def succeed(self, piece: Piece) -> None:
        self._piece = piece
        self._is_done.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._is_done.set()

    def result(self, tell: Callable[[], None]) -> Piece:
        """Waits for it. Calls `tell` now and then, as long as the device gets on, with this tile or another's; what
        that raises passes through.

        Raises DoesNotFit, DeviceBroken, or what the network raised where that is a fault of ours.
        """
        batcher = self.lane.batcher
        steps = batcher.steps
        while not self._is_done.wait(TELL_SECONDS):
            if batcher.steps != steps:
                steps = batcher.steps
                tell()
        if self._error is not None:
            raise self._error
        assert self._piece is not None
        return self._piece


class Lane:
    """The tiles of one pass over a picture: lanes are served in turns. A context manager: left, all of its tiles that
    are not under way yet are withdrawn, and what comes of the others is nobody's."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self.waiting: deque[Asked] = deque()
        self.is_open = True

    def ask(self, network: Network, given: Tensor, keep: Keep, *, half: bool, dtype: np.dtype[Any]) -> Asked:
        """Hands over a tile, and does not wait. given: (3, H, W) float32 in [0, 1], on the host, pinned for a GPU.
        `keep`: the part of it whose result is wanted, which comes as `dtype`. Raises DeviceBroken."""
        asked = Asked(self, network, given, keep, half, dtype)
        self.batcher.take(asked)
        return asked

    def withdraw(self, tiles: Sequence[Asked]) -> None:
        """Nobody waits for these any more."""
        self.batcher.withdraw(self, tiles)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.batcher.close_lane(self)


@dataclass(frozen=True)
class _Call:
    """A call that the device has been given. `made` is written by it until `ended` has happened."""

    tiles: list[Asked]
    made: list[Tensor]
    bounds: Tensor
    """(2, N) on the host: least and greatest value of each tile's result."""
    began_at: float
    ended: torch.cuda.Event | None
    """None where the call returned with all done, as on a CPU."""


class Batcher:
    """Makes the calls of all networks on one device, for the threads of all attempts. It has two threads of its own,
    from the first tile on: one makes calls, the other hands out what has come of them."""

    def __init__(self, memory_bytes: int) -> None:
        """`memory_bytes`: what one call may take, by the networks' own estimates; a single tile may take more."""
        self._memory_bytes = memory_bytes
        self.steps = 0
        """Goes up whenever the device gets on: within a call, where the network tells, and at its end."""
        self.calls = 0
        """Calls made so far."""
        # Guards what follows.
        self._changed = threading.Condition()
        self._lanes: deque[Lane] = deque()
        """Those with tiles that wait; the first is served next."""
        self._under_way: list[Asked] = []
        self._calls_under_way = 0
        self._most_px: dict[tuple[Network, bool], int] = {}
        """Of a network and a precision: what did fit where more did not."""
        self._broken: BaseException | None = None
        self._is_closed = False
        self._threads: list[threading.Thread] = []
        self._called: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._last_ended_at = 0.0
        self._copying: torch.cuda.Stream | None = None

    def lane(self) -> Lane:
        return Lane(self)

    def close(self) -> None:
        """Ends the threads, when the calls under way have ended."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def take(self, asked: Asked) -> None:
        with self._changed:
            if self._broken is not None:
                raise _broken(asked, self._broken, only_waited=True)
            if not self._threads:
                self._threads = [
                    threading.Thread(target=self._make_calls, name="batcher-calls", daemon=True),
                    threading.Thread(target=self._hand_out, name="batcher-results", daemon=True),
                ]
                for thread in self._threads:
                    thread.start()
            if not asked.lane.waiting:
                self._lanes.append(asked.lane)
            asked.lane.waiting.append(asked)
            self._changed.notify_all()

    def withdraw(self, lane: Lane, tiles: Sequence[Asked]) -> None:
        with self._changed:
            self._withdraw(lane, tiles)

    def close_lane(self, lane: Lane) -> None:
        with self._changed:
            lane.is_open = False
            self._withdraw(lane, tuple(lane.waiting))

    def _withdraw(self, lane: Lane, tiles: Sequence[Asked]) -> None:
        for each in tiles:
            each.is_withdrawn = True
        lane.waiting = deque(each for each in lane.waiting if not each.is_withdrawn)
        if not lane.waiting and lane in self._lanes:
            self._lanes.remove(lane)

    # --- the thread that makes calls ---------------------------------------------------------------------------------

    def _make_calls(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_closed or (self._lanes and self._calls_under_way < CALLS_UNDER_WAY)
                )
                if self._is_closed:
                    self._called.put(None)
                    return
                tiles = self._next()
                self._under_way += tiles
                self._calls_under_way += 1
            self._call(tiles)
            # An idle thread must not hold the last pictures.
            del tiles

    def _next(self) -> list[Asked]:
        """What the next call computes: the tile whose turn it is, and of each lane in turn one that goes with it, until
        no more fit."""
        first = self._lanes[0].waiting.popleft()
        tiles, most = [first], self._most(first)
        took = True
        while took and len(tiles) < most:
            took = False
            # The first lane has had its own.
            for lane in (*list(self._lanes)[1:], self._lanes[0]):
                fitting = next((each for each in lane.waiting if each.goes_with(first)), None)
                if fitting is not None and len(tiles) < most:
                    lane.waiting.remove(fitting)
                    tiles.append(fitting)
                    took = True
        self._lanes.rotate(-1)
        self._lanes = deque(lane for lane in self._lanes if lane.waiting)
        return tiles

    def _most(self, asked: Asked) -> int:
        """How many tiles like this one a call may have."""
        if asked.goes_alone:
            return 1
        network, px = asked.network, asked.read_px
        by_memory = self._memory_bytes // (network.fixed_bytes + px * network.bytes_per_px)
        # Not asked of one that would first have to be measured: whoever asks holds up everybody's tiles.
        px_per_second = network.pixels_per_second() if network.is_calibrated else math.inf
        by_time = int(min(SECONDS_PER_CALL * px_per_second, px * MOST_TILES)) // px
        by_trying = self._most_px.get((network, asked.half), px * MOST_TILES) // px
        return max(1, min(MOST_TILES, by_memory, by_time, by_trying))

    def _call(self, tiles: list[Asked]) -> None:
        self.calls += 1
        began_at = time.perf_counter()
        try:
            made = self._made(tiles, began_at)
        except BaseException as error:  # noqa: BLE001 - it is raised where the tiles come from
            # Its traceback holds the tensors of the failed call.
            trouble = error.with_traceback(None) if is_out_of_memory(error) else error
        else:
            self._called.put(made)
            return
        self._failed(tiles, trouble)

    def _made(self, tiles: list[Asked], began_at: float) -> _Call:
        first, network = tiles[0], tiles[0].network
        network.on_step = self._step
        shape = (len(tiles), *first.given.shape)
        given = torch.empty(shape, device=network.device, memory_format=torch.channels_last)
        for index, each in enumerate(tiles):
            given[index].copy_(each.given, non_blocking=True)
        made = network(given, keep=first.keep, half=first.half)
        with torch.inference_mode():
            bounds = torch.stack([made.amin((1, 2, 3)), made.amax((1, 2, 3))])
            pieces = [
                rounded(piece.permute(1, 2, 0), each.dtype).contiguous()
                for piece, each in zip(made, tiles, strict=True)
            ]
        if network.device.type != "cuda":
            return _Call(tiles, pieces, bounds, began_at, None)
        return self._copied(tiles, pieces, bounds, began_at)

    def _copied(self, tiles: list[Asked], pieces: list[Tensor], bounds: Tensor, began_at: float) -> _Call:
        """Sends the results to the host behind the call's back: the next one computes meanwhile."""
        if self._copying is None:
            self._copying = torch.cuda.Stream(bounds.device)  # type: ignore[no-untyped-call]
        self._copying.wait_stream(torch.cuda.current_stream(bounds.device))
        held = []
        with torch.cuda.stream(self._copying):
            for each in (*pieces, bounds):
                host = torch.empty(each.shape, dtype=each.dtype, pin_memory=True)
                held.append(host.copy_(each, non_blocking=True))
                # The device's memory is not given to another call before this stream has read it.
                each.record_stream(self._copying)
            ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ended.record(self._copying)
        return _Call(tiles, held[:-1], held[-1], began_at, ended)

    def _step(self) -> None:
        self.steps += 1

    def _failed(self, tiles: list[Asked], error: BaseException) -> None:
        if is_of_the_device(error) and not is_out_of_memory(error):
            self._break(error)
            return
        if is_out_of_memory(error) and tiles[0].network.device.type == "cuda":
            torch.cuda.empty_cache()
        with self._changed:
            if len(tiles) > 1:
                if is_out_of_memory(error):
                    tallies.count("enlarger_calls_halved_total")
                    first = tiles[0]
                    self._most_px[first.network, first.half] = len(tiles) // 2 * first.read_px
                else:
                    for each in tiles:
                        each.goes_alone = True
                self._put_back(tiles)
            self._ended(tiles)
        if len(tiles) == 1:
            if is_out_of_memory(error):
                does_not_fit = DoesNotFit(str(error))
                does_not_fit.__cause__ = error
                error = does_not_fit
            tiles[0].fail(error)

    def _put_back(self, tiles: list[Asked]) -> None:
        for each in reversed(tiles):
            lane = each.lane
            if each.is_withdrawn or not lane.is_open:
                continue
            if lane in self._lanes:
                self._lanes.remove(lane)
            lane.waiting.appendleft(each)
            self._lanes.appendleft(lane)

    # --- the thread that hands out results ---------------------------------------------------------------------------

    def _hand_out(self) -> None:
        while (call := self._called.get()) is not None:
            try:
                self._handed_out(call)
            except BaseException as error:  # noqa: BLE001 - it is raised where the tiles come from
                self._failed(call.tiles, error)
            del call

    def _handed_out(self, call: _Call) -> None:
        if call.ended is not None:
            call.ended.synchronize()
        ended_at = time.perf_counter()
        first = call.tiles[0]
        _, _, width, height = first.keep
        work = first.network.multiply_adds(first.read_px, width * height)
        # Behind another call it had to wait for that.
        seconds = ended_at - max(call.began_at, self._last_ended_at)
        first.network.observe(len(call.tiles) * work, seconds)
        self._last_ended_at = ended_at
        lows, highs = call.bounds.tolist()
        made = [host_array(pixels, each.dtype) for each, pixels in zip(call.tiles, call.made, strict=True)]
        tallies.count("enlarger_network_calls_total")
        tallies.count("enlarger_network_tiles_total", len(made))
        with self._changed:
            self._ended(call.tiles)
        for each, pixels, low, high in zip(call.tiles, made, lows, highs, strict=True):
            each.succeed(Piece(pixels, low, high))

    def _ended(self, tiles: list[Asked]) -> None:
        self.steps += 1
        self._under_way = [each for each in self._under_way if each not in tiles]
        self._calls_under_way -= 1
        self._changed.notify_all()

    def _break(self, error: BaseException) -> None:
        """The device is not to be used any more: all who wait for it hear of it, and whether it may have been they."""
        with self._changed:
            self._broken = error
            suspects = {each.lane for each in self._under_way}
            all_tiles = [*self._under_way, *(each for lane in self._lanes for each in lane.waiting)]
            for lane in self._lanes:
                lane.waiting.clear()
            self._lanes.clear()
            self._under_way = []
        for each in all_tiles:
            each.fail(_broken(each, error, only_waited=each.lane not in suspects))


def _broken(asked: Asked, error: BaseException, *, only_waited: bool) -> DeviceBroken:
    # Each its own: it is raised in several threads.
    device = asked.network.device
    broken = DeviceBroken(f"{device} failed: {error}", device=str(device), only_waited=only_waited)
    broken.__cause__ = error
    return broken


def rounded(values: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """float32 in [0, 1] -> what `host_array` makes `dtype` of, on the same device: rounded to its full range."""
    if dtype == np.float32:
        return values
    if dtype == np.uint8:
        return values.mul(255).round_().to(torch.uint8)
    # torch has few operations for uint16: it travels as int32.
    return values.mul(65535).round_().to(torch.int32)


def host_array(values: Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    """What `rounded` made, on the host."""
    return values.cpu().numpy().astype(dtype, copy=False)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out: of a GPU, of its libraries, or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The host's allocator, and CUDA outside torch's allocator, raise plain RuntimeErrors.
    return isinstance(error, RuntimeError) and bool(
        re.search("out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", str(error))
    )


def is_of_the_device(error: BaseException) -> bool:
    """Whether a GPU failed, or one of its libraries."""
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and bool(re.search("CUDA|CUDNN|cuDNN|CUBLAS|cuBLAS", str(error)))
    )
