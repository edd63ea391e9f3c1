"""The Merkle tree as it is stored: one hash for each full tile, so that what a record costs does not grow with the log.

The leaf hashes are in the records themselves. Above them, `tile_hash` holds the root of each full tile: level 1 over 256 leaves,
level 2 over 256 of those, and so on. Every other node is made from these when it is asked for.
"""

from __future__ import annotations

import sqlite3

from keybroker.audit.merkle import Nodes, root_of
from keybroker.audit.tiles import WIDTH, Tile, nodes_from, places

_LEAVES = "SELECT hash FROM record WHERE idx >= ? AND idx < ? ORDER BY idx"
_ROOTS = "SELECT hash FROM tile_hash WHERE level = ? AND idx >= ? AND idx < ? ORDER BY idx"


def hashes(db: sqlite3.Connection, tile: Tile) -> list[bytes]:
    """The hashes of a tile, or as many of them as there are.

    Raises:
        sqlite3.Error: it cannot be read.
    """
    span = (tile.start, tile.start + tile.width)
    rows = db.execute(_ROOTS, (tile.level, *span)) if tile.level > 0 else db.execute(_LEAVES, span)
    return [row[0] for row in rows]


def nodes(db: sqlite3.Connection, size: int) -> Nodes:
    """The nodes of the log at a size."""
    return nodes_from(lambda tile: hashes(db, tile), size)


def missing(db: sqlite3.Connection, size: int, limit: int) -> list[tuple[int, int, bytes]]:
    """Roots of full tiles that are not stored yet, lowest level first, at most so many: level, index, hash."""
    level = 0
    while places(level + 1, size):
        there = db.execute("SELECT coalesce(max(idx), -1) + 1 FROM tile_hash WHERE level = ?", (level + 1,)).fetchone()[0]
        wanted = range(there, min(places(level + 1, size), there + limit))
        if wanted:
            return [(level + 1, index, root_of(hashes(db, Tile(level, index, WIDTH)))) for index in wanted]
        level += 1
    return []
