"""Reads the whole record again and again, slowly, so that damage on disk is found while there still is a good copy.

The log is read in tiles of 256 records, from a random one on, so that each is read once in every period as long as the broker runs; each
start begins elsewhere. A tile takes some milliseconds of a thread that nothing waits for.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from keybroker.audit.leaf import leaf_hash
from keybroker.audit.merkle import root_of
from keybroker.audit.tiles import WIDTH, Tile
from keybroker.authority.security_events import SecurityEvents
from keybroker.authority.store.reader import Reader
from keybroker.errors import AuditUnavailableError

_MAX_PAUSE_SECONDS = 60.0

Damage = tuple[int, str]
"""The first record that is meant, and the rule that it breaks."""


class Scrub:
    """Looks for damage.

    Args:
        reader: used by this object's own thread only.
        security: told of damage, each time that it is seen.
        period_s: in so many seconds each record is read once.
    """

    def __init__(self, reader: Reader, security: SecurityEvents, period_s: float) -> None:
        self._reader = reader
        self._security = security
        self._period_s = period_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scrub")
        self._damage: dict[int, str] = {}

    @property
    def trouble(self) -> str:
        """What is damaged, in words; empty if nothing has been seen."""
        if not self._damage:
            return ""
        first = min(self._damage)
        return f"damaged at record {first} ({self._damage[first]}); `keybroker audit check` says what else is"

    def close(self) -> None:
        """End the reading thread."""
        self._thread.shutdown(wait=True)
        self._reader.close()

    async def run(self) -> None:
        """Read on and on, until cancelled."""
        tile = -1
        while True:
            count = -(-await self._tiles() // WIDTH)
            tile = (tile + 1) % count if tile >= 0 and count else secrets.randbelow(max(count, 1))
            await asyncio.sleep(min(self._period_s / max(count, 1), _MAX_PAUSE_SECONDS))
            await self.look(tile)

    async def look(self, tile: int) -> None:
        """Read one tile, and say what is wrong with it."""
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._thread, lambda: list(self._look(tile)))
        except AuditUnavailableError:
            return  # the reader has said so; where it lasts, the next commit fails as well
        for index, rule in found:
            self._damage.setdefault(index, rule)
            self._security.note("record-damaged", f"record {index}: {rule}")

    async def _tiles(self) -> int:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: self._reader.size)
        except AuditUnavailableError:
            return 0

    def _look(self, tile: int) -> Iterator[Damage]:
        start, hashes = tile * WIDTH, list[bytes]()
        end = min(start + WIDTH, self._reader.size)
        for index, leaf, digest in self._reader.leaves_and_hashes(start, end):
            if index != start + len(hashes):
                break
            if leaf_hash(leaf) != digest:
                yield index, "wrong-hash"
                return
            hashes.append(digest)
        if start + len(hashes) < end:
            yield start + len(hashes), "missing-record"
            return
        level, place = 1, tile
        while len(hashes) == WIDTH:
            if self._reader.tile_root(level, place) != root_of(hashes):
                yield start, "wrong-tile"
                return
            if place % WIDTH != WIDTH - 1:  # the tile above is looked at with the last of those below
                return
            level, place = level + 1, place // WIDTH
            hashes = self._reader.hashes(Tile(level - 1, place))
