"""What is where in the record, and how uses add up: so that an auditor's question looks at little of a long log.

The catalog is made from the record and from nothing else, a block of it at a time, off the path of any signature. It has a file of its
own that may be deleted: what it does not cover (yet) is looked through record by record. It only says where to look. What is answered
is read from the record.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from keybroker.authority.store.facts import Entry, Facts, Use, entry_of
from keybroker.telemetry import logger

CATALOG = "catalog.db"
HOUR_US = 3_600_000_000
BLOCK = 1_024  # records; about 2 ms to look through
MAX_ALTERNATIVES = 64
_FORMAT = 2
_SPANS = 256  # blocks asked for at a time
_MAX_CACHED = 200_000

_log = logger()
_K = TypeVar("_K")
_V = TypeVar("_V")

_TABLES = """
CREATE TABLE covered (
    size INTEGER NOT NULL,                -- records of the log that are in here
    hash BLOB NOT NULL                    -- of the last of them, to know the log again
) STRICT;
INSERT INTO covered VALUES (0, x'');
CREATE TABLE word (
    id    INTEGER PRIMARY KEY,
    field TEXT NOT NULL,
    text  TEXT NOT NULL,
    UNIQUE (field, text)
) STRICT;
CREATE TABLE place (                      -- where in a block a word is first, and last
    word  INTEGER NOT NULL,
    block INTEGER NOT NULL,
    first INTEGER NOT NULL,
    last  INTEGER NOT NULL,
    PRIMARY KEY (word, block)
) STRICT, WITHOUT ROWID;
CREATE TABLE sort (                       -- uses and refusals that look the same; numbers of words
    id        INTEGER PRIMARY KEY,
    workload  INTEGER NOT NULL,
    key       INTEGER NOT NULL,
    version   INTEGER NOT NULL,
    operation INTEGER NOT NULL,
    algorithm INTEGER NOT NULL,
    content   INTEGER NOT NULL,
    grants    INTEGER NOT NULL,
    svid      INTEGER NOT NULL,
    address   INTEGER NOT NULL,
    people    INTEGER NOT NULL,
    ending    INTEGER NOT NULL,
    UNIQUE (workload, key, version, operation, algorithm, content, grants, svid, address, people, ending)
) STRICT;
CREATE INDEX sort_key ON sort (key);
CREATE INDEX sort_svid ON sort (svid);
CREATE TABLE tally (                      -- how many of a sort in an hour, with the first and the last
    sort     INTEGER NOT NULL,
    hour     INTEGER NOT NULL,            -- since 1970
    count    INTEGER NOT NULL,
    first    INTEGER NOT NULL,
    last     INTEGER NOT NULL,
    first_us INTEGER NOT NULL,
    last_us  INTEGER NOT NULL,
    PRIMARY KEY (sort, hour)
) STRICT, WITHOUT ROWID;
CREATE INDEX tally_hour ON tally (hour);
"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One thing that a record must say: the name of a field, and its values, of which one will do."""

    field: str
    texts: tuple[str, ...]


class Counted(NamedTuple):
    """Uses and refusals of one sort. `first` and `last` are indexes of the records that end them; `hour` is -1 where it is of several."""

    use: Use
    hour: int
    times: int
    first: int
    last: int
    first_us: int
    last_us: int


class Endings:
    """Pairs what ends a use with what was asked for. Records are shown to it in the order of the log.

    Args:
        record: a connection that reads the record, for intents that were not shown.
    """

    def __init__(self, record: sqlite3.Connection) -> None:
        self._record = record
        self._open_uses: dict[str, Facts] = {}

    def asked(self, entry: Entry) -> Facts | None:
        """What was asked for, where a record is the end of it: an outcome, a denial. None for others."""
        if entry.facts.kind == "intent":
            self._open_uses[entry.use] = entry.facts
        if entry.facts.kind == "outcome":
            return self._intent_of(entry.use) or entry.facts
        return entry.facts if entry.facts.kind == "denial" else None

    def _intent_of(self, use: str) -> Facts | None:
        if use in self._open_uses:
            return self._open_uses.pop(use)
        row = self._record.execute("SELECT leaf FROM record WHERE use = ? AND use <> '' AND kind = 'intent'", (use,)).fetchone()
        return entry_of(row[0]).facts if row else None


class Catalog:
    """The catalog of one state directory. For one thread.

    Args:
        state: the directory; the catalog is made there if there is none, or if it is not of this log.
        record: a connection that reads the record.

    Raises:
        sqlite3.Error, OSError: there can be no catalog there now.
    """

    def __init__(self, state: Path, record: sqlite3.Connection) -> None:
        self._path = state / CATALOG
        self._record = record
        self._words: dict[tuple[str, str], int] = {}
        self._numbers_by_facts: dict[Facts, tuple[int, ...]] = {}
        self._sorts: dict[tuple[Facts, str], int] = {}
        self._endings = Endings(record)
        self._is_damaged = False
        self._db = self._opened()
        self._covered = self._known_size()

    @property
    def covered(self) -> int:
        """Records of the log that are in here: those below this index."""
        return self._covered

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def advance(self) -> bool:
        """Take in the next block if the log has grown by a whole one. True if there may be another."""
        if self._is_damaged:
            self._start_over()
        rows = self._record.execute(
            "SELECT idx, time_us, hash, leaf FROM record WHERE idx >= ? ORDER BY idx LIMIT ?", (self._covered, BLOCK)
        ).fetchall()
        if len(rows) < BLOCK:
            return False
        try:
            self._take(rows)
        except (sqlite3.Error, msgspec.MsgspecError) as err:
            self._give_up(err)
            return False
        return True

    def spans(self, wanted: Sequence[Wanted], places: range) -> Iterator[range]:
        """Where in the covered part of `places` a record may say all that is wanted, rising. There is none in between.

        Raises:
            sqlite3.Error: it cannot be read; the record itself can. If it is damaged, it is made anew, later.
        """
        try:
            yield from self._spans(wanted, places)
        except sqlite3.DatabaseError as err:
            self._is_damaged = not isinstance(err, sqlite3.OperationalError)
            raise

    def _spans(self, wanted: Sequence[Wanted], places: range) -> Iterator[range]:
        few = [each for each in wanted if len(each.texts) <= MAX_ALTERNATIVES]
        choices = [self._numbers(each) for each in few]
        if not all(choices):
            return
        stop = min(places.stop, self._covered)
        block = places.start // BLOCK
        while block * BLOCK < stop:
            found = self._blocks(choices, block) if choices else [(block, block * BLOCK, block * BLOCK + BLOCK - 1)]
            for number, first, last in found:
                low, high = max(first, places.start), min(last + 1, stop)
                if low < high:
                    yield range(low, high)
                block = number + 1
            if choices and len(found) < _SPANS:
                return

    def counted(self, named: dict[str, str], hours: range) -> Iterator[Counted]:
        """What ended in whole hours, as far as the log is covered, by sort.

        Args:
            named: parts of a use that must be so: `workload`, `key`, `svid`, `person`.
            hours: since 1970.

        Raises:
            sqlite3.Error: it cannot be read. If it is damaged, it is made anew, later.
        """
        sums = "sum(count), min(first), max(last), min(first_us), max(last_us)"
        width = len(Use._fields)
        texts: dict[int, str] = {}
        for row in self._tallies(f"{', '.join(Use._fields)}, {sums}", named, hours, "GROUP BY id"):
            use = Use(*(texts.get(number) or texts.setdefault(number, self._text(number)) for number in row[:width]))
            yield Counted(use, -1, *row[width:])

    def counted_by_hour(self, named: dict[str, str], hours: range) -> Iterator[tuple[int, str, int]]:
        """The same as hour, ending and how many. Raises what `counted` raises."""
        for hour, ending, times in self._tallies("hour, ending, sum(count)", named, hours, "GROUP BY hour, ending"):
            yield hour, self._text(ending), times

    def _tallies(self, what: str, named: dict[str, str], hours: range, group: str) -> Iterator[tuple[int, ...]]:
        where, values = ["hour >= ?", "hour < ?"], [hours.start, hours.stop]  # type: tuple[list[str], list[str | int]]
        for name, value in named.items():
            if name == "person":
                where.append("people IN (SELECT id FROM word WHERE field = 'people' AND instr(char(10) || text || char(10), ?))")
                values.append(f"\n{value}\n")
            else:
                where.append(f"{name} IN (SELECT id FROM word WHERE field = ? AND text = ?)")  # noqa: S608  names of ours
                values += [name, value]
        statement = f"SELECT {what} FROM sort JOIN tally ON sort = id WHERE {' AND '.join(where)} {group}"  # noqa: S608  names of ours
        try:
            yield from self._db.execute(statement, values)
        except sqlite3.DatabaseError as err:
            self._is_damaged = not isinstance(err, sqlite3.OperationalError)
            raise

    def _text(self, number: int) -> str:
        found = self._db.execute("SELECT text FROM word WHERE id = ?", (number,)).fetchone()
        return str(found[0]) if found else ""

    def _blocks(self, choices: list[list[int]], block: int) -> list[tuple[int, int, int]]:
        """The next blocks that hold all words: number, and the first and last index where all may be said."""
        parts, values = [], []  # type: tuple[list[str], list[int]]
        for numbers in choices:
            marks = ",".join("?" * len(numbers))
            one = "SELECT block, first, last" if len(numbers) == 1 else "SELECT block, min(first) AS first, max(last) AS last"
            group = "" if len(numbers) == 1 else " GROUP BY block"
            parts.append(f"({one} FROM place WHERE word IN ({marks}) AND block >= ?{group})")
            values += [*numbers, block]
        if len(parts) == 1:
            select = f"SELECT block, first, last FROM {parts[0]}"  # noqa: S608  as above
        else:
            names = [f"p{number}" for number in range(len(parts))]
            joined = f"{parts[0]} AS p0 " + " ".join(
                f"JOIN {part} AS {name} USING (block)" for part, name in zip(parts[1:], names[1:], strict=True)
            )
            firsts, lasts = (", ".join(f"{name}.{end}" for name in names) for end in ("first", "last"))
            select = f"SELECT block, max({firsts}), min({lasts}) FROM {joined}"  # noqa: S608  as above
        return self._db.execute(f"{select} ORDER BY block LIMIT {_SPANS}", values).fetchall()

    def _numbers(self, wanted: Wanted) -> list[int]:
        marks = ",".join("?" * len(wanted.texts))
        found = self._db.execute(f"SELECT id FROM word WHERE field = ? AND text IN ({marks})", (wanted.field, *wanted.texts))  # noqa: S608
        return [number for (number,) in found]

    def _take(self, rows: list[tuple[int, int, bytes, bytes]]) -> None:
        """Take in a block: where it has which facts, and what ended in it."""
        ends: dict[Facts, list[int]] = {}
        tallies: dict[tuple[Facts, str, int], list[int]] = {}
        for index, time_us, _, leaf in rows:
            entry = entry_of(leaf)
            ends.setdefault(entry.facts, [index, index])[1] = index
            facts = self._endings.asked(entry)
            if facts is None:
                continue
            tally = tallies.setdefault((facts, entry.facts.outcome, time_us // HOUR_US), [0, index, index, time_us, time_us])
            tally[0] += entry.times
            tally[2], tally[4] = index, time_us
        self._db.execute("BEGIN")
        self._write_places(rows[0][0] // BLOCK, ends)
        self._write_tallies(tallies)
        size = rows[-1][0] + 1
        self._db.execute("UPDATE covered SET size = ?, hash = ?", (size, rows[-1][2]))
        self._db.execute("COMMIT")
        self._covered = size

    def _write_places(self, block: int, ends: dict[Facts, list[int]]) -> None:
        places: dict[int, list[int]] = {}
        for facts, (first, last) in ends.items():
            for number in self._numbers_of(facts):
                place = places.setdefault(number, [first, last])
                place[0], place[1] = min(place[0], first), max(place[1], last)
        self._db.executemany("INSERT INTO place VALUES (?, ?, ?, ?)", [(word, block, *place) for word, place in places.items()])

    def _write_tallies(self, tallies: dict[tuple[Facts, str, int], list[int]]) -> None:
        self._db.executemany(
            "INSERT INTO tally VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (sort, hour) DO UPDATE SET"
            " count = count + excluded.count, last = excluded.last, last_us = excluded.last_us",
            [(self._sort(facts, ending), hour, *tally) for (facts, ending, hour), tally in tallies.items()],
        )

    def _numbers_of(self, facts: Facts) -> tuple[int, ...]:
        numbers = self._numbers_by_facts.get(facts)
        if numbers is None:
            numbers = self._remember(self._numbers_by_facts, facts, tuple(self._word(word) for word in facts.words()))
        return numbers

    def _word(self, word: tuple[str, str]) -> int:
        number = self._words.get(word)
        if number is None:
            self._db.execute("INSERT OR IGNORE INTO word (field, text) VALUES (?, ?)", word)
            found = self._db.execute("SELECT id FROM word WHERE field = ? AND text = ?", word).fetchone()
            number = self._remember(self._words, word, int(found[0]))
        return number

    def _sort(self, facts: Facts, ending: str) -> int:
        number = self._sorts.get((facts, ending))
        if number is None:
            parts = tuple(self._word(word) for word in zip(Use._fields, facts.use(ending), strict=True))
            self._db.execute(f"INSERT OR IGNORE INTO sort VALUES (NULL{', ?' * len(parts)})", parts)  # noqa: S608  marks only
            names = " AND ".join(f"{name} = ?" for name in Use._fields)
            found = self._db.execute(f"SELECT id FROM sort WHERE {names}", parts).fetchone()  # noqa: S608  names of ours
            number = self._remember(self._sorts, (facts, ending), int(found[0]))
        return number

    @staticmethod
    def _remember(known: dict[_K, _V], key: _K, value: _V) -> _V:
        if len(known) > _MAX_CACHED:
            known.clear()
        known[key] = value
        return value

    def _opened(self) -> sqlite3.Connection:
        with contextlib.suppress(sqlite3.Error):
            db = self._connect()
            if db.execute("PRAGMA user_version").fetchone()[0] == _FORMAT:
                return db
            db.close()
        return self._begin_anew()

    def _begin_anew(self) -> sqlite3.Connection:
        for end in ("", "-wal", "-shm"):
            self._path.with_name(CATALOG + end).unlink(missing_ok=True)
        db = self._connect()
        db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {_FORMAT}; COMMIT;")
        return db

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # what a power loss takes is taken in again
        return db

    def _known_size(self) -> int:
        """How much of the log is in here; none of it, if it is another log."""
        try:
            size, digest = self._db.execute("SELECT size, hash FROM covered").fetchone()
        except sqlite3.DatabaseError:
            size, digest = -1, b"damaged"
        row = self._record.execute("SELECT hash FROM record WHERE idx = ?", (size - 1,)).fetchone() if size else (b"",)
        if row is not None and row[0] == digest:
            return int(size)
        _log.warning("the catalog is damaged, or of another log; it is made anew", covered=size)
        self._db.close()
        self._db = self._begin_anew()
        return 0

    def _give_up(self, err: Exception) -> None:
        """The catalog cannot be written now, or it is damaged, or the record is: forget what was staged."""
        _log.warning("the catalog cannot be written; it is tried again", reason=str(err))
        self._forget()
        with contextlib.suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        self._is_damaged = isinstance(err, sqlite3.DatabaseError) and not isinstance(err, sqlite3.OperationalError)

    def _start_over(self) -> None:
        self._forget()
        self._db.close()
        self._db = self._begin_anew()
        self._covered, self._is_damaged = 0, False

    def _forget(self) -> None:
        for known in (self._words, self._sorts, self._numbers_by_facts):
            known.clear()
        self._endings = Endings(self._record)
