"""What a request asks, read and checked: its body, its query, its preferences. What is wrong is said field by field."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from flask import request
from pydantic import BaseModel, ValidationError
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import BadRequest, UnsupportedMediaType

from api.context import Context
from api.schemas import BatchRequest, JobRequest, JobSettings, PreviewRequest
from api.uploads import Source
from shared.errors import InvalidRequest

ModelT = TypeVar("ModelT", bound=BaseModel)

# A batch of a thousand long URLs is 2 MB of JSON.
MAX_JSON_BYTES = 4 * 1024 * 1024
PICTURE_PART = "image"
# Fields that hold several values; in a form they are repeated, or separated by commas.
_LIST_FIELDS = frozenset({"webhook_events", "models", "crop"})

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_PREFER_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\"?\s*(?:$|[,;])", re.IGNORECASE)


def json_body(model: type[ModelT], *, optional: bool = False) -> ModelT:
    """The JSON body as `model`; `optional` takes no body at all for `{}`.

    Raises InvalidRequest naming each field, BadRequest for what is no JSON, UnsupportedMediaType.
    """
    if optional and not request.content_length and "Transfer-Encoding" not in request.headers:
        return checked(model, {})
    return checked(model, _json())


def query(model: type[ModelT]) -> ModelT:
    """The query's parameters as `model`. Raises InvalidRequest."""
    return checked(model, {name: value for name, value in request.args.items() if value != ""})


PictureT = TypeVar("PictureT", JobRequest, PreviewRequest)


def picture(model: type[PictureT]) -> tuple[PictureT, Source]:
    """A form with the part `image`, or JSON naming a source; exactly one source in all."""
    if request.mimetype == "multipart/form-data":
        asked, bodies = checked(model, _form()), _pictures()
    else:
        asked, bodies = json_body(model), []
    named = [name for name in (asked.image_url, asked.upload_id, asked.input_of) if name is not None]
    if len(bodies) + len(named) != 1:
        raise invalid(PICTURE_PART, "send exactly one of: a form's part image, image_url, upload_id, input_of")
    return asked, Source(bodies[0] if bodies else None, asked.image_url, asked.upload_id, asked.input_of)


def batch(context: Context) -> tuple[JobSettings, list[Source], list[str | None]]:
    """The settings, the pictures, and each picture's external id."""
    if request.mimetype == "multipart/form-data":
        settings = checked(JobSettings, _form())
        sources = [Source(body=body) for body in _pictures()]
        names: list[str | None] = [None] * len(sources)
    else:
        asked = json_body(BatchRequest)
        settings = asked.settings
        sources = [Source(image_url=item.image_url, upload_id=item.upload_id) for item in asked.items]
        names = [item.external_id for item in asked.items]
    if not 1 <= len(sources) <= context.settings.max_batch_items:
        raise invalid("items", f"a batch has 1 to {context.settings.max_batch_items:,} pictures")
    return settings, sources, names


def wait_seconds(context: Context) -> int | None:
    """N of `Prefer: wait=N` (RFC 7240), at most `max_wait_seconds`; None where it is not preferred."""
    found = _PREFER_WAIT.search(", ".join(request.headers.getlist("Prefer")))
    return None if found is None else min(int(found[1]), context.settings.max_wait_seconds)


def traceparent() -> str | None:
    """The W3C trace that the client's request belongs to; None where there is none, or none that is well formed."""
    sent = request.headers.get("traceparent", "")
    return sent if _TRACEPARENT.fullmatch(sent) else None


def checked(model: type[ModelT], values: Any) -> ModelT:
    """`values` as `model`. Raises InvalidRequest with an entry in `errors` for each field that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        wrong = [
            {"field": ".".join(str(part) for part in entry["loc"]) or "body", "message": entry["msg"]}
            for entry in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        first = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InvalidRequest(f"{first['field']}: {first['message']}{more}", errors=wrong) from error


def invalid(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {message}", errors=[{"field": field, "message": message}])


def _json() -> Any:
    if not request.is_json:
        raise UnsupportedMediaType("Send application/json, or multipart/form-data where a picture is handed in.")
    request.max_content_length = MAX_JSON_BYTES
    try:
        return request.get_json(cache=False)
    except RecursionError as error:
        raise BadRequest("The JSON is nested too deeply.") from error


def _form() -> dict[str, Any]:
    """The form's fields. Empty ones count as absent: browsers send every field of a page's form."""
    values: dict[str, Any] = {}
    for name in request.form:
        given = [value for value in request.form.getlist(name) if value != ""]
        if name in _LIST_FIELDS:
            given = [part.strip() for value in given for part in value.split(",")]
        if given:
            values[name] = given if name in _LIST_FIELDS else given[-1]
    return values


def _pictures() -> list[FileStorage]:
    others = sorted(set(request.files) - {PICTURE_PART})
    if others:
        raise invalid(others[0], f"the picture's part is named {PICTURE_PART!r}")
    return request.files.getlist(PICTURE_PART)
