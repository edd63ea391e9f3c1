"""A state directory with as many records as you like, for measuring what reads them: `python -m bench.record_store DIR COUNT [--seed N]`.

The records are of the kinds, sizes and shapes that a broker writes, chained and hashed, spread over a year: 200 workloads that sign with
40 keys, some far more often than others, a denial now and then, certificates that change every day.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from keybroker.audit import leaf as leaves
from keybroker.audit.leaf import canonical
from keybroker.authority.store.sqlite import LeafRow, SqliteStore
from keybroker.clock import from_rfc3339, to_rfc3339
from keybroker.model.decision import CallerInput, ContentInput, KeyInput, PolicyInput, TargetInput
from keybroker.model.record import Draft, KeyFacts, Outcome, RecordKind, SvidFacts, Tbs, TokenFacts, TrailFacts

LOG = "example.org/broker-1"
FIRST_US = from_rfc3339("2025-11-01T00:00:00Z")
YEAR_US = 365 * 24 * 3600 * 1_000_000
WORKLOADS = 200
KEYS = 40
_PER_COMMIT = 20_000
_DENIALS = 0.02
_DAY_US = 24 * 3600 * 1_000_000


def fill(state: Path, count: int, seed: int = 1) -> None:
    """Write so many records into a new state directory."""
    store = SqliteStore.open(state)
    trails: dict[str, _Trail] = {}
    numbered = enumerate(_drafts(count, random.Random(seed)))  # noqa: S311  records to measure with, the same every time
    while page := list(itertools.islice(numbered, _PER_COMMIT)):
        with store.transaction():
            store.append([_row(store, trails, index, time_us, draft) for index, (time_us, draft) in page])
        store.checkpoint()
    store.close()


@dataclass(slots=True)
class _Trail:
    """A workload's chain: its number in the store, how many records it has, and the hash of the last."""

    rowid: int
    count: int = 0
    head: str = ""


def _row(store: SqliteStore, trails: dict[str, _Trail], index: int, time_us: int, draft: Draft) -> LeafRow:
    trail = trails.get(draft.trail) or trails.setdefault(draft.trail, _Trail(store.trail_head(draft.trail).rowid))
    salt = hashlib.sha256(b"%d" % index).hexdigest()[:32]
    facts = TrailFacts(draft.trail, trail.count, trail.head)
    leaf = leaves.encode(draft, log=LOG, index=index, time=to_rfc3339(time_us), salt=salt, trail=facts)
    digest = leaves.leaf_hash(leaf)
    place, trail.count, trail.head = trail.count, trail.count + 1, digest.hex()
    key = draft.key.name if draft.key else ""
    outcome = draft.outcome.value if draft.outcome else ""
    return LeafRow(index, time_us, draft.kind.value, trail.rowid, place, key, outcome, draft.use, digest, leaf)


def _drafts(count: int, chance: random.Random) -> Iterator[tuple[int, Draft]]:
    """Records with their times, rising; an outcome follows its intent at once."""
    made = 0
    while made < count:
        time_us = FIRST_US + YEAR_US * made // count
        number = min(int(chance.paretovariate(0.7)) - 1, WORKLOADS - 1)
        key = f"key-{(number * 7 + int(chance.expovariate(1.5))) % KEYS}"
        intent = _intent(number, key, time_us, made, chance)
        if chance.random() < _DENIALS:
            denied = canonical({**msgspec.json.decode(intent.decision), "allow": False, "grants": [], "reasons": ["algorithm-not-granted"]})
            body = {**intent.body, "code": "denied", "count": 1}
            yield time_us, msgspec.structs.replace(intent, kind=RecordKind.DENIAL, use="", decision=msgspec.Raw(denied), body=body)
            made += 1
            continue
        yield time_us, intent
        made += 1
        if made < count:
            yield time_us + 900, _outcome(intent, chance)
            made += 1


def _intent(number: int, key: str, time_us: int, made: int, chance: random.Random) -> Draft:
    path = ("team", str(number % 10), f"service-{number}")
    identity = "spiffe://example.org/" + "/".join(path)
    question = PolicyInput(
        caller=CallerInput(identity, "example.org", path, ("office",) if number % 3 else ()),
        operation="sign",
        target=TargetInput("key", key),
        key=KeyInput(key, 1, "ec-p256", {"owner": f"team-{number % 10}"}),
        algorithm="ES256",
        content=ContentInput(
            "message", chance.randrange(20, 2_000), chance.choice(("", "application/jose", "application/vnd.in-toto+json"))
        ),
    )
    decision = {
        "allow": True,
        "engine": "opa-wasm wasmtime/40.0.0",
        "grants": [f"team-{number % 10}-{key}"],
        "obligations": [],
        "policy": hashlib.sha256(b"policy").hexdigest(),
        "reasons": [],
    }
    day = time_us // _DAY_US
    svid = hashlib.sha256(f"{number} {day}".encode()).hexdigest()
    return Draft(
        kind=RecordKind.INTENT,
        trail=identity,
        use=f"01K{made:023d}",
        request=msgspec.Raw(canonical(question)),
        svid=SvidFacts(svid, svid[:32], to_rfc3339((day + 1) * _DAY_US), f"10.0.{number % 10}.{number}"),
        key=KeyFacts(key, 1, hashlib.sha256(key.encode()).hexdigest()),
        tbs=Tbs("sha256", chance.randbytes(32).hex()),
        decision=msgspec.Raw(canonical(decision)),
        body={"request_id": f"01K{made:023d}"},
    )


def _outcome(intent: Draft, chance: random.Random) -> Draft:
    is_signed = chance.random() < 0.999
    return Draft(
        kind=RecordKind.OUTCOME,
        trail=intent.trail,
        use=intent.use,
        key=intent.key,
        outcome=Outcome.SIGNED if is_signed else Outcome.FAILED,
        signature_sha256=chance.randbytes(32).hex() if is_signed else "",
        token=TokenFacts("93b9b1ad5c33d36d", "keybroker-1"),
        body={"cause": "" if is_signed else "CKR_DEVICE_ERROR"},
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.record_store", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("state", type=Path, metavar="DIR", help="the state directory to make")
    parser.add_argument("count", type=int, metavar="COUNT", help="records")
    parser.add_argument("--seed", type=int, default=1)
    words = parser.parse_args()
    fill(words.state, words.count, words.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
