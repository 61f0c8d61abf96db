"""A result on its way to storage: what the encoder has finished is sent while the network makes the rest.

An Onlooker (`worker.enlarging`) whose thread follows the file that the encoder writes, and sends a part each time there
is one. Nothing is visible before `finish`; an attempt that fails, is canceled or loses its lease aborts its parts.
Small results, and formats whose file is not written from its start to its end, are put in one go at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from shared.errors import StorageUnavailable
from shared.pictures import Format
from shared.storage import MULTIPART_BYTES, Storage, Upload
from shared.telemetry import log
from worker.codec import Samples
from worker.codec.encode import WRITTEN_IN_ORDER, partial_path

MOST_BYTES_PER_PX = 8
"""Of a result before it is packed: four channels of 16 bits."""
LOOK_SECONDS = 0.25
"""Between two looks at how long the file is. A part is some tenths of a second of encoding."""


class Storing:
    """Of one attempt's result. A context manager: leaving it aborts what was not finished."""

    def __init__(
        self, storage: Storage, key: str, path: Path, format: Format, *, on_bytes: Callable[[int], None]
    ) -> None:
        """`path`: where the encoder will put the result. `on_bytes` hears of what is sent within `finish`."""
        self._storage, self._key, self._path, self._format, self._on_bytes = storage, key, path, format, on_bytes
        self._thread: threading.Thread | None = None
        self._may_be_large = False
        self._is_whole, self._is_over = threading.Event(), threading.Event()
        self._upload: Upload | None = None
        self._sha256 = hashlib.sha256()
        self._error: StorageUnavailable | OSError | None = None

    def begins(self, input_rgb: Samples, width: int, height: int, rows: range | None = None) -> None:  # noqa: ARG002
        """The result is begun, perhaps anew: what was sent of it before is of another one."""
        self._give_up()
        self._may_be_large = MOST_BYTES_PER_PX * width * height > MULTIPART_BYTES

    def made(self, rows: Samples) -> None:  # noqa: ARG002  (an Onlooker's)
        """Some rows have gone to the encoder."""
        if self._thread is None and self._may_be_large and self._format.name in WRITTEN_IN_ORDER:
            self._thread = threading.Thread(target=self._follow, name="storing", daemon=True)
            self._thread.start()

    def finish(self) -> str:
        """The file is whole: stores what is left of it, and returns its SHA-256. Raises StorageUnavailable."""
        self._is_whole.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is None and self._upload is not None:
            self._upload.complete()
            self._upload = None
            return self._sha256.hexdigest()
        # Also where a part did not go through: storage may be back, and the file is whole.
        with self._path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            self._storage.put(self._key, file, self._format.mime_type, on_bytes=self._on_bytes)
        return sha256

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_up()

    def _give_up(self) -> None:
        """As if nothing had been sent."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._upload is not None:
            # Those of a storage that is away are swept one day.
            with contextlib.suppress(StorageUnavailable):
                self._upload.abort()
            self._upload = None
        self._is_whole, self._is_over = threading.Event(), threading.Event()
        self._sha256, self._error = hashlib.sha256(), None

    def _follow(self) -> None:
        try:
            self._send_as_it_grows()
        except (StorageUnavailable, OSError) as error:
            self._error = error
            log.info("result.part_not_stored", detail=str(error))

    def _send_as_it_grows(self) -> None:
        is_whole, is_over = self._is_whole, self._is_over
        # Opened by the name it has while it grows; the same file gets its own name when it is whole.
        path = partial_path(self._path)
        while not path.exists():
            if is_over.is_set() or is_whole.wait(LOOK_SECONDS):
                return
        with path.open("rb") as file:
            # One for all parts, filled as the file grows: bytes put together anew at each look are held twice.
            part, filled = bytearray(MULTIPART_BYTES), 0
            while not is_over.is_set():
                # In this order: what is written between the two looks is seen by the second.
                was_whole = is_whole.is_set()
                with memoryview(part) as view:
                    filled += file.readinto(view[filled:])
                if filled == MULTIPART_BYTES or (was_whole and filled and self._upload is not None):
                    # Only the last is shorter.
                    del part[filled:]
                    if self._upload is None:
                        self._upload = self._storage.begin(self._key, self._format.mime_type)
                    self._upload.send(part)
                    self._sha256.update(part)
                    if was_whole:
                        # Not before: while the network runs its own progress renews the lease, and nothing else may.
                        self._on_bytes(filled)
                    filled = 0
                elif was_whole:
                    return
                else:
                    is_whole.wait(LOOK_SECONDS)
