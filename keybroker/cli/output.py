"""How the program prints: tables for people, plain columns and JSON for programs, errors in a few lines on stderr.

Text that came from elsewhere (reasons, names, labels, paths) is escaped, so that a record cannot move an auditor's cursor.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import msgspec

from keybroker.errors import KeyBrokerError, RefusalError

_FORMULAS = ("=", "+", "-", "@")  # what a spreadsheet runs (owasp.org, CSV injection)
_LARGE_BYTES = 256 * 1024 * 1024  # what takes a second or more to read


def say(text: str = "") -> None:
    """A line on stdout, flushed: whoever reads a pipe sees it now.

    Raises:
        OSError: it cannot be written; an answer that nobody gets is a failure.
    """
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "standard output")
    print(text, flush=True)  # noqa: T201  this is where the program prints


def note(text: str) -> None:
    """A line for people on stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201  as above


def error(err: KeyBrokerError) -> None:
    """What went wrong, why, what to do, and what to quote when asking for help."""
    from keybroker.client.errors import PendingError

    note(f"{'pending' if isinstance(err, PendingError) else 'error'}: {visible(str(err))}")
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
    say(indented(data) if is_terminal() else data.decode())


def json_line(value: Any) -> None:
    """One JSON value on one line."""
    say(msgspec.json.encode(value).decode())


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows: a table on a terminal; columns separated by tabs, without a header, in a pipe."""
    if not is_terminal():
        for row in rows:
            say("\t".join(map(visible, row)))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(*headers, box=None, pad_edge=False)
    for row in rows:
        made.add_row(*(Text(visible(cell)) for cell in row))
    Console().print(made)


def is_terminal() -> bool:
    """Whether a person reads standard output as it comes."""
    return sys.stdout is not None and sys.stdout.isatty()


class Columns:
    """Rows that come one by one, and are printed as they come. On a terminal below a header, in columns that nearly always line up."""

    def __init__(self, columns: Sequence[tuple[str, int]]) -> None:
        """What the columns are.

        Args:
            columns: header, and width in characters for terminals; longer cells push the rest of their row to the right.
        """
        self._widths = [width for _, width in columns]
        self._header = [header for header, _ in columns]
        self._is_empty = True

    def add(self, row: Sequence[str]) -> None:
        """Print one row."""
        if not is_terminal():
            say("\t".join(map(visible, row)))
            return
        if self._is_empty:
            self._print(self._header)
            self._is_empty = False
        self._print([visible(cell) for cell in row])

    def _print(self, cells: Sequence[str]) -> None:
        say("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, self._widths, strict=True)).rstrip())


class Csv:
    """Rows as comma-separated values (RFC 4180), after a header. A cell that a spreadsheet would take for a formula is marked as text."""

    def __init__(self, header: Sequence[str]) -> None:
        """Begin with a header."""
        self._print(header)

    def add(self, row: Sequence[str]) -> None:
        """Print one row."""
        self._print([f"'{cell}" if cell.startswith(_FORMULAS) else cell for cell in map(visible, row)])

    def _print(self, cells: Sequence[str]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(cells)
        say(line.getvalue())


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values, one pair a line."""
    known = [(name, visible(value)) for name, value in pairs]
    width = max(len(name) for name, _ in known)
    for name, value in known:
        say(f"{name:<{width}}  {value}".rstrip() if is_terminal() else f"{name}\t{value}")


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Something turns on a terminal while the block runs; elsewhere nothing is printed."""
    if not sys.stderr or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function that takes how much is done, and of how much. A bar on a terminal; nothing elsewhere."""
    if not sys.stderr or not sys.stderr.isatty():
        yield lambda _done, _of: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(what, total=None)
        yield lambda done, of: bars.update(bar, completed=done, total=of or None)


@contextlib.contextmanager
def measured(file: BinaryIO, what: str) -> Iterator[BinaryIO]:
    """The file, with a bar on a terminal that shows how much of it has been read, if it is large."""
    size = os.fstat(file.fileno()).st_size
    if size < _LARGE_BYTES or not sys.stderr or not sys.stderr.isatty():
        yield file
        return
    from rich.console import Console
    from rich.progress import wrap_file

    with wrap_file(file, size, description=what, console=Console(stderr=True), transient=True) as wrapped:
        yield wrapped


def visible(text: str) -> str:
    """The text with everything that does not show as itself (control and format characters, stray bytes of a file name) escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def indented(data: bytes) -> str:
    """JSON, laid out for reading."""
    return msgspec.json.format(data, indent=2).decode()
