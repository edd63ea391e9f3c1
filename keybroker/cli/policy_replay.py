"""`keybroker policy replay` and `shadow`: a candidate against the decisions that are on record, or that were made beside it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keybroker.cli import output
from keybroker.cli.arguments import UsageError
from keybroker.cli.candidates import ConfigFile, Grants, authority_of, loaded, trial
from keybroker.cli.connection import Json
from keybroker.cli.exits import ExitStatus
from keybroker.cli.moments import moment
from keybroker.clock import SystemClock, from_rfc3339

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from keybroker.authority.trial.recorded import Recorded
    from keybroker.authority.trial.replay import Place, Replay, Tally

State = Annotated[Path | None, typer.Option("--state", metavar="DIR", help="The state directory with the record; a broker may run on it.")]
Export = Annotated[
    Path | None, typer.Option("--export", metavar="FILE", help="Or a file with a record on each line (`audit query --json`).")
]
Since = Annotated[str, typer.Option("--since", metavar="TIME", help="Not before: 30d (ago), or 2026-11-24T08:00:00Z.")]


def replay(
    directory: Grants,
    state: State = None,
    export: Export = None,
    since: Since = "",
    fails_on_change: Annotated[bool, typer.Option("--fail-on-change", help="Exit status 1 if anything would change.")] = False,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Decide again, with a candidate, what is on record, and say what would change: for whom, on which key, how often.

    Examples:

        keybroker policy replay candidate --config my-world/keybroker.yaml --since 30d

        keybroker policy replay candidate --state /var/lib/keybroker/state --fail-on-change

        keybroker policy replay candidate --export log.ndjson --json
    """
    candidate = loaded(directory, config)
    replayer = trial("replay").Replayer(candidate)
    started = time.monotonic()
    with output.progress("replaying") as progress:
        done: Replay = replayer.take_all(records(state, export, since, config, progress))
    seconds = time.monotonic() - started
    if as_json:
        output.json_object(_as_json(done, candidate.engine.digest, seconds))
    else:
        _show(done, seconds)
    if fails_on_change and done.changes:
        raise typer.Exit(ExitStatus.FAILED)


def shadow(state: State = None, export: Export = None, since: Since = "", config: ConfigFile = None, as_json: Json = False) -> None:
    """List what the shadow policy would have changed, as the broker has put it on record.

    Examples:

        keybroker policy shadow --config my-world/keybroker.yaml --since 7d

        keybroker policy shadow --export log.ndjson --json
    """
    with output.progress("reading") as progress:
        found = trial("shadowed").seen(records(state, export, since, config, progress, kind="security"))
    if as_json:
        output.json_object(
            [
                {
                    "policy": each.policy,
                    "detail": each.detail,
                    "decisions": each.decisions,
                    "first": each.first_time,
                    "last": each.last_time,
                    "example": each.example,
                }
                for each in found
            ]
        )
        return
    headers = ("POLICY", "DECISIONS", "WHAT", "LAST", "RECORD")
    output.table(headers, ((each.policy[:12], str(each.decisions), each.detail, each.last_time, str(each.example)) for each in found))
    if not found:
        output.note("no differences on record")


def records(
    state: Path | None, export: Path | None, since: str, config: Path | None, progress: Callable[[int, int], None], kind: str = ""
) -> Iterator[Recorded | None]:
    """The records that are named by the options of these commands; of a state directory only those of a kind, if one is named."""
    since_us = from_rfc3339(moment(since, SystemClock().now_us())) if since else None
    recorded = trial("recorded")
    found: Iterator[Recorded | None]
    if export is not None and state is not None:
        raise UsageError("read the record from one place: --state or --export")
    if export is not None:
        found = recorded.from_export(export, since_us, progress)
        return found
    authority = authority_of(config)
    directory = state or (authority.state if authority else None)
    if directory is None:
        raise UsageError("say where the record is, with --state, --export or --config")
    found = recorded.from_state(directory, since_us, progress, kind)
    return found


def _show(done: Replay, seconds: float) -> None:
    rate = done.decisions / seconds if seconds else 0
    output.facts(
        [
            ("records", str(done.records)),
            ("decisions", f"{done.decisions}, of {len(done.policies)} {'policy' if len(done.policies) == 1 else 'policies'}"),
            ("different requests", str(done.distinct)),
            ("changes", str(sum(each.decisions for each in done.changes.values())) if done.changes else "none"),
            ("seconds", f"{seconds:.1f} ({rate:,.0f} decisions a second)"),
        ]
    )
    if done.changes:
        output.say()
        headers = ("CHANGE", "DECISIONS", "WORKLOAD", "WHAT", "WAS", "WOULD BE", "RECORDS")
        output.table(headers, (_row(place, tally) for place, tally in _sorted(done)))
    for note in done.notes():
        output.note(f"note: {note}")


def _row(place: Place, tally: Tally) -> tuple[str, ...]:
    examples = ", ".join(map(str, tally.examples)) + (", ..." if tally.records > len(tally.examples) else "")
    now = place.demand or ", ".join(tally.now)
    return (
        place.change,
        str(tally.decisions),
        place.workload,
        f"{place.operation} {place.target}".strip(),
        ", ".join(tally.was),
        now,
        examples,
    )


def _sorted(done: Replay) -> list[tuple[Place, Tally]]:
    """By kind, the most frequent first."""
    return sorted(done.changes.items(), key=lambda each: (each[0].change, -each[1].decisions, each[0].workload, each[0].target))


def _as_json(done: Replay, policy: str, seconds: float) -> dict[str, Any]:
    return {
        "policy": policy,
        "records": done.records,
        "decisions": done.decisions,
        "distinct": done.distinct,
        "policies": sorted(done.policies),
        "undecided": done.undecided,
        "seconds": round(seconds, 3),
        "notes": done.notes(),
        "changes": [
            {
                "change": place.change,
                "workload": place.workload,
                "operation": place.operation,
                "target": place.target,
                "demand": place.demand,
                "decisions": tally.decisions,
                "records": tally.records,
                "was": tally.was,
                "would_be": tally.now,
                "first": {"index": tally.first, "time": tally.first_time},
                "last": {"index": tally.last, "time": tally.last_time},
                "examples": tally.examples,
            }
            for place, tally in _sorted(done)
        ],
    }
