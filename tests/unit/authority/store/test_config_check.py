"""`keybroker check` on the store: what would keep a broker from starting, said without starting one."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from keybroker.authority.check import _of_store
from keybroker.authority.store.opening import DATABASE
from tests.unit.authority.store.logs import intent, journal_on, tampering, whole


def test_nothing_is_wrong_before_the_first_start_or_with_a_whole_store(tmp_path: Path) -> None:
    assert list(_of_store(tmp_path / "not" / "made" / "yet")) == []
    assert list(_of_store(whole(tmp_path))) == []


@pytest.mark.case(61)
def test_store_that_no_broker_would_take_is_named_with_its_cure(tmp_path: Path) -> None:
    (newer, other) = (whole(tmp_path / name) for name in ("newer", "other"))
    with tampering(newer) as db:
        db.execute("PRAGMA user_version = 999")
    (other / DATABASE).write_bytes(b"something else, long enough to be sure of it" * 100)
    assert "upgrade this host" in "".join(_of_store(newer))
    assert "restore it" in "".join(_of_store(other))


@pytest.mark.case(71)
def test_damaged_page_is_found_at_rest(tmp_path: Path) -> None:
    with tampering(whole(tmp_path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'record_kind'").fetchone()
    with (tmp_path / DATABASE).open("r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(os.urandom(64))
    (problem,) = _of_store(tmp_path)
    assert "damaged" in problem


def test_store_in_use_is_left_to_its_broker(tmp_path: Path) -> None:
    async def main() -> None:
        async with journal_on(tmp_path) as (journal, _):
            await journal.write(intent("u"))
            assert list(_of_store(tmp_path)) == []

    asyncio.run(main())


@pytest.mark.case(39)
def test_clock_that_is_distrusted_is_a_problem_with_its_cure(tmp_path: Path) -> None:
    with tampering(whole(tmp_path)) as db:
        db.execute("UPDATE clock SET distrusted = ?", ("01ARZ3NDEKTSV4RRFFQ69G5FAV the clock was set back by 3600 s",))
    (problem,) = _of_store(tmp_path)
    assert (
        problem == f"{tmp_path}: the clock was set back by 3600 s; set it right, and run `keybroker clock acknowledge --state {tmp_path}`"
    )
