"""A whole log passes; every way to change one in between is found, with the first bad index."""

from __future__ import annotations

import random

import msgspec
import pytest

from keybroker.audit import leaf as leaves
from keybroker.audit.chain import ChainChecker, check
from keybroker.model.record import Draft, Outcome, RecordKind, TrailFacts

TRAILS = ("spiffe://example.org/a", "spiffe://example.org/b")


def log_of(uses: int) -> list[bytes]:
    """Intents and outcomes of two workloads, interleaved."""
    heads = dict.fromkeys(TRAILS, (0, ""))
    records: list[bytes] = []
    for number in range(uses):
        for kind, outcome in ((RecordKind.INTENT, None), (RecordKind.OUTCOME, Outcome.SIGNED)):
            name = TRAILS[number % 2]
            count, head = heads[name]
            data = leaves.encode(
                Draft(kind=kind, trail=name, use=f"use-{number}", outcome=outcome),
                log="example.org/test",
                index=len(records),
                time=f"2026-11-24T08:00:{number:02}.000000Z",
                salt="00" * 16,
                trail=TrailFacts(name, count, head),
            )
            heads[name] = (count + 1, leaves.leaf_hash(data).hex())
            records.append(data)
    return records


def edited(data: bytes, **changes: object) -> bytes:
    return leaves.canonical(leaves.decode(data) | changes)


def test_whole_log_has_no_fault() -> None:
    assert check(log_of(20)) == []


def test_open_use_is_listed_while_its_outcome_is_missing() -> None:
    checker = ChainChecker()
    records = log_of(2)
    for record in records[:3]:
        assert checker.take(record) == []
    assert checker.open_uses == {"use-1": 2}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"index": 99}, "wrong-index"),
        ({"log": "example.org/other"}, "other-log"),
        ({"time": "2020-01-01T00:00:00.000000Z"}, "time-goes-back"),
        ({"use": "use-0", "kind": "intent"}, "second-intent"),
        ({"use": "nobody", "kind": "outcome"}, "outcome-without-intent"),
        ({"trail": {"id": TRAILS[0], "index": 9, "previous": ""}}, "trail-index"),
        ({"trail": {"id": TRAILS[0], "index": 2, "previous": "00"}}, "trail-previous"),
    ],
)
def test_edited_record_is_found_with_its_rule(change: dict[str, object], rule: str) -> None:
    records = log_of(6)
    records[4] = edited(records[4], **change)
    assert rule in {fault.rule for fault in check(records) if fault.index == 4}


def test_reformatted_record_is_found() -> None:
    records = log_of(3)
    records[2] = msgspec.json.format(records[2])
    assert check(records)[0].rule == "not-canonical"


def test_every_deleted_swapped_or_repeated_record_is_found_at_the_first_bad_index() -> None:
    rng = random.Random(7)
    for _ in range(200):
        records = log_of(12)
        place = rng.randrange(len(records) - 1)
        match rng.randrange(3):
            case 0:
                del records[place]
            case 1:
                records[place], records[place + 1] = records[place + 1], records[place]
            case _:
                records.insert(place, records[place])
                place += 1
        assert check(records)[0].index == place
