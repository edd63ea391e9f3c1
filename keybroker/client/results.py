"""What a broker answers, typed and frozen. Members that this version does not know are ignored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from keybroker.model.approval import Answer, Subject
from keybroker.model.key import Algorithm, KeyFamily


class Result(msgspec.Struct, frozen=True):
    """An answer, or a part of one."""


class Whoami(Result, frozen=True):
    """What the broker sees of us. `not_after` is RFC 3339; `roles` is what the rules let us do now."""

    spiffe_id: str
    trust_domain: str
    svid_sha256: str
    not_after: str
    address: str
    networks: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()


class KeyVersion(Result, frozen=True):
    """One version of a key. `spki` is its public key, DER SubjectPublicKeyInfo; `spki_sha256` lower-case hex."""

    version: int
    family: KeyFamily
    state: str
    spki: bytes
    spki_sha256: str


class Key(Result, frozen=True):
    """One key. Versions oldest first; the last one signs."""

    name: str
    labels: dict[str, str]
    algorithms: tuple[str, ...]
    versions: tuple[KeyVersion, ...]


class UsePlaces(Result, frozen=True):
    """Where a use is on record: the origin of the log, and the indexes of its intent and its outcome."""

    log: str
    intent: int
    outcome: int


class SignedUse(Result, frozen=True):
    """A signature, and the use that made it. `use` is a ULID."""

    signature: bytes
    key: str
    version: int
    algorithm: Algorithm
    use: str
    records: UsePlaces


class LimitLeft(Result, frozen=True):
    """A limit of a grant: never more than `max` uses in any `window_s` seconds, counted `per` workload, key, principal or grant.

    `left` uses are left now; if none, there is one again in `retry_after` seconds.
    """

    grant: str
    max: int
    window_s: int
    per: str
    left: int
    retry_after: int = 0


class Stage(Result, frozen=True):
    """One stage of a quorum: how many people of which groups. `given`: the people whose approval counts now. `name`: `GRANT/NUMBER`."""

    name: str
    approvals: int
    of: tuple[str, ...]
    given: tuple[str, ...]
    is_open: bool


class Needs(Result, frozen=True):
    """What an operation needs. `not_before`: the end of a cool-off, RFC 3339; empty while an approval is missing."""

    stages: tuple[Stage, ...]
    not_before: str = ""


class Pending(Result, frozen=True):
    """A use that others have to approve first. `operation` is its ULID; `expires` RFC 3339."""

    operation: str
    needs: Needs
    expires: str


class GivenApproval(Result, frozen=True):
    """An approval or a refusal that was given. `counts`: whether it is worth something now. `record`: its index in the log."""

    verdict: Answer
    stage: str
    person: str
    approver: str
    given: str
    record: int
    counts: bool


class Operation(Result, frozen=True):
    """A use that waits, or waited, for approvals. Times are RFC 3339.

    Attributes:
        id: its ULID.
        state: `pending`, `ready` (to be redeemed, perhaps only from `not_before` on), `redeemed`, `refused` or `expired`.
        subject: what an approval is about, word for word.
        requested: when it was asked for.
        not_before: the end of a cool-off; empty where there is none.
        stages: what it needs.
        approvals: what was given, oldest first.
        person: whose identity we are, by the broker's grants; empty if nobody's.
        yours: names of the stages that we may approve now.
        use: ULID of the use that redeemed it; empty if there is none.
        record: index of the record of the request.
    """

    id: str
    state: str
    subject: Subject
    requested: str
    not_before: str
    stages: tuple[Stage, ...]
    approvals: tuple[GivenApproval, ...]
    person: str
    yours: tuple[str, ...]
    use: str
    record: int


class OperationPage(Result, frozen=True):
    """Operations, newest first. `mark` changes whenever one of them does: give it with `wait_s` to hear of the next change."""

    operations: tuple[Operation, ...]
    mark: str


class Freeze(Result, frozen=True):
    """One freeze. `kind` is `workload`, `key`, `token` or `everything`; `by` a SPIFFE ID; `since` RFC 3339."""

    id: str
    kind: str
    target: str
    reason: str
    by: str
    since: str


class Glass(Result, frozen=True):
    """One time that somebody broke the glass. `opened` and `until` are RFC 3339, `by` a SPIFFE ID."""

    id: str
    grant: str
    reason: str
    by: str
    opened: str
    until: str
    is_open: bool
    is_reviewed: bool


class PolicyVersion(Result, frozen=True):
    """One version of the rules. `base` is what a proposal has to name, `policy` the digest that stands in decisions."""

    revision: int
    base: str
    policy: str


class Policy(PolicyVersion, frozen=True):
    """The live rules: grant files by name. `since` is RFC 3339."""

    since: str
    files: dict[str, str]


class Explanation(Result, frozen=True):
    """The decision that a request would get. `policy` is a digest; `record` is where the question is on record."""

    allow: bool
    reasons: tuple[str, ...] = ()
    grants: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    policy: str = ""
    record: int = -1
    limits: tuple[LimitLeft, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """One leaf of the record.

    Attributes:
        raw: its bytes as stored: canonical JSON, the bytes that are hashed.
        fields: all of it, as plain values (docs/reference/record.md).
        index: position in the log.
        time: RFC 3339, UTC.
        kind: `intent`, `outcome`, `denial`, and so on.
        trail: the SPIFFE ID of the workload that it is about; empty for records about the broker itself.
        key: name of the key; empty where there is none.
        use: ULID of the use; empty where there is none.
        outcome: how the use ended; empty but for outcomes.
    """

    raw: bytes = field(repr=False)
    fields: dict[str, Any] = field(repr=False)
    index: int
    time: str
    kind: str
    trail: str
    key: str
    use: str
    outcome: str

    @classmethod
    def parse(cls, raw: bytes) -> Record:
        """A record from its bytes.

        Raises:
            msgspec.MsgspecError: not JSON, or not a record.
        """
        head = msgspec.json.decode(raw, type=_Head)
        fields = msgspec.json.decode(raw, type=dict[str, Any])
        return cls(raw, fields, head.index, head.time, head.kind, head.trail.id, head.key.name, head.use, head.outcome)


@dataclass(frozen=True, slots=True)
class RecordPage:
    """Some records, oldest first. `next` is the cursor of the next page; None at the end."""

    records: tuple[Record, ...]
    next: str | None


class _Trail(msgspec.Struct, frozen=True):
    id: str = ""


class _KeyHead(msgspec.Struct, frozen=True):
    name: str = ""


class _Head(msgspec.Struct, frozen=True):
    index: int
    time: str
    kind: str
    trail: _Trail
    key: _KeyHead
    use: str
    outcome: str
