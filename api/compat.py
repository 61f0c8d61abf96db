"""A door for programs written for Replicate's HTTP API: its Python client, pointed here, runs as it is.

    client = replicate.Client(api_token="enl_...", base_url="http://127.0.0.1:8000/compat/replicate")
    client.run("enlarger/srgan", input={"image": open("small.png", "rb"), "scale": 4})

A prediction is a job: the same row, key, limits and life, seen in other words. A model is `owner/name`, whatever the
owner, and has one version, the SHA-256 of its weights. Trainings, deployments, streams and webhooks stay outside: those
of ours are shaped otherwise, and a program made for the other shape would misread them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Annotated, Any, Literal, cast

from flask import Blueprint, Response, jsonify, request, url_for
from itsdangerous import BadSignature, URLSafeTimedSerializer
from pydantic import BaseModel, ConfigDict, Field
from werkzeug.datastructures import FileStorage

from api import asked, events, openapi, uploads
from api.auth import Caller
from api.context import Context
from api.idempotency import Reservation
from api.openapi import Handler, operation
from api.schemas import JobSettings
from api.uploads import Source
from api.v1 import submit
from shared import catalog, jobs, pictures, queries
from shared.catalog import ModelCard
from shared.db import clock
from shared.errors import BodyTooLarge, Gone, InvalidRequest, JobNotCancelable, ModelUnavailable, NotFound
from shared.models import Job
from shared.queries import JobFilter
from shared.storage import content_disposition
from shared.views import iso, job_view

ROOT = "/compat/replicate"
OUTPUT_LINK_SECONDS = 3600
"""As long as Replicate keeps a prediction's output."""
PAGE = 100
_STATUS = {"queued": "starting", "running": "processing", "expired": "failed"}
_OPTIONS = frozenset(JobSettings.model_fields) - {"model", "webhook_url", "webhook_events"}
# What other models of that API call what ours have a word for.
_OTHER_WORDS = {"img": "image", "upscale": "scale", "output_format": "format", "output_quality": "quality"}
_FORMATS = {"jpg": "jpeg"}
_DATA_URI = re.compile(r"data:[^,;]*(?:;[^,;]*)*;base64,", re.IGNORECASE)


class PredictionRequest(BaseModel):
    """The body of a new prediction, as the client sends it."""

    model_config = ConfigDict(extra="ignore")

    input: dict[str, Any]
    version: Annotated[str, Field(max_length=300)] | None = None
    webhook: str | None = None
    stream: Literal[False] | None = None


def blueprint(context: Context) -> Blueprint:
    compat = Blueprint("compat", __name__)
    openapi.register(compat, context, HANDLERS)
    # Whoever has the link may fetch, as with Replicate's: it is signed, and the client may or may not send its key.
    compat.add_url_rule(f"{ROOT}/outputs/<token>/<name>", "output", lambda token, name: _output(context, token, name))
    return compat


# --- predictions ----------------------------------------------------------------------------------------------------


@operation("POST", f"{ROOT}/v1/predictions", "Hand in a picture", tag="compat", status=201)
def create_prediction(context: Context, caller: Caller) -> Response:
    """By `version`: a model's, or `owner/name` with or without one."""
    wanted = asked.json_body(PredictionRequest)
    if wanted.version is None:
        raise asked.invalid("version", "name a model: `owner/name`, or the id of its version")
    return _created(context, caller, _card_of_version(wanted.version), wanted)


@operation("POST", f"{ROOT}/v1/models/{{owner}}/{{name}}/predictions", "Hand in a picture", tag="compat", status=201)
def create_model_prediction(context: Context, caller: Caller, owner: str, name: str) -> Response:  # noqa: ARG001  (of the path)
    """By the model's name."""
    return _created(context, caller, _card(name), asked.json_body(PredictionRequest))


@operation("GET", f"{ROOT}/v1/predictions/{{job_id}}", "Look at a prediction", tag="compat")
def get_prediction(context: Context, caller: Caller, job_id: str) -> Response:
    """As it stands."""
    with context.database.reading() as session:
        return jsonify(_prediction(context, queries.owned_job(session, job_id, caller.key_id)))


@operation("GET", f"{ROOT}/v1/predictions", "List predictions, newest first", tag="compat")
def list_predictions(context: Context, caller: Caller) -> Response:
    """`next` is the address of the next page."""
    with context.database.reading() as session:
        page = queries.page_of_jobs(
            session, JobFilter(owner_key_id=caller.key_id), limit=PAGE, cursor=request.args.get("cursor")
        )
        results = [_prediction(context, job) for job in page.rows]
    following = None
    if page.next_cursor is not None:
        following = url_for("compat.list_predictions", cursor=page.next_cursor, _external=True)
    return jsonify({"previous": None, "next": following, "results": results})


@operation("POST", f"{ROOT}/v1/predictions/{{job_id}}/cancel", "Cancel a prediction", tag="compat")
def cancel_prediction(context: Context, caller: Caller, job_id: str) -> Response:
    """One that has ended is answered as it is."""
    with context.database.transaction() as session:
        job = queries.owned_job(session, job_id, caller.key_id)
        with suppress(JobNotCancelable):
            job = jobs.cancel(session, job_id, now=clock(session))
        return jsonify(_prediction(context, job))


def _created(context: Context, caller: Caller, card: ModelCard, wanted: PredictionRequest) -> Response:
    if wanted.webhook is not None:
        raise asked.invalid(
            "webhook", "webhooks have Enlarger's own shape: register one with POST /v1/webhook-endpoints"
        )
    options, picture, left_out = _read_input(card, wanted.input)
    settings = asked.checked(JobSettings, options)
    with _source(context, caller, picture) as source:
        view = submit.accept(context, caller, settings, source, Reservation(None))
    seconds = _wait_seconds(context)
    give_back = context.seats.take() if seconds else None
    if give_back is not None:
        try:
            events.wait(
                context,
                view["id"],
                caller.key_id,
                seconds=seconds,
                until=lambda pulse: pulse.is_finished,
                client_left=events.left_by(request.environ),
            )
        finally:
            give_back()
    with context.database.reading() as session:
        job = queries.owned_job(session, view["id"], caller.key_id)
        prediction = _prediction(context, job, left_out)
    if not queries.is_finished(job):
        # The client takes any other word here for the end.
        prediction["status"] = "starting"
    response = jsonify(prediction)
    response.status_code = 201
    return response


def _read_input(card: ModelCard, given: Mapping[str, Any]) -> tuple[dict[str, Any], str, list[str]]:
    """(options of the job, where the picture is, names that mean nothing here). Raises InvalidRequest."""
    options: dict[str, Any] = {"model": card.name}
    left_out = []
    picture = None
    for name, value in given.items():
        ours = _OTHER_WORDS.get(name, name)
        if ours == "image":
            picture = value
        elif ours in _OPTIONS:
            options[ours] = _FORMATS.get(value, value) if ours == "format" else value
        else:
            left_out.append(name)
    if not isinstance(picture, str):
        raise asked.invalid("input.image", "a picture is needed: an address, a data URI, or a file handed in")
    return options, picture, left_out


@contextmanager
def _source(context: Context, caller: Caller, picture: str) -> Iterator[Source]:
    """The picture an input names: a data URI, a file of `POST /v1/files`, or an address elsewhere."""
    header = _DATA_URI.match(picture)
    file_id = picture.removeprefix(_files_url())
    if header is None and file_id == picture:
        yield Source(image_url=picture)
        return
    with tempfile.SpooledTemporaryFile(uploads.SPOOL_BYTES) as file:
        if header is not None:
            try:
                file.write(base64.b64decode(picture[header.end() :], validate=True))
            except binascii.Error as error:
                raise asked.invalid("input.image", "the data URI holds no base64") from error
        else:
            # Read, and not used up as an upload of ours: a file may be the input of many predictions.
            with context.database.reading() as session:
                now = clock(session)
            uploads.download(
                context, caller.key_id, file_id, cast(Any, file), context.settings.max_upload_bytes, now=now
            )
        yield Source(body=FileStorage(cast(Any, file), filename=None))


def _wait_seconds(context: Context) -> int:
    """Of `Prefer: wait=N`; a bare `wait` is as long as may be. 0 without either."""
    given = asked.wait_seconds(context)
    if given is not None:
        return given
    preferred = [each.strip().lower() for each in ",".join(request.headers.getlist("Prefer")).split(",")]
    return context.settings.max_wait_seconds if "wait" in preferred else 0


def _prediction(context: Context, job: Job, left_out: list[str] | None = None) -> dict[str, Any]:
    """The job in Replicate's words. A request is under way: addresses are those that the client used."""
    view = job_view(job)
    status = _STATUS.get(view["status"], view["status"])
    here = url_for("compat.get_prediction", job_id=job.id, _external=True)
    progress = view["progress"]
    done, total = progress["bands_done"], progress["bands_total"]
    # The client reads progress from a bar of tqdm's in the logs.
    lines = [f"Left out: {name} is nothing that Enlarger knows." for name in left_out or ()]
    lines += [f"{int(100 * progress['fraction'])}%|{'#' * 10}| {done}/{total}"] if total else []
    timings = view["timings"] or {}
    seconds = sum(v for k, v in timings.items() if k.endswith("_seconds") and k != "queued_seconds")
    error = view["error"]
    return {
        "id": job.id,
        "model": f"enlarger/{job.model}",
        "version": _version_of(job.model),
        "status": status,
        "input": {"scale": job.scale, "classify": job.classify, "format": job.format},
        "output": _output_url(context, job) if status == "succeeded" and job.swept_at is None else None,
        "logs": "\n".join(lines),
        "error": None if status != "failed" else error["detail"] if error else "The deadline passed before it began.",
        "metrics": {"predict_time": round(seconds, 4)} if timings else {},
        "labels": view["labels"],
        "created_at": view["created_at"],
        "started_at": view["started_at"],
        "completed_at": view["finished_at"],
        "urls": {"get": here, "cancel": f"{here}/cancel"},
    }


# --- outputs --------------------------------------------------------------------------------------------------------


def _links(context: Context) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(context.settings.secret_key, salt="compat-output")


def _output_url(context: Context, job: Job) -> str:
    extension = pictures.format_named(job.format).extension
    token = _links(context).dumps(job.id)
    return url_for("compat.output", token=token, name=f"output{extension}", _external=True)


def _output(context: Context, token: str, name: str) -> Response:
    """The result itself, and no redirect: the client follows none. Raises NotFound, Gone."""
    try:
        job_id = _links(context).loads(token, max_age=OUTPUT_LINK_SECONDS)
    except BadSignature as error:
        raise NotFound("This link is none of ours, or has expired: look at the prediction for a fresh one.") from error
    with context.database.reading() as session:
        job = queries.any_job(session, str(job_id))
    if job.swept_at is not None or job.result_key is None:
        raise Gone("The prediction's output has been removed.")
    facts, chunks = context.storage.stream(job.result_key)
    response = Response(chunks, mimetype=pictures.format_named(job.format).mime_type)
    response.content_length = facts.bytes
    response.headers["Content-Disposition"] = content_disposition("attachment", name)
    return response


# --- files ----------------------------------------------------------------------------------------------------------


@operation("POST", f"{ROOT}/v1/files", "Hand in a file", tag="compat", status=201)
def create_file(context: Context, caller: Caller) -> Response:
    """For the input of predictions to come; swept as presigned uploads are."""
    content = request.files.get("content")
    if content is None:
        raise asked.invalid("content", "the form's part `content` is the file")
    file = cast(Any, content.stream)
    size_bytes = file.seek(0, 2)
    limit_bytes = context.settings.max_upload_bytes
    if size_bytes > limit_bytes:
        raise BodyTooLarge(f"The file is larger than {limit_bytes:,} bytes.", limit_bytes=limit_bytes)
    sha256 = uploads.sha256_of(file)
    with context.database.transaction() as session:
        now = clock(session)
        expires_at = now + timedelta(seconds=context.settings.upload_ttl_seconds)
        upload = uploads.hand_out(session, caller.key_id, now=now, expires_at=expires_at)
    context.storage.put(upload.blob_key, file, "application/octet-stream")
    view = {
        "id": upload.id,
        "name": content.filename or "file",
        "content_type": content.mimetype,
        "size": size_bytes,
        "etag": sha256,
        "checksums": {"sha256": sha256},
        "metadata": {},
        "created_at": iso(now),
        "expires_at": iso(expires_at),
        "urls": {"get": f"{_files_url()}{upload.id}"},
    }
    response = jsonify(view)
    response.status_code = 201
    return response


def _files_url() -> str:
    return f"{request.host_url.rstrip('/')}{ROOT}/v1/files/"


# --- models ---------------------------------------------------------------------------------------------------------


@operation("GET", f"{ROOT}/v1/models", "List the models", tag="compat")
def list_models(_context: Context, _caller: Caller) -> Response:
    """All of them."""
    return jsonify({"previous": None, "next": None, "results": [_model(card, "enlarger") for card in catalog.CARDS]})


@operation("GET", f"{ROOT}/v1/models/{{owner}}/{{name}}", "Look at a model", tag="compat")
def get_model(_context: Context, _caller: Caller, owner: str, name: str) -> Response:
    """With its one version."""
    return jsonify(_model(_card(name), owner))


@operation("GET", f"{ROOT}/v1/models/{{owner}}/{{name}}/versions", "List a model's versions", tag="compat")
def list_versions(_context: Context, _caller: Caller, owner: str, name: str) -> Response:  # noqa: ARG001  (of the path)
    """There is one."""
    return jsonify({"previous": None, "next": None, "results": [_version(_card(name))]})


@operation("GET", f"{ROOT}/v1/models/{{owner}}/{{name}}/versions/{{version}}", "Look at a version", tag="compat")
def get_version(_context: Context, _caller: Caller, owner: str, name: str, version: str) -> Response:
    """What its input may hold."""
    card = _card(name)
    if version != _version_id(card):
        raise NotFound(f"{owner}/{name} has the version {_version_id(card)} and no other.")
    return jsonify(_version(card))


def _card(name: str) -> ModelCard:
    try:
        return catalog.card(name)
    except ModelUnavailable as error:
        raise NotFound(error.detail, **error.facts) from error


def _card_of_version(version: str) -> ModelCard:
    """`<sha256>`, `owner/name` or `owner/name:<sha256>`. Raises NotFound, InvalidRequest."""
    for card in catalog.CARDS:
        if _version_id(card) == version.rpartition(":")[2]:
            return card
    name = version.partition(":")[0].rpartition("/")[2]
    if ":" in version or re.fullmatch(r"[0-9a-f]{64}", name):
        known = {f"enlarger/{card.name}": _version_id(card) for card in catalog.CARDS}
        raise InvalidRequest(
            "No model here has that version. Name the model alone, or one of these versions.", versions=known
        )
    return _card(name)


def _version_id(card: ModelCard) -> str:
    """The hash of its weights; of its name, where it is plain arithmetic."""
    return card.weights.sha256 if card.weights is not None else hashlib.sha256(card.name.encode()).hexdigest()


def _version_of(model: str) -> str:
    try:
        return _version_id(catalog.card(model))
    except ModelUnavailable:
        # The job is older than the catalogue.
        return ""


def _model(card: ModelCard, owner: str) -> dict[str, Any]:
    return {
        "url": url_for("compat.get_model", owner=owner, name=card.name, _external=True),
        "owner": owner,
        "name": card.name,
        "description": card.summary,
        "visibility": "private",
        "github_url": None,
        "paper_url": None,
        "license_url": None,
        "run_count": 0,
        "cover_image_url": None,
        "default_example": None,
        "latest_version": _version(card),
    }


def _version(card: ModelCard) -> dict[str, Any]:
    properties = {
        name: about for name, about in JobSettings.model_json_schema()["properties"].items() if name in _OPTIONS
    }
    picture = {"type": "string", "format": "uri", "title": "Image", "description": "The picture to enlarge."}
    return {
        "id": _version_id(card),
        # No versions of weights are kept apart: this is when the first of these jobs could have been asked for.
        "created_at": "2026-01-01T00:00:00.000Z",
        "cog_version": "0.9.0",
        "openapi_schema": {
            "openapi": "3.1.0",
            "info": {"title": card.name, "version": "0"},
            "paths": {},
            "components": {
                "schemas": {
                    "Input": {"type": "object", "required": ["image"], "properties": {"image": picture, **properties}},
                    "Output": {"type": "string", "format": "uri", "title": "Output"},
                }
            },
        },
    }


HANDLERS: tuple[Handler, ...] = (
    create_prediction,
    create_model_prediction,
    get_prediction,
    list_predictions,
    cancel_prediction,
    create_file,
    list_models,
    get_model,
    list_versions,
    get_version,
)
