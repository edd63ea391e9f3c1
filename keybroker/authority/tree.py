"""The Merkle tree and the map of trails as the journal keeps them in memory: what the next record is added to.

Each commit works on a copy, so that one that fails leaves no trace.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from keybroker.audit.map import TrailEnd, TrailMap
from keybroker.audit.merkle import Frontier
from keybroker.model.record import Draft, RecordKind


@dataclass(frozen=True, slots=True)
class TreeHead:
    """The log right after a `heads` record: what a checkpoint says, and the map that the record has the root of."""

    size: int
    root: bytes
    trails: TrailMap = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeptCheckpoint:
    """A signed checkpoint to keep: the size that it is for, and the note."""

    size: int
    note: bytes = field(repr=False)


@dataclass(slots=True)
class LogTree:
    """The tree, the map at the last `heads` record, and what has changed since.

    Attributes:
        changed: the ends of the trails that have grown since the map was made.
        head: after the last `heads` record that this process wrote; None before.
    """

    frontier: Frontier
    trails: TrailMap
    changed: dict[str, TrailEnd] = field(default_factory=dict)
    head: TreeHead | None = None

    def stage(self) -> StagedTree:
        """What a commit adds to."""
        return StagedTree(self, self.frontier.copy(), self.trails, self.head)

    def adopt(self, staged: StagedTree) -> None:
        """The commit has succeeded."""
        self.frontier, self.head = staged.frontier, staged.head
        if staged.trails is self.trails:
            self.changed.update(staged.changed)
        else:
            self.trails, self.changed = staged.trails, staged.changed


@dataclass(slots=True)
class StagedTree:
    """The tree with the records of one commit.

    Attributes:
        tiles: roots of tiles that these records fill: level, index, hash.
    """

    before: LogTree
    frontier: Frontier
    trails: TrailMap
    head: TreeHead | None
    changed: dict[str, TrailEnd] = field(default_factory=dict)
    tiles: list[tuple[int, int, bytes]] = field(default_factory=list)

    def drafted(self, draft: Draft) -> Draft:
        """The draft itself; or, of the `heads` record that is written next, with its body."""
        if draft.kind is not RecordKind.HEADS:
            return draft
        earlier = self.before.changed if self.trails is self.before.trails else {}
        self.trails, self.changed = self.trails.with_ends({**earlier, **self.changed}), {}
        return msgspec.structs.replace(draft, body={"root": self.trails.root.hex(), "trails": self.trails.trails})

    def add(self, leaf: bytes, draft: Draft, count: int) -> None:
        """Add a record's leaf hash. It is record number `count` of its trail, from 1, if it is in one."""
        self.tiles += self.frontier.append(leaf)
        if draft.trail:
            self.changed[draft.trail] = TrailEnd(count, leaf)
        if draft.kind is RecordKind.HEADS:
            self.head = TreeHead(self.frontier.size, self.frontier.root(), self.trails)
