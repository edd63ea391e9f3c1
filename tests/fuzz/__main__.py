"""Fuzzes parsers, guided by coverage (atheris, libFuzzer): `python -m tests.fuzz [TARGET ...] [--seconds N] [--jobs N]`.

What was found interesting is kept in .cache/fuzz/TARGET and built upon the next time. An input that breaks a target is written there
too, and named; `python -m tests.fuzz TARGET --input FILE` runs it again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

KEPT = Path(__file__).parents[2] / ".cache" / "fuzz"
_GRACE_SECONDS = 60
_ONE_INPUT_SECONDS = 20
_PROGRAMS = {"engines": "tests.fuzz.engines"}  # what is no parser, and generates its own inputs


def main() -> int:
    """The command line; the exit status is 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description="Fuzz keybroker's parsers.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all of them if none is named; --list shows them")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    parser.add_argument("--jobs", type=int, default=2, help="targets at the same time (default: 2)")
    parser.add_argument("--list", action="store_true", help="show the targets")
    parser.add_argument("--input", type=Path, metavar="FILE", help="run one input again, for one target")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.one or words.input:
        return run_one(words.targets[0], words.seconds, words.input)
    from tests.fuzz.targets import TARGETS

    if words.list:
        sys.stdout.write("".join(f"{name}\n" for name in (*TARGETS, *_PROGRAMS)))
        return 0
    unknown = set(words.targets) - TARGETS.keys() - _PROGRAMS.keys()
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join((*TARGETS, *_PROGRAMS))}")
    return run_all(words.targets or [*TARGETS, *_PROGRAMS], words.seconds, words.jobs)


def run_all(names: list[str], seconds: int, jobs: int) -> int:
    """Each target in a process of its own; 1 if one has found anything."""
    waiting, broken = list(names), list[str]()
    running: dict[str, tuple[subprocess.Popen[str], float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            program = ["-m", _PROGRAMS[name]] if name in _PROGRAMS else ["-m", "tests.fuzz", name, "--one"]
            command = [sys.executable, *program, "--seconds", str(seconds)]
            running[name] = (subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), time.monotonic())
        for name, (process, started) in list(running.items()):
            try:
                output, _ = process.communicate(timeout=0.5)
            except subprocess.TimeoutExpired:
                if time.monotonic() - started > seconds + _GRACE_SECONDS:
                    process.kill()
                continue
            del running[name]
            tries = [line for line in output.splitlines() if line.startswith("stat::number_of_executed_units:")]
            count, how = tries[0].split()[-1] if tries else "?", "ok" if process.returncode == 0 else "BROKEN"
            sys.stdout.write(f"{name:12} {count:>9} inputs  {how}\n")
            if process.returncode != 0:
                broken.append(name)
                sys.stdout.write(output[-4000:])
    return 1 if broken else 0


def run_one(name: str, seconds: int, given: Path | None) -> int:
    """One target, in this process, until the time is up or something is found. Does not return from atheris."""
    import atheris

    with atheris.instrument_imports(include=["keybroker"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    attempt = target.make()
    if given is not None:
        attempt(given.read_bytes())
        return 0
    corpus = KEPT / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [f"-max_total_time={seconds}", f"-timeout={_ONE_INPUT_SECONDS}", "-print_final_stats=1", f"-artifact_prefix={corpus}/broken-"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], attempt)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
