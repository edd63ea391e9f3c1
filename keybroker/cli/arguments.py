"""The arguments that `keybroker sign` and `keybroker verify` share, and the file that both read."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from keybroker.model.key import Algorithm
from keybroker.model.request import Format

KeyName = Annotated[str, typer.Option("--key", metavar="NAME", help="The key's name, as `keybroker keys list` shows it.")]
AlgorithmName = Annotated[Algorithm, typer.Option("--alg", help="The signature algorithm. There is no default.")]
InputFile = Annotated[Path, typer.Argument(metavar="FILE", help="`-` is standard input.")]
Form = Annotated[Format | None, typer.Option("--format", help="Of an ECDSA signature: DER (the default), or r and s side by side.")]


@contextlib.contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """The file, or standard input for `-`, to read bytes from."""
    if str(file) == "-":
        yield sys.stdin.buffer
        return
    with file.open("rb") as stream:
        yield stream
