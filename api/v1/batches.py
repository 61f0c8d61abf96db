"""Many pictures handed in at once, and how they stand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from datetime import timedelta
from typing import Any

from flask import Response, jsonify
from sqlalchemy import select

from api import asked, idempotency, uploads
from api.auth import Caller
from api.context import Context
from api.idempotency import Replay
from api.openapi import operation
from api.schemas import BatchRequest, BatchView
from api.uploads import Aim, Source, Stored
from api.v1 import answers, estimates, models, submit
from shared import outbox
from shared.db import clock, new_id
from shared.errors import EnlargerError, FetchFailed, NotFound
from shared.models import Batch
from shared.telemetry import log
from shared.views import batch_view

# Pictures of a batch that are read at once, and how long reading all of them may take before the batch is refused.
BATCH_READERS = 8
BATCH_SECONDS = 120.0


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
    problems=submit.SUBMIT_PROBLEMS,
)
def create_batch(context: Context, caller: Caller) -> Response:
    """One block of settings for all. Every picture is taken or none: a problem names the `item` it is about, counted
    from 0. In a form send `image` as often as there are pictures. `webhook_url` is told of each job and, once, of
    `batch.completed`."""
    settings, sources, names = asked.batch(context)
    hashed = {"settings": settings.model_dump(mode="json"), "names": names}
    reservation = submit.reserve(context, caller, "POST /v1/batches", hashed, sources)
    if isinstance(reservation, Replay):
        return submit.replayed(reservation)
    with idempotency.freed_on_error(context.database, reservation):
        card = submit.resolved(context, settings)
        stored = _store_all(context, caller, sources, submit.aim(settings, card))
        with submit.discarded_on_error(context, stored), context.database.transaction() as session:
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
            queue = estimates.queue_for(
                context, session, settings.device, settings.priority, needs=models.needs(card), now=now
            )
            made = []
            for one, name in zip(stored, names, strict=True):
                wanted = settings.model_copy(update={"external_id": name or settings.external_id})
                options = submit.job_options(context, wanted, card, one, queue=queue, batch_id=batch.id)
                made.append(submit.make_job(context, session, caller, options, one, now=now))
            view: dict[str, Any] = batch_view(session, batch)
            location = f"/v1/batches/{batch.id}"
            reservation.finish(session, status=202, body=view, location=location)
    for job in made:
        context.hurrier.publish(outbox.message_of(job))
    log.info("batch.submitted", batch_id=batch.id, key_id=caller.key_id, jobs=len(made))
    return answers.json(view, 202, location=location)


@operation("GET", "/v1/batches/{batch_id}", "Look at a batch", tag="batches", answer=BatchView)
def get_batch(context: Context, caller: Caller, batch_id: str) -> Response:
    """A status per item, in the order they were handed in."""
    with context.database.reading() as session:
        batch = session.scalar(select(Batch).where(Batch.id == batch_id, Batch.owner_key_id == caller.key_id))
        if batch is None:
            raise NotFound("There is no such batch.")
        return jsonify(batch_view(session, batch))


def _store_all(context: Context, caller: Caller, sources: Sequence[Source], aim: Aim) -> list[Stored]:
    """Every picture of a batch in storage, or none. The error of the first that is refused gains its `item`."""
    now = submit.sql_now(context)
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
