"""Asks the rules. A policy that cannot answer is a verdict of its own: FAILED, which nobody may mistake for a yes."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections import OrderedDict
from typing import Protocol

import msgspec

from keybroker.audit.leaf import canonical
from keybroker.authority.policy.wasm import WasmAbortError, WasmInstance, WasmModule, WasmTrapError
from keybroker.errors import PolicyFailedError, PolicyUnavailableError
from keybroker.model.decision import Decision, Obligation, PolicyAnswer, Verdict
from keybroker.telemetry import logger

MEMO_SIZE = 16_384
ENGINE = f"opa-wasm wasmtime/{importlib.metadata.version('wasmtime')}"

OPA = "opa"  # the engine that is a server, in digests; in records its version follows


class PolicyEngine(Protocol):
    """One version of the rules."""

    @property
    def digest(self) -> str:
        """SHA-256 of the whole policy: Rego, rules and engine; lower-case hex."""
        ...

    async def decide(self, request: bytes) -> Decision:
        """Decide one request; never raises for trouble with the policy.

        Args:
            request: the policy input, canonical JSON.
        """
        ...


class _Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    result: PolicyAnswer


_decode = msgspec.json.Decoder(tuple[_Result]).decode
_decode_any = msgspec.json.Decoder().decode
_log = logger()


class EmbeddedEngine:
    """Rego compiled to WebAssembly, in this process.

    A decision depends on nothing but request and rules, so the last `MEMO_SIZE` that were asked for are remembered, each under the
    exact bytes of its request; failures never are.

    Args:
        data: the rules, JSON, as `compile_rules` makes them; holds the digest, which the policy must repeat.
    """

    def __init__(self, module: WasmModule, data: bytes, digest: str) -> None:
        self._module = module
        self._data = data
        self._digest = digest
        self._instance: WasmInstance | None = WasmInstance(module, data)
        self._remaking = asyncio.Lock()
        self._memo: OrderedDict[bytes, Decision] = OrderedDict()

    @property
    def digest(self) -> str:
        """SHA-256 of the whole policy, lower-case hex."""
        return self._digest

    async def decide(self, request: bytes) -> Decision:
        """Decide one request. Where a trap has spoiled the instance, another is made in a thread: with 10,000 grants that takes 27 ms."""
        if self._instance is None and await self._ready() is None:
            return self._failed(PolicyUnavailableError.code)
        return self.decide_now(request)

    def decide_now(self, request: bytes) -> Decision:
        """Decide one request, from where no event loop runs. For one thread."""
        known = self._memo.get(request)
        if known is not None:
            self._memo.move_to_end(request)
            return known
        decision = self._decide(request)
        if decision.verdict is not Verdict.FAILED:
            self._memo[request] = decision
            if len(self._memo) > MEMO_SIZE:
                self._memo.popitem(last=False)
        return decision

    async def _ready(self) -> WasmInstance | None:
        """The instance, made again once for all who wait."""
        async with self._remaking:
            return self._instance or await asyncio.to_thread(self._remake)

    def _remake(self) -> WasmInstance | None:
        """The instance in place of the one that a trap has spoiled; None if it cannot be made now."""
        try:
            self._instance = WasmInstance(self._module, self._data)
        except WasmTrapError as err:
            _log.error("the policy cannot be made again", why=str(err))
        return self._instance

    def _decide(self, request: bytes) -> Decision:
        try:
            # OPA repairs some of what is not JSON, and misreads escaped characters of the last plane; so it gets JSON of our making.
            asked = canonical(_decode_any(request))
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return self._failed(PolicyFailedError.code)
        instance = self._instance or self._remake()
        if instance is None:
            return self._failed(PolicyUnavailableError.code)
        try:
            answer = instance.evaluate(asked)
        except WasmTrapError as err:
            self._instance = None
            _log.error("the policy gave no answer", why=str(err))
            return self._failed(PolicyFailedError.code if isinstance(err, WasmAbortError) else PolicyUnavailableError.code)
        return decision_of(answer, self._digest, ENGINE)

    def _failed(self, reason: str) -> Decision:
        return failure(reason, self._digest, ENGINE)


def failure(reason: str, digest: str, engine: str) -> Decision:
    """The decision where there is none.

    Args:
        reason: problem code of the failure, `policy-unavailable` or `policy-error`.
        digest: of the policy that should have answered.
    """
    return _decision(Verdict.FAILED, (reason,), PolicyAnswer(False, (), (), digest, ()), engine)  # noqa: FBT003  allow


def decision_of(answer: bytes, digest: str, engine: str) -> Decision:
    """A policy's answer as a decision. Anything but a whole, typed answer of the right policy is FAILED.

    Args:
        answer: OPA's result set: `[{"result": {...}}]`, or `[]` where the rule is undefined.
        digest: of the policy that was asked.
    """
    nothing = PolicyAnswer(False, (), (), digest, ())  # noqa: FBT003  allow
    try:
        (result,) = _decode(answer)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return _decision(Verdict.FAILED, (PolicyFailedError.code,), nothing, engine)
    given = result.result
    is_beyond_us = any(unenforced(each) for each in given.obligations)
    is_contradiction = given.allow and (not given.grants or given.reasons)
    if given.policy != digest or is_contradiction or (given.allow and is_beyond_us):
        return _decision(Verdict.FAILED, (PolicyFailedError.code,), nothing, engine)
    return _decision(Verdict.ALLOW if given.allow else Verdict.DENY, given.reasons, given, engine)


def unenforced(obligation: Obligation) -> tuple[str, ...]:
    """What an obligation demands that nothing in this version enforces. A yes that depends on it is no yes."""
    demanded = {
        "quorum": bool(obligation.quorum) != bool(obligation.expires_s) or (obligation.cool_off_s and not obligation.quorum),
        "evidence": obligation.evidence,
    }
    return tuple(name for name, demand in demanded.items() if demand)


def _decision(verdict: Verdict, reasons: tuple[str, ...], given: PolicyAnswer, engine: str) -> Decision:
    record = canonical(
        {
            "allow": verdict is Verdict.ALLOW,
            "engine": engine,
            "grants": given.grants,
            "obligations": given.obligations,
            "policy": given.policy,
            "reasons": reasons,
        }
    )
    return Decision(verdict, reasons, given.grants, given.obligations, given.policy, engine, record)
