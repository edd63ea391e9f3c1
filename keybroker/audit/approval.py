"""Approvals as bytes: statements, signed and verified (docs/reference/approvals.md). No I/O, no clock, no trust in any certificate.

Whether the key belongs to an approver is not decided here: `spki` must come from a chain that has been validated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec

from keybroker.audit import dsse
from keybroker.audit.dsse import EnvelopeError, PrivateKey
from keybroker.audit.leaf import canonical
from keybroker.model.approval import Statement, StatementError
from keybroker.model.decision import Obligation

PAYLOAD_TYPE = "application/vnd.keybroker.approval+json"
MAX_STATEMENT_BYTES = 16 * 1024

_decode = msgspec.json.Decoder(Statement).decode


class ApprovalError(ValueError):
    """This is no approval. `rule` is a stable name for what is wrong; nothing of the data is repeated."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


def signed(statement: Statement, key: PrivateKey) -> bytes:
    """The approval: the DSSE envelope of a statement, canonical JSON.

    Raises:
        ApprovalError: the statement would not be read by the other side, or the key signs no approvals.
    """
    payload = payload_of(statement)
    try:
        return dsse.signed(PAYLOAD_TYPE, payload, key)
    except EnvelopeError as err:
        raise ApprovalError(err.rule) from err


def verified(data: bytes, spki: bytes) -> Statement:
    """The statement that the holder of one key has signed.

    Args:
        data: the envelope.
        spki: the approver's public key, DER SubjectPublicKeyInfo, from a chain that has been validated.

    Raises:
        ApprovalError: names the rule.
    """
    try:
        payload = dsse.verified(data, PAYLOAD_TYPE, spki)
    except EnvelopeError as err:
        raise ApprovalError(err.rule) from err
    return _statement(payload)


def payload_of(statement: Statement) -> bytes:
    """Canonical JSON (RFC 8785) of a statement.

    Raises:
        ApprovalError: the statement would not be read by the other side.
    """
    try:
        payload = canonical(statement)
    except UnicodeError as err:  # a lone surrogate has no UTF-8 form
        raise ApprovalError("not-a-statement") from err
    if _statement(payload) != statement:
        raise ApprovalError("not-a-statement")
    return payload


def decision_digest(grants: Iterable[str], obligations: Iterable[Obligation]) -> str:
    """What an approval says about the rules: SHA-256 of the grants that matched and what they demand, lower-case hex.

    Their order does not matter, because obligations add up; and what did not apply is not in it, so that an edit elsewhere in the
    policy voids no approval. Nor are the people in it who may approve: who is one of them is asked anew whenever it matters, and
    somebody who joins or leaves voids nobody else's approval.
    """
    demanded = sorted((_demand(each) for each in obligations), key=lambda each: (each["grant"], canonical(each)))
    return hashlib.sha256(canonical({"grants": sorted(grants), "obligations": demanded})).hexdigest()


def _demand(obligation: Obligation) -> dict[str, Any]:
    stages = tuple(msgspec.structs.replace(each, people=()) for each in obligation.quorum)
    demand: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(obligation, quorum=stages))
    return demand


def _statement(payload: bytes) -> Statement:
    if len(payload) > MAX_STATEMENT_BYTES:
        raise ApprovalError("statement-too-large")
    try:
        statement = _decode(payload)
        is_canonical = canonical(statement) == payload  # a member twice, white space, another order, another spelling: all show here
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as err:
        raise ApprovalError("not-a-statement") from err
    if not is_canonical:
        raise ApprovalError("statement-not-canonical")
    try:
        statement.check()
    except StatementError as err:
        raise ApprovalError(err.rule) from err
    return statement
