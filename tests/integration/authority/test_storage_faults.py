"""One of each kind of storage fault, at the kernel's edge: what clients get, and what a start finds afterwards.

`scripts/faults storage` does the same at every instance of every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from keybroker.process import EXIT_STORE
from tests.faults.strace import Call, Injection
from tests.faults.strace_storage import PHASES, Lie, Run, Scene, file_of, scenes
from tests.integration.authority.served import build_storage_shim, identity

RAN_ON, KILLED = None, -9
REFUSED, UNANSWERED, SIGNED = "audit-unavailable", "no answer", "signed"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    yield from scenes(tmp_path_factory.mktemp("storage"), identity())


@pytest.fixture(scope="module")
def unharmed(scene: Scene) -> dict[str, list[Call]]:
    """The calls of a run of each phase in which nothing fails."""
    return {phase: scene.run(phase, None).calls for phase in PHASES}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_storage_shim(tmp_path_factory.mktemp("shim"))


def strike(scene: Scene, unharmed: dict[str, list[Call]], phase: str, call: str, file: str, fault: str) -> Run:
    """Strike the first call of a kind on a file, wherever a run without faults has it."""
    first = next(each for each in unharmed[phase] if (each.name, file_of(each)) == (call, file))
    before = [each for each in unharmed[phase] if each.thread == first.thread and each.name == call and each.began <= first.began]
    run = scene.run(phase, Injection(call, fault, len(before)))
    assert file in {file_of(each) for each in run.hit}, run.row()
    return run


@pytest.mark.case(56)
@pytest.mark.case(58)
@pytest.mark.parametrize(
    ("call", "file", "fault", "first_answer", "status"),
    [
        ("pwrite64", "db-wal", "EIO", REFUSED, RAN_ON),
        ("pwrite64", "db-wal", "ENOSPC", REFUSED, RAN_ON),
        ("fdatasync", "db-wal", "EIO", UNANSWERED, EXIT_STORE),
        ("fdatasync", "db", "EIO", None, EXIT_STORE),  # of a checkpoint, which comes between two commits: of whose use, is chance
        ("pwrite64", "db", "ENOSPC", SIGNED, RAN_ON),
        ("ftruncate", "db", "EIO", SIGNED, RAN_ON),
    ],
)
def test_failed_write_is_answered_503_and_failed_sync_ends_the_process_while_serving(
    scene: Scene, unharmed: dict[str, list[Call]], call: str, file: str, fault: str, first_answer: str | None, status: int | None
) -> None:
    run = strike(scene, unharmed, "serving", call, file, fault)
    assert run.status == status, run.row()
    assert run.answers[0] == first_answer or first_answer is None, run.row()


@pytest.mark.case(55)
@pytest.mark.parametrize(("call", "file"), [("pwrite64", "db-wal"), ("fdatasync", "db-wal"), ("pwrite64", "db")])
def test_nothing_answered_is_lost_when_killed_in_the_middle_of_a_call(
    scene: Scene, unharmed: dict[str, list[Call]], call: str, file: str
) -> None:
    assert strike(scene, unharmed, "serving", call, file, "SIGKILL").status == KILLED


@pytest.mark.case(56)
@pytest.mark.parametrize(
    ("phase", "call", "file", "fault", "status"),
    [
        ("fresh", "openat", "db-wal", "EIO", EXIT_STORE),
        ("fresh", "pwrite64", "db-wal", "ENOSPC", EXIT_STORE),
        ("fresh", "pwrite64", "db-wal", "SIGKILL", KILLED),
        ("crashed", "flock", "lock", "EIO", EXIT_STORE),
        ("crashed", "fsync", "state", "EIO", EXIT_STORE),
        ("crashed", "mmap", "db-shm", "ENOSPC", EXIT_STORE),
        ("crashed", "pwrite64", "db", "ENOSPC", EXIT_STORE),
        ("crashed", "pwrite64", "db", "SIGKILL", KILLED),
        ("crashed", "fdatasync", "db", "EIO", EXIT_STORE),
        ("crashed", "ftruncate", "db-wal", "EIO", EXIT_STORE),
        ("stopping", "fdatasync", "db", "EIO", 0),
    ],
)
def test_start_that_fails_is_tried_again_and_finds_everything(
    scene: Scene, unharmed: dict[str, list[Call]], phase: str, call: str, file: str, fault: str, status: int
) -> None:
    assert strike(scene, unharmed, phase, call, file, fault).status == status


@pytest.mark.case(58)
@pytest.mark.parametrize(
    ("call", "instance", "fault", "first_answer", "status"),
    [
        ("pwrite64", 1, "EIO", REFUSED, RAN_ON),
        ("pwrite64", 2, "SIGKILL", UNANSWERED, KILLED),
        ("fdatasync", 1, "EIO", UNANSWERED, EXIT_STORE),
        ("fdatasync", 2, "SIGKILL", UNANSWERED, KILLED),
    ],
)
def test_no_second_release_and_no_gap_when_a_write_fails_but_persists(
    scene: Scene, library: Path, call: str, instance: int, fault: str, first_answer: str, status: int | None
) -> None:
    run = scene.lie(Lie(call, fault, instance), library)
    assert (run.has_lied, run.answers[0], run.status) == (True, first_answer, status), run.row()


@pytest.mark.case(58)
@pytest.mark.parametrize("is_outcome", [False, True], ids=["intent", "outcome"])
def test_no_second_release_when_a_whole_commit_persists_that_was_reported_failed(
    scene: Scene, unharmed: dict[str, list[Call]], library: Path, is_outcome: bool
) -> None:
    """The last write of a commit is done and reported failed, and the process dies before another commit overwrites it."""
    syncs = [place for place, each in enumerate(unharmed["serving"]) if each.name == "fdatasync" and file_of(each) == "db-wal"]
    writes = sum(each.name == "pwrite64" for each in unharmed["serving"][: syncs[int(is_outcome)]])
    run = scene.lie(Lie("pwrite64", "EIO+SIGKILL", writes), library)
    assert (run.has_lied, run.answers[0], run.status) == (True, REFUSED, KILLED), run.row()
