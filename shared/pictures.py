"""What can be told about a picture from its bytes without decoding it: is it one, how large, in which format.

The API asks at submit, the worker asks again before it decodes. Nothing here allocates a pixel: refusals happen on
the header alone, in bounded time and memory whatever the file claims. Whatever Pillow raises leaves this module as an
UploadRejected; a picture that is merely odd is described, not judged.
"""

from __future__ import annotations

import functools
import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Literal, cast

from shared.errors import FormatCannotHoldSize, InvalidImage, OutputTooLarge, TooManyPixels, UnsupportedFormat
from shared.sandbox import Limits, Sandbox, Task

if TYPE_CHECKING:
    from PIL import Image
    from pydantic import TypeAdapter

# Pillow is loaded where a picture is opened: the API does that in its sandbox alone, and would only start later for it.


@dataclass(frozen=True)
class Format:
    """One format Enlarger reads, writes or both."""

    name: str
    """The contract's word, also what a job's `format` is."""
    pillow_names: tuple[str, ...]
    """The decoders of Pillow that are enabled for it; no others are."""
    mime_type: str
    extension: str
    largest_side_px: int
    """Longest side that can be written."""
    written: bool
    """Can be asked for as a result. All formats of the table are read."""
    holds_alpha: bool
    holds_16_bit: bool
    holds_gray: bool
    """Has one channel for gray; otherwise gray is written as three equal channels."""
    lossless: Literal["always", "on request", "never"]


FORMATS: tuple[Format, ...] = (
    Format("png", ("PNG",), "image/png", ".png", 2**31 - 1, True, True, True, True, "always"),
    # The standard's fields reach 65,535; libjpeg, and with it everybody who writes JPEG, stops at 65,500.
    # MPO is what many phones and stereo cameras write: a JPEG with more pictures behind the first.
    Format("jpeg", ("JPEG", "MPO"), "image/jpeg", ".jpg", 65_500, True, False, False, True, "never"),
    Format("webp", ("WEBP",), "image/webp", ".webp", 16_383, True, True, False, False, "on request"),
    Format("tiff", ("TIFF",), "image/tiff", ".tif", 2**31 - 1, True, True, True, True, "always"),
    # libheif refuses to write more, though AV1 itself reaches 65,536.
    Format("avif", ("AVIF",), "image/avif", ".avif", 16_384, True, True, False, False, "on request"),
    Format("gif", ("GIF",), "image/gif", ".gif", 65_535, False, True, False, True, "always"),
    Format("bmp", ("BMP",), "image/bmp", ".bmp", 2**31 - 1, False, False, False, True, "always"),
)


def format_named(name: str) -> Format:
    """The row of FORMATS of that name. Raises UnsupportedFormat, naming those there are."""
    for candidate in FORMATS:
        if candidate.name == name:
            return candidate
    raise UnsupportedFormat(
        f"There is no format named {name!r}.", format=name, formats=[candidate.name for candidate in FORMATS]
    )


@dataclass(frozen=True)
class PictureFacts:
    """What the header says. Width and height are what a viewer shows: after the EXIF orientation is applied."""

    format: str
    width: int
    height: int
    mode: str
    """Pillow's word for the kind of pixels: `RGB`, `L`, `P`, `CMYK`, `I;16`, ..."""
    bits: int
    """Bits per sample as stored: 1, 2, 4, 8, 10, 12, 16 or 32; of a palette, those of its colours (8)."""
    is_gray: bool
    has_alpha: bool
    """Has an alpha channel or a transparent colour."""
    frames: int | None
    """Frames or pages; None where there are several and only reading the whole file would count them."""
    orientation: int
    """EXIF orientation, 1 to 8; already accounted for in `width` and `height`."""

    @property
    def pixels(self) -> int:
        return self.width * self.height


# Every decoder's metadata is read before its first pixel. Pillow reads JPEG's with quadratic effort (75 MB of EXIF
# segments took 24 s), so what it may read to open a file is bounded: by bytes, and by calls for chains of tiny blocks.
MAX_HEADER_BYTES = 16 * 2**20
MAX_HEADER_READS = 20_000
# Pillow makes several Python objects for each strip or tile of a TIFF: 262,144 tiles of 16 x 16 are 67 megapixels.
MAX_TIFF_STRIPS = 262_144
# A legitimate PNG of 100 MB in chunks of 8 kB has 12,000.
MAX_PNG_CHUNKS = 100_000
MAX_LATE_EXIF_BYTES = 2**20
# 255 MB in blocks of the usual 255 bytes; half a second in blocks of one.
MAX_GIF_BLOCKS = 1_000_000

ORIENTATION_TAG = 274
_TIFF_BITS_TAG = 258
_TIFF_STRIP_OFFSETS_TAG = 273
_TIFF_TILE_OFFSETS_TAG = 324


def inspect(file: BinaryIO, *, max_px: int | None = None) -> PictureFacts:
    """Describe the picture in `file`, a seekable binary file, from its header; the position is back at 0 afterwards.

    Raises UnsupportedFormat where the bytes are none of FORMATS, InvalidImage where they are and cannot be read, and
    TooManyPixels for a WebP of more than `max_px`: libwebp takes its memory on opening.
    """
    format = sniff(file)
    try:
        with refusing_what_pillow_refuses(format.name):
            if format.name == "tiff":
                _check_tiff_strips(file)
            if format.name == "webp" and max_px is not None:
                width, height = _webp_canvas(file)
                if width * height > max_px:
                    raise TooManyPixels(width, height, max_px)
            return _facts(format, file)
    finally:
        file.seek(0)


# Reading a header takes milliseconds. Memory: the largest file a few times (WebP and AVIF are read whole), and the two
# canvases of 4 bytes a pixel that libwebp asks for and hardly touches.
INSPECT_CPU_SECONDS = 4
INSPECT_WALL_SECONDS = 8.0
INSPECT_BYTES_PER_PX = 10
INSPECT_STEP_BYTES = 4 * 2**20
"""In steps of which a file's size counts: children with the same limits can stand in for each other."""
HEADROOM_BYTES = 256 * 2**20
"""Of a child's addresses: what any decoder takes for itself, and its threads' stacks."""


def inspect_in(sandbox: Sandbox, file: BinaryIO, *, max_px: int, owner: str | None = None) -> PictureFacts:
    """As `inspect`, in a child of `sandbox` (of this module, or of one that offers the same task): one that has read
    nothing before, or with `owner` nothing but pictures of theirs.

    What is no picture at all is refused without one. Raises what `inspect` raises, InvalidImage also where the child
    died of the file, and Unavailable.
    """
    sniff(file)
    steps = -(-file.seek(0, os.SEEK_END) // INSPECT_STEP_BYTES)
    limits = Limits(
        memory_bytes=HEADROOM_BYTES + 4 * steps * INSPECT_STEP_BYTES + INSPECT_BYTES_PER_PX * max_px,
        cpu_seconds=INSPECT_CPU_SECONDS,
        wall_seconds=INSPECT_WALL_SECONDS,
        output_bytes=0,
    )
    told, _ = sandbox.run("inspect", file, limits, owner=owner, max_px=max_px)
    try:
        return _told_facts().validate_python(told)
    # pydantic's ValidationError is one.
    except ValueError as error:
        raise InvalidImage("The picture's decoder broke off while reading it.") from error


@functools.cache
def _told_facts() -> TypeAdapter[PictureFacts]:
    # Not at the top: the warm process needs none of it, and every child pays for each megabyte it holds.
    from pydantic import TypeAdapter

    return TypeAdapter(PictureFacts)


def _inspect_task(file: BinaryIO, _output: BinaryIO, *, max_px: int) -> dict[str, Any]:
    return asdict(inspect(file, max_px=max_px))


# What a sandbox of this module does.
SANDBOXED: Mapping[str, Task] = {"inspect": _inspect_task}


def warm_up() -> None:
    """In a sandbox's warm process: what the first picture makes Pillow do (load its readers, compile its patterns) is
    done once, and not by every child."""
    # Loads the usual readers; the others are named.
    from PIL import AvifImagePlugin, Image, MpoImagePlugin, WebPImagePlugin  # noqa: F401

    for name in ("PNG", "JPEG", "TIFF", "BMP", "WEBP"):
        file = io.BytesIO()
        Image.new("RGB", (1, 1)).save(file, name)
        inspect(file)


def sniff(file: BinaryIO) -> Format:
    """Which row of FORMATS the first bytes belong to, whatever the file is called. The position is 0 afterwards.

    Raises InvalidImage for an empty file, UnsupportedFormat for anything else than FORMATS.
    """
    file.seek(0)
    head = file.read(64)
    file.seek(0)
    if not head:
        raise InvalidImage("The file is empty.")
    # Brands of an ISO media file: the major one, a version, then those it is compatible with.
    brands = head[8 : min(len(head), int.from_bytes(head[:4], "big"))] if head[4:8] == b"ftyp" else b""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        name = "png"
    elif head.startswith(b"\xff\xd8\xff"):
        name = "jpeg"
    elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        name = "webp"
    elif head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        name = "tiff"
    elif head.startswith((b"GIF87a", b"GIF89a")):
        name = "gif"
    elif head.startswith(b"BM"):
        name = "bmp"
    elif b"avif" in brands or b"avis" in brands:
        name = "avif"
    else:
        names = [format.name for format in FORMATS]
        raise UnsupportedFormat(
            f"The file is not a picture in a format Enlarger reads ({', '.join(names)}).", formats=names
        )
    return format_named(name)


@functools.cache
def pillow_raises() -> tuple[type[Exception], ...]:
    """Everything Pillow was seen to raise on broken or hostile files (the documented OSError is the smaller part), and
    what its helpers raise below it."""
    from PIL import Image, ImageCms

    # UnidentifiedImageError is an OSError; UnicodeError a ValueError; NotImplementedError and RecursionError are
    # RuntimeErrors; OverflowError and ZeroDivisionError are ArithmeticErrors.
    return (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        AssertionError,
        EOFError,
        RuntimeError,
        ArithmeticError,
        MemoryError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
        ImageCms.PyCMSError,
    )


@contextmanager
def refusing_what_pillow_refuses(format_name: str) -> Iterator[None]:
    """Run Pillow inside: whatever it raises becomes InvalidImage, its warnings are silenced, its bomb check is off.

    Off, because it warns and raises by limits of its own; ours are settings and are checked by `check_size`.
    """
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    # A filter of the process, set again where something removed it: catch_warnings() swaps global state back and
    # forth, which threads of the API would do under each other's feet. What matters becomes a warning of the job.
    if not any(entry[3] is not None and getattr(entry[3], "pattern", "") == r"PIL\." for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        yield
    except pillow_raises() as error:
        raise InvalidImage(
            f"The file starts as {format_name.upper()} and cannot be read: {_reason(error)}.", format=format_name
        ) from error


def _reason(error: Exception) -> str:
    """A foreign exception in words fit for a customer: no addresses of objects, no paths, one line."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "its header is broken, or its kind of pixels is not read"
    if isinstance(error, MemoryError):
        return "it needs more memory than a picture may take"
    text = " ".join(str(error).split())[:200].rstrip(".")
    return text if text and "<" not in text and "/" not in text else "it is broken or cut short"


def check_size(
    facts: PictureFacts, scale: float, format: str, *, max_input_px: int, max_output_px: int, lossless: bool = False
) -> tuple[int, int]:
    """Refuse at submit what could not be done later. Returns the result's (width, height) in px.

    `format` is concrete or `auto`. Raises TooManyPixels, OutputTooLarge or FormatCannotHoldSize, in that order.
    """
    if facts.pixels > max_input_px:
        raise TooManyPixels(facts.width, facts.height, max_input_px)
    width, height = (max(1, round(side * scale)) for side in (facts.width, facts.height))
    if width * height > max_output_px:
        raise OutputTooLarge(width, height, max_output_px)
    written = format_named(output_format(format, facts.format, width, height, lossless=lossless))
    if max(width, height) > written.largest_side_px:
        raise FormatCannotHoldSize(written.name, width, height, written.largest_side_px)
    return width, height


SURE_WEBP_PX = 150_000_000
"""Of more, VP8 may have no room for how its blocks are predicted (RFC 6386, section 9.1), which shows at the very end
of encoding."""


def output_format(requested: str, input_format: str, out_width: int, out_height: int, *, lossless: bool = False) -> str:
    """The concrete format of a result. `auto` keeps JPEG and WebP where they are sure to hold it (and, asked for
    `lossless`, where they can do that); all else becomes PNG. Raises UnsupportedFormat for one we do not write."""
    if requested != "auto":
        if not format_named(requested).written:
            raise UnsupportedFormat(
                f"Results are not written as {requested.upper()}.",
                format=requested,
                formats=[format.name for format in FORMATS if format.written],
            )
        return requested
    if input_format in ("jpeg", "webp"):
        same = format_named(input_format)
        is_unsure = same.name == "webp" and not lossless and out_width * out_height > SURE_WEBP_PX
        holds_size = max(out_width, out_height) <= same.largest_side_px and not is_unsure
        if holds_size and not (lossless and same.lossless == "never"):
            return same.name
    return "png"


class _MeteredFile:
    """A file that refuses to be read without end: stands between Pillow and the upload while a header is read."""

    def __init__(self, file: BinaryIO, byte_limit: int) -> None:
        self._file = file
        self._bytes_left = byte_limit
        self._reads_left = MAX_HEADER_READS

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._reads_left -= 1
        self._bytes_left -= len(data)
        if self._reads_left < 0 or self._bytes_left < 0:
            raise InvalidImage("The file holds more metadata before its picture than is read.")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _facts(format: Format, file: BinaryIO) -> PictureFacts:
    from PIL import Image, TiffImagePlugin

    if format.name == "gif":
        return _gif_facts(file)
    byte_limit = MAX_HEADER_BYTES
    if format.name in ("webp", "avif", "tiff"):
        # The first two decoders take the whole file in one gulp; layered TIFFs of photo editors carry tens of
        # megabytes of private tags. Tags that all point at the same bytes, to be read thousands of times, are caught.
        byte_limit += file.seek(0, os.SEEK_END)
        file.seek(0)
    metered = _MeteredFile(file, byte_limit)
    image = Image.open(cast("IO[bytes]", metered), formats=format.pillow_names)
    width, height = image.size
    orientation = 1
    bits = 8
    frames: int | None = 1
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # Pillow gives the size after orientation for TIFF alone, and turns the pixels itself when it loads them.
        orientation = int(image.tag_v2.get(ORIENTATION_TAG, 1))
        bits = max(_integers(image.tag_v2.get(_TIFF_BITS_TAG, 1)))
        frames = None if image.is_animated else 1
    else:
        frames = int(getattr(image, "n_frames", 1))
        if format.name == "png":
            bits, late_exif = _walk_png(file)
            if late_exif is not None and "exif" not in image.info:
                image.info["exif"] = b"Exif\0\0" + late_exif
        elif format.name == "avif":
            bits = _avif_bits(file)
        orientation = orientation_of(image)
        if orientation in (5, 6, 7, 8):
            width, height = height, width
    if width <= 0 or height <= 0:
        raise InvalidImage(f"The picture is {width} x {height} px.", width_px=width, height_px=height)
    return PictureFacts(
        format=format.name,
        width=width,
        height=height,
        mode=image.mode,
        bits=8 if image.mode == "P" else bits,
        is_gray=image.mode.startswith(("1", "L", "I", "F")) and image.mode != "LAB",
        has_alpha=image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info,
        frames=frames,
        orientation=orientation if 1 <= orientation <= 8 else 1,
    )


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, of a picture that is not TIFF; 1 where there is none or the EXIF block is broken."""
    from PIL import Image

    try:
        # Not image.getexif(): PNG's loads the whole picture to look for EXIF behind it.
        orientation = int(Image.Image.getexif(image).get(ORIENTATION_TAG, 1))
    except pillow_raises():
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _integers(value: Any) -> tuple[int, ...]:
    return tuple(int(item) for item in value) if isinstance(value, tuple) else (int(value),)


def _webp_canvas(file: BinaryIO) -> tuple[int, int]:
    """(width, height) a WebP claims, read by hand (RFC 9649, section 2); (0, 0) where its first chunk is unknown.

    Pillow's decoder takes memory for two canvases before anybody can ask it for their size.
    """
    file.seek(12)
    chunk = file.read(18)
    file.seek(0)
    if chunk[:4] == b"VP8X":
        return int.from_bytes(chunk[12:15], "little") + 1, int.from_bytes(chunk[15:18], "little") + 1
    if chunk[:4] == b"VP8L":
        sides = int.from_bytes(chunk[9:13], "little")
        return (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
    if chunk[:4] == b"VP8 ":
        return int.from_bytes(chunk[14:16], "little") & 0x3FFF, int.from_bytes(chunk[16:18], "little") & 0x3FFF
    return 0, 0


def _gif_facts(file: BinaryIO) -> PictureFacts:
    """By our own reading of GIF89a: merely to open a GIF, Pillow may fill a canvas of the claimed size, 4 gigapixels
    in 14 s for a file of 76 bytes.

    Takes time linear in the length of the first frame's data, to see whether another frame follows.
    """
    _, width, height, flags, _, _ = struct.unpack("<6sHHBBB", file.read(13))
    palette = file.read(_gif_palette_bytes(flags))
    has_transparency = False
    blocks_left = MAX_HEADER_READS
    while (kind := file.read(1)) not in (b"", b";"):
        # Bytes between blocks are no blocks and are skipped, as Pillow does; too many of them are no GIF.
        blocks_left -= 1
        if blocks_left < 0:
            break
        if kind == b"!":
            label = file.read(1)
            if label != b"\xfe":
                first = _gif_block(file)
                has_transparency = has_transparency or bool(label == b"\xf9" and first[0] & 1)
                if label == b"\xff" and first.startswith(b"NETSCAPE2.0"):
                    _gif_block(file)
            blocks_left -= _skip_gif_blocks(file, blocks_left)
        elif kind == b",":
            x, y, frame_width, frame_height, flags = struct.unpack("<HHHHB", file.read(9))
            # A frame may reach beyond the screen, which then grows.
            width, height = max(width, x + frame_width), max(height, y + frame_height)
            palette = file.read(_gif_palette_bytes(flags)) or palette
            file.read(1)
            break
    if kind != b",":
        raise InvalidImage("The GIF holds no picture.")
    if width <= 0 or height <= 0:
        raise InvalidImage(f"The picture is {width} x {height} px.", width_px=width, height_px=height)
    # Pillow's rule: no palette, or one that counts from black up, is gray.
    is_gray = all(palette[i : i + 3] == bytes([i // 3] * 3) for i in range(0, len(palette), 3))
    return PictureFacts(
        format="gif",
        width=width,
        height=height,
        mode="L" if is_gray else "P",
        bits=8,
        is_gray=is_gray,
        has_alpha=has_transparency,
        frames=None if _goes_on_with_a_frame(file) else 1,
        orientation=1,
    )


def _gif_palette_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _gif_block(file: BinaryIO) -> bytes:
    """A data block that has to be there. Where it is not, Pillow reads on behind the extension's end, so that it would
    see another picture than we do and than the standard says."""
    size = file.read(1)
    block = file.read(size[0]) if size else b""
    if not block:
        raise InvalidImage("The GIF holds an extension without data.")
    return block


def _skip_gif_blocks(file: BinaryIO, most: int) -> int:
    """Skip data blocks up to the empty one that ends them, or `most` of them; returns how many."""
    for count in range(most):
        size = file.read(1)
        if size in (b"", b"\0"):
            return count
        file.seek(size[0], os.SEEK_CUR)
    return most


def _goes_on_with_a_frame(file: BinaryIO) -> bool:
    """Whether, behind the data of a GIF's first frame, another frame begins."""
    blocks_left = MAX_GIF_BLOCKS - _skip_gif_blocks(file, MAX_GIF_BLOCKS)
    while blocks_left > 0 and (kind := file.read(1)) not in (b"", b";"):
        if kind == b",":
            return True
        blocks_left -= 1
        if kind == b"!":
            file.read(1)
            blocks_left -= _skip_gif_blocks(file, blocks_left)
    return False


def _walk_png(file: BinaryIO) -> tuple[int, bytes | None]:
    """(bits per sample, EXIF block found behind the pixels or None), by hopping from chunk to chunk (PNG, section 5).

    Pillow sees EXIF behind the pixels only after decoding them, and tells 16-bit colour nowhere.
    """
    bits = 8
    late_exif = None
    behind_pixels = False
    position = 8
    for _ in range(MAX_PNG_CHUNKS):
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            break
        length, kind = struct.unpack(">I4s", header)
        if kind == b"IHDR":
            bits = int(file.read(9)[8])
        elif kind == b"IDAT":
            behind_pixels = True
        elif kind == b"eXIf" and behind_pixels and length <= MAX_LATE_EXIF_BYTES:
            late_exif = file.read(length)
        elif kind == b"IEND":
            break
        position += 12 + length
    return bits, late_exif


def _avif_bits(file: BinaryIO) -> int:
    """Bits per sample of an AVIF: two flags in the third byte of its `av1C` box (AV1-ISOBMFF, section 2.3.3)."""
    file.seek(0)
    head = file.read(2**16)
    at = head.find(b"av1C")
    if at < 0 or at + 6 >= len(head):
        return 8
    flags = head[at + 6]
    return (12 if flags & 0x20 else 10) if flags & 0x40 else 8


def _check_tiff_strips(file: BinaryIO) -> None:
    """Refuse a TIFF whose first page is cut in more strips or tiles than any real one (TIFF 6.0, section 2)."""
    file.seek(0)
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    is_big = head[2:4] in (b"+\0", b"\0+")
    (start,) = struct.unpack_from(order + ("Q" if is_big else "I"), head, 8 if is_big else 4)
    file.seek(start)
    (entries,) = struct.unpack(order + ("Q" if is_big else "H"), file.read(8 if is_big else 2))
    entry = struct.Struct(order + ("HHQ8s" if is_big else "HHI4s"))
    # A page with more tags than this is refused by the meter once Pillow reads it.
    for _ in range(min(entries, MAX_HEADER_READS)):
        data = file.read(entry.size)
        if len(data) < entry.size:
            return
        tag, _, count, _ = entry.unpack(data)
        if tag in (_TIFF_STRIP_OFFSETS_TAG, _TIFF_TILE_OFFSETS_TAG) and count > MAX_TIFF_STRIPS:
            raise InvalidImage(
                f"The TIFF is cut in {count:,} strips; at most {MAX_TIFF_STRIPS:,} are read.", strips=count
            )
