"""Every kind of picture comes in right, or is refused in words. References are made by code here."""

from __future__ import annotations

import csv
import io
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import pyvips
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from shared.errors import InvalidImage, TooManyPixels, UnsupportedFormat, UploadRejected
from shared.pictures import FORMATS, ORIENTATION_TAG
from tests.worker.codec.made import (
    ALPHA,
    DEEP,
    GRAY,
    RGB,
    Array,
    assert_same,
    exif_of_a_camera,
    photograph,
    png,
    psnr,
    read,
    saved,
    swapped_profile,
    three,
    tiff,
)
from worker.codec.decode import decode
from worker.codec.metadata import metadata_for_result

# --- Kinds of pixels ------------------------------------------------------------------------------------------------


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
    result = metadata_for_result(picture.metadata, "keep", picture.width, picture.height)
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
        metadata_for_result(picture.metadata, "keep", 10, 10)
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
