"""`keybroker webhooks`: notices that no receiver has taken. Works on the courier's host, as the courier's user; asks no broker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keybroker.cli import output
from keybroker.cli.connection import Json
from keybroker.cli.rooms import ConfigFile
from keybroker.errors import ConfigError

if TYPE_CHECKING:
    from keybroker.courier.outbox import Outbox

app = typer.Typer(no_args_is_help=True, help="Look after notices that no receiver has taken.")


@app.command("dead-letters")
def dead_letters(config: ConfigFile, as_json: Json = False) -> None:
    """List the notices that are tried no more.

    Examples:

        keybroker webhooks dead-letters --config /etc/keybroker/courier.yaml
    """
    outbox = _outbox(config)
    found = outbox.dead()
    outbox.close()
    if as_json:
        output.json_object([{"hook": each.hook, "record": each.record, "attempts": each.attempts, "why": each.why} for each in found])
        return
    output.table(("HOOK", "RECORD", "ATTEMPTS", "WHY"), [(each.hook, str(each.record), str(each.attempts), each.why) for each in found])


@app.command()
def resend(
    config: ConfigFile,
    hook: Annotated[str, typer.Option("--hook", metavar="NAME", help="Only to this hook.")] = "",
    record: Annotated[int, typer.Option("--record", metavar="INDEX", help="Only the notice of this record.")] = -1,
    as_json: Json = False,
) -> None:
    """Have dead notices tried again, all of them if nothing else is said. The courier begins within a second or two.

    Examples:

        keybroker webhooks resend --config /etc/keybroker/courier.yaml

        keybroker webhooks resend --config /etc/keybroker/courier.yaml --hook chat --record 812
    """
    outbox = _outbox(config)
    count = outbox.revive(hook, record)
    outbox.close()
    if as_json:
        output.json_object({"resent": count})
    else:
        output.say(f"{count} to be sent again")


def _outbox(path: Path) -> Outbox:
    from keybroker import config as configuration
    from keybroker.courier.outbox import Outbox

    config = configuration.load(path)
    if config.courier is None:
        raise ConfigError(f"{path}: the section `courier` is missing")
    return Outbox(config.courier.state)
