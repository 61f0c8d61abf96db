"""Runs a convolutional network on a CPU, in strips of rows over the whole width, by ncnn (https://github.com/Tencent/ncnn).

Two things make it fast. ncnn computes 3x3 convolutions by Winograd's method, F(6x6, 3x3) (Lavin and Gray 2015,
https://arxiv.org/abs/1509.09308): 5 times fewer multiplications than a matrix product needs, and so above what the
same cores can do in a matrix product. And nothing is computed twice: every layer keeps the last rows it was given
(a 3x3 convolution two), sets them above the next strip's, and so goes on where it stopped. A layer is late by the rows
it sees below its own; the last strip brings what is left. The strips are small enough for the processor's cache, and
the memory does not depend on the picture's height.

    graph = Graph()
    strips = Strips(graph, graph.conv(graph.input(3), weight, bias), threads=2)
    for finished in strips.through(pieces, rows=24): ...
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import OutOfMemory
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
    """A Graph made ready to run with so many threads. Not for two threads at once."""

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
        text = _Text(graph.layers, self.inputs)
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

    def through(
        self, pieces: Iterable[NDArray[np.float32]], *, rows: int, on_step: Callable[[], None] = lambda: None
    ) -> Iterator[NDArray[np.float32]]:
        """One picture from its top down, (C, h, W) at a time and `h` as it comes, in strips of `rows` rows.

        Yields (C', h', W') as they are finished, the last when all are in. `on_step` is called now and then within a
        strip; what it raises passes. Raises OutOfMemory where ncnn has none.
        """
        return self.passage(rows=rows, on_step=on_step).feed(pieces, is_last=True)

    def passage(self, *, rows: int, on_step: Callable[[], None] = lambda: None) -> Passage:
        """As `through`, for who feeds it bit by bit."""
        return Passage(self, rows, on_step)


class Passage:
    """One picture on its way down through Strips."""

    def __init__(self, strips: Strips, rows: int, on_step: Callable[[], None]) -> None:
        self._strips, self._on_step = strips, on_step
        first, last = strips._first_and_last(rows)
        self._cut = _Cut(first, rows, last)
        self._above: dict[str, Any] = {}

    def feed(self, pieces: Iterable[NDArray[np.float32]], *, is_last: bool) -> Iterator[NDArray[np.float32]]:
        """What the next rows bring, (C, h, W) at a time -> (C', h', W') at a time; of the last, `is_last`, all."""
        for piece in pieces:
            for strip in self._cut.add(piece):
                yield self._made(strip, is_last=False)
        if is_last:
            *before, last = self._cut.end()
            for strip in before:
                yield self._made(strip, is_last=False)
            yield self._made(last, is_last=True)

    def _made(self, strip: NDArray[np.float32], *, is_last: bool) -> NDArray[np.float32]:
        made, self._above = _Step(self._strips, strip, self._above, is_last=is_last).run(self._on_step)
        return made


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

    def __init__(self, layers: Sequence[_Layer], kept: dict[str, _Kept]) -> None:
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


_BELOW = re.compile(r"\{(\d+)\}")


def _takes_all(layer: _Window, kept: _Kept) -> bool:
    return layer.rows - 1 == kept.rows and layer.above == kept.zeros


class _Cut:
    """Pieces of any height become strips: the first of `first` rows, then `rows` each; the last of 1 to `last`, unless
    it is the first too."""

    def __init__(self, first: int, rows: int, last: int) -> None:
        self._rows, self._most_last = rows, last
        self._wanted = first
        self._held: list[NDArray[np.float32]] = []
        self._ready = 0

    def add(self, piece: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        """The strips that are complete now, and of which none is the last."""
        self._held.append(piece)
        self._ready += piece.shape[1]
        del piece
        while self._ready > self._wanted:
            yield self._taken(self._wanted)
            self._wanted = self._rows
        # A copy of the few rows that are left: they would keep all that they came with.
        self._held[-1] = self._held[-1].copy()

    def end(self) -> Iterator[NDArray[np.float32]]:
        """No more comes: what is left, as one strip or two."""
        if self._wanted == self._rows and self._ready > self._most_last:
            yield self._taken(self._ready - self._most_last)
        yield self._taken(self._ready)

    def _taken(self, count: int) -> NDArray[np.float32]:
        """So many rows, copied: of what was handed in nothing is held that has gone on."""
        self._ready -= count
        parts = []
        while count:
            parts.append(self._held[0][:, :count])
            count -= parts[-1].shape[1]
            self._held[0] = self._held[0][:, parts[-1].shape[1] :]
            if not self._held[0].shape[1]:
                del self._held[0]
        return np.concatenate(parts, axis=1)


class _Step:
    """One strip on its way through Strips: fewer rows come out of the first, which has `first_rows` at least unless it
    is the last too; as many of those in the middle, more of the last."""

    def __init__(self, strips: Strips, rows: NDArray[np.float32], above: dict[str, Any], *, is_last: bool) -> None:
        self._strips, self._is_first, self._is_last = strips, not above, is_last
        self._extractor = (strips._to_the_end if is_last else strips._onward).create_extractor()
        # ncnn reads them where they lie: they have to live as long as the extractor.
        self._held: list[NDArray[Any]] = []
        self._above = above
        self._width = rows.shape[2]
        self._rows = {"x": rows.shape[1]}
        self._give("x", np.ascontiguousarray(rows, np.float32))
        for layer in strips._layers:
            self._count(layer)

    def _give(self, name: str, values: NDArray[Any]) -> None:
        self._held.append(values)
        self._extractor.input(name, ncnn.Mat(values))

    def _count(self, layer: _Layer) -> None:
        """Follows how many rows each blob has in this step, and gives every crop its place."""
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
            if self._is_first:
                shape = (kept.blob.channels, kept.zeros, self._width * kept.blob.grid)
                self._give(kept.name, np.zeros(shape, np.float32))
            else:
                # Given away: ncnn lets go of it as soon as it was read, and what is kept now may lie in the same place.
                self._extractor.input(kept.name, self._above.pop(name))
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
        self._give(f"{name}_place", np.array(place, np.int32))

    def run(self, on_step: Callable[[], None]) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """What the strip brings of the output, (C', h', W'), and what is kept for the one below."""
        kept: dict[str, Any] = {}
        # In the order of the layers: what is asked for late would be computed again.
        for name in self._strips.inputs:
            kept[name] = self._take(f"{name}_kept", packed=True)
            on_step()
        return np.array(self._take(self._strips.output.name, packed=False)), kept

    def _take(self, name: str, *, packed: bool) -> Any:
        status, values = self._extractor.extract(name, int(packed))
        if status != 0:
            raise OutOfMemory("ncnn has no memory for a strip of the picture.", blob=name, status=status)
        return values
