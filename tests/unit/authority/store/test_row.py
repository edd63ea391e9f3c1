"""A row that no schema would let in, as a damaged page may show one, is a finding and never a crash."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from keybroker.audit.leaf import leaf_hash
from keybroker.authority.store import fsck
from keybroker.authority.store.row import StoredRow
from keybroker.authority.store.sqlite import SqliteStore
from keybroker.errors import StoreError
from tests.unit.authority.store.logs import tampering, whole

ROW = StoredRow(0, 0, "read", "", None, "", "", "", leaf_hash(b"{}"), b"{}")


@pytest.mark.parametrize(
    "change", [{"leaf": None}, {"hash": "text"}, {"time_us": None}, {"kind": b"read"}, {"trail_index": "1"}, {"use": 7}]
)
def test_row_of_other_types_is_not_readable(change: dict[str, object]) -> None:
    assert ROW.is_readable
    assert not replace(ROW, **change).is_readable  # type: ignore[arg-type]  # what a damaged page may hold


@pytest.mark.parametrize("time_us", [-1, 2**62])
def test_time_that_no_leaf_can_say_is_not_the_leafs(time_us: int) -> None:
    row = replace(ROW, time_us=time_us)
    assert list(row.rules_broken({"time": "1970-01-01T00:00:00.000000Z"}, ROW.hash)) == ["column-time"]


@pytest.mark.case(71)
def test_unreadable_row_is_found_by_the_check_and_keeps_a_broker_from_starting(tmp_path: Path) -> None:
    with tampering(whole(tmp_path)) as db:
        db.executescript(
            "BEGIN; CREATE TABLE copy (idx INTEGER PRIMARY KEY, time_us, kind, trail, trail_index, key, outcome, use, hash, leaf);"
            "INSERT INTO copy SELECT * FROM record; DROP TABLE record; ALTER TABLE copy RENAME TO record;"
            "UPDATE record SET leaf = NULL WHERE idx = 12; COMMIT"
        )
    report = fsck.check(tmp_path)
    assert report.first_bad == 12
    assert report.findings[0] == fsck.Finding(12, "cannot-be-read")
    with pytest.raises(StoreError, match=r"index 12 \(cannot-be-read\)"):
        SqliteStore.open(tmp_path)
