"""What answers look like in JSON: the HTTP contract, apart from the frames, which may change with the program.

Bytes are base64 (RFC 4648 section 4). Field order is the order on the wire.
"""

from __future__ import annotations

import msgspec

from keybroker.model.call import ExplainReply, KeyReply, Signed, WhoamiReply


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


class BatchResults(Shape, frozen=True):
    """One answer or problem per item, in order."""

    results: tuple[SignedUse | ProblemDocument, ...]


class LimitLeft(Shape, frozen=True):
    """A limit of a grant, and how many units of it are left now. `retry_after` says in how many seconds there is one, 0 if there is."""

    grant: str
    max: int
    window_s: int
    per: str
    left: int
    retry_after: int


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
