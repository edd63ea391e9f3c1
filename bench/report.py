"""Medians over the rounds, as tables: how fast, compared to what, and where the microseconds go."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from bench.measure import Round, Sample
from bench.scenarios import ALONE, MANY, ONE, SCENARIOS, Scenario

_Figure = Callable[[Round, Scenario], float]

_STAGES = ("decide", "record", "hsm", "check", "release")
_PER_SIGNATURE = (ONE, MANY)


class Speed(msgspec.Struct, frozen=True):
    """One row of the first table. Latencies are milliseconds of one request; the ratios are times as fast.

    `per_core` is what one core is good for, load generator included: what CPU time allows, whatever else the host had to do.
    """

    what: str
    scenario: str
    signatures_per_s: float
    p50_ms: float
    p99_ms: float
    per_core: float | None = None
    of_bare: float | None = None
    of_frontend_alone: float | None = None


class Row(msgspec.Struct, frozen=True):
    """Microseconds of one signature in one room and stage, by scenario."""

    room: str
    stage: str
    us: dict[str, float]


class Report(msgspec.Struct, frozen=True):
    """Everything that is printed.

    Attributes:
        host: facts about this host.
        rounds: what the medians are of.
        speeds: the first table.
        elapsed: the second: where one signature spends its time.
        cpu: the third: the CPU time that one signature costs.
    """

    host: dict[str, str]
    rounds: tuple[Round, ...]
    speeds: tuple[Speed, ...]
    elapsed: tuple[Row, ...]
    cpu: tuple[Row, ...]


def report(host: dict[str, str], rounds: Sequence[Round]) -> Report:
    """Sum up."""
    return Report(host, tuple(rounds), _speeds(rounds), _elapsed(rounds), _cpu(rounds))


def _speeds(rounds: Sequence[Round]) -> tuple[Speed, ...]:
    rows = [_speed("bare PKCS#11, one process", algorithm, [each.bare[algorithm] for each in rounds]) for algorithm in rounds[0].bare]
    rows += [_speed("load generator alone", name, [each.trivial[name] for each in rounds]) for name in rounds[0].trivial]
    rows += [_speed("frontend alone", each.name, [one.alone[each.name] for one in rounds]) for each in ALONE]
    for scenario in SCENARIOS:
        rows.append(
            _speed(
                "keybroker",
                scenario.name,
                [each.broker[scenario.name] for each in rounds],
                of_bare=_median(rounds, scenario, lambda one, s: one.broker[s.name].rate / one.bare[s.algorithm].rate),
                of_alone=_median(rounds, scenario, lambda one, s: one.broker[s.name].rate / one.alone[_alike(s).name].rate),
            )
        )
    return tuple(rows)


def _speed(what: str, scenario: str, samples: list[Sample], of_bare: float | None = None, of_alone: float | None = None) -> Speed:
    rate = statistics.median(each.rate for each in samples)
    p50, p99 = (statistics.median(getattr(each, name) for each in samples) / 1e3 for name in ("p50", "p99"))
    costs = [sum(each.cpu.values()) + each.generator for each in samples if each.cpu]
    per_core = 1e6 / statistics.median(costs) if costs else None
    return Speed(what, scenario, rate, p50, p99, per_core, of_bare, of_alone)


def _elapsed(rounds: Sequence[Round]) -> tuple[Row, ...]:
    """Where one request spends its time: what the rooms measured, and what lies between."""

    def inside(one: Round, scenario: Scenario) -> float:
        stages = one.broker[scenario.name].stages
        return stages["request"] - stages["parse"] - sum(stages[name] for name in _STAGES)

    def wire(one: Round, scenario: Scenario) -> float:
        """Measured where nothing waits: at one connection, without an authority that does anything."""
        stages = one.alone[ONE.name].stages
        return min(stages["request"] - stages["parse"], inside(one, scenario))

    def token(one: Round, scenario: Scenario) -> float:
        """As the workers say; bare, if they do not."""
        return one.broker[scenario.name].stages.get("token", one.bare[scenario.algorithm].mean)

    def stage(name: str) -> _Figure:
        return lambda one, scenario: one.broker[scenario.name].stages[name]

    rows: tuple[tuple[str, str, _Figure], ...] = (
        ("frontend", "TLS, HTTP, route, and the client's own time", lambda one, s: one.broker[s.name].mean - stage("request")(one, s)),
        ("frontend", "parse", stage("parse")),
        ("wire", "there and back, encode the answer", wire),
        ("authority", "identify, and wait for a turn", lambda one, s: inside(one, s) - wire(one, s)),
        ("authority", "decide", stage("decide")),
        ("authority", "record the intent, durably", stage("record")),
        ("authority", "send to a worker and wait for it", lambda one, s: stage("hsm")(one, s) - token(one, s)),
        ("hsm worker", "C_Sign", token),
        ("authority", "check the signature", stage("check")),
        ("authority", "record the outcome, durably; release", stage("release")),
        ("all", "from request to answer, mean", lambda one, s: one.broker[s.name].mean),
    )
    return tuple(Row(room, what, {each.name: _median(rounds, each, of) for each in _PER_SIGNATURE}) for room, what, of in rows)


def _cpu(rounds: Sequence[Round]) -> tuple[Row, ...]:
    """The CPU time that one signature costs. What C_Sign takes is measured bare, in the same round."""

    def used(room: str) -> _Figure:
        return lambda one, scenario: one.broker[scenario.name].cpu[room]

    def token(one: Round, scenario: Scenario) -> float:
        return one.bare[scenario.algorithm].cpu["bare"]

    rows: tuple[tuple[str, str, _Figure], ...] = (
        ("frontend", "TLS, HTTP, parse, frames, encode", used("frontend")),
        ("authority", "event loop: identify, decide, frames", used("event loop")),
        ("authority", "threads: commit, check", used("threads")),
        ("hsm worker", "C_Sign", token),
        ("hsm worker", "frames", lambda one, s: used("workers")(one, s) - token(one, s)),
        ("hsm, supervisor", "watch", lambda one, s: used("hsm")(one, s) + used("supervisor")(one, s)),
        ("all", "keybroker", lambda one, s: sum(one.broker[s.name].cpu.values())),
        ("load generator", "", lambda one, s: one.broker[s.name].generator),
    )
    return tuple(Row(room, what, {each.name: _median(rounds, each, of) for each in SCENARIOS}) for room, what, of in rows)


def _median(rounds: Sequence[Round], scenario: Scenario, of: _Figure) -> float:
    return statistics.median(of(each, scenario) for each in rounds)


def _alike(scenario: Scenario) -> Scenario:
    """What the frontend alone was asked in the same way."""
    return next(each for each in ALONE if (each.connections, each.batch) == (scenario.connections, scenario.batch))


def show(made: Report, console: Console) -> None:
    """Print it."""
    for name, value in made.host.items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
    console.print()
    console.print(_speed_table(made.speeds))
    console.print(_row_table("Elapsed: where one ES256 signature spends its time, microseconds", made.elapsed, _PER_SIGNATURE))
    console.print(_row_table("CPU: what one signature costs, microseconds of one core", made.cpu, SCENARIOS))


def _speed_table(speeds: Sequence[Speed]) -> Table:
    table = Table(title="Signatures per second, and the latency of one request; x is times as fast as", title_justify="left")
    table.add_column("")
    table.add_column("")
    for name in ("signatures/s", "p50 ms", "p99 ms", "a core's worth/s", "x bare", "x frontend alone"):
        table.add_column(name, justify="right")
    before = ""
    for each in speeds:
        if before not in {"", each.what}:
            table.add_section()
        what = each.what if each.what != before else ""
        core = "" if each.per_core is None else f"{each.per_core:,.0f}"
        ratios = ("" if ratio is None else f"{ratio:.2f}" for ratio in (each.of_bare, each.of_frontend_alone))
        table.add_row(what, each.scenario, f"{each.signatures_per_s:,.0f}", f"{each.p50_ms:.2f}", f"{each.p99_ms:.2f}", core, *ratios)
        before = each.what
    return table


def _row_table(title: str, rows: Sequence[Row], scenarios: Sequence[Scenario]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("room")
    table.add_column("stage")
    for each in scenarios:
        table.add_column(each.short, justify="right")
    for row in rows:
        if row.room == "all":
            table.add_section()
        table.add_row(row.room, row.stage, *(f"{row.us[each.name]:,.0f}" for each in scenarios))
    return table
