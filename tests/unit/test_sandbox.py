"""The walls, tried from inside: each in a process of its own, because nobody comes out again."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from keybroker.sandbox import landlock_abi
from tests.worlds import clean_environment

_ENTER = """
import os, socket, sys
from pathlib import Path
from keybroker.process import harden
from keybroker.sandbox import Sandbox, python_paths
harden()
base = Path(sys.argv[1])
Sandbox((*python_paths(), base / "read"), (base / "write",), binds=(int(sys.argv[2]),), connects=eval(sys.argv[3])).enter()
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in ("read", "write", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    return tmp_path


def inside(base: Path, attempt: str, port: int = 1, connects: str = "()") -> bool:
    """Whether something can be done inside; False where the kernel forbids it."""
    command = [sys.executable, "-c", _ENTER + attempt, str(base), str(port), connects]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30, env=clean_environment(), cwd=base)
    assert done.returncode == 0 or "PermissionError" in done.stderr, done.stderr
    return done.returncode == 0


def test_kernel_of_this_host_has_landlock_with_tcp_rules() -> None:
    assert landlock_abi() >= 4, "the tests of the walls need Linux 6.7 or later"


@pytest.mark.parametrize(
    ("attempt", "is_allowed"),
    [
        ("(base / 'read/file').read_text()", True),
        ("(base / 'read/file').write_text('x')", False),
        ("(base / 'read/new').write_text('x')", False),
        ("(base / 'write/file').write_text('x')", True),
        ("(base / 'write/file').rename(base / 'write/new')", True),
        ("(base / 'write/file').rename(base / 'read/new')", False),
        ("(base / 'write/file').unlink()", True),
        ("(base / 'other/file').read_text()", False),
        ("list((base / 'other').iterdir())", False),
        ("(base / 'file').write_text('x')", False),
        ("os.symlink(base / 'other/file', base / 'write/link'); (base / 'write/link').read_text()", False),
        ("open('/etc/shadow').read()", False),
        ("open('/proc/1/environ').read()", False),
        ("os.execv('/bin/true', ['true'])", False),
        ("import shutil; shutil.copy('/bin/true', base / 'write/true'); os.execv(base / 'write/true', ['true'])", False),
        ("import decimal, sqlite3, ssl, zoneinfo; ssl.create_default_context(); zoneinfo.ZoneInfo('Europe/Berlin')", True),
        ("os.kill(os.getppid(), 0)", False),
    ],
)
def test_what_is_not_named_cannot_be_touched(base: Path, attempt: str, is_allowed: bool) -> None:
    assert inside(base, attempt) is is_allowed


def test_only_named_ports_can_be_bound(base: Path) -> None:
    attempt = "socket.create_server(('127.0.0.1', {}))"
    assert inside(base, attempt.format(24_871), port=24_871)
    assert not inside(base, attempt.format(24_872), port=24_871)


@pytest.mark.parametrize(("connects", "is_allowed"), [("()", False), ("(port,)", True), ("None", True)])
def test_only_named_ports_can_be_connected_to(base: Path, connects: str, is_allowed: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        attempt = f"socket.create_connection(('127.0.0.1', {port}), 5)"
        assert inside(base, attempt, connects=connects.replace("port", str(port))) is is_allowed
