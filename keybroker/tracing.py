"""Traces: an OpenTelemetry span for each request in each room, and one for each of its stages. Off unless configured.

W3C Trace Context carries a trace from the caller through the rooms; OTLP over HTTP carries spans out. The stages are timed in any case,
because the metrics want them; spans are made from those times when the work is done, so that tracing costs nothing where it is off. The
hsm room has no network: what it did is told in its frames, and shown as a stage of the authority's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from keybroker.config import TelemetryConfig

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import Tracer as OtelTracer

_DEFAULT_PORTS = {"http": 80, "https": 443}
_EXPORT_SECONDS = 5.0
_SAMPLED = 0x01


class Laps:
    """The stages of one piece of work, one after another, each from where the last one ended. Nanoseconds of the monotonic clock."""

    __slots__ = ("_last", "stages", "started_ns")

    def __init__(self) -> None:
        self.started_ns = self._last = time.perf_counter_ns()
        self.stages: list[tuple[str, int, int]] = []

    def lap(self, stage: str) -> None:
        """A stage has ended, and the next begins."""
        now = time.perf_counter_ns()
        self.stages.append((stage, self._last, now))
        self._last = now


class Span(Protocol):
    """One piece of work in one room.

    Attributes:
        traceparent: what is handed on to the next room; the caller's own where nothing is traced. May be empty.
    """

    traceparent: str

    def end(self, laps: Laps, attributes: Mapping[str, str | int]) -> None:
        """The work is done. Attributes never hold payload, digest or certificate bytes."""
        ...


class Tracer:
    """Begins spans.

    Args:
        room: the service name is `keybroker-ROOM`.
        config: where spans go, if anywhere.
    """

    def __init__(self, room: str, config: TelemetryConfig) -> None:
        self._provider = _provider(room, config) if config.traces else None
        self._tracer: OtelTracer | None = self._provider.get_tracer("keybroker") if self._provider else None

    def begin(self, name: str, traceparent: str) -> Span:
        """A span that begins now, below the one that a W3C traceparent names; empty for a new trace."""
        if self._tracer is None:
            return _Untraced(traceparent)
        return _Traced(self._tracer, name, traceparent)

    def stop(self) -> None:
        """Send what is left. Blocks for a few seconds at most."""
        if self._provider is not None:
            self._provider.shutdown()


def export_port(config: TelemetryConfig) -> tuple[int, ...]:
    """The TCP port that spans are sent to; none where nothing is traced."""
    if not config.traces:
        return ()
    url = urlsplit(config.traces)
    return (url.port or _DEFAULT_PORTS[url.scheme],)


class _Untraced:
    __slots__ = ("traceparent",)

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent

    def end(self, laps: Laps, attributes: Mapping[str, str | int]) -> None:
        pass


class _Traced:
    __slots__ = ("_span", "_started_ns", "_tracer", "traceparent")

    def __init__(self, tracer: OtelTracer, name: str, traceparent: str) -> None:
        self._tracer = tracer
        self._started_ns = time.time_ns() - time.perf_counter_ns()  # turns the laps' clock into the time of day
        self._span = tracer.start_span(name, _context(traceparent))
        own = self._span.get_span_context()
        self.traceparent = f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags & _SAMPLED:02x}"

    def end(self, laps: Laps, attributes: Mapping[str, str | int]) -> None:
        from opentelemetry.trace import set_span_in_context  # noqa: PLC0415  loaded only where something is traced

        if self._span.is_recording():
            below = set_span_in_context(self._span)
            for stage, began_ns, ended_ns in laps.stages:
                child: OtelSpan = self._tracer.start_span(stage, below, start_time=began_ns + self._started_ns)
                child.end(ended_ns + self._started_ns)
            self._span.set_attributes(dict(attributes))
        self._span.end()


def _context(traceparent: str) -> Context:
    from opentelemetry.context import Context  # noqa: PLC0415  as above
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context  # noqa: PLC0415  as above

    if not traceparent:
        return Context()
    _, trace_id, span_id, flags = traceparent.split("-")
    parent = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
    return set_span_in_context(NonRecordingSpan(parent))


def _provider(room: str, config: TelemetryConfig) -> TracerProvider:
    import requests  # noqa: PLC0415  as above
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415  as above
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415  as above
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415  as above
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415  as above
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased  # noqa: PLC0415  as above

    session = requests.Session()
    session.trust_env = False  # no proxy, no credentials but what is configured
    exporter = OTLPSpanExporter(config.traces, timeout=_EXPORT_SECONDS, session=session)
    sampler = ParentBased(TraceIdRatioBased(config.traces_share))  # a caller that samples decides for us too
    provider = TracerProvider(sampler, Resource({"service.name": f"keybroker-{room}"}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
