"""The histogram of stages says the same as prometheus_client's own."""

from __future__ import annotations

import re

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from keybroker.stage_times import StageTimes

BOUNDS = (0.0001, 0.001, 0.25, 1.0)


def test_stage_times_are_shown_as_a_histogram_of_prometheus_client_is() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    times = StageTimes("seconds", "Where time goes", BOUNDS, ("a", "b", "never"), ours)
    histogram = Histogram("seconds", "Where time goes", ["stage"], buckets=BOUNDS, registry=theirs)
    for stage in ("a", "b", "never"):
        histogram.labels(stage)
    for stage, ns in (("a", 0), ("a", 100_000), ("a", 100_001), ("b", 250_000_000), ("b", 2_000_000_000), ("b", 999_999)):
        times.observe(stage, ns)
        histogram.labels(stage).observe(ns / 1e9)
    assert comparable(ours) == comparable(theirs)


def comparable(registry: CollectorRegistry) -> list[str]:
    """Its text, without the moments of creation."""
    return sorted(re.sub(r"(_created\{.*\}) .*", r"\1", line) for line in generate_latest(registry).decode().splitlines())
