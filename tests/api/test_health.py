"""/livez, /readyz and /metrics."""

from __future__ import annotations

import sys
import time
import tomllib
from datetime import timedelta
from pathlib import Path

import migrations
from api import schemas
from shared import workers
from shared.db import Database, clock
from shared.settings import Settings
from shared.telemetry import COUNTED, METRICS, Tallies, tallies
from shared.workers import WorkerFacts
from tests.api.conftest import Api, running

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


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
