"""Batches, models, estimates, webhook endpoints and deliveries, health, and what every answer carries."""

from __future__ import annotations

import sys
import time
import tomllib
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from flask import request
from sqlalchemy import insert

import migrations
from api import schemas
from api.schemas import BatchView, DeliveryPage, DeliveryView, EndpointView, EstimateView, KeyView, ModelPage
from shared import catalog, deliveries, workers
from shared.db import Database, clock
from shared.models import Batch, Delivery, DeliveryState, Job, Worker
from shared.settings import Settings
from shared.storage import Storage
from shared.telemetry import COUNTED, METRICS, Tallies, tallies
from shared.workers import WorkerFacts
from tests.api.conftest import Api, Caller, running
from tests.conftest import Receiver, Reply
from tests.factories import a_png

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
PUBLIC = "https://1.1.1.1/hook"


def a_worker(api: Api, *, device: str, models: list[str], seen_seconds_ago: float = 0.0) -> None:
    now = datetime.now(UTC)
    with api.database.transaction() as session:
        session.execute(
            insert(Worker).values(
                id=f"images-{device}-{seen_seconds_ago}",
                kind="images",
                host="here",
                pid=1,
                device=device,
                queues=[f"{device}.interactive", f"{device}.bulk"],
                models_loaded=models,
                started_at=now,
                seen_at=now - timedelta(seconds=seen_seconds_ago),
            )
        )


# --- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_of_files_has_a_status_per_item_in_order(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    images = [(BytesIO(a_png(4 + number, 4)), f"{number}.png") for number in range(5)]
    answer = caller.post("/v1/batches", data={"image": images, "priority": "bulk", "external_id": "all"})
    assert answer.status_code == 202, answer.text
    view = BatchView.model_validate(answer.json)
    assert answer.headers["Location"] == f"/v1/batches/{view.id}"
    assert (view.status, view.total, view.remaining) == ("running", 5, 5)
    widths = [caller.get(f"/v1/jobs/{item.id}").json["input"]["width"] for item in view.items]
    assert widths == [4, 5, 6, 7, 8]
    first = caller.get(f"/v1/jobs/{view.items[0].id}").json
    assert (first["batch_id"], first["priority"], first["external_id"]) == (view.id, "bulk", "all")
    for item in view.items:
        caller.post(f"/v1/jobs/{item.id}/cancel")
    done = BatchView.model_validate(caller.get(f"/v1/batches/{view.id}").json)
    assert (done.status, done.remaining) == ("completed", 0)


def test_a_batch_in_json_names_each_picture(
    settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str, receiver: Receiver
) -> None:
    receiver.pages["/1.png"] = Reply(200, body=a_png(9, 9))
    with running(settings.model_copy(update={"allow_private_addresses": ("127.0.0.0/8",)})) as api:
        caller = api.caller()
        upload = caller.post("/v1/uploads").json
        httpx.put(upload["url"], content=a_png(7, 7)).raise_for_status()
        items = [
            {"image_url": f"{receiver.url}/1.png", "external_id": "one"},
            {"upload_id": upload["upload_id"], "external_id": "two"},
        ]
        settings_block = {"scale": 2, "webhook_url": f"{receiver.url}/hook"}
        answer = caller.post("/v1/batches", json={"items": items, "settings": settings_block})
        assert answer.status_code == 202, answer.text
        assert [item["external_id"] for item in answer.json["items"]] == ["one", "two"]
        for item in answer.json["items"]:
            caller.post(f"/v1/jobs/{item['id']}/cancel")
        listed = caller.get("/v1/webhook-deliveries").json["data"]
        assert sorted(delivery["type"] for delivery in listed) == ["batch.completed", "job.canceled", "job.canceled"]


def test_a_batch_is_taken_whole_or_not_at_all(api: Api, caller: Caller) -> None:
    images = [(BytesIO(a_png()), "0.png"), (BytesIO(b"no picture"), "1.png"), (BytesIO(a_png()), "2.png")]
    answer = caller.post("/v1/batches", data={"image": images})
    assert (answer.status_code, answer.json["code"], answer.json["item"]) == (415, "unsupported-format", 1)
    assert caller.get("/v1/jobs").json["data"] == []
    assert api.context.storage.keys() == []
    with api.database.reading() as session:
        assert session.query(Batch).count() == 0


def test_a_batch_that_is_no_batch_is_refused(
    settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str
) -> None:
    with running(settings.model_copy(update={"max_batch_items": 2})) as api:
        caller = api.caller()
        for body in (
            {},
            {"items": []},
            {"items": [{}]},
            {"items": [{"upload_id": "upl_1", "image_url": PUBLIC}]},
            {"items": [{"upload_id": "upl_1"}] * 3},
            {"items": [{"upload_id": "upl_1"}], "settings": {"image_url": PUBLIC}},
        ):
            answer = caller.post("/v1/batches", json=body)
            assert (answer.status_code, answer.json["code"]) == (422, "invalid-request"), body
        assert caller.post("/v1/batches", data={"scale": "2"}, content_type="multipart/form-data").status_code == 422


# --- models and estimates -------------------------------------------------------------------------------------------


def test_models_tell_their_cards_and_where_they_are_loaded(api: Api, caller: Caller) -> None:
    a_worker(api, device="gpu", models=["srgan"])
    a_worker(api, device="cpu", models=["srgan"], seen_seconds_ago=3600)
    page = ModelPage.model_validate(caller.get("/v1/models").json)
    assert [model.name for model in page.data] == [card.name for card in catalog.CARDS]
    loaded = {model.name: model.loaded_on for model in page.data}
    assert loaded["srgan"] == ["gpu"]
    assert loaded["srresnet"] == []
    one = caller.get("/v1/models/srgan").json
    assert (one["is_default"], len(one["sha256"]), one["scale"]) == (True, 64, 4)
    missing = caller.get("/v1/models/dalle")
    assert (missing.status_code, missing.json["code"]) == (404, "not-found")


def test_auto_jobs_go_where_a_gpu_is_alive(api: Api, caller: Caller) -> None:
    def queue_of(**fields: str) -> str:
        with api.database.reading() as session:
            return session.get_one(Job, caller.job(**fields)).queue

    assert queue_of() == "cpu.interactive"
    a_worker(api, device="gpu", models=[], seen_seconds_ago=3600)
    assert queue_of() == "cpu.interactive"
    a_worker(api, device="gpu", models=[])
    assert queue_of(priority="bulk") == "gpu.bulk"
    assert queue_of(device="cpu") == "cpu.interactive"


def test_an_estimate_comes_from_the_card_until_there_is_a_history(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    asked = {"width": 1000, "height": 500, "input_format": "jpeg"}
    answer = caller.post("/v1/estimates", json=asked)
    assert answer.status_code == 200, answer.text
    view = EstimateView.model_validate(answer.json)
    assert (view.basis, view.history_jobs, view.accepted, view.format_can_hold) == ("model-cost", 0, True, True)
    assert (view.output.width, view.output.height, view.output.megapixels) == (4000, 2000, 8.0)
    assert (view.output.format, view.queue, view.queue_wait_seconds) == ("jpeg", "cpu.interactive", 0.0)
    # 4.44 megaflops for each of half a million pixels, at 60 GFLOP/s, and 0.3 s for the rest.
    assert view.expected_seconds.p50 == pytest.approx(4.44e6 * 500_000 / 60e9 + 0.3, rel=0.01)
    beyond = caller.post("/v1/estimates", json={**asked, "scale": 8}).json["expected_seconds"]["p50"]
    assert beyond > 10 * view.expected_seconds.p50
    for seconds in (1.0, 2.0, 3.0, 4.0):
        timings = {"upscale_seconds": seconds, "queued_seconds": 99.0}
        job_id = caller.job(picture=a_png(250, 250))
        api_on_both.succeed(job_id, timings=timings)
    learned = EstimateView.model_validate(caller.post("/v1/estimates", json=asked).json)
    assert (learned.basis, learned.history_jobs) == ("history", 4)
    # One megapixel took 1 to 4 s; this is eight.
    assert 8 <= learned.expected_seconds.p50 <= 32
    assert learned.expected_seconds.p95 == pytest.approx(32)
    # At scale 2 the network does the same work, and a step down.
    halved = caller.post("/v1/estimates", json={**asked, "scale": 2}).json["expected_seconds"]
    assert halved["p95"] == pytest.approx(32)
    # What a CPU took says nothing of a GPU.
    assert caller.post("/v1/estimates", json={**asked, "device": "gpu"}).json["basis"] == "model-cost"


def test_an_estimate_tells_what_would_be_refused(caller: Caller) -> None:
    for asked, code, holds in [
        ({"width": 20000, "height": 100, "format": "webp", "scale": 1}, "format-cannot-hold-size", False),
        ({"width": 9000, "height": 9000}, "input-too-large", True),
        ({"width": 7000, "height": 7000, "scale": 8}, "output-too-large", True),
    ]:
        view = EstimateView.model_validate(caller.post("/v1/estimates", json=asked).json)
        assert view.refusal is not None
        assert (view.accepted, view.refusal.code, view.format_can_hold) == (False, code, holds)
    assert caller.post("/v1/estimates", json={"width": 0, "height": 1}).status_code == 422
    assert (
        caller.post("/v1/estimates", json={"width": 1, "height": 1, "model": "x"}).json["code"] == "model-unavailable"
    )


# --- webhooks -------------------------------------------------------------------------------------------------------


def test_endpoints_are_added_listed_tested_and_removed(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    made = caller.post("/v1/webhook-endpoints", json={"url": PUBLIC, "events": ["job.succeeded"]})
    assert made.status_code == 201
    view = EndpointView.model_validate(made.json)
    assert made.headers["Location"] == f"/v1/webhook-endpoints/{view.id}"
    assert (view.secret[:6], view.events) == ("whsec_", ["job.succeeded"])
    assert caller.get("/v1/webhook-endpoints").json["data"] == [made.json]
    assert caller.get(f"/v1/webhook-endpoints/{view.id}").json == made.json
    tested = caller.post(f"/v1/webhook-endpoints/{view.id}/test")
    assert tested.status_code == 202
    owed = DeliveryView.model_validate(tested.json)
    assert (owed.type, owed.status, owed.endpoint_id, owed.url) == ("endpoint.test", "pending", view.id, PUBLIC)
    assert caller.delete(f"/v1/webhook-endpoints/{view.id}").status_code == 204
    assert caller.delete(f"/v1/webhook-endpoints/{view.id}").status_code == 404
    # What was owed to it is not sent any more.
    (left,) = DeliveryPage.model_validate(caller.get("/v1/webhook-deliveries").json).data
    assert (left.id, left.status, left.endpoint_id) == (owed.id, "abandoned", None)


def test_endpoints_of_a_key_are_bounded(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.v1.MAX_ENDPOINTS_PER_KEY", 2)
    codes = [caller.post("/v1/webhook-endpoints", json={"url": PUBLIC}).status_code for _ in range(3)]
    assert codes == [201, 201, 422]
    for body in ({"url": PUBLIC, "events": []}, {"url": PUBLIC, "events": ["x"]}, {}, {"url": "https://é.example"}):
        assert caller.post("/v1/webhook-endpoints", json=body).json["code"] == "invalid-request"


def test_deliveries_are_listed_by_job_and_can_be_sent_again(api_on_both: Api) -> None:
    caller = api_on_both.caller()
    job_id = caller.job(webhook_url=PUBLIC, webhook_events="job.started,job.succeeded")
    other = caller.job(webhook_url=PUBLIC)
    api_on_both.succeed(job_id)
    api_on_both.succeed(other)
    page = DeliveryPage.model_validate(caller.get(f"/v1/webhook-deliveries?job_id={job_id}").json)
    assert sorted(delivery.type for delivery in page.data) == ["job.started", "job.succeeded"]
    paged = caller.get("/v1/webhook-deliveries?limit=2").json
    assert len(paged["data"]) == 2
    rest = caller.get("/v1/webhook-deliveries", query_string={"cursor": paged["next_cursor"]}).json
    assert [len(rest["data"]), rest["next_cursor"]] == [1, None]
    one = page.data[0].id
    with api_on_both.database.transaction() as session:
        now = datetime.now(UTC)
        claim = deliveries.claim(session, one, lease_seconds=30, now=now)
        assert claim is not None
        deliveries.delivered(session, claim, status=204, seconds=0.1, now=now)
    again = caller.post(f"/v1/webhook-deliveries/{one}/resend")
    assert (again.status_code, again.json["status"]) == (202, "pending")
    assert again.json["tries"][0]["status"] == 204
    with api_on_both.database.reading() as session:
        assert session.get_one(Delivery, one).state == DeliveryState.PENDING


def test_the_key_tells_what_it_is(caller: Caller) -> None:
    view = KeyView.model_validate(caller.get("/v1/key").json)
    assert (view.id, view.name, view.scopes) == (caller.key_id, "tester", ["jobs"])


# --- health ---------------------------------------------------------------------------------------------------------


def test_a_well_service_is_alive_and_ready(api_on_both: Api) -> None:
    http = api_on_both.app.test_client()
    alive = schemas.HealthView.model_validate(http.get("/livez").json)
    assert alive.status == "alive"
    assert alive.versions == {
        "enlarger": tomllib.loads(PYPROJECT.read_text())["project"]["version"],
        "python": ".".join(map(str, sys.version_info[:3])),
        "schema": migrations.newest(),
    }
    ready = http.get("/readyz")
    assert ready.status_code == 200
    assert ready.json == {"status": "ready", "checks": {"sql": "ok", "redis": "ok", "storage": "ok"}}


def test_what_does_not_answer_is_named(settings: Settings, sqlite_database: Database) -> None:
    with running(settings.model_copy(update={"storage_timeout_seconds": 1.0})) as api:
        http = api.app.test_client()
        began = time.monotonic()
        answer = http.get("/readyz")
        assert time.monotonic() - began < 10
        assert (answer.status_code, answer.mimetype) == (503, "application/problem+json")
        assert answer.json["failing"] == ["redis", "storage"]
        assert answer.json["checks"]["sql"] == "ok"
        assert int(answer.headers["Retry-After"]) >= 1
        assert http.get("/livez").status_code == 200


def test_metrics_are_those_of_the_table(api: Api) -> None:
    admin = api.caller("admin")
    admin.job()
    answer = admin.get("/metrics")
    assert answer.content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert {line.split()[2] for line in answer.text.splitlines() if line.startswith("# TYPE")} == {*METRICS, *COUNTED}
    assert 'enlarger_jobs{state="queued"} 1.0\n' in answer.text
    assert 'enlarger_queue_depth{queue="cpu.interactive"} 1.0\n' in answer.text
    assert api.app.test_client().get("/metrics").status_code == 401


def test_metrics_tell_what_every_process_has_counted(api: Api) -> None:
    # Given two workers on two hosts, one of which has stopped, and a process long gone; each says so through its row.
    counted = Tallies()
    counted.count("enlarger_attempts_total", outcome="succeeded")
    counted.observe("enlarger_phase_seconds", 3.0, phase="upscale")
    with api.context.database.transaction() as session:
        now = clock(session)
        for worker_id, age_seconds in (("w1", 0), ("w2", 60), ("w3", 3600)):
            facts = WorkerFacts(worker_id, "images", worker_id, 1, ("cpu.interactive",), "cpu")
            at = now - timedelta(seconds=age_seconds)
            workers.enlist(session, facts, samples=[*counted.samples(), ["of_tomorrow", {}, 1.0]], now=at)
        workers.stopped(session, "w2", samples=counted.samples(), now=now - timedelta(seconds=60))
    text = api.caller("admin").get("/metrics").text
    for worker in ("w1", "w2"):
        assert f'enlarger_attempts_total{{kind="images",outcome="succeeded",worker="{worker}"}} 1.0\n' in text
        assert f'enlarger_phase_seconds_sum{{kind="images",phase="upscale",worker="{worker}"}} 3.0\n' in text
        bucket = f'enlarger_phase_seconds_bucket{{kind="images",le="10.0",phase="upscale",worker="{worker}"}} 1.0\n'
        assert bucket in text
    assert "w3" not in text
    assert "of_tomorrow" not in text


def test_a_process_counts_its_requests_statements_and_calls_of_storage(api: Api) -> None:
    admin = api.caller("admin")
    before = dict(counts())
    admin.job()
    grown = {name for name, value in counts() if value > before.get(name, 0)}
    assert ("enlarger_http_seconds_count", "v1.create_job", "202") in grown
    assert ("enlarger_sql_seconds_count", "INSERT") in grown
    assert ("enlarger_storage_seconds_count", "PutObject") in grown


def counts() -> list[tuple[tuple[str, ...], float]]:
    return [((name, *labels.values()), value) for name, labels, value in tallies.samples() if name.endswith("_count")]


# --- every answer ---------------------------------------------------------------------------------------------------


def test_every_answer_carries_an_id_and_harmless_headers(api: Api, caller: Caller) -> None:
    for path in ("/v1/jobs", "/livez", "/v1/nothing", "/docs", "/"):
        answer = caller.get(path, headers={"X-Request-Id": "mine-1"})
        assert answer.headers["X-Request-Id"] == "mine-1", path
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"]
        assert "unsafe-inline" not in answer.headers["Content-Security-Policy"]
    assert caller.get("/v1/nothing", headers={"X-Request-Id": "mine-1"}).json["request_id"] == "mine-1"
    for harmful in ("a b", "x" * 200, "<script>"):
        fresh = caller.get("/livez", headers={"X-Request-Id": harmful}).headers["X-Request-Id"]
        assert fresh != harmful
        assert len(fresh) == 32


def test_a_method_that_is_not_taken_is_a_problem(caller: Caller) -> None:
    answer = caller.send("PUT", "/v1/jobs")
    assert (answer.status_code, answer.json["code"]) == (405, "method-not-allowed")
    assert "POST" in answer.headers["Allow"]


def test_what_nobody_foresaw_is_logged_and_told_without_its_insides(
    api: Api, caller: Caller, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise ZeroDivisionError("the insides")

    monkeypatch.setattr("shared.queries.page_of_jobs", break_down)
    answer = caller.get("/v1/jobs")
    assert (answer.status_code, answer.mimetype, answer.json["code"]) == (500, "application/problem+json", "internal")
    assert "insides" not in answer.text
    assert answer.json["request_id"] == answer.headers["X-Request-Id"]
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_the_key_and_the_links_are_never_logged(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    caller = api.caller()
    job_id = caller.job(webhook_url="https://1.1.1.1/hook?token=canary")
    api.succeed(job_id)
    link = caller.get(f"/v1/jobs/{job_id}/result").headers["Location"]
    caller.get("/v1/jobs?external_id=canary")
    api.app.test_client().get("/v1/jobs", headers={"Authorization": "Bearer enl_canary"})
    logged = "".join(capsys.readouterr())
    assert "http.answered" in logged
    for secret in (caller.secret, link, "canary", "Signature"):
        assert secret not in logged


def test_proxies_are_believed_only_where_a_setting_says_so(
    settings: Settings, sqlite_database: Database, storage: Storage, redis_url: str
) -> None:
    forwarded = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "enlarger.example"}
    for proxies, expected in ((0, "http://localhost/"), (1, "https://enlarger.example/")):
        with running(settings.model_copy(update={"trusted_proxies": proxies})) as api:
            seen: list[str] = []
            api.app.before_request_funcs[None].append(lambda seen=seen: seen.append(request.url_root))
            api.app.test_client().get("/livez", headers=forwarded)
            assert seen == [expected]
