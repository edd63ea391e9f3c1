"""CPU time of processes, from /proc (proc_pid_stat(5)), by room."""

from __future__ import annotations

import os
from pathlib import Path

_TICK = 1 / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """The process ids of a process's children."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def arguments(pid: int) -> list[str]:
    """The argv of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def seconds(pid: int, thread: int = 0) -> float:
    """User and system time of a process so far, or of one of its threads; to a hundredth of a second on most kernels."""
    where = f"/proc/{pid}/task/{thread}/stat" if thread else f"/proc/{pid}/stat"
    fields = Path(where).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK


def rooms(supervisor: int) -> dict[str, list[int]]:
    """The processes under a `keybroker serve`: `supervisor`, `frontend`, `authority`, `hsm` (the watchdog), `workers`."""
    found: dict[str, list[int]] = {"supervisor": [supervisor]}
    for pid in children(supervisor):
        words = arguments(pid)
        found[words[words.index("keybroker") + 1]] = [pid]
    found["workers"] = [pid for room in found.get("hsm", ()) for pid in children(room)]
    return found
