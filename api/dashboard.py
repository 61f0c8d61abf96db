"""Pages for the operator: what waits, what runs, what went wrong, who works on it, what was done about it.

Every page is drawn by the server from `shared.queries`, in parts; one stream of server-sent events for each open page
sends the parts that have changed. What is filtered by and which page is shown stand in the address, so that everything
can be bookmarked. What operators do is in `api.operations`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from flask import Blueprint, Response, redirect, render_template, request, stream_with_context
from sqlalchemy.orm import Session
from werkzeug.wrappers import Response as AnyResponse

from api import auth, charts, curl, events, filters, words
from api.charts import Chart
from api.context import Context
from api.health import Servers
from api.operations import VERBS
from api.web import as_pages
from shared import audit, catalog, figures, keys, own_models, queries, queueing, shards, thumbnails
from shared.db import clock
from shared.errors import DatabaseUnavailable, InvalidRequest, NotFound
from shared.figures import WINDOWS, Spans
from shared.models import ApiKey, Attempt, Delivery, DeliveryState, Job, JobState, Worker
from shared.queries import Page

PAGE_LIMIT = 25
LOG_LIMIT = 50
USUAL_WINDOW = "24h"
LIVE_SECONDS = 1.5
"""An open page is looked at anew this often ..."""
LONGEST_STREAM_SECONDS = 120.0
"""... and its stream ends after this; the browser opens another, and is asked again who it is."""
REMEMBERED_SECONDS = 15.0
"""Sums over all jobs are not made anew for each look of each open page."""
THUMBNAIL_CACHED_SECONDS = 3600

Facts = dict[str, Any]


@dataclass(frozen=True)
class View:
    """One page: its address, its template, the parts that are kept fresh, and what fills them."""

    path: str
    template: str
    here: str
    parts: tuple[str, ...]
    facts: Callable[..., Facts]
    """Takes the session, the present moment, and what the path names."""
    beforehand: Callable[[], Facts] = dict
    """What is asked before SQL is: a server that hangs must not hold a transaction open."""


def blueprint(context: Context, servers: Servers) -> Blueprint:
    pages = Blueprint("dashboard", __name__)
    as_pages(pages)
    settings, database = context.settings, context.database
    remembered = Remembered(REMEMBERED_SECONDS)

    @pages.before_request
    def operators_only() -> None:
        auth.caller(context, "viewer")

    @pages.app_context_processor
    def what_may_be_done() -> dict[str, object]:
        caller = auth.known_caller()
        writable = caller is not None and not settings.admin_read_only
        return {
            "may_operate": writable and caller is not None and caller.may("operator"),
            "may_keep_keys": writable and caller is not None and caller.may("admin"),
            "read_only": settings.admin_read_only,
        }

    lost_after_seconds = settings.worker_lost_after_seconds

    def overview(session: Session, now: datetime) -> Facts:
        window = request.args.get("window", "")
        window = window if window in WINDOWS else USUAL_WINDOW
        return {
            "counts": queries.counts_by_state(session),
            "queues": queueing.queue_depths(session, worker_lost_after_seconds=lost_after_seconds, now=now),
            "forsaken_models": queueing.forsaken_models(session, worker_lost_after_seconds=lost_after_seconds, now=now),
            "lapsed": queries.lapsed_leases(session, now=now),
            "deliveries_pending": queries.deliveries_pending(session),
            "storage": remembered.get("storage", lambda: queries.storage_used(session)),
            "removals_due": queries.blob_removals_due(session, now=now),
            "workers_alive": len(queueing.live_workers(session, worker_lost_after_seconds=lost_after_seconds, now=now)),
            **remembered.get(f"figures-{window}", lambda: _figures(session, window, now)),
        }

    def jobs(session: Session, now: datetime) -> Facts:
        typed = request.args.get("q", "").strip()
        problem = None
        page: Page[Job] = Page([], None)
        matching = 0
        try:
            wanted = filters.read(typed, now=now)
            page = queries.page_of_jobs(session, wanted, limit=PAGE_LIMIT, cursor=request.args.get("cursor"))
            matching = queries.count_jobs(session, wanted)
        except InvalidRequest as error:
            problem = error.detail
        return {
            "counts": queries.counts_by_state(session),
            "typed": typed,
            "problem": problem,
            "jobs": page.rows,
            "matching": matching,
            "newest_id": page.rows[0].id if page.rows else "",
            "key_names": queries.key_names(session, (job.owner_key_id for job in page.rows)),
            "older": _address("/admin/jobs", q=typed, cursor=page.next_cursor) if page.next_cursor else None,
            "newest": _address("/admin/jobs", q=typed) if request.args.get("cursor") else None,
            "verbs": VERBS.values(),
            "help": filters.HELP,
            "models": [card.name for card in catalog.CARDS],
            "thumbnails_of": thumbnails.expected,
        }

    def job(session: Session, now: datetime, job_id: str) -> Facts:
        found = queries.any_job(session, job_id)
        tried = queries.attempts(session, job_id)
        owed = queries.page_of_deliveries(session, owner_key_id=None, job_id=job_id, limit=100, cursor=None)
        return {
            "job": found,
            "queue_position": queueing.queue_position(session, found),
            "waits_for": context.waits_for(session, found),
            "attempts": [AttemptLine.of(found, attempt, now) for attempt in tried],
            "shards": charts.shard_map(
                shards.of_job(session, job_id) if found.split is not None else [],
                found.input_width,
                found.input_height,
                now,
            ),
            "deliveries": owed.rows,
            "key_name": queries.key_names(session, [found.owner_key_id])[found.owner_key_id],
            "curl": curl.command(found, request.host_url),
            "sides": thumbnails.expected(found),
        }

    def workers(session: Session, now: datetime) -> Facts:
        seen = queries.recent_workers(session, now=now)
        lines = [WorkerLine(worker, _worker_status(worker, now, lost_after_seconds)) for worker in seen]
        return {
            "workers": [line for line in lines if line.status != "stopped"],
            "stopped": [line for line in lines if line.status == "stopped"],
            "clashes": own_models.clashes(session, worker_lost_after_seconds=lost_after_seconds, now=now),
            "own": own_models.by_worker(session),
            "queues": queueing.queue_depths(session, worker_lost_after_seconds=lost_after_seconds, now=now),
        }

    def webhooks(session: Session, _now: datetime) -> Facts:
        state = request.args.get("state", "")
        state = state if state in list(DeliveryState) else ""
        page: Page[Delivery] = queries.page_of_deliveries(
            session,
            owner_key_id=None,
            job_id=None,
            limit=PAGE_LIMIT,
            cursor=request.args.get("cursor"),
            state=state or None,
        )
        return {
            "endpoints": queries.endpoints(session),
            "deliveries": page.rows,
            "state": state,
            "states": list(DeliveryState),
            "older": _address("/admin/webhooks", state=state, cursor=page.next_cursor) if page.next_cursor else None,
            "newest": _address("/admin/webhooks", state=state) if request.args.get("cursor") else None,
        }

    def all_keys(session: Session, now: datetime) -> Facts:
        return {"keys": [KeyLine(key, _key_status(key, now)) for key in keys.every(session)], "scopes": keys.SCOPES}

    def log_of_operators(session: Session, _now: datetime) -> Facts:
        entries = audit.entries(session, before=request.args.get("before"), limit=LOG_LIMIT + 1)
        shown = entries[:LOG_LIMIT]
        return {
            "entries": shown,
            "older": _address("/admin/audit", before=shown[-1].id) if len(entries) > LOG_LIMIT else None,
            "newest": "/admin/audit" if request.args.get("before") else None,
        }

    views = (
        View(
            "/admin",
            "overview",
            "overview",
            ("health", "counts", "queues", "totals", "figures"),
            overview,
            lambda: {"servers": servers.ask()},
        ),
        View("/admin/jobs", "jobs", "jobs", ("counts", "jobs"), jobs),
        View("/admin/jobs/<job_id>", "job", "jobs", ("job_head", "attempts", "deliveries"), job),
        View("/admin/workers", "workers", "workers", ("workers", "pauses"), workers),
        View("/admin/webhooks", "webhooks", "webhooks", ("endpoints", "deliveries"), webhooks),
        View("/admin/keys", "keys", "keys", ("keys",), all_keys),
        View("/admin/audit", "audit", "audit", ("audit",), log_of_operators),
    )

    def facts_of(view: View, named: Mapping[str, str]) -> Facts:
        beforehand = view.beforehand()
        with database.reading() as session:
            now = clock(session)
            return {
                "now": now,
                **beforehand,
                "here": view.here,
                # Also when a part is drawn for the stream: the page that a button leads back to.
                "here_address": _here(),
                **view.facts(session, now, **named),
            }

    def add(view: View) -> None:
        def draw(**named: str) -> str:
            return render_template(f"admin/{view.template}.html", live=_live_address(), **facts_of(view, named))

        def follow(**named: str) -> Response:
            facts_of(view, named)

            def said(client_left: Callable[[], bool]) -> Iterator[str]:
                parts = _stream(
                    lambda: {
                        part: render_template(f"admin/_{part}.html", **facts)
                        for facts in (facts_of(view, named),)
                        for part in view.parts
                    },
                    ping_seconds=settings.event_ping_seconds,
                    client_left=client_left,
                )
                return stream_with_context(parts)

            refusal = "Too many live pages are open; this one shows what it has."
            return events.answer(context, said, refusal=refusal)

        pages.add_url_rule(view.path, view.template, draw)
        pages.add_url_rule(f"{view.path}/events", f"{view.template}_events", follow)

    for view in views:
        add(view)

    @pages.get("/admin/jobs/<job_id>/thumbnail/<side>")
    def thumbnail(job_id: str, side: str) -> AnyResponse:
        with database.reading() as session:
            found = queries.any_job(session, job_id)
        stored = thumbnails.stream(context.storage, found, "input" if side == "input" else "result")
        if stored is None:
            # The page asks only where one is likely to be there; a sign looks better than a broken picture.
            return redirect("/static/no-picture.svg", 302)
        response = Response(stored[1], mimetype=thumbnails.MIME_TYPE)
        response.headers["Cache-Control"] = f"private, max-age={THUMBNAIL_CACHED_SECONDS}"
        return response

    return pages


class Remembered:
    """What was worked out lately, by name; one thread works it out while others take what was there before."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[float, Any]] = {}

    def get(self, name: str, work_out: Callable[[], Any]) -> Any:
        with self._lock:
            kept = self._kept.get(name)
            if kept is not None and time.monotonic() - kept[0] < self._seconds:
                return kept[1]
        made = work_out()
        with self._lock:
            self._kept[name] = (time.monotonic(), made)
        return made


def _stream(
    draw: Callable[[], Mapping[str, str]], *, ping_seconds: float, client_left: Callable[[], bool]
) -> Iterator[str]:
    """Events `parts`: those parts of the page, as HTML by name, that look different from what was sent before."""
    shown: dict[str, str] = {}
    yield f"retry: {events.RECONNECT_MILLISECONDS}\n\n"
    began_at = spoke_at = time.monotonic()
    while time.monotonic() - began_at < LONGEST_STREAM_SECONDS:
        try:
            drawn = draw()
        except NotFound:
            yield "event: gone\ndata: {}\n\n"
            return
        except DatabaseUnavailable:
            # The browser comes back, and finds out the same until it is over.
            return
        changed = {part: html for part, html in drawn.items() if shown.get(part) != html}
        if changed:
            shown.update(changed)
            yield f"event: parts\ndata: {json.dumps(changed)}\n\n"
            spoke_at = time.monotonic()
        elif time.monotonic() - spoke_at >= ping_seconds:
            yield ": ping\n\n"
            spoke_at = time.monotonic()
        if client_left():
            return
        time.sleep(LIVE_SECONDS)


def _here() -> str:
    """The address of the page itself, also when one of its parts is drawn for the stream."""
    path = request.path.removesuffix("/events")
    query = request.query_string.decode()
    return f"{path}?{query}" if query else path


def _live_address() -> str:
    query = request.query_string.decode()
    return f"{request.path}/events?{query}" if query else f"{request.path}/events"


def _address(path: str, **asked: str | None) -> str:
    wanted = {name: value for name, value in asked.items() if value}
    return f"{path}?{urlencode(wanted)}" if wanted else path


# --- what the service has done ---------------------------------------------------------------------------------------


def _figures(session: Session, window: str, now: datetime) -> Facts:
    """What the service has done within the window, drawn."""
    done = figures.figures(session, WINDOWS[window], now=now)
    titles = [f"from {_moment(slot.start, window)}" for slot in done.slots]
    ended = {
        "succeeded": [slot.ended[JobState.SUCCEEDED] for slot in done.slots],
        "failed": [slot.ended[JobState.FAILED] for slot in done.slots],
        "other": [slot.ended[JobState.CANCELED] + slot.ended[JobState.EXPIRED] for slot in done.slots],
    }

    def percentiles(spans: Sequence[Spans]) -> Chart:
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
        series = [(name, [each.percentile(share) for each in spans]) for name, share in shares.items()]
        return charts.lines(series, titles, said=words.seconds)

    return {
        "window": window,
        "window_words": {"1h": "the last hour", "24h": "the last 24 hours", "7d": "the last 7 days"}[window],
        "windows": [(name, _address("/admin", window=name)) for name in WINDOWS],
        "total": done.total,
        "charts": {
            "first": _moment(done.slots[0].start, window),
            "jobs": charts.bars(list(ended.items()), titles, said=lambda count: f"{count:,.0f}"),
            "waits": percentiles([slot.waits for slot in done.slots]),
            "runs": percentiles([slot.runs for slot in done.slots]),
            "megapixels": charts.bars(
                [("megapixels", [slot.megapixels_per_hour for slot in done.slots])],
                titles,
                said=lambda value: f"{value:,.3g}",
            ),
        },
    }


def _moment(moment: datetime, window: str) -> str:
    return f"{moment:%d %b %H:%M} UTC" if window == "7d" else f"{moment:%H:%M} UTC"


# --- lines of tables -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkerLine:
    worker: Worker
    status: str
    """alive, draining (has been told to take no more), lost (silent for too long) or stopped (said goodbye)."""


def _worker_status(worker: Worker, now: datetime, lost_after_seconds: float) -> str:
    if worker.stopped_at is not None:
        return "stopped"
    if (now - worker.seen_at).total_seconds() >= lost_after_seconds:
        return "lost"
    if worker.drained_at is not None:
        return "draining" if worker.current_job_id else "drained"
    return "alive"


@dataclass(frozen=True)
class KeyLine:
    key: ApiKey
    status: str
    """good, revoked or expired."""


def _key_status(key: ApiKey, now: datetime) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "expired" if key.expires_at is not None and key.expires_at <= now else "good"


@dataclass(frozen=True)
class AttemptLine:
    """An attempt, and what its trace looks like; an attempt that was lost early has none."""

    attempt: Attempt
    seconds: float
    phases: Sequence[charts.Phase]
    bands: charts.BandMap | None
    memory: charts.MemoryTrace | None

    @classmethod
    def of(cls, job: Job, attempt: Attempt, now: datetime) -> AttemptLine:
        seconds = ((attempt.finished_at or now) - attempt.started_at).total_seconds()
        trace = attempt.trace
        if trace is None:
            return cls(attempt, seconds, (), None, None)
        bands = None
        if trace["bands_total"]:
            bands = charts.band_map(trace, job.input_width, job.input_height, said=words.seconds)
        return cls(attempt, seconds, charts.waterfall(trace), bands, charts.memory_trace(trace))
