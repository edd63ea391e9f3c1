"""`keybroker serve`, one command for each room, and `keybroker check`. What a room needs is imported only when it is started."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from keybroker.cli import output
from keybroker.cli.connection import Json
from keybroker.cli.exits import ExitStatus
from keybroker.errors import ConfigError, KeyBrokerError
from keybroker.process import EXIT_CONFIG

ConfigFile = Annotated[Path, typer.Option("--config", metavar="FILE", help="The configuration, one YAML file.")]


class MissingExtraError(KeyBrokerError):
    """A room's own dependencies are not installed. The text says how to install them."""


def serve(config: ConfigFile) -> None:
    """Run all rooms on this host under one supervisor.

    Prints one line, `ready https://ADDRESS:PORT`, when it can sign. SIGTERM finishes what is under way and stops.

    Examples:

        keybroker serve --config my-world/keybroker.yaml
    """
    from keybroker import config as configuration
    from keybroker import supervisor

    raise typer.Exit(supervisor.run(config, configuration.load(config)))


def frontend(config: ConfigFile) -> None:
    """Run the room that faces the network.

    Examples:

        keybroker frontend --config /etc/keybroker/frontend.yaml
    """
    _run("frontend", config)


def authority(config: ConfigFile) -> None:
    """Run the room that decides and records.

    Examples:

        keybroker authority --config /etc/keybroker/authority.yaml
    """
    _run("authority", config)


def hsm(config: ConfigFile) -> None:
    """Run the room that uses the tokens.

    Examples:

        keybroker hsm --config /etc/keybroker/hsm.yaml
    """
    _run("hsm", config)


def courier(config: ConfigFile) -> None:
    """Run the room that tells approvers.

    Examples:

        keybroker courier --config /etc/keybroker/courier.yaml
    """
    _run("courier", config)


def check(config: ConfigFile, as_json: Json = False) -> None:
    """Check configuration, grants, store, tokens and keys without serving. Exit status 1 on any problem.

    Examples:

        keybroker check --config my-world/keybroker.yaml
    """
    with output.busy("checking"):
        problems = _problems(config)
    if as_json:
        output.json_object({"problems": problems})
    for problem in () if as_json else problems:
        output.note(f"problem: {output.visible(problem)}")
    if problems:
        raise typer.Exit(ExitStatus.FAILED)
    if not as_json:
        output.say(f"{output.visible(str(config))}: no problems")


def _problems(path: Path) -> list[str]:
    """What every room would find wrong; what is wrong with the file itself is found first, and alone."""
    from keybroker import config as configuration

    try:
        config = configuration.load(path)
    except ConfigError as err:
        return [str(err)]
    found: list[str] = []
    if config.frontend:
        found += load_part("frontend", "keybroker.frontend.check").problems(config.frontend)
    if config.authority:
        found += load_part("authority", "keybroker.authority.check").problems(config.authority)
    if config.hsm:
        found += load_part("hsm", "keybroker.hsm.inspect").problems(path, config)
    if config.courier:
        found += load_part("courier", "keybroker.courier.check").problems(config.courier)
    return found


def load_part(extra: str, module: str) -> Any:
    """A module whose dependencies come with an extra.

    Raises:
        MissingExtraError: they are not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        if err.name is None or err.name.partition(".")[0] == "keybroker":
            raise
        raise MissingExtraError(f"{err.name} is not installed: pip install 'keybroker[{extra}]'") from err


def _run(room: str, path: Path) -> None:
    """Serve one room. A configuration that cannot work ends with a status that tells a service manager not to try again."""
    from keybroker import config as configuration
    from keybroker import supervisor

    supervisor.join_supervisor()
    try:
        config = configuration.load(path)
    except ConfigError as err:
        output.error(err)
        raise typer.Exit(EXIT_CONFIG) from err
    raise typer.Exit(load_part(room, f"keybroker.{room}.room").run(config))
