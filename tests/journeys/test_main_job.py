"""The main job from end to end: a customer over HTTP, and behind it real SQL, Redis, S3, processes and webhooks."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from standardwebhooks import Webhook

from shared import jobs, outbox
from shared.db import Database, clock
from shared.models import Job
from shared.stack import Stack
from shared.storage import Storage
from tests.conftest import Received, Receiver, Reply, Service, closed_port, wait_until

PHOTOGRAPH = Path(__file__).resolve().parents[2] / "api" / "demo_photo" / "cat.png"


def photograph(width: int, height: int) -> bytes:
    """The cat, made small."""
    file = io.BytesIO()
    with Image.open(PHOTOGRAPH) as image:
        image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).save(file, "PNG")
    return file.getvalue()


def pixels(picture: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    with Image.open(io.BytesIO(picture)) as image:
        return np.asarray(image.convert("RGB"), np.float32)


def assert_enlarges(result: bytes, small: bytes) -> None:
    """`result` is `small`, four times as wide and high, and sharper than an interpolation would be."""
    large, source = pixels(result), pixels(small)
    height, width, _ = source.shape
    assert large.shape == (height * 4, width * 4, 3)
    back = pixels(shrunk(result, width, height))
    difference = np.abs(back - source)
    assert difference.mean() < 6, f"made small again it is another picture: mean error {difference.mean():.1f} of 255"
    bicubic = pixels(resized(small, width * 4, height * 4, Image.Resampling.BICUBIC))
    assert sharpness(large) > 1.2 * sharpness(bicubic)


def shrunk(picture: bytes, width: int, height: int) -> bytes:
    return resized(picture, width, height, Image.Resampling.BOX)


def resized(picture: bytes, width: int, height: int, filter: Image.Resampling) -> bytes:
    file = io.BytesIO()
    with Image.open(io.BytesIO(picture)) as image:
        image.convert("RGB").resize((width, height), filter).save(file, "PNG")
    return file.getvalue()


def sharpness(picture: np.ndarray[Any, np.dtype[np.float32]]) -> float:
    return float(np.abs(np.diff(picture, axis=0)).mean() + np.abs(np.diff(picture, axis=1)).mean())


def events(lines: Iterator[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(kind, id, data) of each server-sent event."""
    said: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            said[name] = value
        elif "data" in said:
            yield said["event"], said["id"], json.loads(said["data"])
            said = {}
        else:
            said = {}


def verified(request: Received, secret: str) -> dict[str, Any]:
    """What a receiver reads after the signature was checked by the library it would use."""
    return Webhook(secret).verify(request.body, dict(request.headers))  # type: ignore[no-any-return]


def of_type(kind: str) -> Any:
    return lambda request: request.json["type"] == kind


@pytest.fixture
def webhook_secret(service: Service) -> str:
    return str(service.http.get("/v1/key").json()["webhook_secret"])


@pytest.fixture
def stack_storage(stack: Stack) -> Iterator[Storage]:
    made = Storage(stack.settings)
    yield made
    made.close()


def test_a_photograph_is_enlarged_told_apart_and_announced(
    service: Service, receiver: Receiver, webhook_secret: str, stack_storage: Storage
) -> None:
    # Given a photograph that is handed in as a form, with everything one can ask to be told,
    small = photograph(64, 48)
    job = service.submit(
        small,
        classify=True,
        external_id="order-7",
        webhook_url=f"{receiver.url}/hook",
        webhook_events=["job.started", "job.progress", "job.succeeded"],
    )
    assert (job["status"], job["model"], job["scale"], job["external_id"]) == ("queued", "srgan", 4, "order-7")
    assert (job["input"]["width"], job["input"]["height"]) == (64, 48)
    assert job["input"]["sha256"] == hashlib.sha256(small).hexdigest()

    # When its events are followed to the end,
    seen: list[tuple[str, str, dict[str, Any]]] = []
    with service.http.stream("GET", f"/v1/jobs/{job['id']}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        seen.extend(events(stream.iter_lines()))

    # Then they lead from the queue through progress to one end,
    kinds = [kind for kind, _, _ in seen]
    assert kinds[0] == "status"
    assert kinds.count("done") == 1
    assert kinds[-1] == "done"
    versions = [int(version) for _, version, _ in seen]
    assert versions == sorted(versions)
    fractions = [data["progress"]["fraction"] for _, _, data in seen]
    assert fractions == sorted(fractions)
    assert any(0 < fraction < 1 for fraction in fractions), "no progress was shown"
    last = seen[-1][2]

    # the job says what it came to,
    done = service.job(job["id"])
    assert done == last
    assert (done["status"], done["attempt"], done["error"]) == ("succeeded", 1, None)
    assert done["progress"] | {"eta_seconds": 0} == {
        "fraction": 1.0,
        "phase": "done",
        "bands_done": done["progress"]["bands_total"],
        "bands_total": done["progress"]["bands_total"],
        "eta_seconds": 0,
    }
    assert done["progress"]["bands_total"] >= 2
    timed = ("queued", "fetch", "decode", "upscale", "classify", "encode", "store")
    assert {f"{step}_seconds" for step in timed} <= set(done["timings"])

    # the labels are five, the likeliest first,
    probabilities = [label["probability"] for label in done["labels"]]
    assert len(probabilities) == 5
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(0 <= probability <= 1 for probability in probabilities)
    assert all(isinstance(label["index"], int) and label["label"] for label in done["labels"])

    # the result is the picture,
    picture = service.result(job["id"])
    assert (done["result"]["width"], done["result"]["height"], done["result"]["format"]) == (256, 192, "png")
    assert done["result"]["bytes"] == len(picture)
    assert done["result"]["sha256"] == hashlib.sha256(picture).hexdigest()
    assert_enlarges(picture, small)

    # and each event came signed, once.
    succeeded = receiver.wait_for(where=of_type("job.succeeded"))
    started = receiver.wait_for(where=of_type("job.started"))
    progress = receiver.wait_for(where=of_type("job.progress"))
    assert (len(started), len(succeeded)) == (1, 1)
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == len(receiver.requests)
    assert verified(succeeded[0], webhook_secret)["data"] == done
    assert all(verified(request, webhook_secret)["data"]["id"] == job["id"] for request in (*started, *progress))
    log = service.http.get("/v1/webhook-deliveries", params={"job_id": job["id"]}).json()["data"]
    assert {delivery["type"] for delivery in log} == {"job.started", "job.progress", "job.succeeded"}
    wait_until(
        lambda: (
            {
                delivery["status"]
                for delivery in service.http.get("/v1/webhook-deliveries", params={"job_id": job["id"]}).json()["data"]
            }
            == {"delivered"}
        ),
        seconds=20,
        what="every delivery to be written down as delivered",
    )

    # The blobs lie under one prefix, and go with the job.
    prefix = f"jobs/{job['id']}/"
    blobs = [key.rpartition("/")[2] for key in stack_storage.keys(prefix)]
    # Beside the two, small pictures of how it looked on the way.
    assert [name for name in blobs if name.startswith(("input", "result-"))] == ["input", "result-1.png"]
    assert service.http.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert service.http.get(f"/v1/jobs/{job['id']}").status_code == 404
    wait_until(lambda: stack_storage.keys(prefix) == [], seconds=20, what="the blobs to go")


def test_a_picture_can_be_named_by_its_address(service: Service, receiver: Receiver) -> None:
    small = photograph(32, 24)
    receiver.pages["/cat.png"] = Reply(200, {"Content-Type": "image/png"}, small)
    answer = service.http.post("/v1/jobs", json={"image_url": f"{receiver.url}/cat.png", "model": "srresnet"})
    assert answer.status_code == 202, answer.text
    done = service.wait(answer.json()["id"])
    assert (done["status"], done["model"], done["labels"]) == ("succeeded", "srresnet", None)
    large = pixels(service.result(done["id"]))
    assert large.shape == (96, 128, 3)
    assert np.abs(pixels(shrunk(service.result(done["id"]), 32, 24)) - pixels(small)).mean() < 6


def test_a_large_picture_can_be_put_into_storage_first(service: Service) -> None:
    small = photograph(24, 32)
    upload = service.http.post("/v1/uploads").json()
    put = httpx.put(upload["url"], content=small, headers=upload["headers"])
    assert put.status_code == 200, put.text
    answer = service.http.post("/v1/jobs", json={"upload_id": upload["upload_id"], "scale": 2, "format": "jpeg"})
    assert answer.status_code == 202, answer.text
    done = service.wait(answer.json()["id"])
    assert (done["status"], done["result"]["format"], done["scale"]) == ("succeeded", "jpeg", 2)
    with Image.open(io.BytesIO(service.result(done["id"]))) as result:
        assert (result.format, result.size) == ("JPEG", (48, 64))


def test_a_running_job_can_be_canceled_and_then_has_no_result(
    service: Service, receiver: Receiver, webhook_secret: str, stack_storage: Storage
) -> None:
    job = service.submit(photograph(160, 120), webhook_url=f"{receiver.url}/hook")
    service.wait(job["id"], until=lambda job: job["status"] == "running" and job["progress"]["fraction"] > 0.02)
    asked_at = time.monotonic()
    answer = service.http.post(f"/v1/jobs/{job['id']}/cancel")
    assert answer.status_code == 202
    done = service.wait(job["id"])
    # It stops at its next band, which is far from its end.
    assert time.monotonic() - asked_at < 30
    assert (done["status"], done["result"], done["error"]) == ("canceled", None, None)
    assert done["progress"]["fraction"] < 1
    assert service.http.get(f"/v1/jobs/{job['id']}/result").status_code == 409
    assert service.http.post(f"/v1/jobs/{job['id']}/cancel").status_code == 409
    (told,) = receiver.wait_for()
    assert verified(told, webhook_secret)["type"] == "job.canceled"
    blobs = [key.rpartition("/")[2] for key in stack_storage.keys(f"jobs/{job['id']}/")]
    assert "input" in blobs
    assert not [name for name in blobs if name.startswith("result-")]

    # Taken up again by hand it runs to its end, as a second attempt.
    assert service.http.post(f"/v1/jobs/{job['id']}/retry").status_code == 202
    running = service.wait(job["id"], until=lambda job: job["status"] == "running")
    assert running["attempt"] == 2
    service.http.post(f"/v1/jobs/{job['id']}/cancel")
    service.wait(job["id"])


def test_a_standing_address_is_told_of_the_events_it_asked_for(service: Service, receiver: Receiver) -> None:
    answer = service.http.post(
        "/v1/webhook-endpoints", json={"url": f"{receiver.url}/standing", "events": ["job.failed", "job.canceled"]}
    )
    assert answer.status_code == 201, answer.text
    endpoint = answer.json()
    try:
        # A receiver that is down for a moment is tried again.
        receiver.replies.append(Reply(503))
        blocked = service.submit(photograph(160, 120), deadline_seconds="3600")
        assert service.http.post(f"/v1/jobs/{blocked['id']}/cancel").status_code == 202
        first, second = receiver.wait_for(2, seconds=40)
        assert first.headers["webhook-id"] == second.headers["webhook-id"], "the same event, tried again"
        said = verified(second, endpoint["secret"])
        assert (said["type"], said["data"]["id"]) == ("job.canceled", blocked["id"])
    finally:
        assert service.http.delete(f"/v1/webhook-endpoints/{endpoint['id']}").status_code == 204
        service.wait(blocked["id"])


def test_bad_pictures_get_a_clear_problem_and_stop_nobody(service: Service, receiver: Receiver) -> None:
    for body in (b"", b"not a picture", photograph(8, 8)[:60]):
        answer = service.http.post("/v1/jobs", files={"image": ("x.png", body, "image/png")})
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["code"] in {"invalid-image", "unsupported-format", "invalid-request"}
    # A header that looks well and a body that is cut off: found when it is decoded.
    whole = photograph(64, 48)
    job = service.submit(whole[: len(whole) // 2])
    done = service.wait(job["id"])
    assert (done["status"], done["attempt"], done["error"]["code"]) == ("failed", 1, "invalid-image")
    assert done["error"]["retryable"] is False
    for url, code in ((f"http://127.0.0.1:{closed_port()}/x", "fetch-failed"), ("http://10.0.0.1/x", "blocked-url")):
        answer = service.http.post("/v1/jobs", json={"image_url": url})
        assert 400 <= answer.status_code < 500
        assert answer.json()["code"] == code
    assert service.wait(service.submit(photograph(16, 16))["id"])["status"] == "succeeded"


def test_duplicate_and_stray_messages_change_nothing(
    service: Service, stack: Stack, stack_database: Database, receiver: Receiver
) -> None:
    """The message is a hint: ten copies, and one for a job that never was, make one attempt."""
    broker = outbox.Broker(stack.settings)
    try:
        job = service.submit(photograph(32, 24), webhook_url=receiver.url)
        for job_id in [job["id"]] * 10 + ["job_nobody"]:
            broker.publish_job(outbox.JobMessage(job_id, "cpu.interactive"))
        done = service.wait(job["id"])
        for _ in range(5):
            broker.publish_job(outbox.JobMessage(job["id"], "cpu.interactive"))
    finally:
        broker.close()
    # What comes after them on the queue has been worked off: so have they.
    service.wait(service.submit(photograph(8, 8))["id"])
    assert service.job(job["id"]) == done
    assert (done["status"], done["attempt"]) == ("succeeded", 1)
    assert len(receiver.wait_for(where=of_type("job.succeeded"))) == 1
    with stack_database.reading() as session:
        assert jobs.claim(
            session, job["id"], worker_id="x", device="cpu", lease_seconds=1, now=clock(session)
        ) is None  # fmt: skip
        assert session.get_one(Job, job["id"]).tries_used == 1


def test_a_result_is_seen_as_it_comes_and_had_in_another_form(service: Service) -> None:
    small = photograph(72, 72)
    job = service.submit(small, model="srgan", scale=4, format="png")

    # Tiles of 24 px make three bands: what is finished of them is there before the result is.
    def strips() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = service.http.get(f"/v1/jobs/{job['id']}/preview").json()["strips"]
        return found

    job = service.wait(job["id"])
    assert job["status"] == "succeeded", job["error"]
    seen = wait_until(strips, seconds=30, what="the strips of the preview")
    assert seen[0]["y"] == 0
    assert sum(strip["height"] for strip in seen) == 288
    result = pixels(service.result(job["id"]))
    for strip in seen:
        shown = pixels(service.http.get(strip["url"]).content)
        error = np.abs(shown - result[strip["y"] : strip["y"] + strip["height"]])
        assert error.mean() < 6, f"mean {error.mean():.1f}, max {error.max():.0f}"
    assert pixels(service.http.get(f"/v1/jobs/{job['id']}/thumbnail?of=input").content).shape == (72, 72, 3)

    # Another format, and a pyramid: by the relay and the chores worker.
    for kind in ("webp", "zoom"):
        assert service.http.post(f"/v1/jobs/{job['id']}/renditions", json={"kind": kind}).status_code == 202
    path = f"/v1/jobs/{job['id']}/renditions"

    def made(kind: str) -> dict[str, Any] | None:
        view: dict[str, Any] = service.http.get(f"{path}/{kind}").json()
        assert view["status"] != "failed", view["error"]
        return view if view["status"] == "made" else None

    webp = wait_until(lambda: made("webp"), seconds=60, what="the WebP")
    fetched = service.http.get(webp["url"], follow_redirects=True).content
    assert len(fetched) == webp["bytes"]
    assert np.abs(pixels(fetched) - result).mean() < 6
    zoom = wait_until(lambda: made("zoom"), seconds=60, what="the pyramid")["zoom"]
    tile = service.http.get(zoom["tiles"].format(level=zoom["levels"] - 1, column=0, row=0))
    assert np.abs(pixels(tile.content) - result).mean() < 6

    # All of it goes with the job.
    assert service.http.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert service.http.get(webp["url"]).status_code == 404
