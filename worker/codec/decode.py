"""Pictures in: every odd kind of file becomes upright sRGB samples, with straight alpha apart.

What a file says is kept or refused, never guessed: orientation is applied once, colours are converted by their
profile, 16 bits are known by the file's depth and not by its greatest value, gray stays gray, alpha stays alpha.
Whatever had to be left behind is said in `Picture.warnings`, in words for the customer.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
import pyvips
from PIL import Image, ImageCms, TiffImagePlugin

from shared.errors import InvalidImage, TooManyPixels
from shared.pictures import PictureFacts, format_named, inspect, orientation_of, refusing_what_pillow_refuses
from worker.codec import Samples
from worker.codec.color import bleed, in_srgb, parse_color
from worker.codec.metadata import SourceMetadata, source_metadata


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
    rgb, is_gray, color_warnings = in_srgb(raw.color, raw.icc_profile)
    alpha, constant_alpha = raw.alpha, None
    if alpha is not None:
        lowest, highest = int(alpha.min()), int(alpha.max())
        if lowest == highest:
            alpha, constant_alpha = None, lowest
        elif lowest == 0:
            bleed(rgb, alpha)
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
    color = parse_color(background)
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
    metadata = source_metadata(opened)
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
    metadata = source_metadata(image)
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
