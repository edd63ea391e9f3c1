"""strace(1), as a witness and as a saboteur: which system calls a process makes on some files, and what if one of them fails.

Counts are strace's: each thread counts its own calls, so `when=3` fails the third matching call of every thread that gets so far.
Following a process that cannot be dumped, as the rooms are, needs root.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.worlds import is_alive, until

# All that writes, makes, removes or syncs a file, whether SQLite uses it today or not.
WRITING = (
    "openat", "mkdir", "flock", "write", "writev", "pwrite64", "pwritev", "pwritev2", "fsync", "fdatasync", "sync_file_range", "ftruncate",
    "fallocate", "rename", "renameat", "renameat2", "unlink", "unlinkat", "link", "fchown", "fchmod", "mmap", "msync",
)  # fmt: skip
_LINE = re.compile(r"(?P<thread>\d+) +(?P<time>\d+\.\d+) (?:<\.\.\. (?P<resumed>\w+) resumed>)?(?:(?P<name>\w+)\()?(?P<rest>.*)", re.DOTALL)
_RESULT = re.compile(r"(?P<arguments>.*)\) += (?P<result>-?\d+|0x[0-9a-f]+|\?)(?P<why>.*)", re.DOTALL)  # arguments may look like results
_UNFINISHED = " <unfinished ...>"


@dataclass(frozen=True, slots=True)
class Injection:
    """One call that fails, or during which the process is killed. `instance` counts from 1."""

    call: str
    fault: str
    instance: int

    def __str__(self) -> str:
        return f"{self.call}#{self.instance}:{self.fault}"

    @property
    def option(self) -> str:
        kind = "signal" if self.fault.startswith("SIG") else "error"
        return f"inject={self.call}:{kind}={self.fault}:when={self.instance}"


@dataclass(frozen=True, slots=True)
class Call:
    """One system call.

    Attributes:
        began: its place among all lines of the trace; `ended` is where it returned, and infinite if it did not.
        result: what it returned; empty if it did not.
    """

    thread: int
    name: str
    arguments: str
    result: str
    began: float
    ended: float
    is_injected: bool

    @property
    def succeeded(self) -> bool:
        return bool(self.result) and self.result != "?" and not self.result.startswith("-")


def command(trace: Path, calls: Iterable[str], paths: Iterable[Path], injection: Injection | None = None, *more: str) -> list[str]:
    """strace with its options; what it follows comes after it.

    Args:
        trace: where the trace goes.
        calls: names of system calls.
        paths: only calls on these; none for all.
    """
    options = ["-f", "-qq", "-ttt", "-yy", "-e", "signal=none", "-e", f"trace={','.join(calls)}", "-o", str(trace), *more]
    for path in paths:
        options += ["-P", str(path)]
    if injection is not None:
        options += ["-e", injection.option]
    return ["strace", *options]


class Attached:
    """strace on processes that run already, while the block runs. `more` are options of strace."""

    def __init__(
        self,
        pids: Sequence[int],
        trace: Path,
        calls: Iterable[str],
        paths: Iterable[Path] = (),
        injection: Injection | None = None,
        more: Sequence[str] = (),
    ) -> None:
        assert os.getuid() == 0, "following a process that cannot be dumped needs root"
        self._pids = pids
        told = trace.with_suffix(".stderr")
        options = [word for word in command(trace, calls, paths, injection, *more) if word != "-qq"]
        for pid in pids:
            options += ["-p", str(pid)]
        with told.open("wb") as stderr:
            self._process = subprocess.Popen(options, stderr=stderr)
        until(lambda: told.read_text().count("attached") >= len(pids) or self._process.poll() is not None, 10, "strace does not attach")
        assert self._process.poll() is None, told.read_text()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        """Let the processes go on alone. If they are gone, strace ends by itself; told to end meanwhile, it may hang for ever."""
        if any(map(is_alive, self._pids)):
            self._process.terminate()
        self._process.wait(10)


def read(trace: Path) -> list[Call]:
    """The calls of a trace, in the order in which they began."""
    return parse(trace.read_text(errors="replace").splitlines())


def parse(lines: Sequence[str]) -> list[Call]:
    """The calls of a trace; both halves of one that others came between are put together."""
    begun: dict[int, tuple[int, str, str]] = {}
    calls: list[Call] = []
    for place, line in enumerate(lines):
        found = _LINE.fullmatch(line)
        if found is None:
            continue
        thread, rest = int(found["thread"]), found["rest"]
        if found["resumed"]:
            start, name, before = begun.pop(thread, (place, found["resumed"], ""))
            rest = before + rest
        elif found["name"]:
            start, name = place, found["name"]
            if rest.endswith(_UNFINISHED):
                begun[thread] = (place, name, rest.removesuffix(_UNFINISHED))
                continue
        else:
            continue
        calls.append(_call(thread, name, rest, start, place))
    calls += [Call(thread, name, rest, "", start, float("inf"), "INJECTED" in rest) for thread, (start, name, rest) in begun.items()]
    return sorted(calls, key=lambda call: call.began)


def _call(thread: int, name: str, rest: str, start: int, place: int) -> Call:
    found = _RESULT.fullmatch(rest)
    if found is None:
        return Call(thread, name, rest, "", start, float("inf"), is_injected=False)
    return Call(thread, name, found["arguments"], found["result"], start, place, "INJECTED" in found["why"])


def most_by_thread(calls: Iterable[Call]) -> dict[str, int]:
    """For each call, how often the thread that makes it most often makes it: so many instances there are to fail."""
    counts: dict[tuple[str, int], int] = {}
    for call in calls:
        counts[call.name, call.thread] = counts.get((call.name, call.thread), 0) + 1
    most: dict[str, int] = {}
    for (name, _), count in counts.items():
        most[name] = max(count, most.get(name, 0))
    return most
