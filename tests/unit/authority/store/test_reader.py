"""Pages of the log, however filtered, are what looking at every record gives; and no read transaction is long."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keybroker.audit.leaf import decode
from keybroker.authority.store import reader as reading
from keybroker.authority.store.opening import DATABASE
from keybroker.authority.store.reader import Reader, RecordFilter
from keybroker.clock import from_rfc3339
from keybroker.errors import AuditUnavailableError
from tests.clocks import START_US, FixedClock
from tests.unit.authority.store.logs import SIZE, A, B, journal_on, whole, write_whole

FILTERS = [
    RecordFilter(trails=(trail,) if trail else None, key=key, kind=kind, outcome=outcome, use=use, since_us=since, until_us=until)
    for trail, key, kind, outcome, use in [
        ("", "", "", "", ""), (A, "", "", "", ""), (B, "", "", "", ""), ("spiffe://example.org/nobody", "", "", "", ""),
        ("", "orders", "", "", ""), ("", "", "denial", "", ""), ("", "", "", "signed", ""), ("", "", "", "", "use-3"),
        (A, "orders", "intent", "", ""), (B, "", "", "signed", ""), (A, "", "", "", "use-2"), ("", "nothing", "", "", ""),
    ]
    for since, until in [(None, None), (START_US + 2_000_000, None), (None, START_US + 3_000_000), (START_US + 1, START_US + 4_000_001)]
]  # fmt: skip


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    opened = Reader(whole(tmp_path))
    yield opened
    opened.close()


def matches(record: dict[str, Any], wanted: RecordFilter) -> bool:
    """What the filter says, read off the leaf."""
    time_us = from_rfc3339(record["time"])
    return (
        (wanted.trails is None or record["trail"].get("id") in wanted.trails)
        and wanted.key in {"", record["key"].get("name")}
        and wanted.kind in {"", record["kind"]}
        and wanted.outcome in {"", record["outcome"]}
        and wanted.use in {"", record["use"]}
        and (wanted.since_us is None or time_us >= wanted.since_us)
        and (wanted.until_us is None or time_us < wanted.until_us)
        and record["index"] > wanted.after
    )


@pytest.mark.parametrize("window", [1, 3, 1_024])
def test_pages_hold_what_the_filter_says_in_order_whatever_the_windows(
    reader: Reader, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK", window)
    records = [decode(leaf) for leaf in reader.leaves()]
    assert len(records) == SIZE
    for wanted, after, limit in itertools.product(FILTERS, (-1, 4, 13), (1, 3, 100)):
        expected = [record["index"] for record in records if matches(record, replace(wanted, after=after))]
        found: list[int] = []
        last: int | None = after
        while last is not None:
            page = reader.page(replace(wanted, after=last, limit=limit))
            found += [decode(leaf)["index"] for leaf in page.leaves]
            assert len(page.leaves) <= limit
            last = page.last
        assert found == expected, (wanted, after, limit)


def test_page_is_cut_by_size(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_PAGE_BYTES", 2_000)
    page = reader.page(RecordFilter())
    assert sum(map(len, page.leaves)) <= 2_000
    assert page.last == len(page.leaves) - 1
    assert decode(reader.page(RecordFilter(after=page.last)).leaves[0])["index"] == len(page.leaves)


def test_reader_sees_what_was_just_committed_and_holds_nothing_back(tmp_path: Path) -> None:
    async def main() -> None:
        clock = FixedClock()
        async with journal_on(tmp_path, clock) as (journal, store):
            reader = Reader(tmp_path)
            assert reader.page(RecordFilter()).leaves == ()
            await write_whole(journal, clock)
            assert len(reader.page(RecordFilter(limit=5)).leaves) == 5
            busy, in_log, moved = store._db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
            assert (busy, in_log) == (0, moved)  # a reader with an open transaction would be in the way
            reader.close()

    asyncio.run(main())


def test_reader_that_cannot_read_is_an_outage_not_a_fault(tmp_path: Path) -> None:
    reader = Reader(whole(tmp_path))
    reader._db.execute("PRAGMA query_only = OFF")
    other = sqlite3.connect(tmp_path / DATABASE, isolation_level=None)
    other.execute("DROP TABLE idempotency")
    other.close()
    with pytest.raises(AuditUnavailableError) as caught:
        reader.idempotent_use(b"scope")
    assert "idempotency" not in caught.value.detail
    assert reader.outcome_index("use-0") == 3
    assert reader.outcome_index("nobody") == -1
    reader.close()
