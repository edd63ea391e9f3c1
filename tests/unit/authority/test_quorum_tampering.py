"""Whoever can write to the database can hide an operation or end it. He cannot make an approval, or use one for something else."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from keybroker.audit.approval import signed
from keybroker.audit.leaf import canonical
from keybroker.authority.store import fsck
from keybroker.clock import to_rfc3339
from keybroker.errors import ApprovalStaleError, KeyBrokerError, RefusalError
from keybroker.model.call import Pending, Signed
from tests.authorities import Authority
from tests.clocks import START_US
from tests.quorums import IDENTITIES, Quorums, grants, quorum_world

Edit = Callable[[dict[str, Any]], None]


class Intruder:
    """Has the database, and writes to it beside the broker."""

    def __init__(self, world: Quorums) -> None:
        self.db = sqlite3.connect(world.broker.state / "keybroker.db", isolation_level=None, timeout=10)

    def close(self) -> None:
        self.db.close()

    def edit(self, index: int, change: Edit) -> None:
        """Change a record, in the canonical form that a broker would have written."""
        record = self.record(index)
        change(record)
        self.db.execute("UPDATE record SET leaf = ? WHERE idx = ?", (canonical(record), index))

    def record(self, index: int) -> dict[str, Any]:
        (leaf,) = self.db.execute("SELECT leaf FROM record WHERE idx = ?", (index,)).fetchone()
        found: dict[str, Any] = json.loads(leaf)
        return found

    def forge(self, like: int, operation: str, change: Edit) -> None:
        """A record that the log did not have, and an approval that nobody gave."""
        record = self.record(like)
        change(record)
        (size,) = self.db.execute("SELECT max(idx) + 1 FROM record").fetchone()
        index = size + 1_000
        row = (index, START_US, "approval", None, None, "orders", "", "", secrets.token_bytes(32), canonical(record | {"index": index}))
        self.db.execute("INSERT INTO record VALUES (?,?,?,?,?,?,?,?,?,?)", row)
        self.db.execute("INSERT INTO approval VALUES (?, ?)", (index, operation))


def run(directory: Path, test: Callable[[Quorums, Intruder], Awaitable[None]]) -> None:
    async def main() -> None:
        async with quorum_world(directory) as world:
            intruder = Intruder(world)
            try:
                await test(world, intruder)
            finally:
                intruder.close()
            assert world.broker.tokens.signed == 0

    asyncio.run(main())


async def outcome(world: Quorums, operation: str) -> str:
    """How a redemption ends: `signed`, `pending`, or the code of a refusal."""
    try:
        reply = await world.redeem(operation)
    except RefusalError as err:
        return err.code
    return "signed" if isinstance(reply, Signed) else "pending"


def subject_of(record: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = record["body"]["subject"]
    return found


EDITS: dict[str, tuple[Edit, set[str]]] = {
    "another digest": (lambda record: subject_of(record)["tbs"].update(value="ab" * 32), {"pending"}),
    "another reason": (lambda record: subject_of(record).update(reason="harmless"), {"pending"}),
    "another key": (lambda record: subject_of(record)["key"].update(version=2), {"approval-stale"}),
    "another algorithm": (lambda record: subject_of(record).update(algorithm="ES384"), {"approval-stale", "invalid", "denied"}),
    "another workload": (lambda record: subject_of(record).update(workload=IDENTITIES["other-ci"]), {"not-found"}),
    "another decision": (lambda record: subject_of(record).update(decision="ab" * 32), {"approval-stale"}),
    "another log": (lambda record: subject_of(record).update(log="example.org/other"), {"pending"}),
    "a longer life": (lambda record: subject_of(record).update(expires=to_rfc3339(START_US + 10**13)), {"approval-stale"}),
    "fewer approvals": (lambda record: record["body"]["stages"][0].update(approvals=1), {"approval-stale"}),
    "other groups": (lambda record: record["body"]["stages"][0].update(of=["legal"]), {"approval-stale"}),
    "no stages": (lambda record: record["body"].update(stages=[]), {"approval-stale"}),
    "no cool-off": (lambda record: record["body"].update(cool_off_s=5), {"approval-stale"}),
}


@pytest.mark.parametrize("name", EDITS)
def test_operation_that_was_edited_is_not_redeemed(tmp_path: Path, name: str) -> None:
    change, expected = EDITS[name]

    async def test(world: Quorums, intruder: Intruder) -> None:
        operation = await world.ready()
        intruder.edit(0, change)
        assert await outcome(world, operation) in expected

    run(tmp_path, test)


def test_approvals_of_another_operation_do_not_count(tmp_path: Path) -> None:
    async def test(world: Quorums, intruder: Intruder) -> None:
        approved, other = await world.ready(), await world.begin(digest=bytes(32))
        intruder.db.execute("UPDATE approval SET operation = ?", (other,))
        assert await outcome(world, other) == "pending"
        assert all("another-operation" in event for event in await world.events())
        intruder.db.execute("UPDATE approval SET operation = ?", (approved,))
        (record,) = intruder.db.execute("SELECT record FROM operation WHERE id = ?", (other,)).fetchone()
        intruder.db.execute("UPDATE operation SET record = ? WHERE id = ?", (record, approved))  # what was approved is now something else
        assert await outcome(world, approved) == "pending"

    run(tmp_path, test)


def test_one_approval_twice_is_one(tmp_path: Path) -> None:
    async def test(world: Quorums, intruder: Intruder) -> None:
        operation = await world.begin()
        await world.approve(operation, "alice")
        intruder.forge(1, operation, lambda record: record["body"].update(person="bob"))
        assert await outcome(world, operation) == "pending"

    run(tmp_path, test)


def forged(world: Quorums, operation: str, key: Any, chain: tuple[bytes, ...], **changes: Any) -> Edit:
    """An approval in bob's name, signed by somebody else."""

    def change(record: dict[str, Any]) -> None:
        envelope = signed(world.statement(operation, "bob", **changes), key)
        record["approvals"] = [json.loads(envelope)]
        record["body"] |= {"chain": [base64.b64encode(each).decode() for each in chain], "person": "bob"}

    return change


@pytest.mark.parametrize("how", ["with eve's certificate", "with bob's certificate", "with a certificate of an authority of his own"])
def test_approval_that_the_approver_did_not_sign_does_not_count(tmp_path: Path, how: str) -> None:
    async def test(world: Quorums, intruder: Intruder) -> None:
        operation = await world.begin()
        await world.approve(operation, "alice")
        eve, bob = world.issue("eve"), world.issue("bob")
        key: Any = eve.key
        chain = {"with eve's certificate": eve.chain, "with bob's certificate": bob.chain}.get(how)
        if chain is None:
            root, world.root = world.root, Authority(shape=world.root.shape)
            own = world.issue("bob")
            world.root, key, chain = root, own.key, own.chain
        intruder.forge(1, operation, forged(world, operation, key, chain))
        assert await outcome(world, operation) == "pending"
        (event,) = await world.events()
        assert event.endswith(("another-approver", "another-key", "svid-no-path"))

    run(tmp_path, test)


def test_approval_with_a_certificate_that_had_expired_when_it_says_that_it_was_signed_does_not_count(tmp_path: Path) -> None:
    async def test(world: Quorums, intruder: Intruder) -> None:
        stolen = world.issue("bob", minutes=1)
        world.broker.clock.time_us += 10 * 60_000_000
        operation = await world.begin()
        await world.approve(operation, "alice")
        intruder.forge(1, operation, forged(world, operation, stolen.key, stolen.chain))
        assert await outcome(world, operation) == "pending"
        assert (await world.events())[0].endswith("svid-expired")
        backdated = to_rfc3339(START_US)
        intruder.forge(1, operation, forged(world, operation, stolen.key, stolen.chain, issued=backdated))
        assert await outcome(world, operation) == "pending"
        assert (await world.events())[-1].endswith("issued-at-another-time")

    run(tmp_path, test)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"\xff", b'{"approvals":[1],"body":{"chain":["!"]},"time":"x"}'])
def test_record_of_an_approval_that_is_none_does_not_count(tmp_path: Path, damage: bytes) -> None:
    async def test(world: Quorums, intruder: Intruder) -> None:
        operation = await world.ready()
        intruder.db.execute("UPDATE record SET leaf = ? WHERE idx = 1", (damage,))
        assert await outcome(world, operation) == "pending"

    run(tmp_path, test)


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff"])
def test_operation_whose_record_is_damaged_is_not_redeemed(tmp_path: Path, damage: bytes) -> None:
    async def test(world: Quorums, intruder: Intruder) -> None:
        operation = await world.ready()
        intruder.db.execute("UPDATE record SET leaf = ? WHERE idx = 0", (damage,))
        with pytest.raises((KeyBrokerError, ValueError)):
            await world.redeem(operation)

    run(tmp_path, test)


def test_table_that_says_an_expired_operation_has_not_expired_is_not_believed(tmp_path: Path) -> None:
    async def test(world: Quorums, intruder: Intruder) -> None:
        operation = await world.ready()
        world.broker.clock.time_us += 2 * 3600 * 1_000_000
        intruder.db.execute("UPDATE operation SET expires_us = ?", (2**53,))
        assert await outcome(world, operation) == "approval-expired"

    run(tmp_path, test)


def test_rules_of_now_decide_how_many_must_approve(tmp_path: Path) -> None:
    """The twin of the edits: a change of the rules that would make one approval enough does not make an old request ready."""

    async def test(world: Quorums, _intruder: Intruder) -> None:
        operation = await world.begin()
        await world.approve(operation, "alice")
        await world.adopt(grants("{approvals: 1, of: [managers], expires: 1h}"))
        with pytest.raises(ApprovalStaleError):
            await world.redeem(operation)
        assert isinstance(await world.ask(), Pending)

    run(tmp_path, test)


TABLE_EDITS = {
    "DELETE FROM spending": "spending-not-listed",
    "UPDATE operation SET ended = '', use = ''": "operation-end",
    "UPDATE operation SET ended = 'refused' WHERE ended = ''": "operation-end",
    "UPDATE operation SET requester = 'spiffe://example.org/ci/other'": "operation-not-listed",
    "DELETE FROM approval": "approval-not-listed",
    "UPDATE approval SET record = 0 WHERE record = 1": "approval-not-on-record",
    "INSERT INTO spending VALUES ((SELECT id FROM operation WHERE ended = 'refused'), '', 'nobody')": "spending-not-on-record",
    "INSERT INTO operation VALUES ('forged', 'x', 'key', 'orders', 1, 0, 0, '', '')": "operation-not-on-record",
    "DELETE FROM operation WHERE ended = ''": "operation-not-listed",
}


@pytest.mark.parametrize("statement", ["", *TABLE_EDITS])
def test_check_of_the_store_finds_what_was_changed_in_the_tables_of_operations(tmp_path: Path, statement: str) -> None:
    async def main() -> None:
        async with quorum_world(tmp_path) as world:
            done, refused = await world.ready(idempotency_key="k1"), await world.begin()
            await world.redeem(done, idempotency_key="k2")
            await world.approve(refused, "alice", verdict="refuse")
            await world.begin()

    asyncio.run(main())
    if statement:
        db = sqlite3.connect(tmp_path / "state" / "keybroker.db", isolation_level=None)
        assert db.execute(statement).rowcount > 0
        db.close()
    # Nothing pins the key of this broker: its token is a fake.
    found = [finding.rule for finding in fsck.check(tmp_path / "state").findings if not finding.rule.startswith(("pin-", "key-"))]
    assert (TABLE_EDITS[statement] in found) if statement else found == []
