"""A result that goes up while it is written: whole and once in real storage, or not at all."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import StorageUnavailable
from shared.pictures import format_named
from shared.storage import Storage, Upload
from tests.conftest import wait_until
from worker import storing
from worker.codec.encode import WRITTEN_IN_ORDER, open_encoder, partial_path
from worker.storing import Storing

KEY = "jobs/job_1/random/result-1.png"
PNG = format_named("png")
PART = 5 * 2**20
"""The least that S3 takes for a part that is not the last."""
NO_ROWS = np.zeros((0, 1, 3), np.uint8)
SMALL, LARGE = (100, 100), (1000, 1000)
"""Width and height of results that surely make no part, and that may."""


@pytest.fixture(autouse=True)
def smallest_parts(monkeypatch: pytest.MonkeyPatch, storage: Storage) -> None:
    storage.ensure_bucket()
    monkeypatch.setattr(storing, "MULTIPART_BYTES", PART)
    monkeypatch.setattr(storing, "LOOK_SECONDS", 0.01)


def uploads_under_way(storage: Storage) -> list[Any]:
    found = storage._client.list_multipart_uploads(Bucket=storage.bucket)
    return list(found.get("Uploads", ()))


def stored(storage: Storage) -> bytes:
    file = io.BytesIO()
    storage.get(KEY, file)
    return file.getvalue()


class Growing:
    """A file as the encoder leaves it, a piece at a time."""

    def __init__(self, path: Path) -> None:
        self.path, self.content = path, b""

    def grow(self, size: int) -> None:
        piece = os.urandom(size)
        self.content += piece
        with partial_path(self.path).open("ab") as file:
            file.write(piece)

    def end(self) -> None:
        partial_path(self.path).rename(self.path)


@pytest.mark.parametrize("last", [0, 1, 1000])
def test_a_large_result_is_sent_as_it_grows_and_is_seen_when_it_is_whole(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    sent: list[int] = []
    send = Upload.send
    monkeypatch.setattr(Upload, "send", lambda self, part: (send(self, part), sent.append(len(part))))
    growing, told = Growing(tmp_path / "result.png"), []
    with Storing(storage, KEY, growing.path, PNG, on_bytes=told.append) as result:
        result.begins(NO_ROWS, *LARGE)
        growing.grow(PART + 7)
        result.made(NO_ROWS)
        wait_until(lambda: sent == [PART], seconds=20, what="a part")
        growing.grow(PART - 7 + last)
        wait_until(lambda: sent == [PART, PART], seconds=20, what="two parts")
        assert storage.keys() == []
        assert told == [], "while it grows, the network's progress renews the lease and nothing else"
        growing.end()
        sha256 = result.finish()
    assert sent == [PART, PART, *([last] if last else [])]
    assert told == [last][: len(sent) - 2]
    assert stored(storage) == growing.content
    assert sha256 == hashlib.sha256(growing.content).hexdigest()
    assert uploads_under_way(storage) == []


@pytest.mark.parametrize(
    ("format", "size", "picture"), [("png", 1000, SMALL), ("png", 1000, LARGE), ("tiff", PART + 1, LARGE)]
)
def test_what_is_small_or_not_written_in_order_is_put_at_the_end(
    storage: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    size: int,
    picture: tuple[int, int],
) -> None:
    monkeypatch.setattr(Storage, "begin", None)
    growing = Growing(tmp_path / "result")
    with Storing(storage, KEY, growing.path, format_named(format), on_bytes=lambda _: None) as result:
        result.begins(NO_ROWS, *picture)
        growing.grow(size)
        result.made(NO_ROWS)
        growing.end()
        assert result.finish() == hashlib.sha256(growing.content).hexdigest()
    assert stored(storage) == growing.content


def test_an_attempt_that_ends_otherwise_leaves_nothing_in_storage(storage: Storage, tmp_path: Path) -> None:
    growing = Growing(tmp_path / "result.png")

    def attempt() -> None:
        with Storing(storage, KEY, growing.path, PNG, on_bytes=lambda _: None) as result:
            result.begins(NO_ROWS, *LARGE)
            growing.grow(PART)
            result.made(NO_ROWS)
            wait_until(lambda: uploads_under_way(storage), seconds=20, what="an upload")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt()
    assert uploads_under_way(storage) == []
    assert storage.keys() == []


def test_a_result_made_again_is_sent_from_its_start(storage: Storage, tmp_path: Path) -> None:
    first, second = Growing(tmp_path / "result.png"), Growing(tmp_path / "result.png")
    with Storing(storage, KEY, first.path, PNG, on_bytes=lambda _: None) as result:
        for growing in (first, second):
            partial_path(growing.path).unlink(missing_ok=True)
            result.begins(NO_ROWS, *LARGE)
            growing.grow(PART + 1)
            result.made(NO_ROWS)
            wait_until(lambda: uploads_under_way(storage), seconds=20, what="an upload")
        second.end()
        result.finish()
    assert stored(storage) == second.content


def test_a_part_that_does_not_go_through_costs_the_start_and_not_the_result(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise StorageUnavailable("Object storage does not answer.")

    monkeypatch.setattr(Upload, "send", away)
    growing = Growing(tmp_path / "result.png")
    with Storing(storage, KEY, growing.path, PNG, on_bytes=lambda _: None) as result:
        result.begins(NO_ROWS, *LARGE)
        growing.grow(PART + 1)
        result.made(NO_ROWS)
        growing.end()
        assert result.finish() == hashlib.sha256(growing.content).hexdigest()
    assert stored(storage) == growing.content
    assert uploads_under_way(storage) == []


@pytest.mark.parametrize("format", sorted(WRITTEN_IN_ORDER))
def test_what_these_formats_have_written_they_never_change(tmp_path: Path, format: str) -> None:
    chance = np.random.default_rng(1)
    path = tmp_path / "result"
    seen: list[bytes] = []

    def look() -> bool:
        content = partial_path(path).read_bytes() if partial_path(path).exists() else b""
        seen.append(content)
        return len(content) > 100_000 * len(seen) or len(content) > 300_000

    with open_encoder(path, format, 1000, 1000, channels=3) as encoder:
        for _ in range(10):
            encoder.write(chance.integers(0, 256, (100, 1000, 3), dtype=np.uint8))
            look()
        wait_until(look, seconds=20, what="what is written")
    whole = path.read_bytes()
    assert len(seen[-1]) > 300_000
    assert all(whole.startswith(content) for content in seen)
