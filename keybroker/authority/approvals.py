"""Does an approval count? Asked when it is given, and again whenever it is to be relied on. No I/O.

What an approval says is taken from the bytes that its approver has signed and from nowhere else, and is held against what the record says
was asked for: neither whoever carries it nor whoever keeps it can make one, or use one for something else. The approver's certificates are
judged as of the moment of signing, by the bundles and the deny list of now: an SVID that expires later voids nothing, an authority that is
not trusted any more does.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keybroker.audit.approval import ApprovalError, verified
from keybroker.audit.leaf import canonical, decode
from keybroker.authority.operations import Operation, Vote, is_own
from keybroker.clock import from_rfc3339
from keybroker.errors import (
    ApprovalExpiredError,
    ApprovalMismatchError,
    DeniedError,
    FrozenError,
    RefusalError,
    SelfApprovalError,
    SvidInvalidError,
)
from keybroker.model.approval import Statement, Subject
from keybroker.model.identity import Svid

CLOCK_SKEW_US = 5 * 60 * 1_000_000  # between an approver's clock and ours

_EXPIRED, _OWN, _NOT_A_MEMBER, _FROZEN = "statement-expired", "own-operation", "not-in-the-group", "approver-frozen"


class Chains(Protocol):
    """Whatever judges certificates."""

    def validate(self, chain: tuple[bytes, ...], as_of_us: int | None = None) -> Svid:
        """The identity that a chain proves, or proved then; raises SvidInvalidError."""
        ...


class People(Protocol):
    """Whatever knows who is who, by the rules that are live."""

    def person_of(self, spiffe_id: str) -> str:
        """The person behind an identity; empty if it is nobody's."""
        ...

    def people_of(self, groups: tuple[str, ...]) -> tuple[str, ...]:
        """Everybody in these groups."""
        ...


@dataclass(frozen=True, slots=True)
class Approval:
    """An approval or a refusal that is on record.

    Attributes:
        record: index of its record.
        given_us: when it was put there, microseconds since the epoch.
        envelope: what the approver signed, with the signature.
        chain: his certificates, DER, leaf first.
        approver: his SPIFFE ID, as the record has it: to be shown, not to be relied on; so are the next three.
    """

    record: int
    given_us: int
    envelope: bytes = field(repr=False)
    chain: tuple[bytes, ...] = field(repr=False)
    approver: str
    verdict: str
    stage: str
    person: str

    @classmethod
    def of_leaf(cls, record: int, leaf: bytes) -> Approval:
        """From the leaf of its record. Whatever is in there: what is no approval will not count."""
        found = decode(leaf)
        body = _object(found.get("body"))
        envelopes = found.get("approvals")
        chain = body.get("chain")
        return cls(
            record=record,
            given_us=from_rfc3339(str(found.get("time"))),
            envelope=canonical(envelopes[0]) if isinstance(envelopes, list) and envelopes else b"",
            chain=tuple(base64.b64decode(str(each)) for each in chain) if isinstance(chain, list) else (),
            approver=str(_object(found.get("trail")).get("id", "")),
            verdict=str(body.get("verdict", "")),
            stage=str(body.get("stage", "")),
            person=str(body.get("person", "")),
        )


class ApprovalJudge:
    """Judges approvals by the certificates, people and groups of now. A frozen identity approves nothing.

    Args:
        is_frozen: whether an identity is frozen now.
    """

    def __init__(self, chains: Chains, people: People, is_frozen: Callable[[str], bool] = lambda _: False) -> None:
        self._chains = chains
        self._people = people
        self._is_frozen = is_frozen

    def take(self, operation: Operation, chain: tuple[bytes, ...], envelope: bytes, now_us: int) -> Statement:
        """The statement of an approval or refusal that is being given.

        Args:
            chain: the caller's certificates, valid now.

        Raises:
            ApprovalMismatchError: it is none of this operation by this caller; `reasons` says what differs.
            SelfApprovalError: the caller has asked for the operation.
            DeniedError: the caller is not in the groups of that stage.
            ApprovalExpiredError: the statement is void already.
        """
        try:
            statement = _verified(envelope, _spki_of(chain))
        except ApprovalError as err:
            raise _refusal_of((err.rule,)) from err
        reasons = self._faults(operation, statement, chain, now_us)
        if reasons:
            raise _refusal_of(reasons)
        return statement

    def vote(self, operation: Operation, approval: Approval, now_us: int) -> tuple[Vote | None, tuple[str, ...]]:
        """What an approval on record is worth now: a vote, or nothing and why. A refusal is no vote, and there is nothing wrong with it."""
        try:
            statement = _verified(approval.envelope, _spki_of(approval.chain))
        except ApprovalError as err:
            return None, (err.rule,)
        if statement.verdict != "approve":
            return None, ()
        reasons = self._faults(operation, statement, approval.chain, now_us)
        if reasons:
            return None, reasons
        return Vote(statement.stage, statement.person, max(approval.given_us, from_rfc3339(statement.issued))), ()

    def _faults(self, operation: Operation, statement: Statement, chain: tuple[bytes, ...], now_us: int) -> tuple[str, ...]:
        """Why a statement does not count; nothing if it does."""
        return (
            _differences(statement.subject, operation.subject)
            or self._faults_of_signer(operation, statement, chain, now_us)
            or self._faults_of_person(operation, statement)
            or ((_EXPIRED,) if now_us >= from_rfc3339(statement.expires) else ())
        )

    def _faults_of_signer(self, operation: Operation, statement: Statement, chain: tuple[bytes, ...], now_us: int) -> tuple[str, ...]:
        issued_us = from_rfc3339(statement.issued)
        if not operation.requested_us - CLOCK_SKEW_US <= issued_us <= now_us + CLOCK_SKEW_US:
            return ("issued-at-another-time",)
        try:
            svid = self._chains.validate(chain, issued_us)
        except SvidInvalidError as err:
            return tuple(f"svid-{reason}" for reason in err.reasons)
        return () if svid.id.text == statement.approver else ("another-approver",)

    def _faults_of_person(self, operation: Operation, statement: Statement) -> tuple[str, ...]:
        if is_own(operation, statement.approver, self._people.person_of):
            return (_OWN,)
        if self._is_frozen(statement.approver):
            return (_FROZEN,)
        if self._people.person_of(statement.approver) != statement.person:
            return ("another-person",)
        groups = next((stage.of for stage in operation.stages if stage.name == statement.stage), None)
        if groups is None:
            return ("another-stage",)
        return () if statement.person in self._people.people_of(groups) else (_NOT_A_MEMBER,)


def _differences(said: Subject, known: Subject) -> tuple[str, ...]:
    """Which members of a subject are not those of the operation."""
    names = Subject.__struct_fields__
    return tuple(f"another-{name.replace('_', '-')}" for name in names if getattr(said, name) != getattr(known, name))


def _refusal_of(reasons: tuple[str, ...]) -> RefusalError:
    match reasons:
        case (only,) if only == _OWN:
            return SelfApprovalError("Nobody approves what he asked for himself.")
        case (only,) if only == _FROZEN:
            return FrozenError("Your identity is frozen.", reasons=("frozen-workload",))
        case (only,) if only == _NOT_A_MEMBER:
            return DeniedError("You are in none of the groups that this stage wants.", reasons=reasons)
        case (only,) if only == _EXPIRED:
            return ApprovalExpiredError("The approval has expired; sign a new one.")
        case _:
            return ApprovalMismatchError("This is not your approval of this operation.", reasons=reasons)


@functools.lru_cache(4_096)
def _verified(envelope: bytes, spki: bytes) -> Statement:
    """Depends on nothing but the bytes, so what was verified once need not be again."""
    return verified(envelope, spki)


@functools.lru_cache(1_024)
def _spki_of(chain: tuple[bytes, ...]) -> bytes:
    try:
        key = x509.load_der_x509_certificate(chain[0]).public_key()
        return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except Exception as err:  # whatever the library makes of bytes that are no certificate
        raise ApprovalError("not-a-certificate") from err


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
