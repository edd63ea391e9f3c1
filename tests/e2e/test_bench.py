"""`scripts/bench --quick`, without its set-up: everything is measured, every row is there, and the sums are sums. No figure is asserted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.latency import Latencies, bucket_of
from bench.scenarios import ALONE, SCENARIOS
from tests.worlds import clean_environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What it printed, and what it wrote."""
    file = tmp_path_factory.mktemp("bench") / "figures.json"
    command = [sys.executable, "-m", "bench", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


def test_bench_compares_every_scenario_with_bare_pkcs11_and_the_frontend_alone(quick: tuple[str, dict[str, Any]]) -> None:
    _, figures = quick
    speeds = {(row["what"], row["scenario"]): row for row in figures["speeds"]}
    assert {name for what, name in speeds if what == "bare PKCS#11, one process"} == {"ES256", "PS256", "Ed25519"}
    assert {name for what, name in speeds if what == "frontend alone"} == {each.name for each in ALONE}
    for scenario in SCENARIOS:
        row = speeds["keybroker", scenario.name]
        assert row["signatures_per_s"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        bare = speeds["bare PKCS#11, one process", scenario.algorithm]["signatures_per_s"]
        assert row["of_bare"] == pytest.approx(row["signatures_per_s"] / bare)
        assert row["of_frontend_alone"] > 0
        assert row["per_core"] > 0


def test_bench_says_where_the_microseconds_of_one_signature_go(quick: tuple[str, dict[str, Any]]) -> None:
    _, figures = quick
    elapsed = {(row["room"], row["stage"].split(",")[0]): row["us"] for row in figures["elapsed"]}
    assert elapsed.keys() >= {
        ("frontend", "parse"),
        ("wire", "there and back"),
        ("authority", "identify"),
        ("authority", "decide"),
        ("authority", "record the intent"),
        ("hsm worker", "C_Sign"),
        ("authority", "check the signature"),
        ("authority", "record the outcome"),
    }
    for scenario in elapsed["all", "from request to answer"]:
        parts = sum(us[scenario] for (room, _), us in elapsed.items() if room != "all")
        assert parts == pytest.approx(elapsed["all", "from request to answer"][scenario])


def test_bench_says_what_each_room_costs_and_what_the_generator_does(quick: tuple[str, dict[str, Any]]) -> None:
    printed, figures = quick
    cpu = {(row["room"], row["stage"].split(":")[0].split(",")[0]): row["us"] for row in figures["cpu"]}
    rooms = {room for room, _ in cpu}
    assert rooms == {"frontend", "authority", "hsm worker", "hsm, supervisor", "all", "load generator"}
    for scenario in SCENARIOS:
        parts = sum(us[scenario.name] for (room, _), us in cpu.items() if room not in {"all", "load generator"})
        assert parts == pytest.approx(cpu["all", "keybroker"][scenario.name])
    assert all(room in printed for room in rooms)


def test_quantile_is_found_to_two_per_cent() -> None:
    latencies = Latencies({bucket_of(us): 1 for us in (100.0, 200.0, 300.0, 400.0)})
    assert latencies.quantile_us(0.5) == pytest.approx(200, rel=0.02)
    assert latencies.quantile_us(0.99) == pytest.approx(400, rel=0.02)
    assert math.isnan(Latencies({}).quantile_us(0.5))
