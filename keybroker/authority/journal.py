"""Writes the record. Every entry is durable when `await` returns, and requests that wait together share one commit.

An entry fails alone when it is refused before it is written (its generation has passed, its leaf is too large) or contradicts what
is on record. A commit that fails refuses the whole group, and from then on the journal tries by itself, once a second, until one
succeeds: what is owed goes first, then a record of the outage. A store that is broken ends the process: after a failed sync nobody
knows what is on disk, and only a fresh start finds out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from keybroker.audit import leaf as leaves
from keybroker.audit.map import map_of
from keybroker.audit.merkle import Frontier
from keybroker.authority.convoy import Convoy, ConvoyClosedError
from keybroker.authority.enforcement import Demands, UnmetError, judge
from keybroker.authority.generation import Generation
from keybroker.authority.limits import Limits
from keybroker.authority.spending import Effect
from keybroker.authority.store.faults import StoreBrokenError, StoreConflictError, name_of
from keybroker.authority.store.sqlite import LeafRow, Pin, SqliteStore, TrailHead
from keybroker.authority.timekeeper import ClockRow, Moment, Timekeeper
from keybroker.authority.tree import KeptCheckpoint, LogTree, StagedTree, TreeHead
from keybroker.clock import to_rfc3339
from keybroker.errors import AuditUnavailableError, KeyBrokerError
from keybroker.model.record import Draft, KeyFacts, Outcome, RecordKind, TrailFacts
from keybroker.telemetry import logger

RETRY_SECONDS = 1.0
_MAX_TRAIL_HEADS = 65_536
_SWEEP_US, _SWEEP_ROWS = 5_000_000, 2_000  # some 1 ms of work
IDEMPOTENCY_US = 24 * 3600 * 1_000_000

_log = logger()


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
        claim: with an intent or an operation: the idempotency key that it takes; with an outcome: the one that gets `answer`.
        answer: with an outcome or an operation: what the same idempotency key gets from now on.
        pin: a key version that is pinned by this record.
        demands: with an intent: what must hold at this moment; if something does not, the entry is refused alone.
        effect: what it means for the operation that it is about; judged once more in the transaction, and may refuse the entry.
        also: what else changes in the store with this record; called in the journal's thread, inside the transaction.
    """

    draft: Draft
    generation: int | None = None
    claim: Claim | None = None
    answer: bytes | None = field(default=None, repr=False)
    pin: Pin | None = None
    demands: Demands | None = None
    effect: Effect | None = None
    also: Callable[[sqlite3.Connection], None] | None = None


class Journal:
    """The one writer of the log.

    Args:
        store: opened, and used by nobody else from now on.
        on_broken: called from the writing thread when the store is broken; must not return to normal work.
        on_observed: called from there with what grants that only observe would have refused.
    """

    def __init__(
        self,
        store: SqliteStore,
        log: str,
        generation: Generation,
        timekeeper: Timekeeper,
        on_broken: Callable[[StoreBrokenError], None],
        on_observed: Callable[[tuple[str, ...]], None] = lambda _reasons: None,
    ) -> None:
        self._store = store
        self._limits = Limits(store.units)
        self._timekeeper = timekeeper
        self._on_observed = on_observed
        self._swept_us = 0
        self._log = log
        self._generation = generation
        self._on_broken = on_broken
        tail = store.tail()
        self._size, self._time_us = tail.size, tail.time_us
        self._open_uses = {use for use, _ in store.open_uses()}  # with an intent and no outcome, as the store has them
        self._heads: dict[str, TrailHead] = {}
        self._tree = LogTree(Frontier.of(tail.size, store.nodes(tail.size)), map_of(store.trail_ends()))
        self._halted = ""
        self._is_writable = True
        self._refused, self._why = 0, ""  # entries in the outage that goes on now, and how SQLite calls it
        self._owed: list[Entry] = []
        self._retry: asyncio.TimerHandle | None = None
        self._retrying: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._convoy = Convoy[Entry | KeptCheckpoint | None, int]("journal", self._commit, self._rest)

    @property
    def log(self) -> str:
        """The log's origin."""
        return self._log

    @property
    def size(self) -> int:
        """Records in the log."""
        return self._size

    @property
    def is_writable(self) -> bool:
        """Whether the last commit succeeded."""
        return self._is_writable

    @property
    def head(self) -> TreeHead | None:
        """The log right after the last `heads` record that this process wrote."""
        return self._tree.head

    @property
    def halted(self) -> str:
        """Why no use is allowed any more; empty if it is."""
        return self._halted

    def halt(self, why: str) -> None:
        """From now on write no intent: the record is not the one that was signed for, and an operator must look."""
        if not self._halted:
            _log.critical("nothing is signed any more", reason=why)
        self._halted = why

    async def keep(self, checkpoint: KeptCheckpoint) -> None:
        """Keep a signed checkpoint, durably.

        Raises:
            AuditUnavailableError: it was not kept.
        """
        await self._submit(checkpoint)

    async def write(self, entry: Entry) -> int:
        """Write one record; its index, once it is durable.

        Raises:
            StaleGenerationError: `entry.generation` has passed; nothing was written.
            UnmetError: `entry.demands` do not hold now; nothing was written.
            AuditUnavailableError: nothing was written.
        """
        if self._halted and entry.draft.kind is RecordKind.INTENT:
            raise AuditUnavailableError("The record is not the one that was signed for; nothing is signed before an operator has looked.")
        return await self._submit(entry)

    async def _submit(self, entry: Entry | KeptCheckpoint) -> int:
        try:
            return await self._convoy.submit(entry)
        except ConvoyClosedError as err:
            raise AuditUnavailableError("The broker is stopping; nothing was signed or released.", retry_after=1) from err

    async def tick(self) -> None:
        """Keep what is to be kept though nobody writes: when the clock was last looked at.

        Raises:
            AuditUnavailableError: not now.
        """
        with contextlib.suppress(ConvoyClosedError):
            await self._convoy.submit(None)

    def owe(self, entry: Entry) -> None:
        """An outcome that could not be written when it was due: it goes first in the next commit that succeeds."""
        self._owed.append(entry)
        self._retry_later()

    def close(self) -> None:
        """Finish what is being written and what is owed, then close the store.

        What cannot be written even now is closed as `unknown` at the next start.
        """
        if self._retry is not None:
            self._retry.cancel()
        self._convoy.close()
        with contextlib.suppress(AuditUnavailableError):
            self._commit([None])
        self._store.close()

    async def close_open_uses(self) -> int:
        """Close every intent without an outcome as `unknown`: a crash came between. Called once, before any use. Returns how many."""
        uses = self._store.open_uses()
        await asyncio.gather(*(self.write(Entry(_closing(use, leaf))) for use, leaf in uses))
        return len(uses)

    def _commit(self, waiting: list[Entry | KeptCheckpoint | None]) -> list[int | Exception]:
        """One trip. None stands for nobody: it only takes along what is owed."""
        wanted = [entry for entry in waiting if entry is not None]
        try:
            answers = iter(self._write_with_owed(wanted))
        except AuditUnavailableError:
            self._refused += len(wanted)
            raise
        return [0 if entry is None else next(answers) for entry in waiting]

    def _write_with_owed(self, wanted: list[Entry | KeptCheckpoint]) -> list[int | Exception]:
        owed, outage = list(self._owed), self._outage()
        try:
            results = self._write([*owed, *outage, *wanted])
        except AuditUnavailableError:
            raise
        except Exception:  # noqa: BLE001  one of them cannot be written, ever: find out which
            return self._write_apart([*owed, *outage], wanted)
        del self._owed[: len(owed)]
        return results[len(owed) + len(outage) :]

    def _write(self, entries: Sequence[Entry | KeptCheckpoint]) -> list[int | Exception]:
        """One commit; for each entry its index, or why it alone was refused.

        Raises:
            StoreConflictError: nothing was written, because of one of the entries.
            AuditUnavailableError: nothing was written.
        """
        if not entries and self._timekeeper.due() is None:
            return []
        try:
            with self._store.transaction():
                group = _Group(self._size, self._time_us, self._timekeeper.look(), self._tree.stage())
                results = [self._keep(entry) if isinstance(entry, KeptCheckpoint) else self._stage(group, entry) for entry in entries]
                self._store.append(group.rows, group.opened.items(), group.closed, group.tree.tiles)
                clock = self._keep_house(group.moment)
        except StoreBrokenError as err:
            self._is_writable = False
            self._on_broken(err)
            raise AuditUnavailableError("The record cannot be written; the broker is restarting.", retry_after=2) from err
        except AuditUnavailableError as err:
            self._fail(name_of(err.__cause__ or err))
            raise
        if clock:
            self._timekeeper.saved(clock)
        self._is_writable, self._refused = True, 0
        self._size, self._time_us = group.size, group.time_us
        self._open_uses |= group.opened.keys()
        self._open_uses -= group.closed
        self._tree.adopt(group.tree)
        self._heads.update(group.heads)
        while len(self._heads) > _MAX_TRAIL_HEADS:
            del self._heads[next(iter(self._heads))]
        return results

    def _write_apart(self, owed: list[Entry], wanted: list[Entry | KeptCheckpoint]) -> list[int | Exception]:
        """A commit for each entry, so that the one which cannot be written does not take the others with it."""
        for entry in owed:
            try:
                self._write([entry])
            except AuditUnavailableError:
                raise
            except Exception as err:  # noqa: BLE001  as above; it would be in everybody's way for ever
                _contradiction(entry, err)
            if self._owed and self._owed[0] is entry:
                del self._owed[0]
        results: list[int | Exception] = []
        for each in wanted:
            try:
                results += self._write([each])
            except AuditUnavailableError as err:
                self._refused += 1
                results.append(err)
            except Exception as err:  # noqa: BLE001  as above
                results.append(_contradiction(each, err))
        return results

    def _fail(self, why: str) -> None:
        if self._is_writable:
            _log.error("the record cannot be written", reason=why)
        self._is_writable = False
        self._why = why
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            self._loop.call_soon_threadsafe(self._retry_later)

    def _outage(self) -> list[Entry]:
        """The record of an outage, written when it is over; writing it is also what shows that it is."""
        if not self._refused:
            return []
        body = {"event": "record-not-writable", "detail": self._why, "count": self._refused}
        return [Entry(Draft(kind=RecordKind.SECURITY, body=body))]

    def _retry_later(self) -> None:
        if self._retry is None:
            self._retry = self._loop.call_later(RETRY_SECONDS, self._begin_retry)

    def _begin_retry(self) -> None:
        self._retry = None
        self._retrying = self._loop.create_task(self._try_again())

    async def _try_again(self) -> None:
        with contextlib.suppress(AuditUnavailableError, ConvoyClosedError):
            await self._convoy.submit(None)

    def _rest(self) -> None:
        """After each trip, in its thread."""
        try:
            why = self._store.checkpoint()
        except StoreBrokenError as err:
            self._is_writable = False
            self._on_broken(err)
            return
        if why:
            _log.warning("checkpoint failed; commits go on, and it is tried again later", reason=why)

    def _keep(self, checkpoint: KeptCheckpoint) -> int:
        self._store.keep_checkpoint(checkpoint.size, checkpoint.note)
        return checkpoint.size

    def _stage(self, group: _Group, entry: Entry) -> int | Exception:
        """Give an entry its place and its bytes, with all that becomes durable together with it; or refuse it alone."""
        if entry.generation is not None and entry.generation != self._generation.number:
            return StaleGenerationError()
        draft = group.tree.drafted(entry.draft)
        if draft.kind is RecordKind.OUTCOME and (draft.use not in self._open_uses or draft.use in group.closed):
            return _contradiction(entry, StoreConflictError("the use is not open"))
        time_us = max(group.moment.time_us, group.time_us)  # record time never goes back, whatever the clock does
        refused = entry.effect.refusal(self._store.operations, time_us) if entry.effect else None
        if refused is not None:
            return refused
        judgement = None
        if entry.demands is not None:
            try:
                judgement = judge(entry.demands, self._limits, group.moment, time_us)
            except UnmetError as err:
                return err
            if judgement.units or judgement.observed:
                body = {**draft.body, "observed": judgement.observed}
                draft = msgspec.structs.replace(draft, taken=judgement.taken(), body=body)
                self._on_observed(judgement.observed)
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
        index = group.size
        group.add(_row(draft, index, time_us, head, digest, leaf))
        group.tree.add(digest, draft, head.count + 1 if head else 0)
        if head:
            group.heads[draft.trail] = TrailHead(head.rowid, head.count + 1, digest.hex())
        if judgement is not None:
            self._limits.take(judgement.units, group.moment.steady_us)
        self._apply_effects(group, entry, index)
        return index

    def _keep_house(self, moment: Moment) -> ClockRow | None:
        """What goes along with a commit now and then: the clock, which is returned, and units that nobody needs any more."""
        clock = self._timekeeper.due()
        if clock:
            self._store.save_clock(clock)
        if not moment.distrusted and moment.steady_us - self._swept_us > _SWEEP_US:
            self._swept_us = moment.steady_us
            self._store.units.sweep(moment.steady_us, _SWEEP_ROWS)
        return clock

    def _head(self, group: _Group, trail: str) -> TrailHead:
        return group.heads.get(trail) or self._heads.get(trail) or self._store.trail_head(trail)

    def _apply_effects(self, group: _Group, entry: Entry, index: int) -> None:
        """What must be durable together with a record: the heart of "an intent is the spending"."""
        draft = entry.draft
        if draft.kind is RecordKind.INTENT:
            group.opened[draft.use] = index
            if entry.claim:
                self._claim(entry.claim, draft.use)
        elif draft.kind is RecordKind.OUTCOME:
            group.closed.add(draft.use)
            if entry.claim and entry.answer is not None:
                self._store.answer_idempotency(entry.claim.scope, draft.use, entry.answer)
        elif draft.kind is RecordKind.OPERATION and entry.claim and entry.answer is not None:
            self._claim(entry.claim, draft.operation_id)
            self._store.answer_idempotency(entry.claim.scope, draft.operation_id, entry.answer)
        if entry.effect:
            entry.effect.apply(self._store.operations, index)
        if entry.pin:
            self._store.pin(entry.pin)
        if entry.also:
            self._store.apply(entry.also)

    def _claim(self, claim: Claim, use: str) -> None:
        now_us = self._timekeeper.look().time_us
        self._store.forget_idempotency(now_us - IDEMPOTENCY_US)
        self._store.claim_idempotency(claim.scope, claim.body_sha256, use, now_us)


@dataclass(slots=True)
class _Group:
    """What one commit adds: kept apart, so that a failed commit leaves no trace."""

    size: int
    time_us: int
    moment: Moment
    tree: StagedTree
    rows: list[LeafRow] = field(default_factory=list)
    heads: dict[str, TrailHead] = field(default_factory=dict)
    opened: dict[str, int] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)

    def add(self, row: LeafRow) -> None:
        self.rows.append(row)
        self.size += 1
        self.time_us = row.time_us


def _row(draft: Draft, index: int, time_us: int, head: TrailHead | None, digest: bytes, leaf: bytes) -> LeafRow:
    return LeafRow(
        idx=index,
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


def _contradiction(entry: Entry | KeptCheckpoint, err: Exception) -> AuditUnavailableError:
    rule = str(err) if isinstance(err, StoreConflictError) else type(err).__name__
    kind, use = (entry.draft.kind.value, entry.draft.use) if isinstance(entry, Entry) else ("checkpoint", "")
    _log.error("an entry cannot be written and was refused", kind=kind, use=use, rule=rule)
    refusal = AuditUnavailableError("This contradicts what is on record, so it was not written.")
    refusal.__cause__ = err
    return refusal


def _closing(use: str, leaf: bytes) -> Draft:
    """The outcome of a use that a crash cut off, from the leaf of its intent."""
    intent = leaves.decode(leaf)
    return Draft(
        kind=RecordKind.OUTCOME,
        trail=intent["trail"]["id"],
        use=use,
        key=msgspec.convert(intent["key"], KeyFacts) if intent["key"] else None,
        outcome=Outcome.UNKNOWN,
        body={"cause": "restart"},
    )
