"""`keybroker policy live`, `keybroker policy propose`: the rules of a broker that takes changes of them as proposals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keybroker.cli import output
from keybroker.cli.arguments import UsageError
from keybroker.cli.connection import BrokerId, BundleFile, Json, SvidFile, Url, connect


def live(
    directory: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write the grant files there; it must be empty.")] = None,
    as_json: Json = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Show the live rules, for whoever may propose others.

    Examples:

        keybroker policy live --out rules
    """
    with connect(url, svid, bundle, broker_id) as broker:
        found = broker.live_policy()
    if directory is not None:
        _write(directory, found.files)
    if as_json:
        output.json_object(found)
        return
    output.facts([("revision", str(found.revision)), ("base", found.base), ("policy", found.policy), ("since", found.since)])
    output.say()
    output.table(("FILE", "LINES"), ((name, str(text.count("\n"))) for name, text in sorted(found.files.items())))


def propose(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="All grant files (*.yaml), as they are to be.")],
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; stands in the record.")],
    base: Annotated[str, typer.Option("--base", metavar="HEX", help="What they were written for; the live rules if absent.")] = "",
    operation: Annotated[str, typer.Option("--operation", metavar="ID", help="What others have approved.")] = "",
    as_json: Json = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Put other rules in the place of the live ones.

    What provably only narrows access is in force at once. Anything else begins an operation (exit status 4) that others approve; then
    repeat it, with --operation.

    Examples:

        keybroker policy propose rules --reason "ci needs no Ed25519 any more"
    """
    files = _read(directory)
    with connect(url, svid, bundle, broker_id) as broker:
        made = broker.propose_policy(base or broker.live_policy().base, files, reason=reason, operation=operation)
    if as_json:
        output.json_object(made)
    else:
        output.facts([("in force", f"revision {made.revision}"), ("base", made.base), ("policy", made.policy)])


def _read(directory: Path) -> dict[str, str]:
    """The grant files of a directory, by name.

    Raises:
        UsageError: there are none that can be read.
    """
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix == ".yaml" and not path.name.startswith("."))
        files = {path.name: path.read_bytes().decode() for path in paths}
    except OSError as err:
        raise UsageError(f"{directory}: {err.strerror}; name a directory of grant files") from err
    except UnicodeError as err:
        raise UsageError(f"{directory}: a grant file is not UTF-8") from err
    if not files:
        raise UsageError(f"{directory}: holds no *.yaml file")
    return files


def _write(directory: Path, files: dict[str, str]) -> None:
    if directory.exists() and any(directory.iterdir()):
        raise UsageError(f"{directory}: is not empty; name another directory")
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        if "/" in name or name.startswith("."):  # a broker's answer decides no path of ours
            raise UsageError(f"{output.visible(name)}: no name for a file")
        (directory / name).write_bytes(text.encode())
