"""Every operation of /openapi.json, called with what its own description allows and with what it does not: no 5xx.

schemathesis makes the requests. A body it makes is almost never a picture, so what gets past the description is refused
for what it is; pictures have a harness of their own (tests/journeys/test_bad_input.py).
"""

from __future__ import annotations

import contextlib
import re
from io import BytesIO
from typing import Any

import hypothesis
import schemathesis
from hypothesis import strategies
from schemathesis import GenerationMode

from tests.api.conftest import Api
from tests.factories import a_png

# What fails is shown as it came: shrinking would take minutes.
BOUNDED = hypothesis.settings(
    max_examples=10,
    database=None,
    deadline=None,
    derandomize=True,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)


# A stream has no end while its job has none; the other two ask nothing.
LEFT_OUT = {"GET /v1/jobs/{job_id}/events", "GET /livez", "GET /readyz"}


def answers_to(operation: Any, mode: GenerationMode, secret: str, own: dict[str, str]) -> set[int]:
    """Calls the operation as `mode` says; returns the statuses it answered. Fails on a 5xx."""
    statuses: set[int] = set()
    headers = {"Authorization": f"Bearer {secret}"}

    @BOUNDED
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode), asks_for_own=strategies.booleans())
    def call(case: schemathesis.Case, asks_for_own: bool) -> None:
        # One of two asks for something that is there: else every answer would be that there is nothing.
        if asks_for_own and case.path_parameters:
            case.path_parameters = {name: own.get(name, value) for name, value in case.path_parameters.items()}
        answer = case.call(headers=headers)
        statuses.add(answer.status_code)
        assert answer.status_code < 500, (operation.label, answer.status_code, answer.text)
        if answer.status_code >= 400:
            assert answer.headers["content-type"][0] == "application/problem+json", operation.label
            assert not re.search("Traceback|site-packages", answer.text), operation.label

    # Unsatisfiable: nothing can be asked wrongly where there is no parameter and no body.
    with contextlib.suppress(hypothesis.errors.Unsatisfiable):
        call()
    return statuses


def test_no_request_that_can_be_described_gets_a_5xx(api: Api) -> None:
    owner = api.caller("jobs", "admin")
    endpoint_id = owner.post("/v1/webhook-endpoints", json={"url": "https://1.1.1.1/hook"}).json["id"]
    own = {
        "job_id": owner.job(),
        "endpoint_id": endpoint_id,
        "delivery_id": owner.post(f"/v1/webhook-endpoints/{endpoint_id}/test").json["id"],
        "batch_id": owner.post("/v1/batches", data={"image": [(BytesIO(a_png()), "a.png")]}).json["id"],
        "name": "srgan",
    }
    schema = schemathesis.openapi.from_wsgi("/openapi.json", api.app)
    statuses: dict[str, set[int]] = {}
    # What deletes comes last.
    operations = sorted((found.ok() for found in schema.get_all_operations()), key=lambda o: o.method == "delete")
    for operation in operations:
        if operation.label not in LEFT_OUT:
            statuses[operation.label] = {
                status
                for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
                for status in answers_to(operation, mode, owner.secret, own)
            }
    assert len(statuses) >= 22
    assert all(statuses.values()), statuses
    assert {200, 202, 404, 422} <= set().union(*statuses.values())
