"""Pictures and files made by code, for the tests of the codec."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyvips
from PIL import ExifTags, Image, ImageCms
from PIL.TiffImagePlugin import IFDRational

from shared.pictures import ORIENTATION_TAG
from worker.codec.decode import Picture, decode
from worker.codec.encode import open_encoder
from worker.codec.metadata import Metadata

Array = npt.NDArray[Any]


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


def three(gray: Array) -> Array:
    return np.repeat(gray[..., None], 3, axis=2)


def encode(
    path: Path, format: str, samples: Array, rows: int = 7, metadata: Metadata | None = None, **options: Any
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


RGB = photograph(13, 17)
GRAY = RGB[..., 0]
ALPHA = np.linspace(1, 255, 13 * 17).astype(np.uint8).reshape(13, 17)
DEEP = photograph(13, 17, 4).astype(np.uint16) * 257 - np.arange(17, dtype=np.uint16)[None, :, None] - 20


def swapped_profile() -> bytes:
    """sRGB with the colorants of red and blue exchanged: whoever converts, exchanges the channels."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


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


def psnr(a: Array, b: Array, top: int = 255) -> float:
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(top**2 / error))


def assert_same(found: Array, expected: Array, tolerance: int = 0) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    difference = np.abs(found.astype(np.int64) - expected.astype(np.int64))
    where = np.unravel_index(int(difference.argmax()), difference.shape)
    assert difference.max() <= tolerance, f"max {difference.max()} mean {difference.mean():.4f} at {where}"
