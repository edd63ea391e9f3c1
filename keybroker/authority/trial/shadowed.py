"""What the shadow policy would have changed, from the records that it left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from keybroker.authority.trial.recorded import Recorded

EVENT = "shadow-differs"


class _Decided(msgspec.Struct, frozen=True):
    policy: str = ""


@dataclass(slots=True)
class Seen:
    """One kind of difference.

    Attributes:
        policy: digest of the candidate.
        detail: what would change, for whom, on what.
        decisions: how many.
        example: index of the newest record of it, which holds a whole request.
    """

    policy: str
    detail: str
    decisions: int = 0
    first_time: str = ""
    last_time: str = ""
    example: int = -1


_decode = msgspec.json.Decoder(_Decided).decode


def seen(records: Iterable[Recorded | None]) -> list[Seen]:
    """All differences, those of the newest candidate last, the most frequent of each first."""
    found: dict[tuple[str, str], Seen] = {}
    order: dict[str, int] = {}
    for each in records:
        if each is None or each.kind != "security" or each.body.event != EVENT:
            continue
        policy = _decode(each.decision).policy
        order[policy] = each.index
        known = found.setdefault((policy, each.body.detail), Seen(policy, each.body.detail, first_time=each.time))
        known.decisions += each.body.count
        known.last_time, known.example = each.time, each.index
    return sorted(found.values(), key=lambda one: (order[one.policy], -one.decisions, one.detail))
