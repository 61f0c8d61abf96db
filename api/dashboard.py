"""Pages for the operator: what waits, what runs, what went wrong, who works on it; and retry, cancel, resend.

Every page is drawn by the server from `shared.queries`; a small script asks for its parts anew and puts them in place.
What is filtered by and which page is shown stand in the address, so that everything can be bookmarked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from flask import Blueprint, Response, flash, jsonify, redirect, render_template, request
from sqlalchemy.orm import Session
from werkzeug.wrappers import Response as AnyResponse

from api import auth
from api.context import Context
from api.health import Servers
from api.web import as_pages, own_path
from shared import deliveries, jobs, queries
from shared.catalog import CARDS
from shared.db import clock
from shared.errors import RequestRefused
from shared.models import Job, JobState, Worker
from shared.outbox import message_of
from shared.queries import JobFilter

PAGE_LIMIT = 25
FILTER_FIELDS = ("status", "model", "id", "external_id")
OVERVIEW_PARTS = ("health", "counts", "queues", "workers", "jobs")
JOB_PARTS = ("job_head", "attempts", "deliveries")


def blueprint(context: Context, servers: Servers) -> Blueprint:
    pages = Blueprint("dashboard", __name__)
    as_pages(pages)
    settings, database = context.settings, context.database

    @pages.before_request
    def operators_only() -> None:
        auth.caller(context, "admin")

    def overview_facts() -> dict[str, Any]:
        asked = {name: request.args.get(name, "").strip() for name in FILTER_FIELDS}
        # Before the transaction: a server that hangs must not hold one open.
        health = servers.ask()
        with database.reading() as session:
            now = clock(session)
            lost_after = settings.worker_lost_after_seconds
            page = queries.page_of_jobs(
                session,
                JobFilter(
                    status=asked["status"] or None,
                    model=asked["model"] or None,
                    id=asked["id"] or None,
                    external_id=asked["external_id"] or None,
                ),
                limit=PAGE_LIMIT,
                cursor=request.args.get("cursor"),
            )
            return {
                "now": now,
                "servers": health,
                "counts": queries.counts_by_state(session),
                "queues": queries.queue_depths(session, worker_lost_after_seconds=lost_after, now=now),
                "deliveries_pending": queries.deliveries_pending(session),
                "workers": [
                    WorkerLine(worker, _worker_status(worker, now, lost_after))
                    for worker in queries.recent_workers(session, now=now)
                ],
                "jobs": page.rows,
                "key_names": queries.key_names(session, (job.owner_key_id for job in page.rows)),
                "asked": asked,
                "older": _address(asked, page.next_cursor) if page.next_cursor else None,
                "newest": _address(asked, None) if request.args.get("cursor") else None,
                "here_address": _here(),
            }

    @pages.get("/admin")
    def overview() -> str:
        facts = overview_facts()
        models = sorted({card.name for card in CARDS} | ({facts["asked"]["model"]} - {""}))
        return render_template("admin/overview.html", here="admin", states=list(JobState), models=models, **facts)

    @pages.get("/admin/fragments")
    def overview_fragments() -> Response:
        return _fragments(OVERVIEW_PARTS, overview_facts())

    def job_facts(job_id: str) -> dict[str, Any]:
        with database.reading() as session:
            job = queries.any_job(session, job_id)
            owed = queries.page_of_deliveries(session, owner_key_id=None, job_id=job_id, limit=100, cursor=None)
            return {
                "now": clock(session),
                "job": job,
                "queue_position": queries.queue_position(session, job),
                "attempts": queries.attempts(session, job_id),
                "deliveries": owed.rows,
                "key_name": queries.key_names(session, [job.owner_key_id])[job.owner_key_id],
                "here_address": _here(),
            }

    @pages.get("/admin/jobs/<job_id>")
    def job(job_id: str) -> str:
        return render_template("admin/job.html", here="admin", **job_facts(job_id))

    @pages.get("/admin/jobs/<job_id>/fragments")
    def job_fragments(job_id: str) -> Response:
        return _fragments(JOB_PARTS, job_facts(job_id))

    def change(do: Callable[[Session, datetime], str]) -> AnyResponse:
        """Carries out one change, says what came of it, and leads back to where the button was pressed."""
        try:
            with database.transaction() as session:
                said = do(session, clock(session))
            flash(said, "good")
        except RequestRefused as refused:
            flash(refused.detail, "bad")
        return redirect(own_path(request.form.get("back"), "/admin"), 303)

    @pages.post("/admin/jobs/<job_id>/cancel")
    def cancel(job_id: str) -> AnyResponse:
        def do(session: Session, now: datetime) -> str:
            canceled = jobs.cancel(session, job_id, now=now)
            ended = canceled.state == JobState.CANCELED
            return f"{job_id} is canceled." if ended else f"{job_id} stops at its next band."

        return change(do)

    @pages.post("/admin/jobs/<job_id>/retry")
    def retry(job_id: str) -> AnyResponse:
        queued: list[Job] = []

        def do(session: Session, now: datetime) -> str:
            queued.append(jobs.retry(session, job_id, now=now))
            return f"{job_id} is queued again."

        answer = change(do)
        for job in queued:
            context.hurrier.publish(message_of(job))
        return answer

    @pages.post("/admin/deliveries/<delivery_id>/resend")
    def resend(delivery_id: str) -> AnyResponse:
        def do(session: Session, now: datetime) -> str:
            delivery = deliveries.resend(session, delivery_id, now=now)
            return f"{delivery.type} goes out to {delivery.url} again."

        return change(do)

    return pages


def _fragments(parts: Iterable[str], facts: Mapping[str, Any]) -> Response:
    """Each part of a page as HTML, by name: what `live.js` puts in place."""
    return jsonify({part: render_template(f"admin/_{part}.html", **facts) for part in parts})


def _here() -> str:
    """The address of the page itself, also when one of its parts is asked for: where a button leads back to."""
    path = request.path.removesuffix("/fragments")
    query = request.query_string.decode()
    return f"{path}?{query}" if query else path


def _address(asked: Mapping[str, str], cursor: str | None) -> str:
    wanted = {name: value for name, value in asked.items() if value}
    if cursor is not None:
        wanted["cursor"] = cursor
    return f"/admin?{urlencode(wanted)}#jobs" if wanted else "/admin#jobs"


@dataclass(frozen=True)
class WorkerLine:
    worker: Worker
    status: str
    """alive, lost (silent for too long) or stopped (said goodbye)."""


def _worker_status(worker: Worker, now: datetime, lost_after_seconds: float) -> str:
    if worker.stopped_at is not None:
        return "stopped"
    return "alive" if (now - worker.seen_at).total_seconds() < lost_after_seconds else "lost"
