"""No address that a customer names reaches a private one, whichever way it comes in (G12).

Every hostile URL x {source, register, deliver, redirect, rebind}, through the HTTP API and the postman of the workers.
A listener on every address of this machine must never be reached; the first test shows that it would be heard.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import select

from shared import deliveries, keys
from shared.db import Database, clock
from shared.models import Delivery, DeliveryState, Job
from shared.outgoing import GuardedClient
from shared.settings import Settings
from shared.storage import Storage
from tests.api.conftest import Api, Caller, running
from tests.conftest import Receiver, Reply
from tests.factories import a_job
from tests.shared.test_outgoing import MALFORMED, PRIVATE_HOSTS, canary
from worker.webhooks import Postman

__all__ = ["canary"]

Canary = tuple[int, Callable[[], int]]

# The one private address that an operator has allowed; nothing else of this machine may be reached.
ALLOWED = "127.0.0.2"
REFUSALS = {"blocked-url", "fetch-failed", "invalid-request"}


def hostile_urls(port: int) -> list[str]:
    plain = [f"http://{host}:{port}/picture.png" for host in PRIVATE_HOSTS]
    secure = [f"https://{host}:{port}/picture.png" for host in PRIVATE_HOSTS[:12]]
    return [*plain, *secure, *(url.replace("CANARY", str(port)) for url in MALFORMED)]


@pytest.fixture
def guarded(settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str) -> Iterator[Api]:
    """The application of an operator who has allowed ALLOWED and nothing else."""
    careful = {"allow_private_addresses": (f"{ALLOWED}/32",), "rate_limit_per_minute": 1_000_000}
    with running(settings.model_copy(update={**careful, "fetch_timeout_seconds": 10.0})) as made:
        yield made


@pytest.fixture
def inside(guarded: Api) -> Caller:
    return guarded.caller()


def postman(api: Api) -> Postman:
    settings = api.context.settings
    return Postman(api.database, GuardedClient(settings.allow_private_addresses), settings, jitter=lambda: 0.0)


def owed_to(api: Api, key_id: str, url: str) -> str:
    """A delivery owed to an address that was good when it was registered."""
    with api.database.transaction() as session:
        now = clock(session)
        job = a_job(session, key_id, now, webhook_url=url, max_queued_jobs=10_000)
        # To the job's own address first, and to the key's standing ones.
        return deliveries.owe(session, job, "job.canceled", now)[0]


def looked_up(monkeypatch: pytest.MonkeyPatch, answers: Callable[[], str]) -> None:
    """`rebind.example` has the address that `answers` says at each look-up."""
    real = socket.getaddrinfo

    def look_up(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        return real(answers() if host == "rebind.example" else host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_there_are_eighty_of_them_and_the_listener_would_be_heard(canary: Canary) -> None:
    port, hits = canary
    assert len(set(hostile_urls(port))) >= 80
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.recv(1)
    assert hits() == 1


def test_as_a_source(inside: Caller, guarded: Api, canary: Canary) -> None:
    port, hits = canary
    for url in hostile_urls(port):
        answer = inside.post("/v1/jobs", json={"image_url": url})
        assert answer.status_code == 422, (url, answer.text)
        assert answer.json["code"] in REFUSALS, (url, answer.text)
    items = [{"image_url": url} for url in hostile_urls(port)[:40]]
    assert inside.post("/v1/batches", json={"items": items}).status_code == 422
    assert hits() == 0
    assert guarded.context.storage.keys() == []


def test_when_it_is_registered(inside: Caller, guarded: Api, canary: Canary) -> None:
    port, hits = canary
    for url in hostile_urls(port):
        for answer in (
            inside.post("/v1/webhook-endpoints", json={"url": url, "events": ["job.succeeded"]}),
            inside.submit(webhook_url=url) if url else inside.post("/v1/jobs", json={"webhook_url": url}),
        ):
            assert answer.status_code == 422, (url, answer.text)
            assert answer.json["code"] in REFUSALS, (url, answer.text)
    assert hits() == 0
    assert inside.get("/v1/webhook-endpoints").json["data"] == []
    with guarded.database.reading() as session:
        assert session.scalars(select(Job)).all() == []


def test_at_each_delivery(inside: Caller, guarded: Api, canary: Canary) -> None:
    """The address was good when it was registered, or the operator's list was longer then."""
    port, hits = canary
    sender = postman(guarded)
    for url in filter(None, hostile_urls(port)):
        delivery_id = owed_to(guarded, inside.key_id, url)
        state = sender.deliver(delivery_id)
        assert state in (DeliveryState.ABANDONED, DeliveryState.PENDING), url
        with guarded.database.reading() as session:
            (tried,) = session.get_one(Delivery, delivery_id).tries
        assert tried["status"] is None, url
        assert tried["error"], url
    assert hits() == 0


def test_by_a_redirect(inside: Caller, guarded: Api, canary: Canary) -> None:
    port, hits = canary
    sender = postman(guarded)
    with Receiver(ALLOWED) as receiver:
        for number, url in enumerate(hostile_urls(port)):
            if any(ord(sign) < 32 or ord(sign) > 126 for sign in url):
                continue
            receiver.pages[f"/{number}"] = Reply((301, 302, 303, 307, 308)[number % 5], {"Location": url})
            answer = inside.post("/v1/jobs", json={"image_url": f"{receiver.url}/{number}"})
            assert (answer.status_code, answer.json["code"]) == (422, "fetch-failed"), url
            assert sender.deliver(owed_to(guarded, inside.key_id, f"{receiver.url}/{number}")) == DeliveryState.PENDING
        assert len(receiver.requests) >= 2 * 75, "the redirecting server itself was reached each time"
    assert hits() == 0


def test_by_a_name_that_changes_its_mind(
    inside: Caller, guarded: Api, canary: Canary, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, hits = canary
    sender = postman(guarded)
    asked = 0
    hostile = ""

    def answers() -> str:
        nonlocal asked
        asked += 1
        return ALLOWED if asked == 1 else hostile

    looked_up(monkeypatch, answers)
    url = f"http://rebind.example:{port}/picture.png"
    for host in PRIVATE_HOSTS:
        hostile = host.strip("[]")
        # Given a name that was good when the address was registered
        asked = 0
        registered = inside.post("/v1/webhook-endpoints", json={"url": url, "events": ["job.canceled"]})
        assert registered.status_code == 201, registered.text
        with guarded.database.transaction() as session:
            now = clock(session)
            owed = deliveries.owe(
                session, a_job(session, inside.key_id, now, max_queued_jobs=10_000), "job.canceled", now
            )
        # When it names another address from then on, Then nothing goes there: neither an event nor a request for a
        # picture.
        assert [sender.deliver(delivery_id) for delivery_id in owed] == [DeliveryState.ABANDONED], host
        answer = inside.post("/v1/jobs", json={"image_url": url})
        assert answer.json["code"] in REFUSALS, host
        assert inside.delete(f"/v1/webhook-endpoints/{registered.json['id']}").status_code == 204
        # When it changes its mind between the check and the connection, Then the checked address is the one connected
        # to, where nobody listens: there was no second question.
        asked = 0
        answer = inside.post("/v1/jobs", json={"image_url": url.replace(str(port), "9")})
        assert (answer.json["code"], asked) == ("fetch-failed", 1), host
    assert hits() == 0


def test_the_key_of_a_stranger_opens_no_door_either(guarded: Api, canary: Canary) -> None:
    """A control of the harness: without a key nothing is looked up at all."""
    port, hits = canary
    with guarded.database.transaction() as session:
        key, secret = keys.create(session, name="gone", scopes=["jobs"], now=datetime.now(UTC))
        keys.revoke(session, key.id, now=datetime.now(UTC))
    stranger = Caller(key.id, secret, guarded.app.test_client())
    assert stranger.post("/v1/jobs", json={"image_url": f"http://{ALLOWED}:{port}/"}).status_code == 401
    assert hits() == 0
