"""Power loss: on a real token, the intent is on disk before the token is asked, and the outcome before the signature leaves."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from keybroker.model.call import Signed
from keybroker.model.key import Algorithm
from tests.faults.strace import Attached, parse
from tests.faults.strace_order import CALLS, OPTIONS, Use, violations
from tests.integration.authority.served import Asked, ServedAuthority, identity, served_authority
from tests.tokens import HsmRoom, make_room, served

LINES = list[str]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServedAuthority, HsmRoom]]:
    directory = tmp_path_factory.mktemp("order")
    (directory / "authority").mkdir()
    with (
        served(make_room(directory / "hsm", {"dev": {"orders": Algorithm.ES256}})) as room,
        served_authority(directory / "authority", identity(), checkpoint_frames=50) as authority,
    ):
        room.connect("dev").__exit__()
        authority.hsm = room.sockets["dev"][0]
        authority.start()
        authority.wait_until_serving()
        yield authority, room


def trace_of(traced: tuple[ServedAuthority, HsmRoom], groups: list[list[bytes]], trace: Path) -> tuple[LINES, list[Use]]:
    """Sign each group's messages together, one group after another, and see every write of authority and worker."""
    authority, room = traced
    asked: list[Asked] = []
    with Attached([authority.pid, *room.workers()], trace, CALLS, more=OPTIONS), authority.connect() as frontend:
        for group in groups:
            asked += frontend.sign(*group)
    uses = [Use(each.digest, each.reply.signature) for each in asked if isinstance(each.reply, Signed)]
    assert len(uses) == len(asked)
    return trace.read_text().splitlines(), uses


def without_syncs_between(lines: LINES, recorded: str, sent: bytes) -> LINES:
    """The trace of a broker that had not synced at all between writing a record and letting something go.

    All of them, because a checkpoint may have come between by chance, and its sync of the log is as good as the commit's.
    """
    written = next(place for place, line in enumerate(lines) if _hex(recorded.encode()) in line)
    left = next(place for place, line in enumerate(lines) if _hex(sent) in line)
    dropped: set[int] = set()
    for place in range(written, left):
        if re.search(r"f(data)?sync\(", lines[place]):
            dropped.add(place)
            if "unfinished" in lines[place]:
                thread = lines[place].split()[0]
                dropped.add(next(n for n in range(place, len(lines)) if lines[n].startswith(f"{thread} ") and "sync resumed" in lines[n]))
    return [line for place, line in enumerate(lines) if place not in dropped]


def _hex(data: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in data)


@pytest.mark.case(63)
@pytest.mark.parametrize("together", [1, 24], ids=["one at a time", "in shared commits"])
def test_intent_is_synced_before_the_token_is_asked_and_outcome_before_the_answer(
    traced: tuple[ServedAuthority, HsmRoom], together: int, tmp_path: Path
) -> None:
    groups = [[f"{together}-{number}-{each}".encode() for each in range(together)] for number in range(24 // together)]
    lines, uses = trace_of(traced, groups, tmp_path / "trace")
    assert len(uses) == 24
    assert violations(parse(lines), uses) == []


@pytest.mark.case(63)
def test_oracle_finds_a_missing_sync_before_the_token_is_asked_and_before_the_answer(
    traced: tuple[ServedAuthority, HsmRoom], tmp_path: Path
) -> None:
    lines, uses = trace_of(traced, [[b"alone"]], tmp_path / "trace")
    use = uses[0]
    assert violations(parse(lines), uses) == []
    (fault,) = violations(parse(without_syncs_between(lines, f'"value":"{use.digest.hex()}"', use.digest)), uses)
    assert "a key was used before its intent was on disk" in fault
    outcome = f'"signature_sha256":"{hashlib.sha256(use.signature).hexdigest()}"'
    (fault,) = violations(parse(without_syncs_between(lines, outcome, use.signature)), uses)
    assert "a signature was released before its outcome was on disk" in fault
    assert len(violations([], uses)) == 2


def test_trace_is_read_with_calls_that_others_came_between() -> None:
    lines = [
        '7 1.000001 pwrite64(5</s/keybroker.db-wal>, "a) = 3", 6, 0) = 6',
        "8 1.000002 fdatasync(5</s/keybroker.db-wal> <unfinished ...>",
        '7 1.000003 write(9<UNIX-STREAM:[1->2]>, "x", 1) = 1',
        "8 1.000004 <... fdatasync resumed>) = -1 EIO (Input/output error) (INJECTED)",
        "8 1.000005 fdatasync(5</s/keybroker.db-wal> <unfinished ...>",
        "8 1.000006 +++ killed by SIGKILL +++",
    ]
    calls = parse(lines)
    assert [(call.name, call.result, call.succeeded, call.is_injected) for call in calls] == [
        ("pwrite64", "6", True, False),
        ("fdatasync", "-1", False, True),
        ("write", "1", True, False),
        ("fdatasync", "", False, False),
    ]
    assert (calls[1].began, calls[1].ended, calls[2].began) == (1, 3, 2)
