"""How the program prints: tables for people, plain columns and JSON for programs, errors in a few lines on stderr.

Text that came from elsewhere (reasons, names, labels) is escaped, so that a record cannot move an auditor's cursor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from keybroker.errors import KeyBrokerError, RefusalError


def say(text: str = "") -> None:
    """A line on stdout, flushed: whoever reads a pipe sees it now."""
    print(text, flush=True)  # noqa: T201  this is where the program prints


def note(text: str) -> None:
    """A line for people on stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201  as above


def error(err: KeyBrokerError) -> None:
    """What went wrong, why, what to do, and what to quote when asking for help."""
    note(f"error: {visible(str(err))}")
    if isinstance(err, RefusalError):
        for pointer, fault in err.pointers:
            note(f"  {visible(pointer) or 'the request'}: {visible(fault)}")
        if err.reasons:
            note(f"  reasons: {visible(', '.join(err.reasons))}")
    from keybroker.cli import exits

    cure = exits.cure_of(err)
    if cure:
        note(f"  cure: {cure}")
    if isinstance(err, RefusalError):
        for name, value in (("use", err.use), ("request", err.request_id)):
            if value:
                note(f"  {name}: {visible(value)}")


def json_object(value: Any) -> None:
    """One JSON value: indented on a terminal, on one line in a pipe."""
    data = msgspec.json.encode(value)
    say(indented(data) if sys.stdout.isatty() else data.decode())


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows: a table on a terminal; columns separated by tabs, without a header, in a pipe."""
    if not sys.stdout.isatty():
        for row in rows:
            say("\t".join(visible(cell) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(*headers, box=None, pad_edge=False)
    for row in rows:
        made.add_row(*(Text(visible(cell)) for cell in row))
    Console().print(made)


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values, one pair a line."""
    known = [(name, visible(value)) for name, value in pairs]
    width = max(len(name) for name, _ in known)
    for name, value in known:
        say(f"{name:<{width}}  {value}" if sys.stdout.isatty() else f"{name}\t{value}")


def visible(text: str) -> str:
    """The text with everything that does not show as itself (control and format characters) escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def indented(data: bytes) -> str:
    """JSON, laid out for reading."""
    return msgspec.json.format(data, indent=2).decode()
