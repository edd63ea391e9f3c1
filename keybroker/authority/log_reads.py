"""What auditors fetch to verify by themselves: checkpoints, proofs, tiles, exports.

Hashes are shown to whoever may read any trail: they say nothing but how long the log is. Records are shown to those who may read them,
and that they were read is on record.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from keybroker.audit.export import CheckpointLine, NextLine, TrailLine, TrailProof, TrailProofLine
from keybroker.audit.leaf import decode, leaf_hash
from keybroker.audit.map import MapProof
from keybroker.audit.merkle import consistency_proof, inclusion_proof
from keybroker.audit.proof import TlogProof
from keybroker.audit.tiles import ENTRIES, WIDTH, Tile, TileError, bundle
from keybroker.authority.checkpoints import Checkpoints
from keybroker.authority.reads import Reads
from keybroker.authority.store.reader import Reader
from keybroker.authority.tree import TreeHead
from keybroker.authority.uses import Asker
from keybroker.errors import AuditUnavailableError, DeniedError, InvalidError, NotFoundError
from keybroker.model.call import ExportLog, LogReply, ProveConsistency, ProveInclusion, ShowCheckpoint, ShowTile

MAX_PAGE_BYTES = 4 * 1024 * 1024
CHECKPOINT_RECORDS = 256
"""An export shows a checkpoint once in so many records, so that it can be said about where something is wrong."""

TEXT, BYTES, JSON, LINES = "text/plain; charset=utf-8", "application/octet-stream", "application/json", "application/x-ndjson"

T = TypeVar("T")
Asked = ShowCheckpoint | ProveInclusion | ProveConsistency | ShowTile | ExportLog


class LogReads:
    """Answers questions about the log.

    Args:
        reads: says who may read what, and notes it.
        checkpoints: the newest; None where the log is not signed.
        reader: used by this object's own thread only.
    """

    def __init__(self, reads: Reads, checkpoints: Checkpoints | None, reader: Reader) -> None:
        self._reads = reads
        self._checkpoints = checkpoints
        self._reader = reader
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log-reader")

    def close(self) -> None:
        """End the reading thread."""
        self._thread.shutdown(wait=True)
        self._reader.close()

    async def answer(self, asker: Asker, ask: Asked) -> LogReply:
        """One answer.

        Raises:
            DeniedError: the caller may not read it.
            NotFoundError: there is no such record, tile or checkpoint.
            InvalidError: no question that can be answered.
            AuditUnavailableError: not now.
        """
        try:
            return await self._answer(asker, ask)
        except TileError as err:
            raise AuditUnavailableError("The tree cannot be read now.", retry_after=1) from err

    async def _answer(self, asker: Asker, ask: Asked) -> LogReply:
        match ask:
            case ShowCheckpoint():
                await self._reads.allowed(asker, "")
                return LogReply(self._signed()[0], TEXT)
            case ProveInclusion():
                return await self._prove_inclusion(asker, ask.index)
            case ProveConsistency():
                await self._reads.allowed(asker, "")
                return await self._prove_consistency(ask.old, ask.size)
            case ShowTile():
                return await self._show_tile(asker, ask.path)
            case ExportLog():
                if ask.start < 0:
                    raise InvalidError("An export begins at a record.", pointers=(("/start", "0 or more"),))
                trail, decision = await self._reads.allowed(asker, ask.workload)
                note, size, head = self._signed()
                await self._reads.note(asker, trail, decision, f"export {ask.start}")
                if trail:
                    return await self._in_thread(self._export_trail, trail, ask.start, note, head)
                return await self._in_thread(self._export, ask.start, note, size)

    def _signed(self) -> tuple[bytes, int, TreeHead | None]:
        """The newest checkpoint, its size, and the map of trails under it if this process has made it."""
        if self._checkpoints is None:
            raise NotFoundError("This log is not signed: `authority.checkpoints` is not configured.")
        note, head = self._checkpoints.latest
        if not note:
            raise AuditUnavailableError("There is no checkpoint yet.", retry_after=1)
        return note, self._checkpoints.size, head

    async def _prove_inclusion(self, asker: Asker, index: int) -> LogReply:
        leaf = await self._in_thread(self._reader.leaf, index)
        trail, _ = await self._reads.allowed(asker, "")
        if leaf is None or (trail and decode(leaf)["trail"].get("id") != trail):
            raise NotFoundError("There is no such record, or it is not yours to read.")
        note, size, _ = self._signed()
        if index >= size:
            raise AuditUnavailableError("There is no checkpoint after that record yet.", retry_after=1)
        hashes = await self._in_thread(lambda: inclusion_proof(index, size, self._reader.nodes(size)))
        return LogReply(bytes(TlogProof(index, tuple(hashes), note)), TEXT)

    async def _prove_consistency(self, old: int, size: int) -> LogReply:
        _, newest, _ = self._signed()
        size = size or newest
        if not 0 <= old <= size <= newest:
            pointers = (("/old", "0 to `size`"), ("/size", f"`old` to {newest}"))
            raise InvalidError("The sizes must rise up to the newest checkpoint.", pointers=pointers)
        hashes = await self._in_thread(lambda: consistency_proof(old, size, self._reader.nodes(size)))
        proof = {"old": old, "size": size, "proof": [base64.b64encode(each).decode() for each in hashes]}
        return LogReply(msgspec.json.encode(proof), JSON)

    async def _show_tile(self, asker: Asker, path: str) -> LogReply:
        try:
            tile = Tile.parse(path)
        except TileError as err:
            raise NotFoundError("There is no such tile.") from err
        trail, decision = await self._reads.allowed(asker, "")
        if trail and tile.level == ENTRIES:
            raise DeniedError("Only those who may read the whole record may read bundles of it.", reasons=decision.reasons)
        if not tile.is_in(self._signed()[1]):
            raise NotFoundError("There is no such tile.")
        if tile.level != ENTRIES:
            return LogReply(b"".join(await self._in_thread(self._reader.hashes, tile)), BYTES)
        await self._reads.note(asker, "", decision, f"export {tile.start}")
        return LogReply(bundle(await self._in_thread(self._reader.leaves_between, tile.start, tile.start + tile.width)), BYTES)

    def _export(self, start: int, note: bytes, size: int) -> LogReply:
        """Lines of the log from a record on: as many as fit, and the checkpoints among them."""
        page, place = _Page(), start
        shown, due = start, dict(self._reader.checkpoints(start, size - 1))
        while place < size and not page.is_full():
            for leaf in self._reader.leaves_between(place, min(place + WIDTH, size)):
                page.add(leaf)
                place += 1
                if place in due and place - shown >= CHECKPOINT_RECORDS and place < size:
                    page.add(_line(CheckpointLine(due[place].decode())))
                    shown = place
                if page.is_full():
                    break
        if place < size:
            page.add(_line(NextLine(place)))
            return LogReply(page.text, LINES)
        page.add(_line(CheckpointLine(note.decode())))
        return LogReply(page.text, LINES)

    def _export_trail(self, trail: str, start: int, note: bytes, head: TreeHead | None) -> LogReply:
        if head is None:
            raise AuditUnavailableError("There is no checkpoint of this process yet.", retry_after=1)
        page, place = _Page(), start
        if not start:
            page.add(_line(TrailLine(trail)))
        while not page.is_full():
            found = self._reader.trail_leaves(trail, place, head.size, WIDTH)
            for leaf in found:
                page.add(leaf)
            place += len(found)
            if len(found) < WIDTH:
                page.add(self._trail_proof(trail, place, note, head))
                return LogReply(page.text, LINES)
        page.add(_line(NextLine(place)))
        return LogReply(page.text, LINES)

    def _trail_proof(self, trail: str, count: int, note: bytes, head: TreeHead) -> bytes:
        proof: MapProof = head.trails.proof(trail)
        end = self._reader.trail_leaves(trail, count - 1, head.size, 1) if count else []
        heads = self._reader.leaf(head.size - 1) or b""
        inclusion = inclusion_proof(head.size - 1, head.size, self._reader.nodes(head.size))
        return _line(
            TrailProofLine(
                TrailProof(
                    trail=trail,
                    count=count,
                    head=leaf_hash(end[0]).hex() if end else "",
                    siblings=tuple(each.hex() for each in proof.siblings),
                    other=tuple(each.hex() for each in proof.other or ()),
                    heads=heads.decode(),
                    inclusion=tuple(each.hex() for each in inclusion),
                    checkpoint=note.decode(),
                )
            )
        )

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)


class _Page:
    """Lines, up to a size."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._size = 0

    def is_full(self) -> bool:
        return self._size >= MAX_PAGE_BYTES

    @property
    def text(self) -> bytes:
        return b"".join(self._lines)

    def add(self, line: bytes) -> None:
        self._lines.append(line + b"\n")
        self._size += len(line) + 1


def _line(value: msgspec.Struct) -> bytes:
    return msgspec.json.encode(value)
