"""A store with a bit of everything in it, written by the journal itself, for tests that damage it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec

from keybroker.authority.generation import Generation
from keybroker.authority.journal import Claim, Entry, Journal
from keybroker.authority.store.faults import StoreBrokenError
from keybroker.authority.store.opening import DATABASE
from keybroker.authority.store.sqlite import Pin, SqliteStore
from keybroker.authority.timekeeper import Timekeeper
from keybroker.model.call import Signed
from keybroker.model.record import Draft, KeyFacts, Outcome, RecordKind
from tests.clocks import START_US, FixedClock

LOG = "example.org/test"
A, B = "spiffe://example.org/a", "spiffe://example.org/b"
SPKI = b"the public key"
KEY = KeyFacts("orders", 1, hashlib.sha256(SPKI).hexdigest())
PIN = Pin("orders", 1, "ec-p256", SPKI, START_US)
SIZE = 14  # records in `whole`
OPEN = "use-open"  # at index 13


def claim_of(number: int) -> Claim:
    return Claim(hashlib.sha256(b"scope %d" % number).digest(), hashlib.sha256(b"body").digest())


def intent(use: str, trail: str = A, claim: Claim | None = None) -> Entry:
    return Entry(Draft(kind=RecordKind.INTENT, trail=trail, use=use, key=KEY), claim=claim)


def outcome(use: str, trail: str = A, claim: Claim | None = None) -> Entry:
    """`signed`; what was signed with is made from the name of the use."""
    signature = use.encode()
    answer = msgspec.msgpack.encode(Signed(signature, "orders", 1, "ES256", use, LOG, 0, 0)) if claim else None
    digest = hashlib.sha256(signature).hexdigest()
    draft = Draft(kind=RecordKind.OUTCOME, trail=trail, use=use, key=KEY, outcome=Outcome.SIGNED, signature_sha256=digest)
    return Entry(draft, claim=claim, answer=answer)


def pinning() -> Entry:
    return Entry(Draft(kind=RecordKind.ADMIN, key=KEY, body={"change": "key-pinned", "token": "t"}), pin=PIN)


@contextlib.asynccontextmanager
async def journal_on(
    state: Path, clock: FixedClock | None = None, on_broken: Callable[[StoreBrokenError], None] = lambda _err: None
) -> AsyncIterator[tuple[Journal, SqliteStore]]:
    """A journal on a state directory, closed when the block is left."""
    store = SqliteStore.open(state)
    clock = clock or FixedClock()
    timekeeper = Timekeeper(clock, store.clock(), store.tail().time_us, 86_400)
    journal = Journal(store, LOG, Generation(), timekeeper, on_broken)
    try:
        yield journal, store
    finally:
        journal.close()
        await asyncio.sleep(0)


async def write_whole(journal: Journal, clock: FixedClock) -> None:
    """0 start, 1 pin, then uses of two workloads (the odd ones with an idempotency key), a denial, and a use that is open."""
    await journal.write(Entry(Draft(kind=RecordKind.START, body={"build": "x"})))
    await journal.write(pinning())
    for number in range(5):
        trail, claim = (A, B)[number % 2], claim_of(number) if number % 2 else None
        clock.time_us += 1_000_000
        await journal.write(intent(f"use-{number}", trail, claim))
        await journal.write(outcome(f"use-{number}", trail, claim))
    await journal.write(Entry(Draft(kind=RecordKind.DENIAL, trail=B, body={"code": "denied"})))
    await journal.write(intent(OPEN, A, claim_of(9)))


def whole(state: Path) -> Path:
    """Write it; the directory."""

    async def main() -> None:
        clock = FixedClock()
        async with journal_on(state, clock) as (journal, _):
            await write_whole(journal, clock)

    asyncio.run(main())
    return state


@contextlib.contextmanager
def tampering(state: Path) -> Iterator[sqlite3.Connection]:
    """The database, for somebody who does not ask the broker."""
    with contextlib.closing(sqlite3.connect(state / DATABASE, isolation_level=None)) as db:
        yield db
