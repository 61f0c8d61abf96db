"""The public JSON routes. Each reads the request, asks or changes through `shared`, commits, and answers.

Ownership is decided in one place (`queries.owned_job` and its like for other rows): what belongs to another key is
answered 404, as if it were not there. No route waits for Redis.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import PurePosixPath
from typing import Any

from flask import Blueprint, Response, g, jsonify, request
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api import asked, events, idempotency, openapi, uploads
from api.auth import Caller
from api.context import Context
from api.idempotency import Replay, Reservation
from api.openapi import Handler, operation
from api.schemas import (
    BatchRequest,
    BatchView,
    DeliveriesQuery,
    DeliveryPage,
    DeliveryView,
    EndpointPage,
    EndpointRequest,
    EndpointView,
    EstimateRequest,
    EstimateView,
    JobPage,
    JobRequest,
    JobSettings,
    JobsQuery,
    JobView,
    KeyView,
    ModelPage,
    ModelView,
    PreviewRequest,
    PreviewView,
    RenditionRequest,
    RenditionView,
    ReportView,
    ThumbnailQuery,
    UploadRequest,
    UploadView,
)
from api.uploads import Aim, Source, Stored
from shared import (
    catalog,
    deliveries,
    jobs,
    outbox,
    own_models,
    pictures,
    previews,
    queries,
    renditions,
    thumbnails,
)
from shared.catalog import ModelCard, OwnFile
from shared.db import clock, new_id
from shared.errors import (
    BlobMissing,
    BlockedUrl,
    BodyTooLarge,
    DatabaseUnavailable,
    EnlargerError,
    FetchFailed,
    FormatCannotHoldSize,
    Gone,
    IdempotencyInProgress,
    IdempotencyMismatch,
    InvalidImage,
    InvalidRequest,
    JobHasNoResult,
    JobNotCancelable,
    JobNotFinished,
    JobNotRetryable,
    ModelUnavailable,
    NotFound,
    OutputTooLarge,
    QueueFull,
    RenditionNotMade,
    StorageUnavailable,
    TooManyPixels,
    TooManyStreams,
    UnsupportedFormat,
    UploadRejected,
)
from shared.jobs import JobOptions
from shared.models import Batch, Delivery, Endpoint, Job, JobState, Rendition, Worker
from shared.queries import JobFilter, Pulse
from shared.storage import content_disposition
from shared.telemetry import log

MAX_ENDPOINTS_PER_KEY = 50
# Side of the crop in the middle that a preview shows where none is named: half a minute of a CPU for all models.
PREVIEW_DEFAULT_PX = 96
# Pictures of a batch that are read at once, and how long reading all of them may take before the batch is refused.
BATCH_READERS = 8
BATCH_SECONDS = 120.0
# What two average CPU cores do with the catalogue's networks; estimates leave it as soon as there is a history.
ASSUMED_MEGAFLOPS_PER_SECOND = 60_000.0
# Upscaling is the most of a job, not all of it; and the slowest of twenty takes about this much longer than the middle.
ASSUMED_OVERHEAD_SECONDS = 0.3

FORSAKEN = "-forsaken"
"""Ends the tag of a job that nobody will come for."""
ASSUMED_P95_OVER_P50 = 2.0

SUBMIT_PROBLEMS: tuple[type[EnlargerError], ...] = (
    InvalidRequest,
    InvalidImage,
    UnsupportedFormat,
    BodyTooLarge,
    TooManyPixels,
    OutputTooLarge,
    FormatCannotHoldSize,
    BlockedUrl,
    FetchFailed,
    ModelUnavailable,
    QueueFull,
    IdempotencyMismatch,
    IdempotencyInProgress,
    StorageUnavailable,
    NotFound,
    Gone,
)


def blueprint(context: Context) -> Blueprint:
    v1 = Blueprint("v1", __name__)
    openapi.register(v1, context, HANDLERS)
    return v1


# --- submit ---------------------------------------------------------------------------------------------------------


@operation(
    "POST",
    "/v1/jobs",
    "Hand in a picture",
    tag="jobs",
    status=202,
    answer=JobView,
    body=JobRequest,
    takes_pictures="one",
    headers=("Idempotency-Key", "Prefer", "traceparent"),
    problems=SUBMIT_PROBLEMS,
)
def create_job(context: Context, caller: Caller) -> Response:
    """Checks and stores the picture and answers with the job, which cannot be lost from then on. The picture comes as
    the form's part `image`, from `image_url`, from a presigned upload named by `upload_id`, or is that of another of
    your jobs, `input_of`."""
    wanted, source = asked.picture(JobRequest)
    reservation = _reserve(context, caller, "POST /v1/jobs", wanted.model_dump(mode="json"), [source])
    if isinstance(reservation, Replay):
        return _replayed(reservation)
    return _accepted(context, caller, accept(context, caller, wanted, source, reservation))


def accept(
    context: Context, caller: Caller, wanted: JobSettings, source: Source, reservation: Reservation
) -> dict[str, Any]:
    """From a checked request to a committed job and its message on the way; returns the job's view.

    Raises SUBMIT_PROBLEMS; then there is no job.
    """
    with idempotency.freed_on_error(context.database, reservation):
        card = _resolved(context, wanted)
        stored = uploads.store(context, caller.key_id, source, _aim(wanted, card), now=_now(context))
        with _discarded_on_error(context, [stored]), context.database.transaction() as session:
            now = clock(session)
            queue = _queue(context, session, wanted.device, wanted.priority, needs=_needs(card), now=now)
            options = _options(context, wanted, card, stored, queue=queue)
            job = _submit(context, session, caller, options, stored, now=now)
            view: dict[str, Any] = _view(context, session, job)
            reservation.finish(session, status=202, body=view, location=f"/v1/jobs/{job.id}")
    _announce(context, caller, job)
    return view


@operation(
    "POST",
    "/v1/previews",
    "See one crop through every model",
    tag="jobs",
    status=202,
    answer=JobView,
    body=PreviewRequest,
    takes_pictures="one",
    headers=("Idempotency-Key", "Prefer", "traceparent"),
    problems=SUBMIT_PROBLEMS,
)
def create_preview(context: Context, caller: Caller) -> Response:
    """A job like any other, whose result is one PNG: the crop by each model, side by side and labelled. Where each
    lies is in `preview.cells` once it has succeeded. Choose by looking, then submit."""
    wanted, source = asked.picture(PreviewRequest)
    reservation = _reserve(context, caller, "POST /v1/previews", wanted.model_dump(mode="json"), [source])
    if isinstance(reservation, Replay):
        return _replayed(reservation)
    with idempotency.freed_on_error(context.database, reservation):
        if wanted.webhook_url is not None:
            context.outgoing.check(wanted.webhook_url)
        cards = _previewed(context, wanted)
        # The whole picture is decoded and only the crop enlarged: the result's size says nothing against it.
        stored = uploads.store(context, caller.key_id, source, Aim(1, "png", False), now=_now(context))
        with _discarded_on_error(context, [stored]), context.database.transaction() as session:
            now = clock(session)
            crop = _crop(wanted.crop, stored.facts.width, stored.facts.height)
            pixels = crop["width"] * crop["height"]
            # Where its model is not there a cell says so, and the others come: of all that there are, or of several of
            # one's own that no host has together.
            needs = next(filter(None, map(_needs, cards)), "") if wanted.models is not None else ""
            options = JobOptions(
                model=catalog.PREVIEW,
                scale=wanted.scale,
                format="png",
                queue=_queue(context, session, wanted.device, wanted.priority, needs=needs, now=now),
                needs=needs,
                routing_reason="a preview: the models are named in it",
                device=wanted.device,
                priority=wanted.priority,
                ttl_seconds=wanted.ttl_seconds or context.settings.result_ttl_seconds,
                external_id=wanted.external_id,
                webhook_url=wanted.webhook_url,
                traceparent=asked.traceparent(),
                expected_seconds=sum(_expected_seconds(card, wanted.scale, pixels) for card in cards),
                preview={"crop": crop, "models": [card.name for card in cards]},
            )
            job = _submit(context, session, caller, options, stored, now=now)
            view: dict[str, Any] = _view(context, session, job)
            reservation.finish(session, status=202, body=view, location=f"/v1/jobs/{job.id}")
    _announce(context, caller, job)
    return _accepted(context, caller, view)


@operation(
    "POST",
    "/v1/batches",
    "Hand in many pictures",
    tag="batches",
    status=202,
    answer=BatchView,
    body=BatchRequest,
    takes_pictures="many",
    headers=("Idempotency-Key", "traceparent"),
    problems=SUBMIT_PROBLEMS,
)
def create_batch(context: Context, caller: Caller) -> Response:
    """One block of settings for all. Every picture is taken or none: a problem names the `item` it is about, counted
    from 0. In a form send `image` as often as there are pictures. `webhook_url` is told of each job and, once, of
    `batch.completed`."""
    settings, sources, names = asked.batch(context)
    hashed = {"settings": settings.model_dump(mode="json"), "names": names}
    reservation = _reserve(context, caller, "POST /v1/batches", hashed, sources)
    if isinstance(reservation, Replay):
        return _replayed(reservation)
    with idempotency.freed_on_error(context.database, reservation):
        card = _resolved(context, settings)
        stored = _store_all(context, caller, sources, _aim(settings, card))
        with _discarded_on_error(context, stored), context.database.transaction() as session:
            now = clock(session)
            wants_end = settings.webhook_events is None or "batch.completed" in settings.webhook_events
            batch = Batch(
                id=new_id("batch", now),
                owner_key_id=caller.key_id,
                created_at=now,
                total=len(stored),
                remaining=len(stored),
                webhook_url=settings.webhook_url if wants_end else None,
            )
            session.add(batch)
            session.flush()
            queue = _queue(context, session, settings.device, settings.priority, needs=_needs(card), now=now)
            made = []
            for one, name in zip(stored, names, strict=True):
                wanted = settings.model_copy(update={"external_id": name or settings.external_id})
                options = _options(context, wanted, card, one, queue=queue, batch_id=batch.id)
                made.append(_submit(context, session, caller, options, one, now=now))
            view: dict[str, Any] = queries.batch_view(session, batch)
            location = f"/v1/batches/{batch.id}"
            reservation.finish(session, status=202, body=view, location=location)
    for job in made:
        context.hurrier.publish(outbox.message_of(job))
    log.info("batch.submitted", batch_id=batch.id, key_id=caller.key_id, jobs=len(made))
    return _json(view, 202, location=location)


@operation(
    "POST",
    "/v1/uploads",
    "Get an address to put a large picture at",
    tag="jobs",
    status=201,
    answer=UploadView,
    body=UploadRequest,
    body_is_optional=True,
)
def create_upload(context: Context, caller: Caller) -> Response:
    """PUT the picture to `url` with `headers`, before `expires_at`; then submit a job with `upload_id`. The picture
    is checked then, and each upload makes one job."""
    asked.json_body(UploadRequest, optional=True)
    settings = context.settings
    with context.database.transaction() as session:
        now = clock(session)
        expires_at = now + timedelta(seconds=settings.upload_ttl_seconds)
        upload = uploads.hand_out(session, caller.key_id, now=now, expires_at=expires_at)
    url = context.storage.upload_link(upload.blob_key, seconds=settings.upload_ttl_seconds)
    view: dict[str, Any] = {
        "upload_id": upload.id,
        "url": url,
        "headers": {},
        "expires_at": queries.iso(expires_at),
        "max_bytes": settings.max_upload_bytes,
    }
    return _json(view, 201)


# --- jobs -----------------------------------------------------------------------------------------------------------


@operation(
    "GET",
    "/v1/jobs/{job_id}",
    "Look at a job",
    tag="jobs",
    answer=JobView,
    headers=("If-None-Match", "Prefer"),
)
def get_job(context: Context, caller: Caller, job_id: str) -> Response:
    """With `Prefer: wait=N` the answer comes when the job has ended; with `If-None-Match` beside it, when anything has
    changed."""
    known = request.if_none_match

    def is_news(pulse: Pulse) -> bool:
        tag = _etag(pulse.version, pulse.queue_position)
        return bool(known) and not (known.contains(tag) or known.contains(f"{tag}{FORSAKEN}"))

    waited_seconds = _wait(context, caller, job_id, lambda pulse: pulse.is_finished or is_news(pulse))
    view, tag = _view_and_tag(context, caller, job_id)
    response = _empty(304) if known.contains(tag) else jsonify(view)
    response.set_etag(tag)
    response.headers["Cache-Control"] = "private, no-cache"
    return _preference_applied(response, waited_seconds)


@operation("GET", "/v1/jobs", "List your jobs, newest first", tag="jobs", answer=JobPage, query=JobsQuery)
def list_jobs(context: Context, caller: Caller) -> Response:
    """Pages do not shift when new jobs arrive. `queue_position` is told by the job's own address only."""
    wanted = asked.query(JobsQuery)
    narrowed = JobFilter(
        owner_key_id=caller.key_id,
        status=wanted.status,
        model=wanted.model,
        external_id=wanted.external_id,
        created_after=wanted.created_after,
        input_sha256=wanted.input_sha256,
    )
    with context.database.reading() as session:
        page = queries.page_of_jobs(session, narrowed, limit=wanted.limit, cursor=wanted.cursor)
        return _page([queries.job_view(job) for job in page.rows], page.next_cursor)


@operation(
    "POST",
    "/v1/jobs/{job_id}/cancel",
    "Cancel a job",
    tag="jobs",
    status=202,
    answer=JobView,
    problems=(JobNotCancelable,),
)
def cancel_job(context: Context, caller: Caller, job_id: str) -> Response:
    """A queued job is canceled at once, a running one stops at its next band."""
    with context.database.transaction() as session:
        queries.owned_job(session, job_id, caller.key_id)
        job = jobs.cancel(session, job_id, now=clock(session))
        view = queries.job_view(job)
    log.info("job.cancel_asked", job_id=job_id, key_id=caller.key_id, status=view["status"])
    return _json(view, 202, location=f"/v1/jobs/{job_id}")


@operation(
    "POST",
    "/v1/jobs/{job_id}/retry",
    "Try a job again",
    tag="jobs",
    status=202,
    answer=JobView,
    problems=(JobNotRetryable, Gone),
)
def retry_job(context: Context, caller: Caller, job_id: str) -> Response:
    """Failed, canceled and expired jobs only; they get all their attempts and their deadline again."""
    with context.database.transaction() as session:
        queries.owned_job(session, job_id, caller.key_id)
        job = jobs.retry(session, job_id, now=clock(session))
        view = _view(context, session, job)
    context.hurrier.publish(outbox.message_of(job))
    log.info("job.retried", job_id=job_id, key_id=caller.key_id)
    return _json(view, 202, location=f"/v1/jobs/{job_id}")


@operation("DELETE", "/v1/jobs/{job_id}", "Delete a job and its pictures", tag="jobs", status=204)
def delete_job(context: Context, caller: Caller, job_id: str) -> Response:
    """In any state. Its pictures are removed at once where storage answers, else within minutes."""
    with context.database.transaction() as session:
        queries.owned_job(session, job_id, caller.key_id)
        prefix = jobs.remove(session, job_id, now=clock(session))
    try:
        context.storage.remove(prefix)
    except StorageUnavailable:
        # Owed in the same transaction: the sweep does it when storage is back.
        log.warning("job.blobs_stay_for_now", job_id=job_id)
    log.info("job.deleted", job_id=job_id, key_id=caller.key_id)
    return _empty(204)


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
    if job.report is None or not queries.has_report(job):
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


# --- the result in other forms --------------------------------------------------------------------------------------


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
    return _json(_rendition_view(context, job, rendition), 202, location=location)


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


@operation(
    "GET",
    "/v1/jobs/{job_id}/events",
    "Follow a job",
    tag="jobs",
    answer_type="text/event-stream",
    headers=("Last-Event-ID",),
    problems=(TooManyStreams,),
)
def follow_job(context: Context, caller: Caller, job_id: str) -> Response:
    """Server-sent events `status`, `progress` and, last, `done`; the data of each is the job, its id the job's
    version. A comment is sent where nothing happens for 15 seconds. Close the stream after `done`."""
    with context.database.reading() as session:
        queries.pulse(session, job_id, caller.key_id)
    last_event_id = request.headers.get("Last-Event-ID", "")
    response = Response(mimetype="text/event-stream")
    # Proxies must pass each event on as it comes.
    response.headers["X-Accel-Buffering"] = "no"
    if request.method == "HEAD":
        return response
    give_back = context.seats.take()
    if give_back is None:
        raise TooManyStreams("Too many event streams are open; poll the job.", retry_after_seconds=5)
    response.call_on_close(give_back)
    response.response = events.stream(
        context,
        job_id,
        caller.key_id,
        last_event_id=int(last_event_id) if re.fullmatch(r"[0-9]{1,18}", last_event_id) else None,
        client_left=events.left_by(request.environ),
    )
    return response


# --- batches, models, estimates, the key ----------------------------------------------------------------------------


@operation("GET", "/v1/batches/{batch_id}", "Look at a batch", tag="batches", answer=BatchView)
def get_batch(context: Context, caller: Caller, batch_id: str) -> Response:
    """A status per item, in the order they were handed in."""
    with context.database.reading() as session:
        batch = session.scalar(select(Batch).where(Batch.id == batch_id, Batch.owner_key_id == caller.key_id))
        if batch is None:
            raise NotFound("There is no such batch.")
        return jsonify(queries.batch_view(session, batch))


@operation("GET", "/v1/models", "List the models", tag="models", answer=ModelPage)
def list_models(context: Context, _caller: Caller) -> Response:
    """What `model` may be, with the devices that hold each at present."""
    workers = _image_workers(context)
    return _page([_model_view(card, workers) for card in (*catalog.CARDS, *_own(context))], None)


@operation("GET", "/v1/models/{name}", "Look at a model", tag="models", answer=ModelView)
def get_model(context: Context, _caller: Caller, name: str) -> Response:
    """Its scale, licence, weights' hash, and what it promises of tiled results."""
    try:
        card = catalog.card(name, _own(context))
    except ModelUnavailable as error:
        raise NotFound(error.detail, **error.facts) from error
    return jsonify(_model_view(card, _image_workers(context)))


@operation(
    "POST",
    "/v1/estimates",
    "Ask what a job would come to",
    tag="models",
    answer=EstimateView,
    body=EstimateRequest,
    problems=(ModelUnavailable,),
)
def create_estimate(context: Context, caller: Caller) -> Response:
    """Size, seconds and waiting time, without handing anything in. `expected_seconds` is of the work alone."""
    wanted = asked.json_body(EstimateRequest)
    settings = context.settings
    card = _card(context, wanted.model)
    scale = wanted.scale or card.scale
    card.passes(scale)
    width, height = wanted.width * scale, wanted.height * scale
    facts = pictures.PictureFacts(
        format=wanted.input_format,
        width=wanted.width,
        height=wanted.height,
        mode="RGB",
        bits=8,
        is_gray=False,
        has_alpha=False,
        frames=1,
        orientation=1,
    )
    refusal: UploadRejected | None = None
    try:
        pictures.check_size(
            facts,
            scale,
            wanted.format,
            max_input_px=settings.max_input_px,
            max_output_px=settings.max_output_px,
            lossless=wanted.lossless,
        )
    except UploadRejected as error:
        refusal = error
    format = pictures.output_format(wanted.format, wanted.input_format, width, height, lossless=wanted.lossless)
    with context.database.reading() as session:
        now = clock(session)
        needs = _needs(card)
        queue = _queue(context, session, wanted.device, wanted.priority, needs=needs, now=now)
        expected_seconds = _expected_seconds(card, scale, facts.pixels)
        history = queries.run_history(
            session, card.name, device=queue.partition(".")[0], expected_seconds=expected_seconds
        )
        wait_seconds = queries.expected_wait_seconds(
            session,
            queue,
            worker_lost_after_seconds=settings.worker_lost_after_seconds,
            now=now,
            before_tag_px=queries.start_tag_px(session, caller.key_id, queue, needs),
            needs=needs,
        )
        alive = queries.serving_workers(session, worker_lost_after_seconds=settings.worker_lost_after_seconds, now=now)
        serving = sum(queue in worker.queues and queries.can_run(worker.models, needs) for worker in alive)
    megapixels = width * height / 1e6
    if history.p50_seconds is not None and history.p95_seconds is not None:
        basis, p50, p95 = "history", history.p50_seconds, history.p95_seconds
    else:
        basis = "model-cost"
        p50 = expected_seconds + ASSUMED_OVERHEAD_SECONDS
        p95 = p50 * ASSUMED_P95_OVER_P50
    return jsonify(
        {
            "model": card.name,
            "scale": scale,
            "output": {"width": width, "height": height, "megapixels": round(megapixels, 3), "format": format},
            "format_can_hold": max(width, height) <= pictures.format_named(format).largest_side_px,
            "accepted": refusal is None,
            "refusal": None if refusal is None else {"code": refusal.code, "detail": refusal.detail},
            "expected_seconds": {"p50": round(p50, 3), "p95": round(p95, 3)},
            "basis": basis,
            "history_jobs": history.jobs,
            "queue": queue,
            "queue_wait_seconds": round(wait_seconds, 1),
            "workers": serving,
        }
    )


@operation("GET", "/v1/key", "Look at the key that calls", tag="keys", answer=KeyView, scope=None)
def get_key(context: Context, caller: Caller) -> Response:
    """Its scopes, and the secret that signs webhooks sent to a job's own `webhook_url`."""
    return jsonify(
        {
            "id": caller.key_id,
            "name": caller.name,
            "scopes": sorted(caller.scopes),
            "expires_at": queries.iso(caller.expires_at),
            "webhook_secret": deliveries.signing_secret(context.settings.secret_key, caller.key_id),
        }
    )


# --- webhooks -------------------------------------------------------------------------------------------------------


@operation(
    "POST",
    "/v1/webhook-endpoints",
    "Add a standing webhook address",
    tag="webhooks",
    status=201,
    answer=EndpointView,
    body=EndpointRequest,
    problems=(BlockedUrl, FetchFailed),
)
def create_endpoint(context: Context, caller: Caller) -> Response:
    """It is told of the named events of all your jobs. `secret` verifies them (Standard Webhooks 1.0)."""
    wanted = asked.json_body(EndpointRequest)
    context.outgoing.check(wanted.url)
    with context.database.transaction() as session:
        now = clock(session)
        standing = session.scalar(select(func.count()).where(Endpoint.owner_key_id == caller.key_id)) or 0
        if standing >= MAX_ENDPOINTS_PER_KEY:
            raise asked.invalid("url", f"a key has at most {MAX_ENDPOINTS_PER_KEY} webhook endpoints")
        endpoint = Endpoint(
            id=new_id("ep", now), owner_key_id=caller.key_id, url=wanted.url, events=list(wanted.events), created_at=now
        )
        session.add(endpoint)
    return _json(_endpoint_view(context, endpoint), 201, location=f"/v1/webhook-endpoints/{endpoint.id}")


@operation("GET", "/v1/webhook-endpoints", "List standing webhook addresses", tag="webhooks", answer=EndpointPage)
def list_endpoints(context: Context, caller: Caller) -> Response:
    """All of them, oldest first. One that answered 410 is shown as disabled."""
    with context.database.reading() as session:
        found = session.scalars(
            select(Endpoint).where(Endpoint.owner_key_id == caller.key_id).order_by(Endpoint.id)
        ).all()
        return _page([_endpoint_view(context, endpoint) for endpoint in found], None)


@operation(
    "GET",
    "/v1/webhook-endpoints/{endpoint_id}",
    "Look at a standing webhook address",
    tag="webhooks",
    answer=EndpointView,
)
def get_endpoint(context: Context, caller: Caller, endpoint_id: str) -> Response:
    """With its secret."""
    with context.database.reading() as session:
        return jsonify(_endpoint_view(context, _owned_endpoint(session, endpoint_id, caller)))


@operation(
    "DELETE",
    "/v1/webhook-endpoints/{endpoint_id}",
    "Remove a standing webhook address",
    tag="webhooks",
    status=204,
)
def delete_endpoint(context: Context, caller: Caller, endpoint_id: str) -> Response:
    """What is still owed to it is not sent any more."""
    with context.database.transaction() as session:
        _owned_endpoint(session, endpoint_id, caller)
        deliveries.remove_endpoint(session, endpoint_id, now=clock(session))
    return _empty(204)


@operation(
    "POST",
    "/v1/webhook-endpoints/{endpoint_id}/test",
    "Send a test event",
    tag="webhooks",
    status=202,
    answer=DeliveryView,
)
def send_test_event(context: Context, caller: Caller, endpoint_id: str) -> Response:
    """An event `endpoint.test`, whatever the endpoint's filter says; look for it in the deliveries."""
    with context.database.transaction() as session:
        endpoint = _owned_endpoint(session, endpoint_id, caller)
        delivery_id = deliveries.owe_test(session, endpoint, clock(session))
        return _json(queries.delivery_view(session.get_one(Delivery, delivery_id)), 202)


@operation(
    "GET",
    "/v1/webhook-deliveries",
    "List deliveries, newest first",
    tag="webhooks",
    answer=DeliveryPage,
    query=DeliveriesQuery,
)
def list_deliveries(context: Context, caller: Caller) -> Response:
    """Each with every try: when, what the receiver said, and when it is tried next."""
    wanted = asked.query(DeliveriesQuery)
    with context.database.reading() as session:
        page = queries.page_of_deliveries(
            session, owner_key_id=caller.key_id, job_id=wanted.job_id, limit=wanted.limit, cursor=wanted.cursor
        )
        return _page([queries.delivery_view(delivery) for delivery in page.rows], page.next_cursor)


@operation(
    "POST",
    "/v1/webhook-deliveries/{delivery_id}/resend",
    "Send a delivery again",
    tag="webhooks",
    status=202,
    answer=DeliveryView,
)
def resend_delivery(context: Context, caller: Caller, delivery_id: str) -> Response:
    """With the same `webhook-id` and the whole schedule again."""
    with context.database.transaction() as session:
        owned = session.scalar(
            select(Delivery.id).where(Delivery.id == delivery_id, Delivery.owner_key_id == caller.key_id)
        )
        if owned is None:
            raise NotFound("There is no such delivery.")
        return _json(queries.delivery_view(deliveries.resend(session, delivery_id, now=clock(session))), 202)


# The one table of routes: registered by `blueprint`, described in /openapi.json.
HANDLERS: tuple[Handler, ...] = (
    create_job,
    create_preview,
    list_jobs,
    get_job,
    cancel_job,
    retry_job,
    delete_job,
    get_result,
    get_input,
    get_thumbnail,
    get_preview,
    get_preview_strip,
    get_report,
    follow_job,
    ask_rendition,
    get_rendition,
    get_rendition_file,
    get_tile,
    create_upload,
    create_batch,
    get_batch,
    list_models,
    get_model,
    create_estimate,
    create_endpoint,
    list_endpoints,
    get_endpoint,
    delete_endpoint,
    send_test_event,
    list_deliveries,
    resend_delivery,
    get_key,
)


# --- what several routes do -----------------------------------------------------------------------------------------


def _now(context: Context) -> datetime:
    with context.database.reading() as session:
        return clock(session)


def _reserve(
    context: Context, caller: Caller, route: str, wanted: dict[str, Any], sources: Sequence[Source]
) -> Reservation | Replay:
    """The Idempotency-Key of this request, if it has one. URLs and upload ids stand in the hash by their names."""
    key = idempotency.checked_key(request.headers.get(idempotency.HEADER))
    if key is None:
        return Reservation(None)
    content = [
        uploads.sha256_of(s.body.stream)
        if s.body is not None
        else f"{s.image_url or ''}|{s.upload_id or ''}" + (f"|{s.input_of}" if s.input_of else "")
        for s in sources
    ]
    return idempotency.reserve(
        context.database,
        owner_key_id=caller.key_id,
        key=key,
        sha256=idempotency.request_sha256(route, wanted, content),
        ttl_seconds=context.settings.idempotency_ttl_seconds,
    )


def _replayed(first: Replay) -> Response:
    response = _json(first.body, first.status, location=first.location)
    response.headers["Idempotent-Replayed"] = "true"
    return response


def _announce(context: Context, caller: Caller, job: Job) -> None:
    """The message of a job that has just been committed goes on its way."""
    context.hurrier.publish(outbox.message_of(job))
    log.info("job.submitted", job_id=job.id, key_id=caller.key_id, model=job.model, queue=job.queue)


def _accepted(context: Context, caller: Caller, view: dict[str, Any]) -> Response:
    """The answer to a job that has just been committed, after the wait that was preferred."""
    job_id = view["id"]
    waited_seconds = None
    try:
        waited_seconds = _wait(context, caller, job_id, lambda pulse: pulse.is_finished)
        if waited_seconds is not None:
            view, _ = _view_and_tag(context, caller, job_id)
    except (DatabaseUnavailable, NotFound):
        # The job is committed, whatever happened while we waited for it: what we know of it is the answer.
        waited_seconds = None
    return _preference_applied(_json(view, 202, location=f"/v1/jobs/{job_id}"), waited_seconds)


def _resolved(context: Context, wanted: JobSettings) -> ModelCard:
    """The card that will run. Raises ModelUnavailable, InvalidRequest for a scale that the card does not offer, and
    BlockedUrl for a webhook that leads inside."""
    if wanted.webhook_url is not None:
        context.outgoing.check(wanted.webhook_url)
    card = _card(context, wanted.model)
    card.passes(wanted.scale or card.scale)
    return card


def _own(context: Context, name: str | None = None) -> Sequence[ModelCard]:
    with context.database.reading() as session:
        return own_models.offered(session, now=clock(session), name=name)


def _needs(card: ModelCard) -> str:
    """What a worker must have that not every worker has: the model, where it is one of one's own."""
    return card.name if isinstance(card.weights, OwnFile) else ""


def _card(context: Context, name: str) -> ModelCard:
    """The card of that name. For `auto` the one that is planned with until a worker has seen the picture: of those it
    may come to the costliest, tiny pictures aside. Raises ModelUnavailable."""
    if name == catalog.AUTO:
        return catalog.card(catalog.AUTO_PLANNED_AS)
    try:
        return catalog.card(name)
    except ModelUnavailable:
        named = _own(context, name)
        # Where there is none, all that there are are named.
        return catalog.card(name, named or _own(context))


def _previewed(context: Context, wanted: PreviewRequest) -> list[ModelCard]:
    """The models of a preview, each once: those asked for, or all there are. Raises ModelUnavailable."""
    if wanted.models is None:
        everyone = (*catalog.CARDS, *_own(context))
        return [card for card in everyone if wanted.scale <= card.largest_scale]
    return [_card(context, name) for name in dict.fromkeys(wanted.models)]


def _crop(wanted: Sequence[int] | None, width: int, height: int) -> dict[str, int]:
    """The part of a picture of `width` x `height` that is previewed. Raises InvalidRequest where it lies outside."""
    if wanted is None:
        side_x, side_y = min(width, PREVIEW_DEFAULT_PX), min(height, PREVIEW_DEFAULT_PX)
        return {"x": (width - side_x) // 2, "y": (height - side_y) // 2, "width": side_x, "height": side_y}
    x, y, crop_width, crop_height = wanted
    if x + crop_width > width or y + crop_height > height:
        raise asked.invalid("crop", f"reaches beyond the picture, which is {width} x {height} px")
    return {"x": x, "y": y, "width": crop_width, "height": crop_height}


def _aim(wanted: JobSettings, card: ModelCard) -> Aim:
    return Aim(wanted.scale or card.scale, wanted.format, wanted.lossless)


def _store_all(context: Context, caller: Caller, sources: Sequence[Source], aim: Aim) -> list[Stored]:
    """Every picture of a batch in storage, or none. The error of the first that is refused gains its `item`."""
    now = _now(context)
    ends_at = time.monotonic() + BATCH_SECONDS
    stored: list[Stored] = []
    with ThreadPoolExecutor(BATCH_READERS, thread_name_prefix="batch") as readers:
        # Ids sort by the millisecond in them, and a batch is shown in the order it was handed in.
        reading = [
            readers.submit(uploads.store, context, caller.key_id, source, aim, now=now + timedelta(milliseconds=number))
            for number, source in enumerate(sources)
        ]
        try:
            for item, one in enumerate(reading):
                try:
                    stored.append(one.result(max(0.0, ends_at - time.monotonic())))
                except EnlargerError as error:
                    error.facts["item"] = item
                    raise
                except StillRunning as error:
                    raise FetchFailed(
                        f"Reading the pictures took longer than {BATCH_SECONDS:g} s; send a smaller batch.", item=item
                    ) from error
        except EnlargerError:
            for one in reading:
                one.cancel()
            readers.shutdown()
            for one in reading:
                if not one.cancelled() and one.exception() is None:
                    uploads.discard(context, one.result())
            raise
    return stored


@contextmanager
def _discarded_on_error(context: Context, stored: Sequence[Stored]) -> Iterator[None]:
    """Removes stored pictures where the block that gives them to jobs refuses to.

    Anything else that it raises may have come after the commit, with only its answer lost: then the pictures belong
    to jobs. An orphan costs some bytes; a job without its picture would break the promise of the 202 that a replay of
    the request gives.
    """
    try:
        yield
    except DatabaseUnavailable:
        log.warning("upload.left", prefixes=[one.picture.blob_prefix for one in stored])
        raise
    except EnlargerError:
        for one in stored:
            uploads.discard(context, one)
        raise


def _options(
    context: Context,
    wanted: JobSettings,
    card: ModelCard,
    stored: Stored,
    *,
    queue: str,
    batch_id: str | None = None,
) -> JobOptions:
    """What was asked for, with everything that was left to us decided."""
    scale = wanted.scale or card.scale
    by_name = wanted.model != catalog.AUTO
    return JobOptions(
        model=card.name if by_name else catalog.AUTO,
        scale=scale,
        format=stored.format,
        queue=queue,
        needs=_needs(card),
        routing_reason="asked for by name" if by_name else catalog.AUTO_DECIDED_LATER,
        classify=wanted.classify,
        quality=wanted.quality,
        lossless=wanted.lossless,
        metadata_policy=wanted.metadata,
        alpha=wanted.alpha,
        background=wanted.background,
        device=wanted.device,
        priority=wanted.priority,
        deadline_seconds=wanted.deadline_seconds,
        ttl_seconds=wanted.ttl_seconds or context.settings.result_ttl_seconds,
        external_id=wanted.external_id,
        webhook_url=wanted.webhook_url,
        webhook_events=deliveries.TERMINAL_EVENTS if wanted.webhook_events is None else wanted.webhook_events,
        traceparent=g.span.traceparent,
        expected_seconds=_expected_seconds(card, scale, stored.facts.pixels),
        batch_id=batch_id,
    )


def _submit(
    context: Context, session: Session, caller: Caller, options: JobOptions, stored: Stored, *, now: datetime
) -> Job:
    uploads.take_upload(session, stored, caller.key_id, now=now)
    return jobs.submit(
        session,
        owner_key_id=caller.key_id,
        options=options,
        picture=stored.picture,
        max_attempts=context.settings.max_attempts,
        max_queued_jobs=context.settings.max_queued_jobs_per_key,
        now=now,
    )


def _queue(context: Context, session: Session, device: str, priority: str, *, needs: str, now: datetime) -> str:
    gpu_alive = device == "auto" and queries.gpu_is_alive(
        session, worker_lost_after_seconds=context.settings.worker_lost_after_seconds, needs=needs, now=now
    )
    return queries.image_queue(device, priority, gpu_alive=gpu_alive)


def _expected_seconds(card: ModelCard, scale: int, pixels: int) -> float:
    """Of upscaling, from the card's arithmetic: above its own scale a network runs again on what has been made."""
    megaflops = 0.0
    for each in card.passes(scale):
        megaflops += each.megaflops_per_input_px * pixels
        pixels *= each.scale**2
    return megaflops / ASSUMED_MEGAFLOPS_PER_SECOND


def _wait(context: Context, caller: Caller, job_id: str, until: Callable[[Pulse], bool]) -> int | None:
    """Holds the request as `Prefer: wait` says. Returns the seconds it was willing to wait, None where it did not:
    not asked to, or every seat is taken (a preference may be passed over)."""
    seconds = asked.wait_seconds(context)
    give_back = context.seats.take() if seconds is not None else None
    if seconds is None or give_back is None:
        return None
    try:
        events.wait(
            context,
            job_id,
            caller.key_id,
            seconds=seconds,
            until=until,
            client_left=events.left_by(request.environ),
        )
    finally:
        give_back()
    return seconds


def _view_and_tag(context: Context, caller: Caller, job_id: str) -> tuple[dict[str, Any], str]:
    with context.database.reading() as session:
        job = queries.owned_job(session, job_id, caller.key_id)
        view = _view(context, session, job)
    # What a pulse tells, and behind it what it does not.
    tag = _etag(job.version, view["queue_position"])
    return view, f"{tag}{FORSAKEN}" if view["waits_for"] else tag


def _view(context: Context, session: Session, job: Job) -> dict[str, Any]:
    position = queries.queue_position(session, job)
    return queries.job_view(job, queue_position=position, waits_for=context.waits_for(session, job))


def _etag(version: int, queue_position: int | None) -> str:
    return f"{version}-{queue_position or 0}"


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
        raise Gone("The job's pictures have been swept.", swept_at=queries.iso(job.swept_at))


def _result_name(job: Job, format: pictures.Format) -> str:
    return f"{_stem(job)}-{job.model}-x{job.scale}{format.extension}"


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


def _picture(context: Context, job: Job, key: str, name: str, mime_type: str) -> Response:
    """The blob as an attachment, by link or through this process. Raises Gone where it has been swept."""
    _check_kept(job)
    if context.settings.result_delivery == "redirect":
        link = context.storage.link(key, file_name=name, content_type=mime_type)
        return _empty(302, location=link)
    facts, chunks = context.storage.stream(key)
    response = Response(chunks, mimetype=mime_type)
    response.content_length = facts.bytes
    response.headers["Content-Disposition"] = content_disposition("attachment", name)
    return response


def _stem(job: Job) -> str:
    return PurePosixPath(job.input_name or "").stem or job.id


def _image_workers(context: Context) -> Sequence[Worker]:
    with context.database.reading() as session:
        alive = queries.live_workers(
            session, worker_lost_after_seconds=context.settings.worker_lost_after_seconds, now=clock(session)
        )
    return [worker for worker in alive if worker.kind == "images"]


def _model_view(card: ModelCard, workers: Sequence[Worker]) -> dict[str, Any]:
    return {
        "name": card.name,
        "scale": card.scale,
        "scales": [each.scale for each in card.at_each_scale],
        "summary": card.summary,
        "guarantee": card.guarantee,
        "on_gpu": catalog.ON_GPU,
        "architecture": card.architecture,
        "halo_px": card.halo_px,
        "licence": card.licence,
        "source_url": card.source_url,
        "origin": card.origin,
        "sha256": None if card.weights is None else card.weights.sha256,
        "is_default": card.name == catalog.DEFAULT_MODEL,
        "loaded_on": sorted({worker.device or "cpu" for worker in workers if card.name in worker.models_loaded}),
        "workers": sum(queries.can_run(worker.models, card.name) for worker in workers),
    }


def _owned_endpoint(session: Session, endpoint_id: str, caller: Caller) -> Endpoint:
    found = session.scalar(select(Endpoint).where(Endpoint.id == endpoint_id, Endpoint.owner_key_id == caller.key_id))
    if found is None:
        raise NotFound("There is no such webhook endpoint.")
    return found


def _endpoint_view(context: Context, endpoint: Endpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "url": endpoint.url,
        "events": list(endpoint.events),
        "created_at": queries.iso(endpoint.created_at),
        "disabled_at": queries.iso(endpoint.disabled_at),
        "disabled_reason": endpoint.disabled_reason,
        "secret": deliveries.signing_secret(context.settings.secret_key, endpoint.id),
    }


def _json(body: Mapping[str, Any], status: int, *, location: str | None = None) -> Response:
    response = jsonify(body)
    response.status_code = status
    if location is not None:
        response.headers["Location"] = location
    return response


def _empty(status: int, *, location: str | None = None) -> Response:
    response = Response(status=status)
    # Flask would call nothing at all a page.
    del response.headers["Content-Type"]
    if location is not None:
        response.headers["Location"] = location
    return response


def _page(rows: Sequence[Mapping[str, Any]], next_cursor: str | None) -> Response:
    return jsonify({"data": list(rows), "next_cursor": next_cursor})


def _preference_applied(response: Response, waited_seconds: int | None) -> Response:
    if waited_seconds is not None:
        response.headers["Preference-Applied"] = f"wait={waited_seconds}"
    return response
