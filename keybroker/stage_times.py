"""How long stages take, counted by one thread: a Prometheus histogram without the locks that would be half its cost."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry


class StageTimes(Collector):
    """One histogram with the label `stage`.

    Args:
        name: of the family.
        text: what it counts.
        bounds: of the buckets, seconds, rising.
        stages: every value of the label.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float], stages: Sequence[str], registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._bounds_ns = [round(each * 1e9) for each in bounds]
        self._labels = [*(str(each) for each in bounds), "+Inf"]
        self._counts = {stage: [0] * len(self._labels) for stage in stages}
        self._sums_ns = dict.fromkeys(stages, 0)
        self._created = time.time()
        registry.register(self)

    def observe(self, stage: str, ns: int) -> None:
        """A stage took so many nanoseconds."""
        self._counts[stage][bisect_left(self._bounds_ns, ns)] += 1
        self._sums_ns[stage] += ns

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        family = HistogramMetricFamily(self._name, self._text, labels=["stage"])
        for stage, counts in self._counts.items():
            total, buckets = 0, []
            for label, count in zip(self._labels, counts, strict=True):
                total += count
                buckets.append((label, float(total)))
            family.add_metric([stage], buckets, self._sums_ns[stage] / 1e9)
            family.add_sample(f"{self._name}_created", {"stage": stage}, self._created)
        yield family
