"""Blobs on a real S3 server: stored, read, linked and removed; errors of the vendor never get past this module."""

from __future__ import annotations

import hashlib
import io
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from shared import servers
from shared.errors import BlobMissing, StorageUnavailable
from shared.settings import Settings
from shared.storage import (
    LEAST_PART_BYTES,
    MULTIPART_BYTES,
    STREAM_CHUNK_BYTES,
    BlobFacts,
    Storage,
    content_disposition,
)
from tests.conftest import wait_until


def put(storage: Storage, key: str, body: bytes, content_type: str = "image/png") -> None:
    storage.put(key, io.BytesIO(body), content_type)


def get(storage: Storage, key: str) -> bytes:
    file = io.BytesIO()
    storage.get(key, file)
    return file.getvalue()


def test_what_was_put_comes_back(storage: Storage) -> None:
    put(storage, "jobs/1/a/input", b"a picture")
    assert get(storage, "jobs/1/a/input") == b"a picture"
    facts = storage.facts("jobs/1/a/input")
    assert (facts.bytes, facts.content_type) == (9, "image/png")
    assert facts.etag


def test_an_empty_blob_is_a_blob(storage: Storage) -> None:
    put(storage, "empty", b"")
    assert get(storage, "empty") == b""
    assert storage.facts("empty").bytes == 0


def test_putting_again_replaces(storage: Storage) -> None:
    put(storage, "key", b"first")
    put(storage, "key", b"second", "image/jpeg")
    assert get(storage, "key") == b"second"
    assert storage.facts("key").content_type == "image/jpeg"


def test_a_file_is_sent_from_where_it_stands_and_stays_open(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"headerpicture")
    with path.open("rb") as file:
        file.seek(6)
        storage.put("key", file, "image/png")
        assert not file.closed, "the caller closes what it has opened"
    assert get(storage, "key") == b"picture"


def test_a_large_blob_goes_up_in_parts_and_comes_back_whole(storage: Storage, tmp_path: Path) -> None:
    body = random.Random(1).randbytes(MULTIPART_BYTES + 1_000_001)
    sent: list[int] = []
    path = tmp_path / "large"
    path.write_bytes(body)
    with path.open("rb") as file:
        storage.put("large", file, "image/tiff", on_bytes=sent.append)
    assert sum(sent) == len(body), "progress tells of every byte once"
    assert len(sent) > 1
    assert hashlib.sha256(get(storage, "large")).digest() == hashlib.sha256(body).digest()
    facts, chunks = storage.stream("large")
    read = hashlib.sha256()
    for chunk in chunks:
        assert len(chunk) <= STREAM_CHUNK_BYTES
        read.update(chunk)
    assert facts == storage.facts("large") == BlobFacts(len(body), "image/tiff", facts.etag)
    assert read.digest() == hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    "sizes",
    [(100, 7), (0,), (LEAST_PART_BYTES + 3, 40), (2 * LEAST_PART_BYTES + 1, LEAST_PART_BYTES, 12)],
    ids=["small", "empty", "too small to be copied behind its head", "copied"],
)
def test_blobs_are_joined_with_what_stands_around_them(storage: Storage, sizes: tuple[int, ...]) -> None:
    chance = random.Random(4)
    bodies = [chance.randbytes(size) for size in sizes]
    for number, body in enumerate(bodies):
        put(storage, f"parts/{number}", body)
    heard: list[int] = []
    pieces: list[bytes | str] = [b"head", *(f"parts/{number}" for number in range(len(sizes))), b"tail"]
    size, sha256 = storage.join("joined", pieces, "image/tiff", on_bytes=heard.append)
    whole = b"".join([b"head", *bodies, b"tail"])
    assert get(storage, "joined") == whole
    assert (size, sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
    assert storage.facts("joined").content_type == "image/tiff"
    assert sum(heard) == sum(sizes)


def test_a_join_that_fails_leaves_nothing_behind(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()
    create = storage._client.create_multipart_upload
    monkeypatch.setattr(storage._client, "create_multipart_upload", lambda **named: begun.set() or create(**named))
    with pytest.raises(BlobMissing):
        storage.join("joined", [b"head", "parts/gone"], "image/png")
    assert begun.is_set()
    assert storage.keys() == []
    assert storage._client.list_multipart_uploads(Bucket=storage.bucket).get("Uploads", []) == []


def test_what_is_not_there_is_missing_for_every_reader(storage: Storage) -> None:
    for ask in (
        lambda: storage.get("nothing", io.BytesIO()),
        lambda: storage.facts("nothing"),
        lambda: storage.stream("nothing"),
    ):
        with pytest.raises(BlobMissing) as missing:
            ask()
        assert missing.value.facts == {"key": "nothing"}
        assert not missing.value.retryable


def test_removing_takes_everything_under_a_prefix_and_nothing_beside_it(storage: Storage) -> None:
    for key in (
        "jobs/1/a/input",
        "jobs/1/a/result-1.png",
        "jobs/1/a/result-2.png",
        "jobs/10/a/input",
        "jobs/2/a/input",
    ):
        put(storage, key, b"x")
    assert storage.keys("jobs/1/a") == ["jobs/1/a/input", "jobs/1/a/result-1.png", "jobs/1/a/result-2.png"]
    assert storage.remove("jobs/1/a") == 3
    assert storage.keys() == ["jobs/10/a/input", "jobs/2/a/input"]
    assert storage.remove("jobs/1/a") == 0, "none there is no error"
    with pytest.raises(BlobMissing):
        storage.facts("jobs/1/a/input")


def test_a_link_can_be_opened_by_anybody_who_has_it_and_says_what_it_is(storage: Storage) -> None:
    put(storage, "jobs/1/a/result-1.png", b"picture", "application/octet-stream")
    link = storage.link("jobs/1/a/result-1.png", file_name="my cät.png", content_type="image/png")
    answer = httpx.get(link)
    assert (answer.status_code, answer.content) == (200, b"picture")
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"] == (
        "attachment; filename=\"my c_t.png\"; filename*=UTF-8''my%20c%C3%A4t.png"
    )
    shown = storage.link("jobs/1/a/result-1.png", file_name="x.png", content_type="image/png", inline=True)
    assert httpx.get(shown).headers["content-disposition"].startswith("inline;")


def test_a_link_is_good_for_its_blob_its_verb_and_its_time_only(storage: Storage, settings: Settings) -> None:
    put(storage, "mine", b"picture")
    put(storage, "other", b"secret")
    link = storage.link("mine", file_name="x", content_type="image/png")
    assert httpx.get(link.replace("/mine?", "/other?")).status_code == 403
    assert httpx.put(link, content=b"replaced").status_code == 403
    assert httpx.get(link.partition("?")[0]).status_code == 403, "without a signature nothing is read"
    assert "X-Amz-Expires=900" in link
    short = Storage(settings.model_copy(update={"presigned_link_seconds": 1}))
    expiring = short.link("mine", file_name="x", content_type="image/png")
    short.close()
    ends_at = time.monotonic() + 15
    while httpx.get(expiring).status_code != 403:
        assert time.monotonic() < ends_at, "a link of one second is still good"
    assert get(storage, "mine") == b"picture"


def test_an_upload_link_takes_a_put(storage: Storage) -> None:
    link = storage.upload_link("uploads/1/a", seconds=60)
    assert httpx.put(link, content=b"picture", headers={"Content-Type": "image/png"}).status_code == 200
    assert get(storage, "uploads/1/a") == b"picture"
    assert httpx.get(link).status_code == 403


def test_links_are_signed_for_the_address_that_clients_reach(storage: Storage, settings: Settings) -> None:
    put(storage, "key", b"picture")
    port = settings.storage_endpoint_url.rpartition(":")[2]
    outside = Storage(settings.model_copy(update={"storage_public_url": f"http://localhost:{port}"}))
    try:
        link = outside.link("key", file_name="x", content_type="image/png")
        assert link.startswith(f"http://localhost:{port}/")
        assert httpx.get(link).content == b"picture"
        assert get(outside, "key") == b"picture"
    finally:
        outside.close()


def test_the_bucket_is_made_where_it_is_missing(s3: Any, settings: Settings) -> None:
    fresh = Storage(settings.model_copy(update={"storage_bucket": "made-by-a-test"}))
    try:
        with pytest.raises(StorageUnavailable):
            fresh.ping()
        fresh.ensure_bucket()
        fresh.ensure_bucket()
        fresh.ping()
        put(fresh, "key", b"x")
        assert fresh.keys() == ["key"]
        fresh.remove("")
    finally:
        fresh.close()


def test_wrong_credentials_are_a_refusal_and_not_a_missing_blob(storage: Storage, settings: Settings) -> None:
    put(storage, "key", b"x")
    stranger = Storage(settings.model_copy(update={"storage_secret_key": "wrong"}))
    try:
        with pytest.raises(StorageUnavailable) as refused:
            get(stranger, "key")
        assert not isinstance(refused.value, BlobMissing)
        with pytest.raises(StorageUnavailable):
            stranger.ensure_bucket()
    finally:
        stranger.close()


# --- storage that is away -------------------------------------------------------------------------------------------


def every_call(storage: Storage) -> Iterator[Any]:
    yield storage.ping
    yield storage.ensure_bucket
    yield lambda: storage.put("key", io.BytesIO(b"x"), "image/png")
    yield lambda: storage.get("key", io.BytesIO())
    yield lambda: storage.stream("key")
    yield lambda: storage.facts("key")
    yield lambda: storage.remove("key")
    yield lambda: storage.keys("key")


def test_a_dead_server_is_said_to_be_away_within_seconds(settings: Settings) -> None:
    """`settings` names an address where nothing is: no test asked for a server."""
    storage = Storage(settings)
    try:
        for call in every_call(storage):
            began = time.monotonic()
            with pytest.raises(StorageUnavailable) as unavailable:
                call()
            assert not isinstance(unavailable.value, BlobMissing)
            assert unavailable.value.retryable
            assert unavailable.value.facts == {"retry_after_seconds": 5}
            assert time.monotonic() - began < 10
    finally:
        storage.close()


def test_a_frozen_server_is_said_to_be_away_when_the_timeout_has_passed(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as frozen:
        url = f"http://127.0.0.1:{frozen.getsockname()[1]}"
        storage = Storage(settings.model_copy(update={"storage_endpoint_url": url, "storage_timeout_seconds": 0.2}))
        try:
            began = time.monotonic()
            with pytest.raises(StorageUnavailable, match="does not answer"):
                storage.facts("key")
            assert time.monotonic() - began < 15
        finally:
            storage.close()


@contextmanager
def a_server_that_breaks_off(settings: Settings) -> Iterator[Storage]:
    """An S3 server that promises a long body and closes the connection after a few bytes, each time."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    request = connection.recv(65536)
                    status = b"200 OK"
                    if b"\r\nRange: bytes=0-" in request:
                        status = b"206 Partial Content\r\nContent-Range: bytes 0-999/1000"
                    head = b'\r\nContent-Type: image/png\r\nETag: "e"\r\nContent-Length: 1000\r\n\r\n'
                    connection.sendall(b"HTTP/1.1 " + status + head)
                    if not request.startswith(b"HEAD"):
                        connection.sendall(b"short")

        Thread(target=serve, name="breaks-off", daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        storage = Storage(settings.model_copy(update={"storage_endpoint_url": url, "storage_timeout_seconds": 2}))
        try:
            yield storage
        finally:
            storage.close()
            listener.shutdown(socket.SHUT_RDWR)


def test_a_blob_that_breaks_off_is_never_taken_for_a_whole_one(settings: Settings) -> None:
    with a_server_that_breaks_off(settings) as storage:
        with pytest.raises(StorageUnavailable):
            storage.get("key", io.BytesIO())
        facts, chunks = storage.stream("key")
        assert facts.bytes == 1000
        with pytest.raises(StorageUnavailable):
            list(chunks)


def test_a_server_that_was_killed_is_used_again_when_it_is_back(tmp_path: Path, settings: Settings) -> None:
    with servers.start_s3(tmp_path / "s3", "bucket", "key", "secret") as server:
        storage = Storage(
            settings.model_copy(
                update={
                    "storage_endpoint_url": server.url,
                    "storage_bucket": "bucket",
                    "storage_access_key": "key",
                    "storage_secret_key": "secret",
                }
            )
        )
        try:
            put(storage, "jobs/1/a/input", b"kept")
            server.kill()
            with pytest.raises(StorageUnavailable):
                storage.ping()
            port = int(server.url.rpartition(":")[2])
            with servers.start_s3(tmp_path / "s3", "bucket", "key", "secret", port=port):
                # It takes a moment until it has found its volumes again; until then it is honestly away.
                wait_until(lambda: comes_back(storage), seconds=30, what="the blob from before the kill")
        finally:
            storage.close()


def comes_back(storage: Storage) -> bool:
    try:
        return get(storage, "jobs/1/a/input") == b"kept"
    except BlobMissing:
        raise
    except StorageUnavailable:
        return False


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat.png", "attachment; filename=\"cat.png\"; filename*=UTF-8''cat.png"),
        ('a"b\\c.png', "attachment; filename=\"a_b_c.png\"; filename*=UTF-8''a%22b%5Cc.png"),
        ("a\r\nSet-Cookie: x", "attachment; filename=\"a__Set-Cookie_ x\"; filename*=UTF-8''a%0D%0ASet-Cookie%3A%20x"),
        ("\u732b.png", "attachment; filename=\"_.png\"; filename*=UTF-8''%E7%8C%AB.png"),
        ("", "attachment; filename=\"picture\"; filename*=UTF-8''"),
    ],
)
def test_a_file_name_cannot_break_out_of_its_header(name: str, expected: str) -> None:
    assert content_disposition("attachment", name) == expected
