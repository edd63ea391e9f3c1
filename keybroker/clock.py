"""Where time comes in: one Protocol, one real clock. Tests inject their own."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import time
from pathlib import Path
from typing import Protocol

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BOOT_VARIABLE = "KEYBROKER_BOOT_ID"  # from a service manager that hides that file: `%b` of a systemd unit


class Clock(Protocol):
    """Tells the time of day, and how long the host has been up, which nobody can set."""

    def now_us(self) -> int:
        """Microseconds since 1970-01-01T00:00:00Z."""
        ...

    def uptime_us(self) -> int:
        """Microseconds since the host was booted, those of its sleep among them; never falls within one boot."""
        ...

    def boot(self) -> str:
        """Which boot that is; empty if the host does not say."""
        ...


class SystemClock:
    """The clock of this host."""

    def now_us(self) -> int:
        """Microseconds since 1970-01-01T00:00:00Z, from CLOCK_REALTIME."""
        return time.time_ns() // 1000

    def uptime_us(self) -> int:
        """Microseconds since the host was booted, from CLOCK_BOOTTIME."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000

    def boot(self) -> str:
        """The kernel's random name of this boot, 32 hex digits."""
        named = os.environ.get(_BOOT_VARIABLE, "")
        with contextlib.suppress(OSError):
            named = named or _BOOT_ID.read_text()
        return named.strip().replace("-", "")


def to_rfc3339(us: int) -> str:
    """Microseconds since the epoch as RFC 3339 in UTC with exactly six decimals: `2026-11-24T08:00:00.000000Z`."""
    seconds, micros = divmod(us, 1_000_000)
    return f"{_to_the_second(seconds)}.{micros:06d}Z"


@functools.lru_cache(maxsize=256)  # records come many to a second, and the expiry of an SVID is in all of its records
def _to_the_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def from_rfc3339(text: str) -> int:
    """Microseconds since the epoch of an RFC 3339 time.

    Raises:
        ValueError: not RFC 3339, or without an offset from UTC.
    """
    moment = datetime.datetime.fromisoformat(text)
    if moment.tzinfo is None:
        msg = "a time needs an offset from UTC, for example a final Z"
        raise ValueError(msg)
    return (moment - _EPOCH) // datetime.timedelta(microseconds=1)


_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
