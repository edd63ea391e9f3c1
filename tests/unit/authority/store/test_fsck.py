"""A whole store passes; whatever is changed in any table is found, with the first bad index; a broker may run meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import msgspec
import pytest

from keybroker.audit import leaf as leaves
from keybroker.authority.store import fsck, opening
from keybroker.authority.store.opening import DATABASE
from keybroker.errors import StoreError
from tests.clocks import FixedClock
from tests.unit.authority.store.logs import OPEN, SIZE, intent, journal_on, outcome, tampering, whole, write_whole


def rules_at(report: fsck.Report, index: int) -> set[str]:
    return {finding.rule for finding in report.findings if finding.index == index}


def rewrite(state: Path, index: int, changes: dict[str, object]) -> None:
    """Edit a leaf, and hide it as well as somebody with the whole database can without touching any other record."""
    with tampering(state) as db:
        record = leaves.decode(db.execute("SELECT leaf FROM record WHERE idx = ?", (index,)).fetchone()[0])
        data = leaves.canonical(record | changes)
        db.execute("UPDATE record SET leaf = ?, hash = ? WHERE idx = ?", (data, leaves.leaf_hash(data), index))


def test_whole_store_passes_and_lists_what_is_open(tmp_path: Path) -> None:
    report = fsck.check(whole(tmp_path))
    assert report == fsck.Report("ok", SIZE, 2, {OPEN: 13}, [], 0)
    assert report.first_bad is None


@pytest.mark.case(68)
@pytest.mark.parametrize(
    ("statement", "index", "rule"),
    [
        ("UPDATE record SET leaf = CAST(replace(CAST(leaf AS TEXT), 'denied', 'denies') AS BLOB) WHERE idx = 12", 12, "wrong-hash"),
        ("UPDATE record SET leaf = X'7B7D20' WHERE idx = 4", 4, "not-canonical"),
        ("UPDATE record SET leaf = X'5B5D' WHERE idx = 4", 4, "not-json"),
        ("UPDATE record SET hash = zeroblob(32) WHERE idx = 0", 0, "wrong-hash"),
        ("DELETE FROM record WHERE idx = 5", 5, "missing-record"),
        ("DELETE FROM record WHERE idx = 0", 0, "missing-record"),
        ("DELETE FROM record WHERE idx = 13", 13, "open-use-listed-without-open-intent"),
        ("UPDATE record SET idx = 99 WHERE idx = 12", 12, "missing-record"),
        ("UPDATE record SET time_us = time_us + 1 WHERE idx = 6", 6, "column-time"),
        ("UPDATE record SET kind = 'read' WHERE idx = 12", 12, "column-kind"),
        ("UPDATE record SET key = 'other' WHERE idx = 3", 3, "column-key"),
        ("UPDATE record SET outcome = 'failed' WHERE idx = 3", 3, "column-outcome"),
        ("UPDATE record SET use = 'other' WHERE idx = 3", 3, "column-use"),
        ("UPDATE record SET trail_index = 77 WHERE idx = 13", 13, "column-trail"),
        ("UPDATE record SET trail = NULL, trail_index = NULL WHERE idx = 13", 13, "column-trail"),
        ("UPDATE trail SET spiffe_id = 'spiffe://example.org/c' WHERE spiffe_id LIKE '%/b'", 4, "column-trail"),
        ("DELETE FROM open_use", 13, "open-use-not-listed"),
        ("UPDATE open_use SET intent = 2", 13, "open-use-not-listed"),
        ("INSERT INTO open_use VALUES ('use-1', 4)", 4, "open-use-listed-without-open-intent"),
        ("DELETE FROM key_version", 1, "pin-missing"),
        ("UPDATE key_version SET spki = X'00'", 1, "pin-changed"),
        ("INSERT INTO key_version VALUES ('orders', 2, 'ec-p256', X'00', 0)", -1, "pin-not-on-record"),
        ("UPDATE idempotency SET use = 'use-0' WHERE answer IS NOT NULL", 2, "idempotency-answer"),
        ("UPDATE idempotency SET use = 'nobody' WHERE answer IS NULL", -1, "idempotency-without-intent"),
        ("UPDATE idempotency SET answer = X'C0' WHERE answer IS NOT NULL", 4, "idempotency-answer"),
        ("UPDATE idempotency SET answer = X'C0' WHERE use = 'use-open'", 13, "idempotency-answer"),
    ],
)
def test_change_is_found_with_the_first_bad_index(tmp_path: Path, statement: str, index: int, rule: str) -> None:
    with tampering(whole(tmp_path)) as db:
        assert db.execute(statement).rowcount > 0
    report = fsck.check(tmp_path)
    assert report.found
    assert rule in rules_at(report, index)
    assert report.first_bad == (None if index < 0 else index)


@pytest.mark.case(68)
@pytest.mark.parametrize(
    ("index", "changes", "rule"),
    [
        (3, {"outcome": "failed"}, "column-outcome"),
        (4, {"use": "use-0"}, "second-intent"),
        (3, {"use": "nobody"}, "outcome-without-intent"),
        (6, {"time": "2020-01-01T00:00:00.000000Z"}, "time-goes-back"),
        (6, {"index": 7}, "wrong-index"),
        (6, {"log": "example.org/other"}, "other-log"),
        (6, {"extra": 1}, "unknown-format"),
        (6, {"v": 2}, "unknown-format"),
        (6, {"trail": []}, "unknown-format"),
        (6, {"kind": "party"}, "unknown-kind"),
        (12, {"outcome": "signed"}, "wrong-outcome"),
        (6, {"key": {"name": "orders", "version": 1, "spki_sha256": "00"}}, "key-is-not-the-pinned-one"),
        (6, {"key": {"name": ["orders"], "version": {}, "spki_sha256": None}}, "key-is-not-the-pinned-one"),
        (12, {"key": {"name": "orders", "version": 1, "spki_sha256": "00"}, "body": {"change": "key-pinned"}}, "second-pin"),
        (13, {"body": {"request_id": "other"}}, ""),  # the last record: only a checkpoint that left the host could tell
    ],
)
def test_leaf_rewritten_with_its_hash_is_found_at_its_index(tmp_path: Path, index: int, changes: dict[str, object], rule: str) -> None:
    rewrite(whole(tmp_path), index, changes)
    report = fsck.check(tmp_path)
    assert rule in {*rules_at(report, index), ""}
    assert report.first_bad == (index if rule else None)


def test_chain_is_broken_after_a_leaf_rewritten_with_its_hash(tmp_path: Path) -> None:
    rewrite(whole(tmp_path), 2, {"body": {"request_id": "forged"}})
    assert fsck.check(tmp_path).findings == [fsck.Finding(3, "trail-previous")]


@pytest.mark.case(71)
def test_damaged_index_is_found_although_every_record_is_whole(tmp_path: Path) -> None:
    with tampering(whole(tmp_path)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'record_kind'").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with (tmp_path / DATABASE).open("r+b") as file:
        file.seek((root - 1) * size + size - 8)
        file.write(b"\xff" * 4)
    report = fsck.check(tmp_path)
    assert report.structure != "ok"
    assert [finding.rule for finding in report.findings] == ["damaged-database"]
    assert report.first_bad is None


@pytest.mark.case(71)
def test_page_that_cannot_be_read_is_a_finding_not_a_crash(tmp_path: Path) -> None:
    with tampering(whole(tmp_path)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'record'").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with (tmp_path / DATABASE).open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\x00" * size)
    report = fsck.check(tmp_path)
    assert {finding.rule for finding in report.findings} >= {"cannot-be-read"}


def test_store_is_checked_beside_a_running_broker_without_its_long_part(tmp_path: Path) -> None:
    async def main() -> None:
        clock = FixedClock()
        async with journal_on(tmp_path, clock) as (journal, _):
            await write_whole(journal, clock)
            stop = False

            async def load() -> int:
                number = 0
                while not stop:
                    await journal.write(intent(f"more-{number}"))
                    await journal.write(outcome(f"more-{number}"))
                    number += 1
                return number

            loading = asyncio.ensure_future(load())
            for _ in range(5):
                report = await asyncio.to_thread(fsck.check, tmp_path)
                assert (report.structure, report.findings) == ("not checked", [])
                assert OPEN in report.open_uses
            stop = True
            assert await loading > 0

    asyncio.run(main())


def test_long_read_is_given_up_when_a_broker_starts_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsck, "_STRUCTURE_STEPS", 1)
    whole(tmp_path)
    held: list[int] = []

    def start_broker(_done: int, _of: int) -> None:
        if not held:
            held.append(-1)  # the first look: nobody is there
        elif held == [-1]:
            held[0] = opening.lock(tmp_path)

    report = fsck.check(tmp_path, start_broker)
    os.close(held[0])
    assert (report.structure, report.findings, report.records) == ("not checked", [], SIZE)


def test_findings_are_counted_and_only_the_first_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsck, "MAX_FINDINGS", 10)
    with tampering(whole(tmp_path)) as db:
        db.execute("DROP INDEX record_use")
        db.execute("UPDATE record SET hash = zeroblob(32), kind = 'x', use = 'x', outcome = 'x', key = 'x', time_us = 1, trail = NULL")
    report = fsck.check(tmp_path)
    assert report.first_bad == 0
    assert len(report.findings) == 10 < report.found


def test_progress_tells_how_far_it_is(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    fsck.check(whole(tmp_path), lambda done, of: told.append((done, of)))
    assert told[-1] == (SIZE, SIZE)


def test_directory_without_a_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="name the directory"):
        fsck.check(tmp_path)


def test_answer_on_record_is_the_one_that_was_released(tmp_path: Path) -> None:
    with tampering(whole(tmp_path)) as db:
        (answer,) = db.execute("SELECT answer FROM idempotency WHERE use = 'use-1'").fetchone()
        forged = msgspec.msgpack.decode(answer)
        forged[1] = b"another signature"
        db.execute("UPDATE idempotency SET answer = ? WHERE use = 'use-1'", (msgspec.msgpack.encode(forged),))
    assert fsck.check(tmp_path).findings == [fsck.Finding(4, "idempotency-answer")]
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "lock").unlink()
    assert fsck.check(tmp_path).structure == "ok"  # a store that no broker has locked yet


@pytest.mark.parametrize("change", ["units = 0", "units = 3", "seq = seq + 5, units = 7", "until_us = until_us - 100"])
def test_units_of_limits_that_do_not_follow_each_other_are_found(tmp_path: Path, change: str) -> None:
    state = whole(tmp_path)
    with tampering(state) as db:
        db.executemany("INSERT INTO limit_unit VALUES (?, ?, ?, ?)", [(b"c", seq, 1, 1_000 + 50 * seq) for seq in range(4, 8)])
        db.execute("INSERT INTO limit_unit VALUES (?, 1, 1, 1)", (b"d",))
    assert fsck.check(state).found == 0
    with tampering(state) as db:
        db.execute(f"UPDATE limit_unit SET {change} WHERE counter = ? AND seq = 7", (b"c",))  # noqa: S608  ours
    assert [finding.rule for finding in fsck.check(state).findings] == ["units-out-of-order"]


def test_store_of_a_version_that_had_no_limits_passes(tmp_path: Path) -> None:
    state = whole(tmp_path)
    with tampering(state) as db:
        db.execute("DROP TABLE limit_unit")
    assert fsck.check(state).found == 0
