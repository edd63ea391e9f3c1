"""The way from the authority to the tokens: one link per worker, and a pool of links per token.

A worker is in service when it has shown its token and the keys configured there have been judged. It is out of service, and
requests go elsewhere or are refused at once, from the moment it says that its session is lost, the connection breaks, it lets a request
time out without a word, or a signature of its does not verify; it is back when it has been asked for token and keys anew.

A worker does its tasks in the order in which they were sent, and answers each before it begins the next. So when it goes away, only
the oldest task without an answer can have been begun; the others were certainly not, and another worker may do them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from keybroker.config import TokenLink
from keybroker.errors import AuditUnavailableError, HsmUnavailableError, OverloadedError, RoomUnavailableError, WireError
from keybroker.model.key import Algorithm
from keybroker.model.record import TokenFacts
from keybroker.model.task import (
    MAX_RESULT_BYTES,
    Alive,
    AnyProduct,
    AnyWork,
    CheckpointRefused,
    CheckpointSigned,
    KeyOpened,
    KeyRefused,
    LogOpened,
    NeedsOperator,
    OpenKey,
    OpenLog,
    Probe,
    RawSignature,
    Result,
    SignCheckpoint,
    SignNotice,
    SignTask,
    Task,
    TaskFailed,
)
from keybroker.process import uid_of
from keybroker.telemetry import logger
from keybroker.wire import Link

MAX_TASKS_PER_WORKER = 1024
DISTRUST_SECONDS = 30.0
SESSION_WAIT_SECONDS = 1.0
_SESSION_POLL_SECONDS = 0.05
_NO_SESSION_LEFT = "CKR_SESSION_COUNT"
_FULL_SECONDS = 10.0  # longer than the hsm room waits before it tries again
_OPEN_SECONDS = 10.0
_RETRY_SECONDS, _MAX_RETRY_SECONDS = 0.5, 4.0
_NOT_IN_SERVICE = "No session of this key's token is in service."

_log = logger()

Judge = Callable[[str, str, KeyOpened | KeyRefused], Awaitable[bool]]
"""Told what a worker found for a key (token, worker, what); says whether it may be used there."""

Note = Callable[[str, str], None]
"""Told of a security event: its stable name, and which one."""


LogJudge = Callable[[LogOpened | KeyRefused], Awaitable[bool]]
"""Told what a worker says of the log that it signs for; says whether it may be asked for checkpoints."""


class SigningFailedError(Exception):
    """The token was asked and gave no signature.

    Attributes:
        ckr: what PKCS#11 said, `timeout`, or `worker-lost`.
        may_have_signed: whether a signature may exist all the same.
        is_session_lost: whether the worker is to blame, so that another may do better.
    """

    def __init__(self, ckr: str, *, may_have_signed: bool, is_session_lost: bool = False) -> None:
        super().__init__(ckr)
        self.ckr = ckr
        self.may_have_signed = may_have_signed
        self.is_session_lost = is_session_lost


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

    async def wait(self, token: str, ref: str) -> None:
        """Called where none could: returns if one can soon.

        Raises:
            HsmUnavailableError, OverloadedError: none can.
        """
        ...

    async def sign(self, token: str, ref: str, algorithm: Algorithm, data: bytes) -> TokenSignature:
        """A signature that nobody has checked yet."""
        ...

    def distrust(self, worker: str) -> None:
        """Take a worker out of service for a while: it returned a signature that does not verify."""
        ...


class Worker:
    """One hsm worker as the authority sees it: a link, and which keys it may be asked to use."""

    def __init__(
        self,
        name: str,
        token: str,
        link: TokenLink,
        index: int,
        keys: tuple[OpenKey, ...],
        judge: Judge,
        note: Note,
        judge_log: LogJudge | None = None,
    ) -> None:
        self.name = name
        self.facts = TokenFacts("", "")
        self._trouble = "not connected"
        self._token = token
        self._keys = keys
        self._judge = judge
        self._note = note
        self._judge_log = judge_log
        self._signs_log = False
        self._watchdog_s = 0.0
        self._usable: frozenset[str] = frozenset()
        self._distrusted_until = 0.0
        self._token_full_until = 0.0
        self._is_silent = False
        self._opening: asyncio.Task[None] | None = None
        self._answers = 0
        self._unanswered: dict[int, None] = {}  # ids of this connection's tasks, in the order in which they are done
        self._has_ended = False  # it has said that it begins no other task
        self._is_broken_off = False  # by us, so that it may have begun what it had not answered
        self._begun_up_to = 0  # the last task that a lost connection may have begun
        self._link = Link[Task, Result](
            link.sockets[index], uid_of(link.hsm_user), Result, MAX_RESULT_BYTES, self._on_change, self._on_answer
        )

    @property
    def is_in_service(self) -> bool:
        """Whether requests may be sent here now."""
        return bool(self.facts.serial or self.facts.label) and not self._is_silent

    @property
    def is_token_full(self) -> bool:
        """Whether the token had no session left for this worker when it last asked for one, a moment ago."""
        return not self.is_in_service and time.monotonic() < self._token_full_until

    @property
    def trouble(self) -> str:
        """Why it is not in service, in words; empty if it is."""
        return "the token has no session left" if self.is_token_full else self._trouble

    @property
    def load(self) -> int:
        """Tasks under way."""
        return self._link.in_flight

    def can_use(self, ref: str) -> bool:
        """Whether this worker has the key open and is in service."""
        return ref in self._usable and self.is_in_service

    @property
    def signs_log(self) -> bool:
        """Whether this worker may be asked for checkpoints now."""
        return self._signs_log and self.is_in_service

    def start(self) -> None:
        """Connect in the background."""
        self._link.start()

    async def stop(self) -> None:
        """Disconnect for good."""
        self._begun_up_to = max(self._unanswered, default=self._begun_up_to)
        await self._link.stop()
        self._leave_service("stopped")

    def distrust(self) -> None:
        """Take the worker out of service for a while, then ask it for token and keys anew: its signature does not verify."""
        self._leave_service("returned a signature that does not verify")
        self._distrusted_until = time.monotonic() + DISTRUST_SECONDS
        self._begin_to_open()

    async def sign(self, ref: str, algorithm: Algorithm, data: bytes, deadline_s: float) -> TokenSignature:
        """Ask for a signature, and wait for it so many seconds.

        Raises:
            SigningFailedError: there is none.
        """
        started, answers = time.monotonic(), self._answers
        try:
            product = await self._ask(SignTask(ref, algorithm, data), deadline_s)
        except _NotBegunError as err:
            raise SigningFailedError("worker-lost", may_have_signed=False, is_session_lost=True) from err
        except RoomUnavailableError as err:
            # It may have been done, and nobody will ever say. After so long a wait, it was the watchdog that ended the worker.
            is_timeout = 0 < self._watchdog_s <= time.monotonic() - started
            raise SigningFailedError("timeout" if is_timeout else "worker-lost", may_have_signed=True) from err
        except TimeoutError as err:
            if self._answers == answers and not self._is_silent:
                self._is_silent = True
                _log.error("worker does not answer", worker=self.name)
            raise SigningFailedError("timeout", may_have_signed=True) from err
        match product:
            case RawSignature(signature, busy_ns):
                return TokenSignature(signature, self.facts, self.name, busy_ns)
            case TaskFailed(ckr, may_have_signed, is_session_lost):
                raise SigningFailedError(ckr, may_have_signed=may_have_signed, is_session_lost=is_session_lost)
            case _:
                raise SigningFailedError("wrong-product", may_have_signed=True)

    async def sign_notice(self, task: SignNotice, deadline_s: float) -> AnyProduct:
        """What the worker makes of a notice.

        Raises:
            RoomUnavailableError: it has gone.
            TimeoutError: no answer in time.
        """
        return await self._ask(task, deadline_s)

    async def sign_checkpoint(self, task: SignCheckpoint, deadline_s: float) -> CheckpointSigned | CheckpointRefused:
        """Ask for a checkpoint.

        Raises:
            HsmUnavailableError: there is none, and another may be asked for.
        """
        try:
            product = await self._ask(task, deadline_s)
        except (RoomUnavailableError, TimeoutError) as err:
            raise HsmUnavailableError("The worker that signs the log does not answer.", retry_after=1) from err
        if not isinstance(product, CheckpointSigned | CheckpointRefused):
            raise HsmUnavailableError("The token did not sign the log.", retry_after=1)
        return product

    async def _ask(self, work: AnyWork, deadline_s: float) -> AnyProduct:
        """The answer to one task.

        Raises:
            _NotBegunError: the worker is away, and has not begun it.
            RoomUnavailableError: the worker went away, and may have begun it.
            TimeoutError: no answer in time; it may still do it.
        """
        sent = 0

        def build(number: int) -> Task:
            nonlocal sent
            sent = number
            self._unanswered[number] = None
            return Task(number, work)

        try:
            return (await self._link.ask(build, deadline_s)).product
        except RoomUnavailableError as err:
            if sent == 0 or sent > self._begun_up_to:
                raise _NotBegunError(str(err)) from err
            raise

    def _on_answer(self, result: Result) -> None:
        self._answers += 1
        self._is_silent = False
        self._unanswered.pop(result.id, None)
        product = result.product
        if isinstance(product, TaskFailed) and product.is_session_lost:
            self._has_ended = True
            self._token_full_until = time.monotonic() + _FULL_SECONDS if product.ckr == _NO_SESSION_LEFT else 0.0
            self._leave_service(f"lost its session: {product.ckr}")

    def _on_change(self, is_up: bool, why: Exception | None) -> None:  # noqa: FBT001  the callback's one argument is the fact itself
        if self._unanswered and not self._has_ended:
            # Where we ended it, there may be answers that we have not read.
            is_ours = self._is_broken_off or isinstance(why, WireError)
            self._begun_up_to = max(self._unanswered) if is_ours else min(self._unanswered)
        if not self._has_ended:
            self._leave_service("not connected")
        self._unanswered.clear()
        self._has_ended = self._is_broken_off = self._is_silent = False
        if is_up:
            self._begin_to_open()
        else:
            self._stop_opening()
            _log.warning("worker lost", worker=self.name, why=str(why or "closed"))

    def _leave_service(self, why: str) -> None:
        self._usable = frozenset()
        self._signs_log = False
        self.facts = TokenFacts("", "")
        self._trouble = why

    def _stop_opening(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None

    def _begin_to_open(self) -> None:
        self._stop_opening()
        self._opening = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        """Learn which token this is, and have each configured key found and judged, before any use."""
        await asyncio.sleep(max(0.0, self._distrusted_until - time.monotonic()))
        try:
            match await self._ask(Probe(), _OPEN_SECONDS):
                case Alive(serial, label, _, deadline_ms):
                    self._watchdog_s = deadline_ms / 1000
                    await self._open_log()
                    await self._open_keys(TokenFacts(serial, label))
                case NeedsOperator(reason):
                    self._trouble = f"needs an operator: {reason}"  # the room puts a worker in its place when one has looked
                    self._note("token-needs-operator", f"{self._token}: {reason}")
                case _:
                    raise RoomUnavailableError("the worker has no session")
        except (RoomUnavailableError, TimeoutError, AuditUnavailableError) as err:
            _log.warning("worker not usable", worker=self.name, why=str(err) or "timeout")
            self._leave_service(str(err) or "does not answer")
            await asyncio.sleep(_RETRY_SECONDS)
            self._is_broken_off = True
            self._link.break_off()

    async def _open_log(self) -> None:
        """Before any key: what this worker has signed of the log may show that the record is not what it was."""
        if self._judge_log is None:
            return
        found = await self._ask(OpenLog(), _OPEN_SECONDS)
        if not isinstance(found, LogOpened | KeyRefused):
            raise RoomUnavailableError("the worker does not say which log it signs for")
        self._signs_log = await self._judge_log(found)

    async def _open_keys(self, facts: TokenFacts) -> None:
        """Into service with the keys that can be used; where the token failed, look again until it lets us."""
        waiting, usable, pause = list(self._keys), set[str](), _RETRY_SECONDS
        while True:
            unseen: list[OpenKey] = []
            for key in waiting:
                found = await self._ask(key, _OPEN_SECONDS)
                if isinstance(found, KeyOpened | KeyRefused) and found.ref != key.ref:
                    raise RoomUnavailableError("the worker answers for another key")
                if isinstance(found, TaskFailed):
                    unseen.append(key)
                    found = KeyRefused(key.ref, found.ckr, "the token could not look for the key")
                if isinstance(found, KeyOpened | KeyRefused) and await self._judge(self._token, self.name, found):
                    usable.add(key.ref)
            self._usable = frozenset(usable)
            if not self.is_in_service:
                self.facts, self._trouble = facts, ""
                _log.info("worker in service", worker=self.name, keys=len(usable))
            if not unseen:
                return
            waiting = unseen
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_RETRY_SECONDS)


class _NotBegunError(RoomUnavailableError):
    """The worker went away, or was away, and had certainly not begun this task."""


class TokenPool:
    """All workers of all tokens."""

    def __init__(self, workers: dict[str, tuple[Worker, ...]], deadlines_s: dict[str, float]) -> None:
        self._workers = workers
        self._deadlines_s = deadlines_s

    @classmethod
    def of(
        cls,
        links: dict[str, TokenLink],
        keys: dict[str, tuple[OpenKey, ...]],
        judge: Judge,
        note: Note,
        log: tuple[str, LogJudge] | None = None,
    ) -> TokenPool:
        """One worker per configured socket.

        Args:
            links: by token name.
            keys: by token name, what to open there.
            judge: asked about each key that a worker has found or refused.
            note: told of a token that needs an operator.
            log: the token that holds the log's key, and who is asked about what its workers say of the log.
        """
        return cls(
            {
                token: tuple(
                    Worker(
                        f"{token}-{index}",
                        token,
                        link,
                        index,
                        keys.get(token, ()),
                        judge,
                        note,
                        log[1] if log and log[0] == token else None,
                    )
                    for index in range(len(link.sockets))
                )
                for token, link in links.items()
            },
            {token: link.deadline_ms / 1000 for token, link in links.items()},
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

    def troubles(self) -> dict[str, str]:
        """For each token with workers out of service: why, in words."""
        found = {
            token: dict.fromkeys(worker.trouble for worker in workers if not worker.is_in_service)
            for token, workers in self._workers.items()
        }
        return {token: ", ".join(reasons) for token, reasons in found.items() if reasons}

    def is_available(self, token: str, ref: str) -> bool:
        """Whether any worker could use this key now."""
        return any(worker.can_use(ref) for worker in self._workers[token])

    async def wait(self, token: str, ref: str) -> None:
        """Called where no worker could use the key: wait a moment for one, if what is missing is a session of the token.

        Raises:
            OverloadedError: the token has no session left, and none has become free.
            HsmUnavailableError: it is something else, which takes longer than anyone should wait.
        """
        deadline = time.monotonic() + SESSION_WAIT_SECONDS
        while any(worker.is_token_full for worker in self._workers[token]):
            if time.monotonic() >= deadline:
                raise OverloadedError("The token of this key has no session left.", retry_after=1)
            await asyncio.sleep(_SESSION_POLL_SECONDS)
            if self.is_available(token, ref):
                return
        raise HsmUnavailableError(_NOT_IN_SERVICE, retry_after=1)

    async def sign(self, token: str, ref: str, algorithm: Algorithm, data: bytes) -> TokenSignature:
        """Have the least busy worker sign; once more elsewhere if the first certainly made no signature.

        Raises:
            HsmUnavailableError, OverloadedError: no worker was asked.
            SigningFailedError: one was asked, and there is no signature.
        """
        started, deadline_s = time.monotonic(), self._deadlines_s[token]
        worker = self._choose(token, ref, frozenset())
        try:
            return await worker.sign(ref, algorithm, data, deadline_s)
        except SigningFailedError as err:
            if err.may_have_signed or not err.is_session_lost:
                raise
            try:
                other = self._choose(token, ref, frozenset({worker}))
            except (HsmUnavailableError, OverloadedError):
                raise err from None
            return await other.sign(ref, algorithm, data, deadline_s - (time.monotonic() - started))

    async def sign_notice(self, token: str, task: SignNotice) -> AnyProduct:
        """What the least busy worker of a token makes of a notice.

        Raises:
            HsmUnavailableError: no worker is in service, or the one that was asked has gone.
            TimeoutError: no answer in time.
        """
        able = [worker for worker in self._workers[token] if worker.is_in_service]
        if not able:
            raise HsmUnavailableError("No session of this token is in service.", retry_after=1)
        try:
            return await min(able, key=lambda each: each.load).sign_notice(task, self._deadlines_s[token])
        except RoomUnavailableError as err:
            raise HsmUnavailableError("The session has gone.", retry_after=1) from err

    async def sign_checkpoint(self, token: str, task: SignCheckpoint) -> CheckpointSigned | CheckpointRefused:
        """Have a worker sign a checkpoint of the log; always the same one, as long as it is there.

        Raises:
            HsmUnavailableError: none is in service, or it does not answer.
        """
        worker = next((each for each in self._workers[token] if each.signs_log), None)
        if worker is None:
            raise HsmUnavailableError("No session of the log's token is in service.", retry_after=1)
        return await worker.sign_checkpoint(task, self._deadlines_s[token])

    def distrust(self, worker: str) -> None:
        """Take a worker out of service for a while."""
        for each in self._all():
            if each.name == worker:
                each.distrust()

    def _choose(self, token: str, ref: str, without: frozenset[Worker]) -> Worker:
        able = [worker for worker in self._workers[token] if worker not in without and worker.can_use(ref)]
        if not able:
            raise HsmUnavailableError(_NOT_IN_SERVICE, retry_after=1)
        worker = min(able, key=lambda each: each.load)
        if worker.load >= MAX_TASKS_PER_WORKER:
            raise OverloadedError("The token has too many requests waiting.", retry_after=1)
        return worker

    def _all(self) -> list[Worker]:
        return [worker for workers in self._workers.values() for worker in workers]
