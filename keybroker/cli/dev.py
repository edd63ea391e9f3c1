"""`keybroker dev`: a throw-away world for trying things out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from keybroker.cli import output

app = typer.Typer(no_args_is_help=True, help="Make a throw-away world for development.")


@app.callback()
def _group() -> None:
    """Make a throw-away world for development."""


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where: a new directory, or an empty one.")],
    workloads: Annotated[
        list[str] | None, typer.Option("--workload", metavar="ID", help="One more identity, svids/LASTSEGMENT.pem. Repeatable.")
    ] = None,
    keys: Annotated[
        list[str] | None, typer.Option("--key", metavar="NAME:ALG", help="One more key, granted to nobody yet. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print where it is, as JSON.")] = False,
) -> None:
    """Make a token, a CA, identities, keys, grants and a configuration for `keybroker serve`.

    Everything is for development only: the CA's key and the PIN lie in plain files.

    Examples:

        keybroker dev init my-world

        keybroker dev init my-world --workload spiffe://example.org/shop/checkout --key receipts:ES384
    """
    from keybroker.cli import world

    plan = world.WorldPlan.make(workloads or (), keys or ())
    with output.busy("making a token and keys"):
        made = world.make(directory, plan)
    if as_json:
        output.json_object(
            {"directory": str(made.directory), "url": made.url, "identities": list(plan.identities), "keys": list(plan.keys)}
        )
        return
    place = shlex.quote(output.visible(str(made.directory)))
    output.say(
        f"Made a development world in {place}: {len(plan.identities)} identities, {len(plan.keys)} keys. Never use it in production."
    )
    output.say()
    output.say("Start it:")
    output.say(f"  keybroker serve --config {place}/keybroker.yaml")
    output.say("Sign with it, from another terminal:")
    output.say(f"  export KEYBROKER_URL={made.url} KEYBROKER_SVID={place}/svids/payments-api.pem KEYBROKER_BUNDLE={place}/bundle.pem")
    output.say("  echo hello | keybroker sign --key orders --alg ES256 -")
    output.say("Read the record:")
    output.say(f"  keybroker audit tail --svid {place}/svids/auditor.pem")
    if workloads or keys:
        output.say("What you added is granted nothing, and to nobody, yet: write a grant file of your own, as in")
        output.say(f"  {place}/grants/development.yaml")
