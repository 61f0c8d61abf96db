"""What a job would come to: its size, its queue, its seconds. Submitting reckons with the same."""

from __future__ import annotations

from datetime import datetime

from flask import Response, jsonify
from sqlalchemy.orm import Session

from api import asked
from api.auth import Caller
from api.context import Context
from api.openapi import operation
from api.schemas import EstimateRequest, EstimateView
from api.v1 import models
from shared import pictures, queries, queueing
from shared.catalog import ModelCard
from shared.db import clock
from shared.errors import ModelUnavailable, UploadRejected

# What two average CPU cores do with the catalogue's networks; estimates leave it as soon as there is a history.
ASSUMED_MEGAFLOPS_PER_SECOND = 60_000.0
# Upscaling is the most of a job, not all of it; and the slowest of twenty takes about this much longer than the middle.
ASSUMED_OVERHEAD_SECONDS = 0.3
ASSUMED_P95_OVER_P50 = 2.0


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
    card = models.card_named(context, wanted.model)
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
        needs = models.needs(card)
        queue = queue_for(context, session, wanted.device, wanted.priority, needs=needs, now=now)
        expected_seconds = upscaling_seconds(card, scale, facts.pixels)
        history = queries.run_history(
            session, card.name, device=queue.partition(".")[0], expected_seconds=expected_seconds
        )
        wait_seconds = queueing.expected_wait_seconds(
            session,
            queue,
            worker_lost_after_seconds=settings.worker_lost_after_seconds,
            now=now,
            before_tag_px=queueing.start_tag_px(session, caller.key_id, queue, needs),
            needs=needs,
        )
        alive = queueing.serving_workers(session, worker_lost_after_seconds=settings.worker_lost_after_seconds, now=now)
        serving = sum(queue in worker.queues and queueing.can_run(worker.models, needs) for worker in alive)
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


def queue_for(context: Context, session: Session, device: str, priority: str, *, needs: str, now: datetime) -> str:
    gpu_alive = device == "auto" and queueing.gpu_is_alive(
        session, worker_lost_after_seconds=context.settings.worker_lost_after_seconds, needs=needs, now=now
    )
    return queueing.image_queue(device, priority, gpu_alive=gpu_alive)


def upscaling_seconds(card: ModelCard, scale: int, pixels: int) -> float:
    """Of upscaling, from the card's arithmetic: above its own scale a network runs again on what has been made."""
    megaflops = 0.0
    for each in card.passes(scale):
        megaflops += each.megaflops_per_input_px * pixels
        pixels *= each.scale**2
    return megaflops / ASSUMED_MEGAFLOPS_PER_SECOND
