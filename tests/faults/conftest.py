"""How long fault tests run and which schedule they follow: both come from outside, so that a failure replays.

`KEYBROKER_FAULT_CYCLES` is the number of faults to inject (each test has a default of its own that fits in the suite), and
`KEYBROKER_FAULT_SEED` the seed of their schedule (fresh if unset, and printed).
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable

import pytest

CYCLES = "KEYBROKER_FAULT_CYCLES"
SEED = "KEYBROKER_FAULT_SEED"


@pytest.fixture
def cycles() -> Callable[[int], int]:
    """The number of faults to inject, given the test's own default."""
    return lambda default: int(os.environ.get(CYCLES) or default)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of the schedule; on standard output, which pytest shows when the test fails."""
    chosen = int(os.environ.get(SEED) or secrets.randbits(32))
    sys.stdout.write(f"{request.node.name}: {SEED}={chosen}\n")
    return chosen
