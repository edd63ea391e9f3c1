"""A disk that is full now and then, under load: nothing that was answered is lost, and the broker outlives it."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from keybroker.audit.leaf import decode
from keybroker.authority.store import fsck
from keybroker.model.call import Problem, Signed
from tests.brokers import read_leaves
from tests.integration.authority.served import Asked, ServedAuthority, identity, served_authority
from tests.integration.authority.test_disk_full import SmallDisk, on_small_disk
from tests.worlds import until

_CLIENTS = 4
_MOST = 1_000  # times; the disk is memory


def sign_until(stop: threading.Event, authority: ServedAuthority, number: int, asked: list[Asked]) -> None:
    with authority.connect() as frontend:
        for turn in range(1_000_000):
            if stop.is_set():
                return
            asked += frontend.sign(*(f"{number}-{turn}-{each}".encode() for each in range(3)))
            stop.wait(0.1)


@pytest.mark.case(57)
@pytest.mark.timeout(100_000)
def test_broker_outlives_a_disk_that_is_full_now_and_then_under_load(tmp_path: Path, cycles: Callable[[int], int], seed: int) -> None:
    rng, times = random.Random(seed), min(cycles(3), _MOST)
    asked: list[Asked] = []
    stop = threading.Event()
    with served_authority(tmp_path, identity(), checkpoint_frames=100) as authority:
        authority.start(*on_small_disk(authority.state, (16 + times) * 1024 * 1024))  # more than is recorded meanwhile
        authority.wait_until_serving()
        disk = SmallDisk(authority.pid, authority.state)
        clients = [threading.Thread(target=sign_until, args=(stop, authority, number, asked)) for number in range(_CLIENTS)]
        for client in clients:
            client.start()
        try:
            for _ in range(times):
                time.sleep(rng.uniform(0, 0.5))
                disk.fill()
                time.sleep(rng.uniform(0, 1.5))
                disk.free()
                until(authority.is_serving, 10, authority.text())
        finally:
            stop.set()
            for client in clients:
                client.join(20)
        assert authority.is_running()
        copy = disk.copy(tmp_path / "copy")
        assert authority.stop() == 0
    report = fsck.check(copy)
    assert (report.findings, report.open_uses) == ([], {})
    signed = {each.reply.use for each in asked if isinstance(each.reply, Signed)}
    on_record = {record["use"] for record in map(decode, read_leaves(copy)) if record["outcome"] == "signed"}
    assert signed == on_record  # no signature without its record, and no record of one that was not released
    codes = Counter(each.reply.code if isinstance(each.reply, Problem) else type(each.reply).__name__ for each in asked)
    sys.stdout.write(f"{dict(codes)}\n")
    assert set(codes) <= {"Signed", "audit-unavailable"}
