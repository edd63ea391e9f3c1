"""The program and the files, pipes and signals around it: nothing half written, no noise, never a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.programs import environment, lines, refused, run
from tests.worlds import PROGRAM, World

SIGN = ("sign", "--key", "orders", "--alg", "ES256")


@pytest.fixture
def order(tmp_path: Path) -> Path:
    path = tmp_path / "order.json"
    path.write_bytes(b'{"order": 4711}\n')
    return path


@pytest.mark.parametrize("out", ["nowhere/order.sig", ".", "/proc/order.sig"])
def test_signature_that_cannot_be_written_is_1_and_no_key_is_used(world: World, order: Path, tmp_path: Path, out: str) -> None:
    before = len(world.leaves())
    done = run(*SIGN, "--out", out, str(order), env=environment(world), cwd=tmp_path)
    assert refused(done, 1).startswith(f"error: {out}: ")
    assert len(world.leaves()) == before
    assert {path.name for path in tmp_path.iterdir()} == {"order.json"}


def test_refused_signature_leaves_the_old_file_and_no_other(world: World, order: Path, tmp_path: Path) -> None:
    out = tmp_path / "order.sig"
    out.write_bytes(b"old")
    assert refused(world.run(*SIGN, "--out", str(out), str(order), name="ci-release"), 3)
    assert out.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"order.sig", "order.json"}


def test_names_that_are_not_utf8_are_no_obstacle(world: World, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\n"
    Path(os.fsdecode(name)).write_bytes(b"x")
    for encoding in ("utf-8", "ascii"):
        done = run(*SIGN, "--out", name + b".sig", name, env=environment(world, PYTHONIOENCODING=encoding, PYTHONUTF8="0"))
        assert "\\udcff\\n.sig: ES256 by orders" in lines(done)[0]
    assert Path(os.fsdecode(name + b".sig")).exists()
    assert "\\udcff" in refused(run(*SIGN, "--out", name + b"/x", name, env=environment(world)), 1)


def test_reader_that_has_had_enough_causes_no_noise(world: World) -> None:
    for words in (("audit", "query", "--all"), ("keys", "list"), ("audit", "tail", "-n", "50"), ("--help",)):
        command = subprocess.Popen(
            [str(PROGRAM), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(world, "auditor")
        )
        assert command.stdout is not None
        assert command.stderr is not None
        with command.stdout, command.stderr:
            command.stdout.close()
            assert command.stderr.read() == b""
        assert command.wait(20) in {0, 1}


def test_answer_that_cannot_be_written_is_1(world: World, order: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([str(PROGRAM), *SIGN, str(order)], stdout=full, stderr=subprocess.PIPE, env=environment(world), check=False)
    assert done.returncode == 1
    assert b"No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr


def test_closed_standard_streams_are_errors_not_crashes(world: World, order: Path) -> None:
    def shell(line: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["sh", "-c", line, str(PROGRAM), str(order)], env=environment(world), capture_output=True, check=False)

    no_output = shell('"$0" sign --key orders --alg ES256 "$1" >&-')
    assert no_output.returncode == 1
    assert b"Bad file descriptor" in no_output.stderr
    no_input = shell('"$0" sign --key orders --alg ES256 - <&-')
    assert no_input.returncode == 2
    assert b"standard input is closed" in no_input.stderr
    nothing_to_say_it_with = shell('"$0" sign --key nothing --alg ES256 "$1" 2>&-')
    assert nothing_to_say_it_with.returncode == 3


def test_interrupted_signature_leaves_no_file(world: World, tmp_path: Path) -> None:
    out = tmp_path / "sig"
    with subprocess.Popen(
        [str(PROGRAM), *SIGN, "--out", str(out), "-"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(world)
    ) as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        text = process.stderr.read()
        assert process.wait(10) in {130, -signal.SIGINT}
    assert list(tmp_path.iterdir()) == []
    assert b"Error" not in text
