"""Secrets are stored hashed or nowhere, and never logged (G16): canaries go through every path of the running service,
and are then looked for in SQL, in every log, in Redis, and in what the service has told anybody."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from contextlib import closing
from typing import Any

import httpx
import redis

from shared import deliveries, keys
from shared.db import Database, clock
from shared.stack import Stack
from tests.conftest import Receiver, Reply, Service, wait_until
from tests.factories import a_png

# Parts of addresses that a customer names: the first must be stored to be used, and may stand in SQL only.
HOOK_CANARY, SOURCE_CANARY, WRONG_KEY = "hook-canary-5f1c", "source-canary-77aa", "enl_canary2222222222222222222222222"


def test_no_canary_is_found_anywhere_it_does_not_belong(
    stack: Stack, stack_database: Database, receiver: Receiver
) -> None:
    settings = stack.settings
    with stack_database.transaction() as session:
        key, first = keys.create(session, name="canary", scopes=["jobs", "admin"], now=clock(session))
        _, second = keys.rotate(session, key.id, overlap_seconds=3600, now=clock(session))
    told: list[str] = []
    seen: dict[str, str] = {
        "API key": first,
        "rotated API key": second,
        "wrong key": WRONG_KEY,
        "source URL": SOURCE_CANARY,
        "sign-in token": keys.sign_in_token(settings.secret_key, key.id),
        "webhook secret": deliveries.signing_secret(settings.secret_key, key.id),
        "secret key": settings.secret_key,
        "storage secret": settings.storage_secret_key,
        "administrator's key": stack.api_key,
    }

    # Through the API: every kind of request that carries a secret, also those that fail.
    service = Service(stack.url, first)
    with service.http as http:
        for header in (f"Bearer {second}", f"Bearer {WRONG_KEY}", f"Bearer {first}x", f"Basic {first}"):
            told += [http.get("/v1/jobs", headers={"Authorization": header}).text]
        told.append(http.get(f"/v1/jobs?cursor={first}&status={second}").text)
        told.append(http.get(f"/v1/nothing/{first}").text)
        told.append(http.post("/v1/jobs", json={"image_url": f"{receiver.url}/none?token={SOURCE_CANARY}"}).text)
        receiver.pages[f"/picture?token={SOURCE_CANARY}"] = Reply(200, {"Content-Type": "image/png"}, a_png(8, 8))
        address = f"{receiver.url}/hook?token={HOOK_CANARY}"
        endpoint = http.post("/v1/webhook-endpoints", json={"url": address}).json()
        seen["endpoint's secret"] = endpoint["secret"]
        wanted: dict[str, Any] = {
            "image_url": f"{receiver.url}/picture?token={SOURCE_CANARY}",
            "webhook_url": address,
            "scale": 1,
        }
        answer = http.post("/v1/jobs", json=wanted, headers={"Idempotency-Key": "once"})
        assert answer.status_code == 202, answer.text
        job = service.wait(answer.json()["id"])
        assert job["status"] == "succeeded", job
        told.append(http.get(f"/v1/jobs/{job['id']}/events").text)
        told.append(json.dumps(job))
        link = http.get(f"/v1/jobs/{job['id']}/result").headers["Location"]
        assert httpx.get(link).status_code == 200
        assert httpx.get(link.replace("Expires=", "Expires=9")).status_code == 403
        upload = http.post("/v1/uploads").json()
        assert httpx.put(upload["url"], content=a_png(8, 8)).status_code == 200
        submitted = http.post("/v1/jobs", json={"upload_id": upload["upload_id"], "scale": 1}).json()
        assert service.wait(submitted["id"])["status"] == "succeeded"
        for name, address_of in (("result", link), ("upload", upload["url"])):
            signature = re.search(r"Signature=([0-9a-f]+)", address_of)
            assert signature is not None
            seen[f"link to the {name}"] = signature[1]
        receiver.wait_for(2, where=lambda request: request.method == "POST", seconds=60)
        wait_until(
            lambda: http.get(f"/v1/webhook-deliveries?job_id={job['id']}").json()["data"][0]["status"] == "delivered",
            seconds=60,
            what="the delivery to be written down",
        )

    # Through the pages.
    with httpx.Client(base_url=stack.url, follow_redirects=False) as browser:
        assert browser.get("/sign-in", params={"token": seen["sign-in token"]}).status_code == 303
        cookie = browser.cookies["enlarger"]
        seen["session's cookie"] = cookie
        page = browser.get("/").text
        token = re.search(r'csrf-token" content="([^"]+)"', page)
        assert token is not None
        seen["session's CSRF token"] = token[1]
        told.append(browser.get(f"/admin/jobs/{job['id']}").text.replace(token[1], ""))
        assert browser.post("/sign-out", data={"csrf_token": token[1]}).status_code == 303
        form = re.search(r'name="csrf_token" value="([^"]+)"', browser.get("/sign-in").text)
        assert form is not None
        for secret, status in ((first, 303), (WRONG_KEY, 403)):
            tried = browser.post("/sign-in", data={"key": secret, "csrf_token": form[1]})
            assert tried.status_code == status, tried.text
            told.append(tried.text)
    assert len(seen) == 14

    # Then nothing of it is anywhere.
    with closing(sqlite3.connect(settings.data_dir / "enlarger.db")) as connection:
        rows = "\n".join(connection.iterdump())
    assert job["id"] in rows
    logs = {path.name: path.read_text(errors="replace") for path in (settings.data_dir / "logs").iterdir()}
    assert job["id"] in logs["images.log"] + logs["api.log"]
    for place, content in {"SQL": rows, "Redis": everything_in(settings.redis_url), **logs}.items():
        for what, canary in seen.items():
            assert canary not in content, f"{what} in {place}"
        if place != "SQL":
            assert HOOK_CANARY not in content, f"the webhook's address in {place}"
    for what, canary in seen.items():
        assert not [text for text in told if canary in text], f"{what} in an answer"
    for request in receiver.requests:
        sent = f"{request.headers} {request.body.decode()}"
        assert not [what for what, canary in seen.items() if canary in sent], "a secret in a webhook or a request"


def everything_in(redis_url: str) -> str:
    """Every key of Redis with all it holds, while something is there."""
    said: list[str] = []
    with closing(redis.Redis.from_url(redis_url)) as client:
        # Messages live for milliseconds; what lives longer is looked at several times.
        ends_at = time.monotonic() + 2
        while time.monotonic() < ends_at:
            said += [f"{name!r} {client.dump(name)!r}" for name in client.scan_iter()]
    return "\n".join(said)
