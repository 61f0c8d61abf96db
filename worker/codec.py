"""Pictures in and out of the engine: every odd kind becomes sRGB samples, and rows become a file band by band.

What a file says is kept or refused, never guessed: orientation is applied once, colours are converted by their
profile, 16 bits are known by the file's depth and not by its greatest value, gray stays gray, alpha stays alpha.
Whatever had to be left behind is said in `Picture.warnings`, in words for the customer.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import io
import mmap
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Protocol, Self
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt
import pyvips
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin

from shared.errors import (
    DiskFull,
    FormatCannotHoldDetail,
    InternalError,
    InvalidImage,
    OutOfMemory,
    TooManyPixels,
)
from shared.pictures import (
    ORIENTATION_TAG,
    PictureFacts,
    format_named,
    inspect,
    orientation_of,
    pillow_raises,
    refusing_what_pillow_refuses,
)
from worker import webp

Samples = npt.NDArray[Any]
"""uint8 or uint16, full range."""

# --- Pictures in ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceMetadata:
    """What a file says beside its pixels and their colours, for `metadata_for_result`."""

    exif: bytes | None = None
    """EXIF block without its prefix and without orientation, which is applied; None where there is none."""
    xmp: bytes | None = None
    dpi: float | None = None
    is_broken: bool = False
    """There was an EXIF block and it could not be read."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture as a viewer shows it: upright, in sRGB, straight (not premultiplied) alpha."""

    rgb: Samples
    """(height, width, 3) uint8 or uint16, C-contiguous; three equal channels where `is_gray`."""
    alpha: Samples | None
    """(height, width), dtype of `rgb`; None where there is no alpha or one level everywhere."""
    constant_alpha: int | None
    """The one alpha level everywhere, which needs no network; None where there is no alpha or it varies."""
    is_gray: bool
    format: str
    icc_profile: bytes | None
    """The file's own profile, already applied."""
    metadata: SourceMetadata
    warnings: tuple[str, ...]
    pages: mmap.mmap | None = None
    """The file that `rgb` and, behind it, `alpha` are mapped from, from its start; None where they lie in memory."""

    def rest(self, top: int, bottom: int) -> None:
        """The rows from `top` to `bottom` are not needed for now: their pages go, and come again when they are read."""
        if self.pages is None:
            return
        start = 0
        for plane in (self.rgb, self.alpha):
            if plane is None:
                continue
            row_bytes = plane.nbytes // self.height
            # Whole pages; one that is needed in part comes again.
            first = (start + top * row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            self.pages.madvise(mmap.MADV_DONTNEED, first, start + bottom * row_bytes - first)
            start += plane.nbytes

    @property
    def width(self) -> int:
        return int(self.rgb.shape[1])

    @property
    def height(self) -> int:
        return int(self.rgb.shape[0])

    @property
    def bits(self) -> int:
        """8 or 16: bits per sample of `rgb`."""
        return self.rgb.dtype.itemsize * 8

    @property
    def has_alpha(self) -> bool:
        return self.alpha is not None or self.constant_alpha is not None

    def alpha_plane(self) -> Samples | None:
        """(height, width) alpha whether it varies or not; None where there is none."""
        if self.constant_alpha is not None:
            return np.full(self.rgb.shape[:2], self.constant_alpha, self.rgb.dtype)
        return self.alpha


def decode(file: BinaryIO, *, max_input_px: int) -> Picture:
    """The picture in `file`, a seekable binary file; of several frames or pages the first, with a warning.

    Takes about 3 to 4 times the picture's samples in memory while it converts, once them afterwards.
    Raises UnsupportedFormat, InvalidImage (broken, cut short, or of a kind whose colours the file does not define),
    or TooManyPixels before anything is allocated.
    """
    facts = inspect(file)
    if facts.pixels > max_input_px:
        raise TooManyPixels(facts.width, facts.height, max_input_px)
    with refusing_what_pillow_refuses(facts.format):
        # Pillow reduces 16-bit colour to 8 bits and clips some 16-bit gray; libvips reads all of it.
        raw = _read_16_bit(file, facts) if _is_16_bit(facts) else _read_8_bit(file, facts)
    if raw.orientation != 1:
        raw = replace(
            raw, color=_upright(raw.color, raw.orientation), alpha=_upright_or_none(raw.alpha, raw.orientation)
        )
    rgb, is_gray, color_warnings = _srgb(raw)
    alpha, constant_alpha = raw.alpha, None
    if alpha is not None:
        lowest, highest = int(alpha.min()), int(alpha.max())
        if lowest == highest:
            alpha, constant_alpha = None, lowest
        elif lowest == 0:
            _bleed(rgb, alpha)
    return Picture(
        rgb=rgb,
        alpha=alpha,
        constant_alpha=constant_alpha,
        is_gray=is_gray,
        format=facts.format,
        icc_profile=raw.icc_profile,
        metadata=raw.metadata,
        warnings=(
            *_frame_warnings(facts),
            *raw.warnings,
            *color_warnings,
            *(("The picture's EXIF data is broken and was dropped.",) if raw.metadata.is_broken else ()),
        ),
    )


def flatten(picture: Picture, background: str) -> Picture:
    """The picture laid on `background` (`#rrggbb`), without alpha. Blended in sRGB values, as browsers do (CSS).

    Raises ValueError where `background` is not a colour.
    """
    alpha = picture.alpha_plane()
    if alpha is None:
        return picture
    color = _color(background)
    top = np.iinfo(picture.rgb.dtype).max
    scaled = [channel * (top // 255) for channel in color]
    rgb = np.empty_like(picture.rgb)
    # A row at a time: the products of 16-bit samples need 64 bits.
    for y in range(picture.height):
        weight = alpha[y].astype(np.uint64)[:, None]
        under = np.array(scaled, np.uint64)
        rgb[y] = (picture.rgb[y].astype(np.uint64) * weight + under * (top - weight) + top // 2) // top
    return replace(
        picture,
        rgb=rgb,
        alpha=None,
        constant_alpha=None,
        is_gray=picture.is_gray and len(set(color)) == 1,
        pages=None,
    )


def quantize(rows: npt.NDArray[np.float32], bits: int) -> Samples:
    """Rows of float32 in [0, 1] (clipped to it) -> uint8 or uint16 of the same shape, rounded to nearest."""
    top = (1 << bits) - 1
    scaled = np.clip(rows, 0.0, 1.0)
    scaled *= top
    scaled += 0.5
    return scaled.astype(np.uint8 if bits == 8 else np.uint16)


def luma(rgb: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(..., 3) float32 -> (...) float32: the gray of a colour, by the weights of ITU-R BT.601."""
    return rgb @ np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True, eq=False)
class _Raw:
    """What a decoder gave: colours not yet converted, alpha apart, not yet upright."""

    color: Samples
    """(height, width, channels) uint8 or uint16: gray 1, RGB 3, CMYK 4 (0 is no ink)."""
    alpha: Samples | None
    """(height, width), dtype of `color`."""
    orientation: int
    icc_profile: bytes | None
    metadata: SourceMetadata
    warnings: tuple[str, ...]


def _is_16_bit(facts: PictureFacts) -> bool:
    return facts.bits == 16 and facts.format in ("png", "tiff")


def _frame_warnings(facts: PictureFacts) -> tuple[str, ...]:
    if facts.frames == 1:
        return ()
    held = "several" if facts.frames is None else str(facts.frames)
    if facts.format == "tiff":
        return (f"The file holds {held} pages; the first was enlarged.",)
    if facts.format == "jpeg":
        return (f"The file holds {held} pictures (stereo, depth or gain map); the first was enlarged.",)
    return (f"The picture is animated ({held} frames); the first frame was enlarged.",)


def _read_8_bit(file: BinaryIO, facts: PictureFacts) -> _Raw:
    """By Pillow: everything but 16-bit PNG and TIFF. Raises what Pillow raises, and InvalidImage."""
    warnings: list[str] = []
    opened = Image.open(file, formats=format_named(facts.format).pillow_names)
    if opened.width * opened.height != facts.pixels:
        raise InvalidImage("The file says two different things about its size.", format=facts.format)
    opened.load()
    # Before any conversion: what comes of one no longer knows the tags of its file.
    metadata = _metadata_of(opened)
    image: Image.Image = opened
    is_tiff = isinstance(opened, TiffImagePlugin.TiffImageFile)
    # Pillow has turned the pixels of a TIFF upright while loading it, and of no other format.
    orientation = 1 if is_tiff else orientation_of(image)
    gamma = image.info.get("gamma")
    if facts.format == "png" and gamma and "icc_profile" not in image.info and abs(gamma - 1 / 2.2) > 0.01:
        warnings.append(f"The file's gamma ({gamma:.3g}) was not applied; its colours were read as sRGB.")
    if facts.format == "avif" and facts.bits > 8:
        warnings.append(f"The picture has {facts.bits} bits per sample; it was read with 8.")
    profile = image.info.get("icc_profile")
    color: Samples
    alpha: Samples | None = None
    mode = image.mode
    if mode in ("RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[mode])
    elif mode in ("P", "PA"):
        is_gray = _palette_is_gray(image)
        has_alpha = mode == "PA" or "transparency" in image.info
        image = image.convert({(0, 0): "RGB", (0, 1): "RGBA", (1, 0): "L", (1, 1): "LA"}[is_gray, has_alpha])
    elif mode in ("1", "L", "RGB") and "transparency" in image.info:
        if facts.format == "png" and facts.bits in (2, 4):
            # Pillow widens 2- and 4-bit gray to 8 bits but leaves the transparent level as the file has it.
            image.info["transparency"] *= 255 // ((1 << facts.bits) - 1)
        image = image.convert("RGBA" if mode == "RGB" else "LA")
    elif mode == "1":
        image = image.convert("L")
    elif mode in ("YCbCr", "RGBX"):
        image = image.convert("RGB")
    elif mode == "LAB":
        # Lab is its own profile: device-independent, D50 (TIFF 6.0, section 23).
        lab = ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(image, lab, ImageCms.createProfile("sRGB"), outputMode="RGB")
        assert converted is not None
        image, profile = converted, None
    if image.mode in ("L", "RGB", "CMYK"):
        color = _samples(image)
    elif image.mode in ("LA", "RGBA"):
        samples = np.asarray(image)
        color, alpha = samples[..., :-1], np.ascontiguousarray(samples[..., -1])
    elif image.mode.startswith("I;16") and facts.bits == 12:
        # Stored in 12 bits, whose white is 4095.
        color = ((np.asarray(image).astype(np.uint32) * 65535 + 2047) // 4095).astype(np.uint16)
    else:
        raise InvalidImage(
            f"The picture's samples ({_kind_in_words(image.mode)}) have no defined black and white; "
            "save it with 8 or 16 bits per sample.",
            format=facts.format,
            mode=image.mode,
        )
    if color.ndim == 2:
        color = color[..., None]
    return _Raw(color, alpha, orientation, profile, metadata, tuple(warnings))


def _samples(image: Image.Image) -> Samples:
    """(height, width, channels) uint8, of an image of 8 bits. Some rows at a time: Pillow's own way to an array holds
    them twice more on the way."""
    samples = np.empty((image.height, image.width, len(image.getbands())), np.uint8)
    for top in range(0, image.height, 256):
        bottom = min(top + 256, image.height)
        samples[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom))).reshape(samples[top:bottom].shape)
    return samples


def _kind_in_words(mode: str) -> str:
    return {"F": "floating point", "I": "signed or 32-bit integers"}.get(mode, f"mode {mode}")


def _palette_is_gray(image: Image.Image) -> bool:
    palette = np.frombuffer(bytes(image.getpalette("RGB") or b""), np.uint8).reshape(-1, 3)
    return bool((palette[:, 0] == palette[:, 1]).all() and (palette[:, 1] == palette[:, 2]).all())


_PHOTOMETRIC_TAG, _EXTRA_SAMPLES_TAG, _SAMPLE_FORMAT_TAG = 262, 338, 339
_ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA, _UNSIGNED = 1, 2, 1


def _read_16_bit(file: BinaryIO, facts: PictureFacts) -> _Raw:
    """By libvips: 16-bit PNG and TIFF. Raises InvalidImage, and what Pillow raises where it reads the metadata."""
    image = Image.open(file, formats=format_named(facts.format).pillow_names)
    file.seek(0)
    data = file.read()
    has_alpha = facts.has_alpha
    is_premultiplied = False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        sample_format = tags.get(_SAMPLE_FORMAT_TAG, (_UNSIGNED,))
        if set(sample_format if isinstance(sample_format, tuple) else (sample_format,)) != {_UNSIGNED}:
            raise InvalidImage(
                "The picture's samples are signed or floating point and have no defined black and white; "
                "save it with unsigned samples.",
                format=facts.format,
            )
        extra = tags.get(_EXTRA_SAMPLES_TAG, ())
        first_extra = (extra if isinstance(extra, tuple) else (extra,))[:1]
        has_alpha = has_alpha or first_extra in ((_ASSOCIATED_ALPHA,), (_UNASSOCIATED_ALPHA,))
        is_premultiplied = first_extra == (_ASSOCIATED_ALPHA,)
    metadata = _metadata_of(image)
    try:
        loader = "pngload_buffer" if facts.format == "png" else "tiffload_buffer"
        loaded = pyvips.Operation.call(loader, data, access="sequential", fail_on="error")
        if loaded.format != "ushort" or loaded.interpretation not in ("grey16", "rgb16", "cmyk"):
            raise InvalidImage(
                f"16-bit {facts.format.upper()} of this kind ({loaded.interpretation}) is not read; "
                "save it as RGB or gray.",
                format=facts.format,
            )
        channels = {"grey16": 1, "rgb16": 3, "cmyk": 4}[loaded.interpretation]
        samples = np.ndarray(
            buffer=loaded.write_to_memory(), dtype=np.uint16, shape=(loaded.height, loaded.width, loaded.bands)
        )
    except pyvips.Error as error:
        raise InvalidImage(
            f"The file starts as {facts.format.upper()} and cannot be read: it is broken or cut short.",
            format=facts.format,
        ) from error
    color = samples[..., :channels]
    alpha: Samples | None = None
    if samples.shape[2] > channels and (has_alpha or facts.format == "png"):
        alpha = np.ascontiguousarray(samples[..., channels])
        if is_premultiplied:
            color = _unpremultiplied(color, alpha)
    return _Raw(color, alpha, facts.orientation, image.info.get("icc_profile"), metadata, ())


def _unpremultiplied(color: Samples, alpha: Samples) -> Samples:
    """Straight colours (height, width, channels) uint16 of premultiplied ones; black where alpha is 0."""
    straight = np.empty(color.shape, np.uint16)
    for y in range(color.shape[0]):
        weight = np.maximum(alpha[y], 1).astype(np.uint32)[:, None]
        straight[y] = np.minimum((color[y].astype(np.uint32) * 65535 + weight // 2) // weight, 65535)
    return straight


def _upright(samples: Samples, orientation: int) -> Samples:
    """(height, width, ...) as stored -> as shown (EXIF 2.32, tag Orientation)."""
    swapped = samples.swapaxes(0, 1)
    shown = {
        1: samples,
        2: samples[:, ::-1],
        3: samples[::-1, ::-1],
        4: samples[::-1],
        5: swapped,
        6: swapped[:, ::-1],
        7: swapped[::-1, ::-1],
        8: swapped[::-1],
    }[orientation]
    return np.ascontiguousarray(shown)


def _upright_or_none(samples: Samples | None, orientation: int) -> Samples | None:
    return None if samples is None else _upright(samples, orientation)


# --- Colour ---------------------------------------------------------------------------------------------------------

_CHANNELS_OF_SPACE = {b"GRAY": 1, b"RGB ": 3, b"CMYK": 4}


def _srgb(raw: _Raw) -> tuple[Samples, bool, tuple[str, ...]]:
    """(rgb (height, width, 3) contiguous and writable in sRGB, whether it is gray, warnings)."""
    color, profile = raw.color, raw.icc_profile
    channels = color.shape[2]
    warnings: tuple[str, ...] = ()
    space = None
    if profile:
        space = _usable_space(profile)
        if (
            space is None
            or (_CHANNELS_OF_SPACE[space] == 4) != (channels == 4)
            or _CHANNELS_OF_SPACE[space] > max(channels, 3)
        ):
            warnings = ("The colour profile is broken or does not fit the picture; it was ignored.",)
            space = None
        elif space == b"GRAY" and channels == 3:
            warnings = ("The colour profile is for gray and the picture is not; it was ignored.",)
            space = None
    try:
        if channels == 1:
            if profile and space is not None:
                color = _gray_through_profile(color, profile, _CHANNELS_OF_SPACE[space])
            return np.repeat(color, 3, axis=2), True, warnings
        if profile and space is not None and not (channels == 3 and _is_srgb(profile)):
            return _through_profile(color, profile), False, warnings
    except pyvips.Error:
        warnings = ("The colour profile cannot be used; it was ignored.",)
    if channels == 4:
        plain = "The picture is CMYK without a usable profile; its colours were converted by the plain formula."
        return _plain_rgb_of_cmyk(color), False, (*warnings, plain)
    return np.require(color, requirements=("C", "W")), False, warnings


def _usable_space(profile: bytes) -> bytes | None:
    """The profile's colour space (ICC.1, header bytes 16 to 19) where it is whole and one we convert from."""
    space = profile[16:20]
    # Input, display, output and colour-space profiles describe colours; links, abstract and named ones do not.
    if space not in _CHANNELS_OF_SPACE or profile[12:16] not in (b"scnr", b"mntr", b"prtr", b"spac"):
        return None
    try:
        # Opening it reads the header only, and libvips would take a profile of its own where this one is cut short.
        mode = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK"}[space]
        ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )
    except pillow_raises():
        return None
    return space


def _through_profile(color: Samples, profile: bytes) -> Samples:
    """(height, width, 1 | 3 | 4) in the profile's colours -> (height, width, 3) sRGB, same dtype.

    Relative colorimetric with black-point compensation, as browsers and photo editors do. Raises pyvips.Error.
    """
    height, width, channels = color.shape
    is_16_bit = color.dtype == np.uint16
    kind = {1: "grey16" if is_16_bit else "b-w", 3: "rgb16" if is_16_bit else "srgb", 4: "cmyk"}[channels]
    contiguous = np.ascontiguousarray(color)
    image = pyvips.Image.new_from_memory(contiguous.data, width, height, channels, "ushort" if is_16_bit else "uchar")
    image = image.copy(interpretation=kind)
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
    shown = image.icc_transform(
        "srgb", embedded=True, intent="relative", black_point_compensation=True, depth=16 if is_16_bit else 8
    )
    return np.ndarray(buffer=shown.write_to_memory(), dtype=color.dtype, shape=(height, width, 3))


def _is_srgb(profile: bytes) -> bool:
    """Whether the profile leaves sRGB as it is, to half a level of 255, on a grid of 9 x 9 x 9 colours.

    Most pictures carry such a profile under one of many names; converting by it costs time and adds rounding.
    """
    levels = np.linspace(0, 65535, 9).round().astype(np.uint16)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    difference = np.abs(_through_profile(grid, profile).astype(np.int32) - grid)
    return int(difference.max()) <= 128


def _gray_through_profile(gray: Samples, profile: bytes, profile_channels: int) -> Samples:
    """(height, width, 1) -> same, through a table of every level: gray in, gray out, whatever the profile's kind.

    A profile that leaves gray as it is to half a level of 255 changes nothing.
    """
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    shown = _through_profile(np.repeat(ramp, profile_channels, axis=2), profile)[..., 1].reshape(65536)
    if int(np.abs(shown.astype(np.int32) - ramp.reshape(65536)).max()) <= 128:
        return gray
    if gray.dtype == np.uint16:
        return shown[gray]
    return np.rint(shown[::257] / 257).astype(np.uint8)[gray]


def _plain_rgb_of_cmyk(color: Samples) -> Samples:
    """r = (1 - c)(1 - k), and so on: what viewers do with CMYK that says nothing of its inks."""
    top = int(np.iinfo(color.dtype).max)
    rgb = np.empty((*color.shape[:2], 3), color.dtype)
    for y in range(color.shape[0]):
        left = top - color[y].astype(np.uint64)
        rgb[y] = (left[:, :3] * left[:, 3:] + top // 2) // top
    return rgb


def _bleed(rgb: Samples, alpha: Samples) -> None:
    """Give fully transparent pixels of `rgb` (changed in place) the colours of the visible ones around them.

    Their own colours are arbitrary, mostly black or white, and a network would draw them into the edges as fringes.
    Premultiplying would not do: it shows the network an edge to black that is not in the picture, which it sharpens,
    and dividing by an alpha that was enlarged apart from it makes dark and bright rims. With colours running on
    behind the edge, the network sees a picture without that edge and straight alpha cuts it out afterwards.
    Measured with srgan on four photographs with a curved cut-out, laid on black, gray and white, PSNR in the 16 px
    around the edge: 25.5 dB so, 22.4 dB premultiplied, 20.8 dB with what lay under the transparency.

    Push-pull of Gortler et al. 1996, "The Lumigraph": averages weighted by alpha on ever coarser grids fill the holes
    of the finer ones. Coarse grids are float32; the finest stays as it is, and is filled by bands of rows.
    """
    sums, weight = _halved(rgb, alpha)
    _push_pull(sums, weight)
    for top in range(0, rgb.shape[0], 256):
        rows = slice(top, top + 256)
        ys, xs = np.nonzero(alpha[rows] == 0)
        rgb[rows][ys, xs] = np.rint(sums[(ys + top) // 2, xs // 2]).astype(rgb.dtype)


def _halved(
    color: npt.NDArray[Any], weight: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Colours (height, width, 3) and weights (height, width), averaged over 2 x 2 by weight; odd edges are shorter."""
    height, width = (color.shape[0] + 1) // 2, (color.shape[1] + 1) // 2
    sums = np.zeros((height, width, 3), np.float32)
    total = np.zeros((height, width), np.float32)
    for dy in (0, 1):
        for dx in (0, 1):
            part = weight[dy::2, dx::2].astype(np.float32)
            into = (slice(part.shape[0]), slice(part.shape[1]))
            total[into] += part
            sums[into] += color[dy::2, dx::2] * part[..., None]
    np.divide(sums, total[..., None], out=sums, where=total[..., None] > 0)
    return sums, total


def _push_pull(color: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> None:
    """Fill pixels of `color` (height, width, 3) that weigh nothing from a coarser grid, in place."""
    empty = weight == 0
    if not empty.any() or color.shape[:2] == (1, 1):
        return
    coarse, coarse_weight = _halved(color, weight)
    _push_pull(coarse, coarse_weight)
    ys, xs = np.nonzero(empty)
    color[ys, xs] = coarse[ys // 2, xs // 2]


def _color(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        raise ValueError(f"a colour is written #rrggbb, not {text!r}")
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


# --- Metadata -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metadata:
    """What is written beside the pixels. The colour profile is no part of it: results are always tagged sRGB."""

    exif: bytes | None = None
    """EXIF block, without the `Exif` prefix."""
    xmp: bytes | None = None
    dpi: float = 72.0


# `safe` is a list of what is kept, so that a tag nobody thought of is dropped: who made it, when, what of and how.
# Never in it: position (GPS), serial numbers, owner, unique ids, maker notes, comments, thumbnail.
_SAFE_TAGS = frozenset(
    int(tag)
    for tag in (
        ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.Software,
        ExifTags.Base.DateTime, ExifTags.Base.Artist, ExifTags.Base.Copyright, ExifTags.Base.XResolution,
        ExifTags.Base.YResolution, ExifTags.Base.ResolutionUnit,
    )
)  # fmt: skip
_SAFE_PHOTO_TAGS = frozenset(
    int(tag)
    for tag in (
        ExifTags.Base.ExifVersion, ExifTags.Base.DateTimeOriginal, ExifTags.Base.DateTimeDigitized,
        ExifTags.Base.OffsetTime, ExifTags.Base.OffsetTimeOriginal, ExifTags.Base.OffsetTimeDigitized,
        ExifTags.Base.SubsecTime, ExifTags.Base.SubsecTimeOriginal, ExifTags.Base.SubsecTimeDigitized,
        ExifTags.Base.ExposureTime, ExifTags.Base.FNumber, ExifTags.Base.ExposureProgram,
        ExifTags.Base.ISOSpeedRatings, ExifTags.Base.ShutterSpeedValue, ExifTags.Base.ApertureValue,
        ExifTags.Base.ExposureBiasValue, ExifTags.Base.MeteringMode, ExifTags.Base.LightSource, ExifTags.Base.Flash,
        ExifTags.Base.FocalLength, ExifTags.Base.FocalLengthIn35mmFilm, ExifTags.Base.WhiteBalance,
        ExifTags.Base.LensMake, ExifTags.Base.LensModel,
    )
)  # fmt: skip
# Tags of a TIFF that say how its pixels lie in the file, or hold other blocks: no part of its EXIF.
_TIFF_TAGS_OF_STORAGE = frozenset((
    254, 255, 256, 257, 258, 259, 262, 263, 266, 273, 277, 278, 279, 280, 281, 284, 288, 289, 290, 291, 292, 293, 297,
    301, 317, 318, 319, 320, 321, 322, 323, 324, 325, 330, 332, 333, 334, 336, 338, 339, 340, 341, 342, 347, 512, 513,
    514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 700, 33723, 34377, 34675, 37724, 50341,
))  # fmt: skip


def metadata_for_result(
    picture: Picture, policy: Literal["safe", "keep", "strip"], width: int, height: int
) -> Metadata:
    """What goes into a result of `width` x `height` px. Orientation is 1 and the pixel dimensions are the result's.

    `strip`: nothing. `keep`: all EXIF but the thumbnail, and XMP. `safe`: only tags known to be harmless; no XMP,
    which may hold positions and serial numbers anywhere. An EXIF block that cannot be read is dropped.
    """
    source = picture.metadata
    if policy == "strip":
        return Metadata()
    exif = None
    if source.exif is not None:
        try:
            exif = _exif_for_result(source.exif, policy == "keep", width, height)
        except pillow_raises():
            exif = None
    xmp = _xmp_for_result(source.xmp, width, height) if source.xmp and policy == "keep" else None
    return Metadata(exif, xmp, source.dpi or Metadata.dpi)


def _exif_for_result(source: bytes, keep: bool, width: int, height: int) -> bytes | None:
    exif = Image.Exif()
    exif.load(b"Exif\0\0" + source)
    photo = exif.get_ifd(ExifTags.IFD.Exif)
    kept = Image.Exif()
    kept.endian = exif.endian
    for tag, value in exif.items():
        if tag not in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo) and (keep or tag in _SAFE_TAGS):
            kept[tag] = value
    kept_photo = {tag: value for tag, value in photo.items() if keep or tag in _SAFE_PHOTO_TAGS}
    if not kept and not kept_photo:
        return None
    kept[ORIENTATION_TAG] = 1
    kept_photo[int(ExifTags.Base.ColorSpace)] = 1
    kept_photo[int(ExifTags.Base.ExifImageWidth)] = width
    kept_photo[int(ExifTags.Base.ExifImageHeight)] = height
    kept[int(ExifTags.IFD.Exif)] = kept_photo
    if keep and (position := exif.get_ifd(ExifTags.IFD.GPSInfo)):
        kept[int(ExifTags.IFD.GPSInfo)] = position
    return kept.tobytes().removeprefix(b"Exif\0\0")


def _xmp_for_result(xmp: bytes, width: int, height: int) -> bytes:
    """The packet with orientation and dimensions set right, as attributes or as elements."""
    for name, value in (
        (rb"tiff:Orientation", 1),
        (rb"tiff:ImageWidth", width),
        (rb"tiff:ImageLength", height),
        (rb"exif:PixelXDimension", width),
        (rb"exif:PixelYDimension", height),
    ):
        number = str(value).encode()
        xmp = re.sub(name + rb'="\d+"', name + b'="' + number + b'"', xmp)
        xmp = re.sub(rb"<" + name + rb">\s*\d+\s*<", b"<" + name + b">" + number + b"<", xmp)
    return xmp


def _metadata_of(image: Image.Image) -> SourceMetadata:
    """What a picture opened by Pillow says of itself. Raises nothing: metadata is no reason to refuse a picture."""
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if isinstance(xmp, str):
        xmp = xmp.encode()
    try:
        dpi: float | None = float(image.info["dpi"][0])
        # Also false for NaN, which is what 0/0 in a file becomes.
        if dpi is None or not 1 <= dpi <= 100_000:
            dpi = None
    except pillow_raises():
        dpi = None
    is_tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    try:
        exif = Image.Image.getexif(image)
        photo = exif.get_ifd(ExifTags.IFD.Exif)
        position = exif.get_ifd(ExifTags.IFD.GPSInfo)
        copied = Image.Exif()
        copied.endian = exif.endian
        for tag, value in exif.items():
            if tag not in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ORIENTATION_TAG) and not (
                is_tiff and tag in _TIFF_TAGS_OF_STORAGE
            ):
                copied[tag] = value
        if photo:
            copied[int(ExifTags.IFD.Exif)] = photo
        if position:
            copied[int(ExifTags.IFD.GPSInfo)] = position
        block = copied.tobytes().removeprefix(b"Exif\0\0") if len(copied) else None
    except pillow_raises():
        return SourceMetadata(None, xmp, dpi, is_broken=True)
    return SourceMetadata(block, xmp, dpi)


def _xmp_of_exif(exif: bytes) -> bytes | None:
    """Who, what, when and whose in XMP (ISO 16684-1), for TIFF, where libvips writes no EXIF."""
    source = Image.Exif()
    source.load(b"Exif\0\0" + exif)
    photo = source.get_ifd(ExifTags.IFD.Exif)

    def text(value: object) -> str:
        return escape(str(value).strip("\0 "))

    fields = []
    if value := source.get(ExifTags.Base.Artist):
        fields.append(f"<dc:creator><rdf:Seq><rdf:li>{text(value)}</rdf:li></rdf:Seq></dc:creator>")
    for tag, name in ((ExifTags.Base.Copyright, "dc:rights"), (ExifTags.Base.ImageDescription, "dc:description")):
        if value := source.get(tag):
            alternative = f'<rdf:Alt><rdf:li xml:lang="x-default">{text(value)}</rdf:li></rdf:Alt>'
            fields.append(f"<{name}>{alternative}</{name}>")
    taken = photo.get(ExifTags.Base.DateTimeOriginal) or source.get(ExifTags.Base.DateTime)
    if taken and re.fullmatch(r"\d{4}:\d\d:\d\d \d\d:\d\d:\d\d", text(taken)):
        date = text(taken).replace(":", "-", 2).replace(" ", "T")
        fields.append(f"<xmp:CreateDate>{date}</xmp:CreateDate>")
    for tag, name in ((ExifTags.Base.Make, "tiff:Make"), (ExifTags.Base.Model, "tiff:Model")):
        if value := source.get(tag):
            fields.append(f"<{name}>{text(value)}</{name}>")
    if not fields:
        return None
    return (
        '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
        ' xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
        f' xmlns:tiff="http://ns.adobe.com/tiff/1.0/">{"".join(fields)}</rdf:Description></rdf:RDF></x:xmpmeta>'
        '<?xpacket end="w"?>'
    ).encode()


# --- Pictures out ---------------------------------------------------------------------------------------------------


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
            is_fed = _is_fed_to_libwebp(format, has_alpha=has_alpha, lossless=lossless)
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
    without transparency at its YUV, which is filled as rows come (`worker.webp`), and of all else of theirs libvips
    holds the rows, once (at most 268 megapixels by their limits). The file appears under its name when it is complete.
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
            if _is_fed_to_libwebp(format, has_alpha=channels in (2, 4), lossless=lossless):
                beside = _webp_chunks(width, height, metadata)
                self._sink = webp.Sink(self._partial, width, height, quality=quality, chunks=beside)
            else:
                options = _save_options(format, quality, lossless, width * channels * (bits // 8), height)
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
            image, keep = _tagged(image, self._format, self._is_gray, metadata)
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


def _is_fed_to_libwebp(format: str, *, has_alpha: bool, lossless: bool) -> bool:
    """Whether a picture's rows go to libwebp as they come, and not to libvips, which would hold them."""
    return format == "webp" and not has_alpha and not lossless and webp.is_available()


def _webp_chunks(width: int, height: int, metadata: Metadata) -> dict[bytes, bytes]:
    """What libvips writes beside the pixels of a WebP, by the names of its chunks: from a file of one px."""
    px, keep = _tagged(pyvips.Image.black(1, 1, bands=3).copy(interpretation="srgb"), "webp", False, metadata)
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


def _save_options(format: str, quality: int, lossless: bool, row_bytes: int, height: int) -> tuple[str, dict[str, Any]]:
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


def _tagged(image: pyvips.Image, format: str, is_gray: bool, metadata: Metadata) -> tuple[pyvips.Image, str]:
    """The picture with its profile, metadata and resolution set, and which of them are to be written.

    Where an EXIF block is to be written libvips makes one up if need be; for JPEG that is the only place it has for
    the resolution.
    """
    exif, xmp = metadata.exif, metadata.xmp
    px_per_mm = metadata.dpi / 25.4
    image = image.copy(xres=px_per_mm, yres=px_per_mm)
    holds_gray = format_named(format).holds_gray
    image.set_type(
        pyvips.GValue.blob_type, "icc-profile-data", _gray_profile() if is_gray and holds_gray else _srgb_profile()
    )
    if format == "tiff" and exif is not None:
        xmp = xmp or _xmp_of_exif(exif)
        exif = None
    keep = {"icc"} | ({"exif"} if format == "jpeg" else set())
    if exif is not None:
        image.set_type(pyvips.GValue.blob_type, "exif-data", b"Exif\0\0" + exif)
        keep.add("exif")
    if xmp is not None:
        image.set_type(pyvips.GValue.blob_type, "xmp-data", xmp)
        keep.add("xmp")
    return image, ":".join(sorted(keep))


def exif_of_size(exif: bytes, width: int, height: int) -> bytes:
    """The EXIF block, without its prefix, with the dimensions set right where they stand: libvips has written those of
    a file of one px."""
    order = "<" if exif[:2] == b"II" else ">"
    sizes = {int(ExifTags.Base.ExifImageWidth): width, int(ExifTags.Base.ExifImageHeight): height}
    patched = bytearray(exif)
    directories = [struct.unpack_from(f"{order}I", exif, 4)[0]]
    while directories:
        start = directories.pop()
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == ExifTags.IFD.Exif:
                directories += struct.unpack_from(f"{order}I", exif, entry + 8)
            elif tag in sizes:
                struct.pack_into(order + {3: "H", 4: "I"}[kind], patched, entry + 8, sizes[tag])
    return bytes(patched)


# Little CMS stamps the profiles it makes with the time; the same picture shall give the same bytes.
_PROFILE_DATE = struct.pack(">6H", 2026, 1, 1, 0, 0, 0)


def _srgb_profile() -> bytes:
    """sRGB (IEC 61966-2-1), as Little CMS makes it: 600 bytes."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + _PROFILE_DATE + profile[36:]


def _gray_profile() -> bytes:
    """Gray with the curve of sRGB (ICC.1:2010), 380 bytes: a profile for three channels does not fit a gray file."""

    def text(kind: bytes, value: str) -> bytes:
        encoded = value.encode("utf-16-be")
        return kind + struct.pack(">4xII2s2sII", 1, 12, b"en", b"US", len(encoded), 28) + encoded

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    # D50, to which profiles refer; the curve is parametric type 3: (a x + b)^g above d, c x below.
    tags = {
        b"desc": text(b"mluc", "sRGB gray"),
        b"cprt": text(b"mluc", "CC0"),
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249),
        b"kTRC": b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045),
    }
    offset = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", offset + len(data), len(content))
        data += content + b"\0" * (-len(content) % 4)
    header = struct.pack(
        ">I4xI4s4s4s12s4s24xI", offset + len(data), 0x04300000, b"mntr", b"GRAY", b"XYZ ", _PROFILE_DATE, b"acsp", 0
    )
    header = header[:68] + fixed(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + table + data


# --- Results in another form ----------------------------------------------------------------------------------------


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
    """A picture that this module has written, in another format. Returns the size of `target` in bytes.

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
            image = image.flatten(background=[level * top / 255 for level in _color(background)])
        is_gray = image.interpretation in ("b-w", "grey16")
        if (is_gray and not holds.holds_gray) or (image.format == "ushort" and not holds.holds_16_bit):
            is_gray = is_gray and holds.holds_gray
            image = image.colourspace("b-w" if is_gray else "srgb")
        if _is_fed_to_libwebp(format, has_alpha=image.hasalpha(), lossless=lossless):
            return _through_encoder(image, target, format, quality)
        profile = _gray_profile() if is_gray else _srgb_profile()
        image = image.copy()
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
        row_bytes = image.width * image.bands * (2 if image.format == "ushort" else 1)
        operation, arguments = _save_options(format, quality, lossless, row_bytes, image.height)
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
