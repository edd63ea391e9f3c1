"""What stands between a decision that demands approvals and its intent: an operation that waits, and whether it may be redeemed.

The operation is read from the record each time, and its approvals are judged each time, by the rules, bundles and deny list of that
moment. Nothing about a quorum is kept in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import msgspec
from ulid import ULID

from keybroker.audit.approval import decision_digest
from keybroker.audit.leaf import decode
from keybroker.authority.approvals import Approval, ApprovalJudge, People
from keybroker.authority.changes import Changes
from keybroker.authority.journal import Claim, Entry, Journal
from keybroker.authority.operations import End, Operation, Stage, Standing, State, Vote, stages_of, standing
from keybroker.authority.security_events import SecurityEvents
from keybroker.authority.spending import Asked, Spent, end_of
from keybroker.authority.store.operation_tables import OperationRow
from keybroker.authority.store.reader import Reader, StoredOperation
from keybroker.authority.timekeeper import Timekeeper
from keybroker.authority.uses import Asker
from keybroker.clock import from_rfc3339, to_rfc3339
from keybroker.errors import ApprovalStaleError, ClockUntrustedError, InvalidError, RefusalError
from keybroker.model.approval import Subject, SubjectContent, SubjectDigest, SubjectKey, SubjectOperation
from keybroker.model.call import Pending, StageView
from keybroker.model.decision import ContentInput, Decision, Obligation
from keybroker.model.record import Draft, KeyFacts, RecordKind

MAX_STATEMENT_CHARACTERS = 30_000  # of all approvals of an operation together: they stand in the record of its intent, which is bounded

_pack = msgspec.msgpack.Encoder().encode


class Request(Protocol):
    """What others have to approve: one use of a key, or one change of the broker itself."""

    @property
    def asker(self) -> Asker:
        """Who asks."""
        ...

    @property
    def operation(self) -> str:
        """As policy calls it."""
        ...

    @property
    def content(self) -> ContentInput:
        """What policy sees of it."""
        ...

    @property
    def algorithm(self) -> str:
        """A JOSE name; empty where nothing is signed."""
        ...

    @property
    def hash_name(self) -> str:
        """Of the digest."""
        ...

    @property
    def digest(self) -> bytes:
        """What is signed, or the digest of the change."""
        ...

    @property
    def reason(self) -> str:
        """As the requester gives it."""
        ...

    @property
    def format(self) -> str:
        """Of a signature; empty where there is no choice."""
        ...

    def key_facts(self) -> KeyFacts | None:
        """The key version that would be used, if any."""
        ...

    def draft(self, kind: RecordKind, decision: Decision) -> Draft:
        """A record of it."""
        ...


class Body(msgspec.Struct, frozen=True):
    """What the record of an operation holds beyond the request and the decision: enough to know the operation by."""

    request_id: str
    subject: Subject
    person: str
    stages: tuple[Stage, ...]
    cool_off_s: int
    format: str


class _Leaf(msgspec.Struct, frozen=True):
    body: Body


@dataclass(frozen=True, slots=True)
class Judged:
    """An approval or refusal on record, and what it is worth now. `vote` is None for what does not count, and `reasons` says why."""

    approval: Approval
    vote: Vote | None
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """An operation as it stands now."""

    operation: Operation
    end: End
    use: str
    approvals: tuple[Judged, ...]
    standing: Standing


@dataclass(frozen=True, slots=True)
class Settled:
    """A complete quorum, to be spent by an intent: the approvals that count, as they were signed."""

    operation: str
    approvals: tuple[msgspec.Raw, ...]

    def spend(self, use: str, retry_of: str) -> Spent:
        """What the intent does to the operation."""
        return Spent(self.operation, retry_of, use)


class Quorum:
    """Begins operations, and says how they stand.

    Args:
        reader: used on the event loop.
    """

    def __init__(
        self,
        *,
        judge: ApprovalJudge,
        people: People,
        journal: Journal,
        reader: Reader,
        security: SecurityEvents,
        timekeeper: Timekeeper,
    ) -> None:
        self._judge = judge
        self._people = people
        self._journal = journal
        self._reader = reader
        self._security = security
        self._timekeeper = timekeeper
        self.changes = Changes()

    def find(self, operation: str) -> Known | None:
        """One operation, or None."""
        stored = self._reader.operation(operation)
        return self._known(stored) if stored else None

    def newest(self, requester: str, limit: int) -> list[OperationRow]:
        """The newest operations of one requester; of everybody, if empty."""
        return self._reader.operations(requester, limit)

    def waiting(self) -> int:
        """How many operations have neither ended nor expired."""
        return self._reader.live_operations(self._timekeeper.look().time_us)

    async def ask(self, request: Request, decision: Decision, generation: int, claim: Claim | None) -> Pending:
        """Put an operation on record.

        Raises:
            ClockUntrustedError: nobody knows when it would end.
            RateLimitedError: as many of this workload wait already as may.
            InvalidError: what is asked for is too large to be approved by so many.
            StaleGenerationError, AuditUnavailableError: nothing is on record.
        """
        now_us = self._trusted_time()
        made = self._operation(request, decision, now_us)
        held = standing(made, (), End.NONE, now_us)
        answer = pending(made, held)
        body = Body(request.asker.request_id, made.subject, made.person, made.stages, made.cool_off_us // 1_000_000, made.format)
        draft = msgspec.structs.replace(request.draft(RecordKind.OPERATION, decision), operation_id=made.id, body=msgspec.to_builtins(body))
        effect = Asked(made.id, made.requester, made.target.kind, made.target.id, made.expires_us)
        packed = _pack(answer) if claim else None
        await self._journal.write(Entry(draft, generation=generation, claim=claim, answer=packed, effect=effect))
        self.changes.announce()
        return answer

    def settle(self, operation: str, request: Request, decision: Decision, retry_of: str) -> Settled | Pending:
        """May this use spend this operation now? Its approvals, if so; else what is missing.

        Args:
            decision: what the rules of now say to the same request.
            retry_of: the use that spent it before and released nothing; empty for the first.

        Raises:
            ApprovalConsumedError, ApprovalExpiredError, DeniedError: the operation has ended.
            ApprovalStaleError: the rules or the key are not those that were approved.
            ClockUntrustedError: nobody knows whether it has ended.
        """
        now_us = self._trusted_time()
        known = self.find(operation)
        if known is None:
            raise ApprovalStaleError("The operation is not on record any more; ask again.")
        made = known.operation
        ended = end_of(End.NONE if retry_of else known.end, made.expires_us, now_us)
        if ended is not None:
            raise ended
        if not self._is_same(made, request, decision):
            raise ApprovalStaleError("The rules or the key have changed since this was asked for; ask again.")
        held = standing(made, [each.vote for each in known.approvals if each.vote], End.NONE, now_us)
        for each in known.approvals:
            if each.reasons:
                self._security.note("approval-void", f"{made.id}, record {each.approval.record}: {' '.join(each.reasons)}"[:200])
        if held.state is not State.READY or now_us < held.not_before_us:
            return pending(made, held)
        return Settled(made.id, tuple(msgspec.Raw(each.approval.envelope) for each in known.approvals if each.vote))

    def still_holds(self, operation: str, request: Request, decision: Decision) -> RefusalError | None:
        """Why a use whose intent is on record must not go on by the rules of now; None if it may.

        Args:
            operation: that the intent has spent; empty if it spent none.
        """
        known = self.find(operation) if operation else None
        if known is None or not self._is_same(known.operation, request, decision):
            return ApprovalStaleError("The rules have changed since this was asked for; ask again.")
        held = standing(known.operation, [each.vote for each in known.approvals if each.vote], End.NONE, self._timekeeper.look().time_us)
        if held.state is State.READY:
            return None
        return ApprovalStaleError("An approval is worth nothing any more; ask again.")

    def again(self, answer: Pending) -> Pending:
        """The same operation, as it stands now."""
        known = self.find(answer.operation)
        return pending(known.operation, known.standing) if known else answer

    def _trusted_time(self) -> int:
        """Now: an operation lasts for a time and cools off for a time, and whoever sets the clock must not be able to stretch either.

        Raises:
            ClockUntrustedError: nobody knows what time it is.
        """
        moment = self._timekeeper.look()
        if moment.distrusted:
            msg = "The broker's clock cannot be trusted now, and a quorum depends on it; its operator has to look."
            raise ClockUntrustedError(msg, retry_after=60)
        return moment.time_us

    def _operation(self, request: Request, decision: Decision, now_us: int) -> Operation:
        """What a request becomes that needs approvals.

        Raises:
            InvalidError: it is too large to be approved by so many.
        """
        demanding = binding(decision.obligations)
        identity = ULID.from_timestamp(now_us / 1_000_000)
        requested_us = identity.milliseconds * 1_000
        expires_us = requested_us + min(each.expires_s for each in demanding) * 1_000_000
        content = request.content
        subject = Subject(
            log=self._journal.log,
            operation=SubjectOperation(str(identity), request.operation),
            workload=request.asker.caller.id.text,
            key=_subject_key(request),
            algorithm=request.algorithm,
            tbs=SubjectDigest(request.hash_name, request.digest.hex()),  # type: ignore[arg-type]  # the hashes are the same
            content=SubjectContent(content.type, content.size, content.media_type, dict(content.fields)),
            reason=request.reason,
            decision=decision_digest(decision.grants, decision.obligations),
            expires=to_rfc3339(expires_us),
        )
        stages = _stages(demanding)
        statements = len(msgspec.json.encode(subject)) * 4 // 3 * sum(stage.approvals for stage in stages)
        if statements > MAX_STATEMENT_CHARACTERS:
            raise InvalidError("This is too long to be approved by so many.", pointers=(("/reason", "be brief"),))
        return Operation(
            subject=subject,
            person=self._people.person_of(subject.workload),
            stages=stages,
            cool_off_us=_cool_off_us(demanding),
            format=request.format,
            requested_us=requested_us,
            expires_us=expires_us,
            record=-1,
        )

    def _is_same(self, made: Operation, request: Request, decision: Decision) -> bool:
        """Whether the rules and the key of now are those that were approved; and the tables have not been tampered with."""
        demanding = binding(decision.obligations)
        if (
            not demanding
            or made.subject.decision != decision_digest(decision.grants, decision.obligations)
            or made.stages != _stages(demanding)
        ):
            return False
        lasts_us = min(each.expires_s for each in demanding) * 1_000_000
        if made.cool_off_us != _cool_off_us(demanding) or made.expires_us - made.requested_us != lasts_us:
            return False
        return made.subject.key == _subject_key(request)

    def _known(self, stored: StoredOperation) -> Known:
        made = operation_of(stored.record, stored.leaf)
        now_us = self._timekeeper.look().time_us
        approvals: list[Judged] = []
        for record, leaf in self._reader.approvals(made.id):
            try:
                approval = Approval.of_leaf(record, leaf)
            except ValueError:
                continue  # somebody has written to the database what no broker writes
            approvals.append(Judged(approval, *self._judge.vote(made, approval, now_us)))
        held = standing(made, [each.vote for each in approvals if each.vote], stored.end, now_us)
        return Known(made, stored.end, stored.use, tuple(approvals), held)


def _subject_key(request: Request) -> SubjectKey:
    """The key that an approval is about; the empty one where no key is used."""
    key = request.key_facts()
    return SubjectKey(key.name, key.version, key.spki_sha256) if key else SubjectKey("", 0, "")


def operation_of(record: int, leaf: bytes) -> Operation:
    """An operation from the leaf of its record.

    Raises:
        ValueError: it is none.
    """
    body = msgspec.convert(decode(leaf), _Leaf).body
    requested_us = ULID.from_str(body.subject.operation.id).milliseconds * 1_000
    return Operation(
        subject=body.subject,
        person=body.person,
        stages=body.stages,
        cool_off_us=body.cool_off_s * 1_000_000,
        format=body.format,
        requested_us=requested_us,
        expires_us=from_rfc3339(body.subject.expires),
        record=record,
    )


def pending(made: Operation, held: Standing) -> Pending:
    """What the requester is told while an operation waits."""
    not_before = to_rfc3339(held.not_before_us) if held.not_before_us else ""
    return Pending(made.id, stage_views(held), to_rfc3339(made.expires_us), not_before)


def stage_views(held: Standing) -> tuple[StageView, ...]:
    """The stages, as a frame shows them."""
    return tuple(
        StageView(each.stage.name, each.stage.approvals, each.stage.of, each.people, held.may_be_approved(each.stage.name))
        for each in held.stages
    )


def needs_of(decision: Decision) -> tuple[str, ...]:
    """What a decision demands of others, in words."""
    return tuple(
        f"{stage.approvals} approval{'s' if stage.approvals > 1 else ''} of {' or '.join(stage.of)} ({stage.name})"
        for stage in _stages(binding(decision.obligations))
    )


def binding(obligations: Iterable[Obligation]) -> tuple[Obligation, ...]:
    """The obligations that demand a quorum, and are not only observed."""
    return tuple(each for each in obligations if each.quorum and not each.observe_only)


def _stages(demanding: tuple[Obligation, ...]) -> tuple[Stage, ...]:
    in_order = sorted(demanding, key=lambda each: each.grant)
    return tuple(stage for each in in_order for stage in stages_of(each.grant, ((one.approvals, one.of) for one in each.quorum)))


def _cool_off_us(demanding: tuple[Obligation, ...]) -> int:
    return max(each.cool_off_s for each in demanding) * 1_000_000
