"""The policy contract: what a decision is asked with and what it answers (docs/reference/policy.md)."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec


class CallerInput(msgspec.Struct, frozen=True):
    """Who asks. `networks` are names that the address was resolved to before policy."""

    spiffe_id: str
    trust_domain: str
    path: tuple[str, ...]
    networks: tuple[str, ...]
    method: str = "x509-svid"
    bearer: bool = False
    proof_of_possession: bool = False
    evidence: tuple[dict[str, Any], ...] = ()


class PrincipalInput(msgspec.Struct, frozen=True):
    """On whose behalf; nobody, until there is a way to prove it."""

    present: bool = False
    issuer: str = ""
    subject: str = ""
    groups: tuple[str, ...] = ()
    chain: tuple[str, ...] = ()


class TargetInput(msgspec.Struct, frozen=True):
    """What is used, read or changed. `workload` names the trail of a `read-audit`."""

    kind: str
    id: str = ""
    workload: str = ""


class KeyInput(msgspec.Struct, frozen=True):
    """The key version that would be used; empty where no key is."""

    name: str = ""
    version: int = 0
    family: str = ""
    labels: dict[str, str] = {}


class ContentInput(msgspec.Struct, frozen=True):
    """What would be signed, as far as policy sees it: never the bytes."""

    type: str = ""
    size: int = 0
    media_type: str = ""
    fields: dict[str, str] = {}


class PolicyInput(msgspec.Struct, frozen=True):
    """The total input of `data.keybroker.decision`: every field is always present."""

    caller: CallerInput
    operation: str
    target: TargetInput
    key: KeyInput = KeyInput()
    algorithm: str = ""
    content: ContentInput = ContentInput()
    reason: str = ""
    principal: PrincipalInput = PrincipalInput()
    v: int = 1


Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
Per = Literal["workload", "key", "grant", "principal"]

MAX_WINDOW_S = 31 * 24 * 3600
MAX_UNITS = 1_000_000_000

_Moment = Annotated[str, msgspec.Meta(pattern=r"\A(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)?\Z")]
_Minute = Annotated[str, msgspec.Meta(pattern=r"\A(([01]\d|2[0-3]):[0-5]\d|24:00)\Z")]
_Date = Annotated[str, msgspec.Meta(pattern=r"\A\d{4}-\d\d-\d\d\Z")]
_Duration = Annotated[int, msgspec.Meta(ge=0, le=MAX_WINDOW_S)]


class HoursWindow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, cache_hash=True):
    """When a key may be used, by the clocks of one place. One that ends before it begins goes on into the next day.

    Attributes:
        days: on which it begins.
        opens: `HH:MM`; called `from` outside.
        closes: `HH:MM`, the first minute that is no longer in it; `24:00` is the end of the day. Called `to` outside.
        zone: IANA time zone.
        excluded: dates there, `YYYY-MM-DD`, on which it is neither open nor begins; called `except` outside.
    """

    days: Annotated[tuple[Day, ...], msgspec.Meta(min_length=1)]
    opens: _Minute = msgspec.field(name="from")
    closes: _Minute = msgspec.field(name="to")
    zone: str
    excluded: tuple[_Date, ...] = msgspec.field(name="except")


class Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, cache_hash=True):
    """Never more uses than `max` in any `window_s` seconds, counted apart for each workload, key or principal, or for the whole grant."""

    max: Annotated[int, msgspec.Meta(ge=1, le=MAX_UNITS)]
    window_s: Annotated[int, msgspec.Meta(ge=1, le=MAX_WINDOW_S)]
    per: Per


class QuorumStage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """So many of these people must approve.

    Attributes:
        approvals: how many people.
        of: the groups that they are in, as written in the grant.
        people: everybody in these groups, by name, each once, in order of name.
    """

    approvals: Annotated[int, msgspec.Meta(ge=1)]
    of: tuple[str, ...]
    people: tuple[str, ...]


class Obligation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, cache_hash=True):
    """What one matching grant demands beyond a yes. All obligations of a decision bind together.

    Attributes:
        not_before: RFC 3339 in UTC, whole seconds: from then on; empty if always.
        not_after: the same: until then, and then no longer; empty if for ever.
        hours: open if one of them is; empty if always.
        limits: all of them.
        quorum: one stage after the other; empty if nobody has to approve.
        cool_off_s: from the last approval that was needed until the use.
        expires_s: how long a quorum may take; 0 without one.
        observe_only: it does not bind: what does not hold is recorded, and the use goes on.
    """

    grant: str
    not_before: _Moment
    not_after: _Moment
    hours: tuple[HoursWindow, ...]
    limits: tuple[Limit, ...]
    quorum: tuple[QuorumStage, ...]
    cool_off_s: _Duration
    expires_s: _Duration
    evidence: tuple[dict[str, Any], ...]
    observe_only: bool

    @property
    def is_empty(self) -> bool:
        """True where the grant asks for nothing more."""
        return not (self.not_before or self.not_after or self.hours or self.limits or self.quorum or self.cool_off_s or self.evidence)


def no_obligation(grant: str) -> Obligation:
    """What a grant demands that demands nothing."""
    return Obligation(grant, "", "", (), (), (), 0, 0, (), observe_only=False)


class PolicyAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What Rego must answer. Decoded strictly: a string `"true"` or a 1 is not an allow."""

    allow: bool
    reasons: tuple[str, ...]
    grants: tuple[str, ...]
    policy: str
    obligations: tuple[Obligation, ...]


class Verdict(enum.Enum):
    """The answer of the policy. Only ALLOW leads to a signature."""

    ALLOW = "allow"
    DENY = "deny"
    FAILED = "failed"  # could not decide: denied like DENY, alerted like an outage


NO_GRANT = "no-grant"  # the reason of a denial that must look like "no such key" to the caller


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision, with everything that the record keeps of it.

    Attributes:
        verdict: ALLOW, DENY or FAILED.
        reasons: rule names; for FAILED the problem code, `policy-unavailable` or `policy-error`.
        grants: ids of the grants that matched.
        obligations: what the matching grants demand.
        policy: the digest of the policy that decided, lower-case hex SHA-256.
        engine: which engine, and its version.
        record: the `decision` object of the audit record, canonical JSON.
        unmet: what grants demand and a reading does not get now; what the rules themselves answered is in `record`.
        observed: the same, of grants that only observe.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    grants: tuple[str, ...]
    obligations: tuple[Obligation, ...]
    policy: str
    engine: str
    record: bytes = field(repr=False)
    unmet: tuple[str, ...] = ()
    observed: tuple[str, ...] = ()
