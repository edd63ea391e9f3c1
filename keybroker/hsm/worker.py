"""One worker: a process of its own with one thread, one session and one socket. `python -m keybroker.hsm.worker`.

The room starts it with a pipe that says what to do and a page of shared memory in which the worker says what it is doing: the
time at which the call into the module began, or zero. A call that hangs cannot be cancelled; the room sees it there and kills.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

import msgspec

from keybroker.errors import ConfigError, TokenError, WireError
from keybroker.hsm.log_signer import LogSigner, log_verifier_key
from keybroker.hsm.notice_signer import NoticeSigner
from keybroker.hsm.order import (
    EXIT_LOGIN,
    EXIT_PIN_REFUSED,
    EXIT_SESSION_LOST,
    EXIT_TOKEN,
    FULL,
    READY,
    REFUSED,
    BusyClock,
    LogOrder,
    NoticeOrder,
    WorkerOrder,
)
from keybroker.hsm.pkcs11_token import CallError, LoginFailedError, NoSessionLeftError, PinRefusedError, Pkcs11Token, failure_of
from keybroker.hsm.return_codes import NO_SESSION_LEFT, REQUEST_REFUSED
from keybroker.model.task import (
    MAX_TASK_BYTES,
    AnyProduct,
    CheckpointRefused,
    CheckpointSigned,
    KeyRefused,
    NeedsOperator,
    NoticeSigned,
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
from keybroker.process import die_with_parent, harden
from keybroker.sandbox import Sandbox
from keybroker.wire import BlockingChannel, bind, peer_uid

MAX_FAILURES = 3
"""Signatures that may fail in a row, whatever the code says, before a fresh session takes this one's place."""


# The module is foreign code that needs files, and perhaps its HSM over the network; it needs no programs and no port of its own.
_WALLS = Sandbox(reads=(Path("/"),), writes=(Path("/"),), connects=None)


_NO_LOG = KeyRefused("log", "log-not-here", "name the log's key under `hsm.tokens.NAME.log`")
_NO_NOTICES = KeyRefused("notices", "notice-key-not-here", "name the key of notices under `hsm.tokens.NAME.notices`")


class Worker:
    """Does tasks in order, one connection at a time.

    Args:
        token: logged in; None where nobody may log in, or the token has no session left.
        busy: the shared page.
        order: what the room said.
        log: signs checkpoints; or why it does not.
        notices: signs notices; or why it does not.
    """

    def __init__(
        self,
        token: Pkcs11Token | None,
        busy: BusyClock,
        order: WorkerOrder,
        log: LogSigner | KeyRefused = _NO_LOG,
        notices: NoticeSigner | KeyRefused = _NO_NOTICES,
    ) -> None:
        self._token = token
        self._busy = busy
        self._order = order
        self._log = log
        self._notices = notices
        self._failures = 0
        self._is_stopping = False
        self._is_session_lost = False
        self._is_waiting = False

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        """On SIGTERM: finish the task under way, answer it, and end; where there is none, end at once."""
        self._is_stopping = True
        if self._is_waiting:
            self._is_waiting = False  # once: a second signal must not break whatever ends this process
            raise InterruptedError  # out of accept or receive, which Python would otherwise begin again

    def serve(self, listener: socket.socket) -> int:
        """Serve until stopped or the session is lost; the exit status."""
        try:
            while not self._is_stopping and not self._is_session_lost:
                self._is_waiting = True
                connection, _ = listener.accept()
                self._is_waiting = False
                with connection:
                    if peer_uid(connection) == self._order.authority_uid:
                        self._serve_one(connection)
        except InterruptedError:
            pass
        return EXIT_SESSION_LOST if self._is_session_lost else 0

    def _serve_one(self, connection: socket.socket) -> None:
        channel = BlockingChannel[Task, Result](connection, Task, MAX_TASK_BYTES)
        try:
            while True:
                self._is_waiting = True
                tasks = channel.receive()
                self._is_waiting = False
                for task in tasks:
                    channel.send(Result(task.id, self._do(task)))
                    if self._is_session_lost or self._is_stopping:
                        return
        except (EOFError, ConnectionError, WireError):
            return  # the authority has gone, or is not one: the next connection starts afresh

    def _do(self, task: Task) -> AnyProduct:  # noqa: PLR0911  one line for each task
        if self._token is None:
            if self._order.needs_operator:
                return NeedsOperator(self._order.needs_operator)
            self._is_session_lost = True  # said once; the next process tries again
            return TaskFailed(NO_SESSION_LEFT, may_have_signed=False, is_session_lost=True)
        self._busy.begin()
        try:
            match task.work:
                case SignTask():
                    return self._sign(self._token, task.work)
                case OpenKey():
                    return self._token.open_key(task.work)
                case OpenLog():
                    return self._log.opened() if isinstance(self._log, LogSigner) else self._log
                case SignCheckpoint():
                    return self._sign_checkpoint(task.work)
                case SignNotice():
                    return self._sign_notice(task.work)
                case Probe():
                    return msgspec.structs.replace(self._token.probe(), deadline_ms=self._order.deadline_ms)
        except CallError as err:
            failed = failure_of(err)
            self._is_session_lost = failed.is_session_lost
            return TaskFailed(failed.ckr, may_have_signed=False, is_session_lost=failed.is_session_lost)
        finally:
            self._busy.end()

    def _sign_checkpoint(self, task: SignCheckpoint) -> CheckpointSigned | CheckpointRefused | KeyRefused:
        return self._log.sign(task) if isinstance(self._log, LogSigner) else self._log

    def _sign_notice(self, task: SignNotice) -> NoticeSigned | KeyRefused:
        return self._notices.sign(task) if isinstance(self._notices, NoticeSigner) else self._notices

    def _sign(self, token: Pkcs11Token, task: SignTask) -> RawSignature | TaskFailed:
        started = time.perf_counter_ns()
        try:
            signature = token.sign(task.ref, task.algorithm, task.data)
        except KeyError:
            return TaskFailed("key-not-open", may_have_signed=False, is_session_lost=False)
        except CallError as err:
            failed = failure_of(err)
            self._failures += failed.ckr not in REQUEST_REFUSED
            self._is_session_lost = failed.is_session_lost or self._failures >= MAX_FAILURES
            return TaskFailed(failed.ckr, may_have_signed=failed.may_have_signed, is_session_lost=self._is_session_lost)
        self._failures = 0
        return RawSignature(signature, time.perf_counter_ns() - started)


def _log_signer(token: Pkcs11Token, log: LogOrder) -> LogSigner | KeyRefused:
    found = token.open_log_key(log.object, bytes.fromhex(log.id))
    if isinstance(found, KeyRefused):
        return found
    return LogSigner(log_verifier_key(log.origin, found), token.sign_log)


def _notice_signer(token: Pkcs11Token, notices: NoticeOrder) -> NoticeSigner | KeyRefused:
    found = token.open_notice_key(notices.object, bytes.fromhex(notices.id))
    return found if isinstance(found, KeyRefused) else NoticeSigner(found.spki, token.sign_notice)


def main() -> int:
    """Log in, listen, serve; the exit status."""
    harden()
    said = sys.stdin.buffer.read()
    if not said:
        return 1  # the room was killed before it could say anything
    order = WorkerOrder.from_bytes(said)
    die_with_parent(order.parent)
    _WALLS.enter()
    os.environ.update(order.environment)
    busy = BusyClock(order.busy_fd)
    busy.begin()  # a module that hangs at C_Initialize or C_Login is seen too
    token, greeting = None, READY
    try:
        token = None if order.needs_operator else Pkcs11Token.log_in(order.uri, is_careful=order.is_careful)
    except NoSessionLeftError as err:
        sys.stderr.write(f"hsm: {err}\n")
        greeting = FULL
    except PinRefusedError as err:
        sys.stderr.write(f"hsm: {err}\n")
        _tell_room(REFUSED + err.reason.encode() + b"\n")
        return EXIT_PIN_REFUSED
    except (ConfigError, TokenError) as err:
        sys.stderr.write(f"hsm: {err}\n")
        return EXIT_LOGIN if isinstance(err, LoginFailedError) else EXIT_TOKEN
    try:
        log = _log_signer(token, order.log) if token and order.log else _NO_LOG
        notices = _notice_signer(token, order.notices) if token and order.notices else _NO_NOTICES
    except CallError as err:
        sys.stderr.write(f"hsm: the keys of log and notices cannot be looked for: {failure_of(err).ckr}\n")
        return EXIT_TOKEN
    busy.end()
    worker = Worker(token, busy, order, log, notices)
    signal.signal(signal.SIGTERM, worker.stop)
    for number in (signal.SIGINT, signal.SIGHUP):  # for the room, where they come to the whole group
        signal.signal(number, signal.SIG_IGN)
    with bind(order.socket, order.authority_uid) as listener:
        _tell_room(greeting)
        status = worker.serve(listener)
    busy.begin()  # the module may hang at C_Logout or, when this process ends, at C_Finalize
    if token is not None and status == 0:
        with contextlib.suppress(CallError):
            token.close()
    return status


def _tell_room(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
