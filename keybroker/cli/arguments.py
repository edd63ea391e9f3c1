"""The arguments that `keybroker sign` and `keybroker verify` share, and the file that both read."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from keybroker.cli import output
from keybroker.errors import KeyBrokerError
from keybroker.model.key import Algorithm
from keybroker.model.request import Format

_PIECE_BYTES = 1024 * 1024


class UsageError(KeyBrokerError):
    """The arguments make no sense. The text says how to write them."""


KeyName = Annotated[str, typer.Option("--key", metavar="NAME", help="The key's name, as `keybroker keys list` shows it.")]
AlgorithmName = Annotated[Algorithm, typer.Option("--alg", help="The signature algorithm. There is no default.")]
InputFile = Annotated[Path, typer.Argument(metavar="FILE", help="`-` is standard input.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until it is approved and cooled off, or refused, or has expired.")]
Form = Annotated[Format | None, typer.Option("--format", help="Of an ECDSA signature: DER (the default), or r and s side by side.")]


def digest_of(file: Path, hash_name: str) -> str:
    """The digest of a file, lower-case hex.

    Raises:
        UsageError: it cannot be opened.
    """
    digest = hashlib.new(hash_name)
    with opened(file) as stream:
        while piece := stream.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """The file, or standard input for `-`, to read bytes from.

    Raises:
        UsageError: it cannot be opened.
    """
    if str(file) == "-":
        if sys.stdin is None:
            raise UsageError("standard input is closed; name a file, or pipe something in")
        yield sys.stdin.buffer
        return
    try:
        stream = file.open("rb")
    except OSError as err:
        raise UsageError(f"{file}: {err.strerror}; name a file that can be read, or - for standard input") from err
    with stream, output.measured(stream, f"reading {output.visible(file.name)}") as measured:
        yield measured
