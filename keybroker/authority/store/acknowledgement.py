"""The file by which an operator acknowledges the clock: the id of the event, in the state directory, taken and removed by the broker."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from keybroker.authority.store import opening
from keybroker.errors import StoreError

ACKNOWLEDGEMENT = "clock-acknowledged"


def distrusted(state: Path) -> str:
    """What the broker on this state has seen of its clock, with the id of the event in front; empty while it trusts it.

    Raises:
        StoreError: the state cannot be read.
    """
    with contextlib.closing(opening.reader(state)) as db:
        try:
            row = db.execute("SELECT distrusted FROM clock").fetchone()
        except sqlite3.OperationalError as err:
            if "no such table" in str(err):
                return ""  # of a version that did not keep its clock
            msg = f"the database in {state} cannot be read"
            raise StoreError(msg) from err
    return str(row[0]) if row else ""


def acknowledge(state: Path, event: str) -> None:
    """Leave the file for the broker, whole or not at all.

    Raises:
        OSError: it cannot be written there.
    """
    draft = state / f"{ACKNOWLEDGEMENT}.new"
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644), "w") as file:
        file.write(f"{event}\n")
        os.fchmod(file.fileno(), 0o644)  # the broker may run as somebody else
    draft.rename(state / ACKNOWLEDGEMENT)


def is_waiting(state: Path) -> bool:
    """Whether the broker has not taken it yet."""
    return (state / ACKNOWLEDGEMENT).exists()
