"""Acts that use no key: freezes, changes of the rules, break-glass. Each is decided by the same policy as a use of a key.

An act is asked for, decided, and on record, before it takes effect; so is its refusal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import msgspec

from keybroker.audit.leaf import canonical
from keybroker.authority.denials import Denials
from keybroker.authority.enforcement import as_of_now, refusal_of
from keybroker.authority.freezes import Freezes
from keybroker.authority.service import Rules
from keybroker.authority.timekeeper import Timekeeper
from keybroker.authority.uses import Asker
from keybroker.errors import DeniedError, NotFoundError, PolicyFailedError, PolicyUnavailableError, RefusalError
from keybroker.model.decision import NO_GRANT, ContentInput, Decision, PolicyInput, TargetInput, Verdict
from keybroker.model.record import Draft, KeyFacts, RecordKind


@dataclass(frozen=True, slots=True)
class Act:
    """A request to do something that uses no key.

    Attributes:
        question: the policy input.
        policy_input: the same, canonical JSON.
        digest: SHA-256 of what is to be changed, where others may have to approve it; else empty.
    """

    algorithm: ClassVar[str] = ""
    hash_name: ClassVar[str] = "sha256"
    format: ClassVar[str] = ""

    asker: Asker
    question: PolicyInput
    policy_input: bytes = field(repr=False)
    digest: bytes = b""

    @classmethod
    def of(
        cls, asker: Asker, operation: str, target: TargetInput, reason: str = "", content: ContentInput | None = None, digest: bytes = b""
    ) -> Act:
        """What somebody asks for."""
        question = PolicyInput(
            caller=asker.policy_caller(), operation=operation, target=target, content=content or ContentInput(), reason=reason
        )
        return cls(asker, question, canonical(question), digest)

    @property
    def operation(self) -> str:
        """As policy calls it."""
        return self.question.operation

    @property
    def content(self) -> ContentInput:
        """What policy sees of the change."""
        return self.question.content

    @property
    def reason(self) -> str:
        """As the caller gives it."""
        return self.question.reason

    def key_facts(self) -> KeyFacts | None:
        """No key is used."""
        return None

    def draft(self, kind: RecordKind, decision: Decision, body: dict[str, str] | None = None, key: KeyFacts | None = None) -> Draft:
        """A record of this act and how it was decided."""
        return Draft(
            kind=kind,
            trail=self.asker.caller.id.text,
            request=msgspec.Raw(self.policy_input),
            svid=self.asker.svid_facts(),
            key=key,
            decision=msgspec.Raw(decision.record),
            trace_id=self.asker.trace_id,
            body={"request_id": self.asker.request_id, **(body or {})},
        )


class Acts:
    """Asks the rules about acts, as of now: what a grant says of its beginning and its end binds here, too."""

    def __init__(self, rules: Rules, denials: Denials, freezes: Freezes, timekeeper: Timekeeper) -> None:
        self._rules = rules
        self._denials = denials
        self._freezes = freezes
        self._timekeeper = timekeeper

    async def decide(self, act: Act) -> Decision:
        """What the rules say; nothing is recorded."""
        return as_of_now(await self._rules.engine.decide(act.policy_input), self._timekeeper)

    async def is_allowed(self, asker: Asker, operation: str, target: TargetInput) -> bool:
        """Whether the rules would let somebody do this; nothing is recorded."""
        return (await self.decide(Act.of(asker, operation, target))).verdict is Verdict.ALLOW

    async def require(self, act: Act) -> Decision:
        """The decision, if it allows the act and whoever asks is not frozen.

        Raises:
            NotFoundError, DeniedError, FrozenError, PolicyFailedError, PolicyUnavailableError: it does not; on record.
        """
        decision = await self.decide(act)
        refusal = _refusal_of(act, decision) or self._freezes.refusal_of_caller(act.asker.caller.id.text)
        if refusal is not None:
            await self.refuse(act, decision, refusal)
            raise refusal
        return decision

    async def refuse(self, act: Act, decision: Decision, refusal: RefusalError) -> None:
        """Put a refusal on record."""
        await self._denials.write(act.draft(RecordKind.DENIAL, decision, {"code": refusal.code}), refusal.code)


def _refusal_of(act: Act, decision: Decision) -> RefusalError | None:
    if decision.unmet:
        return refusal_of(decision.unmet)
    match decision.verdict:
        case Verdict.ALLOW:
            return None
        case Verdict.FAILED if PolicyUnavailableError.code in decision.reasons:
            return PolicyUnavailableError("The rules could not be asked in time.", retry_after=1)
        case Verdict.FAILED:
            return PolicyFailedError("The rules gave no usable answer.", retry_after=1)
        case Verdict.DENY if NO_GRANT in decision.reasons and act.question.target.kind == "key":
            return NotFoundError("There is no such key, or nothing of it is granted to you.")
        case Verdict.DENY:
            return DeniedError("No rule allows this.", reasons=decision.reasons)
