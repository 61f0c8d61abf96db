"""Jobs that were handed in: look, wait, follow, list, cancel, retry, delete."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from flask import Response, jsonify, request

from api import asked, events
from api.auth import Caller
from api.context import Context
from api.openapi import operation
from api.schemas import JobPage, JobsQuery, JobView
from api.v1 import answers
from shared import jobs, outbox, queries
from shared.db import clock
from shared.errors import Gone, JobNotCancelable, JobNotRetryable, StorageUnavailable, TooManyStreams
from shared.queries import JobFilter, Pulse
from shared.telemetry import log
from shared.views import job_view


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
        tag = answers.etag(pulse.version, pulse.queue_position)
        return bool(known) and not (known.contains(tag) or known.contains(f"{tag}{answers.FORSAKEN}"))

    waited_seconds = answers.wait(context, caller, job_id, lambda pulse: pulse.is_finished or is_news(pulse))
    view, tag = answers.view_and_tag(context, caller, job_id)
    response = answers.empty(304) if known.contains(tag) else jsonify(view)
    response.set_etag(tag)
    response.headers["Cache-Control"] = "private, no-cache"
    return answers.preference_applied(response, waited_seconds)


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
        return answers.page([job_view(job) for job in page.rows], page.next_cursor)


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
        view = job_view(job)
    log.info("job.cancel_asked", job_id=job_id, key_id=caller.key_id, status=view["status"])
    return answers.json(view, 202, location=f"/v1/jobs/{job_id}")


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
        view = answers.full_view(context, session, job)
    context.hurrier.publish(outbox.message_of(job))
    log.info("job.retried", job_id=job_id, key_id=caller.key_id)
    return answers.json(view, 202, location=f"/v1/jobs/{job_id}")


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
    return answers.empty(204)


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

    def said(client_left: Callable[[], bool]) -> Iterator[str]:
        return events.stream(
            context,
            job_id,
            caller.key_id,
            last_event_id=int(last_event_id) if re.fullmatch(r"[0-9]{1,18}", last_event_id) else None,
            client_left=client_left,
        )

    return events.answer(context, said, refusal="Too many event streams are open; poll the job.")
