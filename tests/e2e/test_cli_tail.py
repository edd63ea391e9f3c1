"""`keybroker audit tail`: what it shows, how long it follows, and how seldom it looks."""

from __future__ import annotations

import contextlib
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs import environment, lines, loaded
from tests.worlds import PROGRAM, World, until

SIGN = ("sign", "--key", "orders", "--alg", "ES256")


@pytest.fixture
def order(tmp_path: Path) -> Path:
    path = tmp_path / "order.json"
    path.write_bytes(b'{"order": 4711}\n')
    return path


@contextlib.contextmanager
def following(world: World, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [str(PROGRAM), "audit", "tail", "--follow", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(world, "auditor"))
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def next_line(process: subprocess.Popen[bytes], seconds: float = 50) -> str:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], seconds)
    assert readable, "nothing came"
    return process.stdout.readline().decode()


def reads_of(world: World) -> int:
    return sum(1 for leaf in world.leaves() if b'"kind":"read"' in leaf and b"human/auditor" in leaf)


def test_tail_shows_the_newest_records_for_two_reads(world: World, order: Path) -> None:
    uses = [loaded(world.run(*SIGN, "--json", str(order)))["use"] for _ in range(3)]
    before = reads_of(world)
    shown = lines(world.run("audit", "tail", "-n", "4", name="auditor"))
    assert [line.split("\t")[6] for line in shown] == [uses[1], uses[1], uses[2], uses[2]]
    assert reads_of(world) - before == 2
    only = lines(world.run("audit", "tail", "-n", "2", "--kind", "outcome", name="auditor"))
    assert [line.split("\t")[6] for line in only] == uses[1:]
    own = lines(world.run("audit", "tail", "-n", "2"))
    assert [line.split("\t")[6] for line in own] == [uses[2], uses[2]]


def test_tail_follows_and_ends_quietly_when_interrupted(world: World, order: Path) -> None:
    lines(world.run(*SIGN, str(order)))
    with following(world, "-n", "1", "--kind", "outcome") as process:
        first = next_line(process)
        uses = []
        for _ in range(2):
            uses.append(loaded(world.run(*SIGN, "--json", str(order)))["use"])
            assert next_line(process).split("\t")[6].strip() == uses[-1]
        assert uses[0] not in first
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_tail_that_is_followed_reads_ever_more_rarely(world: World) -> None:
    with following(world, "-n", "1", "--kind", "security") as process:
        started = reads_of(world)
        until(lambda: reads_of(world) > started, 20, "it does not look at all")
        begun, at = reads_of(world), time.monotonic()
        time.sleep(6)
        took = time.monotonic() - at
        assert reads_of(world) - begun <= 3 + took / 4  # after 1 s, 2 s and 4 s; a noisy machine only makes it rarer
        assert process.poll() is None


def test_tail_ends_when_nobody_reads_it_any_more(world: World, order: Path) -> None:
    with following(world, "-n", "1") as process:
        next_line(process)
        assert process.stdout is not None
        process.stdout.close()
        lines(world.run(*SIGN, str(order)))
        assert process.wait(20) == 1
        assert process.stderr is not None
        assert process.stderr.read() == b""
