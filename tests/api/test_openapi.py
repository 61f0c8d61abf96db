"""The description matches the routes, its examples match its schemas, and /docs works with no internet."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from api import openapi, problems, schemas, v1
from shared import errors
from shared.deliveries import EVENT_TYPES, TERMINAL_EVENTS
from shared.models import JobState
from tests.api.conftest import Api

METHODS = {"GET", "POST", "DELETE"}
NOT_FOR_OUTSIDE = {"stale-attempt", "start-failed"}


def test_every_route_is_described_and_every_description_has_a_route(api: Api) -> None:
    described = {
        (method.upper(), path)
        for path, item in api.app.test_client().get("/openapi.json").json["paths"].items()
        for method in item
    }
    routed = {
        (method, re.sub("<(.*?)>", r"{\1}", rule.rule))
        for rule in api.app.url_map.iter_rules()
        for method in rule.methods & METHODS
        if rule.rule.startswith("/v1/") or rule.rule in ("/livez", "/readyz", "/metrics")
    }
    assert described == routed


def test_every_route_of_the_contract_is_there(api: Api) -> None:
    contract = """
        POST /v1/jobs, GET /v1/jobs/{job_id}, GET /v1/jobs, POST /v1/jobs/{job_id}/cancel, POST /v1/jobs/{job_id}/retry,
        DELETE /v1/jobs/{job_id}, GET /v1/jobs/{job_id}/result, GET /v1/jobs/{job_id}/input,
        GET /v1/jobs/{job_id}/events, POST /v1/uploads, POST /v1/batches, GET /v1/batches/{batch_id}, GET /v1/models,
        GET /v1/models/{name}, POST /v1/estimates, POST /v1/webhook-endpoints, GET /v1/webhook-endpoints,
        DELETE /v1/webhook-endpoints/{endpoint_id}, POST /v1/webhook-endpoints/{endpoint_id}/test,
        GET /v1/webhook-deliveries, POST /v1/webhook-deliveries/{delivery_id}/resend, GET /livez, GET /readyz,
        GET /metrics
    """
    paths = openapi.document(v1.HANDLERS)["paths"]
    for entry in contract.split(","):
        method, path = entry.split()
        assert method.lower() in paths[path], entry


def test_every_reference_leads_somewhere_and_every_operation_says_what_it_does() -> None:
    made = openapi.document(v1.HANDLERS)
    assert made["openapi"].startswith("3.1")

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                kind, name = node["$ref"].removeprefix("#/components/").split("/")
                assert name in made["components"][kind]
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(made)
    ids = []
    for path, item in made["paths"].items():
        for about in item.values():
            ids.append(about["operationId"])
            assert about["summary"], path
            assert path.startswith("/v1/") <= bool(about.get("description")), path
            assert set(re.findall("{(.*?)}", path)) == {
                p["name"] for p in about.get("parameters", ()) if p["in"] == "path"
            }
    assert len(ids) == len(set(ids))


def test_every_example_is_valid() -> None:
    models = [
        model
        for model in vars(schemas).values()
        if isinstance(model, type) and issubclass(model, BaseModel) and model.__module__ == schemas.__name__
    ]
    checked = 0
    for model in models:
        examples = (model.model_config.get("json_schema_extra") or {}).get("examples", ())  # type: ignore[union-attr]
        for example in examples:
            model.model_validate(example)
            checked += 1
    assert checked >= 8


def test_a_form_offers_the_same_options_as_json() -> None:
    content = openapi.document(v1.HANDLERS)["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]
    form = content["multipart/form-data"]["schema"]["properties"]
    assert set(form) == {"image"} | set(schemas.JobRequest.model_fields) - {"image_url", "upload_id", "input_of"}
    assert form["scale"]["type"] == "integer"


def test_every_error_that_can_come_out_has_a_row_in_the_table() -> None:
    def tree(kind: type[errors.EnlargerError]) -> set[str]:
        # The client's own errors are about a service that answered badly or not at all; no service sends them.
        children = (child for child in kind.__subclasses__() if child.__module__ != "api.client")
        return {kind.code}.union(*(tree(child) for child in children))

    assert tree(errors.EnlargerError) - NOT_FOR_OUTSIDE <= set(problems.TABLE)


def test_a_problems_type_explains_it(api: Api) -> None:
    http = api.app.test_client()
    problem = http.get("/v1/jobs").json
    explained = http.get(problem["type"])
    assert explained.status_code == 200
    assert (explained.json["code"], explained.json["title"]) == ("unauthorized", problem["title"])
    assert http.get("/problems/none-of-ours").status_code == 404
    schemas.ProblemView.model_validate(problem)


def test_the_contracts_words_are_those_of_the_core() -> None:
    assert get_args(schemas.EventType) == EVENT_TYPES
    assert schemas.TERMINAL_EVENTS == TERMINAL_EVENTS
    assert set(get_args(schemas.Status)) == {str(state) for state in JobState}


def test_the_docs_page_needs_nothing_from_elsewhere(api: Api) -> None:
    http = api.app.test_client()
    page = http.get("/docs")
    assert (page.status_code, page.mimetype) == (200, "text/html")
    assert "unsafe-inline" not in page.headers["Content-Security-Policy"]
    linked = re.findall(r'(?:src|href)="(.*?)"', page.text)
    assert len(linked) >= 4
    for address in linked:
        assert address.startswith("/"), address
        assert http.get(address, buffered=True).status_code == 200, address
    assert not re.search(r"<script(?![^>]*\bsrc=)|\bstyle=|\bon\w+=", page.text)


def test_the_vendored_interface_ships_with_its_licence() -> None:
    folder = Path(openapi.__file__).parent / "static" / "docs"
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert "5.35.0" in (folder / "README.md").read_text()
