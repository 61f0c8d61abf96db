"""Colours come out as a viewer shows them, under transparency too. References are made by code here."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import pyvips
from PIL import Image, ImageCms

from tests.worker.codec.made import (
    ALPHA,
    DEEP,
    GRAY,
    RGB,
    Array,
    assert_same,
    png,
    read,
    saved,
    swapped_profile,
    three,
)
from worker.codec.color import luma, quantize, result_profile
from worker.codec.decode import flatten

# --- Colour profiles ------------------------------------------------------------------------------------------------


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
    profile = result_profile(is_gray=True).replace(struct.pack(">i", round(2.4 * 65536)), struct.pack(">i", 65536))
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
        saved(Image.fromarray(RGB), "PNG", icc_profile=result_profile(is_gray=True)),
    ):
        picture = read(content)
        assert_same(picture.rgb, RGB)
        assert any("profile" in warning for warning in picture.warnings)


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
    flat = flatten(picture, "#336699")
    weight = ALPHA[..., None] / 255
    assert_same(flat.rgb, np.rint(RGB * weight + np.array([0x33, 0x66, 0x99]) * (1 - weight)).astype(np.uint8), 1)
    assert not flat.has_alpha


def test_gray_flattened_on_gray_is_gray_and_on_a_colour_is_not() -> None:
    picture = read(png(np.dstack([DEEP[..., 0], DEEP[..., 1]]), 4, 16))
    assert flatten(picture, "#ffffff").is_gray
    assert not flatten(picture, "#ff0000").is_gray
    assert flatten(picture, "#ffffff").bits == 16


def test_without_alpha_there_is_nothing_to_flatten() -> None:
    picture = read(saved(Image.fromarray(RGB), "PNG"))
    assert flatten(picture, "#000000") is picture


@pytest.mark.parametrize("background", ["white", "#fff", "#12345g", "#1234567"])
def test_a_background_is_six_hexadecimal_digits(background: str) -> None:
    picture = read(saved(Image.fromarray(np.dstack([RGB, ALPHA])), "PNG"))
    with pytest.raises(ValueError, match="#rrggbb"):
        flatten(picture, background)


# --- Samples of the network -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
def test_quantizing_every_level_gives_it_back(bits: int) -> None:
    top = (1 << bits) - 1
    levels = np.arange(top + 1)
    assert (quantize((levels / top).astype(np.float32), bits) == levels).all()


def test_quantizing_rounds_and_clips() -> None:
    rows = np.array([[-1.0, 0.49 / 255, 0.51 / 255, 1.0, 7.0]], np.float32)
    assert quantize(rows, 8).tolist() == [[0, 0, 1, 255, 255]]


def test_luma_of_gray_is_that_gray() -> None:
    gray = np.linspace(0, 1, 256, dtype=np.float32)
    assert np.abs(luma(np.stack([gray] * 3, axis=-1)) - gray).max() < 1e-6
    assert luma(np.array([0, 1, 0], np.float32)) == pytest.approx(0.587)
