"""Everything a caller may read: who am I, which keys, what is on record. Reading the record is itself recorded."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from keybroker.audit.leaf import canonical, decode
from keybroker.authority.denials import Denials
from keybroker.authority.enforcement import as_of_now, refusal_of
from keybroker.authority.impact import impact_of
from keybroker.authority.journal import Entry, Journal
from keybroker.authority.keyring import KeyEntry, Keyring
from keybroker.authority.metrics import AuthorityMetrics
from keybroker.authority.policy.pattern import Pattern, PatternError
from keybroker.authority.service import Rules
from keybroker.authority.store.reader import Reader, RecordFilter
from keybroker.authority.timekeeper import Timekeeper
from keybroker.authority.uses import Asker, key_input
from keybroker.clock import to_rfc3339
from keybroker.errors import (
    AuditUnavailableError,
    DeniedError,
    InvalidError,
    NotFoundError,
    PolicyFailedError,
    PolicyUnavailableError,
    RefusalError,
)
from keybroker.model.call import KeyReply, KeysReply, LogReply, PublicVersion, QueryRecords, RecordsReply, ShowKey, ShowRecord, WhoamiReply
from keybroker.model.decision import Decision, KeyInput, PolicyInput, TargetInput, Verdict
from keybroker.model.impact import Question
from keybroker.model.record import Draft, RecordKind
from keybroker.telemetry import logger

MAX_PAGE = 1_000
_CATALOG_SECONDS = 0.5
_BREATH_SECONDS = 0.01  # between two blocks of some milliseconds, so that a long log is taken in beside the uses of keys
_log = logger()
T = TypeVar("T")
_CURSOR = re.compile(r"[0-9]{1,15}")  # the index of the last record of the page before


class Reads:
    """Answers questions; uses no key.

    Args:
        reader: used by this object's own thread only.
    """

    def __init__(
        self,
        *,
        rules: Rules,
        keyring: Keyring,
        journal: Journal,
        denials: Denials,
        reader: Reader,
        timekeeper: Timekeeper,
        metrics: AuthorityMetrics,
    ) -> None:
        self._rules = rules
        self._keyring = keyring
        self._journal = journal
        self._denials = denials
        self._reader = reader
        self._timekeeper = timekeeper
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader")

    def close(self) -> None:
        """End the reading thread."""
        self._thread.shutdown(wait=True)
        self._reader.close()

    async def run(self) -> None:
        """Keep the catalog, until cancelled: what auditors find the record's places by."""
        while True:
            try:
                is_behind = await self._in_thread(self._reader.advance)
            except AuditUnavailableError:
                is_behind = False
            await asyncio.sleep(_BREATH_SECONDS if is_behind else _CATALOG_SECONDS)

    async def whoami(self, asker: Asker) -> WhoamiReply:
        """What the broker sees of the caller. Its roles are what the rules let it do now."""
        roles = []
        if (await self._may_read_trail(asker, "")).verdict is Verdict.ALLOW:
            roles.append("auditor")
        if (await self.list_keys(asker)).keys:
            roles.append("workload")
        for role, operation in (("responder", "freeze"), ("admin", "admin-policy"), ("break-glass", "break-glass")):
            if await self._has_target(asker, operation):
                roles.append(role)
        svid = asker.caller.svid
        return WhoamiReply(
            spiffe_id=svid.id.text,
            trust_domain=svid.id.trust_domain,
            svid_sha256=svid.sha256,
            not_after=to_rfc3339(svid.not_after * 1_000_000),
            address=asker.caller.address,
            networks=asker.networks,
            roles=tuple(roles),
        )

    async def list_keys(self, asker: Asker) -> KeysReply:
        """The keys whose public half the caller may read."""
        entries = [entry for name in self._keyring.names() if (entry := self._keyring.find(name))]
        return KeysReply(tuple([_key_reply(entry) for entry in entries if await self._may_read_key(asker, entry.name, entry)]))

    async def show_key(self, asker: Asker, ask: ShowKey) -> KeyReply:
        """One key.

        Raises:
            NotFoundError: no such key, or none for this caller: decided the same way, said the same way.
        """
        entry = self._keyring.find(ask.key)
        if not await self._may_read_key(asker, ask.key, entry) or entry is None:
            self._metrics.refused(NotFoundError.code)
            raise NotFoundError("There is no such key, or nothing of it is granted to you.")
        return _key_reply(entry)

    async def query_records(self, asker: Asker, ask: QueryRecords) -> RecordsReply:
        """A page of the record, oldest first. Without `workload`: everything the caller may read.

        Raises:
            DeniedError: the caller may not read that trail.
            InvalidError: a filter that cannot be used.
        """
        pattern = _pattern(ask.workload)
        if ask.key_version and not ask.key:
            raise InvalidError("A key version is one of a key.", pointers=(("/key_version", "give `key` too"),))
        if pattern is None:
            trail, decision = await self.allowed(asker, ask.workload)
            trails: tuple[str, ...] | None = (trail,) if trail else None
        else:
            trail, decision = "", await self._allowed_whole(asker)
            known = await self._in_thread(self._reader.trails)
            trails = tuple(each for each in known if pattern.fits(each))
        wanted = RecordFilter(
            trails=trails,
            key=ask.key,
            key_version=ask.key_version,
            algorithm=ask.algorithm,
            grant=ask.grant,
            svid=ask.svid.lower(),
            address=ask.address,
            content=ask.content,
            kind=ask.kind,
            outcome=ask.outcome,
            use=ask.use,
            since_us=ask.since_us or None,
            until_us=ask.until_us or None,
            after=_after(ask.cursor),
            limit=max(1, min(ask.limit, MAX_PAGE)),
        )
        await self._record_read(asker, _audit_input(asker, trail), decision, what="records", filters=_filters(ask))
        if ask.principal:  # no request can carry a principal yet, so none of the records has one
            return RecordsReply((), "")
        page = await self._in_thread(self._reader.page, wanted)
        return RecordsReply(page.leaves, "" if page.last is None else str(page.last))

    async def impact(self, asker: Asker, question: Question) -> LogReply:
        """What an identity, a key, a certificate, a person or a time window did and tried to do.

        Raises:
            DeniedError: the caller may not read that much.
            InvalidError: no question that can be answered.
        """
        if not any(msgspec.structs.astuple(question)):
            raise InvalidError(
                "Of whom, or when?", pointers=(("", "give at least one of `workload`, `key`, `svid`, `person`, `since`, `until`"),)
            )
        if "*" in question.workload:
            raise InvalidError("The workload is not a SPIFFE ID.", pointers=(("/workload", "one workload, not a pattern"),))
        question = msgspec.structs.replace(question, svid=question.svid.lower())
        if question.workload:
            _, decision = await self.allowed(asker, question.workload)
        else:
            decision = await self._allowed_whole(asker)
        given = {name: value for name, value in msgspec.structs.asdict(question).items() if value}
        await self._record_read(asker, _audit_input(asker, question.workload), decision, what="impact", filters=given)
        answer = await self._in_thread(impact_of, self._reader, self._journal.log, question)
        return LogReply(msgspec.json.encode(answer), "application/json")

    async def show_record(self, asker: Asker, ask: ShowRecord) -> RecordsReply:
        """One record.

        Raises:
            NotFoundError: there is none, or the caller may not read it.
        """
        leaf = await self._in_thread(self._reader.leaf, ask.index)
        trail = decode(leaf)["trail"].get("id", "") if leaf else ""
        decision = await self._may_read_trail(asker, trail)
        if decision.verdict is not Verdict.ALLOW:
            decision = await self._may_read_trail(asker, "")
        missing = NotFoundError("There is no such record, or it is not yours to read.")
        if decision.verdict is not Verdict.ALLOW:
            await self._deny(asker, "", decision, missing)
            raise missing
        if leaf is None:
            raise missing
        await self._record_read(asker, _audit_input(asker, trail), decision, what=f"record {ask.index}")
        return RecordsReply((leaf,), "")

    async def note(self, asker: Asker, trail: str, decision: Decision, what: str) -> None:
        """It is read: on record before anything is shown."""
        await self._record_read(asker, _audit_input(asker, trail), decision, what=what)

    async def allowed(self, asker: Asker, workload: str) -> tuple[str, Decision]:
        """Which trail the caller may read, empty for the whole record: what was asked for, or else its own; and the decision.

        Raises:
            DeniedError: it may not; on record.
        """
        decision = await self._may_read_trail(asker, workload)
        if decision.verdict is Verdict.DENY and not workload:
            workload = asker.caller.id.text
            decision = await self._may_read_trail(asker, workload)
        if decision.verdict is Verdict.ALLOW:
            return workload, decision
        denied = DeniedError("No rule lets you read that trail.", reasons=decision.reasons)
        await self._deny(asker, workload, decision, denied)
        raise denied

    async def _allowed_whole(self, asker: Asker) -> Decision:
        """The whole record: what a question needs that is not about one workload.

        Raises:
            DeniedError: the caller may not read all of it.
        """
        decision = await self._may_read_trail(asker, "")
        if decision.verdict is Verdict.ALLOW:
            return decision
        denied = DeniedError("No rule lets you read the whole record, which this question is about.", reasons=decision.reasons)
        await self._deny(asker, "", decision, denied)
        raise denied

    async def _in_thread(self, ask: Callable[..., T], *values: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, ask, *values)

    async def _may_read_trail(self, asker: Asker, workload: str) -> Decision:
        return await self._decide(asker, _audit_input(asker, workload))

    async def _may_read_key(self, asker: Asker, name: str, entry: KeyEntry | None) -> bool:
        version = entry.current if entry else None
        key = key_input(entry.labels, version) if entry and version else KeyInput()
        question = PolicyInput(caller=asker.policy_caller(), operation="read-key", target=TargetInput("key", name), key=key)
        return (await self._decide(asker, question)).verdict is Verdict.ALLOW

    async def _decide(self, asker: Asker, question: PolicyInput) -> Decision:
        """What the rules say, and the moments that they name: an allow or a deny.

        Raises:
            PolicyUnavailableError, PolicyFailedError, ClockUntrustedError: neither, which must not look like a deny. On record.
        """
        decision = as_of_now(await self._rules.engine.decide(canonical(question)), self._timekeeper)
        if decision.verdict is Verdict.FAILED:
            failed = _not_decided(decision)
            await self._denials.write(
                _draft(RecordKind.DENIAL, asker, question, decision, code=failed.code, unmet=decision.unmet), failed.code
            )
            raise failed
        return decision

    async def _has_target(self, asker: Asker, operation: str) -> bool:
        """Whether there is anything at all that the caller may do this to."""
        question = PolicyInput(caller=asker.policy_caller(), operation=operation, target=TargetInput("any"))
        return (await self._decide(asker, question)).verdict is Verdict.ALLOW

    async def _record_read(self, asker: Asker, question: PolicyInput, decision: Decision, **body: Any) -> None:
        draft = _draft(RecordKind.READ, asker, question, decision, observed=decision.observed, **body)
        await self._journal.write(Entry(draft))

    async def _deny(self, asker: Asker, workload: str, decision: Decision, refusal: RefusalError) -> None:
        draft = _draft(RecordKind.DENIAL, asker, _audit_input(asker, workload), decision, code=refusal.code, unmet=decision.unmet)
        await self._denials.write(draft, refusal.code)


def _not_decided(decision: Decision) -> RefusalError:
    if decision.unmet:
        return refusal_of(decision.unmet)
    if PolicyUnavailableError.code in decision.reasons:
        return PolicyUnavailableError("The rules could not be asked in time.", retry_after=1)
    return PolicyFailedError("The rules gave no usable answer.", retry_after=1)


def _audit_input(asker: Asker, workload: str) -> PolicyInput:
    return PolicyInput(caller=asker.policy_caller(), operation="read-audit", target=TargetInput("trail", "", workload))


def _draft(kind: RecordKind, asker: Asker, question: PolicyInput, decision: Decision, **body: Any) -> Draft:
    return Draft(
        kind=kind,
        trail=asker.caller.id.text,
        request=msgspec.Raw(canonical(question)),
        svid=asker.svid_facts(),
        decision=msgspec.Raw(decision.record),
        trace_id=asker.trace_id,
        body={"request_id": asker.request_id, **body},
    )


def _key_reply(entry: KeyEntry) -> KeyReply:
    return KeyReply(
        name=entry.name,
        labels=dict(entry.labels),
        algorithms=tuple(each.value for each in entry.algorithms),
        versions=tuple(PublicVersion(each.version, each.family.value, "enabled", each.spki, each.spki_sha256) for each in entry.versions),
    )


def _pattern(workload: str) -> Pattern | None:
    """The pattern, if it is one and not a SPIFFE ID.

    Raises:
        InvalidError: it is neither.
    """
    if "*" not in workload:
        return None
    try:
        return Pattern.parse(workload)
    except PatternError as err:
        raise InvalidError("The workload is not a pattern.", pointers=(("/workload", str(err)),)) from err


def _filters(ask: QueryRecords) -> dict[str, str]:
    """What was asked for, as it goes on record: the filters that were given, by the names that HTTP has for them."""
    given = msgspec.structs.asdict(ask)
    del given["limit"]  # not what, but how much at once
    for name in ("since", "until"):
        us = given.pop(f"{name}_us")
        given[name] = to_rfc3339(us) if us else ""
    return {name: str(value) for name, value in given.items() if value}


def _after(cursor: str) -> int:
    if not cursor:
        return -1
    if not _CURSOR.fullmatch(cursor):
        raise InvalidError("The cursor is not one of ours.", pointers=(("/cursor", "use `next` of the page before, unchanged"),))
    return int(cursor)
