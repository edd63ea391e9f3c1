"""What the commands of `keybroker policy` share: the candidate that they try."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keybroker.cli import output
from keybroker.cli.arguments import UsageError
from keybroker.cli.rooms import load_part

if TYPE_CHECKING:
    from keybroker.authority.trial.candidate import Candidate
    from keybroker.config import AuthorityConfig

Grants = Annotated[Path, typer.Argument(metavar="DIR", help="The candidate: a directory of grant files.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="A broker's configuration: for its keys, its compiled policy and its state."),
]


def trial(module: str) -> Any:
    """A module of the trial package. Its dependencies come with the authority's extra."""
    from keybroker.telemetry import quiet

    quiet()
    return load_part("authority", f"keybroker.authority.trial.{module}")


def authority_of(config: Path | None) -> AuthorityConfig | None:
    """The section `authority` of a configuration, if one is given.

    Raises:
        ConfigError, UsageError: it cannot be used, or has no such section.
    """
    if config is None:
        return None
    from keybroker import config as configuration

    loaded_config = configuration.load(config)
    if loaded_config.authority is None:
        raise UsageError(f"{config}: the section `authority` is missing; name the configuration of the authority")
    return loaded_config.authority


def loaded(directory: Path, config: Path | None = None) -> Candidate:
    """A candidate, with the compiled policy of a configuration or the one that is built in.

    Raises:
        ConfigError: it cannot be used.
    """
    authority = authority_of(config)
    with output.busy("loading the rules"):
        candidate: Candidate = trial("candidate").load(directory, authority.policy.module if authority else None)
    return candidate
