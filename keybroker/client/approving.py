"""What an approver's program does: a statement about an operation that was looked at, signed with our own SVID's key. No network."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from keybroker.audit import approval
from keybroker.audit.approval import ApprovalError
from keybroker.client.errors import BrokerAnswerError, NothingToApproveError
from keybroker.client.results import Operation
from keybroker.clock import Clock, SystemClock, to_rfc3339
from keybroker.errors import ConfigError
from keybroker.identity.svid_file import SvidFile
from keybroker.model.approval import STATEMENT_VERSION, Answer, Confirmation, Statement
from keybroker.model.identity import SpiffeId

_NONCE_BYTES = 16
_CLOCK = SystemClock()


def statements(
    operation: Operation, approver: SpiffeId, verdict: Answer, confirmed: Confirmation, stages: Sequence[str] = (), clock: Clock = _CLOCK
) -> tuple[Statement, ...]:
    """What there is to sign: one statement for each stage that waits for us; for a refusal one, because one ends the operation.

    Args:
        operation: as the broker showed it.
        approver: our SPIFFE ID.
        verdict: `approve` or `refuse`.
        confirmed: how the approver was asked.
        stages: only these; all that wait for us if empty.
        clock: says when.

    Raises:
        NothingToApproveError: no stage waits for us, or not one of those that are named.
    """
    waiting = tuple(each for each in operation.yours if not stages or each in stages)
    if not waiting or not set(stages) <= set(waiting):
        raise NothingToApproveError(f"operation {operation.id} does not wait for you{_why(operation)}")
    return tuple(
        Statement(
            subject=operation.subject,
            verdict=verdict,
            approver=approver.text,
            person=operation.person,
            stage=stage,
            confirmed=confirmed,
            issued=to_rfc3339(clock.now_us()),
            expires=operation.subject.expires,
            nonce=secrets.token_hex(_NONCE_BYTES),
            v=STATEMENT_VERSION,
        )
        for stage in (waiting if verdict == "approve" else waiting[:1])
    )


def approver_of(svid: Path) -> SpiffeId:
    """Whose SVID this is.

    Raises:
        ConfigError: the file cannot be used.
    """
    return SvidFile.load(svid).id


def signed(statement: Statement, svid: Path) -> bytes:
    """A statement, signed with the key of our SVID as it is now.

    Raises:
        ConfigError: the SVID cannot be used, or is another's by now.
        NothingToApproveError: our clock is past the operation's end.
        BrokerAnswerError: what the broker showed is no subject of a statement.
    """
    file, key = SvidFile.load_with_key(svid)
    if file.id.text != statement.approver:
        raise ConfigError(f"{svid}: is {file.id}'s by now; look at the operation again")
    try:
        return approval.signed(statement, key)
    except ApprovalError as err:
        if err.rule == "times-out-of-order":
            raise NothingToApproveError("by the clock of this host the operation has ended") from err
        raise BrokerAnswerError(f"what the broker shows is nothing that can be approved ({err.rule})") from err


def _why(operation: Operation) -> str:
    if operation.state != "pending":
        return f": it is {operation.state}"
    if not operation.person:
        return ": by the broker's grants, your identity is nobody's"
    if any(each.person == operation.person and each.counts for each in operation.approvals):
        return ": you have approved it"
    return ""
