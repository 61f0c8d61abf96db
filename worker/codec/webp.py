"""Lossy WebP without transparency, written from bands: libwebp's YUV is filled as rows come, and no RGB is held.

VP8 (RFC 6386) cannot begin before the picture's end, since its encoder looks at all of it before it writes a block. But
what it looks at is YUV, 1.5 bytes a px; libvips holds the picture as RGB beside that. Here two rows and two rows are
converted by libwebp's own function, a strip at a time, so that the file is the one that libvips writes, to the last bit
(`tests/worker/codec/test_webp.py`).

libwebp is that of the package `webp`, which has its functions and, of its picture, only the fields that it needs
itself. The planes are found by libwebp's public header; where the two disagree we have no libwebp (`is_available`).
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

EFFORT = 2
"""libwebp's `method`, 0 to 6, and libvips' `effort`. Up to 2 the encoder keeps no list of what it is going to write."""
STRIP_BYTES = 2**20
"""Of rows that are converted at a time."""
_RIFF_BYTES = 12
_ICC, _EXIF, _XMP = 0x20, 0x08, 0x04
_OUT_OF_MEMORY, _TOO_DETAILED = (1, 2), 6
"""VP8_ENC_ERROR_OUT_OF_MEMORY and VP8_ENC_ERROR_BITSTREAM_OUT_OF_MEMORY; VP8_ENC_ERROR_PARTITION0_OVERFLOW."""
_WAYS: tuple[dict[str, int], ...] = (
    {},
    {"method": 3, "partition_limit": 100, "segments": 1, "low_memory": 1},
    {"segments": 1},
)
"""What is tried, one after the other, where VP8's first partition does not hold how each block of 16 x 16 px is
predicted: it has 512 kB (RFC 6386, section 9.1), 4 bits a block at WebP's limit. libvips' settings, the first, came to
3.4 to 6.7 bits; the second, which predict no 4 x 4 px apart, to 3.4 to 4.8 in files of the same size. The third are for
the largest: what they take for 4 x 4 px is less the larger the picture is, and their files are a third larger."""


class EncodingFailed(Exception):
    """libwebp gave up, by a number of its own (`WebPEncodingError` in its header)."""


class TooDetailed(EncodingFailed):
    """How the picture's blocks are predicted does not fit where VP8 has it; another try would come to the same."""


class Sink:
    """Takes all rows of one picture, from the top, and then writes its file. Not checked: whoever feeds it counts.

    Takes 1.5 bytes a px from the start, of which the system gives a page when it is filled, and while it encodes about
    the size of the file beside it. Raises MemoryError where libwebp gets no memory.
    """

    def __init__(self, path: Path, width: int, height: int, *, quality: int, chunks: Mapping[bytes, bytes]) -> None:
        """`chunks`: what is written beside the pixels, by name: ICCP, EXIF, `XMP `."""
        loaded = _libwebp()
        assert loaded is not None
        self._ffi, self._lib = loaded
        self._path, self._width, self._height, self._quality, self._chunks = path, width, height, quality, chunks
        self._picture = self._a_picture(height)
        if not self._lib.WebPPictureAlloc(self._picture):
            raise MemoryError
        self._planes = _planes(self._ffi, self._picture)
        # Chroma is of two rows: an even number of them, and only the last strip may have an odd one.
        rows = max(2, min(STRIP_BYTES // (3 * width), height + 1) // 2 * 2)
        self._strip = np.empty((rows, width, 3), np.uint8)
        self._rows_in_strip = self._rows_converted = 0
        self._error: BaseException | None = None

    def take(self, rows: npt.NDArray[Any]) -> None:
        """(h, width, 1 | 3) uint8, as they come."""
        while len(rows):
            fit, rows = np.split(rows, [len(self._strip) - self._rows_in_strip])
            # Gray is the same three times.
            self._strip[self._rows_in_strip : self._rows_in_strip + len(fit)] = fit
            self._rows_in_strip += len(fit)
            if self._rows_in_strip == len(self._strip):
                self._convert()

    def finish(self) -> None:
        """Write the file. Raises OSError and EncodingFailed; Python goes on meanwhile in other threads."""
        try:
            self._convert()
            with self._path.open("wb") as file:
                flags = sum(
                    flag for name, flag in ((b"ICCP", _ICC), (b"EXIF", _EXIF), (b"XMP ", _XMP)) if name in self._chunks
                )
                sides = (self._width - 1).to_bytes(3, "little") + (self._height - 1).to_bytes(3, "little")
                file.write(b"RIFF\0\0\0\0WEBP" + _chunk(b"VP8X", struct.pack("<I", flags) + sides))
                # RFC 9649, section 2.7: the profile comes before the pixels, all else behind.
                self._write_chunks(file, b"ICCP")
                self._encode(file)
                self._write_chunks(file, b"EXIF", b"XMP ")
                size = file.tell()
                file.seek(4)
                file.write(struct.pack("<I", size - 8))
        finally:
            self.drop()

    def drop(self) -> None:
        """Let go of the memory. Harmless where it has gone."""
        self._planes = ()
        self._lib.WebPPictureFree(self._picture)

    def _a_picture(self, height: int) -> Any:
        picture = self._ffi.gc(self._ffi.new("WebPPicture *"), self._lib.WebPPictureFree)
        if not self._lib.WebPPictureInit(picture):
            raise EncodingFailed("libwebp is of another kind than its package says")
        picture.use_argb, picture.width, picture.height = 0, self._width, height
        return picture

    def _convert(self) -> None:
        """The rows of the strip, into the picture."""
        rows = self._rows_in_strip
        if not rows:
            return
        strip = self._a_picture(rows)
        samples = self._ffi.from_buffer("uint8_t[]", self._strip)
        if not self._lib.WebPPictureImportRGB(strip, samples, 3 * self._width):
            raise MemoryError
        for into, converted, rows_each in zip(self._planes, _planes(self._ffi, strip), (1, 2, 2), strict=True):
            top = self._rows_converted // rows_each
            into[top : top + len(converted)] = converted
        self._lib.WebPPictureFree(strip)
        self._rows_converted += rows
        self._rows_in_strip = 0

    def _encode(self, file: BinaryIO) -> None:
        """The chunk `VP8 `, with its header."""
        start = file.tell()
        for settings in _WAYS:
            # libwebp finds out when it has written its headers.
            file.seek(start)
            file.truncate()
            error = self._tried(file, settings)
            if error != _TOO_DETAILED:
                break
        if error == _TOO_DETAILED:
            raise TooDetailed
        if error in _OUT_OF_MEMORY:
            raise MemoryError
        if error:
            raise EncodingFailed(f"libwebp's error {error}")

    def _tried(self, file: BinaryIO, settings: Mapping[str, int]) -> int:
        """libwebp's error, or 0. Raises what writing has raised."""
        ffi, lib = self._ffi, self._lib
        config = ffi.new("WebPConfig *")
        lib.WebPConfigPreset(config, lib.WEBP_PRESET_DEFAULT, self._quality)
        seen = _seen(_Config, ffi, config)
        for name, value in {"method": EFFORT, **settings}.items():
            setattr(seen, name, value)
        skipped_bytes = 0

        def put(data: Any, size: int, _picture: Any) -> int:
            nonlocal skipped_bytes
            # A file of libwebp's own, which begins as ours has.
            skipped = min(_RIFF_BYTES - skipped_bytes, size)
            skipped_bytes += skipped
            file.write(memoryview(ffi.buffer(data, size))[skipped:])
            return 1

        def goes_on(_percent: int, _picture: Any) -> int:
            # Ctrl-C is raised in here, where it would else wait for the end.
            return 1

        # What they raise is kept, and 0 tells libwebp to give up.
        kept = {"error": 0, "onerror": self._keep}
        writer = ffi.callback("int(uint8_t *, size_t, WebPPicture *)", put, **kept)
        progress = ffi.callback("int(int, WebPPicture *)", goes_on, **kept)
        picture = _seen(_Picture, ffi, self._picture)
        self._picture.writer = writer
        picture.progress_hook = int(ffi.cast("uintptr_t", progress))
        if lib.WebPEncode(config, self._picture):
            return 0
        if self._error is not None:
            raise self._error
        return int(picture.error_code)

    def _keep(self, _kind: type[BaseException], error: BaseException, _trace: object) -> None:
        self._error = error

    def _write_chunks(self, file: BinaryIO, *names: bytes) -> None:
        for name in names:
            if name in self._chunks:
                file.write(_chunk(name, self._chunks[name]))


def chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, data) of each chunk of a WebP (RFC 9649, section 2.3)."""
    position = _RIFF_BYTES
    while position < len(content):
        name, size = struct.unpack_from("<4sI", content, position)
        yield name, content[position + 8 : position + 8 + size]
        position += 8 + size + size % 2


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack("<4sI", name, len(data)) + data + b"\0" * (len(data) % 2)


def is_available() -> bool:
    """Whether a libwebp is there that we know how to feed. Says so once in the log where it is not."""
    return _libwebp() is not None


_StructureT = TypeVar("_StructureT", bound=ctypes.Structure)


class _Picture(ctypes.Structure):
    """WebPPicture of libwebp's encode.h, the same since its ABI is 0x02xx, which libwebp itself compares."""

    _fields_ = (
        ("use_argb", ctypes.c_int),
        ("colorspace", ctypes.c_int),
        ("width", ctypes.c_int),
        ("height", ctypes.c_int),
        ("y", ctypes.c_void_p),
        ("u", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("y_stride", ctypes.c_int),
        ("uv_stride", ctypes.c_int),
        ("a", ctypes.c_void_p),
        ("a_stride", ctypes.c_int),
        ("pad1", ctypes.c_uint32 * 2),
        ("argb", ctypes.c_void_p),
        ("argb_stride", ctypes.c_int),
        ("pad2", ctypes.c_uint32 * 3),
        ("writer", ctypes.c_void_p),
        ("custom_ptr", ctypes.c_void_p),
        ("extra_info_type", ctypes.c_int),
        ("extra_info", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
        ("error_code", ctypes.c_int),
        ("progress_hook", ctypes.c_void_p),
        ("user_data", ctypes.c_void_p),
        ("pad3", ctypes.c_uint32 * 3),
        ("pad4", ctypes.c_void_p),
        ("pad5", ctypes.c_void_p),
        ("pad6", ctypes.c_uint32 * 8),
        ("memory_", ctypes.c_void_p),
        ("memory_argb_", ctypes.c_void_p),
        ("pad7", ctypes.c_void_p * 2),
    )


class _Config(ctypes.Structure):
    """WebPConfig of the same header. The package knows those up to `pass`."""

    _fields_ = (
        ("lossless", ctypes.c_int),
        ("quality", ctypes.c_float),
        ("method", ctypes.c_int),
        ("image_hint", ctypes.c_int),
        ("target_size", ctypes.c_int),
        ("target_PSNR", ctypes.c_float),
        ("segments", ctypes.c_int),
        ("sns_strength", ctypes.c_int),
        ("filter_strength", ctypes.c_int),
        ("filter_sharpness", ctypes.c_int),
        ("filter_type", ctypes.c_int),
        ("autofilter", ctypes.c_int),
        ("alpha_compression", ctypes.c_int),
        ("alpha_filtering", ctypes.c_int),
        ("alpha_quality", ctypes.c_int),
        ("pass", ctypes.c_int),
        ("show_compressed", ctypes.c_int),
        ("preprocessing", ctypes.c_int),
        ("partitions", ctypes.c_int),
        ("partition_limit", ctypes.c_int),
        ("emulate_jpeg_size", ctypes.c_int),
        ("thread_level", ctypes.c_int),
        ("low_memory", ctypes.c_int),
        ("near_lossless", ctypes.c_int),
        ("exact", ctypes.c_int),
        ("use_delta_palette", ctypes.c_int),
        ("use_sharp_yuv", ctypes.c_int),
        ("qmin", ctypes.c_int),
        ("qmax", ctypes.c_int),
    )


@functools.cache
def _libwebp() -> tuple[Any, Any] | None:
    """The package's `ffi` and `lib`. Loaded here, since the processes that only read pictures need neither."""
    try:
        from webp._webp import ffi, lib
    except (ImportError, OSError) as error:
        _tell(f"{error}")
        return None
    for name, ours in (("WebPPicture", _Picture), ("WebPConfig", _Config)):
        known = {field: found.offset for field, found in ffi.typeof(name).fields}
        if ffi.sizeof(name) != ctypes.sizeof(ours) or any(
            getattr(getattr(ours, field, None), "offset", None) != offset for field, offset in known.items()
        ):
            _tell(f"the package's libwebp has another {name}")
            return None
    return ffi, lib


def _tell(detail: str) -> None:
    # Here, for the processes that only read pictures.
    from shared.telemetry import log

    log.warning("webp.held_whole", detail=f"Lossy WebP is written by libvips, which holds the picture: {detail}")


def _seen(kind: type[_StructureT], ffi: Any, pointer: Any) -> _StructureT:
    return kind.from_address(int(ffi.cast("uintptr_t", pointer)))


def _planes(ffi: Any, picture: Any) -> tuple[npt.NDArray[np.uint8], ...]:
    """Views of a picture's Y, U and V, of its rows and columns without what pads them; until it is freed."""
    seen = _seen(_Picture, ffi, picture)
    half_width, half_height = (seen.width + 1) // 2, (seen.height + 1) // 2
    return tuple(
        np.frombuffer(ffi.buffer(ffi.cast("uint8_t *", address), stride * height), np.uint8).reshape(height, stride)[
            :, :width
        ]
        for address, stride, width, height in (
            (seen.y, seen.y_stride, seen.width, seen.height),
            (seen.u, seen.uv_stride, half_width, half_height),
            (seen.v, seen.uv_stride, half_width, half_height),
        )
    )
