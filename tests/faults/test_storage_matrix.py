"""Every call by which the authority touches its store, at every instance, failing in every way.

A seeded sample of them in the suite; all of them with `scripts/faults storage --cycles all`. Each is one line on standard output: phase,
call, instance, fault, file, what clients got, how the process ended, what the next request got.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.strace import Injection, most_by_thread
from tests.faults.strace_storage import FAULTS, LIES, PHASES, Lie, Scene, scenes
from tests.integration.authority.served import build_storage_shim, identity

_SAMPLE = 2  # of each phase
_LYING = ("pwrite64", "fdatasync", "ftruncate")

# What the store is known to do. A call that is not here has nobody thought about.
KNOWN = {
    "fresh": {"mkdir", "openat", "flock", "fchown", "pwrite64", "fsync", "fdatasync", "ftruncate", "mmap", "unlink"},
    "crashed": {"mkdir", "openat", "flock", "fchown", "pwrite64", "fsync", "fdatasync", "ftruncate", "mmap", "unlink"},
    "serving": {"pwrite64", "fdatasync", "ftruncate"},
    "stopping": {"pwrite64", "fdatasync", "ftruncate", "unlink"},
}


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    yield from scenes(tmp_path, identity())


@pytest.mark.case(55)
@pytest.mark.case(56)
@pytest.mark.case(58)
@pytest.mark.timeout(100_000)
@pytest.mark.parametrize("phase", PHASES)
def test_nothing_answered_is_lost_whichever_call_fails(
    scene: Scene, phase: str, tmp_path: Path, cycles: Callable[[int], int], seed: int
) -> None:
    unharmed = scene.run(phase, None)
    assert {call.name for call in unharmed.calls} <= KNOWN[phase]
    # What a start does, its first thread does; what is written while serving, another one.
    first = unharmed.calls[0].thread
    counts = most_by_thread(call for call in unharmed.calls if phase == "serving" or call.thread == first)
    plan: list[Injection] = [
        Injection(call, fault, instance) for call, count in counts.items() for instance in range(1, count + 1) for fault in FAULTS
    ]
    if phase == "serving":
        library = build_storage_shim(tmp_path)
        total = {call: sum(each.name == call for each in unharmed.calls) for call in _LYING}
        plan += [Lie(call, fault, instance) for call in _LYING for instance in range(1, total[call] + 1) for fault in LIES]
    else:
        library = Path()
    chosen = plan if cycles(_SAMPLE) >= len(plan) else random.Random(seed).sample(plan, cycles(_SAMPLE))
    sys.stdout.write(f"{phase}: {len(chosen)} of {len(plan)}\n")
    struck, failures = 0, []
    for injection in chosen:
        try:
            run = scene.lie(injection, library) if isinstance(injection, Lie) else scene.run(phase, injection)
        except AssertionError as err:
            failures.append(f"{injection}: {err}")
            sys.stdout.write(f"{phase}\t{injection}\tFAILED: {err}\n")
            continue
        struck += run.has_struck
        sys.stdout.write(run.row() if run.has_struck else f"{phase}\t{injection}\tnot reached this time")
        sys.stdout.write("\n")
    assert failures == []
    assert struck >= len(chosen) * 3 // 4  # how requests share commits differs a little from run to run
