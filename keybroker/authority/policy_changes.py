"""Changes of the rules, where those are operations: proposed by one, checked here, and in force once they may be.

What provably only narrows access takes the one who proposes it. Anything else takes others, as the live rules say; the one who proposes
is none of them.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from functools import partial

from keybroker.authority.acts import Act, Acts
from keybroker.authority.generation import Generation
from keybroker.authority.journal import Entry, Journal
from keybroker.authority.others import Others
from keybroker.authority.policy.holder import Candidate
from keybroker.authority.policy.narrowing import widenings
from keybroker.authority.policy.stored import StoredPolicy, can_be_widened
from keybroker.authority.quorum import Settled
from keybroker.authority.security_events import SecurityEvents
from keybroker.authority.store import policies
from keybroker.authority.store.policies import PolicyVersion
from keybroker.authority.uses import Asker
from keybroker.clock import Clock, to_rfc3339
from keybroker.errors import ConfigError, DeniedError, InvalidError, RefusalError, ReplayedError, StaleBaseError
from keybroker.model.approval import MAX_FIELD_CHARACTERS
from keybroker.model.call import Pending, PolicyChanged, PolicyReply, ProposePolicy
from keybroker.model.decision import ContentInput, Decision, TargetInput
from keybroker.model.record import RecordKind
from keybroker.model.request import MAX_REASON_CHARACTERS
from keybroker.telemetry import logger

MAX_FILES = 200
MAX_BYTES = 2 * 1024 * 1024  # of all files together
_MAX_FAULTS = 20
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}\.yaml")
_BASE = re.compile(r"[0-9a-f]{64}")

_log = logger()


class PolicyChanges:
    """Shows the live rules, and takes proposals.

    Args:
        live: the version that is in force.
        made: digests of the proposals that have taken effect before.
    """

    def __init__(
        self,
        *,
        acts: Acts,
        others: Others,
        policy: StoredPolicy,
        live: PolicyVersion,
        made: frozenset[str],
        journal: Journal,
        generation: Generation,
        security: SecurityEvents,
        clock: Clock,
    ) -> None:
        self._acts = acts
        self._others = others
        self._policy = policy
        self._live = live
        self._made = set(made)
        self._journal = journal
        self._generation = generation
        self._security = security
        self._clock = clock
        self._one_at_a_time = asyncio.Lock()

    async def show(self, asker: Asker) -> PolicyReply:
        """The live rules, for whoever may propose others.

        Raises:
            DeniedError, FrozenError, PolicyFailedError, PolicyUnavailableError: the rules do not let this caller.
            AuditUnavailableError: that it was asked is not on record.
        """
        act = Act.of(asker, "admin-policy", TargetInput("policy"))
        decision = await self._acts.require(act)
        live = self._live
        await self._journal.write(Entry(act.draft(RecordKind.READ, decision, {"what": "policy"})))
        return PolicyReply(live.revision, live.base, decision.policy, live.since, live.files)

    async def propose(self, asker: Asker, ask: ProposePolicy) -> PolicyChanged | Pending:
        """Other rules in the place of the live ones: at once where they only narrow access, else when others have approved them.

        Raises:
            InvalidError: they cannot be used; with each fault.
            StaleBaseError: they were written for other rules than the live ones.
            ReplayedError: this very proposal has taken effect before.
            DeniedError, FrozenError, PolicyFailedError, PolicyUnavailableError: the rules do not let this caller.
            AuditUnavailableError: not on record, and so not in force.
        """
        _check(ask)
        change = policies.change_of(ask.base, ask.files)
        act = _act(asker, ask, change, ())
        generation = self._others.generation
        decision = await self._acts.require(act)
        try:
            self._require_base(ask.base, change)
            candidate = await self._built(ask.files)
            reasons = await asyncio.to_thread(widenings, self._policy.rules, candidate.rules)
            if not reasons:
                return await self._apply(act, decision, candidate, PolicyVersion(0, change, ask.files, ""), None, generation)
            act = _act(asker, ask, change, reasons)  # what policy and approvers see of it, from now on
            decision = await self._acts.require(act)
            if ask.operation:
                answer = self._others.settle(act, decision, ask.operation)
                if isinstance(answer, Pending):
                    return answer
                return await self._apply(act, decision, candidate, PolicyVersion(0, change, ask.files, ""), answer, generation)
            self._security.note("policy-widening", f"proposed by {asker.caller.id.text}: {reasons[0]}"[:300])
            if not self._others.are_wanted(decision):
                raise DeniedError("This may widen access, which nobody does alone.", reasons=("widens", *reasons[:_MAX_FAULTS]))
            return await self._others.ask(act, decision, generation)
        except RefusalError as err:
            await self._acts.refuse(act, decision, err)
            raise

    async def _apply(
        self, act: Act, decision: Decision, candidate: Candidate, proposed: PolicyVersion, settled: Settled | None, generation: int
    ) -> PolicyChanged:
        """On record, in the store, in force: in that order."""
        async with self._one_at_a_time:
            self._require_base(act.content.fields["base"], proposed.change)  # another one may have been quicker
            version = replace(proposed, revision=self._live.revision + 1, since=to_rfc3339(self._clock.now_us()))
            revision = str(version.revision)
            body = {"change": "policy", "from": self._policy.engine.digest, "to": candidate.digest, "revision": revision}
            draft = act.draft(RecordKind.ADMIN, decision, body)
            await self._others.write(draft, settled, generation, partial(policies.add, version=version))
            self._policy.adopt(candidate)
            self._live = version
            self._made.add(version.change)
            self._generation.advance()
        _log.info("policy changed", policy=candidate.digest, revision=version.revision)
        return PolicyChanged(version.revision, version.base, candidate.digest)

    def _require_base(self, base: str, change: str) -> None:
        if change in self._made:
            self._security.note("policy-replayed", change)
            raise ReplayedError("This proposal has taken effect before; write a new one for the live rules.")
        if base != self._live.base:
            self._security.note("policy-stale-base", base)
            raise StaleBaseError("The rules have changed since this was written; look at the live ones and propose again.")

    async def _built(self, files: dict[str, str]) -> Candidate:
        try:
            candidate = await self._policy.build(files)
        except ConfigError as err:
            pointers = tuple(("/files", line[:300]) for line in str(err).splitlines()[:_MAX_FAULTS])
            raise InvalidError("The rules cannot be used.", pointers=pointers) from err
        if not can_be_widened(candidate.rules):
            text = "keep at least one grant of `admin-policy` with a quorum: without one, nobody could ever widen the rules again"
            raise InvalidError("The rules cannot be used.", pointers=(("/files", text),))
        return candidate


def _act(asker: Asker, ask: ProposePolicy, change: str, reasons: tuple[str, ...]) -> Act:
    """A proposal, with why it may widen access."""
    why = {f"widens-{number}": reason[:MAX_FIELD_CHARACTERS] for number, reason in enumerate(reasons[:_MAX_FAULTS], 1)}
    if len(reasons) > _MAX_FAULTS:
        why["widens-more"] = str(len(reasons) - _MAX_FAULTS)
    content = ContentInput("policy-change", _size(ask.files), "", {"base": ask.base, "change": change, **why})
    return Act.of(asker, "admin-policy", TargetInput("policy"), ask.reason, content, bytes.fromhex(change))


def _check(ask: ProposePolicy) -> None:
    faults: list[tuple[str, str]] = []
    if not _BASE.fullmatch(ask.base):
        faults.append(("/base", "`base` of the live rules, 64 hex digits"))
    if not ask.reason.strip() or len(ask.reason) > MAX_REASON_CHARACTERS:
        faults.append(("/reason", f"say why, in 1 to {MAX_REASON_CHARACTERS} characters"))
    if not 1 <= len(ask.files) <= MAX_FILES or not all(map(_FILE_NAME.fullmatch, ask.files)):
        faults.append(("/files", f"1 to {MAX_FILES} files, each named *.yaml"))
    if _size(ask.files) > MAX_BYTES:
        faults.append(("/files", f"at most {MAX_BYTES} bytes together"))
    if faults:
        raise InvalidError("The proposal is not what this route takes.", pointers=tuple(faults))


def _size(files: dict[str, str]) -> int:
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in files.values())
