"""The load generator in `load/`, a small Go program: built once, run for a moment at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from bench.latency import Latencies

SOURCE = Path(__file__).with_name("load")
PROGRAM = Path(sys.executable).with_name("keybroker-bench-load")
_WAIT_SECONDS = 120


class GeneratorError(Exception):
    """The generator could not be built or did not work, or an answer was not what it should be."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the generator is told; see `type order` in load/main.go. Durations are seconds."""

    address: str
    svid: Path
    bundle: Path
    requests: tuple[bytes, ...]
    server_name: str = "localhost"
    connections: int = 1
    warm_up: float = 0.0
    seconds: float = 0.0
    signatures: int = 1
    listen: bool = False
    answer: bytes = b""


class _Result(msgspec.Struct, frozen=True):
    seconds: float
    answers: int
    faults: int
    fault: str
    cpu: float
    total_us: float
    latencies: dict[str, int]


class Load(msgspec.Struct, frozen=True):
    """What one run of the generator saw.

    Attributes:
        seconds: how long it measured.
        answers: good answers in that time.
        cpu_us: the generator's own CPU time for each.
        mean_us: from a request to its answer.
    """

    seconds: float
    answers: int
    cpu_us: float
    mean_us: float
    latencies: Latencies


def build() -> None:
    """Compile the generator, if there is none that is newer than its source.

    Raises:
        GeneratorError: there is no Go compiler, or it refuses.
    """
    newest = max(path.stat().st_mtime for path in SOURCE.iterdir())
    if PROGRAM.exists() and PROGRAM.stat().st_mtime >= newest:
        return
    go = shutil.which("go") or shutil.which("go", path=str(PROGRAM.parent))
    if go is None:
        raise GeneratorError("no Go compiler; `scripts/setup` installs one")
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOPROXY": "off", "GOWORK": "off"}
    fresh = PROGRAM.with_suffix(f".{os.getpid()}")
    command = [go, "build", "-trimpath", "-ldflags=-s -w", "-o", str(fresh), "."]
    done = subprocess.run(command, cwd=SOURCE, env=environment, capture_output=True, text=True, check=False)  # noqa: S603  our own source
    if done.returncode != 0:
        raise GeneratorError(done.stderr.strip())
    fresh.replace(PROGRAM)


def run(order: Order, on_start: Callable[[], None], on_end: Callable[[], None]) -> Load:
    """Generate load once.

    Args:
        on_start: called when the warm-up is over.
        on_end: called when the time is up, before anything else happens.

    Raises:
        GeneratorError: an answer was not a signature, or there was none at all.
    """
    process = _start(order)
    stdin, stdout = process.stdin, process.stdout
    try:
        if stdin is None or stdout is None or stdout.readline() != b"measuring\n":
            raise GeneratorError("the load generator did not start")
        on_start()
        stdout.readline()
        on_end()
        result = msgspec.json.decode(stdout.read(), type=_Result)
        process.wait(_WAIT_SECONDS)
    except msgspec.DecodeError as err:
        raise GeneratorError("the load generator broke off") from err
    finally:
        _end(process)
    if result.faults or not result.answers:
        raise GeneratorError(f"{result.faults} of {result.answers} answers were no signatures; the first: {result.fault}")
    return Load(
        result.seconds,
        result.answers,
        result.cpu / result.answers * 1e6,
        result.total_us / result.answers,
        Latencies({int(bucket): count for bucket, count in result.latencies.items()}),
    )


@contextlib.contextmanager
def responder(order: Order) -> Iterator[None]:
    """The generator's other side, which answers everything with `order.answer`, while the block runs.

    Raises:
        GeneratorError: it does not listen.
    """
    process = _start(msgspec.structs.replace(order, listen=True))
    try:
        if process.stdout is None or process.stdout.readline() != b"measuring\n":
            raise GeneratorError("the responder did not start")
        yield
    finally:
        _end(process)


def _start(order: Order) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603  our own
    if process.stdin is not None:
        process.stdin.write(msgspec.json.encode(order, enc_hook=str) + b"\n")
        process.stdin.flush()
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
