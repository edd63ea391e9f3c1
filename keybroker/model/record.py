"""The audit record: one leaf of the log (docs/reference/record.md). Only the shape; the bytes are made in `audit/`."""

from __future__ import annotations

import enum
from typing import Any

import msgspec

RECORD_VERSION = 1
MAX_LEAF_BYTES = 65_535


class RecordKind(enum.Enum):
    """What a record is about."""

    START = "start"
    INTENT = "intent"
    OUTCOME = "outcome"
    DENIAL = "denial"
    OPERATION = "operation"
    APPROVAL = "approval"
    READ = "read"
    SECURITY = "security"
    ADMIN = "admin"
    FREEZE = "freeze"
    HEADS = "heads"


class Outcome(enum.Enum):
    """How a use ended."""

    SIGNED = "signed"
    FAILED = "failed"  # no good signature exists: no token was asked, it said no, or what it made did not verify
    WITHHELD = "withheld"  # the use would now be refused, so the token was not asked, or what it made was destroyed
    UNKNOWN = "unknown"  # the token may have signed; nothing was released


class SvidFacts(msgspec.Struct, frozen=True):
    """The caller's certificate. `not_after` is RFC 3339."""

    sha256: str
    serial: str
    not_after: str
    address: str


class KeyFacts(msgspec.Struct, frozen=True):
    """The key version that was used."""

    name: str
    version: int
    spki_sha256: str


class Tbs(msgspec.Struct, frozen=True):
    """The digest that is signed (for Ed25519 the SHA-512 of the message), lower-case hex."""

    hash: str
    value: str


class TokenFacts(msgspec.Struct, frozen=True):
    """The PKCS#11 token that was asked."""

    serial: str
    label: str


class TrailFacts(msgspec.Struct, frozen=True):
    """The per-workload chain: `previous` is the leaf hash of the record before in this trail, empty for the first."""

    id: str
    index: int
    previous: str


EMPTY = msgspec.Raw(b"{}")


class Draft(msgspec.Struct, frozen=True):
    """A record before it has a place in the log: what the one who asks for it knows.

    Attributes:
        trail: the SPIFFE ID whose trail this belongs to; empty for records about the broker itself.
        request: canonical JSON of the policy input.
        decision: canonical JSON of the decision.
        taken: units of limits.
        operation_id: ULID of the operation that this is about; empty if there is none.
        approvals: signed statements, each a DSSE envelope in canonical JSON.
    """

    kind: RecordKind
    trail: str = ""
    use: str = ""
    retry_of: str = ""
    request: msgspec.Raw = EMPTY
    svid: SvidFacts | None = None
    key: KeyFacts | None = None
    tbs: Tbs | None = None
    decision: msgspec.Raw = EMPTY
    outcome: Outcome | None = None
    signature_sha256: str = ""
    token: TokenFacts | None = None
    trace_id: str = ""
    taken: tuple[dict[str, Any], ...] = ()
    operation_id: str = ""
    approvals: tuple[msgspec.Raw, ...] = ()
    body: dict[str, Any] = {}
