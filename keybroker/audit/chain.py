"""Is this run of leaves whole? Positions, times, per-workload chains and uses, without a broker.

The chains find a changed, missing or inserted record between two that are there. That nothing is missing at the end is what
checkpoints prove, and they are not part of this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from keybroker.audit import leaf as leaves
from keybroker.audit.map import TrailEnd, TrailMap
from keybroker.model.record import RECORD_VERSION, Outcome, RecordKind

_FIELDS = frozenset(leaves.FIELDS)
_KINDS = frozenset(kind.value for kind in RecordKind)
_OUTCOMES = frozenset(outcome.value for outcome in Outcome)


class ClosedUses(Protocol):
    """Which uses have had their outcome: a set in memory will do for a short log, a database for a long one."""

    def __contains__(self, use: object, /) -> bool:
        """Whether the use has had its outcome."""
        ...

    def add(self, use: str, /) -> None:
        """The use has its outcome now."""
        ...


@dataclass(frozen=True, slots=True)
class ChainFault:
    """The first thing that is wrong at one index. `index` is the position that was expected there."""

    index: int
    rule: str


@dataclass(frozen=True, slots=True)
class Examined:
    """A leaf that was looked at: its fields (none if it is not a JSON object), its hash, and what is wrong with it."""

    record: dict[str, Any] = field(repr=False)
    digest: bytes
    faults: list[ChainFault]


@dataclass(slots=True)
class ChainChecker:
    """Takes the leaves of a log one by one, from index 0 on, and says what is wrong with each.

    Memory grows with the number of trails and of open uses, and with `closed` where that is a set.

    Attributes:
        closed: where closed uses are kept.
        size: leaves taken; the next position. Whoever finds a gap moves it on, so that one gap is one fault.
        open_uses: uses with an intent and no outcome yet, with the index of the intent.
    """

    closed: ClosedUses = field(default_factory=set[str])
    size: int = 0
    open_uses: dict[str, int] = field(default_factory=dict)
    _time: str = ""
    _log: str = ""
    _trails: dict[str, tuple[int, str]] = field(default_factory=dict)
    _grown: set[str] = field(default_factory=set)  # trails, since the last `heads` record
    _map: TrailMap = field(default_factory=TrailMap)  # at the last `heads` record

    @property
    def trails(self) -> int:
        """How many workloads have a trail so far."""
        return len(self._trails)

    def take(self, data: bytes) -> list[ChainFault]:
        """Check the next leaf; an empty list means that it follows from those before it."""
        return self.examine(data).faults

    def examine(self, data: bytes) -> Examined:
        """Check the next leaf, and say what it holds."""
        index, digest = self.size, leaves.leaf_hash(data)
        self.size += 1
        try:
            record = leaves.decode(data)
        except ValueError:
            return Examined({}, digest, [ChainFault(index, "not-json")])
        faults = [ChainFault(index, rule) for rule in self._rules(index, data, digest, record)]
        return Examined(record, digest, faults)

    def _rules(self, index: int, data: bytes, digest: bytes, record: dict[str, Any]) -> Iterator[str]:
        if not is_canonical(data, record):
            yield "not-canonical"
        if record.keys() != _FIELDS or record["v"] != RECORD_VERSION:
            yield "unknown-format"
        if record.get("index") != index:
            yield "wrong-index"
        log, time = str(record.get("log")), str(record.get("time"))
        if log != (self._log or log):
            yield "other-log"
        self._log = self._log or log
        if time < self._time:
            yield "time-goes-back"
        self._time = time
        if str(record.get("kind")) not in _KINDS:
            yield "unknown-kind"
        if record.get("kind") == "heads" and record.get("body") != self._heads():
            yield "wrong-heads"
        yield from self._trail_rules(digest, record.get("trail"))
        yield from self._use_rules(index, record)

    def _heads(self) -> dict[str, str | int]:
        """What the body of a `heads` record must be here."""
        self._map = self._map.with_ends(
            {trail: TrailEnd(count, bytes.fromhex(head)) for trail in self._grown for count, head in (self._trails[trail],)}
        )
        self._grown.clear()
        return {"root": self._map.root.hex(), "trails": self._map.trails}

    def _trail_rules(self, digest: bytes, trail: Any) -> Iterator[str]:
        if trail == {}:
            return
        if not isinstance(trail, dict):
            yield "unknown-format"
            return
        name = str(trail.get("id"))
        count, head = self._trails.get(name, (0, ""))
        if trail.get("index") != count:
            yield "trail-index"
        if trail.get("previous") != head:
            yield "trail-previous"
        self._trails[name] = (count + 1, digest.hex())
        self._grown.add(name)

    def _use_rules(self, index: int, record: dict[str, Any]) -> Iterator[str]:
        kind, use, outcome = record.get("kind"), str(record.get("use")), record.get("outcome")
        if kind == "intent":
            if use in self.open_uses or use in self.closed:
                yield "second-intent"
            self.open_uses[use] = index
        elif kind == "outcome":
            if self.open_uses.pop(use, None) is None:
                yield "outcome-without-intent"  # or it had its outcome already
            else:
                self.closed.add(use)
        if (str(outcome) in _OUTCOMES) != (kind == "outcome"):
            yield "wrong-outcome"


def is_canonical(data: bytes, record: dict[str, Any]) -> bool:
    """Whether a leaf's bytes are the one way to write its fields."""
    return leaves.canonical(record) == data


def check(records: Iterable[bytes]) -> list[ChainFault]:
    """Every fault in a whole log, in order."""
    checker = ChainChecker()
    return [fault for record in records for fault in checker.take(record)]
