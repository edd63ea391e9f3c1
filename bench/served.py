"""What is measured, running: a development world served as a user serves it, and its frontend alone before a constant authority."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import secrets
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from bench import cpu
from bench.generator import GeneratorError

_PROGRAM = Path(sys.executable).with_name("keybroker")
_READY_SECONDS = 60
_STOP_SECONDS = 20
_SAMPLE = re.compile(r'^(keybroker_(?:sign|request)_seconds)_(sum|count)(?:\{stage="([a-z]+)"\})? (\S+)$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Served:
    """Something that answers sign requests.

    Attributes:
        address: of the service.
        operations: of /metrics.
        processes: by room.
    """

    address: str
    operations: str
    processes: Mapping[str, list[int]]

    def cpu(self) -> dict[str, float]:
        """CPU seconds of each room so far; the authority's split into its event loop and its threads."""
        used = {room: sum(cpu.seconds(pid) for pid in pids) for room, pids in self.processes.items()}
        for pid in self.processes.get("authority", ()):
            used["event loop"] = cpu.seconds(pid, thread=pid)
            used["threads"] = used.pop("authority") - used["event loop"]
        return used

    def stages(self) -> dict[str, tuple[float, float]]:
        """Seconds and uses so far, by stage; `request` is the frontend's whole."""
        _, text = _get(self.operations, "/metrics")
        found: dict[tuple[str, str], float] = {}
        for family, kind, stage, value in _SAMPLE.findall(text):
            found[stage if family == "keybroker_sign_seconds" else "request", kind] = float(value)
        return {stage: (total, found[stage, "count"]) for (stage, kind), total in found.items() if kind == "sum"}


def make_world(directory: Path) -> Path:
    """`keybroker dev init`; the configuration file."""
    subprocess.run([_PROGRAM, "dev", "init", str(directory)], check=True, stdout=subprocess.DEVNULL, env=_environment())  # noqa: S603  ours
    return directory / "keybroker.yaml"


@contextlib.contextmanager
def broker(config: Path) -> Iterator[Served]:
    """The whole broker, while the block runs.

    Raises:
        GeneratorError: it does not get ready.
    """
    log = config.with_name("serve.log")
    with log.open("wb") as errors:
        command = [str(_PROGRAM), "serve", "--config", str(config)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=_environment())  # noqa: S603  ours
    with _ending(process):
        pipe = process.stdout
        if pipe is None or not select.select([pipe], [], [], _READY_SECONDS)[0] or not pipe.readline().startswith(b"ready "):
            raise GeneratorError(f"the broker did not get ready:\n{log.read_text()}")
        frontend = yaml.safe_load(config.read_text())["frontend"]
        yield Served(frontend["listen"], frontend["operations"], cpu.rooms(process.pid))


@contextlib.contextmanager
def frontend_alone(config: Path) -> Iterator[Served]:
    """The same frontend on other ports, before a constant authority, while the block runs.

    Raises:
        GeneratorError: it does not get ready.
    """
    world = config.parent
    way = world / "run" / "constant.sock"
    listen, operations = free_address(), free_address()
    section = yaml.safe_load(config.read_text())["frontend"] | {"listen": listen, "operations": operations, "authority": str(way)}
    own = world / "frontend-alone.yaml"
    own.write_text(yaml.safe_dump({"frontend": section, "telemetry": {"log_level": "warning"}}))
    constant = subprocess.Popen([sys.executable, "-m", "bench.constant", str(way)])  # noqa: S603  ours
    with _ending(constant):
        frontend = subprocess.Popen([_PROGRAM, "frontend", "--config", str(own)], env=_environment())  # noqa: S603  ours
        with _ending(frontend):
            _wait_ready(operations)
            yield Served(listen, operations, {"frontend": [frontend.pid], "constant authority": [constant.pid]})


def _wait_ready(operations: str) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if _get(operations, "/readyz")[0] == 200:
                return
        time.sleep(0.05)
    raise GeneratorError("the frontend did not get ready")


def _get(address: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@contextlib.contextmanager
def _ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def free_address() -> str:
    """A port on which nobody listens now, below the range from which Linux takes the ports of outgoing connections."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return f"127.0.0.1:{port}"


def _environment() -> dict[str, str]:
    """Without settings of the one who runs this."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("KEYBROKER_", "SOFTHSM2_"))}
