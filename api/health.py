"""Is this process up, do the servers it needs answer, and what are the numbers: `/livez`, `/readyz`, `/metrics`."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from datetime import timedelta
from importlib import metadata

from flask import Blueprint, Response, jsonify
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

import migrations
from api import auth
from api.context import Context
from shared import queries, queueing
from shared.db import clock
from shared.errors import Unavailable
from shared.telemetry import COUNTED, METRICS

# Shorter than the patience of who asks (Kubernetes: 1 s by default, ours in docker-compose.yml is 5 s).
PATIENCE_SECONDS = 2.0


def blueprint(context: Context, servers: Servers) -> Blueprint:
    health = Blueprint("health", __name__)
    versions = {
        "enlarger": metadata.version("enlarger"),
        "python": platform.python_version(),
        "schema": migrations.newest(),
    }
    health.add_url_rule("/livez", "livez", lambda: jsonify(status="alive", versions=versions))
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
        depths = queueing.queue_depths(
            session, worker_lost_after_seconds=context.settings.worker_lost_after_seconds, now=now
        )
        workers = queueing.live_workers(
            session, worker_lost_after_seconds=context.settings.worker_lost_after_seconds, now=now
        )
        forsaken = queueing.forsaken_models(
            session, worker_lost_after_seconds=context.settings.worker_lost_after_seconds, now=now
        )
        lapsed = queries.lapsed_leases(session, now=now)
        ended = queries.ended_by_state(session, since=now - timedelta(hours=1))
        pending = queries.deliveries_pending(session)
        removals = queries.blob_removals_due(session, now=now)
        counted = queries.tallies(session, now=now)
    alive = Counter(worker.kind for worker in workers)
    used = [({"worker": worker.id}, worker.usage) for worker in workers if worker.usage]
    values: dict[str, list[tuple[dict[str, str], float]]] = {
        "enlarger_jobs": [({"state": state}, count) for state, count in states.items()],
        "enlarger_queue_depth": [({"queue": d.queue}, d.queued) for d in depths],
        "enlarger_queue_oldest_seconds": [({"queue": d.queue}, d.oldest_seconds or 0.0) for d in depths],
        "enlarger_queue_running": [({"queue": d.queue}, d.running) for d in depths],
        "enlarger_queue_live_workers": [({"queue": d.queue}, d.live_workers) for d in depths],
        "enlarger_forsaken_jobs": [({"queue": f.queue, "model": f.needs}, f.queued) for f in forsaken],
        "enlarger_live_workers": [({"kind": kind}, alive[kind]) for kind in ("images", "chores", "relay", "api")],
        "enlarger_lapsed_leases": [({}, lapsed)],
        "enlarger_jobs_ended_hour": [({"state": state}, count) for state, count in ended.items()],
        "enlarger_deliveries_pending": [({}, pending)],
        "enlarger_blob_removals_due": [({}, removals)],
        "enlarger_worker_cpu_cores": [(of, u["cpu_share"]) for of, u in used if "cpu_share" in u],
        "enlarger_worker_memory_bytes": [(of, u["memory_bytes"]) for of, u in used if "memory_bytes" in u],
        "enlarger_gpu_share": [(of, u["gpu_share"]) for of, u in used if "gpu_share" in u],
        "enlarger_gpu_memory_bytes": [
            ({**of, "part": part}, u[name])
            for of, u in used
            for part, name in (("used", "vram_bytes"), ("total", "vram_total_bytes"))
            if name in u
        ],
    }
    families = {name: Metric(name, help, kind) for name, (kind, help) in METRICS.items()}
    for name, series in values.items():
        for labels, value in series:
            families[name].add_sample(name, labels, value)
    for name, counted_metric in COUNTED.items():
        families[name] = Metric(name.removesuffix("_total"), counted_metric.help, counted_metric.kind)
    for process in counted:
        for sample, labels, value in process.tallies:
            # A process of another version may count what this one has never heard of.
            family = families.get(_SUFFIX.sub("", sample)) or families.get(sample)
            if family is not None:
                family.add_sample(sample, {**labels, "kind": process.kind, "worker": process.id}, value)
    registry = CollectorRegistry()
    registry.register(_Collected(families.values()))
    return Response(generate_latest(registry), content_type=CONTENT_TYPE_PLAIN_0_0_4)


_SUFFIX = re.compile("_(bucket|sum|count)$")


class _Collected(Collector):
    """Metrics that are there already, as the library's printer wants them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families
