"""Looking at jobs, waiting for them, changing them."""

from __future__ import annotations

import threading
import time
from datetime import datetime
from typing import Any

from api.schemas import JobView
from shared import jobs
from shared.db import Database
from shared.errors import InvalidImage
from shared.settings import Settings
from shared.storage import Storage
from tests.api.conftest import Api, Caller, running


def fail(session: Any, claim: jobs.Claim, now: datetime) -> None:
    jobs.fail(session, claim, InvalidImage("broken after all"), retry_delay_seconds=1, now=now)


def keep_running(_session: Any, _claim: jobs.Claim, _now: datetime) -> None:
    pass


def test_a_jobs_view_is_what_the_schema_says_in_every_state(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    queued, running_, succeeded, failed, canceled = (caller.job() for _ in range(5))
    api_on_both.work(running_, keep_running)
    api_on_both.succeed(succeeded, labels=[{"label": "goldfinch", "index": 11, "probability": 0.93}])
    api_on_both.work(failed, fail)
    caller.post(f"/v1/jobs/{canceled}/cancel")
    views = {view["id"]: view for view in caller.get("/v1/jobs").json["data"]}
    for job_id, status in [
        (queued, "queued"),
        (running_, "running"),
        (succeeded, "succeeded"),
        (failed, "failed"),
        (canceled, "canceled"),
    ]:
        view = caller.get(f"/v1/jobs/{job_id}").json
        assert JobView.model_validate(view).status == status
        assert {**view, "queue_position": None} == views[job_id]
        assert (view["finished_at"] is not None) == (status in ("succeeded", "failed", "canceled"))
    assert caller.get(f"/v1/jobs/{failed}").json["error"] == {
        "code": "invalid-image",
        "detail": "broken after all",
        "retryable": False,
    }


def test_queue_positions_count_those_ahead(caller: Caller) -> None:
    ids = [caller.job() for _ in range(3)]
    assert [caller.get(f"/v1/jobs/{job_id}").json["queue_position"] for job_id in ids] == [1, 2, 3]


def test_the_list_is_narrowed_and_paged_without_a_gap(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    ids = [caller.job(external_id=f"pair-{number // 2}") for number in range(5)]
    seen: list[str] = []
    cursor = None
    while True:
        page = caller.get("/v1/jobs", query_string={"limit": 2, **({"cursor": cursor} if cursor else {})}).json
        seen += [view["id"] for view in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
        # A job that arrives while somebody pages shifts nothing.
        caller.job()
    assert seen == ids[::-1]
    narrowed = caller.get("/v1/jobs?external_id=pair-1&model=srgan&status=queued").json["data"]
    assert [view["id"] for view in narrowed] == [ids[3], ids[2]]
    after = caller.get("/v1/jobs", query_string={"created_after": narrowed[1]["created_at"]}).json["data"]
    assert ids[0] not in [view["id"] for view in after]


def test_a_wrong_query_is_named(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    for query, field in [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("status=sleeping", "status"),
        ("created_after=yesterday", "created_after"),
        ("created_after=2026-01-01T00:00:00", "created_after"),
        ("created_after=0001-01-01T00:00:00%2B14:00", "created_after"),
        ("colour=red", "colour"),
        ("model=a%00b", "model"),
    ]:
        answer = caller.get(f"/v1/jobs?{query}")
        assert (answer.status_code, answer.json["code"]) == (422, "invalid-request"), query
        assert answer.json["errors"][0]["field"] == field
    for cursor in ("%00", "AAAA", "nonsense!", "é", "am9i"):
        assert caller.get(f"/v1/jobs?cursor={cursor}").status_code in (200, 422), cursor


def test_ids_that_name_nothing_are_not_found(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    for job_id in ("job_none", "%00", "a" * 200, "..%2f..", "%F0%9F%90%88"):
        answer = caller.get(f"/v1/jobs/{job_id}")
        assert (answer.status_code, answer.json["code"]) == (404, "not-found"), job_id


def test_an_answer_known_already_is_304(api: Api, caller: Caller) -> None:
    job_id = caller.job()
    tag = caller.get(f"/v1/jobs/{job_id}").headers["ETag"]
    same = caller.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": tag})
    assert (same.status_code, same.data, same.headers["ETag"]) == (304, b"", tag)
    api.work(job_id, keep_running)
    changed = caller.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": tag})
    assert (changed.status_code, changed.json["status"]) == (200, "running")


def test_wait_holds_the_answer_until_the_job_ends(api: Api, caller: Caller) -> None:
    job_id = caller.job()
    began = threading.Event()

    def finish() -> None:
        began.wait(10)
        api.succeed(job_id)

    worker = threading.Thread(target=finish)
    worker.start()
    began.set()
    answer = caller.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=30"})
    worker.join()
    assert answer.json["status"] == "succeeded"
    assert answer.headers["Preference-Applied"] == "wait=30"


def test_wait_ends_with_its_time(settings: Settings, caller: Caller) -> None:
    job_id = caller.job()
    began = time.monotonic()
    answer = caller.get(f"/v1/jobs/{job_id}", headers={"Prefer": "respond-async, wait=1"})
    assert answer.json["status"] == "queued"
    assert 1 <= time.monotonic() - began < 10
    posted = caller.submit(headers={"Prefer": "wait=1"})
    assert (posted.status_code, posted.headers["Preference-Applied"]) == (202, "wait=1")


def test_wait_with_a_known_answer_ends_at_the_first_change(api: Api, caller: Caller) -> None:
    job_id = caller.job()
    tag = caller.get(f"/v1/jobs/{job_id}").headers["ETag"]
    worker = threading.Thread(target=api.work, args=(job_id, keep_running))
    worker.start()
    answer = caller.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=30", "If-None-Match": tag})
    worker.join()
    assert (answer.status_code, answer.json["status"]) == (200, "running")


def test_wait_is_cut_to_the_longest_allowed(
    settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str
) -> None:
    with running(settings.model_copy(update={"max_wait_seconds": 1})) as api:
        caller = api.caller()
        answer = caller.get(f"/v1/jobs/{caller.job()}", headers={"Prefer": "wait=600"})
        assert answer.headers["Preference-Applied"] == "wait=1"


def test_wait_is_passed_over_where_every_seat_is_taken(
    settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str
) -> None:
    with running(settings.model_copy(update={"api_threads": 9})) as api:
        caller = api.caller()
        job_id = caller.job()
        leave = api.context.seats.take()
        assert leave is not None
        answer = caller.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=30"})
        assert "Preference-Applied" not in answer.headers
        leave()
        leave()
        one, two = api.context.seats.take(), api.context.seats.take()
        assert one is not None
        assert two is None


def test_cancel_is_at_once_for_a_queued_job_and_asked_of_a_running_one(api: Api, caller: Caller) -> None:
    queued, busy, done = caller.job(), caller.job(), caller.job()
    api.work(busy, keep_running)
    api.succeed(done)
    answer = caller.post(f"/v1/jobs/{queued}/cancel")
    assert (answer.status_code, answer.json["status"]) == (202, "canceled")
    answer = caller.post(f"/v1/jobs/{busy}/cancel")
    assert (answer.status_code, answer.json["status"]) == (202, "running")
    assert answer.json["cancel_requested_at"] is not None
    answer = caller.post(f"/v1/jobs/{done}/cancel")
    assert (answer.status_code, answer.json["code"]) == (409, "job-not-cancelable")


def test_retry_takes_failed_and_canceled_jobs_only(api: Api, caller: Caller) -> None:
    failed, canceled, queued = caller.job(), caller.job(), caller.job()
    api.work(failed, fail)
    caller.post(f"/v1/jobs/{canceled}/cancel")
    for job_id in (failed, canceled):
        answer = caller.post(f"/v1/jobs/{job_id}/retry")
        assert (answer.status_code, answer.json["status"], answer.json["error"]) == (202, "queued", None)
    answer = caller.post(f"/v1/jobs/{queued}/retry")
    assert (answer.status_code, answer.json["code"]) == (409, "job-not-retryable")


def test_delete_leaves_neither_row_nor_blob(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    for bring in (lambda _: None, api_on_both.succeed, lambda job_id: api_on_both.work(job_id, keep_running)):
        job_id = caller.job()
        bring(job_id)
        assert caller.delete(f"/v1/jobs/{job_id}").status_code == 204
        assert caller.get(f"/v1/jobs/{job_id}").status_code == 404
        assert caller.delete(f"/v1/jobs/{job_id}").status_code == 404
    assert api_on_both.context.storage.keys() == []
