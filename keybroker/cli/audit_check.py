"""`keybroker audit check`: is the store on this host whole? Needs no broker, and disturbs none."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keybroker.cli import output
from keybroker.cli.exits import ExitStatus

if TYPE_CHECKING:
    from keybroker.authority.store.fsck import Report

_SHOWN = 20


def check(
    state: Annotated[Path, typer.Option("--state", metavar="DIR", help="The state directory: `authority.state` of the configuration.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check the whole record on this host: bytes, hashes, positions, times, trails, uses, and every table beside them.

    Reads only. It may run beside a broker; then SQLite's check of its own pages and indexes is left out. Names the first bad index;
    exit status 1 on any finding. That nothing is missing at the end of the log, only a checkpoint that left this host can tell.

    Examples:

        keybroker audit check --state /var/lib/keybroker/state

        keybroker audit check --state my-world/state --json
    """
    from keybroker.authority.store import fsck

    started = time.monotonic()
    with output.progress("checking") as progress:
        report = fsck.check(state, progress)
    seconds = time.monotonic() - started
    if as_json:
        output.json_object(_as_json(report, seconds))
    else:
        _show(report, seconds)
    if report.found:
        raise typer.Exit(ExitStatus.FAILED)


def _show(report: Report, seconds: float) -> None:
    output.facts(
        [
            ("records", str(report.records)),
            ("workloads", str(report.trails)),
            ("open uses", ", ".join(f"{use} (intent {index})" for use, index in report.open_uses.items()) or "none"),
            ("database", report.structure),
            ("findings", str(report.found) if report.found else "none"),
            ("seconds", f"{seconds:.1f}"),
        ]
    )
    for finding in report.findings[:_SHOWN]:
        place = f"record {finding.index}" if finding.index >= 0 else "database"
        output.note(output.visible(f"{place}: {finding.rule} {finding.detail}".rstrip()))
    if report.found > _SHOWN:
        output.note(f"and {report.found - _SHOWN} more; --json shows the first {len(report.findings)}")
    if report.first_bad is not None:
        output.note(f"the first bad index is {report.first_bad}")


def _as_json(report: Report, seconds: float) -> dict[str, Any]:
    return {
        "records": report.records,
        "workloads": report.trails,
        "open_uses": [{"use": use, "intent": index} for use, index in report.open_uses.items()],
        "database": report.structure,
        "found": report.found,
        "findings": [{"index": each.index, "rule": each.rule, "detail": each.detail} for each in report.findings],
        "first_bad": report.first_bad,
        "seconds": round(seconds, 3),
    }
