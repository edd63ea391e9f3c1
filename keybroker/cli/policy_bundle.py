"""`keybroker policy bundle`: grant files as one signed file, for brokers and for OPA servers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from keybroker.cli import output
from keybroker.cli.arguments import UsageError
from keybroker.cli.out_file import replaced
from keybroker.cli.rooms import load_part


def bundle(
    grants: Annotated[Path, typer.Option("--grants", metavar="DIR", help="The directory of grant files.")],
    signing_key: Annotated[Path, typer.Option("--signing-key", metavar="FILE", help="An unencrypted private key, PEM: EC or RSA.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the bundle goes; replaced as a whole.")],
    revision: Annotated[
        int | None, typer.Option("--revision", metavar="N", min=0, help="Higher than the one before; the time, if absent.")
    ] = None,
    scope: Annotated[str, typer.Option("--scope", help="What it is for: brokers and OPA servers must want the same.")] = "",
    rego: Annotated[Path | None, typer.Option("--rego", metavar="FILE", help="Rego of your own; goes with --module.")] = None,
    module: Annotated[Path | None, typer.Option("--module", metavar="FILE", help="The same, compiled by `scripts/policy build`.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="A broker's configuration, to warn of unknown keys.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Make a signed policy bundle of a directory of grant files.

    Brokers (`authority.policy.bundle`) and OPA servers take it, and nothing that is not signed by the key that they know, for
    their scope, with a higher revision than the one they have.

    Examples:

        keybroker policy bundle --grants grants --signing-key policy-signing.pem --out published/bundle.tar.gz

        keybroker policy bundle --grants grants --signing-key policy-signing.pem --scope production --revision 42 --out bundle.tar.gz
    """
    if (rego is None) != (module is None):
        raise UsageError("--rego and --module go together: OPA servers run the one, brokers the other")
    maker = load_part("authority", "keybroker.authority.policy.bundle_maker")
    signatures = load_part("authority", "keybroker.authority.policy.signatures")
    own = maker.OwnPolicy(rego, module) if rego else None
    number = int(time.time()) if revision is None else revision
    packed, rules = maker.make(grants, number, signatures.signing_key(signing_key), scope, own, _known_keys(config))
    for warning in rules.warnings if config else ():
        output.note(f"warning: {output.visible(warning)}")
    with replaced(out) as file:
        file.write(packed)
    if as_json:
        output.json_object({"bundle": str(out), "revision": number, "grants": len(rules.grants), "denies": len(rules.denies)})
        return
    output.say(f"{output.visible(str(out))}: revision {number}, {len(rules.grants)} grants, {len(rules.denies)} denies")


def _known_keys(config: Path | None) -> frozenset[str]:
    if config is None:
        return frozenset()
    from keybroker import config as configuration

    loaded = configuration.load(config)
    return frozenset(loaded.authority.keys if loaded.authority else ())
