"""What becomes durable together with a record that is about an operation: it was asked for, approved or refused, or it is spent.

Each is judged once more in the transaction that writes it, with what has been written before it: so of two redemptions, or of a redemption
and a refusal, whichever comes second is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from keybroker.authority.operations import End
from keybroker.authority.store.operation_tables import OperationRow, OperationTables
from keybroker.errors import (
    ApprovalConsumedError,
    ApprovalExpiredError,
    DeniedError,
    NotFoundError,
    RateLimitedError,
    RefusalError,
)

MAX_LIVE = 100  # operations of one workload that wait
MAX_APPROVALS = 64  # of one operation, refusals and those that count no more included
REFUSED = "refused"  # the reason why nobody may go on with an operation that somebody has refused


@dataclass(frozen=True, slots=True)
class Asked:
    """An operation begins."""

    operation: str
    requester: str
    target_kind: str
    target_id: str
    expires_us: int

    def refusal(self, tables: OperationTables, now_us: int) -> RefusalError | None:
        """Why it cannot be written; None if it can."""
        if tables.live(self.requester, now_us) >= MAX_LIVE:
            return RateLimitedError(f"{MAX_LIVE} operations of yours wait already; redeem them or let them expire.", retry_after=60)
        return None

    def apply(self, tables: OperationTables, record: int) -> None:
        """Write it."""
        tables.add(OperationRow(self.operation, self.requester, self.target_kind, self.target_id, record, self.expires_us, 0, End.NONE, ""))


@dataclass(frozen=True, slots=True)
class Given:
    """An approval, or a refusal, which ends the operation."""

    operation: str
    is_refusal: bool

    def refusal(self, tables: OperationTables, now_us: int) -> RefusalError | None:
        """Why it cannot be written; None if it can."""
        row = tables.find(self.operation)
        if row is None:
            return no_operation()
        if tables.approvals(self.operation) >= MAX_APPROVALS:
            return RateLimitedError(f"This operation has {MAX_APPROVALS} approvals already.", retry_after=3600)
        return end_of(row.end, row.expires_us, now_us)

    def apply(self, tables: OperationTables, record: int) -> None:
        """Write it."""
        tables.approved(self.operation, record)
        if self.is_refusal:
            tables.refuse(self.operation)


@dataclass(frozen=True, slots=True)
class Spent:
    """An intent uses the operation up: once, or once more where the use `retry_of` has released nothing."""

    operation: str
    retry_of: str
    use: str

    def refusal(self, tables: OperationTables, now_us: int) -> RefusalError | None:
        """Why it cannot be written; None if it can."""
        row = tables.find(self.operation)
        if row is None:
            return no_operation()
        if not self.retry_of:
            return end_of(row.end, row.expires_us, now_us)
        if row.end is not End.REDEEMED or not tables.may_be_tried_again(self.operation, self.retry_of):
            return _consumed()
        return end_of(End.NONE, row.expires_us, now_us)

    def apply(self, tables: OperationTables, record: int) -> None:
        """Write it."""
        del record
        tables.spend(self.operation, self.retry_of, self.use)


Effect = Asked | Given | Spent


def end_of(end: End, expires_us: int, now_us: int) -> RefusalError | None:
    """Why nobody can go on with an operation; None if one can."""
    match end:
        case End.REDEEMED:
            return _consumed()
        case End.REFUSED:
            return DeniedError("An approver has refused this operation.", reasons=(REFUSED,))
        case End.NONE if now_us >= expires_us:
            return ApprovalExpiredError("The operation was not approved and redeemed in time; ask for a new one.")
        case End.NONE:
            return None


def no_operation() -> NotFoundError:
    """What everybody is told of an operation that is none of his, whether there is one or not."""
    return NotFoundError("There is no such operation, or it is none of yours.")


def _consumed() -> ApprovalConsumedError:
    return ApprovalConsumedError("The operation has been redeemed; ask for a new one.")
