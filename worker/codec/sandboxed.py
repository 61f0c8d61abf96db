"""The worker's way to a picture: decoded in a child of `shared.sandbox`, and handed over by shared memory.

The child runs `worker.codec.decode`; what comes back is the same Picture. The samples are mapped: small ones are in
memory once, where the child has put them, and large ones in a file, of which those rows are in memory that are being
read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
from PIL import AvifImagePlugin, Image
from pydantic import Field, TypeAdapter, ValidationError

from shared import pictures
from shared.errors import InternalError, InvalidImage, Unavailable, UnsupportedFormat
from shared.pictures import PictureFacts, inspect
from shared.sandbox import Limits, Sandbox, Task
from worker.codec import Samples
from worker.codec.decode import Picture, decode
from worker.codec.metadata import SourceMetadata

# Twice what any kind of picture was seen to take (tests/worker/codec/test_sandboxed.py measures each).
BYTES_PER_PX = 64
# Ten times what the slowest kinds take; a second at least.
CPU_PX_PER_SECOND = 200_000
LEAST_CPU_SECONDS = 10
# Other work may have the processors meanwhile.
WALL_OVER_CPU = 4
# Colours and alpha of 16 bits, and what goes with them.
OUTPUT_BYTES_PER_PX = 8
# Most of what a file says beside its pixels (EXIF, XMP, profile) that is handed over.
MOST_METADATA_BYTES = 64 * 2**20


class Decoder(Protocol):
    """Reads picture files: here and now, or in a child."""

    def inspect(self, file: BinaryIO) -> PictureFacts: ...

    def decode(self, file: BinaryIO, facts: PictureFacts) -> Picture: ...


@dataclass(frozen=True)
class InProcess:
    """For files of the person who runs the process: the command line."""

    max_input_px: int

    def inspect(self, file: BinaryIO) -> PictureFacts:
        return inspect(file)

    def decode(self, file: BinaryIO, _facts: PictureFacts) -> Picture:
        return decode(file, max_input_px=self.max_input_px)


class Sandboxed:
    """For files of strangers: the worker."""

    def __init__(self, max_input_px: int) -> None:
        self.max_input_px = max_input_px
        self.sandbox = Sandbox("worker.codec.sandboxed")

    def inspect(self, file: BinaryIO) -> PictureFacts:
        """Raises what `shared.pictures.inspect` raises, and InternalError where no answer came in time."""
        try:
            return pictures.inspect_in(self.sandbox, file, max_px=self.max_input_px)
        except Unavailable as error:
            raise _stalled(error) from error

    def decode(self, file: BinaryIO, facts: PictureFacts) -> Picture:
        """Raises what `worker.codec.decode` raises, InvalidImage also where the child died of the file or used up
        what it may, and InternalError where no answer came in time."""
        file_bytes = file.seek(0, os.SEEK_END)
        try:
            told, output = self.sandbox.run("decode", file, limits_for(facts, file_bytes), max_px=self.max_input_px)
        except Unavailable as error:
            raise _stalled(error) from error
        try:
            return _picture(_TOLD.validate_python(told), output)
        except (ValidationError, UnsupportedFormat, ValueError, TypeError) as error:
            # Ours tell the truth: whoever talks like this has been taken over by the file.
            raise InvalidImage("The picture's decoder broke off while reading it.") from error

    def close(self) -> None:
        self.sandbox.close()


def limits_for(facts: PictureFacts, file_bytes: int) -> Limits:
    cpu_seconds = LEAST_CPU_SECONDS + facts.pixels // CPU_PX_PER_SECOND
    return Limits(
        memory_bytes=pictures.HEADROOM_BYTES + 4 * file_bytes + BYTES_PER_PX * facts.pixels,
        cpu_seconds=cpu_seconds,
        wall_seconds=WALL_OVER_CPU * cpu_seconds,
        output_bytes=OUTPUT_BYTES_PER_PX * facts.pixels + MOST_METADATA_BYTES,
    )


def _stalled(error: Unavailable) -> InternalError:
    # Not a server that is away, for which a job would wait for ever: it uses up an attempt.
    return InternalError(error.detail)


@dataclass(frozen=True)
class _Told:
    """A Picture as a child tells of it. The output holds, one behind the other: rgb, alpha, profile, EXIF, XMP."""

    width: int = Field(gt=0)
    height: int = Field(gt=0)
    bits: Literal[8, 16] = 8
    is_gray: bool = False
    has_alpha_plane: bool = False
    constant_alpha: int | None = Field(None, ge=0, le=65535)
    format: str = ""
    warnings: tuple[str, ...] = ()
    icc_bytes: int | None = Field(None, ge=0)
    exif_bytes: int | None = Field(None, ge=0)
    xmp_bytes: int | None = Field(None, ge=0)
    dpi: float | None = None
    is_broken: bool = False


_TOLD = TypeAdapter(_Told)


def _decode_task(file: BinaryIO, output: BinaryIO, *, max_px: int) -> dict[str, Any]:
    picture = decode(file, max_input_px=max_px)
    about = picture.metadata

    def written(content: Samples | bytes | None) -> int | None:
        if content is None:
            return None
        left = memoryview(content if isinstance(content, bytes) else content.data).cast("B")
        size = len(left)
        while left:
            left = left[output.write(left) :]
        return size

    written(np.ascontiguousarray(picture.rgb))
    written(picture.alpha)
    return asdict(
        _Told(
            width=picture.width,
            height=picture.height,
            bits=8 if picture.bits == 8 else 16,
            is_gray=picture.is_gray,
            has_alpha_plane=picture.alpha is not None,
            constant_alpha=picture.constant_alpha,
            format=picture.format,
            warnings=picture.warnings,
            icc_bytes=written(picture.icc_profile),
            exif_bytes=written(about.exif),
            xmp_bytes=written(about.xmp),
            dpi=about.dpi,
            is_broken=about.is_broken,
        )
    )


def _picture(told: _Told, output: Any) -> Picture:
    """Raises ValueError or TypeError where the output is not what was told."""
    dtype = np.dtype(np.uint8 if told.bits == 8 else np.uint16)
    at = 0

    def samples(*shape: int) -> Samples:
        nonlocal at
        count = int(np.prod(shape))
        taken = np.frombuffer(output, dtype, count, at).reshape(shape)
        at += count * dtype.itemsize
        return taken

    def content(size: int | None) -> bytes | None:
        nonlocal at
        if size is None:
            return None
        taken = output[at : at + size]
        at += size
        return bytes(taken)

    rgb = samples(told.height, told.width, 3)
    alpha = samples(told.height, told.width) if told.has_alpha_plane else None
    icc_profile = content(told.icc_bytes)
    return Picture(
        rgb=rgb,
        alpha=alpha,
        constant_alpha=told.constant_alpha,
        is_gray=told.is_gray,
        format=pictures.format_named(told.format).name,
        icc_profile=icc_profile,
        metadata=SourceMetadata(
            exif=content(told.exif_bytes), xmp=content(told.xmp_bytes), dpi=told.dpi, is_broken=told.is_broken
        ),
        warnings=told.warnings,
        pages=output,
    )


def _warmed() -> Mapping[str, Task]:
    """The tasks; on the way, what a first picture would make a child do is done once for all of them."""
    Image.init()
    # One thread for each core, each with megabytes of addresses.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    return {**pictures.SANDBOXED, "decode": _decode_task}


SANDBOXED: Mapping[str, Task] = _warmed()
warm_up = pictures.warm_up
