"""What the catalog says where to look never leaves out a record, and what it counts is what the record says."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.record_store import fill
from keybroker.audit.leaf import decode
from keybroker.authority.store import catalog as cataloguing
from keybroker.authority.store import opening
from keybroker.authority.store import reader as reading
from keybroker.authority.store.catalog import CATALOG, Catalog
from keybroker.authority.store.reader import Reader, RecordFilter

COUNT = 3_000
BLOCK = 64


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("record")
    fill(made, COUNT)
    return made


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, state: Path) -> Iterator[None]:
    for module in (cataloguing, reading):
        monkeypatch.setattr(module, "BLOCK", BLOCK)
    yield
    for path in state.glob(f"{CATALOG}*"):
        path.unlink()


@pytest.fixture
def reader(state: Path) -> Iterator[Reader]:
    """With a catalog of all but the end of the log."""
    opened = Reader(state, catalog=True)
    while opened.advance():
        pass
    yield opened
    opened.close()


def indexes(reader: Reader, wanted: RecordFilter) -> list[int]:
    found: list[int] = []
    last: int | None = -1
    while last is not None:
        page = reader.page(replace(wanted, after=last))
        found += [decode(leaf)["index"] for leaf in page.leaves]
        last = page.last
    return found


def fits(record: dict[str, Any], wanted: RecordFilter) -> bool:
    """What a filter says, read off the whole record."""
    request, key = record["request"] or {}, record["key"] or {}
    return (
        (wanted.trails is None or record["trail"].get("id") in wanted.trails)
        and wanted.key in {"", key.get("name")}
        and wanted.key_version in {0, key.get("version")}
        and wanted.kind in {"", record["kind"]}
        and wanted.outcome in {"", record["outcome"]}
        and wanted.algorithm in {"", request.get("algorithm", "")}
        and (not wanted.grant or wanted.grant in record["decision"].get("grants", ()))
        and wanted.svid in {"", record["svid"].get("serial")}
        and wanted.address in {"", record["svid"].get("address")}
    )


def filters_of(record: dict[str, Any], chance: random.Random) -> RecordFilter:
    """Some of what a record says."""
    key, svid, request = record["key"] or {}, record["svid"] or {}, record["request"] or {}
    grants = record["decision"].get("grants", ())
    said: dict[str, Any] = {
        "trails": (record["trail"]["id"],),
        "key": key.get("name", ""),
        "kind": record["kind"],
        "outcome": record["outcome"],
        "algorithm": request.get("algorithm", ""),
        "grant": grants[0] if grants else "",
        "svid": svid.get("serial", ""),
        "address": svid.get("address", ""),
    }
    wanted = RecordFilter(limit=chance.choice((1, 7, 1_000)), **{name: said[name] for name in said if chance.random() < 0.35})
    return replace(wanted, key_version=1) if wanted.key and chance.random() < 0.5 else wanted


def test_whatever_is_asked_for_is_found_with_the_catalog_as_without(reader: Reader) -> None:
    assert 0 < COUNT - (reader._catalog.covered if reader._catalog else 0) < BLOCK
    chance = random.Random(7)
    records = [decode(leaf) for leaf in reader.leaves()]
    for _ in range(150):
        wanted = filters_of(chance.choice(records), chance)
        assert indexes(reader, wanted) == [record["index"] for record in records if fits(record, wanted)], wanted


def test_several_workloads_are_found_together_few_or_many(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [decode(leaf) for leaf in reader.leaves()]
    some = tuple(reader.trails()[3:30])
    expected = [record["index"] for record in records if record["trail"]["id"] in some]
    assert indexes(reader, RecordFilter(trails=some)) == expected
    monkeypatch.setattr(cataloguing, "MAX_ALTERNATIVES", 5)
    assert indexes(reader, RecordFilter(trails=some)) == expected
    assert indexes(reader, RecordFilter(trails=())) == []


def test_page_ends_when_its_time_is_up_and_the_next_goes_on(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAGE_SECONDS", 0)
    failed = [decode(leaf)["index"] for leaf in reader.leaves() if decode(leaf)["outcome"] == "failed"]
    page = reader.page(RecordFilter(outcome="failed"))
    assert page.last is not None
    assert indexes(reader, RecordFilter(outcome="failed")) == failed


def test_uses_are_counted_by_how_they_ended_and_refusals_by_how_many(reader: Reader) -> None:
    catalog = reader._catalog
    assert catalog is not None
    expected: Counter[tuple[str, str, str]] = Counter()
    for leaf in reader.leaves()[: catalog.covered]:
        record = decode(leaf)
        if record["kind"] == "outcome":
            expected[record["trail"]["id"], record["key"]["name"], record["outcome"]] += 1
        elif record["kind"] == "denial":
            expected[record["trail"]["id"], record["key"]["name"], "refused: denied"] += record["body"]["count"]
    found: Counter[tuple[str, str, str]] = Counter()
    for each in catalog.counted({}, range(10**6)):
        found[each.use.workload, each.use.key, each.use.ending] += each.times
    assert found == expected


def test_catalog_goes_on_where_it_ended(state: Path, reader: Reader) -> None:
    covered = reader._catalog.covered if reader._catalog else 0
    again = Catalog(state, opening.reader(state))
    assert again.covered == covered > 0
    assert not again.advance()
    again.close()


def test_catalog_of_another_log_is_made_anew(state: Path, reader: Reader, tmp_path: Path) -> None:
    reader.close()
    fill(tmp_path, 2_000, seed=2)
    (tmp_path / CATALOG).write_bytes((state / CATALOG).read_bytes())
    other = Reader(tmp_path, catalog=True)
    assert other._catalog is not None
    assert other._catalog.covered == 0
    records = [decode(leaf) for leaf in other.leaves()]
    while other.advance():
        pass
    wanted = RecordFilter(key=records[5]["key"]["name"])
    assert indexes(other, wanted) == [record["index"] for record in records if fits(record, wanted)]
    other.close()


def test_damaged_catalog_hides_nothing_and_is_made_anew(state: Path, reader: Reader) -> None:
    records = [decode(leaf) for leaf in reader.leaves()]
    wanted = RecordFilter(key=records[5]["key"]["name"])
    expected = [record["index"] for record in records if fits(record, wanted)]
    reader.close()
    path = state / CATALOG
    data = bytearray(path.read_bytes())
    for page in range(1, len(data) // 4096):
        data[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    path.write_bytes(data)
    again = Reader(state, catalog=True)
    assert indexes(again, wanted) == expected
    while again.advance():
        pass
    assert again._catalog is not None
    assert again._catalog.covered > COUNT - BLOCK
    assert indexes(again, wanted) == expected
    again.close()


def test_catalog_that_cannot_be_written_is_tried_again(state: Path) -> None:
    reader = Reader(state, catalog=True)
    other = sqlite3.connect(state / CATALOG, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert reader._catalog is not None
    reader._catalog._db.execute("PRAGMA busy_timeout = 10")
    assert not reader.advance()
    other.execute("ROLLBACK")
    other.close()
    assert reader.advance()
    reader.close()


def test_broker_reads_on_where_there_can_be_no_catalog(state: Path) -> None:
    (state / CATALOG).mkdir()
    try:
        reader = Reader(state, catalog=True)
        assert not reader.advance()
        assert len(reader.page(RecordFilter(limit=9)).leaves) == 9
        reader.close()
    finally:
        (state / CATALOG).rmdir()
