"""Freezing and unfreezing. One person freezes, and it binds at once: requests that wait, and uses that are under way, too."""

from __future__ import annotations

import hashlib
from functools import partial

from ulid import ULID

from keybroker.audit.leaf import canonical
from keybroker.authority.acts import Act, Acts
from keybroker.authority.freezes import Freezes
from keybroker.authority.generation import Generation
from keybroker.authority.journal import Entry, Journal
from keybroker.authority.keyring import Keyring
from keybroker.authority.metrics import AuthorityMetrics
from keybroker.authority.others import Others
from keybroker.authority.quorum import Settled
from keybroker.authority.store import freezes as stored
from keybroker.authority.uses import Asker
from keybroker.clock import Clock, to_rfc3339
from keybroker.errors import AuditUnavailableError, InProgressError, InvalidError, NotFoundError, OverloadedError, RefusalError
from keybroker.model.approval import MAX_FIELD_CHARACTERS
from keybroker.model.call import AskFreeze, AskUnfreeze, FreezeReply, FreezesReply, Pending
from keybroker.model.decision import ContentInput, TargetInput
from keybroker.model.freeze import FREEZE_KINDS, MAX_TARGET_CHARACTERS, Freeze
from keybroker.model.identity import SpiffeId, SpiffeIdError
from keybroker.model.record import KeyFacts, RecordKind
from keybroker.model.request import MAX_REASON_CHARACTERS
from keybroker.telemetry import logger

MAX_FREEZES = 1_000  # by one identity

_log = logger()


class Responders:
    """Does what responders ask for.

    Args:
        tokens: names of the configured tokens.
    """

    def __init__(
        self,
        *,
        acts: Acts,
        others: Others,
        freezes: Freezes,
        keyring: Keyring,
        tokens: frozenset[str],
        journal: Journal,
        generation: Generation,
        metrics: AuthorityMetrics,
        clock: Clock,
    ) -> None:
        self._acts = acts
        self._others = others
        self._freezes = freezes
        self._keyring = keyring
        self._tokens = tokens
        self._journal = journal
        self._generation = generation
        self._metrics = metrics
        self._clock = clock
        self._unwritten: set[str] = set()  # freezes in force that are not on record yet
        metrics.frozen(len(freezes.all()))

    async def freeze(self, asker: Asker, ask: AskFreeze) -> FreezeReply:
        """Stop something. The same by the same identity is the same freeze.

        Raises:
            InvalidError: a target or a reason that cannot be one.
            NotFoundError: no such key or token, or nothing of it is granted.
            InProgressError: the same request is under way, and may yet fail.
            DeniedError, FrozenError, PolicyFailedError, PolicyUnavailableError: the rules do not let this caller.
            AuditUnavailableError: not on record, and so not in force.
        """
        _check(ask)
        act = Act.of(asker, "freeze", _target(ask.kind, ask.target), ask.reason)
        decision = await self._acts.require(act)
        self._require_known(ask)
        by = asker.caller.id.text
        own = [each for each in self._freezes.all() if each.by == by]
        known = next((each for each in own if (each.kind, each.target) == (ask.kind, ask.target)), None)
        if known is not None and known.id in self._unwritten:
            raise InProgressError("The same is being frozen just now; ask again.")
        if known is not None:
            return FreezeReply(known)
        if len(own) >= MAX_FREEZES:
            raise OverloadedError("You have frozen too many things: lift some, or freeze everything.", retry_after=60)
        freeze = Freeze(str(ULID()), ask.kind, ask.target, ask.reason, by, to_rfc3339(self._clock.now_us()))
        draft = act.draft(RecordKind.FREEZE, decision, {"change": "freeze", "freeze": freeze.id}, self._key_facts(freeze))
        self._change(partial(self._freezes.add, freeze))  # in force first: no use gets past it while it is being written
        self._unwritten.add(freeze.id)
        try:
            await self._journal.write(Entry(draft, also=partial(stored.add, freeze=freeze)))
        except AuditUnavailableError:
            self._change(partial(self._freezes.remove, freeze.id))
            raise
        finally:
            self._unwritten.discard(freeze.id)
        _log.warning("frozen", freeze=freeze.id, kind=freeze.kind)
        return FreezeReply(freeze)

    async def list(self, asker: Asker) -> FreezesReply:
        """The freezes of what the caller may freeze or unfreeze."""
        seen = []
        for freeze in self._freezes.all():
            target = _target(freeze.kind, freeze.target)
            if await self._acts.is_allowed(asker, "freeze", target) or await self._acts.is_allowed(asker, "unfreeze", target):
                seen.append(freeze)
        return FreezesReply(tuple(seen))

    async def unfreeze(self, asker: Asker, ask: AskUnfreeze) -> FreezeReply | Pending:
        """Lift one freeze, or begin an operation where others have to approve that. Other freezes of the same target stay.

        Raises:
            NotFoundError: no such freeze, or none that this caller may lift.
            DeniedError, FrozenError, PolicyFailedError, PolicyUnavailableError: the rules do not let this caller.
            AuditUnavailableError: not on record, and so still in force.
        """
        freeze = self._freezes.find(ask.freeze)
        if freeze is None:
            raise NotFoundError("There is no such freeze, or none that you may lift.")
        fields = {
            "freeze": freeze.id,
            "kind": freeze.kind,
            "target": freeze.target[:MAX_FIELD_CHARACTERS],
            "by": freeze.by[:MAX_FIELD_CHARACTERS],
        }
        digest = hashlib.sha256(canonical({"unfreeze": freeze.id})).digest()
        target = _target(freeze.kind, freeze.target)
        act = Act.of(asker, "unfreeze", target, freeze.reason, ContentInput("unfreeze", 0, "", fields), digest)
        generation = self._others.generation
        decision = await self._acts.require(act)
        try:
            settled: Settled | None = None
            if ask.operation:
                answer = self._others.settle(act, decision, ask.operation)
                if isinstance(answer, Pending):
                    return answer
                settled = answer
            elif self._others.are_wanted(decision):
                return await self._others.ask(act, decision, generation)
            draft = act.draft(RecordKind.FREEZE, decision, {"change": "unfreeze", "freeze": freeze.id}, self._key_facts(freeze))
            await self._others.write(draft, settled, generation, partial(stored.remove, number=freeze.id))
        except RefusalError as err:
            await self._acts.refuse(act, decision, err)
            raise
        if self._freezes.find(freeze.id) is not None:  # two may lift it at once
            self._change(partial(self._freezes.remove, freeze.id))
        _log.warning("unfrozen", freeze=freeze.id, kind=freeze.kind)
        return FreezeReply(freeze)

    def _change(self, change: partial[None]) -> None:
        change()
        self._generation.advance()
        self._metrics.frozen(len(self._freezes.all()))

    def _require_known(self, ask: AskFreeze) -> None:
        """Asked after the rules, so that it tells strangers nothing."""
        is_known = {"key": self._keyring.find(ask.target) is not None, "token": ask.target in self._tokens}
        if not is_known.get(ask.kind, True):
            raise NotFoundError("There is no such thing to freeze, or nothing of it is granted to you.")

    def _key_facts(self, freeze: Freeze) -> KeyFacts | None:
        entry = self._keyring.find(freeze.target) if freeze.kind == "key" else None
        version = entry.current if entry else None
        return KeyFacts(version.name, version.version, version.spki_sha256) if version else None


def _target(kind: str, name: str) -> TargetInput:
    return TargetInput(kind, "", name) if kind == "workload" else TargetInput(kind, name)


def _check(ask: AskFreeze) -> None:
    faults: list[tuple[str, str]] = []
    if ask.kind not in FREEZE_KINDS:
        faults.append(("", f"one of {', '.join(FREEZE_KINDS)}"))
    if (ask.kind == "everything") == bool(ask.target) or len(ask.target) > MAX_TARGET_CHARACTERS:
        faults.append((f"/{ask.kind}", "name what is to be frozen"))
    if not ask.reason.strip() or len(ask.reason) > MAX_REASON_CHARACTERS:
        faults.append(("/reason", f"say why, in 1 to {MAX_REASON_CHARACTERS} characters"))
    if ask.kind == "workload" and not faults:
        try:
            SpiffeId.parse(ask.target)
        except SpiffeIdError as err:
            faults.append(("/workload", f"not a SPIFFE ID ({err.rule})"))
    if faults:
        raise InvalidError("The freeze is not what this route takes.", pointers=tuple(faults))
