"""`scripts/bench`: measure, print, and keep the figures."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import msgspec
from rich.console import Console

from bench.generator import GeneratorError
from bench.measure import QUICK, Bench, Pace
from bench.report import report, show

_SYNCS = 200


def main() -> int:
    """Measure everything and print it; the exit status."""
    arguments = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    progress = Console(stderr=True, quiet=not sys.stderr.isatty())
    home = Path(tempfile.mkdtemp(prefix="keybroker-bench."))
    try:
        host = _host(home)
        with progress.status("starting") as status, Bench.running(home / "world", arguments.pace, status.update) as bench:
            made = report(host, list(bench.rounds()))
    except GeneratorError as err:
        sys.stderr.write(f"scripts/bench: {err}\n")
        return 1
    finally:
        shutil.rmtree(home, ignore_errors=True)
    show(made, console)
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(made)) + b"\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measures keybroker and what it is compared to, in one run.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to FILE")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument(
        "--quick", dest="pace", action="store_const", const=QUICK, default=Pace(), help="one short round, to see that it works"
    )
    pace.add_argument(
        "--rounds", dest="pace", type=lambda text: Pace(rounds=int(text)), metavar="N", help="how many rounds of 3 s each (3)"
    )
    return parser.parse_args()


def _host(directory: Path) -> dict[str, str]:
    """What the figures depend on."""
    return {
        "host": f"{len(os.sched_getaffinity(0))} cores, {_processor()}, Linux {platform.release()}, Python {platform.python_version()}",
        "busy before": f"load average {os.getloadavg()[0]:.1f}; other work on this host lowers every figure",
        "disk": f"4 KiB are durable in {_sync_us(directory):.0f} microseconds ({directory.parent})",
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _sync_us(directory: Path) -> float:
    """The median time of a write that waits for the disk, microseconds."""
    took: list[float] = []
    with (directory / "sync").open("wb", buffering=0) as file:
        for _ in range(_SYNCS):
            started = time.perf_counter()
            file.write(bytes(4_096))
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - started)
    return statistics.median(took) * 1e6


if __name__ == "__main__":
    sys.exit(main())
