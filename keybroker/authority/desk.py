"""Where calls of the frontend arrive: identify the caller, hand the ask to the one who does it, turn refusals into frames.

The frontend is not trusted with anything but carrying bytes: the chain is validated here, on every call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, assert_never

from keybroker.authority.breakers import Breakers
from keybroker.authority.log_reads import LogReads
from keybroker.authority.metrics import AuthorityMetrics
from keybroker.authority.operation_desk import OperationDesk
from keybroker.authority.policy_changes import PolicyChanges
from keybroker.authority.reads import Reads
from keybroker.authority.responders import Responders
from keybroker.authority.security_events import SecurityEvents
from keybroker.authority.service import KeyUseService
from keybroker.authority.uses import Asker
from keybroker.errors import DeniedError, OverloadedError, RefusalError, SvidInvalidError, UnauthenticatedError
from keybroker.identity.x509_svid import SvidValidator
from keybroker.model.approval import SIGNING_KINDS
from keybroker.model.call import (
    Answer,
    AnyReply,
    Approve,
    AskFreeze,
    AskImpact,
    AskUnfreeze,
    BatchReply,
    BreakGlass,
    Call,
    CloseGlass,
    Explain,
    ExportLog,
    HandshakesFailed,
    Health,
    HealthReply,
    ListFreezes,
    ListGlasses,
    ListJwks,
    ListKeys,
    ListOperations,
    Metrics,
    MetricsReply,
    Noted,
    Problem,
    ProposePolicy,
    ProveConsistency,
    ProveInclusion,
    QueryRecords,
    Redeem,
    ShowCheckpoint,
    ShowKey,
    ShowOperation,
    ShowPolicy,
    ShowRecord,
    ShowTile,
    Sign,
    SignBatch,
    Whoami,
)
from keybroker.model.identity import Caller
from keybroker.telemetry import logger
from keybroker.wire import Channel

_log = logger()

CallerChannel = Channel[Call, Answer]


class Networks(Protocol):
    """Whatever knows which named networks an address is in."""

    def networks_of(self, address: str) -> tuple[str, ...]:
        """Names, in order; empty for an address in none."""
        ...


class Desk:
    """Takes calls, one task each."""

    def __init__(
        self,
        *,
        validator: SvidValidator,
        networks: Networks,
        service: KeyUseService,
        reads: Reads,
        operations: OperationDesk,
        responders: Responders,
        changes: PolicyChanges | None,
        breakers: Breakers,
        log: LogReads,
        security: SecurityEvents,
        metrics: AuthorityMetrics,
        health: Callable[[], HealthReply],
        metrics_text: Callable[[], bytes],
    ) -> None:
        self._validator = validator
        self._networks = networks
        self._service = service
        self._reads = reads
        self._operations = operations
        self._responders = responders
        self._changes = changes
        self._breakers = breakers
        self._log = log
        self._security = security
        self._metrics = metrics
        self._health = health
        self._metrics_text = metrics_text
        self._tasks: set[asyncio.Task[None]] = set()

    def on_call(self, channel: CallerChannel, call: Call) -> None:
        """Begin to answer a call."""
        task = asyncio.get_running_loop().create_task(self._answer(channel, call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def on_end(self, _channel: CallerChannel, why: Exception | None) -> None:
        """A frontend has gone; what it asked for is finished and recorded all the same."""
        if why is not None:
            _log.warning("frontend connection ended", why=str(why))

    async def drain(self, seconds: float) -> None:
        """Wait for the calls under way, but for those that only wait for something to happen."""
        self._operations.stop_waiting()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    async def _answer(self, channel: CallerChannel, call: Call) -> None:
        reply: AnyReply
        try:
            reply = await self._reply(call)
        except RefusalError as err:
            reply = Problem.of(err)
        except Exception:  # noqa: BLE001  a fault of ours must be an answer, not a silence
            _log.exception("call failed", request_id=call.request_id)
            reply = Problem.of(OverloadedError("The request could not be finished.", retry_after=1))
        channel.send(Answer(call.id, reply))

    async def _reply(self, call: Call) -> AnyReply:  # noqa: C901, PLR0911, PLR0912  one line for each ask
        match call.ask:
            case Health():
                return self._health()
            case Metrics():
                return MetricsReply(self._metrics_text())
            case HandshakesFailed(counts):
                for result, address, count in counts:
                    self._security.note("handshake-failed", f"{result[:32]} from {address[:64]}", count)
                return Noted()
        asker = self._identify(call)
        match call.ask:
            case Sign():
                return await self._service.sign(asker, call.ask)
            case SignBatch():
                return BatchReply(await self._service.sign_batch(asker, call.ask))
            case Explain():
                return await self._service.explain(asker, call.ask)
            case AskFreeze():
                return await self._responders.freeze(asker, call.ask)
            case ListFreezes():
                return await self._responders.list(asker)
            case AskUnfreeze():
                return await self._responders.unfreeze(asker, call.ask)
            case BreakGlass():
                return await self._breakers.open(asker, call.ask)
            case ListGlasses():
                return await self._breakers.list(asker)
            case CloseGlass():
                return await self._breakers.close(asker, call.ask)
            case ShowPolicy():
                return await self._require_changes().show(asker)
            case ProposePolicy():
                return await self._require_changes().propose(asker, call.ask)
            case Whoami():
                return await self._reads.whoami(asker)
            case ListKeys() | ListJwks():
                return await self._reads.list_keys(asker)
            case ShowKey():
                return await self._reads.show_key(asker, call.ask)
            case QueryRecords():
                return await self._reads.query_records(asker, call.ask)
            case AskImpact():
                return await self._reads.impact(asker, call.ask.question)
            case ShowRecord():
                return await self._reads.show_record(asker, call.ask)
            case Redeem():
                known = await self._operations.require_requester(asker, call.ask.operation)
                if known.operation.subject.operation.kind not in SIGNING_KINDS:
                    raise DeniedError("A change is redeemed by asking for it again, with this operation.", reasons=("ask-for-the-change",))
                return await self._service.redeem(asker, known.operation, call.ask)
            case ListOperations():
                return await self._operations.list_operations(asker, call.ask)
            case ShowOperation():
                return await self._operations.show(asker, call.ask)
            case Approve():
                return await self._operations.approve(asker, call.ask)
            case ShowCheckpoint() | ProveInclusion() | ProveConsistency() | ShowTile() | ExportLog():
                return await self._log.answer(asker, call.ask)
            case _:
                assert_never(call.ask)

    def _require_changes(self) -> PolicyChanges:
        """Whoever takes proposals.

        Raises:
            DeniedError: nobody does.
        """
        if self._changes is None:
            raise DeniedError("The rules of this broker are files on its host.", reasons=("policy-is-in-files",))
        return self._changes

    def _identify(self, call: Call) -> Asker:
        """Step 1 of the one order.

        Raises:
            UnauthenticatedError, SvidInvalidError: nobody that this broker knows. On record, counted.
        """
        if not call.chain:
            raise UnauthenticatedError("Connect with an X.509-SVID.")
        try:
            svid = self._validator.validate(call.chain)
        except SvidInvalidError as err:
            self._metrics.refused(err.code)
            claimed = err.about[:200] or "nobody that can be read"
            self._security.note("svid-invalid", f"{' '.join(err.reasons)}: {claimed}, from {call.address}")
            raise
        return Asker(Caller(svid, call.address), call.chain, call.request_id, call.traceparent, self._networks.networks_of(call.address))
