"""`/openapi.json` (3.1) and `/docs`, made from the very table the routes are registered from.

A route is described where it is written, by `operation`; `register` adds it to a blueprint and `document` to the
description, so neither can know a route that the other does not. Schemas are pydantic's own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, TypeVar

from flask import Blueprint, Response, jsonify, render_template
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from api import auth, problems
from api.context import Context
from api.schemas import HealthView, JobSettings, ProblemView
from shared.errors import (
    BodyTooLarge,
    DatabaseUnavailable,
    EnlargerError,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotFound,
    RateLimited,
    Unauthorized,
)

# A handler of /v1: what the process works with, who calls, and the path's parameters.
Handler = Callable[..., Response]
HandlerT = TypeVar("HandlerT", bound=Handler)

# Ids and names; anything else names nothing, and must not reach SQL (PostgreSQL refuses NUL).
_PATH_PARAMETER = re.compile(r"[A-Za-z0-9._-]{1,100}")

EVERY_ROUTE_MAY_ANSWER: tuple[type[EnlargerError], ...] = (
    Unauthorized,
    Forbidden,
    RateLimited,
    InternalError,
    DatabaseUnavailable,
)


@dataclass(frozen=True)
class Operation:
    """A route as clients see it."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    """As OpenAPI writes it: `/v1/jobs/{job_id}`."""
    summary: str
    description: str
    tag: str
    status: int
    answer: type[BaseModel] | None
    """None: no JSON body; `answer_type` says what then."""
    answer_type: str | None
    body: type[BaseModel] | None
    body_is_optional: bool
    takes_pictures: Literal["none", "one", "many"]
    """As form parts named `image`, beside the fields of `body`."""
    query: type[BaseModel] | None
    headers: Sequence[str]
    problems: Sequence[type[EnlargerError]]
    scope: str | None


REQUEST_HEADERS: Mapping[str, str] = {
    "Idempotency-Key": "1 to 255 characters: the same key and the same request replay the first answer for 24 h.",
    "Prefer": "`wait=N` holds the answer until the job ends or N seconds (60 at most) have passed.",
    "If-None-Match": "The `ETag` of an earlier answer: 304 where nothing has changed.",
    "Last-Event-ID": "The id of the last event that was received: only newer ones are sent.",
    "traceparent": "W3C Trace Context; carried through to the worker's logs.",
}


def operation(
    method: Literal["GET", "POST", "DELETE"],
    path: str,
    summary: str,
    *,
    tag: str,
    status: int = 200,
    answer: type[BaseModel] | None = None,
    answer_type: str | None = None,
    body: type[BaseModel] | None = None,
    body_is_optional: bool = False,
    takes_pictures: Literal["none", "one", "many"] = "none",
    query: type[BaseModel] | None = None,
    headers: Sequence[str] = (),
    problems: Sequence[type[EnlargerError]] = (),
    scope: str | None = "jobs",
) -> Callable[[HandlerT], HandlerT]:
    """Describes the handler it stands above. The handler's docstring becomes the description."""

    def describe(handler: HandlerT) -> HandlerT:
        described = Operation(
            method,
            path,
            summary,
            " ".join((handler.__doc__ or "").split()),
            tag,
            status,
            answer,
            answer_type,
            body,
            body_is_optional,
            takes_pictures,
            query,
            headers,
            problems,
            scope,
        )
        handler.operation = described  # type: ignore[attr-defined]
        return handler

    return describe


def described(handler: Handler) -> Operation:
    found: Operation = handler.operation  # type: ignore[attr-defined]
    return found


def register(blueprint: Blueprint, context: Context, handlers: Sequence[Handler]) -> None:
    """Adds each handler under its path: the caller is named, checked for the scope and counted before it runs."""
    for handler in handlers:
        about = described(handler)

        def view(_handler: Handler = handler, _about: Operation = about, **path: str) -> Response:
            who = auth.caller(context, _about.scope)
            context.limits.count(who.key_id)
            if not all(_PATH_PARAMETER.fullmatch(value) for value in path.values()):
                raise NotFound("There is nothing of that name.")
            return _handler(context, who, **path)

        functools.update_wrapper(view, handler)
        rule = about.path.replace("{", "<").replace("}", ">")
        blueprint.add_url_rule(rule, handler.__name__, view, methods=[about.method])


def blueprint(handlers: Sequence[Handler]) -> Blueprint:
    """`/openapi.json` and `/docs`."""
    docs = Blueprint("docs", __name__)
    # Made when first asked for: it is the slowest thing a starting process would do.
    made = functools.cache(lambda: document(handlers))

    @docs.get("/openapi.json")
    def openapi() -> Response:
        return jsonify(made())

    @docs.get("/docs")
    def page() -> str:
        return render_template("docs.html")

    return docs


def document(handlers: Sequence[Handler]) -> dict[str, Any]:
    """The OpenAPI 3.1 description of these handlers and of the health routes."""
    operations = [described(handler) for handler in handlers]
    asked: set[type[BaseModel]] = {o.body for o in operations if o.body is not None}
    answered: set[type[BaseModel]] = {o.answer for o in operations if o.answer is not None}
    answered |= {HealthView, ProblemView}
    references, schemas = models_json_schema(
        [(model, "validation") for model in sorted(asked, key=_name)]
        + [(model, "serialization") for model in sorted(answered, key=_name)],
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, dict[str, Any]] = {}
    for handler, about in zip(handlers, operations, strict=True):
        paths.setdefault(about.path, {})[about.method.lower()] = _describe(handler.__name__, about, references)
    paths |= _health_paths()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Enlarger",
            "version": _version(),
            "summary": "Hand in a small picture; get a larger, sharper one, and what it shows.",
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, `enl_...`. Scopes: `jobs`, and `admin`, which includes it.",
                }
            },
        },
    }


_DESCRIPTION = """\
Submit a picture with `POST /v1/jobs` (a form with `image`, or JSON with `image_url` or `upload_id`), keep the id, \
wait for the job (`Prefer: wait=60`, its events, or a webhook) and fetch `GET /v1/jobs/{id}/result`.

Errors are RFC 9457 problems (`application/problem+json`): decide by `code`. Answers may gain fields and statuses. \
Another key's job answers 404. `RateLimit` and `RateLimit-Policy` tell what is left to a key; 429 carries \
`Retry-After`. Send `X-Request-Id` to find a request again in the logs.
"""


def _describe(name: str, about: Operation, references: Mapping[Any, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "operationId": name,
        "summary": about.summary,
        "description": about.description,
        "tags": [about.tag],
        "security": [{"key": [about.scope] if about.scope else []}],
        "parameters": [*_path_parameters(about.path), *_query_parameters(about.query), *_headers(about.headers)],
        "responses": {**_answers(about, references), **_problems(about)},
    }
    if "If-None-Match" in about.headers:
        made["responses"]["304"] = {"description": "Nothing has changed."}
    if about.body is not None:
        made["requestBody"] = _body(about, about.body, references)
    return made


def _answers(about: Operation, references: Mapping[Any, Any]) -> dict[str, Any]:
    words = {200: "Done.", 201: "Made.", 202: "Accepted.", 204: "Gone.", 302: "At this address, for a while."}
    made: dict[str, Any] = {"description": words[about.status]}
    if about.status in (201, 202, 302):
        made["headers"] = {"Location": {"schema": {"type": "string"}}}
    if about.answer is not None:
        made["content"] = {"application/json": {"schema": references[(about.answer, "serialization")]}}
    elif about.answer_type is not None and about.status == 302:
        streamed = {"description": "Streamed, where the deployment does so.", "content": {about.answer_type: {}}}
        return {"200": streamed, "302": made}
    elif about.answer_type is not None:
        made["content"] = {about.answer_type: {}}
    return {str(about.status): made}


def _body(about: Operation, body: type[BaseModel], references: Mapping[Any, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": references[(body, "validation")]}}
    if about.takes_pictures != "none":
        picture = {"type": "string", "format": "binary", "contentMediaType": "application/octet-stream"}
        image: dict[str, Any] = picture if about.takes_pictures == "one" else {"type": "array", "items": picture}
        content["multipart/form-data"] = {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {"image": image, **_form_fields(about, body)},
            }
        }
    return {"required": not about.body_is_optional, "content": content}


def _form_fields(about: Operation, body: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """What a form may say beside its pictures, which stand in place of the fields that name one."""
    fields = _plain_properties(body if about.takes_pictures == "one" else JobSettings)
    return {name: field for name, field in fields.items() if name not in ("image_url", "upload_id", "input_of")}


def _problems(about: Operation) -> dict[str, Any]:
    """One response per status, naming every code it may carry."""
    raised = {error.code for error in (*EVERY_ROUTE_MAY_ANSWER, *about.problems)}
    if about.query is not None or about.body is not None:
        raised.add(InvalidRequest.code)
    if about.body is not None:
        raised |= {"bad-request", "unsupported-media-type", BodyTooLarge.code}
    if "{" in about.path:
        raised.add(NotFound.code)
    codes: dict[int, set[str]] = {}
    for code in raised:
        codes.setdefault(problems.TABLE[code].status, set()).add(code)
    return {
        str(status): {
            "description": ", ".join(f"`{code}`" for code in sorted(named)),
            "content": {
                problems.MIME_TYPE: {
                    "schema": {"$ref": "#/components/schemas/ProblemView"},
                    "examples": {code: {"value": _example(code)} for code in sorted(named)},
                }
            },
        }
        for status, named in sorted(codes.items())
    }


def _example(code: str) -> dict[str, Any]:
    about = problems.TABLE[code]
    words = {"title": about.title, "status": about.status, "detail": about.meaning}
    return {"type": f"/problems/{code}", **words, "code": code, "retryable": about.status in (429, 503)}


def _path_parameters(path: str) -> list[dict[str, Any]]:
    names = [part.strip("{}") for part in path.split("/") if part.startswith("{")]
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]


def _query_parameters(query: type[BaseModel] | None) -> list[dict[str, Any]]:
    if query is None:
        return []
    return [
        {"name": name, "in": "query", "required": False, "description": about.pop("description", ""), "schema": about}
        for name, about in _plain_properties(query).items()
    ]


def _plain_properties(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """The fields of a form or a query: there an optional one is left out, and null cannot be said."""
    properties: dict[str, dict[str, Any]] = {}
    for name, about in model.model_json_schema()["properties"].items():
        if "anyOf" in about and about.get("default", 0) is None:
            (kind,) = (choice for choice in about["anyOf"] if choice != {"type": "null"})
            about = {key: value for key, value in about.items() if key not in ("anyOf", "default")} | kind
        properties[name] = about
    return properties


def _headers(names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "header", "required": False, "description": text, "schema": {"type": "string"}}
        for name, text in REQUEST_HEADERS.items()
        if name in names
    ]


def _health_paths() -> dict[str, Any]:
    health = {"schema": {"$ref": "#/components/schemas/HealthView"}}

    def get(name: str, summary: str, media_type: str, failing: dict[str, str]) -> dict[str, Any]:
        problem = {problems.MIME_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemView"}}}
        return {
            "get": {
                "operationId": name,
                "summary": summary,
                "tags": ["health"],
                **({} if "401" in failing else {"security": []}),
                "responses": {
                    "200": {"description": "Yes.", "content": {media_type: health if "json" in media_type else {}}},
                    **{status: {"description": text, "content": problem} for status, text in failing.items()},
                },
            }
        }

    return {
        "/livez": get("livez", "Is the process up?", "application/json", {}),
        "/readyz": get(
            "readyz",
            "Do SQL, Redis and storage answer?",
            "application/json",
            {"503": "`unavailable`: `failing` names the one that does not."},
        ),
        "/metrics": get(
            "metrics",
            "Numbers for Prometheus; scope `admin`",
            "text/plain",
            {"401": "`unauthorized`", "403": "`forbidden`", "503": "`database-unavailable`"},
        ),
    }


def _version() -> str:
    try:
        return version("enlarger")
    except PackageNotFoundError:
        # Run from a folder of sources that was not installed.
        return "0"


def _name(model: type[BaseModel]) -> str:
    return model.__name__
