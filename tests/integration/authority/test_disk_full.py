"""A full disk: refused while it lasts, recovered without a restart when it is over, and nothing missing in the record.

The disk is a small tmpfs in a mount namespace of the broker's own, which only root can make.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import pytest

from keybroker.audit.leaf import decode
from keybroker.authority.store import fsck
from keybroker.errors import AuditUnavailableError, KeyBrokerError
from keybroker.model.call import Problem, Signed
from tests.brokers import read_leaves
from tests.integration.authority.served import Asked, identity, served_authority
from tests.worlds import World, make_world, until

_MOUNT = 'mount -t tmpfs -o size="$1",mode=700 tmpfs "$2" && shift 2 && exec "$@"'


def on_small_disk(state: Path, size: int = 8 * 1024 * 1024) -> list[str]:
    """What to put before a command, so that it sees a disk of its own at `state`, of so many bytes."""
    assert os.getuid() == 0, "a test with a full disk has to mount one, and needs root"
    state.mkdir(exist_ok=True)
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", _MOUNT, "sh", str(size), str(state)]


@dataclass(slots=True)
class SmallDisk:
    """The disk of a process, as seen from outside."""

    pid: int
    state: Path
    seen: Path = field(init=False)

    def __post_init__(self) -> None:
        self.seen = Path(f"/proc/{self.pid}/root{self.state}")

    def fill(self) -> None:
        """Leave no byte free."""
        with (self.seen / "filler").open("wb", buffering=0) as filler:
            for size in (65_536, 4_096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        filler.write(b"x" * size)
        assert os.statvfs(self.seen).f_bavail == 0

    def free(self) -> None:
        (self.seen / "filler").unlink()

    def copy(self, to: Path) -> Path:
        """What is on it now, where its owner's paths mean nothing: SQLite would follow them. Take it while nothing is written."""
        return Path(shutil.copytree(self.seen, to))


@pytest.mark.case(57)
def test_owed_outcome_is_written_first_when_there_is_space_again(tmp_path: Path) -> None:
    with served_authority(tmp_path, identity()) as authority:
        authority.start(*on_small_disk(authority.state))
        authority.wait_until_serving()
        disk = SmallDisk(authority.pid, authority.state)
        with authority.connect() as frontend:
            (before,) = frontend.sign(b"before")
            authority.worker.gate.clear()
            cut_off: list[Asked] = []
            waiting = Thread(target=lambda: cut_off.extend(frontend.sign(b"cut off")))
            waiting.start()
            until(lambda: len(authority.worker.asked) == 2)  # its intent is on record
            disk.fill()
            authority.worker.gate.set()
            waiting.join(20)
            (refused,) = frontend.sign(b"refused")
            disk.free()
            until(authority.is_serving)  # by itself: nobody asks for anything
            (after,) = frontend.sign(b"after")
        for each in (*cut_off, refused):
            assert isinstance(each.reply, Problem)
            assert each.reply.code == "audit-unavailable"
        assert isinstance(before.reply, Signed)
        assert isinstance(after.reply, Signed)
        assert authority.worker.asked == [before.digest, cut_off[0].digest, after.digest]
        copy = disk.copy(tmp_path / "copy")
        report = fsck.check(copy)
        assert (report.findings, report.open_uses) == ([], {})
        tail = [decode(leaf) for leaf in read_leaves(copy)][-4:]
        assert [record["outcome"] or record["kind"] for record in tail] == ["unknown", "security", "intent", "signed"]
        assert tail[0]["body"]["cause"] == "outcome-not-durable"
        assert tail[1]["body"] == {"event": "record-not-writable", "detail": "SQLITE_FULL", "count": 2}
        assert authority.stop() == 0


@pytest.fixture
def small_world(tmp_path: Path) -> Iterator[tuple[World, SmallDisk]]:
    world = make_world(tmp_path / "world")
    world.before = on_small_disk(world.state)
    try:
        world.start()
        assert world.serving is not None
        yield world, SmallDisk(world.serving.pid, world.state)
    finally:
        world.kill()


def get(world: World, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{world.operations}{path}", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as err:
        with err:
            return err.code


def code_of(world: World) -> str:
    """What one request for a signature gets."""
    try:
        with world.client() as broker:
            broker.sign("orders", "ES256", message=b"x")
    except AuditUnavailableError as err:
        return err.code
    except KeyBrokerError as err:
        return type(err).__name__
    return "signed"


@pytest.mark.case(57)
def test_broker_is_live_and_not_ready_while_its_disk_is_full_and_recovers_without_a_restart(
    small_world: tuple[World, SmallDisk], tmp_path: Path
) -> None:
    fill_for(3, small_world, tmp_path / "copy")


def fill_for(seconds: float, small_world: tuple[World, SmallDisk], copy: Path) -> None:
    """Fill the disk, see that everybody is told so for a while, and that it is over as soon as there is space."""
    world, disk = small_world
    rooms = world.rooms()
    assert code_of(world) == "signed"
    disk.fill()
    refused = 0
    ends = time.monotonic() + seconds
    while time.monotonic() < ends or not refused:
        assert code_of(world) == "audit-unavailable"
        assert (get(world, "/livez"), get(world, "/readyz")) == (200, 503)
        refused += 1
        time.sleep(0.1)
    disk.free()
    until(lambda: get(world, "/readyz") == 200, seconds=5)  # by itself: nobody asks for a signature
    assert code_of(world) == "signed"
    assert world.rooms() == rooms
    report = fsck.check(disk.copy(copy))
    assert (report.findings, report.open_uses) == ([], {})
    records = [decode(leaf) for leaf in read_leaves(copy)]
    assert [record["outcome"] for record in records if record["kind"] == "outcome"] == ["signed", "signed"]
    (outage,) = [record["body"] for record in records if record["body"].get("event") == "record-not-writable"]
    assert outage["count"] == refused
