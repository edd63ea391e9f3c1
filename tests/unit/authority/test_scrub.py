"""Damage on disk is found while the broker runs: a flipped bit, a lost record, a tree that does not fit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keybroker.authority import scrub as module
from keybroker.authority.journal import Journal
from keybroker.authority.metrics import AuthorityMetrics
from keybroker.authority.scrub import Scrub
from keybroker.authority.security_events import SecurityEvents
from keybroker.authority.store.reader import Reader
from tests.brokers import read_leaves
from tests.unit.authority.store.logs import A, intent, journal_on, outcome, tampering


async def write_all(journal: Journal) -> None:
    for write in (intent, outcome):
        await asyncio.gather(*(journal.write(write(f"use-{number}", A)) for number in range(300)))


async def look_at_all(state: Path, damage: Callable[[Path], None] = lambda _state: None) -> tuple[str, list[str]]:
    """Write 600 records, damage them, read each once; the scrub's trouble, and the details that are on record."""
    async with journal_on(state) as (journal, _):
        await write_all(journal)
        damage(state)
        security = SecurityEvents(journal, AuthorityMetrics(["orders"]))
        scrub = Scrub(Reader(state), security, 3_600)
        for tile in range(3):
            await scrub.look(tile)
        await security.flush()
        trouble = scrub.trouble
        scrub.close()
    leaves = [leaf for leaf in read_leaves(state) if b'"record-damaged"' in leaf]
    return trouble, [leaf.partition(b'"detail":"')[2].partition(b'"')[0].decode() for leaf in leaves]


def flip(index: int) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        with tampering(state) as db:
            leaf = bytearray(db.execute("SELECT leaf FROM record WHERE idx = ?", (index,)).fetchone()[0])
            leaf[len(leaf) // 2] ^= 4
            db.execute("UPDATE record SET leaf = ? WHERE idx = ?", (bytes(leaf), index))

    return damage


def run(statement: str) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        with tampering(state) as db:
            db.execute("PRAGMA foreign_keys = OFF")
            db.execute(statement)

    return damage


@pytest.mark.case(71)
@pytest.mark.parametrize(
    ("damage", "index", "rule"),
    [
        (flip(0), 0, "wrong-hash"),
        (flip(255), 255, "wrong-hash"),
        (flip(599), 599, "wrong-hash"),
        (run("DELETE FROM record WHERE idx = 300"), 300, "missing-record"),
        (run("UPDATE record SET hash = zeroblob(32) WHERE idx = 7"), 7, "wrong-hash"),
        (run("UPDATE tile_hash SET hash = zeroblob(32) WHERE idx = 1"), 256, "wrong-tile"),
        (run("DELETE FROM tile_hash WHERE idx = 0"), 0, "wrong-tile"),
    ],
)
def test_damage_is_on_record_with_the_record_that_is_meant(tmp_path: Path, damage: Callable[[Path], None], index: int, rule: str) -> None:
    trouble, details = asyncio.run(look_at_all(tmp_path, damage))
    assert f"record {index}: {rule}" in details
    assert f"damaged at record {index} ({rule})" in trouble


def test_nothing_is_said_of_a_log_that_is_whole(tmp_path: Path) -> None:
    assert asyncio.run(look_at_all(tmp_path)) == ("", [])


@contextlib.contextmanager
def counted(reader: Reader, seen: list[int]) -> Iterator[None]:
    read = reader.leaves_and_hashes

    def count(start: int, end: int) -> list[tuple[int, bytes, bytes]]:
        seen.append(start)
        return read(start, end)

    reader.leaves_and_hashes = count  # type: ignore[method-assign]
    yield


@pytest.mark.case(71)
def test_every_record_is_read_once_in_a_period(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_PAUSE_SECONDS", 0.001)
    seen = list[int]()

    async def main() -> None:
        async with journal_on(tmp_path) as (journal, _):
            await write_all(journal)
            reader = Reader(tmp_path)
            with counted(reader, seen):
                scrub = Scrub(reader, SecurityEvents(journal, AuthorityMetrics(["orders"])), 3_600)
                running = asyncio.ensure_future(scrub.run())
                for _ in range(2_000):
                    if len(seen) >= 7:
                        break
                    await asyncio.sleep(0.005)
                running.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await running
                scrub.close()

    asyncio.run(main())
    assert sorted(seen[:3]) == [0, 256, 512]
    assert seen[3:6] == seen[:3]
