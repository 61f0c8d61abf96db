"""What a job came to: its result, also in other forms, the report on it, its input, and small pictures of these."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from flask import Response, jsonify
from sqlalchemy.orm import Session

from api import asked
from api.auth import Caller
from api.context import Context
from api.openapi import operation
from api.schemas import PreviewView, RenditionRequest, RenditionView, ReportView, ThumbnailQuery
from api.v1 import answers
from shared import pictures, previews, queries, renditions, thumbnails
from shared.db import clock
from shared.errors import (
    BlobMissing,
    FormatCannotHoldSize,
    Gone,
    JobHasNoResult,
    JobNotFinished,
    NotFound,
    RenditionNotMade,
)
from shared.models import Job, JobState, Rendition
from shared.storage import content_disposition
from shared.telemetry import log
from shared.views import has_report, iso


@operation(
    "GET",
    "/v1/jobs/{job_id}/result",
    "Fetch the enlarged picture",
    tag="jobs",
    status=302,
    answer_type="image/*",
    problems=(JobNotFinished, JobHasNoResult, Gone),
)
def get_result(context: Context, caller: Caller, job_id: str) -> Response:
    """A redirect to a link that is good for a while; where clients cannot reach storage, the picture itself (200)."""
    with context.database.reading() as session:
        job, key = _with_result(session, job_id, caller)
    format = pictures.format_named(job.format)
    return _picture(context, job, key, _result_name(job, format), format.mime_type)


@operation(
    "GET",
    "/v1/jobs/{job_id}/report",
    "See how true a result is to its input",
    tag="jobs",
    answer=ReportView,
    problems=(JobNotFinished, JobHasNoResult),
)
def get_report(context: Context, caller: Caller, job_id: str) -> Response:
    """The result shrunk back and compared with the picture handed in, the seams between tiles, and what had to be
    mended on the way. Measured on every job while its rows went by."""
    with context.database.reading() as session:
        job = queries.owned_job(session, job_id, caller.key_id)
    if not queries.is_finished(job):
        raise JobNotFinished(f"The job is {job.state}.", status_now=str(job.state))
    if job.report is None or not has_report(job):
        raise JobHasNoResult(
            f"The job is {job.state}, and has no report: only pictures that were delivered have one, and previews and "
            "jobs from before there were reports do not.",
            status_now=str(job.state),
        )
    return jsonify({"job_id": job.id, "model": job.model, "scale": job.scale, **job.report})


@operation(
    "GET",
    "/v1/jobs/{job_id}/input",
    "Fetch the picture that was handed in",
    tag="jobs",
    status=302,
    answer_type="image/*",
    problems=(Gone,),
)
def get_input(context: Context, caller: Caller, job_id: str) -> Response:
    """As the result: a redirect, or the picture itself. Always as an attachment."""
    with context.database.reading() as session:
        job = queries.owned_job(session, job_id, caller.key_id)
    format = pictures.format_named(job.input_format)
    return _picture(context, job, job.input_key, f"{_stem(job)}{format.extension}", format.mime_type)


@operation(
    "GET",
    "/v1/jobs/{job_id}/thumbnail",
    "Fetch a small picture of the input or the result",
    tag="jobs",
    answer_type="image/webp",
    query=ThumbnailQuery,
    problems=(NotFound, Gone),
)
def get_thumbnail(context: Context, caller: Caller, job_id: str) -> Response:
    """At most 256 px a side. The input's is there once a worker has read it, the result's with the result: 404 before
    that."""
    wanted = asked.query(ThumbnailQuery)
    with context.database.reading() as session:
        job = queries.owned_job(session, job_id, caller.key_id)
    return _small_picture(context, job, thumbnails.key(job.blob_prefix, wanted.of, job.attempt), thumbnails.MIME_TYPE)


@operation(
    "GET",
    "/v1/jobs/{job_id}/preview",
    "See how far a job's result has come",
    tag="jobs",
    answer=PreviewView,
    problems=(Gone,),
)
def get_preview(context: Context, caller: Caller, job_id: str) -> Response:
    """The finished bands of the newest attempt, as strips much smaller than the result. None for a result that comes
    in one band. Ask again with each `progress` event; a strip that is listed stays."""
    with context.database.reading() as session:
        job = queries.owned_job(session, job_id, caller.key_id)
    _check_kept(job)
    keys = context.storage.keys(previews.strips_prefix(job.blob_prefix, job.attempt)) if job.attempt else []
    strips = [
        {
            "y": strip.y_px,
            "width": strip.width * strip.factor,
            "height": strip.height * strip.factor,
            "url": f"/v1/jobs/{job.id}/preview/{job.attempt}/{strip.name}",
        }
        for strip in previews.strips_of(keys)
    ]
    return jsonify({"attempt": job.attempt, "strips": strips})


@operation(
    "GET",
    "/v1/jobs/{job_id}/preview/{attempt}/{strip}",
    "Fetch a strip of the preview",
    tag="jobs",
    answer_type="image/*",
    problems=(NotFound, Gone),
)
def get_preview_strip(context: Context, caller: Caller, job_id: str, attempt: str, strip: str) -> Response:
    """As `GET /v1/jobs/{job_id}/preview` names it."""
    with context.database.reading() as session:
        job = queries.owned_job(session, job_id, caller.key_id)
    named = previews.strip_named(strip)
    if named is None or not re.fullmatch(r"[0-9]{1,9}", attempt):
        raise NotFound("There is no such strip.")
    key = previews.strip_key(job.blob_prefix, int(attempt), named)
    return _small_picture(context, job, key, f"image/{named.format}")


# --- the result in other forms ----------------------------------------------------------------------------------------


@operation(
    "POST",
    "/v1/jobs/{job_id}/renditions",
    "Ask for a result in another form",
    tag="renditions",
    status=202,
    answer=RenditionView,
    body=RenditionRequest,
    problems=(JobNotFinished, JobHasNoResult, Gone, FormatCannotHoldSize),
)
def ask_rendition(context: Context, caller: Caller, job_id: str) -> Response:
    """Another format, or `zoom`: a pyramid of tiles. It is made from the stored result, once; nothing is enlarged
    again. Asking again is harmless, and tries again what has failed."""
    with context.database.reading() as session:
        job, _ = _with_result(session, job_id, caller)
    _check_kept(job)
    wanted = asked.json_body(RenditionRequest)
    with context.database.transaction() as session:
        if wanted.kind != renditions.ZOOM:
            format = pictures.format_named(wanted.kind)
            width, height = job.result_width or 0, job.result_height or 0
            if max(width, height) > format.largest_side_px:
                raise FormatCannotHoldSize(format.name, width, height, format.largest_side_px)
        rendition = renditions.ask(session, job, wanted.kind, now=clock(session))
    log.info("rendition.asked", job_id=job_id, key_id=caller.key_id, kind=wanted.kind)
    location = f"/v1/jobs/{job_id}/renditions/{wanted.kind}"
    return answers.json(_rendition_view(context, job, rendition), 202, location=location)


@operation(
    "GET",
    "/v1/jobs/{job_id}/renditions/{kind}",
    "Look at a rendition",
    tag="renditions",
    answer=RenditionView,
    problems=(NotFound, Gone),
)
def get_rendition(context: Context, caller: Caller, job_id: str, kind: str) -> Response:
    """Whether it is made; then `url`, or for `zoom` where its tiles are."""
    with context.database.reading() as session:
        job = queries.owned_job(session, job_id, caller.key_id)
        rendition = renditions.found(session, job.id, kind)
    _check_kept(job)
    return jsonify(_rendition_view(context, job, rendition))


@operation(
    "GET",
    "/v1/jobs/{job_id}/renditions/{kind}/file",
    "Fetch a rendition",
    tag="renditions",
    status=302,
    answer_type="image/*",
    problems=(NotFound, RenditionNotMade, Gone),
)
def get_rendition_file(context: Context, caller: Caller, job_id: str, kind: str) -> Response:
    """As the result: a redirect, or the picture itself."""
    with context.database.reading() as session:
        job = queries.owned_job(session, job_id, caller.key_id)
        key = _made_key(renditions.found(session, job.id, kind))
    if kind == renditions.ZOOM:
        raise NotFound("A pyramid is fetched tile by tile.")
    format = pictures.format_named(kind)
    return _picture(context, job, key, _result_name(job, format), format.mime_type)


@operation(
    "GET",
    "/v1/jobs/{job_id}/zoom/{level}/{tile}",
    "Fetch a tile of the pyramid",
    tag="renditions",
    answer_type="image/*",
    problems=(NotFound, RenditionNotMade, Gone),
)
def get_tile(context: Context, caller: Caller, job_id: str, level: str, tile: str) -> Response:
    """`tile` is `column_row`. 404 outside the pyramid, and before somebody has asked for the rendition `zoom`."""
    with context.database.reading() as session:
        job = queries.owned_job(session, job_id, caller.key_id)
        key = _made_key(renditions.found(session, job.id, renditions.ZOOM))
    _check_kept(job)
    if not re.fullmatch(r"[0-9]{1,2}", level):
        raise NotFound("The pyramid has no such level.")
    picture, mime_type = context.zooms.tile(key, int(level), tile)
    return _cached(Response(picture, mimetype=mime_type))


# --- what these routes share ------------------------------------------------------------------------------------------


def _with_result(session: Session, job_id: str, caller: Caller) -> tuple[Job, str]:
    """A job of the caller's and the key of its result. Raises NotFound, JobNotFinished, JobHasNoResult."""
    job = queries.owned_job(session, job_id, caller.key_id)
    if not queries.is_finished(job):
        raise JobNotFinished(f"The job is {job.state}.", status_now=str(job.state))
    if job.result_key is None or job.state != JobState.SUCCEEDED:
        raise JobHasNoResult(f"The job is {job.state}: there is no picture.", status_now=str(job.state))
    return job, job.result_key


def _check_kept(job: Job) -> None:
    if job.swept_at is not None:
        raise Gone("The job's pictures have been swept.", swept_at=iso(job.swept_at))


def _result_name(job: Job, format: pictures.Format) -> str:
    return f"{_stem(job)}-{job.model}-x{job.scale}{format.extension}"


def _stem(job: Job) -> str:
    return PurePosixPath(job.input_name or "").stem or job.id


def _picture(context: Context, job: Job, key: str, name: str, mime_type: str) -> Response:
    """The blob as an attachment, by link or through this process. Raises Gone where it has been swept."""
    _check_kept(job)
    if context.settings.result_delivery == "redirect":
        link = context.storage.link(key, file_name=name, content_type=mime_type)
        return answers.empty(302, location=link)
    facts, chunks = context.storage.stream(key)
    response = Response(chunks, mimetype=mime_type)
    response.content_length = facts.bytes
    response.headers["Content-Disposition"] = content_disposition("attachment", name)
    return response


def _small_picture(context: Context, job: Job, key: str, mime_type: str) -> Response:
    """Through this process, also where results leave by redirect: a few kB, which the browser may keep."""
    _check_kept(job)
    try:
        _, chunks = context.storage.stream(key)
    except BlobMissing as error:
        raise NotFound("It has not been made.") from error
    response = Response(b"".join(chunks), mimetype=mime_type)
    return _cached(response)


def _cached(response: Response) -> Response:
    """What lies at this address never changes: the browser need not ask again, and nobody between may keep it."""
    response.headers["Cache-Control"] = "private, max-age=86400, immutable"
    return response


def _made_key(rendition: Rendition) -> str:
    if rendition.key is None:
        why = rendition.error_detail or "It is still being made."
        raise RenditionNotMade(why, kind=rendition.kind, retry_after_seconds=1)
    return rendition.key


def _rendition_view(context: Context, job: Job, rendition: Rendition) -> dict[str, Any]:
    view = renditions.view(rendition)
    if rendition.kind == renditions.ZOOM and rendition.key is not None:
        width, height = job.result_width or 1, job.result_height or 1
        view["zoom"] = {
            "width": width,
            "height": height,
            "tile_size": renditions.TILE_PX,
            "overlap": 0,
            "levels": (max(width, height) - 1).bit_length() + 1,
            "format": context.zooms.format(rendition.key),
            "tiles": f"/v1/jobs/{job.id}/zoom/{{level}}/{{column}}_{{row}}",
        }
    return view
