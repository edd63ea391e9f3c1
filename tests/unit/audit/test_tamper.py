"""A thousand ways to tamper with a log, found with the first bad record; and the few that chains alone cannot find, by name.

KEYBROKER_TAMPER_MUTATIONS sets how many (1,000 if absent), KEYBROKER_TAMPER_SEED which.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keybroker.audit.chain import ChainChecker, ChainFault, check
from keybroker.audit.leaf import canonical, decode, leaf_hash
from keybroker.errors import NotFoundError, RefusalError
from keybroker.model.call import Explain, Sign
from keybroker.model.decision import NO_GRANT, Verdict
from keybroker.model.key import Algorithm
from keybroker.model.request import SignBody
from tests.brokers import FakeBroker, asker_of, fake_broker, read_leaves, svid_of

MUTATIONS = int(os.environ.get("KEYBROKER_TAMPER_MUTATIONS", "1000"))
SEED = os.environ.get("KEYBROKER_TAMPER_SEED", "a thousand cuts")
WORKLOADS = [f"spiffe://example.org/payments/{name}" for name in ("api", "batch", "refunds", "web")]

Log = list[bytes]
Expected = tuple[int, int]
"""Between which indexes the first fault must be; both included."""
Mutation = Callable[[random.Random, Log], tuple[Log, Expected]]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    """Some hundred records, as a broker writes them: uses that end well and badly, denials, reads, events, a restart."""
    return asyncio.run(_live(tmp_path_factory.mktemp("log"), seed=1))


@pytest.fixture(scope="module")
def other_log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    """Another of the same kind."""
    return asyncio.run(_live(tmp_path_factory.mktemp("other"), seed=2))


async def _live(state: Path, seed: int) -> Log:
    rng = random.Random(seed)
    for _ in range(2):
        async with fake_broker(state) as broker:
            for number in range(60):
                await _do_something(broker, rng, number)
    return read_leaves(state)


async def _do_something(broker: FakeBroker, rng: random.Random, number: int) -> None:
    asker = asker_of(svid_of(rng.choice(WORKLOADS)))
    body = SignBody(algorithm=Algorithm.ES256, message=bytes([number]))
    broker.rules.engine.verdict, broker.rules.engine.reasons, broker.tokens.lies = Verdict.ALLOW, (), False
    match rng.choices(("sign", "deny", "explain", "lie"), (6, 1, 1, 1))[0]:
        case "deny":
            broker.rules.engine.verdict, broker.rules.engine.reasons = Verdict.DENY, (NO_GRANT,)
            with pytest.raises(NotFoundError):
                await broker.service.sign(asker, Sign("orders", body))
        case "explain":
            await broker.service.explain(asker, Explain("orders", body))
        case "lie":
            broker.tokens.lies = True
            with pytest.raises(RefusalError):
                await broker.service.sign(asker, Sign("orders", body))
            await broker.security.flush()
        case _:
            await broker.service.sign(asker, Sign("orders", body))


def first_fault(log: Log) -> ChainFault | None:
    checker = ChainChecker()
    return next((fault for leaf in log for fault in checker.take(leaf)), None)


def trail_of(leaf: bytes) -> str:
    return str(decode(leaf)["trail"].get("id", ""))


def following(log: Log, place: int) -> int | None:
    """The next record of the same trail; None where there is none, or where the record is in no trail."""
    trail = trail_of(log[place])
    return next((later for later in range(place + 1, len(log)) if trail and trail_of(log[later]) == trail), None)


def chained(rng: random.Random, log: Log) -> tuple[int, int]:
    """A record that another one in its trail builds on, and that other one."""
    while True:
        place = rng.randrange(len(log))
        later = following(log, place)
        if later is not None:
            return place, later


def forged(log: Log, trail: str, index: int) -> bytes:
    """A record that fits into the chain of a trail at one place, made without the broker."""
    before = [leaf for leaf in log[:index] if trail_of(leaf) == trail]
    record = decode(before[-1]) | {"index": index, "kind": "read", "use": "", "outcome": "", "time": decode(log[index - 1])["time"]}
    record["trail"] = {"id": trail, "index": len(before), "previous": leaf_hash(before[-1]).hex()}
    return canonical(record)


# What chains find


def edit_byte(rng: random.Random, log: Log) -> tuple[Log, Expected]:
    place, later = chained(rng, log)
    data = bytearray(log[place])
    data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    return [*log[:place], bytes(data), *log[place + 1 :]], (place, later)


def edit_field(rng: random.Random, log: Log) -> tuple[Log, Expected]:
    place, later = chained(rng, log)
    record = decode(log[place])
    name = rng.choice(sorted(record))
    record[name] = _other_value(rng, record[name])
    return [*log[:place], canonical(record), *log[place + 1 :]], (place, later)


def _other_value(rng: random.Random, value: Any) -> Any:
    match value:
        case str():
            return value + rng.choice("0123456789abcdef")
        case int():
            return value + rng.choice((-1, 1))
        case dict() if value:
            name = rng.choice(sorted(value))
            return value | {name: _other_value(rng, value[name])}
        case list() if value:
            return value[:-1]
        case _:
            return {"more": 1} if isinstance(value, dict) else not value if isinstance(value, bool) else ["more"]


def delete_one(rng: random.Random, log: Log) -> tuple[Log, Expected]:
    place = rng.randrange(len(log) - 1)
    return [*log[:place], *log[place + 1 :]], (place, place)


def delete_several(rng: random.Random, log: Log) -> tuple[Log, Expected]:
    start, end = sorted(rng.sample(range(len(log)), 2))
    return [*log[:start], *log[end:]], (start, start)


def swap(rng: random.Random, log: Log) -> tuple[Log, Expected]:
    low, high = sorted(rng.sample(range(len(log)), 2))
    tampered = list(log)
    tampered[low], tampered[high] = tampered[high], tampered[low]
    return tampered, (low, low)


def reorder(rng: random.Random, log: Log) -> tuple[Log, Expected]:
    start = rng.randrange(len(log) - 10)
    window = log[start : start + 10]
    while window == log[start : start + 10]:
        rng.shuffle(window)
    tampered = [*log[:start], *window, *log[start + 10 :]]
    place = next(index for index, leaf in enumerate(tampered) if leaf != log[index])
    return tampered, (place, place)


def duplicate(rng: random.Random, log: Log) -> tuple[Log, Expected]:
    place = rng.randrange(len(log))
    return [*log[: place + 1], *log[place:]], (place + 1, place + 1)


def insert(rng: random.Random, log: Log) -> tuple[Log, Expected]:
    """A forged record that is right in itself: the one that it pushes on gives it away."""
    place = rng.randrange(60, len(log))
    return [*log[:place], forged(log, rng.choice(WORKLOADS), place), *log[place:]], (place + 1, place + 1)


def insert_and_renumber(rng: random.Random, log: Log) -> tuple[Log, Expected]:
    """As above, and every later record moved on: their hashes change, which the next one in each trail shows."""
    place, trail = rng.randrange(60, len(log) - 60), rng.choice(WORKLOADS)
    moved = [canonical(decode(leaf) | {"index": index + place + 1}) for index, leaf in enumerate(log[place:])]
    tampered = [*log[:place], forged(log, trail, place), *moved]
    later = following(tampered, place)
    assert later is not None
    return tampered, (place + 1, later)


def branch(rng: random.Random, log: Log) -> tuple[Log, Expected]:
    """A second successor of a record that has one."""
    place, _ = chained(rng, log)
    trail = decode(log[place])["trail"]
    second = {"id": trail["id"], "index": trail["index"] + 1, "previous": leaf_hash(log[place]).hex()}
    leaf = canonical(decode(forged(log, trail["id"], len(log))) | {"trail": second})
    return [*log, leaf], (len(log), len(log))


MUTANTS: dict[str, Mutation] = {
    each.__name__: each
    for each in (edit_byte, edit_field, delete_one, delete_several, swap, reorder, duplicate, insert, insert_and_renumber, branch)
}


@pytest.mark.case(68)
def test_every_mutation_is_found_at_the_record_that_was_changed_or_at_the_next_one_of_its_trail(log: Log) -> None:
    assert len(log) > 200
    assert check(log) == []
    rng = random.Random(SEED)
    missed: list[str] = []
    done: Counter[str] = Counter()
    for number in range(MUTATIONS):
        name = list(MUTANTS)[number % len(MUTANTS)]
        tampered, (low, high) = MUTANTS[name](rng, log)
        fault = first_fault(tampered)
        done[name] += 1
        if fault is None or not low <= fault.index <= high:
            missed.append(f"{number} {name}: {fault}, expected between {low} and {high}")
    assert missed == []
    assert done.total() == MUTATIONS


@pytest.mark.case(71)
def test_every_single_bit_of_a_chained_record_counts(log: Log) -> None:
    place = next(index for index in range(len(log)) if following(log, index))
    later = following(log, place)
    assert later is not None
    for position in range(len(log[place]) * 8):
        data = bytearray(log[place])
        data[position // 8] ^= 1 << position % 8
        fault = first_fault([*log[:place], bytes(data), *log[place + 1 : later + 1]])
        assert fault is not None
        assert place <= fault.index <= later


# What chains alone do not find: each of these logs follows from its own beginning. A copy of the end of the log (a checkpoint that
# has left the host, an export, a witness) tells them from the true one, and nothing inside the log can.


def rewritten(log: Log, start: int, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Log:
    """From one record on, everything written anew by somebody who can write everything."""
    made: Log = list(log[:start])
    heads: dict[str, str] = {trail_of(leaf): leaf_hash(leaf).hex() for leaf in made}
    for leaf in log[start:]:
        record = decode(leaf)
        if len(made) == start:
            record = change(record)
        name = record["trail"].get("id", "")
        if name:
            record["trail"]["previous"] = heads.get(name, "")
        made.append(canonical(record))
        heads[name] = leaf_hash(made[-1]).hex()
    return made


@pytest.mark.case(68)
def test_truncated_tail_is_not_found_by_chains_alone_because_nothing_in_what_is_left_points_forward(log: Log) -> None:
    rng = random.Random(SEED)
    for _ in range(50):
        assert check(log[: rng.randrange(len(log))]) == []  # yesterday's backup is one of these


@pytest.mark.case(68)
def test_replaced_log_is_not_found_by_chains_alone_because_it_is_as_whole_as_the_true_one(log: Log, other_log: Log) -> None:
    assert other_log != log
    assert check(other_log) == []


@pytest.mark.case(68)
def test_rewritten_end_is_not_found_by_chains_alone_because_whoever_writes_all_of_it_makes_the_hashes_too(log: Log) -> None:
    rng = random.Random(SEED)
    for _ in range(20):
        start = chained(rng, log)[0]
        tampered = rewritten(log, start, lambda record: record | {"salt": "00" * 16})
        assert tampered[start] != log[start]
        assert check(tampered) == []
    assert check(rewritten(log, 0, lambda record: record)) == []


@pytest.mark.case(68)
def test_edited_last_record_of_a_trail_is_not_found_by_chains_alone_because_no_record_holds_its_hash(log: Log) -> None:
    last = [index for index in range(len(log)) if trail_of(log[index]) and following(log, index) is None]
    assert len(last) == len(WORKLOADS)
    for place in last:
        tampered = [*log[:place], canonical(decode(log[place]) | {"salt": "00" * 16}), *log[place + 1 :]]
        assert check(tampered) == []


@pytest.mark.case(68)
def test_edited_record_outside_every_trail_is_not_found_by_chains_alone_because_it_is_in_none_of_them(log: Log) -> None:
    outside = [index for index in range(len(log)) if not trail_of(log[index])]
    assert outside
    for place in outside:
        tampered = [*log[:place], canonical(decode(log[place]) | {"body": {}}), *log[place + 1 :]]
        assert check(tampered) == []


@pytest.mark.case(68)
def test_appended_record_is_not_found_by_chains_alone_because_they_name_no_writer(log: Log) -> None:
    assert check([*log, forged(log, WORKLOADS[0], len(log))]) == []
