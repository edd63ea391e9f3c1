"""Operations as people see and wait for them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from keybroker.authority import changes
from keybroker.authority.changes import Changes
from keybroker.errors import OverloadedError, PolicyFailedError, RateLimitedError, SvidInvalidError
from keybroker.model.call import Approve, ListOperations, OperationsReply, ShowOperation
from keybroker.model.decision import Verdict
from tests.quorums import HOUR_US, IDENTITIES, PEOPLE, Quorums, grants
from tests.unit.authority.test_quorum import run


async def listed(world: Quorums, name: str, **changes: object) -> OperationsReply:
    return await world.broker.operations.list_operations(world.asker(name), ListOperations(**changes))  # type: ignore[arg-type]  # by name


async def ids(world: Quorums, name: str, **changes: object) -> list[str]:
    return [each.id for each in (await listed(world, name, **changes)).operations]


def test_list_holds_what_one_asked_for_or_may_approve_and_nothing_else(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        first = await world.begin()
        world.broker.clock.time_us += 1_000
        second = await world.begin("other-ci")
        assert await ids(world, "alice") == [second, first]
        assert await ids(world, "ci") == [first]
        assert await ids(world, "eve") == await ids(world, "dora") == []
        assert world.of_kind("denial") == []  # looking is no offence

    run(tmp_path, test, grants(workloads='"spiffe://example.org/ci/*"'))


def test_list_keeps_one_state_and_a_number(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        made = []
        for _ in range(4):
            world.broker.clock.time_us += 1_000
            made.append(await world.begin())
        pending, ready, done, refused = made
        await world.approve(ready, "alice", "bob")
        await world.approve(done, "alice", "bob")
        await world.redeem(done)
        await world.approve(refused, "carol", verdict="refuse")
        for state, operation in (("pending", pending), ("ready", ready), ("redeemed", done), ("refused", refused)):
            assert await ids(world, "alice", state=state) == [operation]
        assert await ids(world, "alice", limit=2) == [refused, done]
        world.broker.clock.time_us += HOUR_US
        assert await ids(world, "ci", state="expired") == [ready, pending]
        assert await ids(world, "ci", state="pending") == []

    run(tmp_path, test)


def test_mark_changes_with_every_change_and_with_nothing_else(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        marks = [(await listed(world, "alice")).mark]
        operation = await world.begin()
        marks.append((await listed(world, "alice")).mark)
        await world.approve(operation, "bob")
        marks.append((await listed(world, "alice")).mark)
        await world.approve(operation, "bob")
        assert (await listed(world, "alice")).mark == marks[-1]
        await world.approve(operation, "alice")
        marks.append((await listed(world, "alice")).mark)
        await world.redeem(operation)
        marks.append((await listed(world, "alice")).mark)
        assert len(set(marks)) == len(marks)
        assert (await listed(world, "alice")).mark == marks[-1]

    run(tmp_path, test)


def test_who_waits_for_a_list_hears_of_the_next_change(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        mark = (await listed(world, "alice")).mark
        waiting = asyncio.ensure_future(listed(world, "alice", wait_s=30, mark=mark))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        operation = await world.begin()
        assert [each.id for each in (await asyncio.wait_for(waiting, 10)).operations] == [operation]
        assert (await listed(world, "alice", wait_s=30, mark=mark)).operations  # at once: it is another list already
        assert world.broker.quorum.changes.waiters == 0

    run(tmp_path, test)


def test_who_waits_for_an_operation_hears_when_it_is_ready_refused_or_the_time_is_over(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        asker = world.asker("ci")
        for verdict, state in (("approve", "ready"), ("refuse", "refused")):
            operation = await world.begin()
            waiting = asyncio.ensure_future(world.broker.operations.show(asker, ShowOperation(operation, 30)))
            await asyncio.sleep(0.05)
            await world.approve(operation, "alice")
            await asyncio.sleep(0.05)
            assert not waiting.done()
            await world.approve(operation, "bob", verdict=verdict)
            assert (await asyncio.wait_for(waiting, 10)).state == state
        operation = await world.begin()
        assert (await world.broker.operations.show(asker, ShowOperation(operation, 1))).state == "pending"

    run(tmp_path, test)


@pytest.mark.case(8)
def test_who_waits_is_judged_again_before_he_is_told(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.begin()
        asker = world.asker("alice")
        waiting = asyncio.ensure_future(world.broker.operations.show(asker, ShowOperation(operation, 30)))
        await asyncio.sleep(0.05)
        world.deny(f'{{spiffe_id: "{IDENTITIES["alice"]}"}}')
        await world.approve(operation, "bob", "carol")
        with pytest.raises(SvidInvalidError):
            await asyncio.wait_for(waiting, 10)

    run(tmp_path, test)


def test_approver_sees_what_is_his_to_approve_and_whose_identity_he_is(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.begin()
        shown = await world.show(operation, "alice-laptop")
        assert (shown.person, shown.yours) == ("alice", ("release/1",))
        await world.approve(operation, "alice")
        assert (await world.show(operation, "alice-laptop")).yours == ()
        assert (await world.show(operation, "ci")).person == ""
        people = PEOPLE.replace("  alice:", "  anna:").replace("[alice, bob, carol]", "[bob, carol]")
        await world.adopt(grants(people=people))
        assert [each.counts for each in (await world.show(operation, "bob")).approvals] == [False]

    run(tmp_path, test)


@pytest.mark.case(21)
def test_nobody_sees_or_approves_while_the_rules_give_no_decision(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.begin()
        envelope = world.envelope(operation, "alice")
        engine = world.broker.rules.engine
        failed = engine._failed("policy-error")  # type: ignore[attr-defined]  # of the real engine
        assert failed.verdict is Verdict.FAILED

        class Silent:
            digest = engine.digest

            async def decide(self, request: bytes) -> object:
                del request
                return failed

        world.broker.operations._rules = type("Rules", (), {"engine": Silent()})()
        with pytest.raises(PolicyFailedError):
            await world.show(operation, "alice")
        with pytest.raises(PolicyFailedError):
            await world.broker.operations.approve(world.asker("alice"), Approve(operation, envelope))
        assert world.of_kind("denial")[0]["body"]["code"] == "policy-error"
        assert world.of_kind("approval") == []
        assert await ids(world, "alice") == []

    run(tmp_path, test)


def test_places_to_wait_are_bounded_for_each_and_in_all() -> None:
    async def main() -> None:
        waiting = Changes()
        taken = [waiting.enter("a") for _ in range(changes.MAX_WAITERS_PER_CALLER)]
        with pytest.raises(RateLimitedError):
            waiting.enter("a")
        taken += [waiting.enter(f"b{number}") for number in range(changes.MAX_WAITERS - len(taken))]
        with pytest.raises(OverloadedError):
            waiting.enter("c")
        for each in taken:
            each.__exit__()
        assert waiting.waiters == 0
        with waiting.enter("a") as waiter:
            assert not await waiter.wait(waiting.count, 0)

    asyncio.run(main())


def test_nobody_waits_any_more_when_the_broker_stops(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.begin()
        waiting = asyncio.ensure_future(world.broker.operations.show(world.asker("ci"), ShowOperation(operation, 30)))
        await asyncio.sleep(0.05)
        world.broker.quorum.changes.close()
        assert (await asyncio.wait_for(waiting, 5)).state == "pending"
        assert (await asyncio.wait_for(world.broker.operations.show(world.asker("ci"), ShowOperation(operation, 30)), 5)).state == "pending"

    run(tmp_path, test)
