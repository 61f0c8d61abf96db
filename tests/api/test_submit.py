"""POST /v1/jobs: every way in, and everything that is refused at the door."""

from __future__ import annotations

import gc
import io
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from PIL import Image
from sqlalchemy import event

from api.schemas import JobView
from shared import outbox
from shared.db import Database
from shared.models import Job, Upload
from shared.servers import free_port
from shared.settings import Settings
from shared.storage import Storage
from tests.api.conftest import Api, Caller, running, served
from tests.conftest import Receiver, Reply, little_room, statements, wait_until
from tests.factories import a_png, many_jobs

LOOPBACK = ("127.0.0.0/8",)


def test_a_form_becomes_a_queued_job_with_its_picture_in_storage(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    picture = a_png(20, 10)
    answer = caller.submit(picture, name="../photos/bird.png", classify="true", scale="2", external_id="mine")
    assert answer.status_code == 202
    view = answer.json
    assert answer.headers["Location"] == f"/v1/jobs/{view['id']}"
    assert JobView.model_validate(view).status == "queued"
    assert (view["model"], view["scale"], view["classify"], view["external_id"]) == ("srgan", 2, True, "mine")
    assert (view["input"]["width"], view["input"]["height"], view["input"]["format"]) == (20, 10, "png")
    assert view["input"]["name"] == "bird.png"
    assert view["queue_position"] == 1
    with api_on_both.database.reading() as session:
        key = session.get_one(Job, view["id"]).input_key
    stored = io.BytesIO()
    api_on_both.context.storage.get(key, stored)
    assert stored.getvalue() == picture
    assert caller.get(f"/v1/jobs/{view['id']}").json == view


def test_the_message_is_hurried_to_the_broker_after_the_answer(api: Api, caller: Caller) -> None:
    job_id = caller.job()

    def published() -> bool:
        with api.database.reading() as session:
            return session.get_one(Job, job_id).published_count == 1

    wait_until(published, seconds=10, what="the message to be sent")


def test_scale_defaults_to_the_networks_own(caller: Caller) -> None:
    assert caller.submit().json["scale"] == 4


def test_an_image_url_is_fetched(
    settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str, receiver: Receiver
) -> None:
    receiver.pages["/pictures/a%20bird.png"] = Reply(200, body=a_png(9, 7))
    with running(settings.model_copy(update={"allow_private_addresses": LOOPBACK})) as api:
        answer = api.caller().post("/v1/jobs", json={"image_url": f"{receiver.url}/pictures/a%20bird.png"})
    assert answer.status_code == 202
    assert (answer.json["input"]["width"], answer.json["input"]["name"]) == (9, "a bird.png")


def test_a_source_that_does_not_answer_with_a_picture_is_refused(
    settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str, receiver: Receiver
) -> None:
    receiver.pages["/missing"] = Reply(404)
    receiver.pages["/elsewhere"] = Reply(302, {"Location": "/picture"})
    receiver.pages["/large"] = Reply(200, body=b"x" * 2001)
    receiver.pages["/page"] = Reply(200, body=b"<html>")
    small = settings.model_copy(update={"allow_private_addresses": LOOPBACK, "max_upload_bytes": 2000})
    with running(small) as api:
        caller = api.caller()
        for path, code in [
            ("/missing", "fetch-failed"),
            ("/elsewhere", "fetch-failed"),
            ("/large", "input-too-large"),
            ("/page", "unsupported-format"),
        ]:
            answer = caller.post("/v1/jobs", json={"image_url": receiver.url + path})
            assert answer.json["code"] == code, path
        assert storage.keys() == []


def test_a_presigned_upload_becomes_one_job_and_is_used_up(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    upload = caller.post("/v1/uploads")
    assert upload.status_code == 201
    early = caller.post("/v1/jobs", json={"upload_id": upload.json["upload_id"]})
    assert (early.status_code, early.json["errors"][0]["field"]) == (422, "upload_id")
    put = httpx.put(upload.json["url"], content=a_png(11, 5), headers=upload.json["headers"])
    assert put.status_code == 200, put.text
    answer = caller.post("/v1/jobs", json={"upload_id": upload.json["upload_id"], "format": "webp"})
    assert answer.status_code == 202, answer.text
    assert answer.json["input"]["width"] == 11
    again = caller.post("/v1/jobs", json={"upload_id": upload.json["upload_id"]})
    assert again.status_code == 404
    with api_on_both.database.reading() as session:
        assert session.get(Upload, upload.json["upload_id"]) is None


def test_another_keys_upload_is_not_found(api: Api, caller: Caller) -> None:
    upload = caller.post("/v1/uploads").json
    httpx.put(upload["url"], content=a_png()).raise_for_status()
    assert api.caller().post("/v1/jobs", json={"upload_id": upload["upload_id"]}).status_code == 404


def test_an_upload_larger_than_the_cap_is_refused_whatever_its_address_took(
    settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str
) -> None:
    with running(settings.model_copy(update={"max_upload_bytes": 100})) as api:
        caller = api.caller()
        upload = caller.post("/v1/uploads").json
        httpx.put(upload["url"], content=b"x" * 101).raise_for_status()
        answer = caller.post("/v1/jobs", json={"upload_id": upload["upload_id"]})
    assert (answer.status_code, answer.json["code"], answer.json["limit_bytes"]) == (413, "input-too-large", 100)


def test_a_wrong_option_is_named(caller: Caller) -> None:
    cases: list[tuple[dict[str, str], str]] = [
        ({"scale": "0"}, "scale"),
        ({"scale": "17"}, "scale"),
        ({"scale": "two"}, "scale"),
        ({"quality": "101"}, "quality"),
        ({"format": "gif"}, "format"),
        ({"background": "white"}, "background"),
        ({"modell": "srgan"}, "modell"),
        ({"webhook_events": "job.succeeded,job.exploded"}, "webhook_events.1"),
        ({"deadline_seconds": "1" + "0" * 30}, "deadline_seconds"),
        ({"external_id": "a\x00b"}, "external_id"),
        ({"external_id": "x" * 256}, "external_id"),
        ({"image_url": "https://example.com/a.png"}, "image"),
    ]
    for fields, field in cases:
        answer = caller.submit(**fields)
        assert (answer.status_code, answer.mimetype) == (422, "application/problem+json")
        assert answer.json["code"] == "invalid-request"
        assert [wrong["field"] for wrong in answer.json["errors"]] == [field]


def test_a_wrong_json_body_is_a_problem_and_no_error_of_ours(caller: Caller) -> None:
    cases = [
        (b"", 400, "bad-request"),
        (b"{", 400, "bad-request"),
        (b"[" * 100_000, 400, "bad-request"),
        (b"[]", 422, "invalid-request"),
        (b'"image_url"', 422, "invalid-request"),
        (b"{}", 422, "invalid-request"),
        (b'{"image_url": 1}', 422, "invalid-request"),
        (b'{"image_url": "\\ud800"}', 422, "invalid-request"),
        (b'{"upload_id": "upl_\\u0000"}', 422, "invalid-request"),
        (b'{"upload_id": "upl_1", "image_url": "https://example.com"}', 422, "invalid-request"),
        (b'{"upload_id": "upl_1"}', 404, "not-found"),
        (b'{"scale": 1e400, "upload_id": "upl_1"}', 422, "invalid-request"),
        (b'{"x": "' + b"y" * 5_000_000 + b'"}', 413, "input-too-large"),
    ]
    for body, status, code in cases:
        answer = caller.post("/v1/jobs", data=body, content_type="application/json")
        assert (answer.status_code, answer.json["code"]) == (status, code), (body[:80], answer.text)


def test_a_body_of_another_kind_is_refused(caller: Caller) -> None:
    for kind in ("image/png", "text/plain", "application/x-www-form-urlencoded"):
        answer = caller.post("/v1/jobs", data=a_png(), content_type=kind)
        assert (answer.status_code, answer.json["code"]) == (415, "unsupported-media-type")
    broken = caller.post("/v1/jobs", data=b"--x", content_type="multipart/form-data")
    assert broken.status_code in (400, 422)
    assert broken.mimetype == "application/problem+json"


def test_a_picture_under_another_part_name_is_refused(caller: Caller) -> None:
    answer = caller.post("/v1/jobs", data={"file": (io.BytesIO(a_png()), "a.png")})
    assert (answer.status_code, answer.json["errors"][0]["field"]) == (422, "file")


def test_an_unknown_model_is_refused_with_those_there_are(caller: Caller) -> None:
    answer = caller.submit(model="dalle")
    assert (answer.status_code, answer.json["code"]) == (422, "model-unavailable")
    # Weights are named by the catalogue and by nobody else.
    for path in ("../../etc/passwd", "/tmp/mine.pth", "srgan/../srgan", "file:///tmp/x.safetensors", "srgan\x00"):
        refused = caller.submit(model=path)
        assert (refused.status_code, refused.json["code"]) in (
            (422, "model-unavailable"),
            (422, "invalid-request"),
        ), path
    assert "srgan" in answer.json["models"]


def _png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_a_picture_that_cannot_be_taken_is_refused_and_leaves_nothing(api: Api, caller: Caller) -> None:
    gray = io.BytesIO()
    Image.new("L", (20000, 1)).save(gray, "JPEG")
    cases = [
        (b"", {}, 422, "invalid-image"),
        (b"not a picture at all", {}, 415, "unsupported-format"),
        (a_png()[:30], {}, 422, "invalid-image"),
        (_png_claiming(100_000, 100_000), {}, 413, "input-too-large"),
        (_png_claiming(7000, 7000), {"scale": "16"}, 422, "output-too-large"),
        (gray.getvalue(), {"format": "jpeg"}, 422, "format-cannot-hold-size"),
    ]
    for picture, fields, status, code in cases:
        answer = caller.submit(picture, **fields)
        assert (answer.status_code, answer.json["code"]) == (status, code), answer.text
        assert answer.mimetype == "application/problem+json"
    assert api.context.storage.keys() == []
    assert caller.get("/v1/jobs").json["data"] == []


def test_a_picture_over_the_byte_cap_is_refused(
    settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str
) -> None:
    with running(settings.model_copy(update={"max_upload_bytes": 1000})) as api:
        caller = api.caller()
        over = caller.submit(b"x" * 1001)
        # Refused by its length alone.
        far_over = caller.post("/v1/jobs", data=b"x" * 3_000_000, content_type="multipart/form-data; boundary=x")
    assert [(a.status_code, a.json["code"]) for a in (over, far_over)] == [(413, "input-too-large")] * 2
    assert over.json["limit_bytes"] == 1000


def test_a_url_that_leads_inside_is_blocked_as_source_and_as_webhook(caller: Caller) -> None:
    for url in (
        "http://127.0.0.1/a.png",
        "http://[::1]/",
        "http://2130706433/",
        "http://169.254.169.254/latest/meta-data",
        "http://[::ffff:10.0.0.1]/",
        "https://user:password@example.com/",
        "http://example.com:99999/",
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
    ):
        for answer in (
            caller.post("/v1/jobs", json={"image_url": url}),
            caller.submit(webhook_url=url),
            caller.post("/v1/webhook-endpoints", json={"url": url}),
        ):
            assert (answer.status_code, answer.json["code"]) == (422, "blocked-url"), (url, answer.text)


def test_a_key_with_a_full_queue_is_refused_and_its_picture_removed(
    settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str
) -> None:
    with running(settings.model_copy(update={"max_queued_jobs_per_key": 2})) as api:
        caller = api.caller()
        for _ in range(2):
            caller.job()
        answer = caller.submit()
        assert (answer.status_code, answer.json["code"]) == (429, "queue-full")
        assert int(answer.headers["Retry-After"]) >= 1
        assert len(storage.keys()) == 2
        assert api.caller().submit().status_code == 202


def test_traceparent_stays_with_the_job_and_a_malformed_one_does_not(api: Api, caller: Caller) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    kept = caller.submit(headers={"traceparent": trace}).json["id"]
    dropped = caller.submit(headers={"traceparent": "00-x-y-01"}).json["id"]
    with api.database.reading() as session:
        assert session.get_one(Job, kept).traceparent == trace
        assert session.get_one(Job, dropped).traceparent is None


def test_storage_that_is_dead_is_an_honest_503(settings: Settings, sqlite_database: Database, redis_url: str) -> None:
    # `settings` names an address where nothing listens: this test asked for no storage.
    with running(settings.model_copy(update={"storage_timeout_seconds": 1.0})) as api:
        caller = api.caller()
        answer = caller.submit()
        assert (answer.status_code, answer.json["code"]) == (503, "storage-unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
        assert caller.get("/v1/jobs").json["data"] == []


def test_a_database_that_is_dead_is_an_honest_503(
    settings: Settings, storage: Storage, redis_url: str, tmp_path: Path
) -> None:
    with running(settings.model_copy(update={"database_url": f"sqlite:///{tmp_path / 'no' / 'such.db'}"})) as api:
        answer = api.app.test_client().get("/v1/jobs", headers={"Authorization": "Bearer enl_x"})
    assert (answer.status_code, answer.json["code"]) == (503, "database-unavailable")
    assert int(answer.headers["Retry-After"]) >= 1


# Werkzeug leaves the file that it could not write to the garbage collector, which says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_of_the_api_is_an_honest_503(
    settings: Settings, storage: Storage, redis_url: str, postgresql_database: Database
) -> None:
    noise = io.BytesIO()
    Image.effect_noise((1200, 1000), 100).save(noise, "PNG")
    assert len(noise.getvalue()) > 600_000, "it is taken in memory, and nothing is tried"
    with running(settings) as api, served(api.app) as url:
        sent = {"Authorization": f"Bearer {api.caller().secret}"}
        form = {"image": ("noise.png", noise.getvalue(), "image/png")}
        with little_room(100_000):
            answer = httpx.post(f"{url}/v1/jobs", headers=sent, files=form, timeout=60)
        assert (answer.status_code, answer.json()["code"]) == (503, "disk-full")
        assert int(answer.headers["Retry-After"]) >= 1
        assert httpx.post(f"{url}/v1/jobs", headers=sent, files=form, timeout=60).status_code == 202
    gc.collect()


def test_a_full_disk_of_sqlite_is_an_honest_503(
    settings: Settings, storage: Storage, redis_url: str, sqlite_database: Database
) -> None:
    with running(settings) as api:
        caller = api.caller()
        # SQLite's own limit: it answers as it does where the disk is full.
        event.listen(
            api.database.engine, "connect", lambda connection, _: connection.execute("PRAGMA max_page_count=1")
        )
        api.database.close()
        full = [caller.submit() for _ in range(40)]
        refused = [answer for answer in full if answer.status_code != 202]
        assert {(answer.status_code, answer.json["code"]) for answer in refused} == {(503, "database-unavailable")}
        accepted = [answer.json["id"] for answer in full if answer.status_code == 202]
        assert {caller.get(f"/v1/jobs/{job_id}").status_code for job_id in accepted} <= {200}


@pytest.fixture
def frozen_redis() -> Iterator[socket.socket]:
    """A listening socket: it takes connections and never answers."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(128)
        yield silent


@pytest.mark.parametrize("how", ["refused", "frozen"])
def test_submit_is_quick_without_redis(
    settings: Settings,
    sqlite_database: Database,
    storage: Storage,
    redis_url: str,
    frozen_redis: socket.socket,
    how: str,
) -> None:
    port = frozen_redis.getsockname()[1] if how == "frozen" else free_port()
    without = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{port}/0"})
    took_seconds, usual_seconds = [], []
    with running(settings) as api_with_redis, running(without) as api:
        caller = api.caller()
        # A machine with other things to do is slow whatever Redis does: in turns, so that both meet the same.
        for took, asked in ((usual_seconds, api_with_redis.caller()), (took_seconds, caller)) * 30:
            began = time.perf_counter()
            answer = asked.submit()
            took.append(time.perf_counter() - began)
            assert answer.status_code == 202, answer.text
        assert answer.headers["RateLimit"].startswith('"key";r=5970;')
        with sqlite_database.reading() as session:
            # Nothing says that a message was sent; the relay will send it.
            assert session.get_one(Job, answer.json["id"]).published_at is None
        # Its pending connections are reset now, so that nobody waits for them at the end.
        frozen_redis.close()
    took_seconds.sort()
    usual_seconds.sort()
    told = f"{took_seconds} s; usual: {usual_seconds} s"
    assert took_seconds[15] < max(0.25, 4 * usual_seconds[15]), told
    # All but one. A frozen Redis costs one request in a great many a tenth of a second.
    assert took_seconds[-2] <= max(0.5, 4 * usual_seconds[-2]), told


def test_submit_and_poll_send_as_many_statements_with_one_job_queued_as_with_two_thousand(
    settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str
) -> None:
    with running(settings.model_copy(update={"max_queued_jobs_per_key": 10_000})) as api:
        caller = api.caller()
        job_id = caller.job()
        counts, positions = [], []
        for others in (0, 2000):
            if others:
                with api.database.transaction() as session:
                    many_jobs(session, caller.key_id, others, now=datetime.now(UTC), queued=1.0)
            api.context.hurrier.close()
            with statements(api.database) as submit:
                assert caller.submit().status_code == 202
                api.context.hurrier.close()
            with statements(api.database) as poll:
                positions.append(caller.get(f"/v1/jobs/{job_id}").json["queue_position"])
            counts.append((len(submit), len(poll)))
    # The key's first job is its first also among two thousand.
    assert positions == [1, 1]
    assert counts[0] == counts[1]
    # Key; live GPUs, queued jobs of the key, its share, the row, its place in the queue; and the mark that its message
    # was sent. On PostgreSQL the key's row is locked, too.
    assert counts[0][0] <= 7, counts
    # Key, job, place in the queue.
    assert counts[0][1] <= 3, counts


def test_the_request_never_publishes_itself(api: Api, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    monkeypatch.setattr(
        outbox.Broker, "publish_job", lambda _self, _message: threads.append(threading.current_thread().name)
    )
    caller.job()
    wait_until(lambda: threads, seconds=10, what="the message to be published")
    assert threads == ["outbox-hurrier"]


def test_no_sample_picture_gives_a_server_error_however_broken(api: Api, caller: Caller, samples: Path) -> None:
    answers: dict[int, int] = {}
    slowest_seconds = 0.0
    for path in sorted(samples.glob("images/*input/**/*")):
        if not path.is_file() or path.suffix in (".csv", ".md", ".txt"):
            continue
        began = time.perf_counter()
        answer = caller.submit(path.read_bytes(), name=path.name)
        slowest_seconds = max(slowest_seconds, time.perf_counter() - began)
        answers[answer.status_code] = answers.get(answer.status_code, 0) + 1
        assert answer.status_code in (202, 413, 415, 422), (path, answer.text)
    assert answers.get(202, 0) > 0
    assert slowest_seconds < 10
