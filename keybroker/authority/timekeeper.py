"""Whether the clock can be trusted, and a time that nobody can set.

Hours need the time of day, and whoever sets the clock could open a window with it. Limits need to know how much time has passed, and
whoever sets the clock could refill them. So each look at the clock compares it with the uptime of the host, which nobody can set. When
the two disagree, the clock is distrusted: what depends on time is refused until an operator has looked (`keybroker clock acknowledge`).

Limits count in *steady time*, which runs with the uptime, goes on where it was over a restart of the broker, and over a boot is moved
forward by the time of day. It never goes back, and no setting of the clock moves it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ulid import ULID

from keybroker.clock import Clock

STEP_US = 5_000_000  # a clock may be set by this much without a word, as for a leap second
_DRIFT = 2_000  # and may run wrong by one part in this many: four times what the kernel lets NTP slew
_ANCHOR_US = 3_600_000_000
_SAVE_US = 60_000_000
_READ_US = 500_000  # two clocks that were read within this time were read at once
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class ClockRow:
    """When the clock was last seen to be right, as the store keeps it, and what has been seen since.

    Attributes:
        boot: which boot `uptime_us` counts from.
        distrusted: an id (ULID) and what was seen, with a space between; empty while the clock is trusted.
    """

    boot: str
    uptime_us: int
    time_us: int
    steady_us: int
    distrusted: str = ""


@dataclass(frozen=True, slots=True)
class Moment:
    """One look at the clocks.

    Attributes:
        time_us: time of day, microseconds since the epoch.
        steady_us: steady time; only differences mean something.
        distrusted: why the time of day cannot be trusted; empty if it can.
    """

    time_us: int
    steady_us: int
    distrusted: str = ""


class Timekeeper:
    """Looks at the clock. Safe to use from any thread.

    Args:
        row: what the store has kept; None if it has none.
        last_us: time of the last record, 0 if there is none: what is known of the time where the store has kept none.
        max_gap_s: how long after the last look a boot may come without a word.
    """

    def __init__(self, clock: Clock, row: ClockRow | None, last_us: int, max_gap_s: int) -> None:
        self._clock = clock
        self._max_gap_us = max_gap_s * 1_000_000
        self._lock = threading.Lock()
        self._boot = clock.boot() or str(ULID())  # a host that does not say: then each run is a boot of its own
        time_us, uptime_us = self._read()
        if row is None and not last_us:
            row = ClockRow(self._boot, uptime_us, time_us, time_us)
        self._row = row or ClockRow("", 0, last_us, last_us)  # when the clock was right, before what it is distrusted for
        self._anchor = self._row  # what the clock is compared with
        self._distrusted = self._row.distrusted
        self._offset_us = self._row.steady_us - uptime_us  # of steady time against uptime
        self._is_due = True
        if self._is_same_boot(uptime_us):
            self._offset_us = self._row.steady_us - self._row.uptime_us
            if not self._distrusted:
                self._compare(time_us, uptime_us, self._row)
        elif not self._distrusted:
            self._judge_gap(time_us - self._row.time_us, is_bounded=row is not None)
        if not self._distrusted:
            self._anchor = self._row_of(time_us, uptime_us)
        self._right_us = (time_us, uptime_us)  # the last look at which the clock was right, while it is trusted
        self._saved_us = uptime_us

    @property
    def distrusted(self) -> str:
        """Why the clock is distrusted, with the id of the event in front; empty while it is trusted."""
        return self._distrusted

    def look(self) -> Moment:
        """What time it is, and whether that can be trusted."""
        with self._lock:
            time_us, uptime_us = self._read()
            if not self._distrusted:
                self._compare(time_us, uptime_us, None)
            if not self._distrusted:
                self._right_us = (time_us, uptime_us)
                if uptime_us - self._anchor.uptime_us > _ANCHOR_US:
                    self._anchor = self._row_of(time_us, uptime_us)
            if uptime_us - self._saved_us > _SAVE_US:
                self._is_due = True
            return Moment(time_us, self._offset_us + uptime_us, self._distrusted)

    def due(self) -> ClockRow | None:
        """What the store should keep, if it is time to; None otherwise. It is due until `saved` is called."""
        if not self._is_due:
            return None
        with self._lock:
            return self._row if self._distrusted else self._row_of(*self._right_us)

    def saved(self, row: ClockRow) -> None:
        """The store has kept a row."""
        with self._lock:
            self._is_due = row.distrusted != self._distrusted
            self._saved_us = max(self._saved_us, self._clock.uptime_us())

    def acknowledge(self) -> None:
        """An operator has seen what happened, and that the clock is right now."""
        with self._lock:
            time_us, uptime_us = self._read()
            if not self._is_same_boot(uptime_us):  # the time that has passed since then is what the clock says, now that it is right
                passed_us = max(0, time_us - self._row.time_us)
                self._offset_us = max(self._offset_us, self._row.steady_us + passed_us - uptime_us)
            self._distrusted = ""
            self._right_us, self._anchor = (time_us, uptime_us), self._row_of(time_us, uptime_us)
            self._is_due = True

    def _is_same_boot(self, uptime_us: int) -> bool:
        return self._row.boot == self._boot and self._row.uptime_us <= uptime_us

    def _row_of(self, time_us: int, uptime_us: int) -> ClockRow:
        return ClockRow(self._boot, uptime_us, time_us, self._offset_us + uptime_us)

    def _read(self) -> tuple[int, int]:
        """Time of day and uptime, read at once: a process that was stopped in between would see a jump where there is none."""
        before_us = self._clock.uptime_us()
        for _ in range(_ATTEMPTS):
            time_us = self._clock.now_us()
            uptime_us = self._clock.uptime_us()
            if uptime_us - before_us < _READ_US:
                return time_us, uptime_us
            before_us = uptime_us
        return self._clock.now_us(), before_us

    def _compare(self, time_us: int, uptime_us: int, row: ClockRow | None) -> None:
        """With where the clock should be by uptime. `row` is when it was last right; None for the last look."""
        passed_us = uptime_us - self._anchor.uptime_us
        ahead_us = time_us - self._anchor.time_us - passed_us
        if abs(ahead_us) > STEP_US + passed_us // _DRIFT:
            self._distrust(f"the clock was set {'forward' if ahead_us > 0 else 'back'} by {abs(ahead_us) // 1_000_000} s", row)

    def _judge_gap(self, gap_us: int, *, is_bounded: bool) -> None:
        """How long it was over a boot, by the only clock that there is then. Before there are limits, a long one refills nothing."""
        seen = f"after a boot the clock is {abs(gap_us) // 1_000_000} s"
        if gap_us < -STEP_US:
            self._distrust(f"{seen} before the broker last looked at it", self._row)
        elif is_bounded and gap_us > self._max_gap_us:
            self._distrust(f"{seen} after the broker last looked at it", self._row)
        else:
            self._offset_us += max(0, gap_us)

    def _distrust(self, what: str, row: ClockRow | None) -> None:
        row = row or self._row_of(*self._right_us)
        self._distrusted = f"{ULID()} {what}"
        self._row = ClockRow(row.boot, row.uptime_us, row.time_us, row.steady_us, self._distrusted)
        self._is_due = True
