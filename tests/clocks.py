"""A clock that tests move by hand."""

from __future__ import annotations

START_US = 1_790_000_000_000_000


class FixedClock:
    """Time stands still until a test moves it."""

    def __init__(self, now_us: int = START_US) -> None:
        self.time_us = now_us

    def now_us(self) -> int:
        return self.time_us
