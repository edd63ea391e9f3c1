"""A whole broker for tests: a world by `keybroker dev init`, served by `keybroker serve`, on real SoftHSM, as a user has it."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from keybroker.client import Client
from tests.brokers import read_leaves

PROGRAM = Path(sys.executable).with_name("keybroker")
READY_SECONDS = 40


@dataclass(slots=True)
class World:
    """A development world, and the broker that serves it, if one does.

    Attributes:
        before: a program, with its arguments, that starts the broker in its turn.
    """

    directory: Path
    serving: subprocess.Popen[str] | None = None
    url: str = ""
    before: list[str] = field(default_factory=list)
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.directory.parent / f"{self.directory.name}.log"

    @property
    def config_file(self) -> Path:
        return self.directory / "keybroker.yaml"

    @property
    def config(self) -> dict[str, Any]:
        loaded: dict[str, Any] = yaml.safe_load(self.config_file.read_text())
        return loaded

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def operations(self) -> str:
        return str(self.config["frontend"]["operations"])

    def svid(self, name: str) -> Path:
        return self.directory / "svids" / f"{name}.pem"

    def client(self, name: str = "payments-api") -> Client:
        return Client(self.url, svid=self.svid(name), bundle=self.directory / "bundle.pem")

    def sign_log_every(self, seconds: int) -> None:
        """How often there is a checkpoint, from the next start on."""
        text = re.sub(r"(key: log\.vkey,)( seconds: [0-9]+,)?", rf"\1 seconds: {seconds},", self.config_file.read_text())
        self.config_file.write_text(text)

    def start(self) -> None:
        """Serve, and wait for the `ready` line."""
        with self.log.open("a") as log:
            command = [*self.before, str(PROGRAM), "serve", "--config", str(self.config_file)]
            self.serving = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=clean_environment())
        stdout = self.serving.stdout
        assert stdout is not None
        readable, _, _ = select.select([stdout], [], [], READY_SECONDS)
        line = stdout.readline() if readable else ""
        assert line.startswith("ready https://127.0.0.1:"), f"{line!r}\n{self.log.read_text()}"
        self.url = line.split()[1]

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self.serving is not None
        self.serving.terminate()
        try:
            return self.serving.wait(20)
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.serving is not None:
            if self.serving.poll() is None:
                self.serving.kill()
            self.serving.wait(10)
            if self.serving.stdout is not None:
                self.serving.stdout.close()
            self.serving = None

    def rooms(self) -> dict[str, int]:
        """The process ids of the rooms, by name."""
        assert self.serving is not None
        found = {}
        for pid in children(self.serving.pid):
            words = arguments(pid)
            if "keybroker" in words:
                found[words[words.index("keybroker") + 1]] = pid
        return found

    def run(self, *words: str, name: str = "payments-api", stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """The `keybroker` command, as a workload of this world."""
        environment = clean_environment() | {
            "KEYBROKER_URL": self.url,
            "KEYBROKER_SVID": str(self.svid(name)),
            "KEYBROKER_BUNDLE": str(self.directory / "bundle.pem"),
        }
        return subprocess.run([str(PROGRAM), *words], capture_output=True, check=False, timeout=60, env=environment, input=stdin)

    def leaves(self) -> list[bytes]:
        return read_leaves(self.state)


def make_world(directory: Path, *options: str) -> World:
    """`keybroker dev init`."""
    command = [str(PROGRAM), "dev", "init", str(directory), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=clean_environment())
    assert done.returncode == 0, done.stderr
    world = World(directory)
    world.sign_log_every(3_600)  # no test but those of the log expects records that nobody has asked for
    return world


@contextlib.contextmanager
def served(directory: Path, *options: str) -> Iterator[World]:
    """A fresh world, served while the block runs."""
    world = make_world(directory, *options)
    try:
        world.start()
        yield world
    finally:
        world.kill()


def until(holds: Callable[[], bool], seconds: float = 10, what: str = "it did not come true in time") -> float:
    """Wait until something holds; how many seconds that took."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < seconds, what
        time.sleep(0.02)
    return time.monotonic() - started


def children(pid: int) -> list[int]:
    """The process ids of a process's children."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def descendants(pid: int) -> list[int]:
    """Children, their children, and so on."""
    return [each for child in children(pid) for each in (child, *descendants(child))]


def arguments(pid: int) -> list[str]:
    """The argv of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(pid: int) -> None:
    """SIGKILL to one process that a test started."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def clean_environment() -> dict[str, str]:
    """The environment without settings of the one who runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KEYBROKER_", "SOFTHSM2_"))}
    if "COVERAGE_FILE" in kept:  # the rooms may write what was measured only where their own temporary files go
        kept["TMPDIR"] = str(Path(kept["COVERAGE_FILE"]).parent)
    return kept


def unmeasured_environment() -> dict[str, str]:
    """The same, for programs whose system calls are traced or broken: what measures coverage writes to a database of its own."""
    return {name: value for name, value in clean_environment().items() if not name.startswith("COVERAGE_")}
