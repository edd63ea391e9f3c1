"""A file that is written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_NAME_CHARACTERS = 100  # of the file's own name, in that of the temporary one: names have a limit


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, that takes the place of `path` when the block ends well, and is gone when it does not.

    It is made at once, so that a place that cannot be written is found out before anything that cannot be undone. Links are followed;
    pipes and devices are written to as they are.

    Raises:
        OSError: it cannot be written. Names `path`.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with path.open("wb") as file:
            yield file
        return
    if target.exists() and not os.access(target, os.W_OK):
        path.open("ab").close()  # raises what the system says of it
    temporary = target.with_name(f".{target.name[:_NAME_CHARACTERS]}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as err:
        raise OSError(err.errno, err.strerror, str(path)) from err
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
