"""One record as it is stored, and whether its columns say what its leaf says: the columns are only there to find it by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from keybroker.clock import to_rfc3339

_YEAR_10000_US = 253_402_300_800_000_000
_SELECT = (
    "SELECT idx, time_us, kind, coalesce(spiffe_id, ''), trail_index, key, outcome, use, hash, leaf"
    " FROM record LEFT JOIN trail ON trail.id = record.trail "
)
FROM_INDEX = _SELECT + "WHERE idx >= ? ORDER BY idx LIMIT ?"
NEWEST = f"SELECT * FROM ({_SELECT} ORDER BY idx DESC LIMIT ?) ORDER BY 1"  # noqa: S608  a constant


@dataclass(frozen=True, slots=True)
class StoredRow:
    """The columns of the statements above, in order. `trail` is the SPIFFE ID, empty where there is none."""

    index: int
    time_us: int
    kind: str
    trail: str
    trail_index: int | None
    key: str
    outcome: str
    use: str
    hash: bytes
    leaf: bytes = field(repr=False)

    @property
    def is_readable(self) -> bool:
        """Whether the columns are of their types: SQLite may read anything out of a damaged page, whatever the schema says."""
        texts: tuple[object, ...] = (self.kind, self.trail, self.key, self.outcome, self.use)
        numbers: tuple[object, ...] = (self.index, self.time_us, self.trail_index or 0)
        blobs: tuple[object, ...] = (self.hash, self.leaf)
        typed = ((texts, str), (numbers, int), (blobs, bytes))
        return all(isinstance(value, kind) for values, kind in typed for value in values)

    def rules_broken(self, record: dict[str, Any], digest: bytes) -> Iterator[str]:
        """What does not agree with the leaf.

        Args:
            record: the leaf's fields.
            digest: the leaf's hash.
        """
        if not 0 <= self.time_us < _YEAR_10000_US:
            yield "column-time"
            return
        if self.hash != digest:
            yield "wrong-hash"
        if not record:
            return
        trail, key = record.get("trail"), record.get("key")
        said = {
            "index": record.get("index") == self.index,
            "time": record.get("time") == to_rfc3339(self.time_us),
            "kind": record.get("kind") == self.kind,
            "trail": (trail.get("id", ""), trail.get("index")) == (self.trail, self.trail_index) if isinstance(trail, dict) else False,
            "key": key.get("name", "") == self.key if isinstance(key, dict) else False,
            "outcome": record.get("outcome") == self.outcome,
            "use": record.get("use") == self.use,
        }
        yield from (f"column-{name}" for name, agrees in said.items() if not agrees)
