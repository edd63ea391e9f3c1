"""One worker: a process of its own with one thread, one session and one socket. `python -m keybroker.hsm.worker`.

The room starts it with a pipe that says what to do and a page of shared memory in which the worker says what it is doing: the
time at which the call into the module began, or zero. A call that hangs cannot be cancelled; the room sees it there and kills.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

from keybroker.errors import ConfigError, TokenError, WireError
from keybroker.hsm.order import EXIT_PIN_REFUSED, EXIT_SESSION_LOST, EXIT_TOKEN, READY, BusyClock, WorkerOrder
from keybroker.hsm.pkcs11_token import CallError, PinRefusedError, Pkcs11Token, failure_of
from keybroker.model.task import MAX_TASK_BYTES, AnyProduct, OpenKey, Probe, RawSignature, Result, SignTask, Task, TaskFailed
from keybroker.process import die_with_parent, harden
from keybroker.wire import BlockingChannel, bind, peer_uid


class Worker:
    """Does tasks in order, one connection at a time."""

    def __init__(self, token: Pkcs11Token, busy: BusyClock, authority_uid: int) -> None:
        self._token = token
        self._busy = busy
        self._authority_uid = authority_uid
        self._is_stopping = False
        self._is_session_lost = False
        self._is_waiting = False

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        """On SIGTERM: finish the task under way, answer it, and end; where there is none, end at once."""
        self._is_stopping = True
        if self._is_waiting:
            raise InterruptedError  # out of accept or receive, which Python would otherwise begin again

    def serve(self, listener: socket.socket) -> int:
        """Serve until stopped or the session is lost; the exit status."""
        try:
            while not self._is_stopping and not self._is_session_lost:
                self._is_waiting = True
                connection, _ = listener.accept()
                self._is_waiting = False
                with connection:
                    if peer_uid(connection) == self._authority_uid:
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

    def _do(self, task: Task) -> AnyProduct:
        self._busy.begin()
        try:
            match task.work:
                case SignTask(ref, algorithm, data):
                    started = time.perf_counter_ns()
                    signature = self._token.sign(ref, algorithm, data)
                    return RawSignature(signature, time.perf_counter_ns() - started)
                case OpenKey():
                    return self._token.open_key(task.work)
                case Probe():
                    return self._token.probe()
        except KeyError:
            return TaskFailed("key-not-open", may_have_signed=False, is_session_lost=False)
        except CallError as err:
            failed = failure_of(err)
            self._is_session_lost = failed.is_session_lost
            return failed
        finally:
            self._busy.end()


def main() -> int:
    """Log in, listen, serve; the exit status."""
    harden()
    order = WorkerOrder.from_bytes(sys.stdin.buffer.read())
    die_with_parent(order.parent)
    os.environ.update(order.environment)
    busy = BusyClock(order.busy_fd)
    busy.begin()  # a module that hangs at C_Initialize or C_Login is seen too
    try:
        token = Pkcs11Token.log_in(order.uri)
    except PinRefusedError as err:
        sys.stderr.write(f"hsm: {err}\n")
        return EXIT_PIN_REFUSED
    except (ConfigError, TokenError) as err:
        sys.stderr.write(f"hsm: {err}\n")
        return EXIT_TOKEN
    busy.end()
    worker = Worker(token, busy, order.authority_uid)
    signal.signal(signal.SIGTERM, worker.stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with bind(Path(order.socket), order.authority_uid) as listener:
        sys.stdout.buffer.write(READY)
        sys.stdout.buffer.flush()
        status = worker.serve(listener)
    token.close()
    return status


if __name__ == "__main__":
    sys.exit(main())
