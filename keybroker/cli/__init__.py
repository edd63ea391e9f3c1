"""The program `keybroker`: one file per noun. Starts fast: a command imports what it needs when it runs."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Annotated

import typer

import keybroker
from keybroker.cli import (
    audit,
    break_glass,
    clock,
    dev,
    freezes,
    keys,
    operations,
    output,
    policy,
    policy_changes,
    redeeming,
    rooms,
    webhooks,
)
from keybroker.cli.sign import sign
from keybroker.cli.verify import verify
from keybroker.cli.whoami import whoami
from keybroker.cli.witness import witness
from keybroker.errors import KeyBrokerError

_ASK, _RUN = "Ask a broker", "Run a broker"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Decides and records every use of a key that lives in an HSM.",
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage, 3 denied, 4 approval pending, 5 unavailable.",
)
app.command(rich_help_panel=_ASK)(sign)
app.command(rich_help_panel=_ASK)(verify)
app.command(rich_help_panel=_ASK)(whoami)
for _freeze_command in (freezes.freeze, freezes.unfreeze, freezes.freezes):
    app.command(rich_help_panel=_ASK)(_freeze_command)
app.add_typer(break_glass.app, name="break-glass", rich_help_panel=_ASK)
app.add_typer(keys.app, name="keys", rich_help_panel=_ASK)
operations.app.command()(redeeming.redeem)
app.add_typer(operations.app, name="operations", rich_help_panel=_ASK)
app.add_typer(audit.app, name="audit", rich_help_panel=_ASK)
for _policy_command in (policy_changes.live, policy_changes.propose):
    policy.app.command()(_policy_command)
app.add_typer(policy.app, name="policy", rich_help_panel=_RUN)
for _room_command in (rooms.serve, rooms.check, rooms.frontend, rooms.authority, rooms.hsm, rooms.courier):
    app.command(rich_help_panel=_RUN)(_room_command)
app.command(rich_help_panel=_RUN)(witness)
app.add_typer(clock.app, name="clock", rich_help_panel=_RUN)
app.add_typer(webhooks.app, name="webhooks", rich_help_panel=_RUN)
app.add_typer(dev.app, name="dev", rich_help_panel=_RUN)


def main() -> int:
    """Run the program; the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever the terminal's encoding cannot show
    try:
        app(prog_name="keybroker")
    except KeyBrokerError as err:
        from keybroker.cli import exits

        output.error(err)
        return exits.status_of(err)
    except OSError as err:
        output.note(f"error: {output.visible(str(err.filename or 'the system'))}: {err.strerror or type(err).__name__}")
        _drop_unwritten()
        return 1
    return 0


def _drop_unwritten() -> None:
    """What could not be written is not tried again when Python ends, which would change the exit status."""
    with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123  /dev/null
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _show_version(is_asked: bool) -> None:
    if is_asked:
        output.say(f"keybroker {keybroker.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Decides and records every use of a key that lives in an HSM."""
