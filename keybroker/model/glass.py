"""Break-glass: for a while, a grant goes without what it demands, and somebody else looks at it afterwards."""

from __future__ import annotations

import msgspec

MAX_SECONDS = 86_400  # whatever is configured


class BrokenGlass(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One time that somebody broke the glass. Gone when it has been reviewed.

    Attributes:
        id: a ULID.
        grant: id of the grant whose hours, limits and quorum are waived.
        reason: why, in the words of whoever opened it.
        by: SPIFFE ID of whoever opened it.
        person: who that is, by the rules of then; empty if nobody.
        opened_us: microseconds since the epoch.
        until_us: when it ends, or has ended.
    """

    id: str
    grant: str
    reason: str
    by: str
    person: str
    opened_us: int
    until_us: int
