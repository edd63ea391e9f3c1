"""Decisions that are on record: where they are read from, and as much of each as a replay needs."""

from __future__ import annotations

import contextlib
from pathlib import Path

from keybroker.authority.store.reader import Reader
from keybroker.errors import ConfigError


def leaf(state: Path, index: int) -> bytes:
    """One record of a state directory.

    Raises:
        ConfigError: there is none with that index.
    """
    with contextlib.closing(Reader(state)) as reader:
        found = reader.leaf(index)
    if found is None:
        raise ConfigError(f"{state}: there is no record {index}")
    return found
