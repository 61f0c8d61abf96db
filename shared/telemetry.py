"""Structured logs, bound to job and attempt, and the one table of metric names with what a process counts of them.

A log line is an event with fields: `job.claimed job_id=... attempt=2 wait_seconds=1.4`. Secrets, signed links and
request bodies are never fields: a field that does not stand in FIELDS is left out. What comes as free text, from
libraries and in tracebacks, loses whatever looks like one of our secrets.

What SQL knows (depths, ages, states) is asked of SQL when `/metrics` is read. What only the process knows that does the
work (how long a phase took, how storage answers) it counts itself, and its row in SQL carries the numbers
(`shared.workers.Presence`): so any API process can tell everybody's, and a worker needs no port.
"""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram

if "rich" not in sys.modules:
    # structlog would load it, for tracebacks that are switched off below: a tenth of what the API's start takes.
    sys.modules["rich"] = None  # type: ignore[assignment]  # Python's own way to say that there is no such module
    import structlog

    del sys.modules["rich"]
import structlog

log: structlog.stdlib.BoundLogger = structlog.get_logger()

# Every metric that is asked of SQL, its type and its help. With COUNTED below: `/metrics` prints these and no others.
METRICS: dict[str, tuple[str, str]] = {
    "enlarger_jobs": ("gauge", "Jobs by state."),
    "enlarger_queue_depth": ("gauge", "Queued jobs by image queue."),
    "enlarger_queue_oldest_seconds": (
        "gauge",
        "Age of the oldest queued job by image queue; of jobs in enlarger_forsaken_jobs it says nothing.",
    ),
    "enlarger_queue_running": ("gauge", "Running jobs by image queue."),
    "enlarger_queue_live_workers": ("gauge", "Live workers by image queue; 0 with jobs queued needs a person."),
    "enlarger_forsaken_jobs": ("gauge", "Queued jobs whose model no live worker has, by queue and model."),
    "enlarger_live_workers": ("gauge", "Live processes by kind: images, chores, relay, api."),
    "enlarger_lapsed_leases": ("gauge", "Running jobs whose lease has passed; the relay takes them back in seconds."),
    "enlarger_jobs_ended_hour": ("gauge", "Jobs that ended within the last hour, by state."),
    "enlarger_deliveries_pending": ("gauge", "Webhook deliveries owed and not finished."),
    "enlarger_blob_removals_due": ("gauge", "Prefixes of storage whose removal is due and not done."),
    "enlarger_worker_cpu_cores": ("gauge", "Cores that a live image worker uses."),
    "enlarger_worker_memory_bytes": ("gauge", "Memory of a live image worker."),
    "enlarger_gpu_share": ("gauge", "How busy a live worker's GPU is, from 0 to 1."),
    "enlarger_gpu_memory_bytes": ("gauge", "Memory of a live worker's GPU: used by anybody, and total."),
}

_SHORT_SECONDS = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0)
_LONG_SECONDS = (0.1, 0.5, 2.0, 10.0, 30.0, 120.0, 600.0, 3600.0)


@dataclass(frozen=True)
class Counted:
    """A metric that processes count themselves. Few labels and few buckets: each process keeps one row of all."""

    kind: Literal["counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def made(self, name: str, registry: CollectorRegistry) -> Any:
        match self.kind:
            case "counter":
                return Counter(name, self.help, self.labels, registry=registry)
            case "histogram":
                return Histogram(name, self.help, self.labels, registry=registry, buckets=self.buckets)


# Printed with the labels `kind` and `worker` beside their own: a process that ends takes its series with it.
COUNTED: dict[str, Counted] = {
    "enlarger_attempts_total": Counted("counter", "Attempts that ended, by what they came to.", ("outcome",)),
    "enlarger_queue_wait_seconds": Counted(
        "histogram", "From entering the queue to the claim of an attempt.", ("queue",), _LONG_SECONDS
    ),
    "enlarger_phase_seconds": Counted(
        "histogram", "Time spent in each phase of successful attempts.", ("phase",), _LONG_SECONDS
    ),
    "enlarger_output_megapixels_total": Counted("counter", "Megapixels of results stored, by model.", ("model",)),
    "enlarger_oom_retries_total": Counted("counter", "Bands cut into smaller tiles because memory ran out."),
    "enlarger_network_calls_total": Counted("counter", "Calls of networks on a GPU."),
    "enlarger_network_tiles_total": Counted("counter", "Tiles in calls of networks on a GPU: some to a call."),
    "enlarger_calls_halved_total": Counted("counter", "Calls of some tiles made in two because memory ran out."),
    "enlarger_band_reruns_total": Counted("counter", "Bands computed again in float32: their result was not sane."),
    "enlarger_webhook_tries_total": Counted(
        "counter", "Tries at webhook deliveries: delivered, pending (will be tried again), abandoned.", ("outcome",)
    ),
    "enlarger_storage_seconds": Counted(
        "histogram", "Requests to object storage that were answered, by operation.", ("operation",), _SHORT_SECONDS
    ),
    "enlarger_sql_seconds": Counted("histogram", "SQL statements by their first word.", ("statement",), _SHORT_SECONDS),
    "enlarger_http_seconds": Counted(
        "histogram", "HTTP requests of the API, by route and status.", ("route", "status"), _SHORT_SECONDS
    ),
}

# One value each of a metric: its name (`..._sum`, `..._bucket`), its labels, the value. As JSON has them.
Samples = list[list[Any]]


class Tallies:
    """What one process has counted since it began. Thread-safe."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._metrics = {name: counted.made(name, self._registry) for name, counted in COUNTED.items()}

    def count(self, name: str, amount: float = 1, /, **labels: str) -> None:
        """Adds to a counter of COUNTED."""
        self._of(name, labels).inc(amount)

    def observe(self, name: str, seconds: float, /, **labels: str) -> None:
        """One more duration for a histogram of COUNTED."""
        self._of(name, labels).observe(seconds)

    def samples(self) -> Samples:
        """Everything counted so far; what has never been counted is left out."""
        return [
            [sample.name, dict(sample.labels), sample.value]
            for family in self._registry.collect()
            for sample in family.samples
            # When each series began is as many numbers again, and nobody asks.
            if not sample.name.endswith("_created")
        ]

    def _of(self, name: str, labels: dict[str, str]) -> Any:
        metric = self._metrics[name]
        return metric.labels(**labels) if labels else metric


tallies = Tallies()
"""Of this process, as `log` is."""


def begin_lines(*, request_id: str, traceparent: str | None) -> None:
    """Every line that this thread logs from now on has these fields, and none that it was given before."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=request_id)
    if traceparent is not None:
        structlog.contextvars.bind_contextvars(traceparent=traceparent)


# Every field that a line may have beside those of the log itself; tests/shared/test_telemetry.py holds the code to it.
_FIELDS = """
    attempt batch_id blobs bytes code delivery_id detail device drained error expired fault job_id jobs key_id kind
    lacks messages method model models module outcome path pause_seconds prefix prefixes queue queues reason
    record_id removals request_id seconds shard shards signal state status step strays threads timings traceparent
    try_number type unsent wait_seconds well worker worker_id workers_forgotten
"""
FIELDS = frozenset(_FIELDS.split())
_OF_THE_LOG = frozenset({"event", "level", "timestamp", "exc_info", "exception", "stack", "stack_info", "logger"})

_SECRETS = re.compile(
    # An API key; a webhook secret; what signs a presigned link (of S3, versions 4 and 2).
    r"\benl_[A-Za-z0-9_-]{8,}|\bwhsec_[A-Za-z0-9+/=]+|\b(?:X-Amz-(?:Signature|Credential|Security-Token)|Signature)=[^&\s\"']+"
    # Tokens of a sign-in link and of a link to an output, an Authorization header, a password in an address.
    r"|(?<=[?&]token=)[^&\s\"']+|(?<=/outputs/)[^/\s\"']+|(?<=[Bb]earer )\S+|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)


def without_secrets(text: str) -> str:
    """The text with everything that looks like one of our secrets struck out."""
    return _SECRETS.sub("[secret]", text)


def _only_known_fields(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    unknown = sorted(name for name in event if name not in FIELDS and name not in _OF_THE_LOG)
    for name in unknown:
        del event[name]
    if unknown:
        event["detail"] = f"{event.get('detail', '')} (left out, not in shared.telemetry.FIELDS: {', '.join(unknown)})"
    return event


def _strike_secrets(_logger: Any, _method: str, line: Any) -> Any:
    """Last of all, on the finished line."""
    return without_secrets(line)


def configure_logs(level: str, format: str) -> None:
    """Sends every log of the process, libraries included, to standard error as JSON lines or as text. Call once."""
    shared_steps: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared_steps,
            _only_known_fields,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    last: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if format == "json"
        # Its own tracebacks show local variables, and those hold keys.
        else [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared_steps,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last, _strike_secrets],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # httpx logs whole URLs at INFO, and ours may carry a customer's secrets in their query.
    logging.getLogger("httpx").setLevel(logging.WARNING)
