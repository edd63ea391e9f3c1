"""What the frontend counts, in Prometheus's words. No label has unbounded values: routes are templates, a SPIFFE ID is none."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from keybroker.tracing import Laps

_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class FrontendMetrics:
    """One registry, so that tests can have several in one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("keybroker_requests", "Answers by route and status", ["route", "status"], registry=self._registry)
        self._request_children: dict[tuple[str, int], Counter] = {}
        self._handshakes = Counter("keybroker_handshakes", "TLS handshakes by how they ended", ["result"], registry=self._registry)
        self.connections = Gauge("keybroker_connections", "Open client connections, handshakes included", registry=self._registry)
        seconds = Histogram("keybroker_sign_seconds", "Where a use spends its time", ["stage"], buckets=_BUCKETS, registry=self._registry)
        self._parse = seconds.labels("parse")
        self._answer = Histogram(
            "keybroker_request_seconds",
            "From a whole request to its answer, sign requests only",
            buckets=_BUCKETS,
            registry=self._registry,
        )
        ProcessCollector(namespace="keybroker_frontend", registry=self._registry)

    def answered(self, route: str, status: int) -> None:
        """A request was answered. `route` is a template, or `none` where no route was reached."""
        child = self._request_children.get((route, status))
        if child is None:
            child = self._request_children[route, status] = self._requests.labels(route, str(status))
        child.inc()

    def handshake(self, result: str) -> None:
        """A TLS handshake ended, or a connection was turned away before it."""
        self._handshakes.labels(result).inc()

    def signed(self, laps: Laps) -> None:
        """A sign request was answered with a signature: how long it took to parse, and in all."""
        (_, began_ns, parsed_ns), *_ = laps.stages
        self._parse.observe((parsed_ns - began_ns) / 1e9)
        self._answer.observe((time.perf_counter_ns() - began_ns) / 1e9)

    def text(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self._registry)
