"""`keybroker clock`: does the broker on this host trust its clock, and an operator's word that it may."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from keybroker.cli import output
from keybroker.cli.connection import Json
from keybroker.cli.exits import ExitStatus
from keybroker.clock import SystemClock, to_rfc3339

app = typer.Typer(no_args_is_help=True, help="Whether the broker on this host trusts its clock.")

State = Annotated[Path, typer.Option("--state", metavar="DIR", help="The state directory: `authority.state` of the configuration.")]
_TAKEN_SECONDS = 10.0


@app.command()
def show(state: State, as_json: Json = False) -> None:
    """Show whether the broker trusts the clock of this host, and what it has seen if not. Reads only.

    Examples:

        keybroker clock show --state /var/lib/keybroker/state
    """
    from keybroker.authority.store.acknowledgement import distrusted

    event, _, saw = distrusted(state).partition(" ")
    _print(event, saw, as_json=as_json)


@app.command()
def acknowledge(
    state: State,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; the clock of this host is right.")] = False,
    as_json: Json = False,
) -> None:
    """Say that the clock of this host is right now, so that limits and hours are judged again. It is on record, with your user id.

    Set the clock first. What was seen is shown, with the time of this host, and then you are asked.

    Examples:

        keybroker clock acknowledge --state /var/lib/keybroker/state
    """
    from keybroker.authority.store import acknowledgement
    from keybroker.authority.store.opening import is_locked

    event, _, saw = acknowledgement.distrusted(state).partition(" ")
    _print(event, saw, as_json=as_json)
    if not event:
        return
    if not yes and not typer.confirm("Is this the right time?", err=True):
        raise typer.Exit(ExitStatus.FAILED)
    acknowledgement.acknowledge(state, event)
    if not is_locked(state):
        output.note("no broker runs on this state; the one that starts next will take it")
        return
    deadline = time.monotonic() + _TAKEN_SECONDS
    while acknowledgement.is_waiting(state):
        if time.monotonic() > deadline:
            output.note("the broker has not taken it yet; its log says why")
            raise typer.Exit(ExitStatus.FAILED)
        time.sleep(0.05)
    output.note("the broker trusts the clock again")


def _print(event: str, saw: str, *, as_json: bool) -> None:
    now = to_rfc3339(SystemClock().now_us())
    if as_json:
        output.json_object({"trusted": not event, "event": event, "saw": saw, "now": now})
    else:
        output.facts([("trusted", "no" if event else "yes"), *([("event", event), ("saw", saw)] if event else []), ("now", now)])
