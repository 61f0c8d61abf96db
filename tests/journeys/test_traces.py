"""One trace from the HTTP request through the queue to each phase, as a collector receives it over OTLP; and the logs,
which name it too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

import pytest
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from api.app import create_app
from shared import keys
from shared.db import Database
from shared.errors import StartFailed
from shared.models import Job
from shared.settings import Settings
from shared.storage import Storage
from shared.traces import Traces
from shared.workers import this_process
from tests.conftest import Receiver, Reply
from tests.factories import a_png
from tests.worker import a_network
from worker.enlarging import Engine
from worker.execute import Executor

CLIENTS_TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{CLIENTS_TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def collector(receiver: Receiver) -> Receiver:
    receiver.pages["/v1/traces"] = Reply(200, {"Content-Type": "application/x-protobuf"})
    return receiver


@pytest.fixture
def logged() -> Iterator[list[dict[str, Any]]]:
    """The events logged, with what is bound to each."""
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as events:
        yield events


def spans(collector: Receiver) -> dict[str, Any]:
    """Every span received, by name."""
    return {
        span.name: span
        for request in collector.requests
        for resource in ExportTraceServiceRequest.FromString(request.body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    }


def test_a_trace_leads_from_the_request_through_the_queue_to_each_phase(
    settings: Settings,
    sqlite_database: Database,
    storage: Storage,
    redis_url: str,
    collector: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[dict[str, Any]],
) -> None:
    # Given a client that has a trace of its own,
    settings = settings.model_copy(update={"traces_url": f"{collector.url}/v1/traces"})
    app = create_app(settings)
    context = app.extensions["enlarger"]
    with context.database.transaction() as session:
        _, secret = keys.create(session, name="traced", scopes=("jobs",), now=datetime.now(UTC))
    answer = app.test_client().post(
        "/v1/jobs",
        data={"image": (BytesIO(a_png()), "bird.png"), "classify": "false"},
        headers={"Authorization": f"Bearer {secret}", "traceparent": TRACEPARENT},
    )
    assert answer.status_code == 202, answer.text
    # when a worker in another process does the job,
    a_network.install(monkeypatch, lambda _call: None)
    traces = Traces(settings.traces_url, "images")
    facts = this_process("images", queues=["cpu.interactive"], device="cpu")
    executor = Executor(sqlite_database, storage, settings, {"cpu": Engine.of(settings, "cpu")}, facts, traces=traces)
    executor.run(answer.json["id"])
    traces.close()
    context.close()
    # then all of it is one trace, the client's, each part below what it is a part of.
    found = spans(collector)
    request, attempt = found["POST /v1/jobs"], found["job.attempt"]
    assert {span.trace_id.hex() for span in found.values()} == {CLIENTS_TRACE}
    assert request.parent_span_id.hex() == "b7ad6b7169203331"
    assert found["job.wait"].parent_span_id == attempt.parent_span_id == request.span_id
    for phase in ("fetch", "decode", "upscale", "encode", "store", "record"):
        assert found[phase].parent_span_id == attempt.span_id, phase
        assert attempt.start_time_unix_nano <= found[phase].start_time_unix_nano
        assert found[phase].end_time_unix_nano <= attempt.end_time_unix_nano
    with sqlite_database.reading() as session:
        queued_at = session.get_one(Job, answer.json["id"]).queued_at
    assert abs(found["job.wait"].start_time_unix_nano / 1e9 - queued_at.timestamp()) < 0.001
    facts_of_attempt = {each.key: each.value for each in attempt.attributes}
    assert facts_of_attempt["outcome"].string_value == "succeeded"
    # And the logs of both processes name job, attempt and trace.
    claimed = next(event for event in logged if event["event"] == "job.claimed")
    assert (claimed["job_id"], claimed["attempt"]) == (answer.json["id"], 1)
    assert claimed["traceparent"].split("-")[1:3] == [CLIENTS_TRACE, attempt.span_id.hex()]
    submitted = next(event for event in logged if event["event"] == "job.submitted")
    assert submitted["traceparent"].split("-")[1:3] == [CLIENTS_TRACE, request.span_id.hex()]


def test_without_a_collector_the_clients_trace_is_carried_on_as_it_came() -> None:
    traces = Traces("", "api")
    span = traces.begin("anything", TRACEPARENT)
    assert span.traceparent == TRACEPARENT
    span.end()
    assert traces.begin("anything", None).traceparent is None
    traces.close()


def test_a_collector_without_the_packages_for_it_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(StartFailed, match=r"enlarger\[traces\]"):
        Traces("http://127.0.0.1:1/v1/traces", "api")


def test_a_path_is_no_name_of_a_span(settings: Settings, collector: Receiver) -> None:
    settings = settings.model_copy(update={"traces_url": f"{collector.url}/v1/traces"})
    app = create_app(settings)
    assert app.test_client().get("/v1/jobs/job_1/nothing-here").status_code == 404
    assert app.test_client().get("/livez").status_code == 200
    app.extensions["enlarger"].close()
    assert list(spans(collector)) == ["GET (no route)"]
