"""What answers look like in JSON: the HTTP contract, apart from the frames, which may change with the program.

Bytes are base64 (RFC 4648 section 4). Field order is the order on the wire.
"""

from __future__ import annotations

import msgspec

from keybroker.model import freeze as freezes
from keybroker.model.approval import Subject
from keybroker.model.call import (
    ApprovalView,
    ExplainReply,
    GlassView,
    KeyReply,
    OperationReply,
    OperationState,
    Pending,
    PolicyChanged,
    PolicyReply,
    Signed,
    StageView,
    WhoamiReply,
)


class Shape(msgspec.Struct, frozen=True):
    """A JSON object of which every member is always present."""


class ProblemPointer(Shape, frozen=True):
    """One fault: where (JSON pointer into the body; for a query parameter `/name`), and what is wrong there."""

    pointer: str
    detail: str


class ProblemDocument(msgspec.Struct, frozen=True, omit_defaults=True):
    """RFC 9457 problem details. `use` names the use of a key that is on record although nothing was released."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    errors: tuple[ProblemPointer, ...] = ()
    reasons: tuple[str, ...] = ()
    use: str = ""


class Whoami(Shape, frozen=True):
    """What the broker sees of the caller. `not_after` is RFC 3339, `svid_sha256` lower-case hex."""

    spiffe_id: str
    trust_domain: str
    svid_sha256: str
    not_after: str
    address: str
    networks: tuple[str, ...]
    roles: tuple[str, ...]
    evidence: tuple[str, ...]

    @classmethod
    def of(cls, reply: WhoamiReply) -> Whoami:
        """From the authority's reply."""
        return cls(**msgspec.structs.asdict(reply))


class KeyVersion(Shape, frozen=True):
    """One version of a key. `spki` is the public key, DER SubjectPublicKeyInfo; its hash is lower-case hex."""

    version: int
    family: str
    state: str
    spki: bytes
    spki_sha256: str


class Key(Shape, frozen=True):
    """One key; versions oldest first, the last enabled one signs."""

    name: str
    labels: dict[str, str]
    algorithms: tuple[str, ...]
    versions: tuple[KeyVersion, ...]

    @classmethod
    def of(cls, reply: KeyReply) -> Key:
        """From the authority's reply."""
        versions = tuple(KeyVersion(**msgspec.structs.asdict(version)) for version in reply.versions)
        return cls(reply.name, reply.labels, reply.algorithms, versions)


class Keys(Shape, frozen=True):
    """The keys that the caller may read."""

    keys: tuple[Key, ...]


class UsePlaces(Shape, frozen=True):
    """Where a use is on record: the log's origin, and the index of its intent and of its outcome."""

    log: str
    intent: int
    outcome: int


class SignedUse(Shape, frozen=True):
    """A released signature and where its use is on record."""

    signature: bytes
    key: str
    version: int
    algorithm: str
    use: str
    records: UsePlaces

    @classmethod
    def of(cls, reply: Signed) -> SignedUse:
        """From the authority's reply."""
        places = UsePlaces(reply.log, reply.intent, reply.outcome)
        return cls(reply.signature, reply.key, reply.version, reply.algorithm, reply.use, places)


class Stage(Shape, frozen=True):
    """One stage of a quorum: how many people of which groups, and whose approval counts now. `is_open`: it can be approved now."""

    name: str
    approvals: int
    of: tuple[str, ...]
    given: tuple[str, ...]
    is_open: bool

    @classmethod
    def seen(cls, view: StageView) -> Stage:
        """From a frame."""
        return cls(**msgspec.structs.asdict(view))


class Needs(Shape, frozen=True):
    """What an operation needs: all stages, and the end of the cool-off, empty while an approval is missing."""

    stages: tuple[Stage, ...]
    not_before: str


class PendingUse(Shape, frozen=True):
    """The answer 202: nothing is signed before others have approved it. `expires` is RFC 3339."""

    operation: str
    needs: Needs
    expires: str

    @classmethod
    def of(cls, reply: Pending) -> PendingUse:
        """From the authority's reply."""
        needs = Needs(tuple(Stage.seen(each) for each in reply.needs), reply.not_before)
        return cls(reply.operation, needs, reply.expires)


class Approval(Shape, frozen=True):
    """One approval or refusal that was given, the index of its record, and whether it counts now."""

    verdict: str
    stage: str
    person: str
    approver: str
    given: str
    record: int
    counts: bool

    @classmethod
    def seen(cls, view: ApprovalView) -> Approval:
        """From a frame."""
        return cls(**msgspec.structs.asdict(view))


class Operation(Shape, frozen=True):
    """One operation: what is to be done, what it needs, who has approved it.

    `subject` is what an approval is about, word for word. `person` is who the caller is, `yours` the stages that it may approve now.
    """

    id: str
    state: OperationState
    subject: Subject
    requested: str
    not_before: str
    stages: tuple[Stage, ...]
    approvals: tuple[Approval, ...]
    person: str
    yours: tuple[str, ...]
    use: str
    record: int

    @classmethod
    def of(cls, reply: OperationReply) -> Operation:
        """From the authority's reply."""
        parts = msgspec.structs.asdict(reply)
        parts["stages"] = tuple(Stage.seen(each) for each in reply.stages)
        parts["approvals"] = tuple(Approval.seen(each) for each in reply.approvals)
        return cls(**parts)


class Operations(Shape, frozen=True):
    """Operations, newest first. `mark`: give it with `wait` to hear of the next change."""

    operations: tuple[Operation, ...]
    mark: str


class BatchResults(Shape, frozen=True):
    """One answer or problem per item, in order."""

    results: tuple[SignedUse | PendingUse | ProblemDocument, ...]


class LimitLeft(Shape, frozen=True):
    """A limit of a grant, and how many units of it are left now. `retry_after` says in how many seconds there is one, 0 if there is."""

    grant: str
    max: int
    window_s: int
    per: str
    left: int
    retry_after: int


class Freeze(Shape, frozen=True):
    """One freeze. `kind` is `workload`, `key`, `token` or `everything`; `by` a SPIFFE ID; `since` RFC 3339."""

    id: str
    kind: str
    target: str
    reason: str
    by: str
    since: str

    @classmethod
    def of(cls, freeze: freezes.Freeze) -> Freeze:
        """From a frame."""
        return cls(**msgspec.structs.asdict(freeze))


class Freezes(Shape, frozen=True):
    """Freezes in force, oldest first."""

    freezes: tuple[Freeze, ...]


class Glass(Shape, frozen=True):
    """One time that somebody broke the glass. `opened` and `until` are RFC 3339, `by` a SPIFFE ID."""

    id: str
    grant: str
    reason: str
    by: str
    opened: str
    until: str
    is_open: bool
    is_reviewed: bool

    @classmethod
    def of(cls, view: GlassView) -> Glass:
        """From a frame."""
        return cls(**msgspec.structs.asdict(view))


class Glasses(Shape, frozen=True):
    """What has not been reviewed, oldest first."""

    glasses: tuple[Glass, ...]


class PolicyVersion(Shape, frozen=True):
    """One version of the rules. `base` is what a proposal has to name, `policy` the digest that stands in decisions."""

    revision: int
    base: str
    policy: str

    @classmethod
    def of(cls, reply: PolicyChanged) -> PolicyVersion:
        """From the authority's reply."""
        return cls(**msgspec.structs.asdict(reply))


class Policy(Shape, frozen=True):
    """The live rules: grant files by name. `since` is RFC 3339."""

    revision: int
    base: str
    policy: str
    since: str
    files: dict[str, str]

    @classmethod
    def of(cls, reply: PolicyReply) -> Policy:
        """From the authority's reply."""
        return cls(**msgspec.structs.asdict(reply))


class Explanation(Shape, frozen=True):
    """The decision that `sign` would get, what would still be needed, the index of the record of this question, and what is left."""

    allow: bool
    reasons: tuple[str, ...]
    grants: tuple[str, ...]
    policy: str
    needs: tuple[str, ...]
    record: int
    limits: tuple[LimitLeft, ...]

    @classmethod
    def of(cls, reply: ExplainReply) -> Explanation:
        """From the authority's reply."""
        limits = tuple(LimitLeft(**msgspec.structs.asdict(each)) for each in reply.limits)
        return cls(**msgspec.structs.asdict(reply) | {"limits": limits})
