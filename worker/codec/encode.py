"""Pictures out: rows become a file band by band, in memory for a few of them wherever the format allows."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import pyvips

from shared.errors import DiskFull, FormatCannotHoldDetail, InternalError, OutOfMemory
from shared.pictures import format_named
from worker.codec import Samples, webp
from worker.codec.color import result_profile
from worker.codec.metadata import Metadata, exif_of_size, xmp_of_exif


def open_encoder(
    path: Path,
    format: str,
    width: int,
    height: int,
    *,
    channels: int,
    bits: int = 8,
    quality: int = 95,
    lossless: bool = False,
    metadata: Metadata | None = None,
) -> Encoder:
    """An Encoder that writes a `width` x `height` px picture to `path`, to be fed rows from the top.

    `channels`: 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA, all straight alpha and sRGB. `quality`: 1 to 100, where the
    format is lossy; `lossless` where it can be. Raises ValueError for what the format cannot hold: settle that before,
    with `shared.pictures`.
    """
    return Encoder(path, format, width, height, channels, bits, quality, lossless, metadata or Metadata())


def check_memory(
    format: str, width: int, height: int, *, has_alpha: bool, lossless: bool, available_bytes: int
) -> None:
    """Raises OutOfMemory, lest the process be killed, where an Encoder would hold more than there is: libwebp and
    libaom take the whole picture. All else is written row by row.

    Bytes a pixel as measured of made photographs of 16 to 268 megapixels; of lossy WebP without transparency that is
    2.0 at quality 95 and up to 2.6 at 100. Noise takes up to 4.8 there, and 36 as transparency; no picture has that.
    """
    match format:
        case "webp":
            is_fed = is_fed_to_libwebp(format, has_alpha=has_alpha, lossless=lossless)
            per_px = 17.0 if lossless else 14.0 if has_alpha else 2.6 if is_fed else 5.9
        case "avif":
            per_px = 35.0
        case _:
            return
    needed_bytes = int(per_px * width * height)
    if needed_bytes > available_bytes:
        raise OutOfMemory(
            f"A result of {width} x {height} px takes {needed_bytes / 1e9:.1f} GB of memory while it is encoded as "
            f"{format.upper()}; the worker has {available_bytes / 1e9:.1f} left. PNG, JPEG and TIFF need not be held.",
            format=format,
            needed_bytes=needed_bytes,
            available_bytes=available_bytes,
        )


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
WRITTEN_IN_ORDER = frozenset({"png", "jpeg"})
"""Formats whose file grows at its end and nowhere else; TIFF patches its header, WebP and AVIF come all at once."""


def partial_path(path: Path) -> Path:
    """Where the file for `path` grows until it is complete."""
    return path.with_name(f"{path.name}.part")


MOST_STRIP_BYTES = 2**20
"""Of TIFF, before it is compressed."""
LIBVIPS_ROWS = 16
"""Of what it computes at a time: a row of JPEG's blocks where colours are halved. 8 take half of the memory, and up to
12 % more time for a pyramid."""


class Encoder:
    """Writes one picture file band by band. A context manager: leaving it by an exception leaves no file.

    Memory is bounded by a few rows for PNG, JPEG and TIFF. WebP and AVIF look at the whole picture at once: lossy WebP
    without transparency at its YUV, which is filled as rows come (`worker.codec.webp`), and of all else of theirs
    libvips holds the rows, once (at most 268 megapixels by their limits). The file appears under its name when it is
    complete.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        width: int,
        height: int,
        channels: int,
        bits: int,
        quality: int,
        lossless: bool,
        metadata: Metadata,
    ) -> None:
        holds = format_named(format)
        if not holds.written:
            raise ValueError(f"{format} is not written")
        if width < 1 or height < 1 or max(width, height) > holds.largest_side_px:
            raise ValueError(f"{format} holds 1 to {holds.largest_side_px} px a side, not {width} x {height}")
        if channels not in (1, 2, 3, 4) or (channels in (2, 4) and not holds.holds_alpha):
            raise ValueError(f"{format} does not hold {channels} channels")
        if bits not in (8, 16) or (bits == 16 and not holds.holds_16_bit):
            raise ValueError(f"{format} does not hold {bits} bits per sample")
        if lossless and holds.lossless == "never":
            raise ValueError(f"{format} is never lossless")
        self.path = path
        self.format = format
        self._width, self._height, self._channels = width, height, channels
        self._dtype: np.dtype[Any] = np.dtype(np.uint8 if bits == 8 else np.uint16)
        self._rows_written = 0
        self._partial = partial_path(path)
        self._is_open = True
        with self._failures():
            self._sink: _Sink
            if is_fed_to_libwebp(format, has_alpha=channels in (2, 4), lossless=lossless):
                beside = _webp_chunks(width, height, metadata)
                self._sink = webp.Sink(self._partial, width, height, quality=quality, chunks=beside)
            else:
                options = save_options(format, quality, lossless, width * channels * (bits // 8), height)
                self._sink = _Pipe(self._partial, format, width, height, channels, bits, options, metadata)

    def write(self, rows: Samples) -> None:
        """Take the next rows: (h, width, channels), or (h, width) for one channel; uint8 or uint16 as `bits` says.

        Blocks while the encoder is busy. Raises ValueError for rows that do not fit, InternalError where encoding
        has failed and DiskFull where there was no room; the picture is lost then.
        """
        if rows.ndim == 2:
            rows = rows[..., None]
        if rows.shape[1:] != (self._width, self._channels) or rows.dtype != self._dtype:
            raise ValueError(
                f"rows are {rows.shape} {rows.dtype}, not (h, {self._width}, {self._channels}) {self._dtype}"
            )
        if self._rows_written + len(rows) > self._height:
            raise ValueError(f"{self._rows_written + len(rows)} rows are more than the picture's {self._height}")
        if not self._is_open:
            raise ValueError("the encoder is closed")
        self._rows_written += len(rows)
        with self._failures():
            self._sink.take(rows)

    def close(self) -> int:
        """Finish the file and return its size in bytes. Raises ValueError where rows are missing, DiskFull where
        there was no room for it, FormatCannotHoldDetail, InternalError where encoding has failed; there is no file
        then."""
        if self._rows_written != self._height:
            self.abort()
            raise ValueError(f"{self._rows_written} of {self._height} rows were written")
        self._is_open = False
        try:
            with self._failures():
                self._sink.finish()
        except BaseException:
            self._partial.unlink(missing_ok=True)
            raise
        self._partial.replace(self.path)
        return self.path.stat().st_size

    def abort(self) -> None:
        """Give up: no file remains, nor a thread. Harmless where already closed."""
        if self._is_open:
            self._is_open = False
            self._sink.drop()
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif self._is_open:
            self.close()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """What libraries and the system raise becomes an error of ours."""
        try:
            yield
        except webp.TooDetailed as error:
            raise FormatCannotHoldDetail(self.format, self._width, self._height) from error
        except (pyvips.Error, webp.EncodingFailed, OSError) as error:
            # libvips says in words what the system has told it.
            if any(os.strerror(number) in str(error) for number in DiskFull.ERRNOS):
                raise DiskFull from error
            raise InternalError(
                f"The result could not be encoded as {self.format.upper()}.", format=self.format
            ) from error


class _Sink(Protocol):
    """Where the rows of an Encoder go. They fit and none is missing; that is the Encoder's to see to.

    All but `drop` raise pyvips.Error, webp.EncodingFailed and OSError.
    """

    def take(self, rows: Samples) -> None:
        """The next rows, (h, width, channels)."""

    def finish(self) -> None:
        """All of them are in: write what is left of the file. Nothing is held afterwards, also where it fails."""

    def drop(self) -> None:
        """There will be no more: let go of everything. What is written of the file is somebody else's to remove."""


class _Pipe:
    """A Sink that feeds libvips: rows go through a pipe, as an uncompressed PNG stream, to a thread of its own, which
    encodes what it has while the next band is made and reads no faster than it encodes.

    An uncompressed PNG because it is the one stream every kind of our rows fits in and libvips reads from a pipe; it
    costs a checksum.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        width: int,
        height: int,
        channels: int,
        bits: int,
        options: tuple[str, dict[str, Any]],
        metadata: Metadata,
    ) -> None:
        """`path` is written to as rows come. `options`: libvips' operation and its settings."""
        self._path, self._format, self._is_gray = path, format, channels <= 2
        self._error: pyvips.Error | OSError | None = None
        self._is_saved = False
        self._stored = zlib.compressobj(level=0)
        hold_few_rows()
        read_end, self._write_end = os.pipe()
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            # 64 kB, the default, is less than one row of a large picture: fewer, longer turns between the threads.
            fcntl.fcntl(self._write_end, fcntl.F_SETPIPE_SZ, 2**20)
        # A daemon: an Encoder that was neither closed nor aborted must not keep the process from ending.
        self._thread = threading.Thread(
            target=self._save, args=(read_end, options, metadata), name=f"encode-{format}", daemon=True
        )
        self._thread.start()
        kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
        # The pipe is empty and takes it, whatever has become of the thread.
        os.write(
            self._write_end,
            PNG_SIGNATURE + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)),
        )

    def take(self, rows: Samples) -> None:
        row_bytes = rows[:1].nbytes
        # Pieces of about a megabyte, so that a tall band is not held a second and third time.
        step = max(1, 2**20 // max(1, row_bytes))
        for top in range(0, len(rows), step):
            piece = rows[top : top + step]
            # PNG: samples of 16 bits have their high byte first, and each row starts with its filter, 0 for none.
            stored = np.zeros((len(piece), 1 + row_bytes), np.uint8)
            big_endian = piece.astype(piece.dtype.newbyteorder(">"), order="C", copy=False)
            stored[:, 1:] = big_endian.reshape(len(piece), -1).view(np.uint8)
            self._send(png_chunk(b"IDAT", self._stored.compress(stored.data)))

    def finish(self) -> None:
        try:
            self._send(png_chunk(b"IDAT", self._stored.flush()), png_chunk(b"IEND", b""))
        finally:
            self.drop()
        if not self._is_saved:
            raise self._error or pyvips.Error("the thread has ended before its time")

    def drop(self) -> None:
        # The thread sees the end of the stream, and ends soon after, whatever it was doing.
        os.close(self._write_end)
        self._thread.join()

    def _send(self, *parts: bytes) -> None:
        for part in parts:
            left = memoryview(part)
            while left:
                if self._error is not None:
                    raise self._error
                left = left[os.write(self._write_end, left) :]

    def _save(self, read_end: int, options: tuple[str, dict[str, Any]], metadata: Metadata) -> None:
        """On the thread: pull the picture out of the pipe and into the file."""
        operation, arguments = options
        try:
            source = pyvips.Source.new_from_descriptor(read_end)
            # Fails on a stream cut short, where it would else go on encoding blank rows of an aborted picture.
            image = pyvips.Operation.call(
                "pngload_source", source, access="sequential", fail_on="truncated", unlimited=True
            )
            image, keep = tagged(image, self._format, self._is_gray, metadata)
            target = pyvips.Target.new_to_file(str(self._path))
            pyvips.Operation.call(operation, image, target, keep=keep, **arguments)
            self._is_saved = True
        except (pyvips.Error, OSError) as error:
            self._error = error
        finally:
            # Where saving failed, rows still come until the writer looks: take them, or it would wait for ever.
            while os.read(read_end, 2**16):
                pass
            os.close(read_end)


def is_fed_to_libwebp(format: str, *, has_alpha: bool, lossless: bool) -> bool:
    """Whether a picture's rows go to libwebp as they come, and not to libvips, which would hold them."""
    return format == "webp" and not has_alpha and not lossless and webp.is_available()


def _webp_chunks(width: int, height: int, metadata: Metadata) -> dict[bytes, bytes]:
    """What libvips writes beside the pixels of a WebP, by the names of its chunks: from a file of one px."""
    px, keep = tagged(pyvips.Image.black(1, 1, bands=3).copy(interpretation="srgb"), "webp", False, metadata)
    found = dict(webp.chunks(px.webpsave_buffer(keep=keep)))
    beside: dict[bytes, bytes] = {name: found[name] for name in (b"ICCP", b"EXIF", b"XMP ") if name in found}
    if b"EXIF" in beside:
        prefix, exif = beside[b"EXIF"][:6], beside[b"EXIF"][6:]
        beside[b"EXIF"] = prefix + exif_of_size(exif, width, height)
    return beside


@functools.cache
def hold_few_rows() -> None:
    """Once in a process: libvips holds some dozens of the rows that it writes, and not 800.

    It computes in pieces 128 rows high, and holds two times two of them and some that were read ahead. To have them
    lower it wants to be told by options of a command line, which it parses for programs that have one
    (`vips_add_option_entries`; pyvips has no other way). Of a picture 32,000 px wide that is 17 MB in
    place of 81, in the same time.
    """
    try:
        # Where pyvips is not compiled there is none.
        import _libvips

        # Linked to libvips: what is asked of it is looked for there, and in GLib.
        library = ctypes.CDLL(_libvips.__file__)
        parse = library.g_option_context_parse
        context, group = library.g_option_context_new, library.g_option_group_new
        add_entries, set_group = library.vips_add_option_entries, library.g_option_context_set_main_group
    except (ImportError, OSError, AttributeError):
        # libvips built in another way. Wide pictures take more memory, and that is all.
        return
    context.restype = group.restype = ctypes.c_void_p
    options, entries = ctypes.c_void_p(context(None)), ctypes.c_void_p(group(b"vips", b"", b"", None, None))
    add_entries(entries)
    set_group(options, entries)
    words = (b"", f"--vips-tile-height={LIBVIPS_ROWS}".encode(), f"--vips-fatstrip-height={LIBVIPS_ROWS // 2}".encode())
    line = ctypes.cast((ctypes.c_char_p * 4)(*words), ctypes.POINTER(ctypes.c_char_p))
    parse(options, ctypes.byref(ctypes.c_int(len(words))), ctypes.byref(line), None)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """PNG (third edition), section 5.3: length, kind, data and their CRC."""
    return b"".join((struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))))


def needs_bigtiff(raw_bytes: int) -> bool:
    """Offsets of a plain TIFF reach 4 GiB; what deflate cannot shrink may grow a little."""
    return raw_bytes > 3_900_000_000


def save_options(format: str, quality: int, lossless: bool, row_bytes: int, height: int) -> tuple[str, dict[str, Any]]:
    """libvips' operation and its settings. Measured on a photograph of 4 megapixels, two cores."""
    match format:
        case "png":
            # 0.12 s and 4.40 MB; level 6 with all filters: 0.39 s and 4.26 MB.
            return "pngsave_target", {"compression": 3, "filter": "up"}
        case "jpeg":
            # Neither progressive nor with optimized tables: both would hold the whole picture. 4:4:4 from 90 on.
            return "jpegsave_target", {"Q": quality}
        case "webp" if lossless:
            # 0.96 s and 3.4 MB; effort 4: 3.1 s and 3.0 MB. `exact` keeps colours under transparency.
            return "webpsave_target", {"lossless": True, "exact": True, "effort": 0}
        case "webp":
            return "webpsave_target", {"Q": quality, "effort": webp.EFFORT}
        case "tiff":
            return "tiffsave_target", {
                "compression": "deflate",
                "predictor": "horizontal",
                "bigtiff": needs_bigtiff(row_bytes * height),
                # Rows in a strip, of which libvips and libtiff hold several. 128 is what libvips takes of any width.
                "tile_height": max(1, min(128, MOST_STRIP_BYTES // row_bytes)),
            }
        case "avif":
            # 0.46 s and 1.24 MB; effort 2: 1.5 s and 1.21 MB; effort 4: 30 s.
            return "heifsave_target", {
                "Q": quality,
                "lossless": lossless,
                "compression": "av1",
                "effort": 0,
                "bitdepth": 8,
            }
    raise AssertionError(f"no way to save {format}")


def tagged(image: pyvips.Image, format: str, is_gray: bool, metadata: Metadata) -> tuple[pyvips.Image, str]:
    """The picture with its profile, metadata and resolution set, and which of them are to be written.

    Where an EXIF block is to be written libvips makes one up if need be; for JPEG that is the only place it has for
    the resolution.
    """
    exif, xmp = metadata.exif, metadata.xmp
    px_per_mm = metadata.dpi / 25.4
    image = image.copy(xres=px_per_mm, yres=px_per_mm)
    holds_gray = format_named(format).holds_gray
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", result_profile(is_gray=is_gray and holds_gray))
    if format == "tiff" and exif is not None:
        xmp = xmp or xmp_of_exif(exif)
        exif = None
    keep = {"icc"} | ({"exif"} if format == "jpeg" else set())
    if exif is not None:
        image.set_type(pyvips.GValue.blob_type, "exif-data", b"Exif\0\0" + exif)
        keep.add("exif")
    if xmp is not None:
        image.set_type(pyvips.GValue.blob_type, "xmp-data", xmp)
        keep.add("xmp")
    return image, ":".join(sorted(keep))
