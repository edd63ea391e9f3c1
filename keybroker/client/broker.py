"""The broker as an object: one method for each question in `keybroker.client.asks`, blocking or awaited."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

from keybroker.client import approving, asks
from keybroker.client.asks import MAX_WAIT_S, Ask, RecordFilters
from keybroker.client.results import Operation, Record
from keybroker.client.transport import TIMEOUT_S, AsyncTransport, Transport
from keybroker.model.approval import Answer, Confirmation, Statement
from keybroker.model.identity import SpiffeId

PAGE = 1_000
_PAUSE_S = 0.5  # between two questions that the broker may answer at once

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(question: Callable[P, Ask[T]]) -> Callable[Concatenate[Client, P], T]:
    """A question as a method of `Client`."""

    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._transport.send(question(*args, **kwargs))

    return _dressed(method, question)


def _awaited(question: Callable[P, Ask[T]]) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    """A question as a method of `AsyncClient`."""

    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._transport.send(question(*args, **kwargs))

    return _dressed(method, question)


M = TypeVar("M", bound=Callable[..., Any])


def _dressed(method: M, question: Callable[..., Any]) -> M:
    """The method with the question's name, text and parameters, for readers and their tools."""
    signature = inspect.signature(question)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    answer = str(signature.return_annotation).removeprefix("Ask[").removesuffix("]")
    method.__name__ = method.__qualname__ = question.__name__
    method.__doc__ = question.__doc__
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]  # what `inspect` looks at first
        parameters=[own, *signature.parameters.values()], return_annotation=answer
    )
    return method


class Client:
    """A client of one broker.

    For any number of threads at once: they share its connections. Not for a process that was forked after the first call: make a
    client of its own there.

    Every method raises `RefusalError` (the subclass of the problem's code) where the broker says no, `PendingError` where others have
    to approve first, `BrokerUnreachableError` where there is no answer, `BrokerIdentityError` where another than the broker answers,
    and `BrokerAnswerError` where the answer makes no sense.

    Args:
        url: `https://HOST:PORT`.
        svid: PEM file with our own chain and key; read again when it changes.
        bundle: file with the CA certificates of our trust domain; read again when it changes.
        broker_id: the SPIFFE ID that the broker must prove; `spiffe://<our trust domain>/keybroker` if None.
        timeout_s: seconds for one call, repeated attempts included.

    Raises:
        SettingsError: the URL cannot be used.
        ConfigError: the SVID or the bundle cannot be used.
    """

    def __init__(self, url: str, *, svid: Path, bundle: Path, broker_id: SpiffeId | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._transport = Transport(url, svid, bundle, broker_id, timeout_s)
        self._svid = svid

    whoami = _blocking(asks.whoami)
    keys = _blocking(asks.keys)
    key = _blocking(asks.key)
    public_key = _blocking(asks.public_key)
    jwks = _blocking(asks.jwks)
    sign = _blocking(asks.sign)
    sign_batch = _blocking(asks.sign_batch)
    explain = _blocking(asks.explain)
    operations = _blocking(asks.operations)
    operation = _blocking(asks.operation)
    give_approval = _blocking(asks.give_approval)
    redeem = _blocking(asks.redeem)
    freezes = _blocking(asks.freezes)
    freeze = _blocking(asks.freeze)
    unfreeze = _blocking(asks.unfreeze)
    glasses = _blocking(asks.glasses)
    break_glass = _blocking(asks.break_glass)
    close_glass = _blocking(asks.close_glass)
    live_policy = _blocking(asks.live_policy)
    propose_policy = _blocking(asks.propose_policy)
    records = _blocking(asks.records)
    record = _blocking(asks.record)
    impact = _blocking(asks.impact)
    checkpoint = _blocking(asks.checkpoint)
    inclusion_proof = _blocking(asks.inclusion_proof)
    consistency_proof = _blocking(asks.consistency_proof)
    export = _blocking(asks.export)

    def iter_records(self, **filters: Unpack[RecordFilters]) -> Iterator[Record]:
        """All records that match, oldest first, page by page. Filters as for `records`."""
        cursor: str | None = ""
        while cursor is not None:
            page = self.records(**filters, cursor=cursor, limit=PAGE)
            yield from page.records
            cursor = page.next

    def approve(self, operation: Operation, *, stages: Sequence[str] = (), confirmed: Confirmation = "yes-flag") -> Operation:
        """Sign an approval of an operation that was looked at, with our own SVID's key, and hand it in.

        Args:
            operation: as `operation` or `operations` gave it: what it shows is what is signed, and no other.
            stages: only these of `operation.yours`; all of them if empty.
            confirmed: how the approver was asked: `prompt`, `file` (as `prompt`, after a file was found to have the digest), or
                `yes-flag`, where a program decides.

        Raises:
            NothingToApproveError: no stage of it waits for us.
        """
        return self._give(operation, "approve", confirmed, stages)

    def refuse(self, operation: Operation, *, confirmed: Confirmation = "yes-flag") -> Operation:
        """The same with a no, which ends the operation."""
        return self._give(operation, "refuse", confirmed, ())

    def statements(
        self, operation: Operation, verdict: Answer, *, confirmed: Confirmation, stages: Sequence[str] = ()
    ) -> tuple[Statement, ...]:
        """What `approve` or `refuse` would sign, to be shown first; `give` signs it. Asks nobody."""
        return approving.statements(operation, approving.approver_of(self._svid), verdict, confirmed, stages)

    def give(self, statement: Statement) -> Operation:
        """Sign a statement that was shown, with our own SVID's key, and hand it in."""
        return self.give_approval(statement.subject.operation.id, approving.signed(statement, self._svid))

    def wait_for(self, id: str, *, timeout_s: float) -> Operation:  # noqa: A002  as the broker calls it
        """An operation as soon as it is not `pending` any more, or as it is after so many seconds."""
        end = time.monotonic() + timeout_s
        while True:
            left = end - time.monotonic()
            operation = self.operation(id, wait_s=max(0, min(int(left), MAX_WAIT_S)))
            if operation.state != "pending" or left <= _PAUSE_S:
                return operation
            time.sleep(_PAUSE_S)

    def _give(self, operation: Operation, verdict: Answer, confirmed: Confirmation, stages: Sequence[str]) -> Operation:
        for statement in self.statements(operation, verdict, confirmed=confirmed, stages=stages):
            operation = self.give(statement)
        return operation

    def close(self) -> None:
        """End all connections, those of calls that are under way when they have their answer."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AsyncClient:
    """A client of one broker, for asyncio: `Client` with every method awaited.

    For any number of tasks at once, all in one event loop: they share its connections. A task that is cancelled while it waits ends
    its own connection only; whether its request took effect is unknown, as with a lost answer.
    """

    def __init__(self, url: str, *, svid: Path, bundle: Path, broker_id: SpiffeId | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._transport = AsyncTransport(url, svid, bundle, broker_id, timeout_s)
        self._svid = svid

    whoami = _awaited(asks.whoami)
    keys = _awaited(asks.keys)
    key = _awaited(asks.key)
    public_key = _awaited(asks.public_key)
    jwks = _awaited(asks.jwks)
    sign = _awaited(asks.sign)
    sign_batch = _awaited(asks.sign_batch)
    explain = _awaited(asks.explain)
    operations = _awaited(asks.operations)
    operation = _awaited(asks.operation)
    give_approval = _awaited(asks.give_approval)
    redeem = _awaited(asks.redeem)
    freezes = _awaited(asks.freezes)
    freeze = _awaited(asks.freeze)
    unfreeze = _awaited(asks.unfreeze)
    glasses = _awaited(asks.glasses)
    break_glass = _awaited(asks.break_glass)
    close_glass = _awaited(asks.close_glass)
    live_policy = _awaited(asks.live_policy)
    propose_policy = _awaited(asks.propose_policy)
    records = _awaited(asks.records)
    record = _awaited(asks.record)
    impact = _awaited(asks.impact)
    checkpoint = _awaited(asks.checkpoint)
    inclusion_proof = _awaited(asks.inclusion_proof)
    consistency_proof = _awaited(asks.consistency_proof)
    export = _awaited(asks.export)

    async def iter_records(self, **filters: Unpack[RecordFilters]) -> AsyncIterator[Record]:
        """All records that match, oldest first, page by page. Filters as for `records`."""
        cursor: str | None = ""
        while cursor is not None:
            page = await self.records(**filters, cursor=cursor, limit=PAGE)
            for record in page.records:
                yield record
            cursor = page.next

    async def approve(self, operation: Operation, *, stages: Sequence[str] = (), confirmed: Confirmation = "yes-flag") -> Operation:
        """As `Client.approve`."""
        return await self._give(operation, "approve", confirmed, stages)

    async def refuse(self, operation: Operation, *, confirmed: Confirmation = "yes-flag") -> Operation:
        """As `Client.refuse`."""
        return await self._give(operation, "refuse", confirmed, ())

    def statements(
        self, operation: Operation, verdict: Answer, *, confirmed: Confirmation, stages: Sequence[str] = ()
    ) -> tuple[Statement, ...]:
        """As `Client.statements`: asks nobody, and is not awaited."""
        return approving.statements(operation, approving.approver_of(self._svid), verdict, confirmed, stages)

    async def give(self, statement: Statement) -> Operation:
        """As `Client.give`."""
        return await self.give_approval(statement.subject.operation.id, approving.signed(statement, self._svid))

    async def wait_for(self, id: str, *, timeout_s: float) -> Operation:  # noqa: A002  as the broker calls it
        """As `Client.wait_for`."""
        end = asyncio.get_running_loop().time() + timeout_s
        while True:
            left = end - asyncio.get_running_loop().time()
            operation = await self.operation(id, wait_s=max(0, min(int(left), MAX_WAIT_S)))
            if operation.state != "pending" or left <= _PAUSE_S:
                return operation
            await asyncio.sleep(_PAUSE_S)

    async def _give(self, operation: Operation, verdict: Answer, confirmed: Confirmation, stages: Sequence[str]) -> Operation:
        for statement in self.statements(operation, verdict, confirmed=confirmed, stages=stages):
            operation = await self.give(statement)
        return operation

    async def aclose(self) -> None:
        """End all connections, those of calls that are under way when they have their answer."""
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()
