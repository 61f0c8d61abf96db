"""Broken and hostile picture files, made by code: the same for the same seed.

Bit flips, truncations, edits of header fields, spliced and doubled chunks, and bombs: small files that claim, or unfold
to, more than a picture may take. Of each format that is read, and of each kind of pixels that takes a way of its own.
"""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Iterator

from PIL import Image, ImageCms

from shared.pictures import FORMATS

LARGE = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)
HEADER_BYTES = 128


@functools.cache
def seeds() -> dict[str, bytes]:
    """Small good files, by what they are."""
    side = 24
    pixels = bytes((x * 7 + y * 3 + c * 80) % 256 for y in range(side) for x in range(side) for c in range(3))
    rgb = Image.frombytes("RGB", (side, side), pixels)
    rgba = rgb.copy()
    rgba.putalpha(Image.linear_gradient("L").resize((side, side)))
    exif = Image.Exif()
    exif[274], exif[315] = 6, "nobody"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    deep = Image.frombytes("I;16", (side, side), bytes(i * 37 % 256 for i in range(side * side * 2)))
    made = {format.name: _saved(rgb, format.pillow_names[0]) for format in FORMATS}
    return made | {
        "png palette": _saved(rgb.convert("P"), "PNG"),
        "png alpha": _saved(rgba, "PNG", exif=exif, icc_profile=profile),
        "png 16 bits": _saved(deep, "PNG"),
        "png animation": _saved(rgb, "PNG", save_all=True, append_images=[rgba.convert("RGB")]),
        "jpeg exif": _saved(rgb, "JPEG", exif=exif, icc_profile=profile),
        "jpeg progressive": _saved(rgb, "JPEG", progressive=True),
        "jpeg cmyk": _saved(rgb.convert("CMYK"), "JPEG"),
        "jpeg many": _saved(rgb, "MPO", save_all=True, append_images=[rgb]),
        "webp lossless": _saved(rgba, "WEBP", lossless=True, exif=exif),
        "webp animation": _saved(rgb, "WEBP", save_all=True, append_images=[rgba.convert("RGB")]),
        "tiff lzw": _saved(rgb, "TIFF", compression="tiff_lzw", exif=exif),
        "tiff jpeg": _saved(rgb, "TIFF", compression="jpeg"),
        "tiff group 4": _saved(rgb.convert("1"), "TIFF", compression="group4"),
        "tiff 16 bits": _saved(deep, "TIFF"),
        "avif alpha": _saved(rgba, "AVIF"),
        "gif animation": _saved(rgb.convert("P"), "GIF", save_all=True, append_images=[rgba.convert("P")]),
        "bmp palette": _saved(rgb.convert("P"), "BMP"),
        "bmp bits": _saved(rgb.convert("1"), "BMP"),
    }


def mutants(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(what it is, content), `count` of them, every seed and every kind of change in turn."""
    chance = random.Random(seed)
    kinds = (_flipped, _truncated, _header_edited, _spliced, _flipped_with_sums, _header_edited_with_sums)
    names = list(seeds())
    for number in range(count):
        name = names[number % len(names)]
        # Primes apart, so that all pairs come up.
        change = kinds[(number // len(names) + number) % len(kinds)]
        yield f"{change.__name__.strip('_')} {name} #{number}", change(seeds()[name], chance)


def bombs() -> dict[str, bytes]:
    """Small files that claim or unfold to much."""
    found: dict[str, bytes] = {}
    for width, height in ((100_000, 100_000), (65_535, 65_535), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1), (60_000, 17)):
        size = f"{width} x {height}"
        found[f"png {size}"] = _png(width, height, zlib.compress(bytes(1000)))
        found[f"tiff {size}"] = _tiff(width, height)
        found[f"bmp {size}"] = _patched(seeds()["bmp"], 18, struct.pack("<ii", width, height))
        short = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
        found[f"gif {size}"] = _patched(seeds()["gif"], 6, short)
        sof = seeds()["jpeg"].index(b"\xff\xc0")
        found[f"jpeg {size}"] = _patched(seeds()["jpeg"], sof + 5, struct.pack(">HH", height & 0xFFFF, width & 0xFFFF))
        canvas = (width - 1 & 0xFFFFFF).to_bytes(3, "little") + (height - 1 & 0xFFFFFF).to_bytes(3, "little")
        found[f"webp {size}"] = _patched(seeds()["webp lossless"], 24, canvas)
        ispe = seeds()["avif"].index(b"ispe")
        found[f"avif {size}"] = _patched(seeds()["avif"], ispe + 8, struct.pack(">II", width, height))
    zeros = zlib.compress(bytes(100_000_000), 9)
    found["png text that unfolds to 100 MB"] = _png(24, 24, zlib.compress(bytes(24 * 73)), (b"zTXt", b"a\0\0" + zeros))
    found["png profile that unfolds to 100 MB"] = _png(
        24, 24, zlib.compress(bytes(24 * 73)), (b"iCCP", b"a\0\0" + zeros)
    )
    found["png pixels that unfold to 100 MB"] = _png(24, 24, zeros)
    found["tiff strip that unfolds to 100 MB"] = _tiff(24, 24, compression=8, strip=zeros)
    found["tiff that leads in a circle"] = _tiff(24, 24, next_page=8)
    found["gif of a thousand frames"] = _saved(
        Image.new("P", (8, 8)),
        "GIF",
        save_all=True,
        append_images=[Image.new("P", (8, 8), n % 250) for n in range(999)],
    )
    found["jpeg of a thousand scans"] = _jpeg_of_scans(1000)
    found["jpeg of a hundred thousand comments"] = (
        seeds()["jpeg"][:2] + b"\xff\xfe\x00\x03x" * 100_000 + seeds()["jpeg"][2:]
    )
    found["png of a hundred thousand chunks"] = _png(
        24, 24, zlib.compress(bytes(24 * 73)), *[(b"tEXt", b"a\0b")] * 100_000
    )
    return found


def _saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)  # type: ignore[arg-type]
    return file.getvalue()


def _patched(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, pixels: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    others = b"".join(_chunk(kind, data) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + others + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _tiff(width: int, height: int, *, compression: int = 1, strip: bytes = b"\0" * 64, next_page: int = 0) -> bytes:
    tags = (
        (256, 4, width),
        (257, 4, height),
        (258, 3, 8),
        (259, 3, compression),
        (262, 3, 1),
        (273, 4, 8 + 2 + 9 * 12 + 4),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, len(strip)),
    )
    page = struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags
    )
    return b"II*\0" + struct.pack("<I", 8) + page + struct.pack("<I", next_page) + strip


def _jpeg_of_scans(count: int) -> bytes:
    """The last scan of a progressive JPEG again and again: each pass goes over the whole picture."""
    content = seeds()["jpeg progressive"]
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * count + content[-2:]


def _flipped(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _truncated(content: bytes, chance: random.Random) -> bytes:
    cut = content[: chance.randrange(1, len(content))]
    return cut + chance.choice((b"", b"", b"\0" * 100, chance.randbytes(50)))


def _header_edited(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 3))):
        size, order = chance.choice((1, 2, 2, 4, 4)), chance.choice(("little", "big"))
        at = chance.randrange(4, max(5, min(HEADER_BYTES, len(changed) - size)))
        value = chance.choice(LARGE) & (256**size - 1)
        changed[at : at + size] = value.to_bytes(size, "little" if order == "little" else "big")
    return bytes(changed)


def _spliced(content: bytes, chance: random.Random) -> bytes:
    """A piece of another file in between, a piece twice, or a piece missing; at a chunk's border where there is one."""
    other = seeds()[chance.choice(list(seeds()))]
    start, end = sorted(chance.sample(range(len(other)), 2))
    at = chance.randrange(8, len(content))
    marks = [i for mark in (b"IDAT", b"\xff\xda", b"\xff\xc4", b"VP8", b"mdat", b"!\xf9") for i in _all(content, mark)]
    if marks and chance.random() < 0.5:
        at = chance.choice(marks) - 4
    match chance.randrange(3):
        case 0:
            return content[:at] + other[start:end] + content[at:]
        case 1:
            return content[: at + 30] + content[at:]
    return content[:at] + content[at + chance.randrange(1, 60) :]


def _flipped_with_sums(content: bytes, chance: random.Random) -> bytes:
    return _summed(_flipped(content, chance))


def _header_edited_with_sums(content: bytes, chance: random.Random) -> bytes:
    return _summed(_header_edited(content, chance))


def _summed(content: bytes) -> bytes:
    """A PNG with the check sums that its chunks should have: else most changes end at the first of them."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    changed, at = bytearray(content), 8
    while at + 12 <= len(changed):
        (length,) = struct.unpack_from(">I", changed, at)
        end = at + 8 + length
        if end + 4 > len(changed):
            break
        struct.pack_into(">I", changed, end, zlib.crc32(changed[at + 4 : end]))
        at = end + 4
    return bytes(changed)


def _all(content: bytes, mark: bytes) -> Iterator[int]:
    at = content.find(mark)
    while at >= 0:
        yield at
        at = content.find(mark, at + 1)
