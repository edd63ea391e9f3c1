"""The hsm room's watchdog: starts one worker for each session, one after another, and replaces those that die, hang or lose it.

It never loads a PKCS#11 module and never holds a PIN. Workers log in one at a time, because a module may rewrite its token file
at login (SoftHSM does), and a process that looks at that moment may not see the token.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from keybroker.config import Config, HsmConfig, TokenConfig
from keybroker.errors import ConfigError
from keybroker.hsm.order import EXIT_PIN_REFUSED, READY, BusyClock, WorkerOrder
from keybroker.hsm.pin import Pin
from keybroker.process import EXIT_CONFIG, harden, uid_of
from keybroker.telemetry import configure, logger

LOOK_SECONDS = 0.02
LOGIN_SECONDS = 15.0
STOP_SECONDS = 5.0
BACKOFF_SECONDS = (0.1, 0.2, 0.5, 1.0)
_STEADY_SECONDS = 10.0

_log = logger()


def run(config: Config) -> int:
    """Serve until SIGTERM; the exit status."""
    harden()
    configure("hsm", config.telemetry)
    try:
        if config.hsm is None:
            raise ConfigError("the section `hsm` is missing")
        room = Room(config.hsm)
    except ConfigError as err:
        sys.stderr.write(f"hsm: {err}\n")
        return EXIT_CONFIG
    room.run()
    return 0


@dataclass(slots=True)
class Seat:
    """One place for a worker: its socket, its shared page, and the process that fills it now.

    Attributes:
        due: monotonic seconds at which the next process may be started.
        deaths: in a row, for the back-off.
    """

    name: str
    token: str
    socket: Path
    busy_fd: int
    busy: BusyClock
    process: subprocess.Popen[bytes] | None = None
    is_ready: bool = False
    started: float = 0.0
    due: float = 0.0
    deaths: int = 0


class Room:
    """Keeps every seat filled, one login at a time."""

    def __init__(self, config: HsmConfig) -> None:
        self._config = config
        self._authority_uid = uid_of(config.authority_user)
        self._seats: list[Seat] = []
        for name, token in config.tokens.items():
            Pin.load(token.uri.pin_file)  # say at once what is wrong with it; the worker reads it again for itself
            if not token.uri.module_path.exists():
                msg = f"hsm.tokens.{name}.uri: the module {token.uri.module_path} does not exist; install it, or mend `module-path`"
                raise ConfigError(msg)
            for index, socket in enumerate(token.sockets):
                fd = BusyClock.create()
                self._seats.append(Seat(f"{name}-{index}", name, socket, fd, BusyClock(fd)))
        self._needs_operator: set[str] = set()
        self._is_stopping = False

    def run(self) -> None:
        """Watch until SIGTERM. SIGHUP forgets refused PINs, so that each gets one more attempt."""
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        signal.signal(signal.SIGHUP, lambda _number, _frame: self._needs_operator.clear())
        try:
            while not self._is_stopping:
                self._look()
                time.sleep(LOOK_SECONDS)
        finally:
            self._stop_all()

    def _on_stop(self, _number: int, _frame: FrameType | None) -> None:
        self._is_stopping = True

    def _look(self) -> None:
        for seat in self._seats:
            if seat.process is None:
                continue
            self._hear(seat)
            if seat.process.poll() is not None:
                self._bury(seat, seat.process.returncode)
            elif self._hangs(seat):
                _log.error("worker hangs in the module; killing it", worker=seat.name)
                seat.process.kill()
        if any(seat.process is not None and not seat.is_ready for seat in self._seats):
            return  # somebody is logging in
        now = time.monotonic()
        for seat in self._seats:
            if seat.process is None and now >= seat.due and seat.token not in self._needs_operator:
                self._start(seat, self._config.tokens[seat.token])
                return

    def _hear(self, seat: Seat) -> None:
        """A worker says one thing, once: that it has logged in and listens."""
        if seat.is_ready or seat.process is None or seat.process.stdout is None:
            return
        fd = seat.process.stdout.fileno()
        if _is_readable(fd) and os.read(fd, len(READY)) == READY:
            seat.is_ready = True
            _log.info("worker logged in", worker=seat.name, pid=seat.process.pid)

    def _hangs(self, seat: Seat) -> bool:
        deadline_s = self._config.tokens[seat.token].deadline_ms / 1000 if seat.is_ready else LOGIN_SECONDS
        since_ns = seat.busy.since_ns
        if since_ns == 0:
            return not seat.is_ready and time.monotonic() - seat.started > LOGIN_SECONDS
        return time.monotonic_ns() - since_ns > deadline_s * 1e9

    def _bury(self, seat: Seat, status: int) -> None:
        _close_pipes(seat)
        seat.process = None
        seat.busy.end()
        if status == EXIT_PIN_REFUSED:
            self._needs_operator.add(seat.token)
            _log.critical("the token refused the PIN; an operator must look before the next attempt", token=seat.token)
        if time.monotonic() - seat.started > _STEADY_SECONDS:
            seat.deaths = 0
        pause = BACKOFF_SECONDS[min(seat.deaths, len(BACKOFF_SECONDS) - 1)]
        seat.deaths += 1
        seat.due = time.monotonic() + pause
        _log.error("worker ended", worker=seat.name, status=status, was_ready=seat.is_ready, again_in_s=pause)
        seat.is_ready = False

    def _start(self, seat: Seat, token: TokenConfig) -> None:
        order = WorkerOrder(
            parent=os.getpid(),
            uri=token.uri,
            socket=seat.socket,
            authority_uid=self._authority_uid,
            environment={name: str(path) for name, path in token.module_environment.items()},
            busy_fd=seat.busy_fd,
        )
        command = [sys.executable, "-m", "keybroker.hsm.worker"]
        seat.started = time.monotonic()
        seat.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[seat.busy_fd])  # noqa: S603  ours
        if seat.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has died already, which the next look sees
                seat.process.stdin.write(order.to_bytes())
                seat.process.stdin.close()

    def _stop_all(self) -> None:
        """Let each worker finish its task; kill the one that does not in time."""
        alive = [seat for seat in self._seats if seat.process is not None]
        for seat in alive:
            if seat.process is not None:
                seat.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for seat in alive:
            if seat.process is None:
                continue
            try:
                seat.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.error("worker did not end in time; killing it", worker=seat.name)
                seat.process.kill()
                seat.process.wait()
            _close_pipes(seat)
            seat.socket.unlink(missing_ok=True)


def _is_readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def _close_pipes(seat: Seat) -> None:
    if seat.process is not None and seat.process.stdout is not None:
        seat.process.stdout.close()
