"""Runs a convolutional network on a CPU, in strips of rows over the whole width, by ncnn (https://github.com/Tencent/ncnn).

Two things make it fast. ncnn computes 3x3 convolutions by Winograd's method, F(6x6, 3x3) (Lavin and Gray 2015,
https://arxiv.org/abs/1509.09308): 5 times fewer multiplications than a matrix product needs, and so above what the
same cores can do in a matrix product. And nothing is computed twice: every layer keeps the last rows it was given
(a 3x3 convolution two), sets them above the next strip's, and so goes on where it stopped. A layer is late by the rows
it sees below its own; the last strip brings what is left. The strips are small enough for the cache of one core, each
core has one of its own (`worker.networks.lanes`), and the memory does not depend on the picture's height.

    graph = Graph()
    strips = Strips(graph, graph.conv(graph.input(3), weight, bias), threads=1)
    passage = strips.passage(width, rows=24, lanes=Lanes(2))
    for promised in passage.feed(map(Promised.of, pieces), is_last=True): ...
"""

from __future__ import annotations

import re
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import OutOfMemory
from worker.networks.lanes import Lanes
from worker.networks.pool import Pool

try:
    import ncnn
except ImportError:  # an optional dependency: no wheel for this machine
    ncnn = None


WINOGRAD_VALUES = 36 / 16
"""For each value that goes into a convolution and comes out of it, with F(4x4, 3x3), which ncnn takes for some sizes:
its tiles overlap. F(6x6, 3x3) has fewer."""


def is_available() -> bool:
    """ncnn is installed."""
    return ncnn is not None


@dataclass(frozen=True)
class Blob:
    """A layer's output in a Graph."""

    name: str
    channels: int
    grid: int
    """Its rows for each row of the input."""
    delay: int
    """Its rows that a strip of the input does not bring yet: those that depend on rows below."""


@dataclass(frozen=True)
class _Layer:
    kind: str
    inputs: tuple[Blob, ...]
    output: Blob
    options: tuple[str, ...] = ()
    weights: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class _Window(_Layer):
    """A convolution: each output row is made of `rows` input rows, `above` of them above the picture at its top and
    `below` beneath it at its end."""

    rows: int = 1
    above: int = 0
    below: int = 0


@dataclass(frozen=True)
class _Late(_Layer):
    """The same rows, `by` rows later, so that they meet those of a layer that sees further down."""

    by: int = 0


class Graph:
    """A network as layers over rows; what it is made of is the network's own affair."""

    def __init__(self) -> None:
        self.layers: list[_Layer] = []

    def input(self, channels: int) -> Blob:
        return self._add(_Layer("Input", (), Blob("x", channels, 1, 0)))

    def conv(
        self,
        x: Blob,
        weight: Tensor,
        bias: Tensor,
        *,
        padding: tuple[int, int, int, int] | None = None,
        leak: float = 1,
    ) -> Blob:
        """weight: (C_out, C_in, k, k). `padding`: rows above, below, columns left, right; without it the output is as
        large as the input. `leak`: slope below 0, 1 for none. Zeros lie beyond the edges, as the papers have it."""
        outputs, inputs, rows, columns = weight.shape
        if inputs != x.channels:
            raise ValueError(f"The kernel takes {inputs} channels, and there are {x.channels}.")
        above, below, left, right = padding or (rows // 2, rows // 2, columns // 2, columns // 2)
        options = [f"0={outputs}", f"1={columns}", f"11={rows}", f"4={left}", f"15={right}", "14=0"]
        options += ["5=1", f"6={weight.numel()}"]
        if leak != 1:
            options += ["9=2", f"-23310=1,{leak:.9g}"]
        # Four bytes of zero before a kernel: what follows is float32.
        weights = (bytes(4) + _bytes(weight), _bytes(bias))
        made = self._blob(outputs, x.grid, x.delay + rows - 1 - above)
        return self._add(_Window("Convolution", (x,), made, tuple(options), weights, rows, above, below))

    def prelu(self, x: Blob, slopes: Tensor) -> Blob:
        """slopes: (C,)."""
        made = self._blob(x.channels, x.grid, x.delay)
        return self._add(_Layer("PReLU", (x,), made, (f"0={slopes.numel()}",), (_bytes(slopes),)))

    def add(self, x: Blob, y: Blob, *, times: float = 1.0) -> Blob:
        """x * times + y."""
        x, y = self._together(x, y)
        made = self._blob(x.channels, x.grid, x.delay)
        if times == 1.0:
            return self._add(_Layer("BinaryOp", (x, y), made, ("0=0",)))
        return self._add(_Layer("Eltwise", (x, y), made, ("0=1", f"-23301=2,{times:.9g},1.0")))

    def concat(self, *blobs: Blob) -> Blob:
        """Channels of all, one behind the other."""
        if len(blobs) == 1:
            return blobs[0]
        blobs = self._together(*blobs)
        made = self._blob(sum(blob.channels for blob in blobs), blobs[0].grid, blobs[0].delay)
        return self._add(_Layer("Concat", blobs, made, ("0=0",)))

    def shuffle(self, x: Blob, factor: int) -> Blob:
        """Channels (C * factor^2) to pixels, in torch's order."""
        made = self._blob(x.channels // factor**2, x.grid * factor, x.delay * factor)
        return self._add(_Layer("PixelShuffle", (x,), made, (f"0={factor}",)))

    def nearest(self, x: Blob, factor: int) -> Blob:
        """Each pixel `factor` times in both directions."""
        made = self._blob(x.channels, x.grid * factor, x.delay * factor)
        return self._add(_Layer("Interp", (x,), made, ("0=1", f"1={factor}.0", f"2={factor}.0")))

    def _together(self, *blobs: Blob) -> tuple[Blob, ...]:
        latest = max(blob.delay for blob in blobs)
        return tuple(blob if blob.delay == latest else self.late(blob, latest - blob.delay) for blob in blobs)

    def late(self, x: Blob, by: int) -> Blob:
        """The same rows, `by` rows later: to be kept in place of what is made of them, where that has more channels."""
        for layer in self.layers:
            if isinstance(layer, _Late) and layer.inputs == (x,) and layer.by == by:
                return layer.output
        made = self._blob(x.channels, x.grid, x.delay + by)
        return self._add(_Late("Crop", (x,), made, by=by))

    def _blob(self, channels: int, grid: int, delay: int) -> Blob:
        return Blob(f"b{len(self.layers)}", channels, grid, delay)

    def _add(self, layer: _Layer) -> Blob:
        self.layers.append(layer)
        return layer.output


def _bytes(values: Tensor) -> bytes:
    return values.detach().float().contiguous().numpy().tobytes()


class Strips:
    """A Graph made ready to run, each strip by so many threads, any number of strips at once."""

    def __init__(self, graph: Graph, output: Blob, *, threads: int, pool: Pool | None = None) -> None:
        if ncnn is None:
            raise ModuleNotFoundError("The package ncnn is not installed.")
        self.output = output
        self.inputs: dict[str, _Kept] = _kept(graph.layers)
        self._layers = graph.layers
        self.first_rows = max(
            1, *(-(-(kept.rows + kept.blob.delay) // kept.blob.grid) for kept in self.inputs.values())
        )
        """Least rows of a first strip that is not the last too: all layers must have what they keep."""
        self.pool = pool or Pool()
        self._bytes_per_column: dict[int, int] = {}
        text = _Text(graph.layers, self.inputs, output)
        self._onward, self._to_the_end = (text.net(threads, self.pool, is_last=is_last) for is_last in (False, True))

    @property
    def kept_bytes_per_column(self) -> int:
        """What is kept from strip to strip, for each column of the input."""
        return sum(4 * kept.rows * kept.blob.channels * kept.blob.grid for kept in self.inputs.values())

    def bytes_per_column(self, rows: int) -> int:
        """What else is held at most while a strip of `rows` rows is computed, for each of its columns: the blobs that
        layers to come will read, and within a convolution its input with the padding and as Winograd's tiles."""
        if rows not in self._bytes_per_column:
            first, last = self._first_and_last(rows)
            self._bytes_per_column[rows] = 4 * max(
                self._most_values(lambda blob: first * blob.grid - blob.delay, is_first=True),
                self._most_values(lambda blob: rows * blob.grid, is_first=False),
                self._most_values(lambda blob: last * blob.grid + blob.delay, is_first=False),
            )
        return self._bytes_per_column[rows]

    def _first_and_last(self, rows: int) -> tuple[int, int]:
        """Rows of the first strip and, at most, of the last where others have `rows`.

        At the picture's end every layer makes up for its delay. Where that is more than a strip is high, it alone
        decides what memory is taken: then no rows come with it that could have come before.
        """
        return max(self.first_rows, rows), 1 if rows < self.first_rows else rows

    def _most_values(self, rows_of: Callable[[Blob], int], *, is_first: bool) -> int:
        """The most values that are held at once for a column, what is kept not counted, layer after layer. `rows_of`:
        those that the strip brings of a blob."""

        def values(blob: Blob, more_rows: int = 0) -> int:
            return blob.grid * blob.channels * max(0, rows_of(blob) + more_rows)

        readers = Counter(blob.name for layer in self._layers for blob in layer.inputs)
        held: dict[str, int] = {}
        most = 0
        for layer in self._layers:
            made = layer.output
            held[made.name] = values(made)
            within = 0
            if isinstance(layer, _Window):
                (blob,) = layer.inputs
                whole = values(blob, layer.rows - 1)
                if layer.rows == 3:
                    within = whole + int(WINOGRAD_VALUES * (whole + values(made)))
                elif layer.rows > 3:
                    # As a matrix: each px has all that its kernel sees.
                    within = whole + layer.rows**2 * values(blob)
            most = max(most, sum(held.values()) + within)
            for blob in layer.inputs:
                readers[blob.name] -= 1
                if not readers[blob.name]:
                    del held[blob.name]
            if kept := self.inputs.get(made.name):
                # Both are there while one is copied into the other.
                whole = values(made, kept.zeros if is_first else kept.rows)
                most = max(most, sum(held.values()) + whole)
                held[made.name] = whole
        return most

    def below_each_other(self, pieces: Sequence[NDArray[np.float32]]) -> Any:
        """Of (C, h, W) each, one ncnn.Mat, which lies in the pool."""
        channels, _, width = pieces[0].shape
        whole = ncnn.Mat(width, sum(each.shape[1] for each in pieces), channels, allocator=self.pool)
        if whole.empty():
            raise OutOfMemory(_NO_MEMORY, blob="x")
        np.concatenate(pieces, axis=1, out=np.asarray(whole))
        return whole

    def passage(self, width: int, *, rows: int, lanes: Lanes) -> Passage:
        """To take one picture through, `width` columns of it, in strips of `rows` rows."""
        return Passage(self, width, rows, lanes)


@dataclass(frozen=True)
class Promised:
    """Rows that come."""

    rows: int
    values: Future[NDArray[np.float32]]
    """(C, rows, W)."""

    @classmethod
    def of(cls, values: NDArray[np.float32]) -> Promised:
        """Of such as are there."""
        future: Future[NDArray[np.float32]] = Future()
        future.set_result(values)
        return cls(values.shape[1], future)


class Passage:
    """One picture on its way down through Strips.

    Each strip is a task for one lane. The strip below it is in the next lane and one layer behind: it waits for no
    more than the rows that are kept of each layer.
    """

    def __init__(self, strips: Strips, width: int, rows: int, lanes: Lanes) -> None:
        self._strips, self._width, self._lanes = strips, width, lanes
        first, last = strips._first_and_last(rows)
        self._cut = _Cut(first, rows, last)
        self._above: _Step | None = None
        self._behind: Callable[[], Future[NDArray[np.float32]] | None] = lambda: None
        """The last strip's Future, as long as somebody else wants it: what it made is large."""

    def feed(self, pieces: Iterable[Promised], *, is_last: bool) -> Iterator[Promised]:
        """What the next rows will bring; of the last, `is_last`, all. Computes what has been taken from the iterator.

        Raises nothing of what happens in the lanes, where the values do: OutOfMemory where ncnn has no memory.
        """
        for piece in pieces:
            for strip in self._cut.add(piece):
                yield self._begun(strip, is_last=False)
        if is_last:
            *before, last = self._cut.end()
            for strip in before:
                yield self._begun(strip, is_last=False)
            yield self._begun(last, is_last=True)

    def _begun(self, strip: list[_Part], *, is_last: bool) -> Promised:
        rows = sum(part.rows for part in strip)
        step, lanes = _Step(self._strips, rows, self._width, self._above, is_last=is_last), self._lanes

        def given() -> Any:
            together = self._strips.below_each_other([part.values() for part in strip])
            # It may be all that holds what they are parts of.
            strip.clear()
            return together

        made = lanes.add(lambda: step.run(given, lanes), after=[part.source for part in strip], behind=self._behind())
        self._above, self._behind = step, weakref.ref(made)
        return Promised(step.rows_made, made)


@dataclass(frozen=True)
class _Kept:
    """What is kept of a blob from strip to strip."""

    blob: Blob
    rows: int
    """In the middle of a picture: its last rows."""
    zeros: int
    """At the top: rows of zeros, the padding."""

    @property
    def name(self) -> str:
        return f"{self.blob.name}_above"


def _kept(layers: Sequence[_Layer]) -> dict[str, _Kept]:
    found: dict[str, _Kept] = {}
    for layer in layers:
        if isinstance(layer, _Window | _Late):
            (blob,) = layer.inputs
            rows, zeros = (layer.rows - 1, layer.above) if isinstance(layer, _Window) else (layer.by, 1)
            before = found.get(blob.name, _Kept(blob, 0, 1))
            if rows:
                found[blob.name] = _Kept(blob, max(rows, before.rows), max(zeros, before.zeros))
    return found


class _Text:
    """The graph in ncnn's own words, and its weights."""

    def __init__(self, layers: Sequence[_Layer], kept: dict[str, _Kept], output: Blob) -> None:
        self._lines: list[tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = []
        self._weights = b"".join(weight for layer in layers for weight in layer.weights)
        for layer in layers:
            names = tuple(blob.name for blob in layer.inputs)
            options, made = layer.options, layer.output.name
            if isinstance(layer, _Late):
                self._crop(f"{names[0]}_whole", made)
            elif isinstance(layer, _Window):
                (name,) = names
                if name in kept:
                    name = f"{name}_whole"
                    if not _takes_all(layer, kept[layer.inputs[0].name]):
                        name = self._crop(name, f"{made}_in")
                self._add("Convolution", (name,), (made,), (*options, f"16={{{layer.below}}}"))
            else:
                self._add(layer.kind, names, (made,), options)
            if made in kept:
                each = kept[made]
                self._add("Input", (), (each.name,), ())
                self._add("Concat", (each.name, made), (f"{made}_whole",), ("0=1",))
                self._crop(f"{made}_whole", f"{made}_kept")
        # What is extracted in another packing is made by the allocator of the process.
        self._add("Packing", (output.name,), (_MADE,), ("0=1",))

    def _add(self, kind: str, inputs: tuple[str, ...], outputs: tuple[str, ...], options: tuple[str, ...]) -> None:
        self._lines.append((kind, inputs, outputs, options))

    def _crop(self, source: str, made: str) -> str:
        """Rows chosen at each step: their place is an input of its own."""
        self._add("Input", (), (f"{made}_place",), ())
        self._add("Crop", (source, f"{made}_place"), (made,), ("0=-233",))
        return made

    def net(self, threads: int, pool: Any, *, is_last: bool) -> Any:
        net = ncnn.Net()
        options = net.opt
        options.blob_allocator = options.workspace_allocator = pool
        options.num_threads = threads
        for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
            setattr(options, f"use_{name}", False)
        text = "\n".join(self._with_splits())
        text = _BELOW.sub(lambda found: found[1] if is_last else "0", text)
        with tempfile.NamedTemporaryFile() as weights:
            weights.write(self._weights)
            weights.flush()
            if net.load_param_mem(text) != 0 or net.load_model(weights.name) != 0:
                raise ValueError("ncnn does not take this network.")
        return net

    def _with_splits(self) -> list[str]:
        """ncnn wants a blob that several layers read to be split before."""
        readers = Counter(name for _, inputs, _, _ in self._lines for name in inputs)
        taken: Counter[str] = Counter()
        lines: list[str] = []
        blobs = 0

        def line(kind: str, inputs: Sequence[str], outputs: Sequence[str], options: Sequence[str]) -> None:
            nonlocal blobs
            blobs += len(outputs)
            words = [kind, f"l{len(lines)}", str(len(inputs)), str(len(outputs)), *inputs, *outputs, *options]
            lines.append(" ".join(words))

        for kind, inputs, outputs, options in self._lines:
            own = []
            for name in inputs:
                own.append(f"{name}_{taken[name]}" if readers[name] > 1 else name)
                taken[name] += 1
            line(kind, own, outputs, options)
            for name in outputs:
                if readers[name] > 1:
                    line("Split", [name], [f"{name}_{number}" for number in range(readers[name])], [])
        return ["7767517", f"{len(lines)} {blobs}", *lines, ""]


_NO_MEMORY = "ncnn has no memory for a strip of the picture."
_MADE = "made"
"""The graph's output, one value behind the other."""
_AS_IT_LIES = 1
"""For `Extractor.extract`: in whatever packing."""
_BELOW = re.compile(r"\{(\d+)\}")


def _takes_all(layer: _Window, kept: _Kept) -> bool:
    return layer.rows - 1 == kept.rows and layer.above == kept.zeros


@dataclass(frozen=True)
class _Part:
    """Some of the rows that come."""

    source: Future[NDArray[np.float32]]
    top: int
    bottom: int

    @property
    def rows(self) -> int:
        return self.bottom - self.top

    def values(self) -> NDArray[np.float32]:
        return self.source.result()[:, self.top : self.bottom]


class _Cut:
    """Pieces of any height become strips: the first of `first` rows, then `rows` each; the last of 1 to `last`, unless
    it is the first too."""

    def __init__(self, first: int, rows: int, last: int) -> None:
        self._rows, self._most_last = rows, last
        self._wanted = first
        self._held: list[_Part] = []
        self._ready = 0

    def add(self, piece: Promised) -> Iterator[list[_Part]]:
        """The strips that are complete now, and of which none is the last."""
        self._held.append(_Part(piece.values, 0, piece.rows))
        self._ready += piece.rows
        while self._ready > self._wanted:
            yield self._taken(self._wanted)
            self._wanted = self._rows

    def end(self) -> Iterator[list[_Part]]:
        """No more comes: what is left, as one strip or two."""
        if self._wanted == self._rows and self._ready > self._most_last:
            yield self._taken(self._ready - self._most_last)
        yield self._taken(self._ready)

    def _taken(self, count: int) -> list[_Part]:
        self._ready -= count
        parts = []
        while count:
            part = self._held.pop(0)
            if part.rows > count:
                self._held.insert(0, replace(part, top=part.top + count))
                part = replace(part, bottom=part.top + count)
            count -= part.rows
            parts.append(part)
        return parts


class _Step:
    """One strip on its way through Strips: fewer rows come out of the first, which has `first_rows` at least unless it
    is the last too; as many of those in the middle, more of the last."""

    def __init__(self, strips: Strips, rows: int, width: int, above: _Step | None, *, is_last: bool) -> None:
        self._strips, self._width = strips, width
        self._is_first, self._is_last = above is None, is_last
        self._above = {} if above is None else above._kept
        self._kept: dict[str, Future[Any]] = {name: Future() for name in strips.inputs}
        """What the strip below goes on with. It takes each of them out, when it comes to wait for it."""
        self._owed = dict(self._kept)
        self._places: dict[str, NDArray[np.int32]] = {}
        self._rows = {"x": rows}
        for layer in strips._layers:
            self._count(layer)

    @property
    def rows_made(self) -> int:
        return self._rows[self._strips.output.name]

    def _count(self, layer: _Layer) -> None:
        """Follows how many rows each blob has in this step, and where every crop has its place."""
        name = layer.output.name
        if isinstance(layer, _Window | _Late):
            (blob,) = layer.inputs
            kept = self._strips.inputs.get(blob.name)
            whole = self._rows[blob.name] + self._rows_above(blob.name)
            if isinstance(layer, _Late):
                assert kept is not None
                top = kept.zeros if self._is_first else kept.rows - layer.by
                self._rows[name] = whole - top - (0 if self._is_last else layer.by)
                self._place(name, blob, top, self._rows[name])
            else:
                top = 0
                if kept is not None and not _takes_all(layer, kept):
                    top = kept.zeros - layer.above if self._is_first else kept.rows - (layer.rows - 1)
                    self._place(f"{name}_in", blob, top, whole - top)
                self._rows[name] = whole - top - (layer.rows - 1) + (layer.below if self._is_last else 0)
        elif layer.inputs:
            (source, *_) = layer.inputs
            self._rows[name] = self._rows[source.name] * layer.output.grid // source.grid
        if kept := self._strips.inputs.get(name):
            whole = self._rows[name] + self._rows_above(name)
            # Of the last strip nothing is kept: one row is asked for, to go through it in steps.
            rows = 1 if self._is_last else kept.rows
            self._place(f"{name}_kept", kept.blob, whole - rows, rows)

    def _rows_above(self, name: str) -> int:
        kept = self._strips.inputs.get(name)
        return 0 if kept is None else kept.zeros if self._is_first else kept.rows

    def _place(self, name: str, blob: Blob, top: int, rows: int) -> None:
        # Left, top, first channel, width, height, channels.
        place = [0, top, 0, self._width * blob.grid, rows, blob.channels]
        self._places[name] = np.array(place, np.int32)

    def run(self, given: Callable[[], Any], lanes: Lanes) -> NDArray[np.float32]:
        """given: an ncnn.Mat of (C, h, W), as many rows as were told -> (C', `rows_made`, W')."""
        try:
            return self._run(given, lanes)
        except BaseException:
            # Each its own: what is raised holds on to all that it passes.
            for each in self._owed.values():
                each.set_exception(Stopped())
            raise

    def _run(self, given: Callable[[], Any], lanes: Lanes) -> NDArray[np.float32]:
        extractor = (self._strips._to_the_end if self._is_last else self._strips._onward).create_extractor()
        # ncnn reads them where they lie: they have to live as long as the extractor.
        held: list[NDArray[Any]] = []

        def give(name: str, values: NDArray[Any]) -> None:
            held.append(values)
            extractor.input(name, ncnn.Mat(values))

        def take(name: str) -> Any:
            status, values = extractor.extract(name, _AS_IT_LIES)
            if status != 0:
                raise OutOfMemory(_NO_MEMORY, blob=name, status=status)
            return values

        # Nobody else has it: ncnn lets go of it as soon as it was read.
        extractor.input("x", given())
        for name, place in self._places.items():
            give(f"{name}_place", place)
        # In the order of the layers: what is asked for late would be computed again.
        for name, kept in self._strips.inputs.items():
            if lanes.is_closed:
                raise Stopped
            if self._is_first:
                shape = (kept.blob.channels, kept.zeros, self._width * kept.blob.grid)
                give(kept.name, np.zeros(shape, np.float32))
            else:
                # Given away: ncnn lets go of it as soon as it was read, and what is kept now may lie in the same place.
                extractor.input(kept.name, self._above.pop(name).result())
            kept_now = take(f"{name}_kept")
            # Nobody asks the last strip: it would lie in the pool until the passage goes.
            if not self._is_last:
                self._owed.pop(name).set_result(kept_now)
            del kept_now
        # Where it lies, in the pool.
        return np.asarray(take(_MADE))


class Stopped(Exception):
    """The lanes were closed, or the strip above has failed."""
