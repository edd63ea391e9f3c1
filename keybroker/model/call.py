"""Frames between the frontend and the authority: a call carries evidence of who asks and one ask; an answer carries one answer.

The frontend vouches for nothing but "TLS delivered this chain, from this address". The authority validates the chain itself.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from keybroker.errors import RefusalError
from keybroker.model.approval import Subject
from keybroker.model.freeze import Freeze, FreezeKind
from keybroker.model.glass import MAX_SECONDS
from keybroker.model.impact import Question
from keybroker.model.request import SignBody

MAX_FAILED_HANDSHAKES = 128


class Ask(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """The root of everything that a frontend may ask. Closed: a frame with any other tag is refused."""


class Whoami(Ask, frozen=True):
    """What the broker sees of the caller."""


class ListKeys(Ask, frozen=True):
    """The keys that the caller may read."""


class ShowKey(Ask, frozen=True):
    """One key and its versions."""

    key: str


class ListJwks(Ask, frozen=True):
    """The public keys that the caller may read."""


class Sign(Ask, frozen=True):
    """One use of one key."""

    key: str
    body: SignBody
    idempotency_key: str = ""


class SignBatch(Ask, frozen=True):
    """Up to 1,000 uses of one key. `body_sha256` is over the whole HTTP body, for the idempotency key."""

    key: str
    items: tuple[SignBody, ...]
    idempotency_key: str = ""
    body_sha256: bytes = b""


class Explain(Ask, frozen=True):
    """The decision that `Sign` would get; no key is used."""

    key: str
    body: SignBody


class ListOperations(Ask, frozen=True):
    """The operations that the caller asked for or may approve, newest first.

    Attributes:
        state: only those in it; empty for all.
        wait_s: wait so long for a list with another mark than `mark`; 0 answers at once.
        mark: of the list that the caller has; empty for none.
    """

    state: str = ""
    wait_s: int = 0
    mark: str = ""
    limit: int = 100


class ShowOperation(Ask, frozen=True):
    """One operation. With `wait_s`, the answer comes when it is not pending any more, or so many seconds later."""

    operation: str
    wait_s: int = 0


class Approve(Ask, frozen=True):
    """A signed approval or refusal: a DSSE envelope, JSON, exactly as the approver made it."""

    operation: str
    envelope: bytes


class Redeem(Ask, frozen=True):
    """Do what a complete quorum has approved, once. Ed25519 needs the message again: an operation keeps digests only."""

    operation: str
    message: bytes | None = None
    idempotency_key: str = ""


class AskFreeze(Ask, frozen=True):
    """Stop a workload, a key, a token or everything. `target` is empty for everything."""

    kind: FreezeKind
    target: str
    reason: str


class ListFreezes(Ask, frozen=True):
    """The freezes in force that the caller may see."""


class AskUnfreeze(Ask, frozen=True):
    """Lift one freeze, by its id. `operation`: that others have approved; empty the first time."""

    freeze: str
    operation: str = ""


class ShowPolicy(Ask, frozen=True):
    """The live rules, for whoever may propose others."""


class ProposePolicy(Ask, frozen=True):
    """Other rules in the place of the live ones. `base` is that of the rules that they were written for; `files` by name.

    Attributes:
        operation: that others have approved; empty the first time.
    """

    base: str
    files: dict[str, str]
    reason: str
    operation: str = ""


class BreakGlass(Ask, frozen=True):
    """Waive hours, limits and quorum of one grant for so many seconds."""

    grant: str
    seconds: Annotated[int, msgspec.Meta(ge=0, le=MAX_SECONDS)]
    reason: str


class ListGlasses(Ask, frozen=True):
    """What was opened and has not been reviewed."""


class CloseGlass(Ask, frozen=True):
    """End it; by somebody else than who opened it, this is the review."""

    glass: str
    note: str


class QueryRecords(Ask, frozen=True):
    """A page of the record, oldest first. Empty strings and 0 do not filter; times are microseconds since the epoch.

    Attributes:
        workload: a SPIFFE ID, or a pattern of them.
        key_version: with `key`.
        svid: serial number of the caller's certificate, lower-case hex.
        content: a content field, `NAME=VALUE`.
    """

    workload: str = ""
    key: str = ""
    principal: str = ""
    kind: str = ""
    outcome: str = ""
    use: str = ""
    key_version: int = 0
    algorithm: str = ""
    grant: str = ""
    svid: str = ""
    address: str = ""
    content: str = ""
    since_us: int = 0
    until_us: int = 0
    cursor: str = ""
    limit: int = 100


class AskImpact(Ask, frozen=True):
    """What an identity, a key, a certificate, a person or a time window did."""

    question: Question


class ShowRecord(Ask, frozen=True):
    """One record by its index in the log."""

    index: int


class ShowCheckpoint(Ask, frozen=True):
    """The newest signed checkpoint of the log."""


class ProveInclusion(Ask, frozen=True):
    """That a record is under the newest checkpoint: a proof file."""

    index: int


class ProveConsistency(Ask, frozen=True):
    """That the log under the newest checkpoint, or at `size` if that is not 0, begins with its first `old` records."""

    old: int
    size: int = 0


class ShowTile(Ask, frozen=True):
    """A tile, or a bundle of records, by its path after `tile/` (C2SP tlog-tiles)."""

    path: str


class ExportLog(Ask, frozen=True):
    """Part of an export: of the log from a record on, or of one workload's trail from its record of that number on."""

    start: int = 0
    workload: str = ""


class Health(Ask, frozen=True):
    """Can this broker sign? Asked for `/readyz`, on behalf of nobody."""


class Metrics(Ask, frozen=True):
    """The authority's metrics, asked for `/metrics`, on behalf of nobody."""


class HandshakesFailed(Ask, frozen=True):
    """TLS handshakes that failed or were not begun since the last time: (result, address, how many). Told on behalf of nobody."""

    counts: Annotated[tuple[tuple[str, str, Annotated[int, msgspec.Meta(ge=1)]], ...], msgspec.Meta(max_length=MAX_FAILED_HANDSHAKES)]


AnyAsk = (
    Whoami
    | ListKeys
    | ShowKey
    | ListJwks
    | Sign
    | SignBatch
    | Explain
    | ListOperations
    | ShowOperation
    | Approve
    | Redeem
    | AskFreeze
    | ListFreezes
    | AskUnfreeze
    | ShowPolicy
    | ProposePolicy
    | BreakGlass
    | ListGlasses
    | CloseGlass
    | QueryRecords
    | AskImpact
    | ShowRecord
    | Health
    | Metrics
    | HandshakesFailed
    | ShowCheckpoint
    | ProveInclusion
    | ProveConsistency
    | ShowTile
    | ExportLog
)


class Call(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One ask.

    Attributes:
        id: pairs the answer with the call on one connection.
        chain: the client's certificates as TLS delivered them, DER, leaf first; empty for Health and Metrics.
        address: the client's IP address.
        traceparent: W3C trace context, or empty.
        request_id: a ULID; the `instance` of a problem.
        proof: room for a proof signed by the caller; empty until there is one.
    """

    id: int
    ask: AnyAsk
    chain: tuple[bytes, ...] = ()
    address: str = ""
    traceparent: str = ""
    request_id: str = ""
    proof: bytes = b""


class Reply(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """The root of everything that the authority may answer."""


class Problem(Reply, frozen=True):
    """A refusal: the parts of a `RefusalError`, by code. `use` names the use where an intent was recorded."""

    code: str
    detail: str
    pointers: tuple[tuple[str, str], ...] = ()
    reasons: tuple[str, ...] = ()
    retry_after: int = 0
    use: str = ""

    @classmethod
    def of(cls, err: RefusalError) -> Problem:
        """A refusal as a frame."""
        return cls(err.code, err.detail, err.pointers, err.reasons, err.retry_after, err.use)


class WhoamiReply(Reply, frozen=True):
    """What the broker sees. Times are RFC 3339."""

    spiffe_id: str
    trust_domain: str
    svid_sha256: str
    not_after: str
    address: str
    networks: tuple[str, ...]
    roles: tuple[str, ...]
    evidence: tuple[str, ...] = ()


class PublicVersion(msgspec.Struct, frozen=True, array_like=True):
    """One version of a key, as anyone who may read it sees it. `spki` is DER."""

    version: int
    family: str
    state: str
    spki: bytes
    spki_sha256: str


class KeyReply(Reply, frozen=True):
    """One key; versions oldest first, the last enabled one signs."""

    name: str
    labels: dict[str, str]
    algorithms: tuple[str, ...]
    versions: tuple[PublicVersion, ...]


class KeysReply(Reply, frozen=True):
    """The keys that the caller may read."""

    keys: tuple[KeyReply, ...]


class UseReply(Reply, frozen=True):
    """What comes of asking for a use of a key, or for a change, if nothing stands against it: that it is done, or that it waits."""


class Signed(UseReply, frozen=True):
    """A released signature and where its use is on record."""

    signature: bytes
    key: str
    version: int
    algorithm: str
    use: str
    log: str
    intent: int
    outcome: int


class StageView(msgspec.Struct, frozen=True, array_like=True):
    """One stage of a quorum. Stages of one grant come one after another; those of several grants do not wait for each other.

    Attributes:
        name: `GRANT/NUMBER`; an approval names it.
        approvals: how many people it takes.
        of: groups; a member of any of them may approve.
        given: the people whose approval counts now.
        is_open: whether an approval of this stage would be taken now.
    """

    name: str
    approvals: int
    of: tuple[str, ...]
    given: tuple[str, ...]
    is_open: bool


class Pending(UseReply, frozen=True):
    """Nothing is done yet: others have to approve it, or the cool-off is not over. Times are RFC 3339.

    Attributes:
        expires: when the operation ends.
        not_before: when the cool-off is over; empty while an approval is missing.
    """

    operation: str
    needs: tuple[StageView, ...]
    expires: str
    not_before: str


class ApprovalView(msgspec.Struct, frozen=True, array_like=True):
    """One approval or refusal that was given. `verdict` is `approve` or `refuse`; `record` is its index in the log."""

    verdict: str
    stage: str
    person: str
    approver: str
    given: str
    record: int
    counts: bool


OperationState = Literal["pending", "ready", "redeemed", "refused", "expired"]


class OperationReply(Reply, frozen=True):
    """One operation, as its requester and its approvers see it. Times are RFC 3339.

    Attributes:
        state: `ready` when the quorum is complete, though perhaps not cooled off.
        subject: what an approval is about, word for word.
        requested: when.
        not_before: of a redemption, because of a cool-off; empty while the quorum is not complete.
        stages: what it needs.
        approvals: what was given, oldest first. Each has `counts`: false for a refusal, and for an approval that is worth nothing
            any more, because the approver was removed, denied or replaced.
        person: whose identity the caller's is, by the grant files; empty if nobody's.
        yours: names of the stages that the caller may approve now.
        use: ULID of the use that redeemed it; empty if there is none.
        record: index of the record of the request.
    """

    id: str
    state: OperationState
    subject: Subject
    requested: str
    not_before: str
    stages: tuple[StageView, ...]
    approvals: tuple[ApprovalView, ...]
    person: str
    yours: tuple[str, ...]
    use: str
    record: int


class OperationsReply(Reply, frozen=True):
    """Operations, newest first. `mark` changes whenever one of the caller's operations does."""

    operations: tuple[OperationReply, ...]
    mark: str


class BatchReply(Reply, frozen=True):
    """One answer per item, in order."""

    results: tuple[Signed | Pending | Problem, ...]


class LimitLeft(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A limit of a grant, and how many units of it are left now. `retry_after` says in how many seconds there is one, 0 if there is."""

    grant: str
    max: int
    window_s: int
    per: str
    left: int
    retry_after: int


class ExplainReply(Reply, frozen=True):
    """The decision, what would still be needed, and what is left of limits."""

    allow: bool
    reasons: tuple[str, ...]
    grants: tuple[str, ...]
    policy: str
    needs: tuple[str, ...]
    record: int
    limits: tuple[LimitLeft, ...] = ()


class RecordsReply(Reply, frozen=True):
    """Leaves exactly as stored: canonical JSON. `next` is the cursor of the next page, empty at the end."""

    records: tuple[bytes, ...]
    next: str


class FreezeReply(UseReply, frozen=True):
    """A freeze that is in force now, or that has just been lifted."""

    freeze: Freeze


class FreezesReply(Reply, frozen=True):
    """Freezes in force, oldest first."""

    freezes: tuple[Freeze, ...]


class PolicyReply(Reply, frozen=True):
    """The live rules.

    Attributes:
        base: what a proposal has to name.
        policy: the digest that stands in decisions.
        since: RFC 3339.
    """

    revision: int
    base: str
    policy: str
    since: str
    files: dict[str, str]


class PolicyChanged(UseReply, frozen=True):
    """Other rules are in force now."""

    revision: int
    base: str
    policy: str


class GlassView(msgspec.Struct, frozen=True, array_like=True):
    """One time that somebody broke the glass. Times are RFC 3339."""

    id: str
    grant: str
    reason: str
    by: str
    opened: str
    until: str
    is_open: bool
    is_reviewed: bool


class GlassReply(Reply, frozen=True):
    """As it is now."""

    glass: GlassView


class GlassesReply(Reply, frozen=True):
    """What has not been reviewed, oldest first."""

    glasses: tuple[GlassView, ...]


class LogReply(Reply, frozen=True):
    """Bytes for whoever verifies, and what they are (a media type)."""

    content: bytes
    media_type: str


class HealthReply(Reply, frozen=True):
    """`ready` says whether this broker can sign now; `parts` says what each part thinks of itself, in words."""

    ready: bool
    parts: dict[str, str]


class MetricsReply(Reply, frozen=True):
    """Prometheus text format."""

    text: bytes


class Noted(Reply, frozen=True):
    """It was heard."""


AnyReply = (
    Problem
    | WhoamiReply
    | KeyReply
    | KeysReply
    | Signed
    | Pending
    | BatchReply
    | ExplainReply
    | OperationReply
    | OperationsReply
    | FreezeReply
    | FreezesReply
    | PolicyReply
    | PolicyChanged
    | GlassReply
    | GlassesReply
    | RecordsReply
    | LogReply
    | HealthReply
    | MetricsReply
    | Noted
)


class Answer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One reply to the call with the same id."""

    id: int
    reply: AnyReply


MAX_CALL_BYTES = 4 * 1024 * 1024  # 1 MiB of batch, its chain, and room to spare
MAX_ANSWER_BYTES = 16 * 1024 * 1024  # a page of records is cut at 8 MiB
MAX_CHAIN_CERTIFICATES = 8
MAX_CHAIN_BYTES = 64 * 1024
