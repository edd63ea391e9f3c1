"""Is this run of leaves whole? Positions, times and per-workload chains, without a broker.

The chains find a changed, missing or inserted record between two that are there. That nothing is missing at the end is what
checkpoints prove, and they are not part of this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from keybroker.audit import leaf as leaves


@dataclass(frozen=True, slots=True)
class ChainFault:
    """The first thing that is wrong at one index. `index` is the position that was expected there."""

    index: int
    rule: str


@dataclass(slots=True)
class ChainChecker:
    """Takes the leaves of a log one by one, from index 0 on, and says what is wrong with each.

    Attributes:
        size: leaves taken.
        open_uses: uses with an intent and no outcome yet, with the index of the intent.
    """

    size: int = 0
    open_uses: dict[str, int] = field(default_factory=dict)
    _time: str = ""
    _log: str = ""
    _trails: dict[str, tuple[int, str]] = field(default_factory=dict)
    _closed: set[str] = field(default_factory=set)

    def take(self, data: bytes) -> list[ChainFault]:
        """Check the next leaf; an empty list means that it follows from those before it."""
        index = self.size
        self.size += 1
        try:
            record = leaves.decode(data)
        except ValueError:
            return [ChainFault(index, "not-json")]
        faults = [ChainFault(index, rule) for rule in self._rules(index, data, record)]
        if isinstance(record.get("time"), str):
            self._time = record["time"]
        return faults

    def _rules(self, index: int, data: bytes, record: dict[str, Any]) -> Iterator[str]:
        if leaves.canonical(record) != data:
            yield "not-canonical"
        if record.get("index") != index:
            yield "wrong-index"
        if record.get("log") != (self._log or record.get("log")):
            yield "other-log"
        self._log = self._log or str(record.get("log"))
        if str(record.get("time")) < self._time:
            yield "time-goes-back"
        yield from self._trail_rules(data, record)
        yield from self._use_rules(index, record)

    def _trail_rules(self, data: bytes, record: dict[str, Any]) -> Iterator[str]:
        trail = record.get("trail")
        if not trail:
            return
        name = str(trail.get("id"))
        count, head = self._trails.get(name, (0, ""))
        if trail.get("index") != count:
            yield "trail-index"
        if trail.get("previous") != head:
            yield "trail-previous"
        self._trails[name] = (count + 1, leaves.leaf_hash(data).hex())

    def _use_rules(self, index: int, record: dict[str, Any]) -> Iterator[str]:
        use = str(record.get("use"))
        if record.get("kind") == "intent":
            if use in self.open_uses or use in self._closed:
                yield "second-intent"
            self.open_uses[use] = index
        elif record.get("kind") == "outcome":
            if self.open_uses.pop(use, None) is None:
                yield "outcome-without-intent"
            self._closed.add(use)


def check(records: Iterable[bytes]) -> list[ChainFault]:
    """Every fault in a whole log, in order."""
    checker = ChainChecker()
    return [fault for record in records for fault in checker.take(record)]
