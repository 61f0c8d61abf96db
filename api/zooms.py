"""Tiles out of a pyramid in storage: one range of one blob each, and never the whole.

The worker stores a pyramid as one zip file whose entries are not deflated (`worker.codec.convert.write_pyramid`): a
thousand megapixels are five thousand tiles, and as many blobs would be slow to store and slow to delete. Where each
tile lies stands at the file's end; it is read once and remembered for the pyramids looked at last.
"""

from __future__ import annotations

import io
import re
import threading
import zipfile
from collections import OrderedDict
from dataclasses import dataclass

from shared.errors import NotFound
from shared.storage import Storage

REMEMBERED = 16
"""Pyramids of a thousand megapixels, whose places take a few MB each."""
# A local header has 30 bytes, the name and what libvips writes beside it; read together with the tile, in one request.
LOCAL_HEADER_BYTES = 30
_TILE = re.compile(r"(?:.*/)?(\d+)/(\d+_\d+)\.(jpeg|webp)")


@dataclass(frozen=True)
class Place:
    """Where a tile lies in the zip file."""

    offset: int
    """Of its local header."""
    name_bytes: int
    size_bytes: int
    mime_type: str


class Zooms:
    """The pyramids this process has looked into. Thread-safe."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: OrderedDict[str, dict[tuple[int, str], Place]] = OrderedDict()
        self._lock = threading.Lock()

    def tile(self, key: str, level: int, name: str) -> tuple[bytes, str]:
        """The encoded tile `column_row` of a level, and its type. Raises NotFound, BlobMissing, StorageUnavailable."""
        place = self._places(key).get((level, name))
        if place is None:
            raise NotFound("The pyramid has no such tile.", level=level, tile=name)
        # The local header's extra field may be longer than the directory's: its length stands in the header itself.
        part = self._storage.part(key, place.offset, LOCAL_HEADER_BYTES + place.name_bytes + place.size_bytes + 64)
        extra_bytes = int.from_bytes(part[28:30], "little")
        start = LOCAL_HEADER_BYTES + place.name_bytes + extra_bytes
        return part[start : start + place.size_bytes], place.mime_type

    def format(self, key: str) -> str:
        """`jpeg` or `webp`. Raises as `tile` does."""
        first = next(iter(self._places(key).values()))
        return first.mime_type.partition("/")[2]

    def _places(self, key: str) -> dict[tuple[int, str], Place]:
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
                return known
        places: dict[tuple[int, str], Place] = {}
        with zipfile.ZipFile(_Ranges(self._storage, key)) as archive:
            for entry in archive.infolist():
                found = _TILE.fullmatch(entry.filename)
                if found is not None and entry.compress_type == zipfile.ZIP_STORED:
                    size = (entry.header_offset, len(entry.filename.encode()), entry.file_size)
                    places[int(found[1]), found[2]] = Place(*size, f"image/{found[3]}")
        with self._lock:
            self._known[key] = places
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return places


class _Ranges(io.RawIOBase):
    """A blob as a file that is read where it is looked at."""

    def __init__(self, storage: Storage, key: str) -> None:
        self._storage, self._key = storage, key
        self._size = storage.facts(key).bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        length = left if size is None or size < 0 else min(size, left)
        if length == 0:
            return b""
        part = self._storage.part(self._key, self._at, length)
        self._at += len(part)
        return part
