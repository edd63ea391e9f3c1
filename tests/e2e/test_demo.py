"""`scripts/demo --keep`: what it prints to try next can be copied and pasted."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.worlds import clean_environment

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_lines_that_the_demo_says_to_try_work_when_pasted() -> None:
    environment = clean_environment()
    environment.pop("TMPDIR", None)
    demo = subprocess.run(
        ["scripts/demo", "--keep"], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "\n  Verified OK\n" in demo.stdout
    lines = [line.removeprefix("  ") for line in demo.stdout.partition("copy and paste:")[2].splitlines()]
    script = "\n".join(line for line in lines if not re.search(r"EDITOR|--follow|^It is|ES384", line))
    try:
        pasted = subprocess.run(["bash", "-eu", "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=100)
        assert pasted.returncode == 0, pasted.stderr
        assert "spiffe://example.org/payments/api" in pasted.stdout
        assert '"algorithm":"Ed25519"' in pasted.stdout
        assert '"signature":' in pasted.stdout
    finally:
        subprocess.run(["bash", "-c", f"({lines[-1]}) 2>/dev/null"], check=False, timeout=20)
