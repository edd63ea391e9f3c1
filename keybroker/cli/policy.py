"""`keybroker policy`: rules, before they are live. Needs no broker, and disturbs none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keybroker.cli import output, policy_bundle, policy_diff, policy_replay, policy_simulate
from keybroker.cli.arguments import UsageError
from keybroker.cli.candidates import ConfigFile, Grants, authority_of, loaded, trial
from keybroker.cli.connection import Json
from keybroker.cli.exits import ExitStatus
from keybroker.clock import SystemClock

if TYPE_CHECKING:
    from keybroker.authority.trial.findings import Finding

app = typer.Typer(no_args_is_help=True, help="Try rules before they are live.")
app.command()(policy_bundle.bundle)
app.command()(policy_simulate.simulate)
app.command()(policy_diff.diff)
app.command()(policy_replay.replay)
app.command()(policy_replay.shadow)


@app.command()
def check(
    directory: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="Grant files; those of --config if absent.")] = None,
    config: ConfigFile = None,
    is_strict: Annotated[bool, typer.Option("--strict", help="Exit status 1 on warnings, too.")] = False,
    as_json: Json = False,
) -> None:
    """Check rules: what cannot be used, what does nothing, what cannot be met. Exit status 1 on any error.

    Examples:

        keybroker policy check policies/examples

        keybroker policy check --config my-world/keybroker.yaml --strict
    """
    inventory = trial("candidate").Inventory
    authority = authority_of(config)
    grants = directory or (authority.grants if authority else None)
    if grants is None:
        raise UsageError("name a directory of grant files, or a configuration with --config")
    with output.busy("checking"):
        known = inventory.of(authority) if authority else inventory()
        found = trial("check").check(grants, authority.policy.module if authority else None, known, SystemClock().now_us())
    if as_json:
        output.json_object({"findings": [_as_json(each) for each in found]})
    else:
        _show(grants, found)
    is_bad = any(each.severity.value == "error" or (is_strict and each.severity.value == "warning") for each in found)
    if is_bad:
        raise typer.Exit(ExitStatus.FAILED)


@app.command("test")
def run_cases(
    directory: Grants,
    tests: Annotated[
        Path | None, typer.Option("--tests", metavar="PATH", help="A file or a directory of cases; DIR/tests if absent.")
    ] = None,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Ask the real engine every case that is written down, and compare. Exit status 1 if any answer is not as expected.

    Examples:

        keybroker policy test policies/examples

        keybroker policy test candidate --tests cases.yaml
    """
    cases = trial("cases")
    candidate = loaded(directory, config)
    results = cases.run(candidate, tests or directory / cases.DIRECTORY)
    failed = [each for each in results if each.faults]
    if as_json:
        rows = [{"case": each.case, "where": each.where, "passed": not each.faults, "faults": each.faults} for each in results]
        output.json_object({"passed": len(results) - len(failed), "failed": len(failed), "cases": rows})
    else:
        for each in failed:
            output.say(output.visible(f"failed: {each.where}: {each.case}"))
            for fault in each.faults:
                output.say(output.visible(f"  {fault}"))
        output.say(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    if failed:
        raise typer.Exit(ExitStatus.FAILED)


def _show(directory: Path, found: list[Finding]) -> None:
    for each in found:
        output.say(output.visible(f"{each.severity.value}: {each.where}: {each.text} [{each.code}]"))
        output.say(output.visible(f"  cure: {each.cure}"))
    counts = {name: sum(each.severity.value == name for each in found) for name in ("error", "warning", "note")}
    words = ", ".join(f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items() if count)
    output.say(f"{output.visible(str(directory))}: {words or 'nothing to say'}")


def _as_json(finding: Finding) -> dict[str, str]:
    return {
        "severity": finding.severity.value,
        "code": finding.code,
        "where": finding.where,
        "rule": finding.rule,
        "text": finding.text,
        "cure": finding.cure,
    }
