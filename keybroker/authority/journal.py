"""Writes the record. Every entry is durable when `await` returns, and requests that wait together share one commit.

An entry fails alone when it is refused before it is written (its generation has passed, its leaf is too large). A commit that
fails refuses the whole group. A store that is broken ends the process: after a failed sync nobody knows what is on disk, and
only a fresh start finds out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from keybroker.audit import leaf as leaves
from keybroker.authority.convoy import Convoy
from keybroker.authority.generation import Generation
from keybroker.authority.store.sqlite import LeafRow, Pin, SqliteStore, StoreBrokenError, TrailHead
from keybroker.clock import Clock, to_rfc3339
from keybroker.errors import AuditUnavailableError, KeyBrokerError
from keybroker.model.record import Draft, KeyFacts, Outcome, RecordKind, TrailFacts

_MAX_TRAIL_HEADS = 65_536
IDEMPOTENCY_US = 24 * 3600 * 1_000_000


class StaleGenerationError(KeyBrokerError):
    """Something that the decision depends on has changed before the intent was written: decide again."""


@dataclass(frozen=True, slots=True)
class Claim:
    """An idempotency key that an intent takes. `scope` and `body_sha256` are SHA-256 digests."""

    scope: bytes
    body_sha256: bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One record to write, with what must become durable together with it.

    Attributes:
        generation: if set, the generation under which the use was decided; another one now refuses the entry.
        claim: with an intent: the idempotency key that it takes; with an outcome: the one that gets `answer`.
        answer: with an outcome: what the same idempotency key gets from now on.
        pin: a key version that is pinned by this record.
    """

    draft: Draft
    generation: int | None = None
    claim: Claim | None = None
    answer: bytes | None = field(default=None, repr=False)
    pin: Pin | None = None


class Journal:
    """The one writer of the log.

    Args:
        store: opened, and used by nobody else from now on.
        on_broken: called from the writing thread when the store is broken; must not return to normal work.
    """

    def __init__(
        self,
        store: SqliteStore,
        clock: Clock,
        log: str,
        generation: Generation,
        on_broken: Callable[[StoreBrokenError], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._log = log
        self._generation = generation
        self._on_broken = on_broken
        tail = store.tail()
        self._size, self._time_us = tail.size, tail.time_us
        self._heads: dict[str, TrailHead] = {}
        self._is_writable = True
        self._owed: list[Entry] = []
        self._convoy = Convoy[Entry, int]("journal", self._commit)

    @property
    def size(self) -> int:
        """Records in the log."""
        return self._size

    @property
    def is_writable(self) -> bool:
        """Whether the last commit succeeded."""
        return self._is_writable

    async def write(self, entry: Entry) -> int:
        """Write one record; its index, once it is durable.

        Raises:
            StaleGenerationError: `entry.generation` has passed; nothing was written.
            AuditUnavailableError: nothing was written.
        """
        return await self._convoy.submit(entry)

    def owe(self, entry: Entry) -> None:
        """An outcome that could not be written when it was due: it goes first in the next commit that succeeds."""
        self._owed.append(entry)

    def close(self) -> None:
        """Finish what is being written, then close the store."""
        self._convoy.close()
        self._store.close()

    async def close_open_uses(self) -> int:
        """Close every intent without an outcome as `unknown`: a crash came between. Called once, before any use. Returns how many."""
        uses = self._store.open_uses()
        for use, leaf in uses:
            intent = leaves.decode(leaf)
            draft = Draft(
                kind=RecordKind.OUTCOME,
                trail=intent["trail"]["id"],
                use=use,
                key=msgspec.convert(intent["key"], KeyFacts) if intent["key"] else None,
                outcome=Outcome.UNKNOWN,
                body={"cause": "restart"},
            )
            await self.write(Entry(draft))
        return len(uses)

    def _commit(self, waiting: list[Entry]) -> list[int | Exception]:
        owed = list(self._owed)
        entries = owed + waiting
        group = _Group(self._size, self._time_us)
        results: list[int | Exception] = []
        try:
            with self._store.transaction():
                results.extend(self._stage(group, entry) for entry in entries)
                self._store.append(group.rows)
                self._apply_effects(entries, results)
        except StoreBrokenError as err:
            self._is_writable = False
            self._on_broken(err)
            raise AuditUnavailableError("The record cannot be written; the broker is restarting.", retry_after=2) from err
        except AuditUnavailableError:
            self._is_writable = False
            raise
        self._is_writable = True
        del self._owed[: len(owed)]
        self._size, self._time_us = group.size, group.time_us
        self._heads.update(group.heads)
        while len(self._heads) > _MAX_TRAIL_HEADS:
            del self._heads[next(iter(self._heads))]
        return results[len(owed) :]

    def _stage(self, group: _Group, entry: Entry) -> int | Exception:
        """Give an entry its place and its bytes, or refuse it alone."""
        if entry.generation is not None and entry.generation != self._generation.number:
            return StaleGenerationError()
        draft = entry.draft
        time_us = max(self._clock.now_us(), group.time_us)  # record time never goes back, whatever the clock does
        head = self._head(group, draft.trail) if draft.trail else None
        try:
            leaf = leaves.encode(
                draft,
                log=self._log,
                index=group.size,
                time=to_rfc3339(time_us),
                salt=os.urandom(16).hex(),
                trail=TrailFacts(draft.trail, head.count, head.head) if head else None,
            )
        except leaves.LeafTooLargeError as err:
            refusal = AuditUnavailableError("This request is too large to be recorded, so it was not done.")
            refusal.__cause__ = err
            return refusal
        digest = leaves.leaf_hash(leaf)
        group.add(_row(draft, group.size, time_us, head, digest, leaf))
        if head:
            group.heads[draft.trail] = TrailHead(head.rowid, head.count + 1, digest.hex())
        return group.size - 1

    def _head(self, group: _Group, trail: str) -> TrailHead:
        return group.heads.get(trail) or self._heads.get(trail) or self._store.trail_head(trail)

    def _apply_effects(self, entries: list[Entry], results: list[int | Exception]) -> None:
        """What must be durable together with a record: the heart of "an intent is the spending"."""
        for entry, index in zip(entries, results, strict=True):
            if isinstance(index, Exception):
                continue
            draft = entry.draft
            if draft.kind is RecordKind.INTENT:
                self._store.open_use(draft.use, index)
                if entry.claim:
                    now_us = self._clock.now_us()
                    self._store.forget_idempotency(now_us - IDEMPOTENCY_US)
                    self._store.claim_idempotency(entry.claim.scope, entry.claim.body_sha256, draft.use, now_us)
            elif draft.kind is RecordKind.OUTCOME:
                self._store.close_use(draft.use)
                if entry.claim and entry.answer is not None:
                    self._store.answer_idempotency(entry.claim.scope, draft.use, entry.answer)
            if entry.pin:
                self._store.pin(entry.pin)


@dataclass(slots=True)
class _Group:
    """What one commit adds: kept apart, so that a failed commit leaves no trace."""

    size: int
    time_us: int
    rows: list[LeafRow] = field(default_factory=list)
    heads: dict[str, TrailHead] = field(default_factory=dict)

    def add(self, row: LeafRow) -> None:
        self.rows.append(row)
        self.size += 1
        self.time_us = row.time_us


def _row(draft: Draft, index: int, time_us: int, head: TrailHead | None, digest: bytes, leaf: bytes) -> LeafRow:
    return LeafRow(
        index=index,
        time_us=time_us,
        kind=draft.kind.value,
        trail=head.rowid if head else None,
        trail_index=head.count if head else None,
        key=draft.key.name if draft.key else "",
        outcome=draft.outcome.value if draft.outcome else "",
        use=draft.use,
        hash=digest,
        leaf=leaf,
    )
