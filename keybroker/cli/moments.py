"""Times as people write them: RFC 3339, or how long ago."""

from __future__ import annotations

import re

from keybroker.cli.arguments import UsageError
from keybroker.clock import from_rfc3339, to_rfc3339

_AGO = re.compile(r"([1-9][0-9]{0,8})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


class MomentError(UsageError):
    """The text is not a time. It says how to write one."""


def moment(text: str, now_us: int) -> str:
    """A time in RFC 3339, in UTC.

    Args:
        text: `2h` for two hours ago (s, m, h, d or w), or RFC 3339 with an offset.
        now_us: microseconds since the epoch.

    Raises:
        MomentError: it is neither.
    """
    ago = _AGO.fullmatch(text)
    try:
        us = now_us - int(ago[1]) * _SECONDS[ago[2]] * 1_000_000 if ago else from_rfc3339(text)
        return to_rfc3339(max(us, 0))
    except (ValueError, OverflowError) as err:
        raise MomentError(f"{text!r} is not a time; write 2h for two hours ago (s, m, h, d, w), or 2026-11-24T08:00:00Z") from err
