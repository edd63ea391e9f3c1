"""What a check of a policy finds: with a stable code, a place, and the cure."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Severity(enum.Enum):
    """How bad it is."""

    ERROR = "error"  # the policy cannot do what it says
    WARNING = "warning"  # it can, and is probably not what was meant
    NOTE = "note"  # worth knowing


CODES: dict[str, tuple[Severity, str]] = {
    "cannot-be-loaded": (Severity.ERROR, "write it as docs/reference/grants.md says"),
    "worth-a-look": (Severity.WARNING, "split the rules, or rename the file"),
    "quorum-cannot-be-met": (Severity.ERROR, "put more people into the groups, or ask for fewer approvals"),
    "quorum-needs-requester": (Severity.ERROR, "put more people into the groups, or grant it to workloads that are not theirs"),
    "expired-grant": (Severity.WARNING, "take it out, or write a later `not_after`"),
    "unknown-key": (Severity.WARNING, "write its name as in `authority.keys`, or take it out"),
    "key-cannot-sign": (Severity.WARNING, "grant an algorithm that the key can do"),
    "unreachable-grant": (Severity.WARNING, "take it out, or narrow the deny"),
    "does-not-loosen": (Severity.WARNING, "narrow the grant that demands something, or take this one out"),
    "partly-unreachable-grant": (Severity.NOTE, "narrow the grant to what it gives"),
    "only-tightens": (Severity.NOTE, "nothing, if it is meant so; taking it out would loosen those uses"),
    "superfluous-grant": (Severity.NOTE, "take it out"),
    "superfluous-deny": (Severity.NOTE, "take it out"),
    "idle-deny": (Severity.NOTE, "nothing, if it guards against later grants; else look for a typing error"),
    "no-limits": (Severity.NOTE, "write `limits`: what a stolen identity can do in an hour is bounded by nothing else"),
    "observes-only": (Severity.NOTE, "take `observe_only` out when the record shows that nothing is refused that should not be"),
    "early-grant": (Severity.NOTE, "nothing, if it is meant so"),
    "unused-group": (Severity.NOTE, "take it out, or name it in a quorum"),
    "unused-person": (Severity.NOTE, "take it out, or put it into a group"),
    "unused-network": (Severity.NOTE, "take it out, or name it in a rule"),
}
"""Every code, with its severity and the usual cure."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a policy, or worth knowing.

    Attributes:
        code: a stable name, one of `CODES`.
        where: `file:line`; empty where there is none.
        rule: the id of the rule; empty where it is about something else.
        text: what it is.
        cure: what to do.
    """

    code: str
    where: str
    rule: str
    text: str
    cure: str

    @classmethod
    def of(cls, code: str, where: str, rule: str, text: str, cure: str = "") -> Finding:
        """A finding with the usual cure of its code, if no other is given."""
        return cls(code, where, rule, text, cure or CODES[code][1])

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return CODES[self.code][0]
