"""A result that `worker.codec.encode` has written, in another form: another format, or a pyramid of tiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyvips
from PIL import Image

from shared.errors import InternalError
from shared.pictures import format_named
from worker.codec.color import parse_color, result_profile
from worker.codec.encode import (
    LIBVIPS_ROWS,
    check_memory,
    hold_few_rows,
    is_fed_to_libwebp,
    open_encoder,
    save_options,
)
from worker.codec.metadata import Metadata


def convert(
    source: Path,
    target: Path,
    format: str,
    *,
    quality: int,
    lossless: bool,
    background: str,
    available_bytes: int,
) -> int:
    """A picture that an Encoder has written, in another format. Returns the size of `target` in bytes.

    What the format cannot hold goes the way it does in a job: transparency is laid on `background`, 16 bits become 8,
    gray becomes three equal channels. Metadata and profile come along. Raises InternalError where libvips fails,
    OutOfMemory as `check_memory`, and as an Encoder does.
    """
    holds = format_named(format)
    with _libvips_failures(format):
        image = _opened(source)
        check_memory(
            format,
            image.width,
            image.height,
            has_alpha=image.hasalpha(),
            lossless=lossless,
            available_bytes=available_bytes,
        )
        if image.hasalpha() and not holds.holds_alpha:
            top = 65535 if image.format == "ushort" else 255
            image = image.flatten(background=[level * top / 255 for level in parse_color(background)])
        is_gray = image.interpretation in ("b-w", "grey16")
        if (is_gray and not holds.holds_gray) or (image.format == "ushort" and not holds.holds_16_bit):
            is_gray = is_gray and holds.holds_gray
            image = image.colourspace("b-w" if is_gray else "srgb")
        if is_fed_to_libwebp(format, has_alpha=image.hasalpha(), lossless=lossless):
            return _through_encoder(image, target, format, quality)
        image = image.copy()
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", result_profile(is_gray=is_gray))
        row_bytes = image.width * image.bands * (2 if image.format == "ushort" else 1)
        operation, arguments = save_options(format, quality, lossless, row_bytes, image.height)
        out = pyvips.Target.new_to_file(str(target))
        pyvips.Operation.call(operation, image, out, keep="exif:icc:xmp", **arguments)
    return target.stat().st_size


def _through_encoder(image: pyvips.Image, target: Path, format: str, quality: int) -> int:
    """Some rows at a time. Returns the size of `target` in bytes. Raises as an Encoder does, and pyvips.Error."""
    # Into an empty block, where there is none, libvips writes the resolution: a WebP has no other place for it.
    exif = bytes(image.get("exif-data")) if image.get_typeof("exif-data") else Image.Exif().tobytes()
    xmp = bytes(image.get("xmp-data")) if image.get_typeof("xmp-data") else None
    metadata = Metadata(exif.removeprefix(b"Exif\0\0"), xmp, image.xres * 25.4)
    rows = pyvips.Region.new(image)
    with open_encoder(
        target, format, image.width, image.height, channels=image.bands, quality=quality, metadata=metadata
    ) as encoder:
        for top in range(0, image.height, LIBVIPS_ROWS):
            height = min(LIBVIPS_ROWS, image.height - top)
            samples = rows.fetch(0, top, image.width, height)
            encoder.write(np.frombuffer(samples, np.uint8).reshape(height, image.width, image.bands))
        return encoder.close()


def write_pyramid(source: Path, target: Path, *, tile_px: int) -> int:
    """The picture as a pyramid of tiles in one zip file, stored and not deflated, so that a tile is a range of it.

    Deep Zoom's layout: `zoom_files/<level>/<column>_<row>.<jpeg or webp>`, tiles of `tile_px` without overlap, the last
    level at full size. JPEG, or WebP where there is transparency. libvips reads the picture once, from the top, and
    holds some rows of tiles. Returns the size of `target` in bytes. Raises InternalError where libvips fails.
    """
    with _libvips_failures("zoom"):
        image = _opened(source)
        if image.format == "ushort":
            image = image.colourspace("b-w" if image.interpretation == "grey16" else "srgb")
        image.dzsave(
            str(target),
            container="zip",
            suffix=".webp[Q=85,effort=0]" if image.hasalpha() else ".jpeg[Q=85]",
            tile_size=tile_px,
            overlap=0,
            # Profiles are sRGB's, which is what goes without saying.
            keep="none",
        )
    return target.stat().st_size


def _opened(source: Path) -> pyvips.Image:
    """From the top, each row once; a file cut short fails instead of ending in gray."""
    hold_few_rows()
    return pyvips.Image.new_from_file(str(source), access="sequential", fail_on="truncated")


@contextmanager
def _libvips_failures(form: str) -> Iterator[None]:
    try:
        yield
    except (pyvips.Error, OSError) as error:
        raise InternalError(f"The result could not be made into {form}.", form=form) from error
