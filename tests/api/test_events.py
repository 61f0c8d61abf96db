"""Server-sent events: what a watcher hears, how it resumes, and that it gives its thread back."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from api import events
from shared import jobs
from shared.db import Database
from shared.settings import Settings
from shared.storage import Storage
from tests.api.conftest import Api, Caller, running, served
from tests.conftest import wait_until


@pytest.fixture
def api(settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str) -> Iterator[Api]:
    """Looks at SQL and pings much more often than in earnest, and has room for two watchers."""
    quick = settings.model_copy(update={"event_poll_seconds": 0.02, "event_ping_seconds": 0.1, "api_threads": 10})
    with running(quick) as made:
        yield made


@dataclass(frozen=True)
class Event:
    id: int
    kind: str
    job: dict[str, Any]


def heard(text: str) -> list[Event]:
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if "event" in lines:
            found.append(Event(int(lines["id"]), lines["event"], json.loads(lines["data"])))
    return found


def test_a_watcher_hears_status_then_progress_then_done(api: Api, caller: Caller) -> None:
    job_id = caller.job()
    text = ""
    claim: jobs.Claim | None = None
    with (
        served(api.app) as url,
        httpx.Client(base_url=url, headers=bearer(caller)) as http,
        http.stream("GET", f"/v1/jobs/{job_id}/events") as stream,
    ):
        assert stream.headers["content-type"].startswith("text/event-stream")
        for chunk in stream.iter_text():
            text += chunk
            # Each step is taken when the one before has been heard of.
            match [event.kind for event in heard(text)]:
                case ["status"] if claim is None:
                    claim = begin(api, job_id)
                case ["status", "status"] if claim is not None:
                    progress(api, claim, 0.5)
                case ["status", "status", "progress", *_] if claim is not None:
                    api_succeeds(api, claim)
                    claim = None
    said = heard(text)
    assert [event.kind for event in said] == ["status", "status", "progress", "status", "done"]
    assert [event.job["status"] for event in said] == ["queued", "running", "running", "succeeded", "succeeded"]
    assert said[2].job["progress"]["fraction"] == 0.5
    assert [event.id for event in said] == sorted(event.id for event in said)
    assert said[-1].job["result"]["url"] == f"/v1/jobs/{job_id}/result"


def test_a_finished_job_is_told_at_once_and_the_stream_ends(api: Api, caller: Caller) -> None:
    job_id = caller.job()
    caller.post(f"/v1/jobs/{job_id}/cancel")
    assert [event.kind for event in heard(caller.get(f"/v1/jobs/{job_id}/events").text)] == [
        "status",
        "done",
    ]


def test_whoever_comes_back_hears_only_what_is_new(api: Api, caller: Caller) -> None:
    job_id = caller.job()
    first = heard(next_text(api, caller, job_id, None))[0]
    claim = begin(api, job_id)
    resumed = heard(next_text(api, caller, job_id, first.id))
    assert [(event.kind, event.job["status"]) for event in resumed] == [("status", "running")]
    # Nothing new: a comment keeps the line open.
    assert next_text(api, caller, job_id, resumed[-1].id) == ": ping\n\n"
    api_succeeds(api, claim)
    answer = caller.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": str(resumed[-1].id)})
    assert [event.kind for event in heard(answer.text)] == ["status", "done"]
    # `done` is said again to whoever may have missed it.
    last = heard(answer.text)[-1].id
    again = caller.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": str(last)})
    assert [event.kind for event in heard(again.text)] == ["done"]


def test_a_last_event_id_that_is_none_of_ours_is_ignored(caller: Caller) -> None:
    job_id = caller.job()
    caller.post(f"/v1/jobs/{job_id}/cancel")
    for nonsense in ("x", "-1", "9" * 40, "1; DROP TABLE jobs"):
        answer = caller.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": nonsense})
        assert [event.kind for event in heard(answer.text)] == ["status", "done"]


def test_a_deleted_job_ends_its_streams(api: Api, caller: Caller) -> None:
    job_id = caller.job()
    stream = events.stream(api.context, job_id, caller.key_id, last_event_id=None, client_left=lambda: False)
    assert [next(stream), heard(next(stream))[0].kind] == ["retry: 2000\n\n", "status"]
    caller.delete(f"/v1/jobs/{job_id}")
    assert list(stream) == []


def test_streams_beyond_the_seats_are_told_to_come_back(api: Api, caller: Caller) -> None:
    job_id = caller.job()
    with served(api.app) as url, httpx.Client(base_url=url, headers=bearer(caller)) as http:
        path = f"/v1/jobs/{job_id}/events"
        with http.stream("GET", path), http.stream("GET", path):
            third = http.get(path)
            assert (third.status_code, third.json()["code"]) == (503, "too-many-streams")
            assert int(third.headers["Retry-After"]) >= 1
            # Short requests are answered as ever.
            assert http.get(f"/v1/jobs/{job_id}").status_code == 200
        # Who leaves gives the seat back: noticed at the latest when a ping cannot be sent.
        wait_until(lambda: sits(api), seconds=10, what="a seat to be given back")


def test_head_takes_no_seat(api: Api, caller: Caller) -> None:
    job_id = caller.job()
    for _ in range(5):
        assert caller.send("HEAD", f"/v1/jobs/{job_id}/events").status_code == 200


def test_a_client_that_has_left_is_noticed_at_its_socket() -> None:
    server, client = socket.socketpair()
    with closing(server):
        left = events.left_by({"gunicorn.socket": server})
        assert not left()
        client.send(b"a second request on the same connection")
        assert not left()
        server.recv(100)
        client.close()
        assert left()
    assert not events.left_by({})()


def begin(api: Api, job_id: str) -> jobs.Claim:
    return api.work(job_id, lambda *_: None)


def progress(api: Api, claim: jobs.Claim, fraction: float) -> None:
    with api.database.transaction() as session:
        jobs.progress(
            session,
            claim,
            phase="upscale",
            fraction=fraction,
            bands_done=1,
            bands_total=2,
            eta_seconds=1.0,
            lease_seconds=20,
            now=datetime.now(UTC),
        )


def api_succeeds(api: Api, claim: jobs.Claim) -> None:
    result = jobs.JobResult(key="k", width=1, height=1, bytes=1, sha256="ab" * 32)
    with api.database.transaction() as session:
        jobs.succeed(session, claim, result, now=datetime.now(UTC))


def next_text(api: Api, caller: Caller, job_id: str, last_event_id: int | None) -> str:
    """What a stream says first, after its opening words."""
    stream = events.stream(api.context, job_id, caller.key_id, last_event_id=last_event_id, client_left=lambda: False)
    next(stream)
    return next(stream)


def bearer(caller: Caller) -> dict[str, str]:
    return {"Authorization": f"Bearer {caller.secret}"}


def sits(api: Api) -> bool:
    leave = api.context.seats.take()
    if leave is None:
        return False
    leave()
    return True
