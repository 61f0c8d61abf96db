"""Every operation of /openapi.json, called with what its own description allows and with what it does not: no 5xx.

schemathesis makes the requests. A body it makes is almost never a picture, so what gets past the description is refused
for what it is; pictures have a harness of their own (tests/journeys/test_bad_input.py).
"""

from __future__ import annotations

import re
from io import BytesIO

import hypothesis
import schemathesis
from schemathesis import GenerationMode

from tests.api.conftest import Api
from tests.factories import a_png

# What fails is shown as it came: shrinking would take minutes.
BOUNDED = hypothesis.settings(
    max_examples=25,
    database=None,
    deadline=None,
    derandomize=True,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)


def test_no_request_that_can_be_described_gets_a_5xx(api: Api) -> None:
    owner = api.caller("jobs", "admin")
    job_id = owner.job()
    endpoint = owner.post("/v1/webhook-endpoints", json={"url": "https://1.1.1.1/hook"}).json["id"]
    delivery = owner.post(f"/v1/webhook-endpoints/{endpoint}/test").json["id"]
    batch = owner.post("/v1/batches", data={"image": [(BytesIO(a_png()), "a.png")]}).json["id"]
    own = {"job_id": job_id, "endpoint_id": endpoint, "delivery_id": delivery, "batch_id": batch, "name": "srgan"}

    schema = schemathesis.openapi.from_wsgi("/openapi.json", api.app)
    seen: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        label = f"{operation.method.upper()} {operation.path}"
        if label in ("GET /v1/jobs/{job_id}/events", "GET /livez", "GET /readyz"):
            # A stream has no end while its job has none; the other two ask nothing.
            continue
        seen[label] = set()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @hypothesis.settings(parent=BOUNDED)
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def call(case: schemathesis.Case, label: str = label) -> None:
                # One of two asks for something that is there: else every answer would be that there is nothing.
                if hash(str(case.query)) % 2 and case.path_parameters:
                    case.path_parameters = {name: own.get(name, value) for name, value in case.path_parameters.items()}
                headers = {"Authorization": f"Bearer {owner.secret}", "Prefer": "respond-async"}
                answer = case.call(headers=headers)
                seen[label].add(answer.status_code)
                assert answer.status_code < 500, (label, answer.status_code, answer.text)
                if answer.status_code >= 400:
                    assert answer.headers["content-type"][0] == "application/problem+json", label
                    assert not re.search("Traceback|site-packages", answer.text), label

            try:
                call()
            except hypothesis.errors.Unsatisfiable:
                # Nothing to ask wrongly: no parameter and no body.
                continue
    assert len(seen) >= 22
    assert {202, 404, 422} <= set().union(*seen.values())
