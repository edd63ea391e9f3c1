"""The policy contract: what a decision is asked with and what it answers (docs/reference/policy.md)."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

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


class Obligation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one matching grant demands beyond a yes. All obligations of a decision bind together."""

    grant: str
    hours: tuple[dict[str, Any], ...]
    limits: tuple[dict[str, Any], ...]
    quorum: tuple[dict[str, Any], ...]
    cool_off_s: int
    evidence: tuple[dict[str, Any], ...]

    @property
    def is_empty(self) -> bool:
        """True where the grant asks for nothing more."""
        return not (self.hours or self.limits or self.quorum or self.cool_off_s or self.evidence)


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
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    grants: tuple[str, ...]
    obligations: tuple[Obligation, ...]
    policy: str
    engine: str
    record: bytes = field(repr=False)
