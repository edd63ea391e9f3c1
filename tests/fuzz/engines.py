"""Both policy engines on generated rules and requests, for as long as you like: `scripts/fuzz engines --seconds 3600`.

Each round has a seed of its own, which a failure names; `python -m tests.fuzz.engines --seed N` runs that round again.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from keybroker.authority.policy import wasm
from tests.engines import compare
from tests.policies import OpaServer, opa_server
from tests.rule_files import requests, rule_files

_EXAMPLES = 50  # of a round
_REQUESTS = 40  # of an example


def main() -> int:
    """The command line; the exit status is 1 if the engines have differed."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz engines", description="Compare the policy engines.")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, help="one round again")
    words = parser.parse_args()
    wasm.DEADLINE_TICKS = 2_000  # of a busy machine; the deadline is not what is compared
    end, count = time.monotonic() + words.seconds, 0
    with tempfile.TemporaryDirectory() as directory, opa_server(Path(directory) / "log") as server:
        while count == 0 or (words.seed is None and time.monotonic() < end):
            number = words.seed if words.seed is not None else secrets.randbits(32)
            try:
                count += one_round(server, number)
            except AssertionError as err:
                sys.stdout.write(f"seed {number}\n{err}\n")
                return 1
    sys.stdout.write(f"stat::number_of_executed_units: {count}\n")
    return 0


def one_round(server: OpaServer, number: int) -> int:
    """Some rules, and requests to each; how many requests there were."""
    count = 0

    @seed(number)
    @settings(max_examples=_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(text=rule_files(), asked=st.lists(requests(), min_size=1, max_size=_REQUESTS))
    def attempt(text: str, asked: list[dict[str, Any]]) -> None:
        nonlocal count
        count += len(compare(server, text, asked))

    attempt()
    return count


if __name__ == "__main__":
    sys.exit(main())
