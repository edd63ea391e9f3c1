"""Opening hours: pure functions of a moment, by the time zones of this host (IANA, through `zoneinfo`).

A window is read by the clocks of its zone: where clocks are put forward, the hour that does not happen is not open, and where they are
put back, the hour that happens twice is open twice.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import re
import zoneinfo
from pathlib import Path

from keybroker.clock import from_rfc3339
from keybroker.model.decision import HoursWindow, Obligation

_ZONE = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+){0,2}")
_NOT_PLACES = {"localtime", "posixrules", "right", "posix", "Factory"}  # files beside the zones, or zones that count leap seconds
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_MINUTE_US = 60_000_000


@functools.lru_cache(maxsize=512)
def zone_of(name: str) -> zoneinfo.ZoneInfo:
    """A time zone by its IANA name.

    Raises:
        ValueError: there is none on this host.
    """
    if _ZONE.fullmatch(name) and name.partition("/")[0] not in _NOT_PLACES:
        try:
            return zoneinfo.ZoneInfo(name)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            pass
    msg = "no such time zone on this host; write an IANA name such as Europe/Berlin or UTC"
    raise ValueError(msg)


def zones_digest() -> str:
    """SHA-256 of the time zones that this host has, lower-case hex; empty where they do not say which they are."""
    for place in zoneinfo.TZPATH:
        source = Path(place) / "tzdata.zi"
        try:
            stat = source.stat()
        except OSError:
            continue
        return _digest(source, stat.st_mtime_ns, stat.st_ino, stat.st_size)
    return ""


@functools.lru_cache(maxsize=2)
def _digest(source: Path, *_as_of: int) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()


def forget_zones() -> None:
    """The time zones of this host have changed: read them again."""
    zoneinfo.ZoneInfo.clear_cache()
    zone_of.cache_clear()
    _is_any_open.cache_clear()


def is_open(window: HoursWindow, time_us: int) -> bool:
    """Whether a window is open at a moment.

    Raises:
        ValueError: this host does not know its zone.
    """
    local = datetime.datetime.fromtimestamp(time_us // 1_000_000, zone_of(window.zone))
    today, now = local.date(), local.hour * 60 + local.minute
    opens, closes = _minutes(window.opens), _minutes(window.closes)
    if today.isoformat() in window.excluded:
        return False
    if opens < closes:
        return opens <= now < closes and _begins_on(window, today)
    if now >= opens:
        return _begins_on(window, today)
    return now < closes and _begins_on(window, today - datetime.timedelta(days=1))


def unmet(obligation: Obligation, time_us: int) -> tuple[str, ...]:
    """What an obligation demands of the time and does not get, as reasons: `hours:GRANT`, `not-before:GRANT`, `not-after:GRANT`.

    Raises:
        ValueError: this host does not know a zone.
    """
    if not (obligation.hours or obligation.not_before or obligation.not_after):
        return ()
    missing = []
    if obligation.not_before and time_us < _moment(obligation.not_before):
        missing.append(f"not-before:{obligation.grant}")
    if obligation.not_after and time_us >= _moment(obligation.not_after):
        missing.append(f"not-after:{obligation.grant}")
    if obligation.hours and not _is_any_open(obligation.hours, time_us // _MINUTE_US):
        missing.append(f"hours:{obligation.grant}")
    return tuple(missing)


@functools.lru_cache(maxsize=4096)
def _is_any_open(windows: tuple[HoursWindow, ...], minute: int) -> bool:
    """For a whole minute: windows begin and end with one, and so do all zones' since 1972."""
    return any(is_open(window, minute * _MINUTE_US) for window in windows)


@functools.lru_cache(maxsize=4096)
def _moment(text: str) -> int:
    return from_rfc3339(text)


def _begins_on(window: HoursWindow, date: datetime.date) -> bool:
    return _DAYS[date.weekday()] in window.days and date.isoformat() not in window.excluded


def _minutes(text: str) -> int:
    return int(text[:2]) * 60 + int(text[3:])
