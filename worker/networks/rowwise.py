"""A whole picture through a network drawn as graphs: from its top down, in strips, each row of each layer once.

`strips` computes one strip of one graph. Here is what makes a picture of them: how high strips are, in which parts wide
pictures are cut, which lane takes which strip, and what memory that is.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.networks.architecture import Architecture, nothing
from worker.networks.lanes import Lanes
from worker.networks.pages import new_rows
from worker.networks.pool import Pool
from worker.networks.strips import Passage, Promised, Strips

STRIP_PX = 6_144
"""Input px of a strip for each thread that computes it, about: in fewer, too much is done once for each strip; more do
not stay in the processor's cache."""
LATER_STRIP_PX = STRIP_PX // 2
"""The same of the graphs behind the first, which work on more values for each px of the input."""
STRIP_THREADS = 2
"""For no more than so many: strips take memory."""
STRIP_COLUMNS = 2048
"""Columns of a strip at most. A wider picture is cut into parts with halos between them, lest the memory of a strip
grow with the width: a twenty-fifth more work for a halo of 40 px. Very wide ones are cut narrower (`Rowwise.columns`).
"""
WIDE_MEMORY = 0.8
"""What strips of a wider picture may take, of what one of two such parts does: beside them other things grow, too."""
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


class Rowwise:
    """A network that can be drawn (`Architecture.draw`), by ncnn, over whole pictures; by one thread at a time."""

    def __init__(self, module: Architecture, halo_px: int) -> None:
        """`halo_px`: how far the parts of a wide picture see beyond what they keep."""
        self._module, self._halo_px = module, halo_px
        self._strips: tuple[Strips, ...] = ()
        self._strips_threads = 0

    def memory_bytes(self, width: int) -> int:
        """What `rows` takes for a picture so wide, its result not counted."""
        return self._memory_bytes(self.columns(width))

    def _memory_bytes(self, spans: list[tuple[slice, slice]]) -> int:
        read: list[int] = [span.stop - span.start for _, span in spans]
        kept = sum(each.kept_bytes_per_column for each in self.strips())
        # Each lane computes one strip of one part and one graph.
        computing = max(each.bytes_per_column(self._strip_rows(each, max(read))) for each in self.strips())
        # What the graphs have made of a strip waits in the pool, for as many turns as are planned ahead.
        waiting, grid = 0, 1
        for each in self.strips():
            grid *= each.output.grid
            waiting += 4 * each.output.channels * grid**2 * self._strip_rows(self._strips[0], max(read))
        return sum(read) * kept + max(read) * (computing + waiting) * lane_count()

    def columns(self, width: int) -> list[tuple[slice, slice]]:
        """The columns whose result each part of a picture so wide keeps, and those that it reads.

        The fewest parts with which a picture takes less memory than one of two parts does, or else those that take
        least; but none so narrow that halos are more than a tenth of the work. What is kept from strip to strip grows
        with the width, and narrower parts make up for it while they can.
        """
        fewest = math.ceil(width / STRIP_COLUMNS)
        most = max(fewest, width // max(1, 20 * self._halo_px))
        if fewest <= 2:
            return strip_columns(width, fewest, self._halo_px)
        enough = WIDE_MEMORY * self._memory_bytes(strip_columns(2 * STRIP_COLUMNS, 2, self._halo_px))
        cuts = [strip_columns(width, count, self._halo_px) for count in range(fewest, most + 1)]
        return next((cut for cut in cuts if self._memory_bytes(cut) <= enough), min(cuts, key=self._memory_bytes))

    def rows(
        self,
        pieces: Iterable[NDArray[np.float32]],
        convert: Callable[[Tensor], Tensor] = lambda made: made,
        *,
        on_step: Callable[[], None] = nothing,
    ) -> Iterator[Tensor]:
        """A whole picture from its top down, in strips over its whole width: every row of every layer is computed once.

        pieces: (3, h, W) in [0, 1], with `h` as it comes -> (3, h' * scale, W * scale) in [0, 1], finished rows, of
        another `h'`, whose memory is in the order of rows, columns, channels. `convert` makes of a part of them what is
        held until those beside it are made: (3, h, w) -> the same, of another dtype. `on_step` is called meanwhile, now
        and then. Raises OutOfMemory, and what `convert` and `on_step` raise.
        """
        pieces = iter(pieces)
        first = next(pieces)
        scale = self._module.scale
        width = first.shape[2] * scale
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
                columns = slice((keep.start - read.start) * scale, (keep.stop - read.start) * scale)
                made = []
                while promised:
                    # Taken out of the list: they are not held while the next are waited for.
                    drawn = finished[index](_awaited(promised.pop(0), on_step))
                    made += [convert(piece[:, :, columns]) for piece in drawn]
                    del drawn
                if not made:
                    continue
                if index == 0:
                    height = sum(piece.shape[1] for piece in made)
                    whole = torch.from_numpy(new_rows(height, width, made[0].numpy().dtype))
                top = 0
                for piece in made:
                    beside = whole[top : top + piece.shape[1], keep.start * scale : keep.stop * scale]
                    beside.copy_(piece.permute(1, 2, 0))
                    top += piece.shape[1]
                if index == len(parts) - 1:
                    yield whole.permute(2, 0, 1)
        finally:
            lanes.close()
            for each in self.strips():
                if each.pool.held_bytes > POOL_KEPT_BYTES:
                    each.pool.clear()

    def _part(self, pieces: Iterable[NDArray[np.float32]], columns: slice, widest: int, lanes: Lanes) -> Iterator[Turn]:
        """What the strips will make of some columns, turn by turn."""
        width, passages = columns.stop - columns.start, list[Passage]()
        for each in self.strips():
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

    def _finished(self) -> Callable[[NDArray[np.float32]], list[Tensor]]:
        """What `Architecture.finish` makes of the drawn rows that come one after the other, for one part."""
        kept: Tensor | None = None
        count = self._module.drawn_rows_kept

        def finished(piece: NDArray[np.float32]) -> list[Tensor]:
            nonlocal kept
            drawn = torch.from_numpy(piece)
            # Not all of them below what was kept: that would be one more copy of the largest there is.
            seam = torch.cat([drawn[:, :0] if kept is None else kept, drawn[:, :count]], dim=1)
            lowest = drawn if drawn.shape[1] >= count else seam
            # Copied: it would keep the whole.
            kept = lowest[:, max(0, lowest.shape[1] - count) :].clone()
            return [self._module.finish(each) for each in (seam, drawn) if each.shape[1] > count]

        return finished

    def strips(self) -> tuple[Strips, ...]:
        """Of each graph, for as many threads as torch has now."""
        threads = lane_threads()
        if self._strips_threads != threads:
            # One for all lanes and graphs.
            pool = Pool()
            self._strips = tuple(
                Strips(graph, output, threads=threads, pool=pool) for graph, output in self._module.draw()
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


def _awaited(promised: Promised, on_step: Callable[[], None]) -> NDArray[np.float32]:
    on_step()
    while not wait([promised.values], timeout=STEP_SECONDS).done:
        on_step()
    return promised.values.result()


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
