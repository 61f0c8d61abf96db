"""Handing in a picture: from a request to a committed job and its message on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from flask import Response, g, request
from sqlalchemy.orm import Session

from api import asked, idempotency, uploads
from api.auth import Caller
from api.context import Context
from api.idempotency import Replay, Reservation
from api.openapi import operation
from api.schemas import JobRequest, JobSettings, JobView, PreviewRequest, UploadRequest, UploadView
from api.uploads import Aim, Source, Stored
from api.v1 import answers, estimates, models
from shared import catalog, deliveries, jobs, outbox
from shared.catalog import ModelCard
from shared.db import clock
from shared.errors import (
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
    ModelUnavailable,
    NotFound,
    OutputTooLarge,
    QueueFull,
    StorageUnavailable,
    TooManyPixels,
    UnsupportedFormat,
)
from shared.jobs import JobOptions
from shared.models import Job
from shared.telemetry import log
from shared.views import iso

# Side of the crop in the middle that a preview shows where none is named: half a minute of a CPU for all models.
PREVIEW_DEFAULT_PX = 96

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
    reservation = reserve(context, caller, "POST /v1/jobs", wanted.model_dump(mode="json"), [source])
    if isinstance(reservation, Replay):
        return replayed(reservation)
    return _accepted(context, caller, accept(context, caller, wanted, source, reservation))


def accept(
    context: Context, caller: Caller, wanted: JobSettings, source: Source, reservation: Reservation
) -> dict[str, Any]:
    """From a checked request to a committed job and its message on the way; returns the job's view.

    Raises SUBMIT_PROBLEMS; then there is no job.
    """
    with idempotency.freed_on_error(context.database, reservation):
        card = resolved(context, wanted)
        stored = uploads.store(context, caller.key_id, source, aim(wanted, card), now=sql_now(context))
        with discarded_on_error(context, [stored]), context.database.transaction() as session:
            now = clock(session)
            queue = estimates.queue_for(
                context, session, wanted.device, wanted.priority, needs=models.needs(card), now=now
            )
            options = job_options(context, wanted, card, stored, queue=queue)
            job = make_job(context, session, caller, options, stored, now=now)
            view: dict[str, Any] = answers.full_view(context, session, job)
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
    reservation = reserve(context, caller, "POST /v1/previews", wanted.model_dump(mode="json"), [source])
    if isinstance(reservation, Replay):
        return replayed(reservation)
    with idempotency.freed_on_error(context.database, reservation):
        if wanted.webhook_url is not None:
            context.outgoing.check(wanted.webhook_url)
        cards = _previewed(context, wanted)
        # The whole picture is decoded and only the crop enlarged: the result's size says nothing against it.
        stored = uploads.store(context, caller.key_id, source, Aim(1, "png", False), now=sql_now(context))
        with discarded_on_error(context, [stored]), context.database.transaction() as session:
            now = clock(session)
            crop = _crop(wanted.crop, stored.facts.width, stored.facts.height)
            pixels = crop["width"] * crop["height"]
            # Where its model is not there a cell says so, and the others come: of all that there are, or of several of
            # one's own that no host has together.
            needs = next(filter(None, map(models.needs, cards)), "") if wanted.models is not None else ""
            options = JobOptions(
                model=catalog.PREVIEW,
                scale=wanted.scale,
                format="png",
                queue=estimates.queue_for(context, session, wanted.device, wanted.priority, needs=needs, now=now),
                needs=needs,
                routing_reason="a preview: the models are named in it",
                device=wanted.device,
                priority=wanted.priority,
                ttl_seconds=wanted.ttl_seconds or context.settings.result_ttl_seconds,
                external_id=wanted.external_id,
                webhook_url=wanted.webhook_url,
                traceparent=asked.traceparent(),
                expected_seconds=sum(estimates.upscaling_seconds(card, wanted.scale, pixels) for card in cards),
                preview={"crop": crop, "models": [card.name for card in cards]},
            )
            job = make_job(context, session, caller, options, stored, now=now)
            view: dict[str, Any] = answers.full_view(context, session, job)
            reservation.finish(session, status=202, body=view, location=f"/v1/jobs/{job.id}")
    _announce(context, caller, job)
    return _accepted(context, caller, view)


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
        "expires_at": iso(expires_at),
        "max_bytes": settings.max_upload_bytes,
    }
    return answers.json(view, 201)


# --- from a request to a job ------------------------------------------------------------------------------------------


def reserve(
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


def replayed(first: Replay) -> Response:
    response = answers.json(first.body, first.status, location=first.location)
    response.headers["Idempotent-Replayed"] = "true"
    return response


def resolved(context: Context, wanted: JobSettings) -> ModelCard:
    """The card that will run. Raises ModelUnavailable, InvalidRequest for a scale that the card does not offer, and
    BlockedUrl for a webhook that leads inside."""
    if wanted.webhook_url is not None:
        context.outgoing.check(wanted.webhook_url)
    card = models.card_named(context, wanted.model)
    card.passes(wanted.scale or card.scale)
    return card


def aim(wanted: JobSettings, card: ModelCard) -> Aim:
    return Aim(wanted.scale or card.scale, wanted.format, wanted.lossless)


@contextmanager
def discarded_on_error(context: Context, stored: Sequence[Stored]) -> Iterator[None]:
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


def job_options(
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
        needs=models.needs(card),
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
        expected_seconds=estimates.upscaling_seconds(card, scale, stored.facts.pixels),
        batch_id=batch_id,
    )


def make_job(
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


def sql_now(context: Context) -> datetime:
    """For what is done before the transaction that writes begins."""
    with context.database.reading() as session:
        return clock(session)


def _announce(context: Context, caller: Caller, job: Job) -> None:
    """The message of a job that has just been committed goes on its way."""
    context.hurrier.publish(outbox.message_of(job))
    log.info("job.submitted", job_id=job.id, key_id=caller.key_id, model=job.model, queue=job.queue)


def _accepted(context: Context, caller: Caller, view: dict[str, Any]) -> Response:
    """The answer to a job that has just been committed, after the wait that was preferred."""
    job_id = view["id"]
    waited_seconds = None
    try:
        waited_seconds = answers.wait(context, caller, job_id, lambda pulse: pulse.is_finished)
        if waited_seconds is not None:
            view, _ = answers.view_and_tag(context, caller, job_id)
    except (DatabaseUnavailable, NotFound):
        # The job is committed, whatever happened while we waited for it: what we know of it is the answer.
        waited_seconds = None
    return answers.preference_applied(answers.json(view, 202, location=f"/v1/jobs/{job_id}"), waited_seconds)


# --- previews ---------------------------------------------------------------------------------------------------------


def _previewed(context: Context, wanted: PreviewRequest) -> list[ModelCard]:
    """The models of a preview, each once: those asked for, or all there are. Raises ModelUnavailable."""
    if wanted.models is None:
        everyone = (*catalog.CARDS, *models.own_cards(context))
        return [card for card in everyone if wanted.scale <= card.largest_scale]
    return [models.card_named(context, name) for name in dict.fromkeys(wanted.models)]


def _crop(wanted: Sequence[int] | None, width: int, height: int) -> dict[str, int]:
    """The part of a picture of `width` x `height` that is previewed. Raises InvalidRequest where it lies outside."""
    if wanted is None:
        side_x, side_y = min(width, PREVIEW_DEFAULT_PX), min(height, PREVIEW_DEFAULT_PX)
        return {"x": (width - side_x) // 2, "y": (height - side_y) // 2, "width": side_x, "height": side_y}
    x, y, crop_width, crop_height = wanted
    if x + crop_width > width or y + crop_height > height:
        raise asked.invalid("crop", f"reaches beyond the picture, which is {width} x {height} px")
    return {"x": x, "y": y, "width": crop_width, "height": crop_height}
