"""Is the store whole? Every leaf, every chain, and every table beside them held against the leaves. Reads only.

It reads the log in short transactions, so it may run beside a broker. Then SQLite's own check of its pages and indexes, which is one
long read, is left out. Memory grows with the number of workloads and of uses that are open, not with the log.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from keybroker.audit.chain import ChainChecker
from keybroker.audit.checkpoint import Checkpoint
from keybroker.audit.merkle import Frontier
from keybroker.audit.note import Note, NoteError
from keybroker.authority.store import opening
from keybroker.authority.store.faults import name_of
from keybroker.authority.store.fsck_operations import has_tables, rules_of_record, rules_of_tables
from keybroker.authority.store.row import FROM_INDEX, StoredRow
from keybroker.errors import StoreError
from keybroker.model.call import Pending, Signed

MAX_FINDINGS = 100
_PAGE = 1_000  # records in one read transaction
_STRUCTURE_STEPS = 1_000_000  # of SQLite's virtual machine, some 50 ms: how often it looks for a broker


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        index: of the record that it is about; -1 where it is about the database as such.
        rule: a stable name.
        detail: which, where the index does not say it.
    """

    index: int
    rule: str
    detail: str = ""


@dataclass(slots=True)
class Report:
    """What was looked at, and what was found.

    Attributes:
        structure: what SQLite says of its pages and indexes: `ok`, its own words, or `not checked`.
        open_uses: uses without an outcome, with the index of the intent; the next start closes them as `unknown`.
        findings: the first of them: those in the log, as indexes rise, then those in the tables beside it.
        found: how many there are.
    """

    structure: str = "not checked"
    records: int = 0
    trails: int = 0
    open_uses: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    found: int = 0

    @property
    def first_bad(self) -> int | None:
        """The lowest index in the log that is wrong; where the log is whole, the first record that a table contradicts; else None."""
        return next((finding.index for finding in self.findings if finding.index >= 0), None)

    def add(self, finding: Finding) -> None:
        """Count a finding, and keep it if there are not too many."""
        self.found += 1
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)


Progress = Callable[[int, int], None]
"""Told how many records are done, of how many; of 0 while that is not known."""


def check(state: Path, progress: Progress = lambda _done, _of: None) -> Report:
    """Look at everything.

    Raises:
        StoreError: there is no database that can be read at all.
    """
    if not (state / opening.DATABASE).exists():
        msg = f"{state}: no {opening.DATABASE} in it; name the directory that is `authority.state`"
        raise StoreError(msg)
    db = opening.reader(state)
    try:
        return _Examination(db, state, progress).run()
    finally:
        db.close()


class _Examination:
    def __init__(self, db: sqlite3.Connection, state: Path, progress: Progress) -> None:
        self._db = db
        self._state = state
        self._progress = progress
        self._report = Report()
        self._closed = _Closed(db)
        self._checker = ChainChecker(self._closed)
        self._has_operations = has_tables(db)
        self._tree = _Tree(db)
        self._pins: dict[str, tuple[str, int]] = {}  # NAME/VERSION: (SPKI hash, index of the record that pinned it)

    def run(self) -> Report:
        try:
            self._check_structure()
            while self._check_page():
                pass
            self._check_end()
            self._check_idempotency()
            self._check_units()
        except sqlite3.DatabaseError as err:
            self._report.add(Finding(self._checker.size, "cannot-be-read", name_of(err)))
        self._report.records = self._checker.size
        self._report.trails = self._checker.trails
        return self._report

    def _check_structure(self) -> None:
        """SQLite's own check, as long as no broker runs: one that starts meanwhile would have to wait for the end of this read."""
        if self._has_broker():
            return
        self._db.set_progress_handler(self._has_broker, _STRUCTURE_STEPS)
        try:
            said = "; ".join(row[0] for row in self._db.execute("PRAGMA integrity_check(3)"))
        except sqlite3.OperationalError as err:
            if err.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
                raise
            return
        finally:
            self._db.set_progress_handler(None, 0)
        self._report.structure = " ".join(said.split())
        if said != "ok":
            self._report.add(Finding(-1, "damaged-database", self._report.structure))

    def _has_broker(self) -> bool:
        self._progress(0, 0)
        return opening.is_locked(self._state)

    def _check_page(self) -> bool:
        """One page of the log; whether there may be more."""
        rows = self._db.execute(FROM_INDEX, (self._checker.size, _PAGE)).fetchall()
        for row in rows:
            self._check_row(StoredRow(*row))
        of = self._db.execute("SELECT coalesce(max(idx), -1) + 1 FROM record").fetchone()[0]
        self._progress(self._checker.size, of)
        return len(rows) == _PAGE

    def _check_row(self, row: StoredRow) -> None:
        if row.index > self._checker.size:
            self._report.add(Finding(self._checker.size, "missing-record", f"{row.index - self._checker.size} of them"))
            self._checker.size = row.index
            self._tree.is_whole = False
        if not row.is_readable:
            self._report.add(Finding(self._checker.size, "cannot-be-read"))
            self._checker.size += 1
            self._tree.is_whole = False
            return
        self._closed.position = row.index
        seen = self._checker.examine(row.leaf)
        rules = [fault.rule for fault in seen.faults]
        rules += row.rules_broken(seen.record, seen.digest)
        rules += self._key_rules(row.index, seen.record)
        rules += rules_of_record(self._db, row.index, seen.record) if self._has_operations else ()
        rules += self._tree.take(seen.digest, row.kind)
        for rule in dict.fromkeys(rules):
            self._report.add(Finding(row.index, rule))

    def _key_rules(self, index: int, record: dict[str, Any]) -> Iterator[str]:
        """A key version is pinned once, on record, and nothing else is used under its name from then on."""
        key, body = record.get("key"), record.get("body")
        if not isinstance(key, dict) or not key:
            return
        ref, spki = f"{key.get('name')}/{key.get('version')}", str(key.get("spki_sha256"))
        if isinstance(body, dict) and body.get("change") == "key-pinned":
            if ref in self._pins:
                yield "second-pin"
            self._pins.setdefault(ref, (spki, index))
        elif self._pins.get(ref, ("", 0))[0] != spki:
            yield "key-is-not-the-pinned-one"

    def _check_end(self) -> None:
        """What must be seen at one moment: the last records, and the tables that say how the log stands."""
        self._db.execute("BEGIN")
        try:
            while self._check_page():
                pass
            self._check_open_uses(dict(self._db.execute("SELECT use, intent FROM open_use")))
            self._check_pins(self._db.execute("SELECT name, version, spki FROM key_version").fetchall())
            for index, rule, detail in rules_of_tables(self._db) if self._has_operations else ():
                self._report.add(Finding(index, rule, detail))
        finally:
            self._db.execute("COMMIT")

    def _check_open_uses(self, table: dict[str, int]) -> None:
        self._report.open_uses = dict(self._checker.open_uses)
        on_record = self._checker.open_uses
        for use, index in sorted(on_record.items() - table.items()):
            self._report.add(Finding(index, "open-use-not-listed", use))
        for use, index in sorted(table.items() - on_record.items()):
            self._report.add(Finding(index, "open-use-listed-without-open-intent", use))

    def _check_pins(self, table: list[tuple[str, int, bytes]]) -> None:
        for name, version, spki in table:
            ref = f"{name}/{version}"
            pinned, index = self._pins.pop(ref, ("", -1))
            if hashlib.sha256(spki).hexdigest() != pinned:
                self._report.add(Finding(index, "pin-not-on-record" if index < 0 else "pin-changed", ref))
        for ref, (_, index) in self._pins.items():
            self._report.add(Finding(index, "pin-missing", ref))

    def _check_idempotency(self) -> None:
        """Each key names a use on record, and its answer is what that use released."""
        last = b""
        while rows := self._db.execute(_IDEMPOTENCY, (last, _PAGE)).fetchall():
            for _, intent, leaf, answer in rows:
                if intent is None and not self._is_of_operation(answer):
                    self._report.add(Finding(-1, "idempotency-without-intent"))
                elif intent is None:
                    continue
                elif answer is not None and not _is_released(leaf, answer):
                    self._report.add(Finding(intent, "idempotency-answer"))
            last = rows[-1][0]

    def _check_units(self) -> None:
        """The rows of each counter follow each other, in number and in time."""
        if not self._db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'limit_unit'").fetchone():
            return  # a store that a newer version has not opened yet
        before: tuple[bytes, int, int, int] = (b"", 0, 0, 0)
        while rows := self._db.execute(_UNITS, (*before[:2], _PAGE)).fetchall():
            for counter, seq, units, until_us in rows:
                is_next = counter == before[0]
                if units < 1 or seq < units or (is_next and (seq - units < before[1] or until_us < before[3])):
                    self._report.add(Finding(-1, "units-out-of-order", counter.hex()))
                before = (counter, seq, units, until_us)

    def _is_of_operation(self, answer: bytes | None) -> bool:
        """Whether a stored answer is an operation that waits, or waited."""
        try:
            pending = msgspec.msgpack.decode(answer or b"", type=Pending)
        except msgspec.MsgspecError:
            return False
        known = "SELECT 1 FROM operation WHERE id = ?"
        return self._has_operations and self._db.execute(known, (pending.operation,)).fetchone() is not None


_UNITS = "SELECT counter, seq, units, until_us FROM limit_unit WHERE (counter, seq) > (?, ?) ORDER BY counter, seq LIMIT ?"
_IDEMPOTENCY = (
    "SELECT scope, (SELECT idx FROM record WHERE record.use = idempotency.use AND record.use <> '' AND kind = 'intent'),"
    " (SELECT leaf FROM record WHERE record.use = idempotency.use AND record.use <> '' AND kind = 'outcome'), answer"
    " FROM idempotency WHERE scope > ? ORDER BY scope LIMIT ?"
)


def _is_released(leaf: bytes | None, answer: bytes) -> bool:
    """Whether a stored answer is the one that the outcome on record speaks of."""
    if leaf is None:
        return False
    try:
        signed = msgspec.msgpack.decode(answer, type=Signed)
        outcome: dict[str, Any] = msgspec.json.decode(leaf)
    except (msgspec.MsgspecError, UnicodeError):
        return False
    is_signed = outcome.get("outcome") == "signed" and outcome.get("use") == signed.use
    return is_signed and outcome.get("signature_sha256") == hashlib.sha256(signed.signature).hexdigest()


class _Tree:
    """The tree over the leaves that were looked at, compared with what is stored of it.

    Attributes:
        is_whole: no leaf was missing so far; after one, nothing can be said of the tree.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._frontier = Frontier()
        known = {row[0] for row in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        self.is_whole = {"tile_hash", "checkpoint"} <= known  # a copy of an older format has neither

    def take(self, digest: bytes, kind: str) -> Iterator[str]:
        """The next leaf hash, of a record of that kind; what does not agree with the tree up to there."""
        if not self.is_whole:
            return
        for level, index, root in self._frontier.append(digest):
            if self._db.execute("SELECT hash FROM tile_hash WHERE level = ? AND idx = ?", (level, index)).fetchone() != (root,):
                yield "wrong-tile"
        if kind == "heads":
            row = self._db.execute("SELECT note FROM checkpoint WHERE size = ?", (self._frontier.size,)).fetchone()
            if row is not None and not self._is_of(row[0]):
                yield "wrong-checkpoint"

    def _is_of(self, note: bytes) -> bool:
        try:
            head = Checkpoint.parse(Note.parse(note).text)
        except NoteError:
            return False
        return (head.size, head.root) == (self._frontier.size, self._frontier.root())


class _Closed:
    """The uses that have had their outcome, found by the store's own index, so that memory does not grow with the log.

    Attributes:
        position: of the record that is looked at; what comes after it does not count.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.position = 0

    def __contains__(self, use: object) -> bool:
        """Whether the use has an outcome before the position."""
        statement = "SELECT 1 FROM record WHERE use = ? AND use <> '' AND kind = 'outcome' AND idx < ?"
        return self._db.execute(statement, (use, self.position)).fetchone() is not None

    def add(self, use: str) -> None:
        """It is in the index already."""
