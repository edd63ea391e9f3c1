"""What limits and hours cost: `python -m bench.limits`. The same load on two keys, in turn: one whose grant demands nothing, one with both.

Prints CPU time of one signature, all rooms together, which other work on the host changes least, and signatures a second.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import generator, served
from bench.generator import GeneratorError, Order
from bench.scenarios import MANY, Scenario
from bench.served import Served

FREE, BOUND = "orders", "guarded"
# Every window is open and no limit is reached, so that each use looks at all of them and takes its units.
_GRANT = """\
grants:
  - id: guarded
    workloads: ["spiffe://example.org/payments/api"]
    keys: [guarded]
    operations: [sign]
    algorithms: [ES256]
    hours: [{days: mon-sun, from: "00:00", to: "24:00", zone: Europe/Berlin}]
    limits: [{max: 100000000, window: 1m, per: workload}, {max: 100000000, window: 24h, per: key}]
"""


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.limits", description="What limits and hours cost a signature.")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how many rounds (5)")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of each (3)")
    arguments = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="keybroker-bench."))
    found: dict[str, list[tuple[float, float]]] = {FREE: [], BOUND: []}
    try:
        generator.build()
        config = _make_world(home / "world")
        with served.broker(config) as broker:
            for _ in range(arguments.rounds):
                for key, results in found.items():
                    results.append(_measure(config.parent, broker, key, arguments.seconds))
    except GeneratorError as err:
        sys.stderr.write(f"bench.limits: {err}\n")
        return 1
    finally:
        shutil.rmtree(home, ignore_errors=True)
    _show(found)
    return 0


def _make_world(directory: Path) -> Path:
    program = Path(sys.executable).with_name("keybroker")
    subprocess.run(  # noqa: S603  ours
        [program, "dev", "init", str(directory), "--key", f"{BOUND}:ES256"], check=True, stdout=subprocess.DEVNULL
    )
    (directory / "grants" / "guarded.yaml").write_text(_GRANT)
    return directory / "keybroker.yaml"


def _measure(world: Path, broker: Served, key: str, seconds: float) -> tuple[float, float]:
    """Microseconds of CPU for one signature, and signatures a second."""
    used: list[float] = []

    def look() -> None:
        used.append(sum(broker.cpu().values()))

    load = generator.run(
        Order(
            address=broker.address,
            svid=world / "svids" / "payments-api.pem",
            bundle=world / "bundle.pem",
            requests=Scenario(MANY.name, MANY.short, key=key, connections=MANY.connections).requests(1),
            connections=MANY.connections,
            signatures=1,
            warm_up=0.5,
            seconds=seconds,
        ),
        look,
        look,
    )
    return (used[1] - used[0]) / load.answers * 1e6, load.answers / load.seconds


def _show(found: dict[str, list[tuple[float, float]]]) -> None:
    table = Table("ES256, 64 connections", "CPU us a signature", "signatures/s")
    for name, key in (("demands nothing", FREE), ("two limits and hours", BOUND)):
        table.add_row(name, *(f"{statistics.median(each):,.0f}" for each in zip(*found[key], strict=True)))
    ratios = [bound[0] / free[0] for free, bound in zip(found[FREE], found[BOUND], strict=True)]
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    console.print(f"limits and hours cost {(statistics.median(ratios) - 1) * 100:.1f} % (median of {len(ratios)} rounds)")


if __name__ == "__main__":
    sys.exit(main())
