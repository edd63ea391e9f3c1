"""The program `keybroker` as an identity of a world runs it, and what it says."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from tests.worlds import PROGRAM, World, clean_environment


def environment(world: World, name: str = "payments-api", **more: str) -> dict[str, str]:
    own = {"KEYBROKER_URL": world.url, "KEYBROKER_SVID": str(world.svid(name)), "KEYBROKER_BUNDLE": str(world.directory / "bundle.pem")}
    return clean_environment() | own | more


def run(*words: str | bytes, env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([str(PROGRAM), *words], check=False, timeout=60, env=env, capture_output=True, **options)


def lines(done: subprocess.CompletedProcess[bytes]) -> list[str]:
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    return done.stdout.decode().splitlines()


def loaded(done: subprocess.CompletedProcess[bytes]) -> Any:
    (line,) = lines(done)
    return json.loads(line)


def refused(done: subprocess.CompletedProcess[bytes], status: int) -> str:
    """What is said on stderr, which is all that is said."""
    assert done.returncode == status, (done.stdout, done.stderr)
    assert done.stdout == b""
    text = done.stderr.decode()
    assert "Traceback" not in text
    return text
