"""What an approver signs: one person's verdict on one pending operation (docs/reference/approvals.md). The bytes are made in `audit/`.

The statement has two parts. The `subject` is what the authority says is pending: both sides compose it, and it must be equal. The
rest is what the approver adds.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from keybroker.clock import from_rfc3339, to_rfc3339
from keybroker.model.identity import SpiffeId, SpiffeIdError
from keybroker.model.key import KEY_NAME, Algorithm
from keybroker.model.request import MAX_MEDIA_TYPE_CHARACTERS, MAX_REASON_CHARACTERS

STATEMENT_VERSION: Final = 1
MAX_FIELDS = 64
MAX_FIELD_CHARACTERS = 1_024
SIGNING_KINDS = frozenset({"sign", "sign-digest"})

Answer = Literal["approve", "refuse"]
Confirmation = Literal["prompt", "yes-flag", "file"]
"""How the approver was asked: by a question on a terminal (`prompt`); the same after the digest of a file was found to be the one that is
approved (`file`); or not at all, because a flag or a program said yes (`yes-flag`)."""

_Word = Annotated[str, msgspec.Meta(pattern=r"\A[a-z][a-z0-9-]{0,63}\Z")]
_Line = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,512}\Z")]
_Origin = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,255}\Z")]
_Ulid = Annotated[str, msgspec.Meta(pattern=r"\A[0-7][0-9A-HJKMNP-TV-Z]{25}\Z")]
_Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Nonce = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
_Id = Annotated[str, msgspec.Meta(max_length=2_048)]
_Person = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Moment = Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z\Z")]
_FieldName = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,64}\Z")]
_FieldText = Annotated[str, msgspec.Meta(max_length=MAX_FIELD_CHARACTERS)]


class StatementError(ValueError):
    """These are not the parts of an approval statement. `rule` is a stable name for what is wrong; nothing of the data is repeated."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a statement. No member has a default: what is absent is the empty text, never missing."""


class SubjectOperation(_Part, frozen=True):
    """The pending operation. `kind` is the operation that policy decided on: `sign`, `sign-digest`, or one that changes the broker."""

    id: _Ulid
    kind: _Word


class SubjectKey(_Part, frozen=True):
    """The key version that would be used; empty (and 0) where no key is."""

    name: Annotated[str, msgspec.Meta(max_length=64)]
    version: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    spki_sha256: Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{64})?\Z")]


class SubjectDigest(_Part, frozen=True):
    """The digest that would be signed (for Ed25519 the SHA-512 of the message; for a change, of the change), lower-case hex."""

    hash: Literal["sha256", "sha384", "sha512"]
    value: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64,128}\Z")]


class SubjectContent(_Part, frozen=True):
    """What policy saw of the content: `type` is `message`, `digest` or that of a change; `size` is in bytes."""

    type: _Word
    size: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
    media_type: Annotated[str, msgspec.Meta(max_length=MAX_MEDIA_TYPE_CHARACTERS)]
    fields: Annotated[dict[_FieldName, _FieldText], msgspec.Meta(max_length=MAX_FIELDS)]


class Subject(_Part, frozen=True):
    """What is approved or refused.

    Attributes:
        log: origin of the broker's log, so that an approval for one broker is none for another.
        operation: which operation.
        workload: SPIFFE ID of the requester.
        key: the key version that would be used.
        algorithm: a JOSE name; empty where nothing is signed.
        tbs: the digest that would be signed.
        content: what policy saw of it.
        reason: the requester's own words.
        decision: SHA-256 of the grants and obligations that applied (`audit.approval.decision_digest`), lower-case hex.
        expires: when the operation ends, RFC 3339 in UTC with six decimals.
    """

    log: _Origin
    operation: SubjectOperation
    workload: _Id
    key: SubjectKey
    algorithm: Annotated[str, msgspec.Meta(max_length=16)]
    tbs: SubjectDigest
    content: SubjectContent
    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON_CHARACTERS)]
    decision: _Sha256
    expires: _Moment


class Statement(_Part, frozen=True):
    """One verdict on one subject.

    Attributes:
        subject: what it is about.
        verdict: `approve` or `refuse`.
        approver: SPIFFE ID of whoever signs.
        person: whose identity that is, by the grant files: people are counted, not identities.
        stage: which stage of which quorum, as the authority names it: `GRANT/NUMBER`.
        confirmed: how the approver was asked.
        issued: when it was signed, by the approver's clock; RFC 3339 in UTC with six decimals.
        expires: from when on it is void, by the broker's clock; not after the operation ends.
        nonce: 32 hex digits of randomness: no two statements are equal.
        v: version of the format, 1.
    """

    subject: Subject
    verdict: Answer
    approver: _Id
    person: _Person
    stage: _Line
    confirmed: Confirmation
    issued: _Moment
    expires: _Moment
    nonce: _Nonce
    v: Literal[1]

    def check(self) -> None:
        """Refuse what the types alone cannot.

        Raises:
            StatementError: names the rule.
        """
        subject = self.subject
        _check_id(self.approver, "approver-not-a-spiffe-id")
        _check_id(subject.workload, "workload-not-a-spiffe-id")
        for moment in (self.issued, self.expires, subject.expires):
            _check_moment(moment)
        if not self.issued < self.expires <= subject.expires:  # equal in form, so the order of the texts is that of the moments
            raise StatementError("times-out-of-order")
        _check_key(subject)
        if len(subject.tbs.value) * 4 != int(subject.tbs.hash[3:]):
            raise StatementError("digest-length")
        if not subject.content.media_type.isascii():
            raise StatementError("media-type-not-ascii")


def _check_id(text: str, rule: str) -> None:
    try:
        SpiffeId.parse(text)
    except SpiffeIdError as err:
        raise StatementError(rule) from err


def _check_moment(text: str) -> None:
    try:
        is_exact = to_rfc3339(from_rfc3339(text)) == text
    except ValueError as err:
        raise StatementError("not-a-time") from err
    if not is_exact:
        raise StatementError("not-a-time")


def _check_key(subject: Subject) -> None:
    key = subject.key
    if key.name and not (KEY_NAME.fullmatch(key.name) and key.version and key.spki_sha256):
        raise StatementError("key-incomplete")
    if not key.name and (key.version or key.spki_sha256):
        raise StatementError("key-incomplete")
    if subject.operation.kind not in SIGNING_KINDS:
        if subject.algorithm:
            raise StatementError("algorithm-without-signature")
        return
    if not key.name:
        raise StatementError("key-incomplete")
    try:
        algorithm = Algorithm(subject.algorithm)
    except ValueError as err:
        raise StatementError("algorithm-unknown") from err
    if subject.tbs.hash != algorithm.hash_name:
        raise StatementError("digest-of-another-algorithm")
