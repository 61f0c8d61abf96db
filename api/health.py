"""Is this process up, do the servers it needs answer, and what are the numbers: `/livez`, `/readyz`, `/metrics`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from datetime import timedelta

from flask import Blueprint, Response, jsonify

from api import auth
from api.context import Context
from shared import queries
from shared.db import clock
from shared.errors import Unavailable
from shared.telemetry import METRICS

# Shorter than the patience of who asks (Kubernetes: 1 s by default, ours in docker-compose.yml is 5 s).
PATIENCE_SECONDS = 2.0


def blueprint(context: Context, servers: Servers) -> Blueprint:
    health = Blueprint("health", __name__)
    health.add_url_rule("/livez", "livez", lambda: jsonify(status="alive"))
    health.add_url_rule("/readyz", "readyz", lambda: _readyz(servers))
    health.add_url_rule("/metrics", "metrics", lambda: _metrics(context))
    return health


class Servers:
    """Asks every server at once, each in threads of its own: one that hangs delays neither answer nor others."""

    def __init__(self, context: Context) -> None:
        self._pings: dict[str, Callable[[], None]] = {
            "sql": context.database.ping,
            "redis": context.broker.ping,
            "storage": context.storage.ping,
        }
        # Two each: where both hang, the next question waits behind them and is rightly answered "silent".
        self._threads = {name: ThreadPoolExecutor(2, thread_name_prefix=f"ping-{name}") for name in self._pings}

    def ask(self) -> dict[str, str]:
        """server -> "ok", or in a few words what is wrong with it. Takes PATIENCE_SECONDS at most."""
        asked: dict[str, Future[None]] = {name: self._threads[name].submit(ping) for name, ping in self._pings.items()}
        done, _ = wait_for(asked.values(), timeout=PATIENCE_SECONDS)
        answers = {}
        for name, future in asked.items():
            if future not in done:
                future.cancel()
                answers[name] = f"silent for {PATIENCE_SECONDS:g} s"
                continue
            error = future.exception()
            if error is None:
                answers[name] = "ok"
            elif isinstance(error, Unavailable):
                answers[name] = error.detail
            else:
                raise error
        return answers


def _readyz(servers: Servers) -> Response:
    answers = servers.ask()
    failing = sorted(name for name, answer in answers.items() if answer != "ok")
    if failing:
        raise Unavailable(
            f"Not answering: {', '.join(failing)}.", failing=failing, checks=answers, retry_after_seconds=2
        )
    return jsonify(status="ready", checks=answers)


def _metrics(context: Context) -> Response:
    auth.caller(context, "admin")
    with context.database.reading() as session:
        now = clock(session)
        states = queries.counts_by_state(session)
        depths = queries.queue_depths(
            session, worker_lost_after_seconds=context.settings.worker_lost_after_seconds, now=now
        )
        alive = Counter(
            worker.kind
            for worker in queries.live_workers(
                session, worker_lost_after_seconds=context.settings.worker_lost_after_seconds, now=now
            )
        )
        lapsed = queries.lapsed_leases(session, now=now)
        ended = queries.ended_by_state(session, since=now - timedelta(hours=1))
        pending = queries.deliveries_pending(session)
        removals = queries.blob_removals_due(session, now=now)
    values: dict[str, list[tuple[str, float]]] = {
        "enlarger_jobs": [(f'{{state="{state}"}}', count) for state, count in states.items()],
        "enlarger_queue_depth": [(f'{{queue="{d.queue}"}}', d.queued) for d in depths],
        "enlarger_queue_oldest_seconds": [(f'{{queue="{d.queue}"}}', d.oldest_seconds or 0.0) for d in depths],
        "enlarger_queue_running": [(f'{{queue="{d.queue}"}}', d.running) for d in depths],
        "enlarger_queue_live_workers": [(f'{{queue="{d.queue}"}}', d.live_workers) for d in depths],
        "enlarger_live_workers": [(f'{{kind="{kind}"}}', alive[kind]) for kind in ("images", "chores", "relay")],
        "enlarger_lapsed_leases": [("", lapsed)],
        "enlarger_jobs_ended_hour": [(f'{{state="{state}"}}', count) for state, count in ended.items()],
        "enlarger_deliveries_pending": [("", pending)],
        "enlarger_blob_removals_due": [("", removals)],
    }
    lines = []
    for name, (kind, text) in METRICS.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{labels} {value}" for labels, value in values[name]]
    # Prometheus text format 0.0.4.
    return Response("\n".join(lines) + "\n", mimetype="text/plain", content_type="text/plain; version=0.0.4")
