"""What comes out of the sandbox is the picture that `decode` gives, in bounded memory, or an error of ours."""

from __future__ import annotations

import functools
import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared import sandbox
from shared.errors import InternalError, InvalidImage, TooManyPixels, Unavailable, UnsupportedFormat
from shared.pictures import FORMATS, inspect
from shared.sandbox import Limits, Sandbox
from tests.factories import a_png
from tests.worker.codec.lying_decoder import TALES
from tests.worker.codec.made import exif_of_a_camera, photograph, png, saved, swapped_profile, tiff
from worker.codec import sandboxed
from worker.codec.decode import Picture, decode
from worker.codec.sandboxed import Sandboxed, limits_for

MAX_PX = 10_000_000


@pytest.fixture(scope="module")
def decoder() -> Iterator[Sandboxed]:
    made = Sandboxed(MAX_PX)
    yield made
    made.close()


@functools.cache
def every_kind(height: int = 13, width: int = 17) -> dict[str, bytes]:
    """A file of each kind of pixels that is read, by name."""
    rgb = photograph(height, width)
    gray, alpha = rgb[..., 0], np.linspace(0, 255, height * width).astype(np.uint8).reshape(height, width)
    rgba = Image.fromarray(np.dstack([rgb, alpha]))
    deep = (rgb.astype(np.uint16) * 257)[..., :3].copy()
    kinds = {format.name: saved(Image.fromarray(rgb), format.pillow_names[0]) for format in FORMATS}
    return kinds | {
        "gray": saved(Image.fromarray(gray), "PNG"),
        "bilevel": saved(Image.fromarray(gray).convert("1"), "PNG"),
        "palette": saved(Image.fromarray(rgb).convert("P"), "PNG"),
        "rgba": saved(rgba, "PNG"),
        "rgba webp": saved(rgba, "WEBP", lossless=True),
        "rgba avif": saved(rgba, "AVIF"),
        "rgba tiff": saved(rgba, "TIFF"),
        "constant alpha": saved(Image.new("RGBA", (width, height), (1, 2, 3, 77)), "PNG"),
        "cmyk": saved(Image.fromarray(rgb).convert("CMYK"), "JPEG"),
        "cmyk tiff": saved(Image.fromarray(rgb).convert("CMYK"), "TIFF"),
        "lab": saved(Image.fromarray(rgb).convert("LAB"), "TIFF"),
        "16 bits": png(deep, 2, 16),
        "16 bits with alpha": png(np.dstack([deep, deep[..., 0]]), 6, 16),
        "16 bits tiff": tiff(deep),
        "profile": saved(Image.fromarray(rgb), "JPEG", icc_profile=swapped_profile(), exif=exif_of_a_camera()),
        "profile and alpha": saved(rgba, "PNG", icc_profile=swapped_profile()),
        "16 bits and profile": tiff(deep, profile="srgb"),
        "animation": saved(Image.fromarray(rgb), "GIF", save_all=True, append_images=[Image.fromarray(255 - rgb)]),
    }


@pytest.mark.parametrize("kind", every_kind())
def test_a_picture_comes_out_of_the_sandbox_as_it_is_decoded_here(decoder: Sandboxed, kind: str) -> None:
    file = io.BytesIO(every_kind()[kind])
    expected = decode(file, max_input_px=MAX_PX)
    facts = decoder.inspect(file)
    assert facts == inspect(file)
    found = decoder.decode(file, facts)
    assert np.array_equal(found.rgb, expected.rgb)
    assert found.rgb.dtype == expected.rgb.dtype
    assert found.rgb.flags.c_contiguous
    assert (found.alpha is None) == (expected.alpha is None)
    if found.alpha is not None and expected.alpha is not None:
        assert np.array_equal(found.alpha, expected.alpha)
    for name in ("constant_alpha", "is_gray", "format", "icc_profile", "metadata", "warnings"):
        assert getattr(found, name) == getattr(expected, name), name
    # What is made of it afterwards may be written into, as torch expects.
    assert found.rgb.flags.writeable


def test_the_samples_are_mapped_and_not_copied(decoder: Sandboxed) -> None:
    file = io.BytesIO(a_png(40, 30))
    found = decoder.decode(file, decoder.inspect(file))
    base: Any = found.rgb
    while isinstance(base, np.ndarray):
        base = base.base
    assert type(base).__name__ in ("mmap", "memoryview")


@pytest.mark.parametrize("kind", ["png", "rgba", "16 bits with alpha"])
def test_a_large_picture_moves_to_disk_and_rows_that_rest_are_no_memory(
    decoder: Sandboxed, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(sandbox, "KEPT_IN_MEMORY_BYTES", 0)
    file = io.BytesIO(every_kind(600, 700)[kind])
    expected = decode(file, max_input_px=MAX_PX)
    found = decoder.decode(file, decoder.inspect(file))
    assert np.array_equal(found.rgb, expected.rgb)
    in_memory = resident_bytes(found)
    assert in_memory >= found.rgb.nbytes
    found.rest(0, 100)
    found.rest(100, 550)
    assert resident_bytes(found) < in_memory * 0.15
    assert found.rgb.flags.writeable
    assert np.array_equal(found.rgb, expected.rgb)
    if expected.alpha is not None:
        assert np.array_equal(found.alpha, expected.alpha)  # type: ignore[arg-type]
    # One that lies in memory has no pages to let go of.
    expected.rest(0, 550)


def resident_bytes(picture: Picture) -> int:
    """Of the file that the picture is mapped from, as the kernel counts for this process."""
    start = picture.rgb.__array_interface__["data"][0]
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{start:x}-"):
            return next(1024 * int(each.split()[1]) for each in lines if each.startswith("Rss:"))
    raise LookupError(start)


@pytest.mark.parametrize("kind", every_kind(1, 1))
def test_every_kind_is_decoded_within_the_memory_it_may_take(
    decoder: Sandboxed, kind: str, record_property: Callable[[str, object], None]
) -> None:
    file = io.BytesIO(every_kind(600, 700)[kind])
    facts = decoder.inspect(file)
    at_rest = decoder.sandbox.last_spent
    picture = decoder.decode(file, facts)
    spent = decoder.sandbox.last_spent
    assert spent is not None
    assert at_rest is not None
    allowed = limits_for(facts, len(file.getvalue())).memory_bytes
    own_bytes = spent.peak_bytes - at_rest.peak_bytes
    record_property("peak_bytes_per_px", round(own_bytes / facts.pixels, 1))
    record_property("cpu_seconds", spent.cpu_seconds)
    assert own_bytes < allowed
    assert picture.width * picture.height == facts.pixels


def test_what_cannot_be_read_is_refused_as_here(decoder: Sandboxed) -> None:
    whole = a_png(64, 48)
    with pytest.raises(UnsupportedFormat):
        decoder.inspect(io.BytesIO(b"a text"))
    with pytest.raises(InvalidImage, match="empty"):
        decoder.inspect(io.BytesIO(b""))
    with pytest.raises(InvalidImage, match="starts as PNG"):
        decoder.inspect(io.BytesIO(whole[:20]))
    half = io.BytesIO(whole[: len(whole) // 2])
    with pytest.raises(InvalidImage, match="starts as PNG"):
        decoder.decode(half, decoder.inspect(half))
    small = Sandboxed(1000)
    try:
        with pytest.raises(TooManyPixels) as refused:
            small.decode(io.BytesIO(whole), inspect(io.BytesIO(whole)))
    finally:
        small.close()
    assert refused.value.facts == {"width_px": 64, "height_px": 48, "limit_px": 1000}


def test_a_webp_that_claims_a_huge_canvas_is_refused_before_libwebp_takes_memory_for_it(decoder: Sandboxed) -> None:
    content = bytearray(saved(Image.new("RGBA", (40, 30)), "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"))
    assert content[12:16] == b"VP8X"
    assert (decoder.inspect(io.BytesIO(content)).width, decoder.inspect(io.BytesIO(content)).height) == (40, 30)
    content[24:30] = (16_383).to_bytes(3, "little") + (16_382).to_bytes(3, "little")
    with pytest.raises(TooManyPixels) as refused:
        decoder.inspect(io.BytesIO(content))
    assert (refused.value.facts["width_px"], refused.value.facts["height_px"]) == (16_384, 16_383)


@pytest.mark.parametrize("lossless", [True, False])
def test_the_size_of_a_plain_webp_is_read_by_hand_as_pillow_reads_it(lossless: bool) -> None:
    content = saved(Image.new("RGB", (300, 200)), "WEBP", lossless=lossless)
    assert content[12:16] == (b"VP8L" if lossless else b"VP8 ")
    with pytest.raises(TooManyPixels, match="300 x 200"):
        inspect(io.BytesIO(content), max_px=59_999)
    assert inspect(io.BytesIO(content), max_px=60_000).pixels == 60_000


def test_a_decoder_that_wants_more_memory_than_a_picture_may_take_is_refused(
    decoder: Sandboxed, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO(every_kind(1000, 1000)["rgba webp"])
    facts = decoder.inspect(file)
    monkeypatch.setattr(sandboxed, "limits_for", lambda *_: Limits(4_000_000, 60, 60.0, 10_000_000))
    with pytest.raises(InvalidImage):
        decoder.decode(file, facts)


@pytest.mark.parametrize("tale", TALES)
def test_a_decoder_that_lies_is_not_believed(tale: str) -> None:
    lied_to = Sandboxed(MAX_PX)
    lied_to.sandbox = Sandbox("tests.worker.codec.lying_decoder")
    file = io.BytesIO(a_png() + b"tale:" + tale.encode())
    try:
        with pytest.raises(InvalidImage, match="broke off"):
            lied_to.decode(file, inspect(file))
    finally:
        lied_to.close()


def test_no_answer_in_time_uses_up_an_attempt_and_does_not_wait_for_ever(
    decoder: Sandboxed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: Any, **__: Any) -> Any:
        raise Unavailable("The picture was not read within 1 s.")

    file = io.BytesIO(a_png())
    facts = inspect(file)
    monkeypatch.setattr(decoder.sandbox, "run", late)
    with pytest.raises(InternalError, match="not read within"):
        decoder.inspect(file)
    with pytest.raises(InternalError, match="not read within"):
        decoder.decode(file, facts)


def test_a_warm_process_that_was_killed_costs_no_picture(decoder: Sandboxed) -> None:
    file = io.BytesIO(a_png())
    facts = decoder.inspect(file)
    assert decoder.sandbox.pid is not None
    os.kill(decoder.sandbox.pid, signal.SIGKILL)
    os.waitid(os.P_PID, decoder.sandbox.pid, os.WEXITED | os.WNOWAIT)
    assert decoder.decode(file, facts).width == facts.width
