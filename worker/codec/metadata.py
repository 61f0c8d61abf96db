"""What stands beside the pixels: read from a file, and chosen for a result. No orientation, which is applied, and no
colour profile: results are sRGB."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Literal
from xml.sax.saxutils import escape

from PIL import ExifTags, Image, TiffImagePlugin

from shared.pictures import ORIENTATION_TAG, pillow_raises


@dataclass(frozen=True)
class SourceMetadata:
    """What a file says beside its pixels and their colours, for `metadata_for_result`."""

    exif: bytes | None = None
    """EXIF block without its prefix and without orientation, which is applied; None where there is none."""
    xmp: bytes | None = None
    dpi: float | None = None
    is_broken: bool = False
    """There was an EXIF block and it could not be read."""


@dataclass(frozen=True)
class Metadata:
    """What is written beside the pixels. The colour profile is no part of it: results are always tagged sRGB."""

    exif: bytes | None = None
    """EXIF block, without the `Exif` prefix."""
    xmp: bytes | None = None
    dpi: float = 72.0


# `safe` is a list of what is kept, so that a tag nobody thought of is dropped: who made it, when, what of and how.
# Never in it: position (GPS), serial numbers, owner, unique ids, maker notes, comments, thumbnail.
_SAFE_TAGS = frozenset(
    int(tag)
    for tag in (
        ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.Software,
        ExifTags.Base.DateTime, ExifTags.Base.Artist, ExifTags.Base.Copyright, ExifTags.Base.XResolution,
        ExifTags.Base.YResolution, ExifTags.Base.ResolutionUnit,
    )
)  # fmt: skip
_SAFE_PHOTO_TAGS = frozenset(
    int(tag)
    for tag in (
        ExifTags.Base.ExifVersion, ExifTags.Base.DateTimeOriginal, ExifTags.Base.DateTimeDigitized,
        ExifTags.Base.OffsetTime, ExifTags.Base.OffsetTimeOriginal, ExifTags.Base.OffsetTimeDigitized,
        ExifTags.Base.SubsecTime, ExifTags.Base.SubsecTimeOriginal, ExifTags.Base.SubsecTimeDigitized,
        ExifTags.Base.ExposureTime, ExifTags.Base.FNumber, ExifTags.Base.ExposureProgram,
        ExifTags.Base.ISOSpeedRatings, ExifTags.Base.ShutterSpeedValue, ExifTags.Base.ApertureValue,
        ExifTags.Base.ExposureBiasValue, ExifTags.Base.MeteringMode, ExifTags.Base.LightSource, ExifTags.Base.Flash,
        ExifTags.Base.FocalLength, ExifTags.Base.FocalLengthIn35mmFilm, ExifTags.Base.WhiteBalance,
        ExifTags.Base.LensMake, ExifTags.Base.LensModel,
    )
)  # fmt: skip
# Tags of a TIFF that say how its pixels lie in the file, or hold other blocks: no part of its EXIF.
_TIFF_TAGS_OF_STORAGE = frozenset((
    254, 255, 256, 257, 258, 259, 262, 263, 266, 273, 277, 278, 279, 280, 281, 284, 288, 289, 290, 291, 292, 293, 297,
    301, 317, 318, 319, 320, 321, 322, 323, 324, 325, 330, 332, 333, 334, 336, 338, 339, 340, 341, 342, 347, 512, 513,
    514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 700, 33723, 34377, 34675, 37724, 50341,
))  # fmt: skip


def metadata_for_result(
    source: SourceMetadata, policy: Literal["safe", "keep", "strip"], width: int, height: int
) -> Metadata:
    """What goes into a result of `width` x `height` px. Orientation is 1 and the pixel dimensions are the result's.

    `strip`: nothing. `keep`: all EXIF but the thumbnail, and XMP. `safe`: only tags known to be harmless; no XMP,
    which may hold positions and serial numbers anywhere. An EXIF block that cannot be read is dropped.
    """
    if policy == "strip":
        return Metadata()
    exif = None
    if source.exif is not None:
        try:
            exif = _exif_for_result(source.exif, policy == "keep", width, height)
        except pillow_raises():
            exif = None
    xmp = _xmp_for_result(source.xmp, width, height) if source.xmp and policy == "keep" else None
    return Metadata(exif, xmp, source.dpi or Metadata.dpi)


def _exif_for_result(source: bytes, keep: bool, width: int, height: int) -> bytes | None:
    exif = Image.Exif()
    exif.load(b"Exif\0\0" + source)
    photo = exif.get_ifd(ExifTags.IFD.Exif)
    kept = Image.Exif()
    kept.endian = exif.endian
    for tag, value in exif.items():
        if tag not in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo) and (keep or tag in _SAFE_TAGS):
            kept[tag] = value
    kept_photo = {tag: value for tag, value in photo.items() if keep or tag in _SAFE_PHOTO_TAGS}
    if not kept and not kept_photo:
        return None
    kept[ORIENTATION_TAG] = 1
    kept_photo[int(ExifTags.Base.ColorSpace)] = 1
    kept_photo[int(ExifTags.Base.ExifImageWidth)] = width
    kept_photo[int(ExifTags.Base.ExifImageHeight)] = height
    kept[int(ExifTags.IFD.Exif)] = kept_photo
    if keep and (position := exif.get_ifd(ExifTags.IFD.GPSInfo)):
        kept[int(ExifTags.IFD.GPSInfo)] = position
    return kept.tobytes().removeprefix(b"Exif\0\0")


def _xmp_for_result(xmp: bytes, width: int, height: int) -> bytes:
    """The packet with orientation and dimensions set right, as attributes or as elements."""
    for name, value in (
        (rb"tiff:Orientation", 1),
        (rb"tiff:ImageWidth", width),
        (rb"tiff:ImageLength", height),
        (rb"exif:PixelXDimension", width),
        (rb"exif:PixelYDimension", height),
    ):
        number = str(value).encode()
        xmp = re.sub(name + rb'="\d+"', name + b'="' + number + b'"', xmp)
        xmp = re.sub(rb"<" + name + rb">\s*\d+\s*<", b"<" + name + b">" + number + b"<", xmp)
    return xmp


def source_metadata(image: Image.Image) -> SourceMetadata:
    """What a picture opened by Pillow says of itself. Raises nothing: metadata is no reason to refuse a picture."""
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if isinstance(xmp, str):
        xmp = xmp.encode()
    try:
        dpi: float | None = float(image.info["dpi"][0])
        # Also false for NaN, which is what 0/0 in a file becomes.
        if dpi is None or not 1 <= dpi <= 100_000:
            dpi = None
    except pillow_raises():
        dpi = None
    is_tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    try:
        exif = Image.Image.getexif(image)
        photo = exif.get_ifd(ExifTags.IFD.Exif)
        position = exif.get_ifd(ExifTags.IFD.GPSInfo)
        copied = Image.Exif()
        copied.endian = exif.endian
        for tag, value in exif.items():
            if tag not in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ORIENTATION_TAG) and not (
                is_tiff and tag in _TIFF_TAGS_OF_STORAGE
            ):
                copied[tag] = value
        if photo:
            copied[int(ExifTags.IFD.Exif)] = photo
        if position:
            copied[int(ExifTags.IFD.GPSInfo)] = position
        block = copied.tobytes().removeprefix(b"Exif\0\0") if len(copied) else None
    except pillow_raises():
        return SourceMetadata(None, xmp, dpi, is_broken=True)
    return SourceMetadata(block, xmp, dpi)


def xmp_of_exif(exif: bytes) -> bytes | None:
    """Who, what, when and whose in XMP (ISO 16684-1), for TIFF, where libvips writes no EXIF."""
    source = Image.Exif()
    source.load(b"Exif\0\0" + exif)
    photo = source.get_ifd(ExifTags.IFD.Exif)

    def text(value: object) -> str:
        return escape(str(value).strip("\0 "))

    fields = []
    if value := source.get(ExifTags.Base.Artist):
        fields.append(f"<dc:creator><rdf:Seq><rdf:li>{text(value)}</rdf:li></rdf:Seq></dc:creator>")
    for tag, name in ((ExifTags.Base.Copyright, "dc:rights"), (ExifTags.Base.ImageDescription, "dc:description")):
        if value := source.get(tag):
            alternative = f'<rdf:Alt><rdf:li xml:lang="x-default">{text(value)}</rdf:li></rdf:Alt>'
            fields.append(f"<{name}>{alternative}</{name}>")
    taken = photo.get(ExifTags.Base.DateTimeOriginal) or source.get(ExifTags.Base.DateTime)
    if taken and re.fullmatch(r"\d{4}:\d\d:\d\d \d\d:\d\d:\d\d", text(taken)):
        date = text(taken).replace(":", "-", 2).replace(" ", "T")
        fields.append(f"<xmp:CreateDate>{date}</xmp:CreateDate>")
    for tag, name in ((ExifTags.Base.Make, "tiff:Make"), (ExifTags.Base.Model, "tiff:Model")):
        if value := source.get(tag):
            fields.append(f"<{name}>{text(value)}</{name}>")
    if not fields:
        return None
    return (
        '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
        ' xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
        f' xmlns:tiff="http://ns.adobe.com/tiff/1.0/">{"".join(fields)}</rdf:Description></rdf:RDF></x:xmpmeta>'
        '<?xpacket end="w"?>'
    ).encode()


def exif_of_size(exif: bytes, width: int, height: int) -> bytes:
    """The EXIF block, without its prefix, with the dimensions set right where they stand: libvips has written those of
    a file of one px."""
    order = "<" if exif[:2] == b"II" else ">"
    sizes = {int(ExifTags.Base.ExifImageWidth): width, int(ExifTags.Base.ExifImageHeight): height}
    patched = bytearray(exif)
    directories = [struct.unpack_from(f"{order}I", exif, 4)[0]]
    while directories:
        start = directories.pop()
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == ExifTags.IFD.Exif:
                directories += struct.unpack_from(f"{order}I", exif, entry + 8)
            elif tag in sizes:
                struct.pack_into(order + {3: "H", 4: "I"}[kind], patched, entry + 8, sizes[tag])
    return bytes(patched)
