"""Decisions that are on record: where they are read from, and as much of each as a replay needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from keybroker.authority.store.reader import Reader, RecordFilter
from keybroker.clock import to_rfc3339
from keybroker.errors import ConfigError
from keybroker.model.record import MAX_LEAF_BYTES

PAGE = 4_000

Progress = Callable[[int, int], None]
"""Called now and then with how much is done, and of how much."""


class Svid(msgspec.Struct, frozen=True):
    """Of a recorded certificate: where it came from."""

    address: str = ""


class Body(msgspec.Struct, frozen=True):
    """Of a record's body: for how many it stands, and what happened."""

    count: int = 1
    event: str = ""
    detail: str = ""


class Recorded(msgspec.Struct, frozen=True):
    """Of a record: what was asked, and what was answered. Both are `{}` where nothing was."""

    index: int
    kind: str
    time: str
    request: msgspec.Raw
    decision: msgspec.Raw
    svid: Svid
    body: Body


_decode = msgspec.json.Decoder(Recorded).decode


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


def from_state(state: Path, since_us: int | None, progress: Progress, kind: str = "") -> Iterator[Recorded | None]:
    """The records of a state directory, all or of one kind, oldest first; None for one that cannot be read as one.

    Reads in pages, each in a short transaction, so it may run beside a broker.
    """
    with contextlib.closing(Reader(state)) as reader:
        wanted = RecordFilter(since_us=since_us, limit=PAGE)
        places = reader.places(wanted)
        last: int | None = places.start - 1
        while last is not None and last + 1 < places.stop:
            page = reader.page(RecordFilter(after=last, kind=kind, limit=PAGE))
            for each in page.leaves:
                yield decoded(each)
            last = page.last
            progress((places.stop if last is None else last + 1) - places.start, len(places))


def from_export(file: Path, since_us: int | None, progress: Progress) -> Iterator[Recorded | None]:
    """The records of a file with one on each line, as `keybroker audit query --all --json` writes it; None for another line.

    Raises:
        ConfigError: it cannot be read.
    """
    since = to_rfc3339(since_us) if since_us is not None else ""
    try:
        size = file.stat().st_size
        with file.open("rb") as lines:
            done = 0
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LEAF_BYTES + 2), b"")):
                done += len(line)
                if number % PAGE == 0:
                    progress(done, size)
                found = decoded(line)
                if found is None or found.time >= since:
                    yield found
    except OSError as err:
        raise ConfigError(f"{file}: cannot be read: {err.strerror}") from err


def decoded(data: bytes) -> Recorded | None:
    """A record; None if it is none."""
    try:
        return _decode(data)
    except (msgspec.MsgspecError, UnicodeError):
        return None
