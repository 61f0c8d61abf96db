"""Parts of a file, joined: the pixels are those handed in, and all around them is what an ordinary file says."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips

from worker.codec import Samples, encode, parts
from worker.codec.metadata import Metadata

METADATA = Metadata(xmp=b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>", dpi=150.0)


def joined(folder: Path, samples: Samples, format: str, cuts: Sequence[int], *, rows_at_once: int) -> bytes:
    height, width, channels = samples.shape
    strip = parts.rows_in_strip(cuts[:-1], samples[0].nbytes)
    layout = parts.Layout(format, width, height, channels, samples.itemsize * 8, strip)
    body, facts, y = b"", [], 0
    for rows in cuts:
        with parts.open_part(folder / "part", layout) as part:
            for top in range(y, y + rows, rows_at_once):
                part.write(samples[top : min(top + rows_at_once, y + rows)])
            facts.append(part.close())
        body += (folder / "part").read_bytes()
        y += rows
    head, tail = parts.joined(layout, facts, METADATA)
    return head + body + tail


def read(image: pyvips.Image) -> tuple[Samples, dict[str, Any]]:
    """Its samples, and all that it says beside them."""
    dtype = np.uint8 if image.format == "uchar" else np.uint16
    samples = np.ndarray(buffer=image.write_to_memory(), dtype=dtype, shape=(image.height, image.width, image.bands))
    return samples, {name: image.get(name) for name in image.get_fields() if name not in ("filename", "vips-loader")}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(("format", "is_big"), [("png", False), ("tiff", False), ("tiff", True)])
def test_a_joined_file_is_what_one_encoder_would_have_written(
    format: str, channels: int, bits: int, is_big: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (encode, parts):
        monkeypatch.setattr(module, "needs_bigtiff", lambda raw_bytes: is_big and raw_bytes > 100)
    cuts, width = (12, 24, 8, 5), 33
    noise = np.random.default_rng(1).integers(0, 9, (sum(cuts), width, channels))
    slope = np.add.outer(np.arange(sum(cuts)) * 37, np.arange(width) * 11)[..., None] * (1 if bits == 8 else 40)
    samples = (slope + noise).astype(np.uint8 if bits == 8 else np.uint16)

    file = joined(tmp_path, samples, format, cuts, rows_at_once=5)
    path = tmp_path / f"whole-{is_big}"
    with encode.open_encoder(
        path, format, width, sum(cuts), channels=channels, bits=bits, metadata=METADATA
    ) as encoder:
        encoder.write(samples)

    got, said = read(pyvips.Image.new_from_buffer(file, "", fail_on="warning"))
    wanted, wanted_said = read(pyvips.Image.new_from_file(str(path)))
    assert np.array_equal(got, samples)
    assert np.array_equal(wanted, samples)
    assert said == wanted_said
    assert file[:4] == (b"II+\0" if is_big else path.read_bytes()[:4])


def test_parts_hold_one_row_each_and_chunks_of_more_than_one_size(tmp_path: Path) -> None:
    samples = np.random.default_rng(2).integers(0, 255, (3, 500_000, 3), dtype=np.uint8)
    file = joined(tmp_path, samples, "png", (1, 1, 1), rows_at_once=1)
    assert len(file) > 3 * parts.IDAT_BYTES
    got, _ = read(pyvips.Image.new_from_buffer(file, "", fail_on="warning"))
    assert np.array_equal(got, samples)


def test_strips_divide_every_part() -> None:
    assert parts.rows_in_strip([12, 24, 8], 100) == 4
    assert parts.rows_in_strip([7, 12], 100) == 1
    assert parts.rows_in_strip([400, 800], 10_000) == 100, "about a megabyte at most"
    assert parts.rows_in_strip([400], 10_000_000) == 1


def test_the_checksum_of_two_is_that_of_both() -> None:
    chance = random.Random(3)
    for _ in range(50):
        first, second = (chance.randbytes(chance.choice((0, 1, 77, 70_000))) for _ in range(2))
        both = parts.adler32_of_both(zlib.adler32(first), zlib.adler32(second), len(second))
        assert both == zlib.adler32(first + second)
