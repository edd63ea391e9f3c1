"""Starts the rooms on one host, brings a dead one back, and stops them in order.

Each room is a process of its own, started as `keybroker hsm|authority|frontend|courier`, exactly as systemd would. The supervisor holds
no secret and opens no socket but one to ask `/readyz`. Standard output carries one line, `ready https://ADDRESS:PORT`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from keybroker import config as configuration
from keybroker.errors import ConfigError
from keybroker.process import EXIT_CONFIG, die_with_parent, harden
from keybroker.telemetry import configure, logger

PARENT_VARIABLE = "KEYBROKER_SUPERVISOR"
ROOMS = ("hsm", "authority", "frontend")  # from right to left: each finds the room on its right already there
DRAIN_SECONDS = 15.0
BACKOFF_SECONDS = (0.1, 0.2, 0.5, 1.0)
_ASK_READY_SECONDS = 0.05
_STEADY_SECONDS = 10.0  # a room that has lived this long starts its back-off afresh

_log = logger()


@dataclass(slots=True)
class _Room:
    name: str
    process: asyncio.subprocess.Process | None = None
    deaths: int = 0
    keeper: asyncio.Task[None] | None = None
    is_stopping: bool = False


def join_supervisor() -> None:
    """In a room's process: end when the supervisor that started it ends. Nothing to do where there is none."""
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if parent:
        die_with_parent(int(parent))


def run(config_path: Path, config: configuration.Config) -> int:
    """Serve until SIGTERM or SIGINT; the exit status.

    Raises:
        ConfigError: a section is missing.
    """
    for room in ROOMS:
        if getattr(config, room) is None:
            msg = f"{config_path}: `serve` runs all rooms, and the section `{room}` is missing; start the others one by one"
            raise ConfigError(msg)
    harden()
    configure("supervisor", config.telemetry)
    return asyncio.run(_Supervisor(config_path, config).run())


class _Supervisor:
    def __init__(self, config_path: Path, config: configuration.Config) -> None:
        self._config_path = config_path.resolve()
        self._config = config
        self._rooms = [_Room(name) for name in (*ROOMS, *(("courier",) if config.courier else ()))]
        self._stop = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._pass_on_hang_up)
        for room in self._rooms:
            room.keeper = loop.create_task(self._keep(room))
        announcer = loop.create_task(self._announce())
        await self._stop.wait()
        announcer.cancel()
        await self._stop_all()
        return self._status

    async def _keep(self, room: _Room) -> None:
        """Start a room, and start it again whenever it ends, until told to stop."""
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
            room.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "keybroker", room.name, "--config", str(self._config_path), stdout=sys.stderr, env=environment
            )
            status = await room.process.wait()
            if room.is_stopping:
                return
            if status == EXIT_CONFIG:
                _log.error("room cannot start", failed=room.name, cure="see its message above; mend it and start again")
                self._status = 1
                self._stop.set()
                return
            room.deaths = 0 if loop.time() - started > _STEADY_SECONDS else room.deaths + 1
            pause = BACKOFF_SECONDS[min(room.deaths, len(BACKOFF_SECONDS)) - 1] if room.deaths else BACKOFF_SECONDS[0]
            _log.error("room ended", failed=room.name, status=status, again_in_s=pause)
            await asyncio.sleep(pause)

    def _pass_on_hang_up(self) -> None:
        """SIGHUP says to the hsm room that an operator has looked: each refused PIN gets one more attempt."""
        for room in self._rooms:
            if room.name == "hsm" and room.process is not None and room.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    room.process.send_signal(signal.SIGHUP)

    async def _announce(self) -> None:
        """Say `ready` once, when the frontend says that the broker can sign."""
        frontend = self._config.frontend
        if frontend is None:
            return
        host, port = configuration.host_and_port(frontend.operations)
        while True:
            if await _answers_ready(host, port):
                break
            await asyncio.sleep(_ASK_READY_SECONDS)
        sys.stdout.write(f"ready https://{frontend.listen}\n")
        sys.stdout.flush()

    async def _stop_all(self) -> None:
        """Left to right: no new requests, then finish what is under way, then let go of the token."""
        deadline = asyncio.get_running_loop().time() + DRAIN_SECONDS
        for room in reversed(self._rooms):
            room.is_stopping = True
        for room in reversed(self._rooms):
            process = room.process
            if process is not None and process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                remaining = max(0.5, deadline - asyncio.get_running_loop().time())
                try:
                    await asyncio.wait_for(process.wait(), remaining)
                except TimeoutError:
                    _log.error("room did not drain in time", failed=room.name)
                    process.kill()
                    await process.wait()
            if room.keeper is not None:
                room.keeper.cancel()


async def _answers_ready(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return b" 200 " in await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
