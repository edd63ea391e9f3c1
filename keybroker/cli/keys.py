"""`keybroker keys`: what we may use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from keybroker.cli import output
from keybroker.cli.connection import BrokerId, BundleFile, Json, SvidFile, Url, connect

if TYPE_CHECKING:
    from keybroker.client import Key

app = typer.Typer(no_args_is_help=True, help="Look at keys.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The key's name.")]


@app.command("list")
def list_(as_json: Json = False, url: Url = "", svid: SvidFile = "", bundle: BundleFile = "", broker_id: BrokerId = "") -> None:
    """List the keys that we may look at.

    Examples:

        keybroker keys list

        keybroker keys list --json | jq '.[].name'
    """
    with connect(url, svid, bundle, broker_id) as broker:
        found = broker.keys()
    if as_json:
        output.json_object(found)
        return
    output.table(("KEY", "VERSION", "FAMILY", "ALGORITHMS", "LABELS"), (_row(key) for key in found))


@app.command()
def show(name: Name, as_json: Json = False, url: Url = "", svid: SvidFile = "", bundle: BundleFile = "", broker_id: BrokerId = "") -> None:
    """Show one key and its versions.

    Examples:

        keybroker keys show orders
    """
    with connect(url, svid, bundle, broker_id) as broker:
        key = broker.key(name)
    if as_json:
        output.json_object(key)
        return
    output.facts([("key", key.name), ("algorithms", ", ".join(key.algorithms)), ("labels", _labels(key))])
    output.say()
    rows = [(str(each.version), each.state, each.family.value, each.spki_sha256) for each in key.versions]
    output.table(("VERSION", "STATE", "FAMILY", "SHA-256 OF THE PUBLIC KEY"), rows)


@app.command()
def public(
    name: Name,
    form: Annotated[Literal["pem", "jwk", "openssh"], typer.Option("--format", help="PEM, JWK or OpenSSH.")] = "pem",
    version: Annotated[int | None, typer.Option("--version", min=1, help="Another version than the one that signs.")] = None,
    as_json: Json = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Print a public key.

    Examples:

        keybroker keys public orders > orders.pem

        keybroker keys public orders --format jwk
    """
    with connect(url, svid, bundle, broker_id) as broker:
        text = broker.public_key(name, form, version).rstrip("\n")
    if as_json:
        output.json_object({"key": name, "format": form, "public_key": text})
    else:
        output.say(text)


def _row(key: Key) -> tuple[str, ...]:
    current = key.versions[-1] if key.versions else None
    version, family = (str(current.version), current.family.value) if current else ("", "")
    return key.name, version, family, ", ".join(key.algorithms), _labels(key)


def _labels(key: Key) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(key.labels.items()))
