"""What one person may not do alone: an act that others approve, and that is done when its requester asks for it once more."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import msgspec

from keybroker.authority.acts import Act
from keybroker.authority.generation import Generation
from keybroker.authority.journal import Entry, Journal, StaleGenerationError
from keybroker.authority.quorum import Quorum, Settled, binding
from keybroker.authority.spending import no_operation
from keybroker.errors import ApprovalMismatchError, OverloadedError
from keybroker.model.call import Pending
from keybroker.model.decision import Decision
from keybroker.model.record import Draft


class Others:
    """Asks others, where the rules want that, and sees to it that what they have approved is done once."""

    def __init__(self, quorum: Quorum, journal: Journal, generation: Generation) -> None:
        self._quorum = quorum
        self._journal = journal
        self._generation = generation

    @property
    def generation(self) -> int:
        """To be read before the rules are asked: what is written under another one is refused."""
        return self._generation.number

    def are_wanted(self, decision: Decision) -> bool:
        """Whether the rules want others to approve."""
        return bool(binding(decision.obligations))

    async def ask(self, act: Act, decision: Decision, generation: int) -> Pending:
        """Put an operation on record that others have to approve.

        Raises:
            RateLimitedError, InvalidError, AuditUnavailableError: it is not on record.
            OverloadedError: the rules have just changed.
        """
        try:
            return await self._quorum.ask(act, decision, generation, None)
        except StaleGenerationError as err:
            raise _changed() from err

    def settle(self, act: Act, decision: Decision, operation: str) -> Settled | Pending:
        """The approvals of a complete quorum, or what is missing.

        Raises:
            NotFoundError: there is no such operation, or it is another's.
            ApprovalMismatchError: it is about another act.
            ApprovalConsumedError, ApprovalExpiredError, ApprovalStaleError, DeniedError: it is worth nothing any more.
        """
        known = self._quorum.find(operation)
        if known is None or known.operation.requester != act.asker.caller.id.text:
            raise no_operation()
        subject = known.operation.subject
        if (subject.operation.kind, subject.tbs.value) != (act.operation, act.digest.hex()):
            raise ApprovalMismatchError("This operation is about something else.", reasons=("another-change",))
        return self._quorum.settle(operation, act, decision, "")

    async def write(self, draft: Draft, settled: Settled | None, generation: int, also: Callable[[sqlite3.Connection], None]) -> int:
        """Put an act on record, with what it changes in the store, and spend the approvals that it needed: all of it or nothing.

        Raises:
            ApprovalConsumedError and others: the approvals were spent meanwhile.
            OverloadedError: the rules have just changed.
            AuditUnavailableError: nothing was written.
        """
        entry = Entry(draft, generation=generation, also=also)
        if settled is not None:
            draft = msgspec.structs.replace(draft, operation_id=settled.operation, approvals=settled.approvals)
            entry = Entry(draft, generation=generation, also=also, effect=settled.spend(settled.operation, ""))
        try:
            index = await self._journal.write(entry)
        except StaleGenerationError as err:
            raise _changed() from err
        if settled is not None:
            self._quorum.changes.announce()
        return index


def _changed() -> OverloadedError:
    return OverloadedError("The rules have just changed; try again.", retry_after=1)
