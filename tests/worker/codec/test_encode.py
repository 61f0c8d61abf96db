"""Every kind of picture goes out right, or is refused in words, in little memory."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.errors import InternalError
from shared.pictures import FORMATS, format_named
from tests.worker.codec.made import (
    DEEP,
    GRAY,
    RGB,
    Array,
    assert_same,
    encode,
    photograph,
    psnr,
    read,
    three,
)
from worker.codec import color
from worker.codec.encode import MOST_STRIP_BYTES, open_encoder

ROOT = Path(__file__).parents[3]


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
    assert np.abs(color._through_profile(ramp, profile).astype(int) - ramp).max() <= 1


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
from worker.codec.encode import open_encoder

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
from worker.codec.encode import open_encoder

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


@pytest.mark.parametrize("width", [200, 30_000])
def test_strips_of_a_wide_tiff_are_no_larger_than_pays(tmp_path: Path, width: int) -> None:
    rows = np.zeros((130, width, 3), np.uint8)
    with open_encoder(tmp_path / "result.tiff", "tiff", width, len(rows), channels=3) as encoder:
        encoder.write(rows)
    with Image.open(tmp_path / "result.tiff") as image:
        assert image.tag_v2[278] == min(128, MOST_STRIP_BYTES // (3 * width))
