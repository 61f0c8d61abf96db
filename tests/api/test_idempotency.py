"""The same Idempotency-Key and the same request are one job."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from io import BytesIO
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from api import idempotency
from shared import jobs
from shared.db import Database
from shared.errors import DatabaseUnavailable, IdempotencyInProgress
from shared.models import IdempotencyRecord, Job
from shared.settings import Settings
from shared.storage import Storage
from tests.api.conftest import Api, Caller, running, served
from tests.factories import a_png

KEY = {"Idempotency-Key": "order-17"}


def jobs_of(api: Api) -> int:
    with api.database.reading() as session:
        return session.scalar(select(func.count()).select_from(Job)) or 0


def age(api: Api, seconds: float) -> None:
    """As if every record had been made that long ago."""
    with api.database.transaction() as session:
        session.execute(update(IdempotencyRecord).values(created_at=datetime.now(UTC) - timedelta(seconds=seconds)))


def test_the_same_request_replays_the_first_answer(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    first = caller.submit(headers=KEY, external_id="a")
    again = caller.submit(headers=KEY, external_id="a")
    assert (again.status_code, again.json) == (202, first.json)
    assert again.headers["Location"] == first.headers["Location"]
    assert again.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    assert jobs_of(api_on_both) == 1
    assert len(api_on_both.context.storage.keys()) == 1


def test_another_request_under_the_same_key_is_a_mismatch(api: Api, caller: Caller) -> None:
    caller.submit(headers=KEY)
    for other in (
        caller.submit(headers=KEY, scale="2"),
        caller.submit(a_png(seed=2), headers=KEY),
        caller.post("/v1/jobs", json={"image_url": "https://example.com/a.png"}, headers=KEY),
        caller.post("/v1/batches", json={"items": [{"upload_id": "upl_1"}]}, headers=KEY),
    ):
        assert (other.status_code, other.json["code"]) == (422, "idempotency-mismatch")
    assert jobs_of(api) == 1


def test_two_keys_of_the_api_may_use_the_same_idempotency_key(api: Api) -> None:
    ids = {api.caller().submit(headers=KEY).json["id"] for _ in range(2)}
    assert len(ids) == 2


def test_ten_requests_at_once_are_one_job(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    picture = a_png()
    start = threading.Barrier(10)
    answers: list[Any] = []

    def post() -> None:
        http = api_on_both.app.test_client()
        headers = {"Authorization": f"Bearer {caller.secret}", **KEY}
        start.wait(20)
        answers.append(http.post("/v1/jobs", data={"image": (BytesIO(picture), "a.png")}, headers=headers))

    threads = [threading.Thread(target=post) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) <= {202, 409}, statuses
    assert statuses[202] >= 1
    assert {a.json["code"] for a in answers if a.status_code == 409} <= {"idempotency-in-progress"}
    assert len({a.json["id"] for a in answers if a.status_code == 202}) == 1
    assert jobs_of(api_on_both) == 1
    assert len(api_on_both.context.storage.keys()) == 1


# Two thousand requests: half a minute on a quiet machine.
@pytest.mark.timeout(900)
def test_two_hundred_keys_ten_times_at_once_are_two_hundred_jobs(
    settings: Settings, postgresql_database: Database, storage: Storage, redis_url: str
) -> None:
    """G7, over real sockets. A request that meets the first one in flight is told to come again, and does."""
    keys_sent = [f"order-{number}" for number in range(200)]
    roomy = settings.model_copy(update={"rate_limit_per_minute": 1_000_000})
    with running(roomy) as api, served(api.app) as url:
        caller = api.caller()
        picture, other = a_png(4, 4), a_png(4, 4, seed=2)
        answers: dict[str, set[str]] = {key: set() for key in keys_sent}
        fresh: Counter[str] = Counter()

        def send(http: httpx.Client, key: str, content: bytes) -> httpx.Response:
            headers = {"Authorization": f"Bearer {caller.secret}", "Idempotency-Key": key}
            while True:
                answer = http.post(f"{url}/v1/jobs", files={"image": ("a.png", content)}, headers=headers)
                if answer.status_code != 409:
                    return answer
                assert answer.json()["code"] == "idempotency-in-progress"
                # Nine that ask at once again take all of the machine from the one they wait for.
                threading.Event().wait(0.05)

        def go(http: httpx.Client, key: str) -> None:
            answer = send(http, key, picture)
            assert answer.status_code == 202, answer.text
            answers[key].add(answer.json()["id"])
            if "Idempotent-Replayed" not in answer.headers:
                fresh[key] += 1

        with httpx.Client(timeout=60) as http, ThreadPoolExecutor(10) as threads:
            for key in keys_sent:
                # All ten of a key stand side by side in the pool.
                list(threads.map(go, [http] * 10, [key] * 10))
            mismatches = [send(http, key, other) for key in keys_sent[:20]]
        assert [len(ids) for ids in answers.values()] == [1] * 200
        assert fresh == Counter(dict.fromkeys(keys_sent, 1))
        assert jobs_of(api) == 200
        assert {(m.status_code, m.json()["code"]) for m in mismatches} == {(422, "idempotency-mismatch")}
        # The refused ones left no picture behind either.
        assert len(api.context.storage.keys("jobs/")) == 200


def test_a_refused_request_leaves_the_key_free(api: Api, caller: Caller) -> None:
    assert caller.submit(b"no picture", headers=KEY).status_code == 415
    assert caller.submit(headers=KEY).status_code == 202
    assert jobs_of(api) == 1


def test_while_the_first_is_in_flight_the_second_is_told_to_wait(api: Api, caller: Caller) -> None:
    sha256 = idempotency.request_sha256("POST /v1/jobs", {}, [])
    first = _reserve(api, caller, sha256)
    assert isinstance(first, idempotency.Reservation)
    with pytest.raises(IdempotencyInProgress):
        _reserve(api, caller, sha256)


def test_a_reservation_whose_process_died_is_taken_over_and_its_late_finish_refused(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    late = _reserve(api_on_both, caller, "a" * 64)
    age(api_on_both, idempotency.STALE_SECONDS + 1)
    fresh = _reserve(api_on_both, caller, "a" * 64)
    assert isinstance(late, idempotency.Reservation)
    assert isinstance(fresh, idempotency.Reservation)
    assert fresh.id != late.id
    with pytest.raises(IdempotencyInProgress), api_on_both.database.transaction() as session:
        late.finish(session, status=202, body={}, location=None)
    with api_on_both.database.transaction() as session:
        fresh.finish(session, status=202, body={"id": "x"}, location="/x")
    assert _reserve(api_on_both, caller, "a" * 64) == idempotency.Replay(202, {"id": "x"}, "/x")


def test_after_its_time_a_key_means_another_request(api: Api, caller: Caller) -> None:
    first = caller.submit(headers=KEY).json["id"]
    age(api, 86400 + 1)
    second = caller.submit(headers=KEY, scale="2")
    assert second.status_code == 202
    assert second.json["id"] != first


def test_a_lost_commit_reply_replays_the_job_it_made(api: Api, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a commit that comes through and whose reply is lost
    lose = [True]
    real_transaction = Database.transaction

    @contextmanager
    def transaction(database: Database) -> Iterator[Session]:
        with real_transaction(database) as session:
            yield session
            made_job = any(isinstance(row, Job) for row in session.identity_map.values())
        if made_job and lose:
            lose.clear()
            raise DatabaseUnavailable("the reply is lost")

    monkeypatch.setattr(Database, "transaction", transaction)
    assert caller.submit(headers=KEY).status_code == 503
    # When the client sends the same again, then it is given the job that was made, with its picture in place
    again = caller.submit(headers=KEY)
    assert (again.status_code, again.headers.get("Idempotent-Replayed")) == (202, "true")
    assert jobs_of(api) == 1
    with api.database.reading() as session:
        job = session.get_one(jobs.Job, again.json["id"])
    assert api.context.storage.facts(job.input_key).bytes == job.input_bytes


def test_a_key_that_is_no_key_is_refused(caller: Caller) -> None:
    for key in ("", "x" * 256):
        answer = caller.submit(headers={"Idempotency-Key": key})
        assert (answer.status_code, answer.json["errors"][0]["field"]) == (422, "Idempotency-Key")


def test_a_batch_is_replayed_too(api: Api, caller: Caller) -> None:
    def post() -> Any:
        images = [(BytesIO(a_png(seed=seed)), f"{seed}.png") for seed in (1, 2)]
        return caller.post("/v1/batches", data={"image": images}, headers=KEY)

    first, again = post(), post()
    assert first.status_code == 202, first.text
    assert again.json == first.json
    assert jobs_of(api) == 2


def _reserve(api: Api, caller: Caller, sha256: str) -> idempotency.Reservation | idempotency.Replay:
    return idempotency.reserve(
        api.database, owner_key_id=caller.key_id, key="order-17", sha256=sha256, ttl_seconds=86400
    )
