"""Real SoftHSM tokens, real hsm rooms, and a PKCS#11 module that fails on demand."""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import yaml

from keybroker.hsm.softhsm import make_token, module_path
from keybroker.model.key import Algorithm
from keybroker.model.task import MAX_RESULT_BYTES, AnyProduct, AnyWork, OpenKey, Probe, Result, SignTask, Task
from keybroker.wire import FrameReader, frame_bytes
from tests.worlds import PROGRAM, clean_environment, descendants, until

SHIM = Path(__file__).with_name("pkcs11_shim.c")
_serials = itertools.count(1)


@dataclass(frozen=True)
class Shim:
    """A PKCS#11 module that obeys a file and counts every call; what it can do is written at the top of `pkcs11_shim.c`."""

    directory: Path
    module: Path

    @classmethod
    def make(cls, directory: Path, module: Path | None = None) -> Self:
        """A shim with its own orders and counts; compiled, if no compiled one is given."""
        directory.mkdir(parents=True, exist_ok=True)
        shim = cls(directory, module or build_shim(directory))
        (directory / "calls").mkdir()
        shim.clear()
        return shim

    @property
    def environment(self) -> dict[str, str]:
        """For `module_environment`."""
        names = {"MODULE": module_path(), "ORDERS": self.directory / "orders", "CALLS": self.directory / "calls"}
        return {f"KEYBROKER_SHIM_{name}": str(path) for name, path in names.items()}

    def order(self, *orders: str) -> None:
        """From now on, these orders: `FUNCTION WHAT NUMBER COUNT`. None of them is spent yet."""
        fresh = self.directory / "orders.new"
        fresh.write_text("".join(f"{each} {next(_serials)}\n" for each in orders))
        fresh.rename(self.directory / "orders")

    def clear(self) -> None:
        """From now on, do what the real module does."""
        self.order()

    def calls(self, function: str) -> int:
        """How often a function was called, in all processes."""
        try:
            return (self.directory / "calls" / function).stat().st_size
        except FileNotFoundError:
            return 0

    def use_in(self, section: dict[str, Any]) -> None:
        """Put this shim between a configured token and its SoftHSM."""
        section["uri"] = section["uri"].replace(str(module_path()), str(self.module))
        section["module_environment"] = section.get("module_environment", {}) | self.environment


@dataclass(slots=True)
class HsmRoom:
    """A served `keybroker hsm` and the tokens it has.

    Attributes:
        sockets: by token name.
    """

    directory: Path
    config_file: Path
    sockets: dict[str, list[Path]]
    process: subprocess.Popen[bytes] | None = None
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.directory / "hsm.log"

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = [str(PROGRAM), "hsm", "--config", str(self.config_file)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=clean_environment())

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(15)
        finally:
            self.kill()

    def kill(self) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait(10)

    def workers(self) -> list[int]:
        assert self.process is not None
        return descendants(self.process.pid)

    def connect(self, token: str = "dev", index: int = 0, seconds: float = 20) -> WorkerConnection:
        """A connection to a worker, once it listens."""
        path = self.sockets[token][index]
        found: list[WorkerConnection] = []

        def connected() -> bool:
            try:
                found.append(WorkerConnection(path))
            except OSError:
                return False
            return True

        until(connected, seconds, f"no worker at {path}\n{self.log.read_text()}")
        return found[0]

    def text(self) -> str:
        return self.log.read_text()


class WorkerConnection:
    """The authority's end, blocking."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(15)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self._reader = FrameReader(Result, MAX_RESULT_BYTES)
        self._number = 0
        self._results: list[Result] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *works: AnyWork) -> None:
        tasks = []
        for work in works:
            self._number += 1
            tasks.append(frame_bytes(Task(self._number, work)))
        self.socket.sendall(b"".join(tasks))

    def receive(self) -> AnyProduct:
        """The next product; EOFError if the worker goes first."""
        while not self._results:
            data = self.socket.recv(65_536)
            if not data:
                raise EOFError
            self._results.extend(self._reader.feed(data))
        return self._results.pop(0).product

    def ask(self, work: AnyWork) -> AnyProduct:
        self.send(work)
        return self.receive()

    def open(self, name: str, object_id: bytes = b"") -> AnyProduct:
        return self.ask(OpenKey(f"{name}/1", name, object_id))

    def sign(self, name: str, algorithm: Algorithm, data: bytes) -> AnyProduct:
        return self.ask(SignTask(f"{name}/1", algorithm, data))

    def probe(self) -> AnyProduct:
        return self.ask(Probe())


def make_room(
    directory: Path,
    tokens: Mapping[str, Mapping[str, Algorithm]],
    workers: int = 1,
    deadline_ms: int = 5000,
    shims: Mapping[str, Shim] = MappingProxyType({}),
) -> HsmRoom:
    """Tokens with keys, and a configuration for `keybroker hsm`. A token that is named in `shims` is used through its shim."""
    sections, sockets = {}, {}
    for name, keys in tokens.items():
        home = directory / name
        home.mkdir(parents=True)
        made = make_token(home, keys, label=name)
        sockets[name] = [directory / f"{name}-{index}.sock" for index in range(workers)]
        sections[name] = {
            "uri": made.uri.replace("file:pin", f"file:{home / 'pin'}"),
            "sockets": [str(path) for path in sockets[name]],
            "deadline_ms": deadline_ms,
            "module_environment": {"SOFTHSM2_CONF": str(made.configuration)},
        }
        if name in shims:
            shims[name].use_in(sections[name])
    config_file = directory / "hsm.yaml"
    config_file.write_text(yaml.safe_dump({"hsm": {"tokens": sections}}))
    return HsmRoom(directory, config_file, sockets)


@contextlib.contextmanager
def served(room: HsmRoom) -> Iterator[HsmRoom]:
    """The room, running while the block runs."""
    room.start()
    try:
        yield room
    finally:
        room.kill()


def build_shim(directory: Path) -> Path:
    """Compile the failing module."""
    module = directory / "shim.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(module), str(SHIM), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return module
