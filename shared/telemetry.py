"""Structured logs, bound to job and attempt, and the one table of metric names.

A log line is an event with fields: `job.claimed job_id=... attempt=2 wait_seconds=1.4`. Secrets, signed links and
request bodies are never fields.
"""

from __future__ import annotations

import logging
import sys

import structlog

log: structlog.stdlib.BoundLogger = structlog.get_logger()

# Every metric, its type and its help: `/metrics` prints these and no others.
METRICS: dict[str, tuple[str, str]] = {
    "enlarger_jobs": ("gauge", "Jobs by state."),
    "enlarger_queue_depth": ("gauge", "Queued jobs by image queue."),
    "enlarger_queue_oldest_seconds": ("gauge", "Age of the oldest queued job by image queue."),
    "enlarger_queue_running": ("gauge", "Running jobs by image queue."),
    "enlarger_queue_live_workers": ("gauge", "Live workers by image queue; 0 with jobs queued needs a person."),
    "enlarger_live_workers": ("gauge", "Live processes by kind: images, chores, relay."),
    "enlarger_lapsed_leases": ("gauge", "Running jobs whose lease has passed; the relay takes them back in seconds."),
    "enlarger_jobs_ended_hour": ("gauge", "Jobs that ended within the last hour, by state."),
    "enlarger_deliveries_pending": ("gauge", "Webhook deliveries owed and not finished."),
    "enlarger_blob_removals_due": ("gauge", "Prefixes of storage whose removal is due and not done."),
}


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
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # httpx logs whole URLs at INFO, and ours may carry a customer's secrets in their query.
    logging.getLogger("httpx").setLevel(logging.WARNING)
