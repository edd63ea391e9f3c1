"""Latencies as counts in buckets that grow by two per cent, the same in the load generator and here."""

from __future__ import annotations

import math
from dataclasses import dataclass

GROWTH = 1.02  # as in load/main.go


def bucket_of(us: float) -> int:
    """The bucket of a latency in microseconds."""
    return int(math.log(max(us, 1.0)) / math.log(GROWTH)) + 1


@dataclass(frozen=True, slots=True)
class Latencies:
    """Bucket i counts what took less than GROWTH^i microseconds, and not less than GROWTH^(i-1)."""

    counts: dict[int, int]

    def quantile_us(self, share: float) -> float:
        """The latency that this share of all did not exceed, to two per cent; NaN where there are none."""
        left = share * sum(self.counts.values())
        for bucket in sorted(self.counts):
            left -= self.counts[bucket]
            if left <= 0:
                return GROWTH**bucket
        return math.nan
