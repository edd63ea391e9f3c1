"""`keybroker sign` and `keybroker verify`."""

from __future__ import annotations

import base64
import binascii
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from keybroker.cli import output
from keybroker.cli.connection import BrokerId, BundleFile, Json, SvidFile, Url, connect
from keybroker.errors import InvalidError, TooLargeError
from keybroker.model.key import Algorithm

if TYPE_CHECKING:
    from keybroker.client import SignedUse

KeyName = Annotated[str, typer.Option("--key", metavar="NAME", help="The key's name, as `keybroker keys list` shows it.")]
AlgorithmName = Annotated[Algorithm, typer.Option("--alg", help="What to sign with. There is no default.")]
InputFile = Annotated[Path, typer.Argument(metavar="FILE", help="What to sign; `-` is standard input.", exists=True, allow_dash=True)]


class SignatureFormat(Enum):
    """How an ECDSA signature is written down."""

    DER = "der"
    P1363 = "p1363"


Form = Annotated[
    SignatureFormat | None, typer.Option("--format", help="Of an ECDSA signature: DER (the default), or r and s side by side.")
]


def sign(
    file: InputFile,
    key: KeyName,
    algorithm: AlgorithmName,
    digest: Annotated[bool, typer.Option("--digest", help="Hash FILE here and send only its digest. Needs a grant of sign-digest.")] = False,
    form: Form = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the signature's bytes there, not base64 to stdout.")] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why, for people who read the record.")] = "",
    media_type: Annotated[str, typer.Option("--media-type", help="Of FILE, for rules that look at it.")] = "",
    idempotency_key: Annotated[
        str, typer.Option("--idempotency-key", metavar="TEXT", help="Asking again with the same text gives the same signature, for 24 hours.")
    ] = "",
    explain: Annotated[bool, typer.Option("--explain", help="Show the decision; use no key. Exit status 3 where it would be denied.")] = False,
    as_json: Json = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Sign a file with a key of the broker.

    Prints the signature in base64, or writes its bytes to --out.

    Examples:

        keybroker sign --key orders --alg ES256 --out order.sig order.json

        keybroker sign --key release --alg ES256 --digest --reason "release 2.1" big.tar.gz

        git rev-parse HEAD | keybroker sign --key orders --alg Ed25519 -
    """
    content = _content(file, algorithm, is_digest=digest)
    asked = {"digest" if digest else "message": content}
    with connect(url, svid, bundle, broker_id) as broker:
        if explain:
            explanation = broker.explain(key, algorithm, format=form and form.value, reason=reason, media_type=media_type, **asked)
            _show_explanation(explanation, as_json=as_json)
            return
        signed = broker.sign(
            key, algorithm, format=form and form.value, reason=reason, media_type=media_type, idempotency_key=idempotency_key, **asked
        )
    if out is not None:
        out.write_bytes(signed.signature)
    if as_json:
        output.json_object(signed)
    elif out is not None:
        output.say(_summary(signed, out))
    else:
        output.say(base64.b64encode(signed.signature).decode())
