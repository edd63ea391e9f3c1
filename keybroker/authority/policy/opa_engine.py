"""Decisions of an OPA server, held to what this broker knows of the rules: their digest and the revision of their bundle."""

from __future__ import annotations

import asyncio
import json
from typing import Protocol

import msgspec

from keybroker.audit.leaf import canonical
from keybroker.authority.policy.engine import OPA, decision_of, failure
from keybroker.errors import PolicyFailedError, PolicyUnavailableError
from keybroker.model.decision import CallerInput, Decision, PolicyInput, TargetInput
from keybroker.telemetry import logger

_PROBE = PolicyInput(caller=CallerInput("", "", (), ()), operation="", target=TargetInput(""))  # nobody asks for nothing

_decode_any = msgspec.json.Decoder().decode
_log = logger()


class NoAnswerError(Exception):
    """OPA said nothing that could be taken for an answer. Says what happened."""


class BrokenRuleError(Exception):
    """OPA could not evaluate the rules: they contradict each other, or a built-in function failed."""


class _Bundle(msgspec.Struct, frozen=True):
    revision: str = ""


class _Provenance(msgspec.Struct, frozen=True):
    version: str = ""
    bundles: dict[str, _Bundle] = {}


class OpaReply(msgspec.Struct, frozen=True):
    """What OPA answers to a query.

    Attributes:
        result: the decision, JSON; absent where the rule is undefined.
        provenance: which OPA, and which bundles are active in it.
    """

    result: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    provenance: _Provenance = _Provenance()

    @property
    def engine(self) -> str:
        """OPA with its version, as far as it says one."""
        version = self.provenance.version
        return f"{OPA}/{version}" if version.isascii() and version.isprintable() and 0 < len(version) <= 32 else OPA

    def is_of(self, digest: str, revision: int) -> bool:
        """Whether the rules of this digest answered, from the bundle of this revision."""
        return self.digest == digest and str(revision) in {each.revision for each in self.provenance.bundles.values()}

    @property
    def digest(self) -> str:
        """Of the policy that answered; empty where the result does not say."""
        try:
            return _decode_digest(self.result).policy if isinstance(self.result, msgspec.Raw) else ""
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return ""


class _Digest(msgspec.Struct, frozen=True):
    policy: str


_decode_digest = msgspec.json.Decoder(_Digest).decode


class Server(Protocol):
    """An OPA server, as far as an engine needs it.

    Attributes:
        deadline_s: seconds for a decision.
    """

    deadline_s: float

    async def ask(self, asked: bytes) -> OpaReply:
        """OPA's answer to one policy input; any exception where there is none."""
        ...

    async def close(self) -> None:
        """End its connections."""
        ...


class OpaEngine:
    """One version of the rules, decided by an OPA server. Nothing is remembered: what OPA would say now is not known here.

    Args:
        digest: of the rules in the bundle, as this broker computes it.
        revision: of the bundle.
    """

    def __init__(self, server: Server, digest: str, revision: int) -> None:
        self._server = server
        self._digest = digest
        self._revision = revision
        self._superseded = asyncio.Event()
        self._successor: OpaEngine | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the whole policy, lower-case hex."""
        return self._digest

    async def decide(self, request: bytes) -> Decision:
        """Decide one request."""
        try:
            asked = canonical(_decode_any(request))
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return failure(PolicyFailedError.code, self._digest, OPA)
        decision = None
        try:
            async with asyncio.timeout(self._server.deadline_s):
                reply = await self._server.ask(asked)
                decision = decision_of(_result_set(reply), self._digest, reply.engine)
                if reply.is_of(self._digest, self._revision) or not reply.digest:
                    return decision
                # OPA may have taken up a newer bundle a moment before this broker did.
                decision = failure(PolicyFailedError.code, self._digest, reply.engine)
                await self._superseded.wait()
        except BrokenRuleError:
            _log.error("the rules cannot be evaluated by OPA")
            return failure(PolicyFailedError.code, self._digest, OPA)
        except Exception as err:  # noqa: BLE001  whatever goes wrong on the way to OPA, there is no answer
            if decision is not None:
                _log.error("OPA answered by other rules than this broker's", policy=self._digest, revision=self._revision)
                return decision
            _log.error("OPA gave no answer", why=str(err) or type(err).__name__)
            return failure(PolicyUnavailableError.code, self._digest, OPA)
        successor = self._successor
        return await successor.decide(request) if successor else decision

    async def trouble(self) -> str:
        """Why this version cannot decide now; empty if it can."""
        try:
            async with asyncio.timeout(self._server.deadline_s):
                reply = await self._server.ask(canonical(_PROBE))
        except BrokenRuleError:
            return "OPA cannot evaluate the rules"
        except Exception as err:  # noqa: BLE001  as above
            return f"OPA gives no answer: {str(err) or type(err).__name__}"
        if reply.is_of(self._digest, self._revision):
            return ""
        served = ", ".join(sorted(each.revision for each in reply.provenance.bundles.values())) or "none"
        return f"OPA does not serve revision {self._revision} of the bundle yet; it has {json.dumps(served[:100])}"

    def supersede(self, successor: OpaEngine) -> None:
        """Another version is in force from now on; requests that OPA has answered by it already go there."""
        self._successor = successor
        self._superseded.set()


def _result_set(reply: OpaReply) -> bytes:
    """The same as the embedded engine's answer: a list that is empty where the rule is undefined."""
    return b'[{"result":%s}]' % bytes(reply.result) if isinstance(reply.result, msgspec.Raw) else b"[]"
