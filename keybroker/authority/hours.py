"""Opening hours: pure functions of a moment, by the time zones of this host (IANA, through `zoneinfo`)."""

from __future__ import annotations

import functools
import re
import zoneinfo

_ZONE = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+){0,2}")
_NOT_PLACES = {"localtime", "posixrules", "right", "posix", "Factory"}  # files beside the zones, or zones that count leap seconds


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
