"""The one order for every use of a key (docs/explanation/architecture.md).

identify, parse, decide, record the intent, sign, check, record the outcome, release: `KeyUseService._use` reads top to bottom as
that list, and nothing else asks a worker for a signature. Whoever holds a signature finds an intent and an outcome on record.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol

import msgspec
from ulid import ULID

from keybroker.authority.denials import Denials
from keybroker.authority.enforcement import Demands, UnmetError, preview, require_open
from keybroker.authority.freezes import Freezes
from keybroker.authority.generation import Generation
from keybroker.authority.glass import Glass
from keybroker.authority.journal import IDEMPOTENCY_US, Claim, Entry, Journal, StaleGenerationError
from keybroker.authority.keyring import Keyring
from keybroker.authority.metrics import AuthorityMetrics
from keybroker.authority.operations import Operation
from keybroker.authority.policy.engine import PolicyEngine
from keybroker.authority.quorum import Quorum, Settled, binding, needs_of
from keybroker.authority.security_events import SecurityEvents
from keybroker.authority.selfcheck import Check, SelfCheck, der_of_raw
from keybroker.authority.store.reader import Reader
from keybroker.authority.timekeeper import Timekeeper
from keybroker.authority.tokens import SigningFailedError, Tokens, TokenSignature
from keybroker.authority.uses import Asker, KeyUse
from keybroker.errors import (
    ApprovalConsumedError,
    ApprovalExpiredError,
    ApprovalStaleError,
    AuditUnavailableError,
    ClockUntrustedError,
    DeniedError,
    FrozenError,
    HsmTimeoutError,
    HsmUnavailableError,
    IdempotencyMismatchError,
    InProgressError,
    InvalidError,
    NotFoundError,
    OverloadedError,
    PolicyFailedError,
    PolicyUnavailableError,
    RateLimitedError,
    RefusalError,
    SelfCheckError,
    SvidInvalidError,
)
from keybroker.identity.x509_svid import SvidValidator
from keybroker.model.call import Explain, ExplainReply, Pending, Problem, Redeem, Sign, SignBatch, Signed
from keybroker.model.decision import NO_GRANT, Decision, Obligation, Verdict
from keybroker.model.key import KeyVersion
from keybroker.model.record import Draft, Outcome, RecordKind, TokenFacts
from keybroker.telemetry import logger
from keybroker.tracing import Laps, Tracer

MAX_USES = 4_096
MAX_USES_PER_BATCH = 256  # of one batch at the same time, so that one caller's batch leaves room for others
_MAX_DECISIONS_PER_USE = 3
_SECOND_WAITS_S = 10.0

_log = logger()
_pack = msgspec.msgpack.Encoder().encode
_unpack_answer = msgspec.msgpack.Decoder(Signed | Pending).decode
# What a redemption can be refused for after the rules have allowed the use; on record as a denial.
_NOT_SPENT = (
    ApprovalConsumedError,
    ApprovalExpiredError,
    ApprovalStaleError,
    ClockUntrustedError,
    DeniedError,
    InvalidError,
    NotFoundError,
    RateLimitedError,
)


class Rules(Protocol):
    """Whatever holds the policy that is live now."""

    @property
    def engine(self) -> PolicyEngine:
        """The live policy."""
        ...

    def networks_of(self, address: str) -> tuple[str, ...]:
        """The named networks that an address is in, by the same policy."""
        ...


class _UnreleasedError(Exception):
    """The intent is on record and no signature will leave: how that is recorded, and what the caller is told."""

    def __init__(self, outcome: Outcome, refusal: RefusalError, cause: str, token: TokenFacts | None = None) -> None:
        super().__init__(cause)
        self.outcome = outcome
        self.refusal = refusal
        self.cause = cause
        self.token = token


@dataclass(frozen=True, slots=True)
class _Intent:
    """A use whose intent is durable, with the key version that it names."""

    use: str
    version: KeyVersion
    index: int
    generation: int
    claim: Claim | None
    obligations: tuple[Obligation, ...]
    redeems: str


class KeyUseService:
    """Decides, records, signs, checks, records, releases."""

    def __init__(  # noqa: PLR0913  one of each
        self,
        *,
        validator: SvidValidator,
        rules: Rules,
        keyring: Keyring,
        freezes: Freezes,
        glass: Glass,
        tokens: Tokens,
        selfcheck: SelfCheck,
        journal: Journal,
        denials: Denials,
        reader: Reader,
        timekeeper: Timekeeper,
        generation: Generation,
        security: SecurityEvents,
        metrics: AuthorityMetrics,
        tracer: Tracer,
        quorum: Quorum,
    ) -> None:
        self._validator = validator
        self._rules = rules
        self._keyring = keyring
        self._freezes = freezes
        self._glass = glass
        self._tokens = tokens
        self._selfcheck = selfcheck
        self._journal = journal
        self._denials = denials
        self._reader = reader
        self._timekeeper = timekeeper
        self._generation = generation
        self._security = security
        self._metrics = metrics
        self._tracer = tracer
        self._quorum = quorum
        self._under_way = 0
        self._idempotent: dict[bytes, tuple[bytes, asyncio.Future[None]]] = {}

    @property
    def under_way(self) -> int:
        """Uses that have begun and not ended."""
        return self._under_way

    async def sign(self, asker: Asker, ask: Sign) -> Signed | Pending:
        """Use a key once, or begin an operation where others have to approve the use first.

        Raises:
            RefusalError: nothing was released; which one says why.
        """
        request = KeyUse.parse(asker, ask.key, self._keyring.find(ask.key), ask.body)
        if not ask.idempotency_key:
            return await self._use(request)
        return await self._use_once(request, _claim(asker, "sign", ask.key, ask.idempotency_key, _pack(ask.body)))

    async def sign_batch(self, asker: Asker, ask: SignBatch) -> tuple[Signed | Pending | Problem, ...]:
        """Use a key once for each item: each has its own decision, intent and outcome, or its own operation, and they share commits."""
        gate = asyncio.Semaphore(MAX_USES_PER_BATCH)

        async def one(index: int) -> Signed | Pending | Problem:
            async with gate:
                try:
                    request = KeyUse.parse(asker, ask.key, self._keyring.find(ask.key), ask.items[index])
                    if index >= MAX_USES_PER_BATCH:  # it had to wait
                        request = self._identify_again(request)
                    if not ask.idempotency_key:
                        return await self._use(request)
                    of_item = f"{ask.idempotency_key}/{index}"
                    return await self._use_once(request, _claim(asker, "sign/batch", ask.key, of_item, ask.body_sha256))
                except RefusalError as err:
                    return Problem.of(err)

        return tuple(await asyncio.gather(*(one(index) for index in range(len(ask.items)))))

    async def redeem(self, asker: Asker, made: Operation, ask: Redeem) -> Signed | Pending:
        """Use a key as a complete quorum has approved it, once.

        Args:
            made: the operation, which the caller has asked for.

        Raises:
            RefusalError: nothing was released; which one says why.
        """
        request = KeyUse.of_operation(asker, made, self._keyring.find(made.subject.key.name), ask.message)
        if not ask.idempotency_key:
            return await self._use(request, redeems=made.id)
        claim = _claim(asker, "redeem", made.id, ask.idempotency_key, _pack(made.id))
        return await self._use_once(request, claim, made.id)

    async def explain(self, asker: Asker, ask: Explain) -> ExplainReply:
        """The decision that `sign` would get. No key is used; that it was asked is on record."""
        request = KeyUse.parse(asker, ask.key, self._keyring.find(ask.key), ask.body)
        decision = await self._rules.engine.decide(request.policy_input)
        if decision.verdict is Verdict.FAILED or NO_GRANT in decision.reasons or request.key is None:
            await self._refuse(request, decision, _refusal_of(decision) or _not_found())
        index = await self._journal.write(Entry(request.draft(RecordKind.READ, decision, what="explain", observed=())))
        allowed = decision.verdict is Verdict.ALLOW
        decision, _ = self._glass.relieved(decision)
        demands, moment = Demands(decision.obligations, request.subject), self._timekeeper.look()
        found = self._reader.look_at_units(lambda units: preview(demands, units, moment))
        frozen = self._frozen(request)
        needs = (
            *(needs_of(decision) if allowed else ("a grant that covers this request",)),
            *found.needs,
            *(("the end of the freeze",) if frozen else ()),
        )
        return ExplainReply(
            allow=allowed and not found.reasons and frozen is None,
            reasons=(*decision.reasons, *found.reasons, *(frozen.reasons if frozen else ())),
            grants=decision.grants,
            policy=decision.policy,
            needs=needs,
            record=index,
            limits=found.limits,
        )

    async def _use(self, request: KeyUse, claim: Claim | None = None, retry_of: str = "", redeems: str = "") -> Signed | Pending:
        """The one order, from step 3 on. Steps 1 and 2 made `request`.

        Args:
            redeems: the operation that the use is spent on; empty if the caller asks without one.

        Raises:
            DeniedError, NotFoundError, PolicyUnavailableError, PolicyFailedError: a rule said no, or no rule could answer.
            AuditUnavailableError: the intent is not durable, and no key was used; or the outcome is not, and nothing was released.
            HsmUnavailableError, HsmTimeoutError, SelfCheckError, OverloadedError: no good signature.
        """
        if self._under_way >= MAX_USES:
            raise OverloadedError("Too many requests are under way.", retry_after=1)
        self._under_way += 1
        laps, span = Laps(), self._tracer.begin("use", request.asker.traceparent)
        try:
            intent = await self._decide_and_record(request, claim, retry_of, redeems, laps)  # 3 decide, 4 record the intent
            if isinstance(intent, Pending):
                return intent  # no key is used before others have approved it
            try:
                await self._recheck(request, intent)
                made = await self._make(request, intent)  # 5 sign
                laps.lap("hsm")
                self._metrics.token(made.busy_ns)
                signature = await self._check(request, intent, made)  # 6 check
                laps.lap("check")
                await self._recheck(request, intent)
                signed = await self._release(request, intent, made, signature)  # 7 record the outcome
            except _UnreleasedError as err:
                await self._close(request, intent, err)
                err.refusal.use = intent.use
                raise err.refusal from err
            except RefusalError:
                raise
            except Exception as err:
                # A fault of ours between intent and outcome: what became of the use is unknown, and must be on record as that.
                _log.exception("use failed", request_id=request.asker.request_id)
                self._metrics.signed(Outcome.UNKNOWN, request.key_name)
                self._journal.owe(Entry(_outcome_draft(request, intent, Outcome.UNKNOWN, cause="fault")))
                raise OverloadedError("The request could not be finished.", retry_after=1, use=intent.use) from err
            laps.lap("release")
            return signed  # 8 release
        finally:
            self._under_way -= 1
            self._metrics.stages(laps)
            span.end(laps, {"keybroker.key": request.key_name, "keybroker.algorithm": request.body.algorithm.value})

    async def _decide_and_record(self, request: KeyUse, claim: Claim | None, retry_of: str, redeems: str, laps: Laps) -> _Intent | Pending:
        """Steps 3 and 4. Decides again if anything changes before the intent is durable."""
        for _ in range(_MAX_DECISIONS_PER_USE):
            generation = self._generation.number
            decision = await self._rules.engine.decide(request.policy_input)
            version = await self._require_allowed(request, decision)
            laps.lap("decide")
            use = str(ULID())
            draft = request.draft(RecordKind.INTENT, decision, use=use, retry_of=retry_of, observed=())
            decision, broken = self._glass.relieved(decision)
            if broken:
                draft = msgspec.structs.replace(draft, body={**draft.body, "break_glass": broken})
            demands = Demands(decision.obligations, request.subject)
            try:
                settled = await self._settle(request, decision, generation, claim, redeems, retry_of)
                if isinstance(settled, Pending):
                    return settled
                effect = None
                if settled is not None:
                    draft = msgspec.structs.replace(draft, operation_id=redeems, approvals=settled.approvals)
                    effect = settled.spend(use, retry_of)
                index = await self._journal.write(Entry(draft, generation=generation, claim=claim, demands=demands, effect=effect))
            except StaleGenerationError:
                request = self._identify_again(request)
                continue
            except UnmetError as err:
                await self._refuse(request, decision, err.refusal)
            except _NOT_SPENT as err:
                await self._refuse(request, decision, err)
            if settled is not None:
                self._quorum.changes.announce()
            if broken:
                self._metrics.used_glass()
            laps.lap("record")
            return _Intent(use, version, index, generation, claim, decision.obligations, redeems)
        raise OverloadedError("The rules change too fast to decide.", retry_after=1)

    async def _settle(
        self, request: KeyUse, decision: Decision, generation: int, claim: Claim | None, redeems: str, retry_of: str
    ) -> Settled | Pending | None:
        """A complete quorum where the rules want one, or the operation that waits for it; None where they want none.

        Raises:
            RefusalError: one of `_NOT_SPENT`.
            StaleGenerationError: decide again.
        """
        if redeems:
            return self._quorum.settle(redeems, request, decision, retry_of)
        if binding(decision.obligations):
            return await self._quorum.ask(request, decision, generation, claim)
        return None

    async def _require_allowed(self, request: KeyUse, decision: Decision) -> KeyVersion:
        """Only ALLOW passes, and only with a key that can do it; everything else is on record as a denial before it is raised."""
        refusal = _refusal_of(decision) or self._frozen(request)
        if refusal is not None:
            await self._refuse(request, decision, refusal)
        try:
            return await self._usable_version(request)
        except RefusalError as err:
            await self._refuse(request, decision, err)

    async def _usable_version(self, request: KeyUse) -> KeyVersion:
        """The key version that will sign. Asked only after the rules have allowed it, so that it tells strangers nothing."""
        if request.key is None:
            raise _not_found()
        if request.version is None:
            raise HsmUnavailableError("The token of this key has not shown it yet.", retry_after=1)
        if not self._tokens.is_available(request.key.token, request.ref):
            await self._tokens.wait(request.key.token, request.ref)
        if request.body.algorithm.family is not request.version.family:
            able = ", ".join(each.value for each in request.key.algorithms)
            raise InvalidError("The key cannot do this algorithm.", pointers=(("/algorithm", f"this key does {able}"),))
        return request.version

    def _frozen(self, request: KeyUse) -> FrozenError | None:
        """Asked after the rules: to a caller without a grant, a frozen key is as missing as any other."""
        token = request.key.token if request.key else ""
        return self._freezes.refusal(request.asker.caller.id.text, request.key_name, token)

    async def _refuse(self, request: KeyUse, decision: Decision, refusal: RefusalError) -> NoReturn:
        """Record the denial, then raise it."""
        unmet = refusal.reasons if decision.verdict is Verdict.ALLOW else ()
        await self._denials.write(request.draft(RecordKind.DENIAL, decision, code=refusal.code, unmet=unmet), refusal.code)
        if decision.verdict is Verdict.FAILED:
            _log.error("policy could not decide", reasons=decision.reasons, request_id=request.asker.request_id)
        raise refusal

    def _identify_again(self, request: KeyUse) -> KeyUse:
        """Something changed: is the caller still who it was? The request as the rules of now would see it.

        Raises:
            SvidInvalidError: no longer.
        """
        asker = request.asker
        self._validator.validate(asker.chain)
        networks = self._rules.networks_of(asker.caller.address)
        if networks == asker.networks:
            return request
        return request.asked_by(replace(asker, networks=networks))

    async def _recheck(self, request: KeyUse, intent: _Intent) -> None:
        """A change that would now refuse the use binds it, however far it has come; so does a window that has closed."""
        obligations = intent.obligations
        if self._generation.number != intent.generation:
            try:
                decision = await self._rules.engine.decide(self._identify_again(request).policy_input)
            except SvidInvalidError as err:
                raise _UnreleasedError(Outcome.WITHHELD, err, "svid-invalid") from err
            refusal = _refusal_of(decision) or self._frozen(request)
            decision, _ = self._glass.relieved(decision)
            if refusal is None and (intent.redeems or binding(decision.obligations)):
                refusal = self._quorum.still_holds(intent.redeems, request, decision)
            if refusal is not None:
                raise _UnreleasedError(Outcome.WITHHELD, refusal, refusal.code)
            obligations = decision.obligations
        try:
            require_open(obligations, self._timekeeper)
        except UnmetError as err:
            raise _UnreleasedError(Outcome.WITHHELD, err.refusal, err.refusal.code) from err

    async def _make(self, request: KeyUse, intent: _Intent) -> TokenSignature:
        """Step 5: one frame to a worker, with a deadline."""
        try:
            return await self._tokens.sign(intent.version.token, request.ref, request.body.algorithm, request.data)
        except (HsmUnavailableError, OverloadedError) as err:
            raise _UnreleasedError(Outcome.FAILED, err, err.code) from err
        except SigningFailedError as err:
            outcome = Outcome.UNKNOWN if err.may_have_signed else Outcome.FAILED
            refusal: RefusalError
            if err.ckr == "timeout":
                refusal = HsmTimeoutError("The token did not answer in time.")
            else:
                refusal = HsmUnavailableError("The token could not sign.", retry_after=1)
            _log.error("token failed", ckr=err.ckr, key=request.ref)
            raise _UnreleasedError(outcome, refusal, err.ckr) from err

    async def _check(self, request: KeyUse, intent: _Intent, made: TokenSignature) -> bytes:
        """Step 6: the signature in its released form, if it verifies with the pinned public key."""
        algorithm = request.body.algorithm
        try:
            checked = der_of_raw(made.raw) if algorithm.is_ecdsa else made.raw
        except ValueError:
            checked = b""
        if not await self._selfcheck.holds(Check(intent.version.spki, algorithm, request.data, checked)):
            self._tokens.distrust(made.worker)
            self._security.note("self-check-failed", f"{made.worker} {request.ref}")
            refusal = SelfCheckError("The token returned a signature that does not verify; it was destroyed.", retry_after=5)
            raise _UnreleasedError(Outcome.FAILED, refusal, "self-check", made.token)
        return made.raw if request.body.format == "p1363" else checked

    async def _release(self, request: KeyUse, intent: _Intent, made: TokenSignature, signature: bytes) -> Signed:
        """Steps 7 and 8: the outcome is durable, then the answer may go."""
        answer = Signed(
            signature=signature,
            key=request.key_name,
            version=intent.version.version,
            algorithm=request.body.algorithm.value,
            use=intent.use,
            log=self._journal.log,
            intent=intent.index,
            outcome=0,
        )
        draft = _outcome_draft(request, intent, Outcome.SIGNED, hashlib.sha256(signature).hexdigest(), made.token)
        entry = Entry(draft, claim=intent.claim, answer=_pack(answer) if intent.claim else None)
        try:
            index = await self._journal.write(entry)
        except AuditUnavailableError as err:
            self._journal.owe(Entry(_outcome_draft(request, intent, Outcome.UNKNOWN, token=made.token, cause="outcome-not-durable")))
            self._metrics.signed(Outcome.UNKNOWN, request.key_name)
            msg = "The outcome cannot be recorded now; the signature was destroyed, not released."
            raise type(err)(msg, retry_after=err.retry_after, use=intent.use) from err
        self._metrics.signed(Outcome.SIGNED, request.key_name)
        return msgspec.structs.replace(answer, outcome=index)

    async def _close(self, request: KeyUse, intent: _Intent, err: _UnreleasedError) -> None:
        """The outcome of a use that releases nothing. If even that cannot be written now, it is owed."""
        entry = Entry(_outcome_draft(request, intent, err.outcome, token=err.token, cause=err.cause))
        self._metrics.signed(err.outcome, request.key_name)
        try:
            await self._journal.write(entry)
        except AuditUnavailableError:
            self._journal.owe(entry)

    async def _use_once(self, request: KeyUse, claim: Claim, redeems: str = "") -> Signed | Pending:
        """A use under an idempotency key: the first makes it, the others get the same answer.

        Raises:
            IdempotencyMismatchError: the key was used with another body.
            InProgressError: the first is still under way after ten seconds.
        """
        while (running := self._idempotent.get(claim.scope)) is not None:
            body_sha256, first = running
            if body_sha256 != claim.body_sha256:
                raise _mismatch()
            try:
                await asyncio.wait_for(asyncio.shield(first), _SECOND_WAITS_S)
            except TimeoutError as err:
                raise InProgressError("The first request with this Idempotency-Key is still under way.") from err
            request = self._identify_again(request)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idempotent[claim.scope] = (claim.body_sha256, done)
        try:
            known = self._reader.idempotent_use(claim.scope)
            if known is None or known.made_us < self._timekeeper.look().time_us - IDEMPOTENCY_US:
                return await self._use(request, claim, redeems=redeems)
            if known.body_sha256 != claim.body_sha256:
                raise _mismatch()
            if known.answer is None:
                return await self._use(request, claim, retry_of=known.use, redeems=redeems)
            return await self._release_again(request, _unpack_answer(known.answer))
        finally:
            del self._idempotent[claim.scope]
            done.set_result(None)

    async def _release_again(self, request: KeyUse, answer: Signed | Pending) -> Signed | Pending:
        """The same signature, or the same operation, for the same idempotency key: decided anew, on record, and no second use."""
        decision = await self._rules.engine.decide(request.policy_input)
        await self._require_allowed(request, decision)
        if isinstance(answer, Pending):
            return self._quorum.again(answer)
        await self._journal.write(Entry(request.draft(RecordKind.READ, decision, retry_of=answer.use, what="replay", observed=())))
        return msgspec.structs.replace(answer, outcome=self._reader.outcome_index(answer.use))


def _outcome_draft(
    request: KeyUse, intent: _Intent, outcome: Outcome, signature_sha256: str = "", token: TokenFacts | None = None, cause: str = ""
) -> Draft:
    return Draft(
        kind=RecordKind.OUTCOME,
        trail=request.asker.caller.id.text,
        use=intent.use,
        key=request.key_facts(),
        outcome=outcome,
        signature_sha256=signature_sha256,
        token=token,
        trace_id=request.asker.trace_id,
        body={"cause": cause},
    )


def _refusal_of(decision: Decision) -> RefusalError | None:
    """What a caller is told of a decision; None for an allow."""
    match decision.verdict:
        case Verdict.ALLOW:
            return None
        case Verdict.FAILED if PolicyUnavailableError.code in decision.reasons:
            return PolicyUnavailableError("The rules could not be asked in time.", retry_after=1)
        case Verdict.FAILED:
            return PolicyFailedError("The rules gave no usable answer.", retry_after=1)
        case Verdict.DENY if NO_GRANT in decision.reasons:
            return _not_found()
        case Verdict.DENY:
            return DeniedError("No rule allows this request.", reasons=decision.reasons)


def _not_found() -> NotFoundError:
    return NotFoundError("There is no such key, or nothing of it is granted to you.")


def _mismatch() -> IdempotencyMismatchError:
    return IdempotencyMismatchError("This Idempotency-Key was used with another request; use a new one.")


def _claim(asker: Asker, route: str, key: str, idempotency_key: str, body: bytes) -> Claim:
    scope = f"{asker.caller.id.text}\0{route}\0{key}\0{idempotency_key}".encode()
    return Claim(hashlib.sha256(scope).digest(), hashlib.sha256(body).digest())
