"""Lossy WebP from bands is the file that whole pictures give; where it does not come about, nothing is left behind."""

from __future__ import annotations

import _thread
import ctypes
import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from structlog.testing import capture_logs
from webp._webp import ffi, lib

from shared.errors import FormatCannotHoldDetail, InternalError, OutOfMemory
from tests.conftest import wait_until
from worker.codec import webp
from worker.codec.color import result_profile
from worker.codec.convert import convert
from worker.codec.encode import check_memory, open_encoder, partial_path
from worker.codec.metadata import Metadata

Array = npt.NDArray[Any]
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    """Whether there is a libwebp is asked once in a process."""
    asked = webp._libwebp
    yield
    asked.cache_clear()


def picture(height: int, width: int, channels: int, *, noise: bool) -> Array:
    chance = np.random.default_rng(height * width)
    if noise:
        return chance.integers(0, 256, (height, width, channels), np.uint8)
    y, x = np.mgrid[:height, :width]
    planes = [110 + 80 * np.sin(x / (9 + c) + c) * np.cos(y / (11 + c)) for c in range(channels)]
    return (np.stack(planes, axis=-1) + chance.normal(0, 2, (height, width, 1))).clip(0, 255).astype(np.uint8)


def written(
    path: Path, samples: Array, heights: list[int], *, quality: int = 95, metadata: Metadata | None = None
) -> bytes:
    height, width, channels = samples.shape
    with open_encoder(path, "webp", width, height, channels=channels, quality=quality, metadata=metadata) as encoder:
        top = 0
        for rows in heights:
            encoder.write(samples[top : top + rows])
            top += rows
        size = encoder.close()
    content = path.read_bytes()
    assert len(content) == size
    return content


def written_by_libvips(path: Path, samples: Array, **options: Any) -> bytes:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(webp, "is_available", lambda: False)
        return written(path, samples, [len(samples)], **options)


def encoded_whole(samples: Array, quality: int) -> bytes:
    """The chunk `VP8 ` of the picture handed to the package's libwebp in one piece."""
    height, width = samples.shape[:2]
    rgb = np.ascontiguousarray(np.broadcast_to(samples, (height, width, 3)))
    whole = ffi.gc(ffi.new("WebPPicture *"), lib.WebPPictureFree)
    assert lib.WebPPictureInit(whole)
    whole.use_argb, whole.width, whole.height = 0, width, height
    assert lib.WebPPictureImportRGB(whole, ffi.from_buffer("uint8_t[]", rgb), 3 * width)
    config, memory = ffi.new("WebPConfig *"), ffi.new("WebPMemoryWriter *")
    assert lib.WebPConfigPreset(config, lib.WEBP_PRESET_DEFAULT, quality)
    config.method = webp.EFFORT
    lib.WebPMemoryWriterInit(memory)
    whole.writer, whole.custom_ptr = ffi.addressof(lib, "WebPMemoryWrite"), memory
    assert lib.WebPEncode(config, whole)
    content = bytes(ffi.buffer(memory.mem, memory.size))
    lib.WebPMemoryWriterClear(memory)
    return dict(webp.chunks(content))[b"VP8 "]


# --- The same file --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 70),
    heights=st.lists(st.integers(0, 19), min_size=1, max_size=6).filter(any),
    channels=st.sampled_from([1, 3]),
    quality=st.sampled_from([1, 60, 95, 100]),
    noise=st.booleans(),
    strip_bytes=st.integers(1, 4000),
)
def test_however_rows_are_cut_the_file_is_that_of_the_whole_picture(
    tmp_path_factory: pytest.TempPathFactory,
    width: int,
    heights: list[int],
    channels: int,
    quality: int,
    noise: bool,
    strip_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("bands")
    samples = picture(sum(heights), width, channels, noise=noise)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(webp, "STRIP_BYTES", strip_bytes)
        content = written(folder / "a", samples, heights, quality=quality)
    assert dict(webp.chunks(content))[b"VP8 "] == encoded_whole(samples, quality)
    # Another libwebp; a newer one may come to other bytes, and then this has to say less.
    assert content == written_by_libvips(folder / "b", samples, quality=quality)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (3, 2), (640, 481), (481, 640)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_of_many_strips_and_sides_of_every_kind_are_what_libvips_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, height: int, width: int, channels: int
) -> None:
    monkeypatch.setattr(webp, "STRIP_BYTES", 20_000)
    samples = picture(height, width, channels, noise=False)
    heights = [rows for rows in (7, 33, 1, height) if rows <= height]
    heights = [*heights[:-1], height - sum(heights[:-1])] if sum(heights[:-1]) <= height else [height]
    assert written(tmp_path / "a", samples, heights) == written_by_libvips(tmp_path / "b", samples)


@pytest.mark.parametrize("dpi", [72.0, 300.0])
@pytest.mark.parametrize("xmp", [None, b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"])
@pytest.mark.parametrize("with_exif", [False, True])
def test_profile_and_metadata_are_what_libvips_writes_and_are_read_again(
    tmp_path: Path, with_exif: bool, xmp: bytes | None, dpi: float
) -> None:
    exif = Image.Exif()
    exif[315] = "Ann Example"
    exif[0x8769] = {40962: 301, 40963: 97}
    metadata = Metadata(exif.tobytes().removeprefix(b"Exif\0\0") if with_exif else None, xmp, dpi)
    samples = picture(97, 301, 3, noise=False)
    content = written(tmp_path / "a", samples, [97], metadata=metadata)
    assert content == written_by_libvips(tmp_path / "b", samples, metadata=metadata)
    beside = [b"VP8X", b"ICCP", b"VP8 ", *[b"EXIF"] * with_exif, *[b"XMP "] * (xmp is not None)]
    assert [name for name, _ in webp.chunks(content)] == beside
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (301, 97)
        assert image.info["icc_profile"] == result_profile(is_gray=False)
        assert image.info.get("xmp") == xmp
        read = image.getexif()
        assert read.get(315) == ("Ann Example" if with_exif else None)
        assert read.get(282) == (dpi if with_exif else None)
        sides = read.get_ifd(0x8769)
        assert (sides.get(40962), sides.get(40963)) == ((301, 97) if with_exif else (None, None))


@pytest.mark.parametrize(
    ("format", "channels"), [("png", 1), ("png", 3), ("tiff", 3), ("jpeg", 1), ("webp", 3), ("avif", 3)]
)
@pytest.mark.parametrize("with_exif", [False, True])
def test_a_stored_result_becomes_the_webp_that_libvips_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, channels: int, with_exif: bool
) -> None:
    exif = Image.Exif()
    exif[315] = "Ann Example"
    metadata = Metadata(
        exif.tobytes().removeprefix(b"Exif\0\0") if with_exif else None, b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>", 240.0
    )
    source = tmp_path / "source"
    with open_encoder(source, format, 211, 97, channels=channels, metadata=metadata) as encoder:
        encoder.write(picture(97, 211, channels, noise=False))

    def converted(name: str) -> tuple[dict[bytes, bytes], Image.Exif]:
        asked: dict[str, Any] = {"quality": 90, "lossless": False, "background": "#ffffff"}
        size = convert(source, tmp_path / name, "webp", available_bytes=10**9, **asked)
        content = (tmp_path / name).read_bytes()
        assert len(content) == size
        beside = dict(webp.chunks(content))
        with Image.open(io.BytesIO(content)) as image:
            return {name: beside[name] for name in (b"VP8X", b"ICCP", b"VP8 ", b"XMP ")}, image.getexif()

    chunks, read = converted("a")
    monkeypatch.setattr(webp, "is_available", lambda: False)
    by_libvips, read_of_libvips = converted("b")
    assert chunks == by_libvips
    assert read.get(315) == read_of_libvips.get(315) == ("Ann Example" if with_exif and format != "tiff" else None)
    # Of a WebP or AVIF with its resolution in EXIF libvips makes 25.4 dpi; one without has none.
    assert read[282] * (2.54 if read[296] == 3 else 1) == pytest.approx(
        240 if with_exif or format not in ("webp", "avif") else 25.4, rel=1e-3
    )


# --- Nothing left behind --------------------------------------------------------------------------------------------


def test_giving_up_frees_the_memory_and_leaves_no_file(tmp_path: Path) -> None:
    # In a process of its own: what others have freed before takes the picture in without growing.
    line = [sys.executable, "-c", _GIVEN_UP, str(tmp_path / "a")]
    ran = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    written, given_up = map(int, ran.stdout.split())
    # 60 megapixels.
    assert written > 80e6
    assert given_up < 20e6
    assert list(tmp_path.iterdir()) == []


_GIVEN_UP = """
import sys
from pathlib import Path

import numpy as np
import psutil

from worker.codec.encode import open_encoder

target = Path(sys.argv[1])
with open_encoder(target, "webp", 8, 8, channels=3) as encoder:
    encoder.write(np.zeros((8, 8, 3), np.uint8))
target.unlink()
rows = np.zeros((500, 8000, 3), np.uint8)
resident = lambda: psutil.Process().memory_info().rss
before = resident()
encoder = open_encoder(target, "webp", 8000, 8000, channels=3)
for _ in range(15):
    encoder.write(rows)
print(resident() - before)
encoder.abort()
print(resident() - before)
"""


def test_who_has_given_up_cannot_go_on(tmp_path: Path) -> None:
    encoder = open_encoder(tmp_path / "a", "webp", 80, 80, channels=3)
    encoder.write(np.zeros((50, 80, 3), np.uint8))
    encoder.abort()
    encoder.abort()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="closed"):
        encoder.write(np.zeros((5, 80, 3), np.uint8))


def test_an_interrupt_ends_the_encoding_and_leaves_no_file(tmp_path: Path) -> None:
    samples = picture(2000, 2000, 3, noise=True)

    def interrupt() -> None:
        wait_until(partial_path(tmp_path / "a").exists, seconds=20, what="the encoding")
        _thread.interrupt_main()

    def write() -> None:
        with open_encoder(tmp_path / "a", "webp", 2000, 2000, channels=3) as encoder:
            encoder.write(samples)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        write()
    thread.join()
    assert list(tmp_path.iterdir()) == []


def test_what_libwebp_refuses_is_an_error_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(InternalError) as failed:
        written(tmp_path / "a", picture(8, 8, 3, noise=True), [8], quality=1000)
    assert isinstance(failed.value.__cause__, webp.EncodingFailed)
    assert list(tmp_path.iterdir()) == []


class Overflowing:
    """A libwebp whose first tries end as those of a picture with too much detail do: behind the headers."""

    def __init__(self, tries: int) -> None:
        self.tries = tries

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)

    def WebPEncode(self, config: Any, picture: Any) -> int:
        done: int = lib.WebPEncode(config, picture)
        if self.tries:
            self.tries -= 1
            webp._seen(webp._Picture, ffi, picture).error_code = webp._TOO_DETAILED
            return 0
        return done


@pytest.mark.parametrize("tries", [1, 2])
def test_a_picture_with_too_much_detail_is_encoded_in_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tries: int
) -> None:
    samples = picture(90, 120, 3, noise=False)
    usual = written(tmp_path / "a", samples, [90])
    monkeypatch.setattr(webp, "_libwebp", lambda: (ffi, Overflowing(tries)))
    other = written(tmp_path / "b", samples, [90])
    assert other != usual
    assert int.from_bytes(other[4:8], "little") == len(other) - 8
    found, wanted = (np.asarray(Image.open(io.BytesIO(content)), np.int16) for content in (other, usual))
    assert float(np.square(found - wanted).mean()) < 10


def test_where_no_way_does_the_customer_is_told_and_nobody_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webp, "_libwebp", lambda: (ffi, Overflowing(3)))
    with pytest.raises(FormatCannotHoldDetail) as failed:
        written(tmp_path / "a", picture(90, 120, 3, noise=False), [90])
    assert not failed.value.retryable
    assert failed.value.facts == {"format": "webp", "width_px": 120, "height_px": 90}
    assert list(tmp_path.iterdir()) == []


MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
import numpy as np
from worker.codec.encode import open_encoder

def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
row = (np.arange(8000) // 9).astype(np.uint8)[None, :, None] * np.array([1, 2, 3], np.uint8)
band = row + np.arange(250, dtype=np.uint8)[:, None, None]
before = peak_bytes()
with open_encoder(Path(sys.argv[1]), "webp", 8000, 4000, channels=3) as encoder:
    for _ in range(16):
        encoder.write(band)
print((peak_bytes() - before) / 32e6)
"""


def test_a_large_picture_takes_little_more_than_its_yuv(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path / "a")],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert float(found.stdout) < 2.2, "bytes a px"


# --- Without it -----------------------------------------------------------------------------------------------------


def needed_bytes(*, has_alpha: bool = False, lossless: bool = False) -> int:
    with pytest.raises(OutOfMemory) as refused:
        check_memory("webp", 1000, 1000, has_alpha=has_alpha, lossless=lossless, available_bytes=0)
    return int(refused.value.facts["needed_bytes"])


def without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webp._webp", None)


def with_another_kind_of_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(ctypes.Structure):
        _fields_ = (("more", ctypes.c_void_p), *webp._Picture._fields_)

    monkeypatch.setattr(webp, "_Picture", Shifted)


@pytest.mark.parametrize("hidden", [without_the_package, with_another_kind_of_picture])
def test_where_there_is_no_libwebp_to_feed_libvips_writes_the_same_and_the_log_says_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: Any
) -> None:
    samples = picture(40, 50, 3, noise=False)
    fed, needs_fed = written(tmp_path / "a", samples, [40]), needed_bytes()
    webp._libwebp.cache_clear()
    hidden(monkeypatch)
    with capture_logs() as logged:
        assert written(tmp_path / "a", samples, [40]) == fed
        assert needed_bytes() > 2 * needs_fed
    assert [line["event"] for line in logged] == ["webp.held_whole"]


def test_transparency_and_lossless_stay_with_libvips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ways = needed_bytes(has_alpha=True), needed_bytes(lossless=True)
    monkeypatch.setattr(webp, "is_available", lambda: False)
    assert ways == (needed_bytes(has_alpha=True), needed_bytes(lossless=True))
