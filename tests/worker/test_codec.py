"""Every kind of picture comes in right, goes out right, or is refused in words. References are made by code here."""

from __future__ import annotations

import csv
import io
import re
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import pyvips
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageOps
from PIL.TiffImagePlugin import IFDRational

from shared.errors import InternalError, InvalidImage, TooManyPixels, UnsupportedFormat, UploadRejected
from shared.pictures import FORMATS, ORIENTATION_TAG, format_named
from worker import codec
from worker.codec import Picture, decode, open_encoder

Array = npt.NDArray[Any]
ROOT = Path(__file__).parents[2]


def read(content: bytes, max_input_px: int = 50_000_000) -> Picture:
    return decode(io.BytesIO(content), max_input_px=max_input_px)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def photograph(height: int, width: int, channels: int = 3, seed: int = 1) -> Array:
    """(height, width, channels) uint8: smooth colour with some texture, as codecs expect; different in every corner."""
    chance = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = [
        110 + 80 * np.sin(x / (9 + c) + c) * np.cos(y / (11 + c)) + 0.3 * (x + y) / (1 + c) for c in range(channels)
    ]
    return np.clip(np.stack(planes, axis=-1) + chance.normal(0, 2, (height, width, 1)), 0, 255).astype(np.uint8)


def png(samples: Array, kind: int, bits: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand: `samples` (height, width, channels) are packed as they are; bits below 8 for one channel."""
    height, width = samples.shape[:2]
    if bits == 16:
        rows = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    elif bits == 8:
        rows = samples.reshape(height, -1)
    else:
        digits = np.unpackbits(samples.reshape(height, width, 1).astype(np.uint8), axis=2)[..., 8 - bits :]
        rows = np.packbits(digits.reshape(height, -1), axis=1)
    data = zlib.compress(np.insert(rows, 0, 0, axis=1).tobytes())
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    every = ((b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in every
    )


def tiff(samples: Array, interpretation: str = "rgb16", **options: Any) -> bytes:
    """A TIFF by libvips, for what Pillow does not write."""
    height, width, channels = samples.shape
    names = {"uint8": "uchar", "uint16": "ushort", "int16": "short", "float32": "float"}
    image = pyvips.Image.new_from_memory(samples.tobytes(), width, height, channels, names[str(samples.dtype)])
    return bytes(image.copy(interpretation=interpretation).tiffsave_buffer(**options))


def psnr(a: Array, b: Array, top: int = 255) -> float:
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(top**2 / error))


def assert_same(found: Array, expected: Array, tolerance: int = 0) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    difference = np.abs(found.astype(np.int64) - expected.astype(np.int64))
    where = np.unravel_index(int(difference.argmax()), difference.shape)
    assert difference.max() <= tolerance, f"max {difference.max()} mean {difference.mean():.4f} at {where}"


def three(gray: Array) -> Array:
    return np.repeat(gray[..., None], 3, axis=2)


def encode(
    path: Path, format: str, samples: Array, rows: int = 7, metadata: codec.Metadata | None = None, **options: Any
) -> bytes:
    height, width, channels = samples.shape
    bits = samples.dtype.itemsize * 8
    with open_encoder(
        path, format, width, height, channels=channels, bits=bits, metadata=metadata, **options
    ) as encoder:
        for top in range(0, height, rows):
            encoder.write(samples[top : top + rows])
        size = encoder.close()
    content = path.read_bytes()
    assert len(content) == size
    return content


# --- Kinds of pixels ------------------------------------------------------------------------------------------------

RGB = photograph(13, 17)
GRAY = RGB[..., 0]
ALPHA = np.linspace(1, 255, 13 * 17).astype(np.uint8).reshape(13, 17)


def test_rgb_is_read_as_it_is() -> None:
    picture = read(saved(Image.fromarray(RGB), "PNG"))
    assert_same(picture.rgb, RGB)
    assert (picture.width, picture.height, picture.bits, picture.format) == (17, 13, 8, "png")
    assert (picture.is_gray, picture.has_alpha, picture.warnings) == (False, False, ())
    assert picture.rgb.flags.c_contiguous
    assert picture.rgb.flags.writeable


def test_gray_stays_gray() -> None:
    picture = read(saved(Image.fromarray(GRAY), "JPEG", quality=100))
    assert picture.is_gray
    assert_same(picture.rgb, three(GRAY), 2)


def test_bilevel_is_black_and_white_gray() -> None:
    levels = (GRAY > 110).astype(np.uint8) * 255
    for format in ("PNG", "TIFF", "BMP"):
        picture = read(saved(Image.fromarray(levels).convert("1"), format))
        assert_same(picture.rgb, three(levels))
        # BMP has no bilevel gray, only a palette; this one is black and white.
        assert picture.is_gray


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_kept_beside_the_colours(format: str) -> None:
    image = Image.fromarray(np.dstack([RGB, ALPHA]))
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    picture = read(saved(image, format, **options))
    assert picture.alpha is not None
    assert_same(picture.rgb, RGB)
    assert_same(picture.alpha, ALPHA)


def test_gray_with_alpha_is_both() -> None:
    picture = read(saved(Image.fromarray(np.dstack([GRAY, ALPHA]), "LA"), "PNG"))
    assert picture.is_gray
    assert picture.alpha is not None
    assert_same(picture.rgb, three(GRAY))
    assert_same(picture.alpha, ALPHA)


def test_a_palette_gives_its_colours() -> None:
    image = Image.fromarray(RGB).quantize(32)
    picture = read(saved(image, "PNG"))
    assert not picture.is_gray
    assert_same(picture.rgb, np.array(image.convert("RGB")))


def test_a_palette_of_grays_is_gray() -> None:
    image = Image.fromarray(GRAY // 64, "P")
    image.putpalette(bytes(value for level in (0, 80, 160, 240) for value in (level, level, level)))
    picture = read(saved(image, "PNG"))
    assert picture.is_gray
    assert_same(picture.rgb, three(GRAY // 64 * 80))


def test_a_palette_keeps_its_transparency() -> None:
    indexes = (GRAY // 64).astype(np.uint8)
    palette = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    picture = read(png(indexes[..., None], 3, 8, (b"PLTE", palette), (b"tRNS", bytes([10, 255, 128, 77]))))
    assert picture.alpha is not None
    assert_same(picture.alpha, np.array([10, 255, 128, 77], np.uint8)[indexes])
    assert_same(picture.rgb, np.frombuffer(palette, np.uint8).reshape(4, 3)[indexes])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_gray_level_is_that_level_at_every_depth(bits: int) -> None:
    top = (1 << bits) - 1
    levels = GRAY >> (8 - bits)
    transparent = int(levels[3, 5])
    picture = read(png(levels[..., None], 0, bits, (b"tRNS", struct.pack(">H", transparent))))
    assert picture.is_gray
    assert picture.alpha is not None
    assert_same(picture.alpha, np.where(levels == transparent, 0, 255).astype(np.uint8))
    visible = levels != transparent
    assert_same(picture.rgb[visible], three(levels * np.uint8(255 // top))[visible])


def test_a_transparent_colour_is_transparent() -> None:
    color = tuple(int(value) for value in RGB[2, 2])
    picture = read(png(RGB, 2, 8, (b"tRNS", struct.pack(">3H", *color))))
    assert picture.alpha is not None
    assert_same(picture.alpha, np.where(np.equal(RGB, color).all(axis=2), 0, 255).astype(np.uint8))


def test_cmyk_without_profile_is_converted_by_the_plain_formula_and_says_so() -> None:
    inks = np.zeros((16, 64, 4), np.uint8)
    for i, ink in enumerate([(255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 128), (0, 0, 0, 0)]):
        inks[:, i * 16 : i * 16 + 16] = ink
    expected = np.array([(0, 255, 255), (255, 0, 0), (127, 127, 127), (255, 255, 255)], np.uint8)
    for format, options in (("TIFF", {}), ("JPEG", {"quality": 100})):
        picture = read(saved(Image.fromarray(inks, "CMYK"), format, **options))
        assert_same(picture.rgb[8, 8::16], expected, 2)
        assert any("CMYK" in warning for warning in picture.warnings)


def test_cmyk_is_converted_by_its_profile() -> None:
    profile = bytes(pyvips.Operation.call("profile_load", "cmyk"))
    inks = np.zeros((8, 8, 4), np.uint8)
    inks[..., 0] = 255
    picture = read(saved(Image.fromarray(inks, "CMYK"), "TIFF", icc_profile=profile))
    red, green, blue = (int(value) for value in picture.rgb[4, 4])
    # Real cyan ink is a darker, bluer colour than the screen's (0, 255, 255).
    assert red < 60
    assert 120 < green < 200
    assert blue > 200
    assert picture.warnings == ()


def test_lab_is_converted() -> None:
    lab = np.zeros((4, 4, 3), np.uint8)
    lab[...] = (136, 81, 70)
    picture = read(saved(Image.fromarray(lab, "LAB"), "TIFF"))
    # L* 53.3, a* 81, b* 70 is close to sRGB red (CIE 15, D50).
    assert picture.rgb[1, 1, 0] > 245
    assert picture.rgb[1, 1, 1:].max() < 40


def test_ycbcr_tiff_is_converted() -> None:
    ycbcr = Image.fromarray(photograph(32, 32)).convert("YCbCr")
    assert_same(read(saved(ycbcr, "TIFF")).rgb, np.array(ycbcr.convert("RGB")), 1)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_samples_without_black_and_white_are_refused(mode: str) -> None:
    with pytest.raises(InvalidImage, match="black and white"):
        read(saved(Image.new(mode, (4, 4)), "TIFF"))


def test_signed_16_bit_samples_are_refused() -> None:
    signed = Image.fromarray(photograph(8, 8)[..., 0].astype(np.int32) - 100, "I")
    content = saved(signed, "TIFF").replace(struct.pack("<HHII", 258, 3, 1, 32), struct.pack("<HHII", 258, 3, 1, 16))
    with pytest.raises(InvalidImage, match="black and white"):
        read(content)


# --- 16 bits --------------------------------------------------------------------------------------------------------

DEEP = photograph(13, 17, 4).astype(np.uint16) * 257 - np.arange(17, dtype=np.uint16)[None, :, None] - 20


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (4, 2), (2, 3), (6, 4)])
def test_16_bit_png_keeps_every_bit(kind: int, channels: int) -> None:
    picture = read(png(DEEP[..., :channels], kind, 16))
    color = DEEP[..., :3] if channels >= 3 else three(DEEP[..., 0])
    assert picture.bits == 16
    assert picture.is_gray == (channels <= 2)
    assert_same(picture.rgb, color)
    if channels in (2, 4):
        assert picture.alpha is not None
        assert_same(picture.alpha, DEEP[..., channels - 1])


@pytest.mark.parametrize("compression", ["none", "deflate", "lzw"])
def test_16_bit_tiff_keeps_every_bit(compression: str) -> None:
    assert_same(read(tiff(DEEP[..., :3].copy(), compression=compression)).rgb, DEEP[..., :3])
    gray = read(tiff(DEEP[..., :1].copy(), "grey16", compression=compression))
    assert gray.is_gray
    assert_same(gray.rgb, three(DEEP[..., 0]))


def test_16_bit_gray_of_both_byte_orders_is_read() -> None:
    for mode in ("I;16", "I;16B"):
        image = Image.frombytes(mode, (17, 13), DEEP[..., 0].astype("<u2" if mode == "I;16" else ">u2").tobytes())
        assert_same(read(saved(image, "TIFF")).rgb, three(DEEP[..., 0]))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_dark_16_bit_picture_stays_dark(channels: int) -> None:
    # Its greatest value would fit 8 bits; only the depth of the file says that it is nearly black.
    dark = (DEEP[..., :channels] % 200).copy()
    for content in (png(dark, {1: 0, 3: 2}[channels], 16), tiff(dark, {1: "grey16", 3: "rgb16"}[channels])):
        picture = read(content)
        assert picture.bits == 16
        assert int(picture.rgb.max()) < 200


def test_a_transparent_16_bit_level_is_transparent() -> None:
    level = int(DEEP[4, 4, 0])
    picture = read(png(DEEP[..., :1], 0, 16, (b"tRNS", struct.pack(">H", level))))
    assert picture.alpha is not None
    assert_same(picture.alpha, np.where(DEEP[..., 0] == level, 0, 65535).astype(np.uint16))


def test_16_bit_colours_are_converted_by_their_profile() -> None:
    picture = read(png(DEEP[..., :3], 2, 16, (b"iCCP", b"swapped\0\0" + zlib.compress(swapped_profile()))))
    assert picture.bits == 16
    assert_same(picture.rgb, DEEP[..., 2::-1], 40)


# --- Orientation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_orientation_is_applied_exactly_once(format: str, orientation: int) -> None:
    stored = Image.fromarray(photograph(24, 40))
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    picture = read(saved(stored, format, exif=exif))
    reference = stored.copy()
    reference.getexif()[ORIENTATION_TAG] = orientation
    shown = np.array(ImageOps.exif_transpose(reference))
    assert picture.rgb.shape == shown.shape
    assert psnr(picture.rgb, shown) > 25
    result = codec.metadata_for_result(picture, "keep", picture.width, picture.height)
    if result.exif is not None:
        assert orientation_in(result.exif) == 1


def orientation_in(block: bytes) -> int:
    exif = Image.Exif()
    exif.load(b"Exif\0\0" + block)
    return int(exif.get(ORIENTATION_TAG, 1))


@pytest.mark.parametrize("orientation", [3, 6])
def test_orientation_of_16_bit_pictures_is_applied_with_their_alpha(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    chunk = (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    picture = read(png(DEEP, 6, 16, chunk))
    turns = {3: 2, 6: -1}[orientation]
    assert_same(picture.rgb, np.ascontiguousarray(np.rot90(DEEP[..., :3], turns)))
    assert picture.alpha is not None
    assert_same(picture.alpha, np.ascontiguousarray(np.rot90(DEEP[..., 3], turns)))


# --- Colour profiles ------------------------------------------------------------------------------------------------


def swapped_profile() -> bytes:
    """sRGB with the colorants of red and blue exchanged: whoever converts, exchanges the channels."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


def test_colours_are_converted_by_their_profile() -> None:
    picture = read(saved(Image.fromarray(RGB), "PNG", icc_profile=swapped_profile()))
    assert_same(picture.rgb, np.ascontiguousarray(RGB[..., ::-1]), 1)
    assert picture.icc_profile == swapped_profile()
    assert picture.warnings == ()


def test_alpha_is_not_converted_with_the_colours() -> None:
    image = Image.fromarray(np.dstack([RGB, ALPHA]))
    picture = read(saved(image, "PNG", icc_profile=swapped_profile()))
    assert picture.alpha is not None
    assert_same(picture.alpha, ALPHA)
    assert_same(picture.rgb, np.ascontiguousarray(RGB[..., ::-1]), 1)


def test_a_profile_that_is_srgb_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert_same(read(saved(Image.fromarray(RGB), "PNG", icc_profile=profile)).rgb, RGB)


def test_gray_goes_through_a_gray_profile_and_stays_gray() -> None:
    # The same curve but for its exponent, 1 in place of 2.4.
    profile = codec._gray_profile().replace(struct.pack(">i", round(2.4 * 65536)), struct.pack(">i", 65536))
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = read(saved(Image.fromarray(levels), "PNG", icc_profile=profile))
    x = levels / 255
    linear = np.where(x >= 0.04045, (x + 0.055) / 1.055, x / 12.92)
    shown = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert picture.is_gray
    # Steps of the curve near black are coarse: the profile's own table is interpolated there.
    assert_same(picture.rgb[1:], three(np.rint(shown * 255).astype(np.uint8))[1:], 2)
    deep = read(png(levels.astype(np.uint16)[..., None] * 257, 0, 16, (b"iCCP", b"g\0\0" + zlib.compress(profile))))
    assert_same(deep.rgb[1:], three(np.rint(shown * 65535).astype(np.uint16))[1:], 400)


def test_gray_under_a_profile_for_colour_stays_gray() -> None:
    picture = read(saved(Image.fromarray(GRAY), "JPEG", quality=100, icc_profile=swapped_profile()))
    assert picture.is_gray
    assert_same(picture.rgb, three(GRAY), 3)


@pytest.mark.parametrize(
    "profile", [b"no profile at all", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()[:300]]
)
def test_a_broken_profile_is_ignored_with_a_warning(profile: bytes) -> None:
    picture = read(saved(Image.fromarray(RGB), "PNG", icc_profile=profile))
    assert_same(picture.rgb, RGB)
    assert any("profile" in warning for warning in picture.warnings)


def test_a_profile_for_other_channels_is_ignored_with_a_warning() -> None:
    for content in (
        saved(Image.fromarray(RGB), "PNG", icc_profile=bytes(pyvips.Operation.call("profile_load", "cmyk"))),
        saved(Image.fromarray(RGB), "PNG", icc_profile=codec._gray_profile()),
    ):
        picture = read(content)
        assert_same(picture.rgb, RGB)
        assert any("profile" in warning for warning in picture.warnings)


# --- Frames, broken files, limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "word"), [("GIF", "animated"), ("PNG", "animated"), ("WEBP", "animated"), ("TIFF", "pages")]
)
def test_of_several_frames_the_first_is_taken_with_a_warning(format: str, word: str) -> None:
    red, blue = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    options = {"lossless": True} if format == "WEBP" else {}
    picture = read(saved(red, format, save_all=True, append_images=[blue], **options))
    assert tuple(picture.rgb[8, 8]) == (255, 0, 0)
    assert len(picture.warnings) == 1
    assert word in picture.warnings[0]


@pytest.mark.parametrize("format", [format.pillow_names[0] for format in FORMATS])
def test_a_file_cut_short_is_refused(format: str) -> None:
    whole = saved(Image.fromarray(photograph(64, 64)), format)
    for kept in (0.5, 0.9):
        with pytest.raises(InvalidImage):
            read(whole[: int(len(whole) * kept)])


@pytest.mark.parametrize("content", [png(DEEP, 6, 16), tiff(DEEP[..., :3].copy(), compression="deflate")])
def test_a_16_bit_file_cut_short_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidImage):
        read(content[: int(len(content) * 0.7)])


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    idat = b"IDAT" + zlib.compress(bytes(1000))
    content += struct.pack(">I", len(idat) - 4) + idat + struct.pack(">I", zlib.crc32(idat))
    with pytest.raises(TooManyPixels) as refused:
        read(content)
    assert refused.value.facts["width_px"] == 100_000


def test_something_else_is_an_unsupported_format() -> None:
    with pytest.raises(UnsupportedFormat):
        read(b"%PDF-1.7")


def test_garbage_behind_the_picture_is_ignored() -> None:
    assert_same(read(saved(Image.fromarray(RGB), "PNG") + b"garbage" * 100).rgb, RGB)


# --- Alpha ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 128, 255])
def test_constant_alpha_is_a_number_and_no_plane(level: int) -> None:
    picture = read(saved(Image.fromarray(np.dstack([RGB, np.full_like(GRAY, level)])), "PNG"))
    assert picture.alpha is None
    assert picture.constant_alpha == level
    assert picture.has_alpha
    plane = picture.alpha_plane()
    assert plane is not None
    assert_same(plane, np.full_like(GRAY, level))
    assert_same(picture.rgb, RGB)


def disc(size: int, dtype: type = np.uint8) -> tuple[Array, Array]:
    """(rgb, alpha) of an orange disc with a soft edge; black where it is fully transparent."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    coverage = np.clip(size / 3 - np.hypot(x, y) + 0.5, 0, 1)
    top = np.iinfo(dtype).max
    alpha = np.rint(coverage * top).astype(dtype)
    rgb: Array = np.zeros((size, size, 3), dtype)
    rgb[alpha > 0] = np.array([240, 140, 20]) * (top // 255)
    return rgb, alpha


@pytest.mark.parametrize("size", [2, 7, 64, 601])
def test_visible_colours_run_on_under_transparency(size: int) -> None:
    rgb, alpha = disc(size)
    picture = read(saved(Image.fromarray(np.dstack([rgb, alpha])), "PNG"))
    assert_same(picture.rgb[alpha > 0], rgb[alpha > 0])
    # One colour is visible, so it is everywhere.
    assert_same(picture.rgb, np.broadcast_to(np.array([240, 140, 20], np.uint8), rgb.shape), 1)


def test_16_bit_colours_run_on_as_well() -> None:
    rgb, alpha = disc(33, np.uint16)
    picture = read(png(np.dstack([rgb, alpha]), 6, 16))
    assert_same(picture.rgb, np.broadcast_to(np.array([240, 140, 20]) * 257, rgb.shape).astype(np.uint16), 2)


def test_colours_run_on_to_the_nearest_side() -> None:
    rgb = np.zeros((40, 40, 3), np.uint8)
    rgb[:, :5], rgb[:, -5:] = (255, 0, 0), (0, 0, 255)
    alpha = np.zeros((40, 40), np.uint8)
    alpha[:, :5] = alpha[:, -5:] = 255
    picture = read(saved(Image.fromarray(np.dstack([rgb, alpha])), "PNG"))
    assert tuple(picture.rgb[20, 5]) == (255, 0, 0)
    assert tuple(picture.rgb[20, 34]) == (0, 0, 255)


def test_enlarged_edges_have_no_dark_fringe() -> None:
    rgb, alpha = disc(64)
    picture = read(saved(Image.fromarray(np.dstack([rgb, alpha])), "PNG"))
    # A bicubic step stands for the network; laid on its own colour, the disc must vanish.
    enlarged, mask = (
        np.array(Image.fromarray(plane).resize((256, 256), Image.Resampling.BICUBIC)).astype(np.float64)
        for plane in (picture.rgb, alpha)
    )
    weight = mask[..., None] / 255
    laid = enlarged * weight + np.array([240, 140, 20]) * (1 - weight)
    assert np.abs(laid - np.array([240, 140, 20])).max() <= 1


def test_flattened_on_a_colour_it_is_blended_once() -> None:
    picture = read(saved(Image.fromarray(np.dstack([RGB, ALPHA])), "PNG"))
    flat = codec.flatten(picture, "#336699")
    weight = ALPHA[..., None] / 255
    assert_same(flat.rgb, np.rint(RGB * weight + np.array([0x33, 0x66, 0x99]) * (1 - weight)).astype(np.uint8), 1)
    assert not flat.has_alpha


def test_gray_flattened_on_gray_is_gray_and_on_a_colour_is_not() -> None:
    picture = read(png(np.dstack([DEEP[..., 0], DEEP[..., 1]]), 4, 16))
    assert codec.flatten(picture, "#ffffff").is_gray
    assert not codec.flatten(picture, "#ff0000").is_gray
    assert codec.flatten(picture, "#ffffff").bits == 16


def test_without_alpha_there_is_nothing_to_flatten() -> None:
    picture = read(saved(Image.fromarray(RGB), "PNG"))
    assert codec.flatten(picture, "#000000") is picture


@pytest.mark.parametrize("background", ["white", "#fff", "#12345g", "#1234567"])
def test_a_background_is_six_hexadecimal_digits(background: str) -> None:
    picture = read(saved(Image.fromarray(np.dstack([RGB, ALPHA])), "PNG"))
    with pytest.raises(ValueError, match="#rrggbb"):
        codec.flatten(picture, background)


# --- Samples of the network -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
def test_quantizing_every_level_gives_it_back(bits: int) -> None:
    top = (1 << bits) - 1
    levels = np.arange(top + 1)
    assert (codec.quantize((levels / top).astype(np.float32), bits) == levels).all()


def test_quantizing_rounds_and_clips() -> None:
    rows = np.array([[-1.0, 0.49 / 255, 0.51 / 255, 1.0, 7.0]], np.float32)
    assert codec.quantize(rows, 8).tolist() == [[0, 0, 1, 255, 255]]


def test_luma_of_gray_is_that_gray() -> None:
    gray = np.linspace(0, 1, 256, dtype=np.float32)
    assert np.abs(codec.luma(np.stack([gray] * 3, axis=-1)) - gray).max() < 1e-6
    assert codec.luma(np.array([0, 1, 0], np.float32)) == pytest.approx(0.587)


# --- Pictures out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "channels"),
    [
        (format.name, channels)
        for format in FORMATS
        for channels in (1, 2, 3, 4)
        if format.written and (format.holds_alpha or channels in (1, 3))
    ],
)
def test_what_is_written_is_read_again(tmp_path: Path, format: str, channels: int) -> None:
    holds = format_named(format)
    samples = photograph(61, 83, channels)
    content = encode(tmp_path / "a", format, samples)
    picture = read(content)
    assert picture.format == format
    assert picture.is_gray == (channels <= 2 and holds.holds_gray)
    color = samples[..., :3] if channels >= 3 else three(samples[..., 0])
    assert psnr(picture.rgb, color) >= (np.inf if holds.lossless == "always" else 38)
    if channels in (2, 4):
        assert picture.alpha is not None
        assert psnr(picture.alpha, samples[..., -1]) > 38


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("format", ["png", "tiff"])
def test_16_bits_are_written_as_they_are(tmp_path: Path, format: str, channels: int) -> None:
    samples = DEEP[..., [0, 3] if channels == 2 else slice(channels)]
    content = encode(tmp_path / "a", format, samples)
    if (format, channels) == ("tiff", 2):
        # Pillow opens no 16-bit gray TIFF with alpha, so we do not read what we, rightly, write.
        loaded = pyvips.Image.new_from_buffer(content, "")
        found = np.ndarray(buffer=loaded.write_to_memory(), dtype=np.uint16, shape=samples.shape)
        assert_same(found, np.ascontiguousarray(samples))
        return
    picture = read(content)
    assert_same(picture.rgb, DEEP[..., :3] if channels >= 3 else three(DEEP[..., 0]))
    if channels in (2, 4):
        assert picture.alpha is not None
        assert_same(picture.alpha, DEEP[..., 3])


@pytest.mark.parametrize("format", ["webp", "avif"])
def test_lossless_is_lossless(tmp_path: Path, format: str) -> None:
    samples = photograph(31, 29, 4)
    samples[:10, :10, 3] = 0
    content = encode(tmp_path / "a", format, samples, lossless=True)
    assert_same(np.array(Image.open(io.BytesIO(content)).convert("RGBA")), samples)


def test_less_quality_is_less_bytes(tmp_path: Path) -> None:
    samples = photograph(128, 128)
    for format in ("jpeg", "webp", "avif"):
        sizes = [len(encode(tmp_path / "a", format, samples, quality=quality)) for quality in (30, 70, 95)]
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[2] * 0.7


@pytest.mark.parametrize("format", [format.name for format in FORMATS if format.written])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 37), (37, 1), (2, 3)])
def test_the_smallest_pictures_are_written(tmp_path: Path, format: str, width: int, height: int) -> None:
    samples = np.full((height, width, 3), (10, 200, 90), np.uint8)
    picture = read(encode(tmp_path / "a", format, samples))
    assert_same(picture.rgb, samples, 0 if format_named(format).lossless == "always" else 4)


@settings(deadline=None)
@given(
    width=st.integers(1, 40),
    heights=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    channels=st.integers(1, 4),
    deep=st.booleans(),
)
def test_how_rows_are_cut_in_bands_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, width: int, heights: list[int], channels: int, deep: bool
) -> None:
    samples = np.random.default_rng(1).integers(
        0, 65536 if deep else 256, (sum(heights), width, channels), np.uint16 if deep else np.uint8
    )
    path = tmp_path_factory.mktemp("bands") / "a.png"
    with open_encoder(path, "png", width, sum(heights), channels=channels, bits=16 if deep else 8) as encoder:
        top = 0
        for height in heights:
            encoder.write(samples[top : top + height])
            top += height
    picture = pyvips.Image.pngload(str(path))
    found = np.ndarray(buffer=picture.write_to_memory(), dtype=samples.dtype, shape=samples.shape)
    assert_same(found, samples)


def test_one_channel_may_come_without_its_axis_and_views_may_be_strided(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with open_encoder(path, "png", 17, 13, channels=1) as encoder:
        encoder.write(RGB[:5, :, 0])
        encoder.write(RGB[5:, :, 0])
    assert_same(read(path.read_bytes()).rgb, three(GRAY))


@pytest.mark.parametrize("format", [format.name for format in FORMATS if format.written])
@pytest.mark.parametrize("channels", [1, 3])
def test_results_are_tagged_srgb(tmp_path: Path, format: str, channels: int) -> None:
    content = encode(tmp_path / "a", format, photograph(16, 16, channels))
    profile = Image.open(io.BytesIO(content)).info["icc_profile"]
    gray = channels == 1 and format_named(format).holds_gray
    assert profile[16:20] == (b"GRAY" if gray else b"RGB ")
    # And a reader that converts by it changes nothing.
    assert read(content).warnings == ()
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    ramp = ramp if gray else np.repeat(ramp, 3, axis=2)
    assert np.abs(codec._through_profile(ramp, profile).astype(int) - ramp).max() <= 1


def test_the_same_picture_gives_the_same_bytes(tmp_path: Path) -> None:
    for format in ("png", "jpeg", "webp", "tiff"):
        samples = photograph(40, 40)
        assert encode(tmp_path / "a", format, samples, rows=3) == encode(tmp_path / "b", format, samples, rows=40)


# --- Failures while writing -----------------------------------------------------------------------------------------


def encoding_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("encode-")]


@pytest.mark.parametrize("format", [format.name for format in FORMATS if format.written])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_an_error_in_the_middle_leaves_no_file_and_no_thread(tmp_path: Path, format: str, rows: int) -> None:
    def half_a_picture() -> None:
        with open_encoder(tmp_path / "a", format, 500, 600, channels=3) as encoder:
            encoder.write(photograph(rows, 500))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_a_picture()
    assert list(tmp_path.iterdir()) == []
    assert encoding_threads() == []


def test_missing_rows_are_an_error_and_leave_no_file(tmp_path: Path) -> None:
    encoder = open_encoder(tmp_path / "a.png", "png", 17, 14, channels=3)
    encoder.write(RGB)
    with pytest.raises(ValueError, match="13 of 14 rows"):
        encoder.close()
    assert list(tmp_path.iterdir()) == []
    assert encoding_threads() == []


@pytest.mark.parametrize("rows", [RGB, GRAY[..., None], RGB[:, :5], RGB.astype(np.uint16), RGB.astype(np.float32)])
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, rows: Array) -> None:
    with open_encoder(tmp_path / "a.png", "png", 17, 12, channels=3) as encoder:
        with pytest.raises(ValueError, match="rows are"):
            encoder.write(rows)
        encoder.abort()


@pytest.mark.parametrize(
    ("format", "width", "options", "words"),
    [
        ("gif", 9, {"channels": 3}, "not written"),
        ("webp", 16_384, {"channels": 3}, "px a side"),
        ("png", 0, {"channels": 3}, "px a side"),
        ("jpeg", 9, {"channels": 4}, "channels"),
        ("png", 9, {"channels": 5}, "channels"),
        ("jpeg", 9, {"channels": 3, "bits": 16}, "bits"),
        ("jpeg", 9, {"channels": 3, "lossless": True}, "lossless"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_anything_starts(
    tmp_path: Path, format: str, width: int, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        open_encoder(tmp_path / "a", format, width, 9, **options)
    assert encoding_threads() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", [format.name for format in FORMATS if format.written])
def test_a_failing_encoder_raises_and_never_blocks(tmp_path: Path, format: str) -> None:
    # The folder does not exist. More rows than a pipe holds: a writer nobody reads from would wait for ever.
    def write_all() -> None:
        with open_encoder(tmp_path / "missing" / "a", format, 1000, 3000, channels=3) as encoder:
            for _ in range(30):
                encoder.write(np.zeros((100, 1000, 3), np.uint8))

    with pytest.raises(InternalError) as failed:
        write_all()
    assert failed.value.facts == {"format": format}
    assert failed.value.__cause__ is not None
    assert encoding_threads() == []


FULL_DISK_SCRIPT = """
import resource, sys
from pathlib import Path
import numpy as np
from shared.errors import DiskFull
from worker.codec import open_encoder

# A limit on files stands for the full disk; Python has the signal ignored that goes with it.
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
noise = np.random.default_rng(1).integers(0, 256, (500, 500, 3), np.uint8)
try:
    with open_encoder(Path(sys.argv[1]), sys.argv[2], 500, 500, channels=3) as encoder:
        encoder.write(noise)
except DiskFull as error:
    print("refused", type(error.__cause__).__name__)
"""


@pytest.mark.parametrize("format", [format.name for format in FORMATS if format.written])
def test_a_full_disk_is_an_error_and_not_a_short_file(tmp_path: Path, format: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", FULL_DISK_SCRIPT, str(tmp_path / "a"), format],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    # libvips' own error, or the system's where libwebp is fed by us.
    assert found.stdout == ("refused OSError\n" if format == "webp" else "refused Error\n")
    assert list(tmp_path.iterdir()) == []


MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
import numpy as np
from worker.codec import open_encoder

width, height, path, format = 20_000, int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
row = (np.arange(width) // 9).astype(np.uint8)[None, :, None] * np.array([1, 2, 3], np.uint8)
band = row + np.arange(250, dtype=np.uint8)[:, None, None]
before = peak_mb()
with open_encoder(path, format, width, height, channels=3) as encoder:
    for _ in range(height // 250):
        encoder.write(band)
print(round(peak_mb() - before))
"""


@pytest.mark.parametrize(("format", "height"), [("png", 10_000), ("jpeg", 10_000), ("tiff", 2_500)])
def test_encoding_200_megapixels_takes_little_memory(tmp_path: Path, format: str, height: int) -> None:
    # 600 MB of samples pass through (150 MB of TIFF, which is slower).
    found = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(height), str(tmp_path / "a"), format],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert int(found.stdout) < 40, f"{found.stdout} MB more"
    with Image.open(tmp_path / "a", formats=format_named(format).pillow_names) as image:
        assert image.size == (20_000, height)


# --- Metadata -------------------------------------------------------------------------------------------------------

XMP = (
    b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:exif="http://ns.adobe.com/exif/1.0/" '
    b'tiff:Orientation="6" exif:GPSLatitude="48,51.5N"><exif:PixelXDimension>32</exif:PixelXDimension>'
    b'</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
SECRETS = (b"SERIAL-4711", b"LENS-4712", b"OWNER-4713", b"UNIQUE-4714", b"MAKER-4715", b"COMMENT-4716", b"48,51.5N")
PUBLIC = (b"Ann Example", b"(c) Ann Example", b"2024:05:06 07:08:09", b"A red barn")


def exif_of_a_camera() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "A red barn"
    exif[ExifTags.Base.Artist] = "Ann Example"
    exif[ExifTags.Base.Copyright] = "(c) Ann Example"
    exif[ExifTags.Base.DateTime] = "2024:05:06 07:08:10"
    exif[ExifTags.Base.Make] = "Maker"
    exif[ORIENTATION_TAG] = 6
    exif[ExifTags.IFD.Exif] = {
        int(ExifTags.Base.DateTimeOriginal): "2024:05:06 07:08:09",
        int(ExifTags.Base.ExposureTime): IFDRational(1, 250),
        int(ExifTags.Base.BodySerialNumber): "SERIAL-4711",
        int(ExifTags.Base.LensSerialNumber): "LENS-4712",
        int(ExifTags.Base.CameraOwnerName): "OWNER-4713",
        int(ExifTags.Base.ImageUniqueID): "UNIQUE-4714",
        int(ExifTags.Base.MakerNote): b"MAKER-4715",
        int(ExifTags.Base.UserComment): b"ASCII\0\0\0COMMENT-4716",
        int(ExifTags.Base.ExifImageWidth): 32,
        int(ExifTags.Base.ExifImageHeight): 16,
    }
    exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: (IFDRational(48), IFDRational(51), IFDRational(30))}
    return exif


def photo_of_a_camera() -> Picture:
    return read(saved(Image.fromarray(photograph(16, 32)), "JPEG", exif=exif_of_a_camera(), xmp=XMP, dpi=(300, 300)))


def written_with(policy: Literal["safe", "keep", "strip"], format: str, path: Path) -> bytes:
    picture = photo_of_a_camera()
    metadata = codec.metadata_for_result(picture, policy, 64, 128)
    return encode(path, format, photograph(128, 64), metadata=metadata)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "avif"])
def test_safe_keeps_the_author_and_drops_what_identifies(tmp_path: Path, format: str) -> None:
    content = written_with("safe", format, tmp_path / "a")
    assert all(word in content for word in PUBLIC)
    assert not any(word in content for word in SECRETS)
    exif = Image.open(io.BytesIO(content)).getexif()
    assert ExifTags.IFD.GPSInfo not in exif
    assert exif[ORIENTATION_TAG] == 1
    photo = exif.get_ifd(ExifTags.IFD.Exif)
    assert (photo[ExifTags.Base.ExifImageWidth], photo[ExifTags.Base.ExifImageHeight]) == (64, 128)
    assert photo[ExifTags.Base.ExposureTime] == pytest.approx(1 / 250)
    assert ExifTags.Base.MakerNote not in photo
    # Read again, it is not turned a second time.
    assert (read(content).width, read(content).height) == (64, 128)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "avif"])
def test_keep_keeps_all_but_orientation_and_size(tmp_path: Path, format: str) -> None:
    content = written_with("keep", format, tmp_path / "a")
    assert all(word in content for word in PUBLIC)
    assert all(word in content for word in SECRETS[:4])
    image = Image.open(io.BytesIO(content))
    exif = image.getexif()
    assert exif[ORIENTATION_TAG] == 1
    assert exif.get_ifd(ExifTags.IFD.GPSInfo)[2][0] == 48
    assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageWidth] == 64
    xmp = image.info["xmp"] if "xmp" in image.info else image.info["XML:com.adobe.xmp"].encode()
    assert b'tiff:Orientation="1"' in xmp
    assert b"<exif:PixelXDimension>64<" in xmp
    assert SECRETS[-1] in xmp
    assert (read(content).width, read(content).height) == (64, 128)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "tiff", "avif"])
def test_strip_keeps_nothing(tmp_path: Path, format: str) -> None:
    content = written_with("strip", format, tmp_path / "a")
    assert not any(word in content for word in (*SECRETS, *PUBLIC[:2]))


def test_tiff_carries_the_author_as_xmp(tmp_path: Path) -> None:
    content = written_with("safe", "tiff", tmp_path / "a")
    assert all(
        word in content for word in (b"<rdf:li>Ann Example</rdf:li>", b"(c) Ann Example", b"2024-05-06T07:08:09")
    )
    assert not any(word in content for word in SECRETS)


def test_metadata_of_a_tiff_is_kept_without_its_layout(tmp_path: Path) -> None:
    picture = read(saved(Image.fromarray(photograph(16, 32)), "TIFF", exif=exif_of_a_camera().tobytes()))
    assert (picture.width, picture.height) == (16, 32)
    content = encode(
        tmp_path / "a", "jpeg", photograph(128, 64), metadata=codec.metadata_for_result(picture, "keep", 64, 128)
    )
    exif = Image.open(io.BytesIO(content)).getexif()
    assert exif[ExifTags.Base.Artist] == "Ann Example"
    assert not {258, 259, 273, 279} & set(exif)
    assert exif.get(ORIENTATION_TAG, 1) == 1


def test_resolution_is_kept(tmp_path: Path) -> None:
    for format in ("png", "jpeg", "tiff"):
        content = written_with("safe", format, tmp_path / "a")
        assert Image.open(io.BytesIO(content)).info["dpi"][0] == pytest.approx(300, abs=0.5)
    content = encode(tmp_path / "a", "jpeg", RGB)
    assert Image.open(io.BytesIO(content)).info["dpi"][0] == pytest.approx(72, abs=0.5)


def test_broken_exif_is_dropped_and_the_picture_kept() -> None:
    picture = read(saved(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    assert_same(picture.rgb, RGB)
    assert codec.metadata_for_result(picture, "keep", 17, 13).exif is None


# --- The sample pictures --------------------------------------------------------------------------------------------

# Where we differ from the record of plain Pillow, and why. Formats that are not offered (TGA, PCX, SGI, PPM, PSD, QOI,
# ICO, JPEG 2000, XPM, FLI, DCX, CUR, XV) are an UnsupportedFormat here and left out.
EXPECTED_DISAGREEMENTS: tuple[tuple[str, str, str], ...] = (
    # The record counted the frames of these GIFs and met a broken later one; the first, which we show, is whole.
    (r".*\.gif", r"open:IndexError.*", "ok"),
    # An extension without its data: Pillow reads on behind its end, where the picture is another one or none.
    (r"libjpeg-turbo-seeds/.*_001527_.*\.gif", r"ok", "invalid-image: The GIF holds an extension without data."),
)


def test_sample_pictures_decode_as_the_record_says_or_are_refused(samples: Path) -> None:
    disagreements = []
    offered = {name for format in FORMATS for name in format.pillow_names}
    for folder in ("oddinput", "badinput"):
        root = samples / "images" / folder
        with (root / "DECODE.csv").open() as record:
            rows = list(csv.DictReader(record))
        for row in rows:
            picture = None
            try:
                with (root / row["file"]).open("rb") as file:
                    picture = decode(file, max_input_px=50_000_000)
                outcome = "ok"
            except UploadRejected as error:
                outcome = f"{error.code}: {error.detail}"
            if row["format"] not in offered and row["format"]:
                assert outcome.startswith("unsupported-format"), (row["file"], outcome)
            elif (outcome == "ok") != (row["result"] == "ok"):
                if not any(
                    re.fullmatch(name, row["file"]) and re.fullmatch(result, row["result"]) and ours == outcome
                    for name, result, ours in EXPECTED_DISAGREEMENTS
                ):
                    disagreements.append(f"{row['file']}: {row['result']!r} in the record, {outcome!r} here")
            elif picture is not None:
                stored = int(row["w"]), int(row["h"])
                if (picture.width, picture.height) not in (stored, stored[::-1]):
                    disagreements.append(
                        f"{row['file']}: {stored} in the record, {picture.width}, {picture.height} here"
                    )
                assert (int(row["frames"]) > 1) <= bool(picture.warnings), row["file"]
    assert disagreements == [], "\n".join(disagreements)


def test_orientation_samples_all_show_the_same_picture(samples: Path) -> None:
    folder = samples / "images" / "oddinput" / "sharp"
    for names in (("Landscape_1", "Landscape_4"), ("Portrait_5", "Portrait_7", "Portrait_8")):
        first, *others = (
            decode(io.BytesIO((folder / f"{name}.jpg").read_bytes()), max_input_px=10**6) for name in names
        )
        for other in others:
            # They differ by the number that is drawn on them, and by compression.
            assert psnr(other.rgb, first.rgb) > 20


def test_12_bit_samples_are_scaled_by_their_depth(samples: Path) -> None:
    folder = samples / "images" / "oddinput" / "pillow"
    # The same picture, stored in 12 bits, and in 16 bits of which 12 are used: the second is dark, and stays so.
    twelve, sixteen = (
        decode(io.BytesIO((folder / name).read_bytes()), max_input_px=10**6)
        for name in ("12bit.cropped.tif", "12in16bit.tif")
    )
    assert twelve.bits == sixteen.bits == 16
    assert int(sixteen.rgb.max()) <= 4095
    assert_same(twelve.rgb, np.rint(sixteen.rgb * (65535 / 4095)).astype(np.uint16), 1)


def mutants(content: bytes) -> st.SearchStrategy[bytes]:
    changes = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), min_size=1, max_size=8)

    def change(pairs: list[tuple[int, int]]) -> bytes:
        mutant = bytearray(content)
        for position, value in pairs:
            mutant[position] = value
        return bytes(mutant)

    return changes.map(change)


SMALL = Image.fromarray(photograph(16, 16))
MAKERS: tuple[Callable[[], bytes], ...] = (
    *(lambda name=format.pillow_names[0]: saved(SMALL, name) for format in FORMATS),
    lambda: png(DEEP, 6, 16),
    lambda: tiff(DEEP[..., :3].copy(), compression="deflate"),
    lambda: saved(SMALL, "TIFF", exif=exif_of_a_camera().tobytes(), icc_profile=swapped_profile()),
    lambda: saved(SMALL, "JPEG", exif=exif_of_a_camera(), icc_profile=swapped_profile()),
)


@settings(deadline=None)
@given(st.one_of(*(mutants(make()) for make in MAKERS)))
def test_no_mutant_escapes_as_another_error(content: bytes) -> None:
    try:
        picture = read(content, max_input_px=1_000_000)
        codec.metadata_for_result(picture, "keep", 10, 10)
    except UploadRejected:
        pass


# Where libvips, which the references are by, does something else, and why it is no reference there.
NO_REFERENCE = {
    "pillow/separate_planar_extra_samples.tiff": "an undefined second sample, which libvips takes for alpha",
    "image-rs/images_tiff_testsuite_ycbcr_lzw_bt709.tif": "libvips shows YCbCr under LZW as if it were RGB",
    "image-rs/images_tiff_testsuite_ycbcr_lzw_broken.tif": "likewise",
    "pillow/avif_xmp_tags_orientation.avif": "an orientation in XMP alone, which libvips does not heed",
    "pillow/tiff_tiled_cmyk_jpeg.tif": "CMYK without a profile: libvips assumes one, we say that we do not",
    "image-rs/images_tiff_testsuite_cmyk_u8_trunc_case.tif": "likewise",
}


def reference(content: bytes) -> Array | None:
    """(height, width, 3) float64 in levels of 255 by libvips alone: upright, by its profile in sRGB; None where it
    cannot read the file (BMP, and kinds of TIFF)."""
    try:
        image = pyvips.Image.new_from_buffer(content, "").autorot()
        deep = image.format == "ushort"
        if image.get_typeof("icc-profile-data"):
            image = image.icc_transform(
                "srgb", embedded=True, intent="relative", black_point_compensation=True, depth=16 if deep else 8
            )
        else:
            image = image.colourspace("rgb16" if deep else "srgb")
        samples = np.ndarray(
            buffer=image.write_to_memory(),
            dtype=np.uint16 if deep else np.uint8,
            shape=(image.height, image.width, image.bands),
        )
    except pyvips.Error:
        return None
    rgb = samples[..., :3] if image.bands >= 3 else np.repeat(samples[..., :1], 3, axis=2)
    return rgb / (257 if deep else 1)


def test_every_odd_sample_that_pillow_decodes_comes_out_right(samples: Path) -> None:
    """Size, orientation, colour and transparency of each, against a decoder that shares nothing with ours (G14)."""
    root = samples / "images" / "oddinput"
    offered = {name for format in FORMATS for name in format.pillow_names}
    wrong, compared = [], 0
    with (root / "DECODE.csv").open() as record:
        rows = [row for row in csv.DictReader(record) if row["result"] == "ok" and row["format"] in offered]
    for row in rows:
        content = (root / row["file"]).read_bytes()
        picture = read(content)
        top = 257 if picture.bits == 16 else 1
        expected = reference(content)
        if expected is None and row["mode"] in ("1", "L", "P", "RGB", "RGBA"):
            # Pillow's plain conversion: another way through the same decoder.
            with Image.open(io.BytesIO(content)) as image:
                expected = np.asarray(image.convert("RGBA").convert("RGB"), np.float64)
        if expected is None or row["file"] in NO_REFERENCE:
            continue
        compared += 1
        if expected.shape != picture.rgb.shape:
            wrong.append(f"{row['file']}: {picture.rgb.shape}, expected {expected.shape}")
            continue
        alpha = picture.alpha_plane()
        # What lies under full transparency is nobody's to see.
        seen = np.ones(picture.rgb.shape[:2], bool) if alpha is None else alpha > 0
        error = np.abs(picture.rgb / top - expected)[seen]
        # Two decoders of JPEG and AVIF round their colours differently.
        if error.size and (error.mean() > 0.5 or np.percentile(error, 99) > 4):
            wrong.append(f"{row['file']} ({row['mode']}): mean {error.mean():.2f} max {error.max():.0f}")
        if row["mode"] in ("RGBA", "LA", "PA") and not picture.has_alpha:
            wrong.append(f"{row['file']}: its transparency is gone")
    assert wrong == [], "\n".join(wrong)
    assert compared >= 200, compared


@pytest.mark.parametrize("width", [200, 30_000])
def test_strips_of_a_wide_tiff_are_no_larger_than_pays(tmp_path: Path, width: int) -> None:
    rows = np.zeros((130, width, 3), np.uint8)
    with open_encoder(tmp_path / "result.tiff", "tiff", width, len(rows), channels=3) as encoder:
        encoder.write(rows)
    with Image.open(tmp_path / "result.tiff") as image:
        assert image.tag_v2[278] == min(128, codec.MOST_STRIP_BYTES // (3 * width))
