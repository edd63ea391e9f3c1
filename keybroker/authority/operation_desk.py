"""Operations as people meet them: those who asked see what became of it, those who may approve see what they would approve, and do.

Nobody else learns that there is an operation. Who may approve is decided by the rules, by the same engine as everything else; whether an
approval counts, by its signature.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from dataclasses import dataclass

import msgspec

from keybroker.audit.leaf import canonical
from keybroker.authority.approvals import ApprovalJudge, Chains, People
from keybroker.authority.denials import Denials
from keybroker.authority.generation import Generation
from keybroker.authority.journal import Entry, Journal, StaleGenerationError
from keybroker.authority.keyring import Keyring
from keybroker.authority.operations import End, Operation, State, is_own
from keybroker.authority.quorum import Known, Quorum, stage_views
from keybroker.authority.service import Rules
from keybroker.authority.spending import Given, end_of, no_operation
from keybroker.authority.store.operation_tables import OperationRow
from keybroker.authority.timekeeper import Timekeeper
from keybroker.authority.uses import Asker, key_input
from keybroker.clock import to_rfc3339
from keybroker.errors import (
    DeniedError,
    OverloadedError,
    PolicyFailedError,
    PolicyUnavailableError,
    RefusalError,
    SelfApprovalError,
)
from keybroker.model.call import ApprovalView, Approve, ListOperations, OperationReply, OperationsReply, ShowOperation
from keybroker.model.decision import Decision, KeyInput, PolicyInput, TargetInput, Verdict
from keybroker.model.record import Draft, KeyFacts, RecordKind, Tbs

MAX_LISTED = 100
MAX_LOOKED_AT = 1_000  # the newest, of which those are shown that concern the caller
MAX_WAIT_SECONDS = 30
_MAX_DECISIONS = 3
_DENIED_BY = "denied-by:"


@dataclass(frozen=True, slots=True)
class _Question:
    """May the caller approve something? What the rules were asked, and what they said."""

    asked: bytes
    decision: Decision


class OperationDesk:
    """Lists, shows, and takes approvals."""

    def __init__(
        self,
        *,
        rules: Rules,
        people: People,
        chains: Chains,
        judge: ApprovalJudge,
        quorum: Quorum,
        keyring: Keyring,
        journal: Journal,
        denials: Denials,
        generation: Generation,
        timekeeper: Timekeeper,
    ) -> None:
        self._rules = rules
        self._people = people
        self._chains = chains
        self._judge = judge
        self._quorum = quorum
        self._keyring = keyring
        self._journal = journal
        self._denials = denials
        self._generation = generation
        self._timekeeper = timekeeper

    async def list_operations(self, asker: Asker, ask: ListOperations) -> OperationsReply:
        """What concerns the caller, newest first; with `wait_s`, when it is not what the caller knows already.

        Raises:
            RateLimitedError, OverloadedError: too many wait.
        """
        if not ask.wait_s:
            return await self._list(asker, ask)
        with self._quorum.changes.enter(asker.caller.id.text) as waiter:
            until = _until(ask.wait_s)
            while True:
                count = self._quorum.changes.count
                reply = await self._list(asker, ask)
                if reply.mark != ask.mark or not await waiter.wait(count, until):
                    return reply
                self._chains.validate(asker.chain)

    async def show(self, asker: Asker, ask: ShowOperation) -> OperationReply:
        """One operation; with `wait_s`, when it is not pending any more.

        Raises:
            NotFoundError: there is none, or it is none of the caller's: found out and said in the same way.
            PolicyUnavailableError, PolicyFailedError: the rules could not say.
            RateLimitedError, OverloadedError: too many wait.
        """
        if not ask.wait_s:
            return await self._show(asker, ask.operation)
        with self._quorum.changes.enter(asker.caller.id.text) as waiter:
            until = _until(ask.wait_s)
            while True:
                count = self._quorum.changes.count
                reply = await self._show(asker, ask.operation)
                if reply.state != State.PENDING.value or not await waiter.wait(count, until):
                    return reply
                self._chains.validate(asker.chain)

    async def approve(self, asker: Asker, ask: Approve) -> OperationReply:
        """Take an approval, or a refusal, which ends the operation. The same approval twice is one.

        Raises:
            NotFoundError: there is no such operation, or it is none of the caller's.
            SelfApprovalError, ApprovalMismatchError, DeniedError, ApprovalExpiredError, ApprovalConsumedError: it does not count.
            PolicyUnavailableError, PolicyFailedError: the rules could not say.
            RateLimitedError: the operation has as many as it may.
            AuditUnavailableError: it is not on record, so it does not count.
        """
        for _ in range(_MAX_DECISIONS):
            generation = self._generation.number
            self._chains.validate(asker.chain)
            known = self._quorum.find(ask.operation)
            question = await self._may_approve(asker, known.operation.target if known else _nothing())
            try:
                entry = self._approval(asker, known, question, ask.envelope, generation)
                if entry is not None:
                    await self._journal.write(entry)
                    self._quorum.changes.announce()
            except StaleGenerationError:
                continue
            except RefusalError as err:
                await self._deny(asker, ask.operation, question, err)
            return await self._show(asker, ask.operation)
        raise OverloadedError("The rules change too fast to decide.", retry_after=1)

    def stop_waiting(self) -> None:
        """Nobody waits for changes any more, from now on: the broker stops."""
        self._quorum.changes.close()

    async def require_requester(self, asker: Asker, operation: str) -> Known:
        """An operation that the caller asked for.

        Raises:
            NotFoundError: there is none, or it is none of the caller's.
            DeniedError: the caller may approve it, but it is another's to redeem.
        """
        known = self._quorum.find(operation)
        if known is not None and known.operation.requester == asker.caller.id.text:
            return known
        question = await self._may_approve(asker, known.operation.target if known else _nothing())
        refusal = _refusal_of(question.decision) or DeniedError("Only its requester redeems it.", reasons=("not-the-requester",))
        await self._deny(asker, operation, question, refusal)
        raise refusal

    def _approval(self, asker: Asker, known: Known | None, question: _Question, envelope: bytes, generation: int) -> Entry | None:
        """The record of an approval; None if there is one already that says the same.

        Raises:
            RefusalError: it does not count.
        """
        if known is not None and is_own(known.operation, asker.caller.id.text, self._people.person_of):
            raise SelfApprovalError("Nobody approves what he asked for himself.")
        refusal = _refusal_of(question.decision)
        if refusal is not None or known is None:
            raise refusal or no_operation()
        now_us = self._timekeeper.look().time_us
        statement = self._judge.take(known.operation, asker.chain, envelope, now_us)
        ended = end_of(known.end, known.operation.expires_us, now_us)
        if ended is not None:
            raise ended
        is_refusal = statement.verdict != "approve"
        if not is_refusal and not known.standing.may_be_approved(statement.stage):
            raise DeniedError("The stages before this one are not complete.", reasons=("stage-not-reached",))
        same = (statement.approver, statement.stage)
        if not is_refusal and any(each.vote and (each.approval.approver, each.approval.stage) == same for each in known.approvals):
            return None
        facts = _facts(known.operation)
        draft = Draft(
            kind=RecordKind.APPROVAL,
            trail=asker.caller.id.text,
            request=msgspec.Raw(question.asked),
            svid=asker.svid_facts(),
            key=facts.key,
            tbs=facts.tbs,
            decision=msgspec.Raw(question.decision.record),
            trace_id=asker.trace_id,
            operation_id=known.operation.id,
            approvals=(msgspec.Raw(envelope),),
            body={
                "request_id": asker.request_id,
                "verdict": statement.verdict,
                "stage": statement.stage,
                "person": statement.person,
                "chain": [base64.b64encode(each).decode() for each in asker.chain],
            },
        )
        return Entry(draft, generation=generation, effect=Given(known.operation.id, is_refusal))

    async def _may_approve(self, asker: Asker, target: TargetInput) -> _Question:
        entry = self._keyring.find(target.id) if target.kind == "key" else None
        key = key_input(entry.labels, entry.current) if entry and entry.current else KeyInput()
        asked = canonical(PolicyInput(caller=asker.policy_caller(), operation="approve", target=target, key=key))
        return _Question(asked, await self._rules.engine.decide(asked))

    async def _deny(self, asker: Asker, operation: str, question: _Question, refusal: RefusalError) -> None:
        """Record a refusal, then raise it."""
        draft = Draft(
            kind=RecordKind.DENIAL,
            trail=asker.caller.id.text,
            request=msgspec.Raw(question.asked),
            svid=asker.svid_facts(),
            decision=msgspec.Raw(question.decision.record),
            trace_id=asker.trace_id,
            operation_id=operation,
            body={"request_id": asker.request_id, "code": refusal.code},
        )
        await self._denials.write(draft, refusal.code)
        raise refusal

    async def _show(self, asker: Asker, operation: str) -> OperationReply:
        known = self._quorum.find(operation)
        question = await self._may_approve(asker, known.operation.target if known else _nothing())
        if known is not None and known.operation.requester == asker.caller.id.text:
            return self._view(asker, known, question)
        refusal = _refusal_of(question.decision)
        if refusal is not None or known is None:
            raise refusal or no_operation()
        return self._view(asker, known, question)

    async def _list(self, asker: Asker, ask: ListOperations) -> OperationsReply:
        now_us = self._timekeeper.look().time_us
        seen: dict[TargetInput, _Question] = {}
        rows: list[OperationRow] = []
        for row in self._newest(asker):
            target = TargetInput(row.target_kind, row.target_id, row.requester)
            if target not in seen:
                seen[target] = await self._may_approve(asker, target)
            is_mine = row.requester == asker.caller.id.text
            if (is_mine or seen[target].decision.verdict is Verdict.ALLOW) and _may_be_in(row, ask.state, now_us):
                rows.append(row)
        replies: list[OperationReply] = []
        for row in rows:
            known = self._quorum.find(row.id)
            if known is not None and ask.state in {"", known.standing.state.value}:
                replies.append(self._view(asker, known, seen[TargetInput(row.target_kind, row.target_id, row.requester)]))
            if len(replies) >= max(1, min(ask.limit, MAX_LISTED)):
                break
        return OperationsReply(tuple(replies), _mark(replies))

    def _newest(self, asker: Asker) -> list[OperationRow]:
        """The newest of all, and of the caller's own, each once."""
        own = self._quorum.newest(asker.caller.id.text, MAX_LISTED)
        found = {row.id: row for row in (*self._quorum.newest("", MAX_LOOKED_AT), *own)}
        return [found[each] for each in sorted(found, reverse=True)]

    def _view(self, asker: Asker, known: Known, question: _Question) -> OperationReply:
        made, held = known.operation, known.standing
        person = self._people.person_of(asker.caller.id.text)
        yours: list[str] = []
        if question.decision.verdict is Verdict.ALLOW and not is_own(made, asker.caller.id.text, self._people.person_of):
            spoken_for = {(each.stage.grant, name) for each in held.stages for name in each.people}
            yours = [
                each.stage.name
                for each in held.stages
                if held.may_be_approved(each.stage.name)
                and (each.stage.grant, person) not in spoken_for
                and person in self._people.people_of(each.stage.of)
            ]
        approvals = tuple(
            ApprovalView(
                verdict=each.approval.verdict,
                stage=each.approval.stage,
                person=each.approval.person,
                approver=each.approval.approver,
                given=to_rfc3339(each.approval.given_us),
                record=each.approval.record,
                counts=each.vote is not None,
            )
            for each in known.approvals
        )
        return OperationReply(
            id=made.id,
            state=held.state.value,
            subject=made.subject,
            requested=to_rfc3339(made.requested_us),
            not_before=to_rfc3339(held.not_before_us) if held.not_before_us else "",
            stages=stage_views(held),
            approvals=approvals,
            person=person,
            yours=tuple(yours),
            use=known.use,
            record=made.record,
        )


@dataclass(frozen=True, slots=True)
class _Facts:
    key: KeyFacts | None
    tbs: Tbs


def _facts(made: Operation) -> _Facts:
    """What the record of an approval says of what was approved."""
    key, tbs = made.subject.key, made.subject.tbs
    return _Facts(KeyFacts(key.name, key.version, key.spki_sha256) if key.name else None, Tbs(tbs.hash, tbs.value))


def _may_be_in(row: OperationRow, state: str, now_us: int) -> bool:
    """Whether an operation can be in a state, as far as its row tells: so that what is over is not looked at for what is not."""
    is_over = row.end is not End.NONE or now_us >= row.expires_us
    return not state or is_over == (state not in {State.PENDING.value, State.READY.value})


def _mark(replies: list[OperationReply]) -> str:
    said = "\n".join(f"{each.id} {each.state} {each.use} {' '.join(str(one.counts) for one in each.approvals)}" for each in replies)
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def _nothing() -> TargetInput:
    """What the rules are asked about where there is no operation: the way to a 404 is the same."""
    return TargetInput("key")


def _refusal_of(decision: Decision) -> RefusalError | None:
    """What somebody is told who would approve; None for an allow. Who is in no group learns nothing."""
    match decision.verdict:
        case Verdict.ALLOW:
            return None
        case Verdict.FAILED if PolicyUnavailableError.code in decision.reasons:
            return PolicyUnavailableError("The rules could not be asked in time.", retry_after=1)
        case Verdict.FAILED:
            return PolicyFailedError("The rules gave no usable answer.", retry_after=1)
        case Verdict.DENY if all(reason.startswith(_DENIED_BY) for reason in decision.reasons):
            return DeniedError("A rule keeps you from approving this.", reasons=decision.reasons)
        case Verdict.DENY:
            return no_operation()


def _until(wait_s: int) -> float:
    return asyncio.get_running_loop().time() + min(wait_s, MAX_WAIT_SECONDS)
