"""`keybroker verify`: is this signature good?"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Annotated

import typer

from keybroker.cli import output
from keybroker.cli.arguments import AlgorithmName, Form, InputFile, KeyName, opened
from keybroker.cli.connection import BrokerId, BundleFile, Json, SvidFile, Url, connect
from keybroker.errors import KeyBrokerError


class BadSignatureError(KeyBrokerError):
    """The signature does not verify."""


def verify(
    file: InputFile,
    key: KeyName,
    algorithm: AlgorithmName,
    signature: Annotated[
        Path, typer.Option("--signature", metavar="FILE", help="The signature: its bytes, or base64.", exists=True, dir_okay=False)
    ],
    form: Form = None,
    as_json: Json = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Verify a signature here, with the public key that the broker shows.

    Every version of the key is tried. It does not matter whether FILE was signed whole or with --digest. Exit status 1
    where the signature is not good.

    Examples:

        keybroker verify --key orders --alg ES256 --signature order.sig order.json
    """
    from keybroker.client.verify import is_good, signed_content

    with connect(url, svid, bundle, broker_id) as broker:
        versions = [each for each in broker.key(key).versions if each.family is algorithm.family]
    with opened(file) as stream:
        content = signed_content(algorithm, stream)
    candidates = _candidates(signature.read_bytes())
    good = [each.version for each in versions if any(is_good(each.spki, algorithm, content, one, form or "der") for one in candidates)]
    if as_json:
        found = {"version": good[-1]} if good else {}
        output.json_object({"verified": bool(good), "key": key, **found, "algorithm": algorithm.value})
    if not good:
        raise BadSignatureError(f"this is not a signature of this file by the key {key} with {algorithm.value}")
    if not as_json:
        output.say(f"Verified OK: {algorithm.value} by {key} version {good[-1]}")


def _candidates(data: bytes) -> list[bytes]:
    """The signature as it may have been stored: its bytes, or what `keybroker sign` prints."""
    try:
        return [data, base64.b64decode(data.strip(), validate=True)]
    except binascii.Error:
        return [data]
