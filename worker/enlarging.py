"""One picture file becomes a larger one: decode, plan, upscale, classify, encode.

Knows nothing of jobs, SQL or storage. The worker's attempts and the command line both go through here, so both make the
same picture.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Generic, Literal, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared import catalog
from shared.catalog import ModelCard
from shared.errors import BadOutput
from shared.pictures import Format, check_size, format_named
from shared.settings import Settings
from worker import routing, upscale
from worker.batching import Batcher
from worker.classify import Classifier, Label
from worker.codec import Samples
from worker.codec.color import luma, quantize
from worker.codec.decode import Picture, flatten
from worker.codec.encode import Encoder, check_memory, open_encoder
from worker.codec.metadata import Metadata, metadata_for_result
from worker.codec.parts import Layout, PartWriter, open_part
from worker.codec.sandboxed import Decoder, InProcess
from worker.fidelity import Comparison, Sums
from worker.networks import Network, load
from worker.tiling import Band, Plan
from worker.upscale import Descent, EnlargedRows, Repairs, Work
from worker.usage import available_bytes

# The slowest kinds seen (16-bit with a colour profile; AVIF) take a tenth of this: what a lease is asked for must
# suffice on a busy machine too.
DECODE_PX_PER_SECOND = 2_000_000
ENCODE_AT_ONCE_PX_PER_SECOND = 1_000_000
"""WebP and AVIF are encoded when the last row is in; all others row by row."""

FIRST_USE_SECONDS = 120.0
"""A network is loaded and calibrated when a process first uses it: in up to 10 s on a quiet machine, in several times
that on a slow one with other work."""

HELD_BEHIND_BYTES = 32 * 2**20
"""Finished rows that may wait for the encoder; a band larger than that waits alone."""
PIECE_BYTES = 2**20
"""What is encoded and compared of them at a time."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of a picture, in the contract's words. `format` is concrete: `shared.pictures` resolves `auto`."""

    scale: int = 4
    model: str = catalog.DEFAULT_MODEL
    format: str = "png"
    classify: bool = False
    quality: int = 95
    lossless: bool = False
    metadata_policy: Literal["safe", "keep", "strip"] = "safe"
    alpha: Literal["model", "lanczos", "flatten"] = "model"
    background: str = "#ffffff"


@dataclass(frozen=True)
class Progress:
    """How far the network has come with the picture; what it has finished goes on to the encoder at once."""

    tiles_done: int
    tiles_total: int
    """May grow: a band that did not fit in memory is done again in more tiles."""
    bands_done: int
    bands_total: int
    eta_seconds: float | None
    """None before there is anything to judge by."""


class Watch(Protocol):
    """Follows the work. Either method may raise to stop it; what it raises comes out of `Engine.enlarge_file`."""

    def begins(self, phase: str, *, expected_seconds: float = 0.0) -> None:
        """A phase begins. `expected_seconds`: how long it may stay silent, generously; 0 where it is soon over."""

    def progressed(self, progress: Progress) -> None:
        """Before the first tile, after each, and within one that takes long."""

    def routed(self, model: str, reason: str) -> None:
        """`auto` has come to a model."""


class Onlooker(Protocol):
    """Is shown pixels on their way; what it sees is its own to copy, and it must be quick. By a thread of its own."""

    def begins(self, input_rgb: Samples, width: int, height: int, rows: range | None = None) -> None:
        """The picture is decoded, (H, W, 3), and its result will be `width` x `height` px. Comes again where the result
        is made again. `rows`: of a part of the result the rows that are going to be shown; None is all."""

    def made(self, rows: Samples) -> None:
        """The next rows of the result, from the top, as they have gone to the encoder."""


class Unwatched:
    """A Watch that looks away."""

    def routed(self, model: str, reason: str) -> None:
        pass

    def begins(self, phase: str, *, expected_seconds: float = 0.0) -> None:
        pass

    def progressed(self, progress: Progress) -> None:
        pass


@dataclass(frozen=True)
class Enlarged:
    """What became of a picture. The result itself lies in the file that was named."""

    width: int
    height: int
    bytes: int
    labels: tuple[Label, ...] | None
    """Most probable first; None where they were not asked for."""
    warnings: tuple[str, ...]
    """For the customer, in words: what of the input could not be kept."""
    timings: dict[str, float]
    """Seconds by phase (`decode_seconds`, ...), and what the work was: `tiles`, `bands`, `waste`."""
    model: str
    """The card that was run, also where `auto` was asked for."""
    report: dict[str, Any] | None = None
    """How true the result is to the input, and what had to be mended: JSON values. A preview has none."""
    cells: list[dict[str, Any]] | None = None
    """Where the models' answers lie on a preview."""


@dataclass(frozen=True)
class MadePart:
    """What became of some bands of a picture. The part itself lies in the file that was named. Everything here is JSON
    values, or becomes such by `asdict`."""

    bytes: int
    facts: dict[str, Any]
    """For `worker.codec.parts`, which joins it."""
    sums: Sums
    repairs: Repairs
    timings: dict[str, float]


@dataclass
class _Stopwatch:
    timings: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Adds the seconds the block takes, also where it raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - started)

    def add(self, phase: str, seconds: float) -> None:
        name = f"{phase}_seconds"
        self.timings[name] = self.timings.get(name, 0.0) + seconds


class Engine:
    """What a process enlarges pictures with: a device and its limits.

    `device` is torch's word ("cpu", "cuda:0"). Networks and the classifier are loaded when first asked for. Several
    threads may enlarge pictures at once where it is a GPU, or `batched`: their tiles share its calls. Elsewhere one.
    """

    def __init__(
        self,
        device: str,
        *,
        max_input_px: int,
        max_output_px: int,
        tile_px: int = 0,
        tile_memory_bytes: int = upscale.TILE_MEMORY_BYTES,
        decoder: Decoder | None = None,
        own: Sequence[ModelCard] = (),
        batched: bool | None = None,
    ) -> None:
        """`decoder`: how picture files are read; in this process where none is given. `batched`: whether tiles go
        through a `Batcher`; None is on a GPU."""
        self.device = device
        self._decoder = decoder or InProcess(max_input_px)
        self._own = tuple(own)
        self._max_input_px = max_input_px
        self._max_output_px = max_output_px
        self._tile_px = tile_px
        self._tile_memory_bytes = tile_memory_bytes
        self._networks: dict[str, Network] = {}
        self._loading = threading.Lock()
        self.batcher = Batcher(tile_memory_bytes) if (device != "cpu" if batched is None else batched) else None
        """Where tiles of several attempts meet; None where there is one attempt at a time."""

    @classmethod
    def of(
        cls, settings: Settings, device: str, decoder: Decoder | None = None, own: Sequence[ModelCard] = ()
    ) -> Engine:
        return cls(
            device,
            max_input_px=settings.max_input_px,
            max_output_px=settings.max_output_px,
            tile_px=settings.tile_px,
            tile_memory_bytes=settings.tile_memory_bytes,
            decoder=decoder,
            own=own,
        )

    def network(self, model: str) -> Network:
        """The loaded network of a card. Raises ModelUnavailable."""
        with self._loading:
            if model not in self._networks:
                self._networks = {**self._networks, model: load(catalog.card(model, self._own), self.device)}
            return self._networks[model]

    def ready(self, model: str, watch: Watch, *, phase: str = "load") -> Network:
        """The network of a card, loaded and calibrated. Where that is still to be done, `watch` hears of it as `phase`.

        Raises ModelUnavailable.
        """
        if model not in self._networks or not self._networks[model].is_calibrated:
            watch.begins(phase, expected_seconds=FIRST_USE_SECONDS)
        network = self.network(model)
        # Now, while a lease is long enough for it, and not when the work is planned.
        network.pixels_per_second()
        return network

    def close(self) -> None:
        """When nothing is enlarged any more."""
        if self.batcher is not None:
            self.batcher.close()

    @property
    def models_loaded(self) -> tuple[str, ...]:
        """Names of the cards whose networks are loaded. Any thread may ask."""
        return tuple(self._networks)

    @property
    def speeds(self) -> dict[str, dict[str, Any]]:
        """Of each network that is loaded and calibrated: its runtime, and the input px it does a second. Any thread may
        ask."""
        return {
            name: {"runtime": network.runtime, "pixels_per_second": round(network.pixels_per_second())}
            for name, network in self._networks.items()
            if network.is_calibrated
        }

    def decode(self, source: BinaryIO, watch: Watch) -> Picture:
        """The picture in `source`. Raises UploadRejected."""
        facts = self._decoder.inspect(source)
        watch.begins("decode", expected_seconds=facts.pixels / DECODE_PX_PER_SECOND)
        return self._decoder.decode(source, facts)

    def warm_up(self, model: str = catalog.DEFAULT_MODEL) -> None:
        """Loads a network and calibrates it, so that the first picture need not wait for that.

        Also the test that the device works at all. Raises ModelUnavailable, DeviceBroken or what torch raises.
        """
        self.network(model).warm_up()

    def enlarge_file(
        self,
        source: BinaryIO,
        target: Path,
        wanted: Wanted,
        watch: Watch | None = None,
        *onlookers: Onlooker,
    ) -> Enlarged:
        """Enlarges the picture in `source`, a seekable binary file, into `target`. Where it raises, there is no target.

        Holds the decoded input and some bands, never the whole result (lossy WebP: its YUV; other WebP and
        AVIF: libvips holds it once).
        Raises UploadRejected for a picture that cannot be taken or made, AttemptError where the device or the network
        fails, and whatever `watch` raises.
        """
        return self.opened(source, wanted, watch or Unwatched(), *onlookers).enlarge(target)

    def can_share(self, model: str, scale: int) -> bool:
        """Whether a picture can be made in parts: one network goes over it once and reaches the scale. `auto` may come
        to one that does. Raises ModelUnavailable."""
        if model == catalog.AUTO:
            return True
        passes = catalog.card(model, self._own).passes(scale)
        return len(passes) == 1 and passes[0].scale == scale

    def opened(self, source: BinaryIO, wanted: Wanted, watch: Watch, *onlookers: Onlooker) -> Making:
        """Decodes the picture in `source` and plans its bands: all that comes before the first of them.

        Raises as `enlarge_file` does.
        """
        clock = _Stopwatch()
        facts = self._decoder.inspect(source)
        width, height = check_size(
            facts,
            wanted.scale,
            wanted.format,
            max_input_px=self._max_input_px,
            max_output_px=self._max_output_px,
            lossless=wanted.lossless,
        )
        has_alpha = facts.has_alpha and wanted.alpha != "flatten"
        check_memory(
            wanted.format,
            width,
            height,
            has_alpha=has_alpha,
            lossless=wanted.lossless,
            available_bytes=available_bytes(),
        )
        watch.begins("decode", expected_seconds=facts.pixels / DECODE_PX_PER_SECOND)
        with clock.time("decode"):
            picture = self._decoder.decode(source, facts)
            format = format_named(wanted.format)
            picture, warnings = _laid_on_background(picture, wanted, format)
        model = wanted.model
        if model == catalog.AUTO:
            with clock.time("route"):
                route = routing.choose(picture.rgb)
            model = route.model
            watch.routed(model, route.reason)
        with clock.time("load"):
            network = self.ready(model, watch)
        with clock.time("plan"):
            work = upscale.plan_work(
                network,
                picture.width,
                picture.height,
                wanted.scale,
                tile_px=self._tile_px,
                memory_bytes=self._tile_memory_bytes,
            )
        warnings = (*picture.warnings, *warnings)
        return Making(
            self.device,
            network,
            self.batcher,
            picture,
            work,
            wanted,
            format,
            width,
            height,
            warnings,
            watch,
            onlookers,
            clock,
        )


class NotTrue(BadOutput):
    """The result is whole and shows another picture than the input."""


@dataclass(frozen=True)
class Making:
    """All that one result is made of. It can be made twice, and in parts."""

    device: str
    network: Network
    batcher: Batcher | None
    picture: Picture
    work: Work
    wanted: Wanted
    format: Format
    width: int
    height: int
    """Of the result, as `width`."""
    warnings: tuple[str, ...]
    watch: Watch
    onlookers: tuple[Onlooker, ...]
    clock: _Stopwatch
    descents: tuple[Descent, Descent] = field(default_factory=lambda: (Descent(), Descent()))
    """Of colours and of alpha, where the network runs in strips: a part that follows on the last goes on with them."""

    def enlarge(self, target: Path) -> Enlarged:
        """The whole result, into `target`. Raises as `Engine.enlarge_file` does."""
        try:
            labels, size_bytes, report = self._write(target, precise=not self.network.prefers_half)
        except NotTrue:
            # Half precision may have failed without overflowing. In float32 it either comes out or is refused.
            if not self.network.prefers_half:
                raise
            labels, size_bytes, report = self._write(target, precise=True)
        return self.enlarged(labels, size_bytes, report)

    def enlarged(self, labels: tuple[Label, ...] | None, size_bytes: int, report: dict[str, Any]) -> Enlarged:
        """What has become of it, once it is made."""
        self.clock.timings |= {
            "tiles": float(self.work.tile_count),
            "bands": float(self.work.band_count),
            "waste": round(self.work.waste, 3),
        }
        return Enlarged(
            self.width,
            self.height,
            size_bytes,
            labels,
            self.warnings,
            self.clock.timings,
            self.network.card.name,
            report,
        )

    @property
    def metadata(self) -> Metadata:
        """Of the result's file."""
        return metadata_for_result(self.picture.metadata, self.wanted.metadata_policy, self.width, self.height)

    def layout(self, rows_in_strip: int) -> Layout:
        """Of the result's file, where it is made in parts."""
        picture, format = self.picture, self.format
        channels, bits = _result_channels(picture, format), _result_bits(picture, format)
        return Layout(format.name, self.width, self.height, channels, bits, rows_in_strip)

    def write_part(
        self, target: Path, bands: tuple[Band, ...], *, in_strips: bool, rows_in_strip: int, precise: bool
    ) -> MadePart:
        """Some neighbouring bands of the result, as in the whole that they were planned for: the same to the last bit,
        or to one level of 255 in strips and where tiles are batched.

        `in_strips`: as that plan says. Raises as `enlarge`.
        """
        scale = self.wanted.scale
        first, last = bands[0].region, bands[-1].region
        width, height, halo_px = self.picture.width, self.picture.height, 0 if in_strips else self.network.halo_px
        longest_px = max(max(tile.keep.width, tile.keep.height) for band in bands for tile in band.tiles)
        # Not of this process's own plan: it may have other memory, another speed or another runtime.
        plan = Plan(width, height, halo_px, longest_px, bands, in_strips)
        # With a clock of its own: another part's seconds are not this one's.
        clock = _Stopwatch()
        part = replace(self, work=replace(self.work, plans=(plan,)), clock=clock)
        repairs = Repairs()
        comparison = Comparison(self.picture.rgb, scale, part.work.plans, first_row=first.y)
        shown = range(first.y * scale, last.bottom * scale)
        with _Behind(self, lambda: open_part(target, self.layout(rows_in_strip)), comparison, shown) as behind:
            self.watch.begins("upscale")
            for samples in _Enlarging(part, precise, repairs).rows():
                with clock.time("encode"):
                    behind.take(samples)
                del samples
            with clock.time("encode"):
                facts = behind.finish().close()
        clock.add("compare", behind.compare_seconds)
        return MadePart(target.stat().st_size, facts, comparison.sums(), repairs, clock.timings)

    def begin(self, rows: range | None = None) -> None:
        """Shows the picture to the onlookers, before the first of its parts or before these rows of its result."""
        for onlooker in self.onlookers:
            onlooker.begins(self.picture.rgb, self.width, self.height, rows=rows)
        # They have looked at all of it.
        self.picture.rest(0, self.picture.height)

    def labels(self) -> tuple[Label, ...] | None:
        """What the picture shows; None where that was not asked for."""
        if not self.wanted.classify:
            return None
        self.watch.begins("classify")
        with self.clock.time("classify"):
            return tuple(Classifier.load(self.device).classify(_in_8_bits(self.picture.rgb)))

    def _write(self, target: Path, *, precise: bool) -> tuple[tuple[Label, ...] | None, int, dict[str, Any]]:
        """Into `target`: (labels, bytes, report). Raises NotTrue, and then there is no target."""
        clock, width, height = self.clock, self.width, self.height
        repairs = Repairs()
        comparison = Comparison(self.picture.rgb, self.wanted.scale, self.work.plans)
        encoded_at_once_px = width * height if self.format.name in ("webp", "avif") else 0
        with _Behind(self, lambda: self._encoder(target), comparison) as behind:
            self.watch.begins("upscale")
            for samples in _Enlarging(self, precise, repairs).rows():
                with clock.time("encode"):
                    behind.take(samples)
                del samples
            labels = self.labels()
            self.watch.begins("encode", expected_seconds=encoded_at_once_px / ENCODE_AT_ONCE_PX_PER_SECOND)
            with clock.time("encode"):
                encoder = behind.finish()
            report = self.report(comparison.sums(), repairs, precise=precise, compare_seconds=behind.compare_seconds)
            with clock.time("encode"):
                size_bytes = encoder.close()
        return labels, size_bytes, report

    def report(self, sums: Sums, repairs: Repairs, *, precise: bool, compare_seconds: float) -> dict[str, Any]:
        """The body of `GET /v1/jobs/{id}/report`. Raises NotTrue."""
        fidelity = sums.fidelity()
        if not fidelity.is_sane:
            raise NotTrue(
                f"Shrunk back, the result is not the picture handed in: {fidelity.psnr_db} dB, colours "
                f"{fidelity.colour_difference} apart.",
                model=self.network.card.name,
                device=self.device,
                psnr_db=fidelity.psnr_db,
                colour_difference=fidelity.colour_difference,
            )
        return {
            **asdict(fidelity),
            "tiles": self.work.tile_count,
            **asdict(repairs),
            "precision": "float32" if precise else "float16",
            "compare_seconds": round(compare_seconds, 4),
        }

    def _encoder(self, target: Path) -> Encoder:
        return open_encoder(
            target,
            self.format.name,
            self.width,
            self.height,
            channels=_result_channels(self.picture, self.format),
            bits=_result_bits(self.picture, self.format),
            quality=self.wanted.quality,
            lossless=self.wanted.lossless,
            metadata=self.metadata,
        )


WriterT = TypeVar("WriterT", bound=Encoder | PartWriter)


class _Behind(Generic[WriterT]):
    """All that is done for a result while the network makes it: the onlookers see the picture, the file is begun, and
    finished rows are encoded, compared and shown.

    By one thread, in order, a little at a time; the network waits for none of it, not even at its start. At most
    HELD_BEHIND_BYTES wait for it, or one band where that is more: a network that is faster than the encoder waits in
    `take`. What the thread raises comes out of the next call. A context manager: leaving it by an exception drops what
    waits and leaves no file, and the thread has ended afterwards either way.
    """

    def __init__(
        self,
        making: Making,
        open_writer: Callable[[], AbstractContextManager[WriterT]],
        comparison: Comparison,
        rows: range | None = None,
    ) -> None:
        """`rows`: of the result, where it is a part of one."""
        self.compare_seconds = 0.0
        """What the comparison has taken of the thread."""
        self._making, self._open_writer, self._comparison, self._rows = making, open_writer, comparison, rows
        self._closing = ExitStack()
        self._writer: WriterT | None = None
        self._waiting: deque[Samples] = deque()
        self._held_bytes = 0
        self._turn = threading.Condition()
        self._is_last_in = self._is_given_up = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="behind", daemon=True)

    def take(self, rows: Samples) -> None:
        """The next rows; they may not be changed any more. Raises what the thread has raised."""
        with self._turn:
            self._turn.wait_for(
                lambda: self._error or not self._held_bytes or self._held_bytes + rows.nbytes <= HELD_BEHIND_BYTES
            )
            if self._error is not None:
                raise self._error
            self._waiting.append(rows)
            self._held_bytes += rows.nbytes
            self._turn.notify_all()

    def finish(self) -> WriterT:
        """All rows are in: returns the writer, to be closed, when it has them. Raises what the thread has raised."""
        with self._turn:
            self._is_last_in = True
            self._turn.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._writer is not None
        return self._writer

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._turn:
            self._is_given_up = True
            self._turn.notify_all()
        self._thread.join()
        self._closing.__exit__(kind, error, trace)

    def _run(self) -> None:
        try:
            self._making.begin(self._rows)
            self._writer = self._closing.enter_context(self._open_writer())
            while (rows := self._next()) is not None:
                self._do(self._writer, rows)
                with self._turn:
                    self._held_bytes -= rows.nbytes
                    # Before the wait for the next ones: their memory may be what the network wants for its next band.
                    del rows
                    self._turn.notify_all()
        except BaseException as error:  # noqa: BLE001 - it is raised where the rows come from
            with self._turn:
                self._error = error
                self._waiting.clear()
                self._turn.notify_all()

    def _next(self) -> Samples | None:
        """The rows that have waited longest; None when there will be none."""
        with self._turn:
            self._turn.wait_for(lambda: self._waiting or self._is_last_in or self._is_given_up)
            return None if self._is_given_up or not self._waiting else self._waiting.popleft()

    def _do(self, writer: Encoder | PartWriter, rows: Samples) -> None:
        # In pieces, of whose copies each of the three makes some; and giving up need not wait for a whole band.
        step = max(1, PIECE_BYTES * len(rows) // max(1, rows.nbytes))
        for top in range(0, len(rows), step):
            if self._is_given_up:
                return
            piece = rows[top : top + step]
            writer.write(piece)
            started = time.perf_counter()
            self._comparison.add(piece)
            self.compare_seconds += time.perf_counter() - started
            # The network is past them, but for a halo that it may read once more. All of them, each time: with a page
            # that is read the kernel maps those around it, also above.
            self._making.picture.rest(0, self._comparison.compared)
        for onlooker in self._making.onlookers:
            onlooker.made(rows)


def _laid_on_background(picture: Picture, wanted: Wanted, format: Format) -> tuple[Picture, tuple[str, ...]]:
    """The picture as it goes to the network, and what the customer is to know about it."""
    if not picture.has_alpha or (format.holds_alpha and wanted.alpha != "flatten"):
        return picture, ()
    told: tuple[str, ...] = ()
    if wanted.alpha != "flatten":
        told = (f"{format.name.upper()} holds no transparency; the picture was laid on {wanted.background}.",)
    return flatten(picture, wanted.background), told


def _result_channels(picture: Picture, format: Format) -> int:
    return (1 if picture.is_gray and format.holds_gray else 3) + picture.has_alpha


def _result_bits(picture: Picture, format: Format) -> int:
    return 16 if picture.bits == 16 and format.holds_16_bit else 8


class _Enlarging:
    """The rows of one result: colours from the network, alpha beside them, and the watch told after every tile."""

    def __init__(self, making: Making, precise: bool, repairs: Repairs) -> None:
        picture, work, network = making.picture, making.work, making.network
        self._network, self._picture, self._work = network, picture, work
        self._batcher, self._descents = making.batcher, making.descents
        self._scale, self._format = making.wanted.scale, making.format
        self._watch, self._clock = making.watch, making.clock
        self._precise, self._repairs = precise, repairs
        self._bits = _result_bits(picture, making.format)
        self._dtype: type[np.unsignedinteger[Any]] = np.uint8 if self._bits == 8 else np.uint16
        self._alpha_by_network = picture.alpha is not None and making.wanted.alpha == "model"
        # Passes of the network over the picture: colours, and alpha where it goes the same way.
        passes = 1 + self._alpha_by_network
        self._tiles_done = [0] * passes
        self._tiles_total = [work.tile_count] * passes
        self._bands_done = 0
        self._started = time.monotonic()
        self._guess_seconds = passes * work.expected_seconds(network.pixels_per_second())

    def rows(self) -> Iterator[Samples]:
        """(rows, width * scale, channels) of uint8 or uint16, from the top."""
        self._tell()
        gray = self._picture.is_gray
        # Gray is made of the network's three channels before they are rounded.
        colors = self._pass(0, self._picture.rgb, np.float32 if gray else self._dtype)
        alpha = self._alpha_rows()
        while True:
            with self._clock.time("upscale"):
                finished = next(colors, None)
                if finished is None:
                    return
                samples = finished.pixels
                if gray:
                    samples = quantize(luma(samples), self._bits)[..., None]
                    if not self._format.holds_gray:
                        samples = np.repeat(samples, 3, axis=2)
                if alpha is not None:
                    samples = np.concatenate([samples, alpha(finished)[..., None]], axis=2)
            yield samples
            self._bands_done = finished.bands_done
            # The encoder may be done with it before the network makes the next.
            del finished, samples
            self._tell()

    def _pass(self, number: int, image: NDArray[Any], dtype: type[Any]) -> Iterator[EnlargedRows]:
        def on_tile(done: int, total: int) -> None:
            self._tiles_done[number], self._tiles_total[number] = done, total
            self._tell()

        return upscale.enlarge(
            self._network,
            image,
            self._scale,
            work=self._work,
            on_tile=on_tile,
            dtype=np.dtype(dtype),
            precise=self._precise,
            repairs=self._repairs,
            descent=self._descents[number],
            batcher=self._batcher,
        )

    def _alpha_rows(self) -> Callable[[EnlargedRows], Samples] | None:
        """What gives the alpha, (rows, width * scale), that belongs to some rows of colours; None where there is none.

        By the network as a gray picture: in step with the colours, since the same plan gives the same bands.
        """
        picture = self._picture
        if not picture.has_alpha:
            return None
        if picture.alpha is None:
            level = np.array(picture.constant_alpha, picture.rgb.dtype)
            level = _in_8_bits(level) if self._bits == 8 else level
            return lambda finished: np.broadcast_to(level, finished.pixels.shape[:2])
        if self._alpha_by_network:
            # A view: a band is made three channels when it is its turn.
            gray = np.broadcast_to(picture.alpha[..., None], (*picture.alpha.shape, 3))
            opacities = self._pass(1, gray, np.float32)

            def by_network(finished: EnlargedRows) -> Samples:
                opacity = next(opacities)
                assert opacity.y_px == finished.y_px
                return quantize(luma(opacity.pixels), self._bits)

            return by_network
        unit = np.divide(picture.alpha, np.iinfo(picture.alpha.dtype).max, dtype=np.float32)
        plane = Image.fromarray(unit)

        def by_lanczos(finished: EnlargedRows) -> Samples:
            rows, columns = finished.pixels.shape[:2]
            # Filters see past the box: its rows are those of the whole plane resized at once.
            box = (0, finished.y_px / self._scale, picture.width, (finished.y_px + rows) / self._scale)
            return quantize(np.asarray(plane.resize((columns, rows), Image.Resampling.LANCZOS, box=box)), self._bits)

        return by_lanczos

    def _tell(self) -> None:
        done, total = sum(self._tiles_done), sum(self._tiles_total)
        so_far = time.monotonic() - self._started
        left = so_far / done * (total - done) if done else self._guess_seconds
        self._watch.progressed(Progress(done, total, self._bands_done, self._work.band_count, left))


def _in_8_bits(samples: Samples) -> Samples:
    return samples if samples.dtype == np.uint8 else ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)
