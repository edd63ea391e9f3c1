"""The hsm room's watchdog: starts one worker for each session, one after another, and replaces those that die, hang or lose it.

It never loads a PKCS#11 module and never holds a PIN. Workers of one token log in one at a time, because a module may rewrite its
token file at login (SoftHSM does), and a process that looks at that moment may not see the token.

Three rules bound what a broken token can cost. Each worker that ends within a minute of others makes the pause before the next one
longer, so that a seat sees at most 20 logins a minute. A call that hangs is ended by killing its process. And a token that refuses
the PIN is not asked again until an operator sends SIGHUP or starts the room anew: its seats are then filled by workers that touch
no token and only tell the authority why.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from keybroker.config import Config, HsmConfig, TokenConfig
from keybroker.errors import ConfigError
from keybroker.hsm.order import (
    ENDINGS,
    EXIT_PIN_REFUSED,
    EXIT_TOKEN,
    FULL,
    READY,
    REFUSED,
    BusyClock,
    LogOrder,
    NoticeOrder,
    WorkerOrder,
)
from keybroker.hsm.pin import Pin
from keybroker.process import EXIT_CONFIG, harden, uid_of
from keybroker.telemetry import configure, logger

LOOK_SECONDS = 0.02
START_SECONDS = 15.0  # until the process has begun its first call
LOGIN_DEADLINES = 3  # from C_Initialize to C_Login a module may take so many times as long as for one call
STOP_SECONDS = 5.0
BACKOFF_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)  # by how many workers of the seat have ended within the last minute
_MINUTE = 60.0

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
        deaths: monotonic seconds at which the last few processes ended.
        refusal: why the token refused the PIN, if the last process found that.
        tells: why the process that fills the seat now works without a token; empty if it has one.
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
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=len(BACKOFF_SECONDS)))
    refusal: str = ""
    tells: str = ""


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
                _claim(socket)
                fd = BusyClock.create()
                self._seats.append(Seat(f"{name}-{index}", name, socket, fd, BusyClock(fd)))
        self._needs_operator: dict[str, str] = {}
        self._failed_logins: set[str] = set()
        self._is_stopping = False

    def run(self) -> None:
        """Watch until SIGTERM. SIGHUP forgets refused PINs, so that each gets one more attempt."""
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        signal.signal(signal.SIGHUP, self._on_operator)
        try:
            while not self._is_stopping:
                self._look()
                time.sleep(LOOK_SECONDS)
        finally:
            self._stop_all()

    def _on_stop(self, _number: int, _frame: FrameType | None) -> None:
        self._is_stopping = True

    def _on_operator(self, _number: int, _frame: FrameType | None) -> None:
        self._needs_operator.clear()
        self._failed_logins.clear()
        for seat in self._seats:
            seat.deaths.clear()
            seat.due = 0.0

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
            elif seat.tells and seat.token not in self._needs_operator:
                seat.process.terminate()
                seat.tells = ""  # told once
        now = time.monotonic()
        busy = {seat.token for seat in self._seats if seat.process is not None and not seat.is_ready}  # somebody is logging in
        for seat in self._seats:
            if seat.process is None and now >= seat.due and seat.token not in busy:
                busy.add(seat.token)
                self._start(seat, self._config.tokens[seat.token])

    def _hear(self, seat: Seat) -> None:
        """A worker says one thing, once: that it listens, with a session or without one, or that the token refused the PIN."""
        if seat.is_ready or seat.process is None or seat.process.stdout is None:
            return
        fd = seat.process.stdout.fileno()
        line = os.read(fd, select.PIPE_BUF) if _is_readable(fd) else b""
        if line == READY:
            seat.is_ready = True
            if not seat.tells:
                self._failed_logins.discard(seat.token)
                _log.info("worker logged in", worker=seat.name, pid=seat.process.pid)
        elif line == FULL:
            seat.is_ready = True
            self._failed_logins.add(seat.token)
            _log.warning("the token has no session left", worker=seat.name, cure="end other programs that use it, or name fewer `sockets`")
        elif line.startswith(REFUSED):
            seat.refusal = line.removeprefix(REFUSED).strip().decode(errors="replace")

    def _hangs(self, seat: Seat) -> bool:
        since_ns = seat.busy.since_ns
        if since_ns == 0:
            return not seat.is_ready and time.monotonic() - seat.started > START_SECONDS
        calls = 1 if seat.is_ready else LOGIN_DEADLINES
        return time.monotonic_ns() - since_ns > calls * self._config.tokens[seat.token].deadline_ms * 1_000_000

    def _bury(self, seat: Seat, status: int) -> None:
        self._hear(seat)  # it may have spoken after we last listened
        _close_pipes(seat)
        seat.process = None
        seat.busy.end()
        if status == EXIT_PIN_REFUSED:
            reason = self._needs_operator[seat.token] = seat.refusal or "refused"
            _log.critical("the token refused the PIN; an operator must look before the next attempt", token=seat.token, reason=reason)
        elif not seat.is_ready and status != EXIT_TOKEN:
            self._failed_logins.add(seat.token)
        now = time.monotonic()
        pause = 0.0
        if status not in {0, EXIT_PIN_REFUSED}:
            seat.deaths.append(now)
            pause = BACKOFF_SECONDS[sum(now - each < _MINUTE for each in seat.deaths) - 1]
            why = ENDINGS.get(status, f"status {status}")
            _log.error("worker ended", worker=seat.name, why=why, was_ready=seat.is_ready, again_in_s=pause)
        seat.due = now + pause
        seat.is_ready = False

    def _start(self, seat: Seat, token: TokenConfig) -> None:
        order = WorkerOrder(
            parent=os.getpid(),
            uri=token.uri,
            socket=seat.socket,
            authority_uid=self._authority_uid,
            environment={name: str(path) for name, path in token.module_environment.items()},
            busy_fd=seat.busy_fd,
            deadline_ms=token.deadline_ms,
            is_careful=seat.token in self._failed_logins,
            needs_operator=self._needs_operator.get(seat.token, ""),
            log=LogOrder(token.log.origin, token.log.object, token.log.id) if token.log else None,
            notices=NoticeOrder(token.notices.object, token.notices.id) if token.notices else None,
        )
        seat.tells, seat.refusal = order.needs_operator, ""
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


def _claim(socket: Path) -> None:
    """Keep other hsm rooms off a socket, and so off its token, for as long as this process lives.

    Raises:
        ConfigError: another room has it, or the directory cannot be used.
    """
    try:
        socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(socket.with_name(f"{socket.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the descriptor stays open: the lock ends with the process, however that ends
    except BlockingIOError as err:
        msg = f"{socket}: another hsm room works for this socket; stop it, or name another under `sockets`"
        raise ConfigError(msg) from err
    except OSError as err:
        msg = f"{socket.parent}: {err.strerror}; the hsm room's user must be able to write there"
        raise ConfigError(msg) from err


def _is_readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def _close_pipes(seat: Seat) -> None:
    if seat.process is not None and seat.process.stdout is not None:
        seat.process.stdout.close()
