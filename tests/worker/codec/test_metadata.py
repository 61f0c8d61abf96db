"""What stands beside the pixels comes through as the policy says."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import pytest
from PIL import ExifTags, Image

from shared.pictures import ORIENTATION_TAG
from tests.worker.codec.made import (
    RGB,
    assert_same,
    encode,
    exif_of_a_camera,
    photograph,
    read,
    saved,
)
from worker.codec.decode import Picture
from worker.codec.metadata import metadata_for_result

XMP = (
    b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:exif="http://ns.adobe.com/exif/1.0/" '
    b'tiff:Orientation="6" exif:GPSLatitude="48,51.5N"><exif:PixelXDimension>32</exif:PixelXDimension>'
    b'</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
SECRETS = (b"SERIAL-4711", b"LENS-4712", b"OWNER-4713", b"UNIQUE-4714", b"MAKER-4715", b"COMMENT-4716", b"48,51.5N")
PUBLIC = (b"Ann Example", b"(c) Ann Example", b"2024:05:06 07:08:09", b"A red barn")


def photo_of_a_camera() -> Picture:
    return read(saved(Image.fromarray(photograph(16, 32)), "JPEG", exif=exif_of_a_camera(), xmp=XMP, dpi=(300, 300)))


def written_with(policy: Literal["safe", "keep", "strip"], format: str, path: Path) -> bytes:
    picture = photo_of_a_camera()
    metadata = metadata_for_result(picture.metadata, policy, 64, 128)
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
        tmp_path / "a", "jpeg", photograph(128, 64), metadata=metadata_for_result(picture.metadata, "keep", 64, 128)
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
    assert metadata_for_result(picture.metadata, "keep", 17, 13).exif is None
