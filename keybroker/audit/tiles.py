"""Tiles: a log's hashes and entries cut into files that never change (C2SP tlog-tiles).

A tile of level L holds up to 256 hashes, each the root of a full tile of the level below, or at level 0 a leaf hash. A bundle holds
the leaves themselves, 256 to a full one, each behind its length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from keybroker.audit.merkle import HASH_BYTES, Nodes, root_of

WIDTH = 256
MAX_LEVEL = 63
ENTRIES = -1
"""Stands where a tile has its level, for the bundles of entries: they are as wide as the tiles of level 0."""

MAX_ENTRY_BYTES = 65_535

_HEIGHT = 8
_PATH = re.compile(r"(0|[1-9][0-9]?|entries)/((?:x[0-9]{3}/){0,6}[0-9]{3})(?:\.p/([1-9][0-9]{0,2}))?")


class TileError(ValueError):
    """Not a tile's path, or not what it must hold."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Which tile: level (or `ENTRIES`), index within it, and how many of the 256 places it has."""

    level: int
    index: int
    width: int = WIDTH

    @property
    def start(self) -> int:
        """The first of its places among all of its level."""
        return self.index * WIDTH

    @property
    def path(self) -> str:
        """Where it is found, after `tile/`."""
        digits = str(self.index)
        digits = digits.zfill(-(-len(digits) // 3) * 3)
        parts = [digits[place : place + 3] for place in range(0, len(digits), 3)]
        name = "/".join([*(f"x{part}" for part in parts[:-1]), parts[-1]])
        level = "entries" if self.level == ENTRIES else str(self.level)
        return f"{level}/{name}" + ("" if self.width == WIDTH else f".p/{self.width}")

    @classmethod
    def parse(cls, path: str) -> Tile:
        """A tile from its path.

        Raises:
            TileError: not one.
        """
        match = _PATH.fullmatch(path)
        if match is None:
            raise TileError("a tile's path is LEVEL/INDEX or entries/INDEX, with .p/WIDTH after it for a partial one")
        level, index, width = match.groups()
        tile = cls(
            ENTRIES if level == "entries" else int(level), int(index.replace("x", "").replace("/", "")), int(width) if width else WIDTH
        )
        if tile.level > MAX_LEVEL or tile.path != path:
            raise TileError("not the one way to write this tile's path")
        return tile

    def is_in(self, size: int) -> bool:
        """Whether a log of this size has as many places there, so that this tile can be made."""
        return self.start + self.width <= places(self.level, size)


def places(level: int, size: int) -> int:
    """How many hashes a log of this size has at a tile level; entries are as many as leaves."""
    return size >> _HEIGHT * max(level, 0)


def tiles_of(size: int) -> Iterator[Tile]:
    """Every tile and bundle that a log of this size has, full and partial."""
    level = ENTRIES
    while level < 0 or places(level, size):
        full, rest = divmod(places(level, size), WIDTH)
        yield from (Tile(level, index) for index in range(full))
        if rest:
            yield Tile(level, full, rest)
        level += 1


def hashes_in(data: bytes) -> list[bytes]:
    """The hashes of a tile.

    Raises:
        TileError: not between 1 and 256 of them.
    """
    if not data or len(data) % HASH_BYTES or len(data) > WIDTH * HASH_BYTES:
        raise TileError("a tile is between 1 and 256 hashes of 32 bytes")
    return [data[place : place + HASH_BYTES] for place in range(0, len(data), HASH_BYTES)]


def bundle(entries: Sequence[bytes]) -> bytes:
    """A bundle of up to 256 entries.

    Raises:
        TileError: too many, or one that is too long.
    """
    if not 1 <= len(entries) <= WIDTH or any(len(entry) > MAX_ENTRY_BYTES for entry in entries):
        raise TileError("a bundle is between 1 and 256 entries of at most 65,535 bytes")
    return b"".join(len(entry).to_bytes(2) + entry for entry in entries)


def entries_in(data: bytes) -> list[bytes]:
    """The entries of a bundle.

    Raises:
        TileError: cut short, or not between 1 and 256 of them.
    """
    found, place = list[bytes](), 0
    while place < len(data):
        end = place + 2 + int.from_bytes(data[place : place + 2])
        if place + 2 > len(data) or end > len(data):
            raise TileError("the bundle is cut short")
        found.append(data[place + 2 : end])
        place = end
    if not 1 <= len(found) <= WIDTH:
        raise TileError("a bundle is between 1 and 256 entries")
    return found


def nodes_from(read: Callable[[Tile], Sequence[bytes]], size: int) -> Nodes:
    """The nodes of a log of which only tiles are kept.

    Args:
        read: gives the hashes of a tile, as many as its width says.
        size: of the log; decides how wide the last tiles are.

    The nodes raise TileError where a tile has not what it must hold.
    """
    kept: dict[tuple[int, int], Sequence[bytes]] = {}

    def hashes(level: int, index: int) -> Sequence[bytes]:
        if (level, index) not in kept:
            kept[level, index] = read(Tile(level, index, min(WIDTH, places(level, size) - index * WIDTH)))
        return kept[level, index]

    def node(level: int, index: int) -> bytes:
        tile_level, above = divmod(level, _HEIGHT)
        first = index << above
        found = hashes(tile_level, first // WIDTH)[first % WIDTH : first % WIDTH + (1 << above)]
        if len(found) != 1 << above:
            raise TileError("a tile is shorter than the log's size says")
        return root_of(found)

    return node
