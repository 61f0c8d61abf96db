"""What several routes answer with: JSON, pages of it, a job and its tag; and the wait before it that is preferred."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flask import Response, jsonify, request
from sqlalchemy.orm import Session

from api import asked, events
from api.auth import Caller
from api.context import Context
from shared import queries, queueing
from shared.models import Job
from shared.queries import Pulse
from shared.views import job_view

FORSAKEN = "-forsaken"
"""Ends the tag of a job that nobody will come for."""


def json(body: Mapping[str, Any], status: int, *, location: str | None = None) -> Response:
    response = jsonify(body)
    response.status_code = status
    if location is not None:
        response.headers["Location"] = location
    return response


def empty(status: int, *, location: str | None = None) -> Response:
    response = Response(status=status)
    # Flask would call nothing at all a page.
    del response.headers["Content-Type"]
    if location is not None:
        response.headers["Location"] = location
    return response


def page(rows: Sequence[Mapping[str, Any]], next_cursor: str | None) -> Response:
    return jsonify({"data": list(rows), "next_cursor": next_cursor})


def preference_applied(response: Response, waited_seconds: int | None) -> Response:
    if waited_seconds is not None:
        response.headers["Preference-Applied"] = f"wait={waited_seconds}"
    return response


def wait(context: Context, caller: Caller, job_id: str, until: Callable[[Pulse], bool]) -> int | None:
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


def view_and_tag(context: Context, caller: Caller, job_id: str) -> tuple[dict[str, Any], str]:
    with context.database.reading() as session:
        job = queries.owned_job(session, job_id, caller.key_id)
        view = full_view(context, session, job)
    # What a pulse tells, and behind it what it does not.
    tag = etag(job.version, view["queue_position"])
    return view, f"{tag}{FORSAKEN}" if view["waits_for"] else tag


def full_view(context: Context, session: Session, job: Job) -> dict[str, Any]:
    """A job as its own address tells it. What is beyond `job_view` takes questions of its own."""
    position = queueing.queue_position(session, job)
    return job_view(job, queue_position=position, waits_for=context.waits_for(session, job))


def etag(version: int, queue_position: int | None) -> str:
    return f"{version}-{queue_position or 0}"
