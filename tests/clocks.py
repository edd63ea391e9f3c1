"""A clock that tests move by hand."""

from __future__ import annotations

START_US = 1_790_000_000_000_000


class FixedClock:
    """Time stands still until a test moves it: lets it pass by `time_us`, or sets the clock by `jump`."""

    def __init__(self, now_us: int = START_US, boot: str = "boot-1") -> None:
        self.time_us = now_us
        self.boot_id = boot
        self._booted_us = now_us - 1_000_000

    def now_us(self) -> int:
        return self.time_us

    def uptime_us(self) -> int:
        return self.time_us - self._booted_us

    def boot(self) -> str:
        return self.boot_id

    def jump(self, us: int) -> None:
        """Somebody sets the clock: the time of day changes, and no time has passed."""
        self.time_us += us
        self._booted_us += us

    def reboot(self) -> None:
        """The host is booted anew."""
        self.boot_id += "'"
        self._booted_us = self.time_us - 1_000
