"""OpenTelemetry traces, where ENLARGER_TRACES_URL names a collector: HTTP request, wait, attempt and its phases.

A trace crosses the queue in the job's row (`traceparent`, W3C Trace Context), as it crosses HTTP in a header. Without a
collector nothing is imported and spans cost nothing; a collector that does not answer costs spans and nothing else.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from shared.errors import StartFailed

if TYPE_CHECKING:
    from opentelemetry.trace import Span as Recording


class Span:
    """Something that takes time. `traceparent` is what its own parts, here or in another process, name as their parent;
    without a collector it is simply the parent's."""

    def __init__(self, traceparent: str | None, recording: Recording | None = None) -> None:
        self.traceparent = traceparent
        self._recording = recording

    def end(self, at: datetime | None = None, **attributes: str | int | float) -> None:
        if self._recording is not None:
            self._recording.set_attributes(attributes)
            self._recording.end(_nanoseconds(at))


class Traces:
    """Sends the spans of one process. Thread-safe; make one per process, after a fork another."""

    def __init__(self, url: str, process: str) -> None:
        """`url` is the collector's for traces (OTLP over HTTP); empty sends none. Raises StartFailed where the packages
        for it are missing."""
        self._provider: Any = None
        if not url:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise StartFailed(
                "ENLARGER_TRACES_URL is set, and the packages that send traces are not installed: "
                "`pip install 'enlarger[traces]'`."
            ) from error
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": f"enlarger-{process}"}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url, timeout=5)))

    def begin(
        self, name: str, parent: str | None, *, at: datetime | None = None, **attributes: str | int | float
    ) -> Span:
        """Begins a span below `parent`, a traceparent, or a trace of its own where that is None. Whoever begins it ends
        it. `at` is when it began, where that is not now."""
        if self._provider is None:
            return Span(parent)
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        recording = self._provider.get_tracer("enlarger").start_span(
            name,
            # An empty carrier gives an empty context: what else this thread may be doing is none of ours.
            context=propagator.extract({} if parent is None else {"traceparent": parent}),
            attributes=attributes,
            start_time=_nanoseconds(at),
        )
        carrier: dict[str, str] = {}
        from opentelemetry.trace import set_span_in_context

        propagator.inject(carrier, set_span_in_context(recording))
        return Span(carrier["traceparent"], recording)

    def close(self) -> None:
        """Sends what waits, within the few seconds that a collector is given, and sends no more."""
        if self._provider is not None:
            self._provider.shutdown()


class Phases:
    """The parts of a span that follow one another: each begins where the one before ends."""

    def __init__(self, traces: Traces, parent: str | None) -> None:
        self._traces, self._parent = traces, parent
        self._current: Span | None = None

    def begins(self, name: str) -> None:
        self.end()
        self._current = self._traces.begin(name, self._parent)

    def end(self) -> None:
        if self._current is not None:
            self._current.end()
            self._current = None


def _nanoseconds(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp() * 1e9)
