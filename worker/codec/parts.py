"""Parts of a picture file: encoded apart, by different workers, and joined without being decoded.

A part is a piece of the finished file as it will lie in it, so that joining is a matter of what comes before the first
part and behind the last.

PNG: a part is whole IDAT chunks. Its deflate stream (RFC 1951) ends at a byte and not with a final block, and its first
row is filtered without the row above, so that no part refers to another. In front come the signature, all chunks of
metadata and zlib's header (RFC 1950); behind, an empty final block and the checksum of all rows, which follows from
those of the parts. TIFF: a part is strips, each a zlib stream of its own; behind the last comes the directory that
says where each begins.

What is around the pixels is taken from a file of one px that `worker.codec.encode` writes: a joined file says what
an ordinary one does.
"""

from __future__ import annotations

import itertools
import math
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from worker.codec import Samples
from worker.codec.encode import MOST_STRIP_BYTES, PNG_SIGNATURE, needs_bigtiff, open_encoder, png_chunk
from worker.codec.metadata import Metadata, exif_of_size

FORMATS = ("png", "tiff")
"""Those that can be joined. JPEG, WebP and AVIF carry state, or the whole picture, from the first px to the last."""

IDAT_BYTES = 1 << 20

_WIDTH, _HEIGHT, _STRIP_OFFSETS, _ROWS_IN_STRIP, _STRIP_BYTE_COUNTS = 256, 257, 273, 278, 279
_LONG, _LONG8 = 4, 16
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 16: 8}
"""Bytes of one value of a type that libvips writes (TIFF 6.0, section 2; 16 is BigTIFF's)."""

_ADLER_BASE = 65521
_PNG_COMPRESSION, _TIFF_COMPRESSION = 3, 6
"""As `worker.codec.encode` has libvips compress them."""


@dataclass(frozen=True)
class Layout:
    """What all parts of one file have in common. `rows_in_strip` divides the rows of every part but the last; it is
    TIFF's."""

    format: str
    width: int
    height: int
    channels: int
    bits: int
    rows_in_strip: int


def rows_in_strip(rows: Sequence[int], row_bytes: int) -> int:
    """The most rows, of about a megabyte, that divide each of `rows`: those of the parts, of the last but one at most.

    At least 1: TIFF wants all strips of one height, but for the last.
    """
    common = math.gcd(*rows)
    most = max(1, MOST_STRIP_BYTES // row_bytes)
    return max(divisor for divisor in range(1, min(common, most) + 1) if common % divisor == 0)


class PartWriter(Protocol):
    """Takes the rows of one part from the top, (h, width, channels) uint8 or uint16."""

    def write(self, rows: Samples) -> None: ...

    def close(self) -> dict[str, Any]:
        """The part is complete: its facts, JSON values for `joined`."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_part(path: Path, layout: Layout) -> PartWriter:
    """A writer of one part. A context manager: leaving it closes the file, whole or not."""
    return _PngPart(path, layout) if layout.format == "png" else _TiffPart(path, layout)


def front(layout: Layout, metadata: Metadata) -> bytes | None:
    """What is to stand before the first part, where that is known before the last is made: of a PNG."""
    return _around_png(layout, (), _template(layout, metadata))[0] if layout.format == "png" else None


def joined(layout: Layout, parts: Sequence[Mapping[str, Any]], metadata: Metadata) -> tuple[bytes, bytes]:
    """What is to stand before the first part and behind the last. `parts`: the facts of each, from the top."""
    template = _template(layout, metadata)
    return (_around_png if layout.format == "png" else _around_tiff)(layout, parts, template)


class _Part:
    def __init__(self, path: Path, layout: Layout) -> None:
        self._file = path.open("wb")
        self._layout = layout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class _PngPart(_Part):
    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(path, layout)
        self._deflate = zlib.compressobj(_PNG_COMPRESSION, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_FILTERED)
        self._packed = bytearray()
        self._above: Samples | None = None
        self._adler = 1
        self._bytes = 0

    def write(self, rows: Samples) -> None:
        # Samples of 16 bits have their high byte first.
        given = rows.astype(rows.dtype.newbyteorder(">"), order="C", copy=False).reshape(len(rows), -1).view(np.uint8)
        filtered = np.empty((len(rows), 1 + given.shape[1]), np.uint8)
        filtered[:, 0] = 2
        np.subtract(given[1:], given[:-1], out=filtered[1:, 1:])
        if self._above is not None:
            np.subtract(given[0], self._above, out=filtered[0, 1:])
        else:
            # Nothing is known of the row above, which is another part's: the px to the left must do.
            step = self._layout.channels * self._layout.bits // 8
            filtered[0, 0] = 1
            filtered[0, 1:] = given[0]
            filtered[0, 1 + step :] -= given[0, :-step]
        self._above = given[-1].copy()
        self._adler = zlib.adler32(filtered.data, self._adler)
        self._bytes += filtered.size
        self._packed += self._deflate.compress(filtered.data)
        while len(self._packed) >= IDAT_BYTES:
            self._chunk(IDAT_BYTES)

    def close(self) -> dict[str, Any]:
        # To the next byte, and not the end of the stream.
        self._packed += self._deflate.flush(zlib.Z_FULL_FLUSH)
        while self._packed:
            self._chunk(IDAT_BYTES)
        self._file.close()
        return {"adler": self._adler, "raw_bytes": self._bytes}

    def _chunk(self, most_bytes: int) -> None:
        self._file.write(png_chunk(b"IDAT", bytes(self._packed[:most_bytes])))
        del self._packed[:most_bytes]


class _TiffPart(_Part):
    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(path, layout)
        self._waiting: list[Samples] = []
        self._rows_waiting = 0
        self._strips: list[int] = []

    def write(self, rows: Samples) -> None:
        self._waiting.append(rows)
        self._rows_waiting += len(rows)
        if self._rows_waiting < self._layout.rows_in_strip:
            return
        held = np.concatenate(self._waiting)
        whole = len(held) // self._layout.rows_in_strip * self._layout.rows_in_strip
        for top in range(0, whole, self._layout.rows_in_strip):
            self._strip(held[top : top + self._layout.rows_in_strip])
        self._waiting, self._rows_waiting = [held[whole:].copy()], len(held) - whole

    def close(self) -> dict[str, Any]:
        if self._rows_waiting:
            self._strip(np.concatenate(self._waiting))
        self._file.close()
        return {"strips": self._strips}

    def _strip(self, rows: Samples) -> None:
        # TIFF 6.0, section 14: each sample less the same of the px to its left, modulo its range.
        apart = rows.astype(rows.dtype.newbyteorder("<"), order="C")
        apart[:, 1:] -= rows[:, :-1]
        packed = zlib.compress(apart.data, _TIFF_COMPRESSION)
        self._strips.append(len(packed))
        self._file.write(packed)


def adler32_of_both(first: int, second: int, second_bytes: int) -> int:
    """The Adler-32 (RFC 1950) of some bytes and then others, from that of each.

    Its low half is 1 and the sum of all bytes; its high half the sum of all low halves there were, one for each byte.
    So behind the first bytes every low half of the second has their sum added.
    """
    low, high = first & 0xFFFF, first >> 16
    low_second, high_second = second & 0xFFFF, second >> 16
    # Each began at 1, which is to be counted once.
    low_both = (low + low_second - 1) % _ADLER_BASE
    high_both = (high + high_second + second_bytes * (low - 1)) % _ADLER_BASE
    return high_both << 16 | low_both


def _template(layout: Layout, metadata: Metadata) -> bytes:
    """A file of one px in the same format, with the metadata of the whole."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "px"
        dtype = np.uint8 if layout.bits == 8 else np.uint16
        with open_encoder(
            path, layout.format, 1, 1, channels=layout.channels, bits=layout.bits, metadata=metadata
        ) as encoder:
            encoder.write(np.zeros((1, 1, layout.channels), dtype))
        return path.read_bytes()


def _around_png(layout: Layout, parts: Sequence[Mapping[str, Any]], template: bytes) -> tuple[bytes, bytes]:
    front, back = bytearray(PNG_SIGNATURE), bytearray()
    has_pixels = False
    position = len(PNG_SIGNATURE)
    while position < len(template):
        length = 12 + int.from_bytes(template[position : position + 4], "big")
        chunk = template[position : position + length]
        position += length
        match chunk[4:8]:
            case b"IHDR":
                front += png_chunk(b"IHDR", struct.pack(">II", layout.width, layout.height) + chunk[16:-4])
            case b"IDAT":
                has_pixels = True
            case b"eXIf":
                front += png_chunk(b"eXIf", exif_of_size(chunk[8:-4], layout.width, layout.height))
            case _:
                (back if has_pixels else front).extend(chunk)
    adler = 1
    for part in parts:
        adler = adler32_of_both(adler, part["adler"], part["raw_bytes"])
    # Deflate with a window of 32 kB, checked modulo 31.
    front += png_chunk(b"IDAT", b"\x78\x5e")
    # An empty block of fixed codes that is marked as the last.
    return bytes(front), png_chunk(b"IDAT", b"\x03\x00" + struct.pack(">I", adler)) + bytes(back)


def _around_tiff(layout: Layout, parts: Sequence[Mapping[str, Any]], template: bytes) -> tuple[bytes, bytes]:
    is_big = needs_bigtiff(layout.width * layout.height * layout.channels * layout.bits // 8)
    offset_code, offset_type = ("Q", _LONG8) if is_big else ("I", _LONG)
    offset_bytes = struct.calcsize(offset_code)
    header_bytes = 2 * offset_bytes
    sizes = [size for part in parts for size in part["strips"]]
    starts = list(itertools.accumulate(sizes, initial=header_bytes))
    end = starts.pop()
    fields = _fields(template) | {
        _WIDTH: (_LONG, struct.pack("<I", layout.width)),
        _HEIGHT: (_LONG, struct.pack("<I", layout.height)),
        _ROWS_IN_STRIP: (_LONG, struct.pack("<I", layout.rows_in_strip)),
        _STRIP_OFFSETS: (offset_type, struct.pack(f"<{len(starts)}{offset_code}", *starts)),
        _STRIP_BYTE_COUNTS: (_LONG, struct.pack(f"<{len(sizes)}I", *sizes)),
    }
    # Directories and values begin at even offsets, in BigTIFF at multiples of eight.
    padding = b"\0" * (-end % 8)
    directory = end + len(padding)
    count = struct.pack("<Q" if is_big else "<H", len(fields))
    beside = directory + len(count) + len(fields) * (4 + 2 * offset_bytes) + offset_bytes
    entries, values = b"", b""
    for tag, (kind, value) in sorted(fields.items()):
        if len(value) <= offset_bytes:
            held = value.ljust(offset_bytes, b"\0")
        else:
            values += b"\0" * (-(beside + len(values)) % 8)
            held = struct.pack(f"<{offset_code}", beside + len(values))
            values += value
        entries += struct.pack(f"<HH{offset_code}", tag, kind, len(value) // _SIZES[kind]) + held
    first = b"II+\0\x08\0\0\0" if is_big else b"II*\0"
    # Behind the entries 0: there is no other directory.
    tail = padding + count + entries + b"\0" * offset_bytes + values
    return first + struct.pack(f"<{offset_code}", directory), tail


def _fields(tiff: bytes) -> dict[int, tuple[int, bytes]]:
    """Tag -> type and value, as bytes, of the first directory of a little-endian TIFF."""
    assert tiff[:4] == b"II*\0", "libvips writes in the machine's order, and samples are written in this one"
    (directory,) = struct.unpack_from("<I", tiff, 4)
    (count,) = struct.unpack_from("<H", tiff, directory)
    fields = {}
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, kind, length = struct.unpack_from("<HHI", tiff, entry)
        size = length * _SIZES[kind]
        start = entry + 8 if size <= 4 else struct.unpack_from("<I", tiff, entry + 8)[0]
        fields[tag] = (kind, tiff[start : start + size])
    return fields
