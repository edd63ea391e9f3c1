"""The way from the authority to the tokens: one link per worker, and a pool of links per token.

A worker is in service when it has shown its token and judged every key configured there. One whose signature did not verify is
out of service for a while: it may be broken, or not ours any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from keybroker.config import TokenLink
from keybroker.errors import AuditUnavailableError, HsmUnavailableError, OverloadedError, RoomUnavailableError
from keybroker.model.key import Algorithm
from keybroker.model.record import TokenFacts
from keybroker.model.task import (
    MAX_RESULT_BYTES,
    Alive,
    AnyProduct,
    AnyWork,
    KeyOpened,
    KeyRefused,
    OpenKey,
    Probe,
    RawSignature,
    Result,
    SignTask,
    Task,
    TaskFailed,
)
from keybroker.process import uid_of
from keybroker.telemetry import logger
from keybroker.wire import Link

MAX_TASKS_PER_WORKER = 1024
DISTRUST_SECONDS = 30.0
_OPEN_SECONDS = 10.0
_RETRY_SECONDS = 0.5

_log = logger()

Judge = Callable[[str, KeyOpened | KeyRefused], Awaitable[bool]]
"""Told what a worker of a token found for a key; says whether it may be used there."""


class SigningFailedError(Exception):
    """The token was asked and gave no signature.

    Attributes:
        ckr: what PKCS#11 said, `timeout`, or `worker-lost`.
        may_have_signed: whether a signature may exist all the same.
    """

    def __init__(self, ckr: str, *, may_have_signed: bool) -> None:
        super().__init__(ckr)
        self.ckr = ckr
        self.may_have_signed = may_have_signed


@dataclass(frozen=True, slots=True)
class TokenSignature:
    """A signature that nobody has checked yet, who made it, and how long the token took."""

    raw: bytes = field(repr=False)
    token: TokenFacts
    worker: str
    busy_ns: int


class Tokens(Protocol):
    """What the one order needs of the tokens."""

    def is_available(self, token: str, ref: str) -> bool:
        """Whether any worker could use this key now."""
        ...

    async def sign(self, token: str, ref: str, algorithm: Algorithm, data: bytes) -> TokenSignature:
        """A signature that nobody has checked yet."""
        ...

    def distrust(self, worker: str) -> None:
        """Take a worker out of service for a while: it returned a signature that does not verify."""
        ...


class Worker:
    """One hsm worker as the authority sees it: a link, and which keys it may be asked to use."""

    def __init__(self, name: str, token: str, link: TokenLink, index: int, keys: tuple[OpenKey, ...], judge: Judge) -> None:
        self.name = name
        self.facts = TokenFacts("", "")
        self._token = token
        self._keys = keys
        self._judge = judge
        self._deadline_s = link.deadline_ms / 1000
        self._usable: frozenset[str] = frozenset()
        self._distrusted_until = 0.0
        self._opening: asyncio.Task[None] | None = None
        self._link = Link[Task, Result](link.sockets[index], uid_of(link.hsm_user), Result, MAX_RESULT_BYTES, self._on_change)

    @property
    def is_in_service(self) -> bool:
        """Whether requests may be sent here now."""
        return bool(self.facts.serial or self.facts.label) and time.monotonic() >= self._distrusted_until

    @property
    def load(self) -> int:
        """Tasks under way."""
        return self._link.in_flight

    def can_use(self, ref: str) -> bool:
        """Whether this worker has the key open and is in service."""
        return ref in self._usable and self.is_in_service

    def start(self) -> None:
        """Connect in the background."""
        self._link.start()

    async def stop(self) -> None:
        """Disconnect for good."""
        await self._link.stop()

    def distrust(self) -> None:
        """Take the worker out of service for a while: it returned a signature that does not verify."""
        self._distrusted_until = time.monotonic() + DISTRUST_SECONDS

    async def sign(self, ref: str, algorithm: Algorithm, data: bytes) -> TokenSignature:
        """Ask for a signature.

        Raises:
            SigningFailedError: there is none.
        """
        try:
            product = await self._ask(SignTask(ref, algorithm, data), self._deadline_s)
        except RoomUnavailableError as err:
            # The connection broke under way: the task may have been done, and nobody will ever say.
            raise SigningFailedError("worker-lost", may_have_signed=True) from err
        except TimeoutError as err:
            raise SigningFailedError("timeout", may_have_signed=True) from err
        match product:
            case RawSignature(signature, busy_ns):
                return TokenSignature(signature, self.facts, self.name, busy_ns)
            case TaskFailed(ckr, may_have_signed):
                raise SigningFailedError(ckr, may_have_signed=may_have_signed)
            case _:
                raise SigningFailedError("wrong-product", may_have_signed=True)

    async def _ask(self, work: AnyWork, deadline_s: float) -> AnyProduct:
        return (await self._link.ask(lambda number: Task(number, work), deadline_s)).product

    def _on_change(self, is_up: bool, why: Exception | None) -> None:  # noqa: FBT001  the callback's one argument is the fact itself
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        self._usable = frozenset()
        self.facts = TokenFacts("", "")
        if is_up:
            self._opening = asyncio.get_running_loop().create_task(self._open())
        else:
            _log.warning("worker lost", worker=self.name, why=str(why or "closed"))

    async def _open(self) -> None:
        """Learn which token this is, and have each configured key found and judged, before any use."""
        try:
            product = await self._ask(Probe(), _OPEN_SECONDS)
            if not isinstance(product, Alive):
                raise RoomUnavailableError("the worker has no session")
            usable: set[str] = set()
            for key in self._keys:
                found = await self._ask(key, _OPEN_SECONDS)
                if isinstance(found, KeyOpened | KeyRefused) and await self._judge(self._token, found):
                    usable.add(key.ref)
        except (RoomUnavailableError, TimeoutError, AuditUnavailableError) as err:
            _log.warning("worker not usable", worker=self.name, why=str(err) or "timeout")
            await asyncio.sleep(_RETRY_SECONDS)
            self._link.break_off()
            return
        self._usable = frozenset(usable)
        self.facts = TokenFacts(product.serial, product.label)
        _log.info("worker in service", worker=self.name, keys=len(usable))


class TokenPool:
    """All workers of all tokens."""

    def __init__(self, workers: dict[str, tuple[Worker, ...]]) -> None:
        self._workers = workers

    @classmethod
    def of(cls, links: dict[str, TokenLink], keys: dict[str, tuple[OpenKey, ...]], judge: Judge) -> TokenPool:
        """One worker per configured socket.

        Args:
            links: by token name.
            keys: by token name, what to open there.
            judge: asked about each key that a worker has found or refused.
        """
        return cls(
            {
                token: tuple(
                    Worker(f"{token}-{index}", token, link, index, keys.get(token, ()), judge) for index in range(len(link.sockets))
                )
                for token, link in links.items()
            }
        )

    def start(self) -> None:
        """Connect to every worker in the background."""
        for worker in self._all():
            worker.start()

    async def stop(self) -> None:
        """Disconnect from every worker."""
        for worker in self._all():
            await worker.stop()

    def sessions(self) -> dict[str, tuple[int, int]]:
        """For each token: workers in service, workers configured."""
        return {token: (sum(worker.is_in_service for worker in workers), len(workers)) for token, workers in self._workers.items()}

    def is_available(self, token: str, ref: str) -> bool:
        """Whether any worker could use this key now."""
        return any(worker.can_use(ref) for worker in self._workers[token])

    async def sign(self, token: str, ref: str, algorithm: Algorithm, data: bytes) -> TokenSignature:
        """Have the least busy worker sign; once more elsewhere if the first certainly made no signature.

        Raises:
            HsmUnavailableError, OverloadedError: no worker was asked.
            SigningFailedError: one was asked, and there is no signature.
        """
        worker = self._choose(token, ref, frozenset())
        try:
            return await worker.sign(ref, algorithm, data)
        except SigningFailedError as err:
            if err.may_have_signed or not err.ckr.startswith(_SESSION_TROUBLE):
                raise
            try:
                other = self._choose(token, ref, frozenset({worker}))
            except (HsmUnavailableError, OverloadedError):
                raise err from None
            return await other.sign(ref, algorithm, data)

    def distrust(self, worker: str) -> None:
        """Take a worker out of service for a while."""
        for each in self._all():
            if each.name == worker:
                each.distrust()

    def _choose(self, token: str, ref: str, without: frozenset[Worker]) -> Worker:
        able = [worker for worker in self._workers[token] if worker not in without and worker.can_use(ref)]
        if not able:
            raise HsmUnavailableError("No session of this key's token is in service.", retry_after=1)
        worker = min(able, key=lambda each: each.load)
        if worker.load >= MAX_TASKS_PER_WORKER:
            raise OverloadedError("The token has too many requests waiting.", retry_after=1)
        return worker

    def _all(self) -> list[Worker]:
        return [worker for workers in self._workers.values() for worker in workers]


# Return codes that blame the session, not the request: another session may do better.
_SESSION_TROUBLE = (
    "CKR_SESSION",
    "CKR_USER_NOT_LOGGED_IN",
    "CKR_OBJECT_HANDLE",
    "CKR_KEY_HANDLE",
    "CKR_DEVICE",
    "CKR_OPERATION_ACTIVE",
    "CKR_TOKEN",
)
