"""Freezes: who or what is stopped, whatever the rules say, until somebody lifts it."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

FreezeKind = Literal["workload", "key", "token", "everything"]
FREEZE_KINDS: tuple[FreezeKind, ...] = get_args(FreezeKind)
MAX_TARGET_CHARACTERS = 2_048


class Freeze(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One freeze.

    Attributes:
        id: a ULID.
        kind: of the target.
        target: SPIFFE ID of a workload, name of a key or of a token; empty for everything.
        reason: why, in the words of whoever froze it.
        by: SPIFFE ID of whoever froze it.
        since: RFC 3339.
    """

    id: str
    kind: FreezeKind
    target: str
    reason: str
    by: str
    since: str
