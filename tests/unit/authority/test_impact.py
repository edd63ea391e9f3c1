"""What is added up from the catalog and the edges is what counting every record gives."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.record_store import FIRST_US, LOG, YEAR_US, fill
from keybroker.audit.leaf import decode
from keybroker.authority.impact import impact_of
from keybroker.authority.store import catalog as cataloguing
from keybroker.authority.store import reader as reading
from keybroker.authority.store.reader import Reader
from keybroker.clock import from_rfc3339, to_rfc3339
from keybroker.model.impact import Question

COUNT = 3_000


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("record")
    fill(made, COUNT)
    return made


@pytest.fixture(params=["catalog", "no catalog"])
def reader(request: pytest.FixtureRequest, state: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    for module in (cataloguing, reading):
        monkeypatch.setattr(module, "BLOCK", 64)
    opened = Reader(state, catalog=request.param == "catalog")
    while opened.advance():
        pass
    yield opened
    opened.close()
    for path in state.glob("catalog.db*"):
        path.unlink()


@dataclasses.dataclass
class Ended:
    """One use or refusal, read off the whole record."""

    time: str
    index: int
    ending: str
    intent: dict[str, Any]


def endings(reader: Reader) -> list[Ended]:
    intents: dict[str, dict[str, Any]] = {}
    found = []
    for record in map(decode, reader.leaves()):
        if record["kind"] == "intent":
            intents[record["use"]] = record
        elif record["kind"] == "outcome":
            found.append(Ended(record["time"], record["index"], record["outcome"], intents[record["use"]]))
        elif record["kind"] == "denial":
            found.append(Ended(record["time"], record["index"], "refused: denied", record))
    return found


def fits(each: Ended, question: Question) -> bool:
    return (
        question.workload in {"", each.intent["trail"]["id"]}
        and question.key in {"", each.intent["key"]["name"]}
        and question.svid in {"", each.intent["svid"]["serial"]}
        and (not question.since or each.time >= question.since)
        and (not question.until or each.time < question.until)
    )


def questions(all_of_them: list[Ended]) -> Iterator[Question]:
    chance = random.Random(11)
    yield Question(since=to_rfc3339(0))
    for _ in range(60):
        each = chance.choice(all_of_them)
        times = sorted(FIRST_US + chance.randrange(YEAR_US) for _ in range(2))
        if chance.random() < 0.3:  # within an hour
            times = [from_rfc3339(each.time) - chance.randrange(10**9), from_rfc3339(each.time) + chance.randrange(10**9)]
        yield Question(
            workload=each.intent["trail"]["id"] if chance.random() < 0.5 else "",
            key=each.intent["key"]["name"] if chance.random() < 0.3 else "",
            svid=each.intent["svid"]["serial"] if chance.random() < 0.2 else "",
            since=to_rfc3339(times[0]) if chance.random() < 0.6 else "",
            until=to_rfc3339(times[1]) if chance.random() < 0.6 else "",
        )


def test_impact_is_what_counting_every_record_gives(reader: Reader) -> None:
    all_of_them = endings(reader)
    for question in questions(all_of_them):
        found = impact_of(reader, LOG, question)
        expected = [each for each in all_of_them if fits(each, question)]
        assert found.endings == Counter(each.ending for each in expected), question
        assert sum(hour.signed for hour in found.timeline) == found.total.signed == sum(each.ending == "signed" for each in expected)
        assert {(row.key, row.tally.signed) for row in found.keys if row.tally.signed} == set(
            Counter(each.intent["key"]["name"] for each in expected if each.ending == "signed").items()
        )
        if expected:
            assert (found.total.first, found.total.last) == (expected[0].index, expected[-1].index)
            assert (found.total.first_time, found.total.last_time) == (expected[0].time, expected[-1].time)
        assert (found.log, found.records) == (LOG, COUNT)


def test_other_uses_of_the_same_certificates_are_told(reader: Reader) -> None:
    all_of_them = endings(reader)
    key = all_of_them[0].intent["key"]["name"]
    found = impact_of(reader, LOG, Question(key=key))
    serials = {each.intent["svid"]["serial"] for each in all_of_them if each.intent["key"]["name"] == key}
    others = Counter(
        (each.intent["svid"]["serial"], each.intent["key"]["name"])
        for each in all_of_them
        if each.intent["svid"]["serial"] in serials and each.intent["key"]["name"] != key and each.ending == "signed"
    )
    if found.more.get("svids") or len(serials) > 500:
        return
    assert {(row.serial, row.key): row.tally.signed for row in found.elsewhere if row.tally.signed} == others


def test_nothing_is_an_answer_too(reader: Reader) -> None:
    found = impact_of(reader, LOG, Question(workload="spiffe://example.org/nobody"))
    assert (found.total.signed, found.total.first, found.total.first_time, found.keys, found.timeline) == (0, -1, "", (), ())
