"""`keybroker policy`: rules, before they are live. Needs no broker, and disturbs none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keybroker.cli import output
from keybroker.cli.arguments import UsageError
from keybroker.cli.connection import Json
from keybroker.cli.exits import ExitStatus
from keybroker.cli.rooms import load_part
from keybroker.clock import SystemClock

if TYPE_CHECKING:
    from keybroker.authority.trial.findings import Finding
    from keybroker.config import AuthorityConfig

app = typer.Typer(no_args_is_help=True, help="Try rules before they are live.")

_TRIAL = "keybroker.authority.trial"


@app.command()
def check(
    directory: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="Grant files; those of --config if absent.")] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="A broker's configuration: its keys, and its grants without DIR."),
    ] = None,
    is_strict: Annotated[bool, typer.Option("--strict", help="Exit status 1 on warnings, too.")] = False,
    as_json: Json = False,
) -> None:
    """Check rules: what cannot be used, what does nothing, what cannot be met. Exit status 1 on any error.

    Examples:

        keybroker policy check policies/examples

        keybroker policy check --config my-world/keybroker.yaml --strict
    """
    rules = load_part("authority", f"{_TRIAL}.check")
    inventory = load_part("authority", f"{_TRIAL}.candidate").Inventory
    authority = _authority(config) if config else None
    grants = directory or (authority.grants if authority else None)
    if grants is None:
        raise UsageError("name a directory of grant files, or a configuration with --config")
    with output.busy("checking"):
        known = inventory.of(authority) if authority else inventory()
        found = rules.check(grants, authority.policy if authority else None, known, SystemClock().now_us())
    if as_json:
        output.json_object({"findings": [_as_json(each) for each in found]})
    else:
        _show(grants, found)
    is_bad = any(each.severity.value == "error" or (is_strict and each.severity.value == "warning") for each in found)
    if is_bad:
        raise typer.Exit(ExitStatus.FAILED)


def _authority(path: Path) -> AuthorityConfig:
    from keybroker import config as configuration

    config = configuration.load(path)
    if config.authority is None:
        raise UsageError(f"{path}: the section `authority` is missing; name the configuration of the authority")
    return config.authority


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
