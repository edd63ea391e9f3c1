"""Quorums, from the first request to the last redemption: allowed, denied, undecided. Real rules, SVIDs, signatures, store."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from keybroker.authority.selfcheck import Check, verifies
from keybroker.authority.spending import MAX_LIVE
from keybroker.authority.tokens import SigningFailedError
from keybroker.clock import to_rfc3339
from keybroker.errors import (
    ApprovalConsumedError,
    ApprovalExpiredError,
    ApprovalMismatchError,
    ApprovalStaleError,
    AuditUnavailableError,
    ClockUntrustedError,
    DeniedError,
    HsmTimeoutError,
    IdempotencyMismatchError,
    InvalidError,
    NotFoundError,
    RateLimitedError,
    RefusalError,
    SelfApprovalError,
    SvidInvalidError,
)
from keybroker.model.approval import SubjectDigest, SubjectKey, SubjectOperation
from keybroker.model.call import Explain, Pending, Sign, SignBatch, Signed
from keybroker.model.key import Algorithm
from keybroker.model.request import MAX_REASON_CHARACTERS, SignBody
from tests.brokers import FakeTokens
from tests.clocks import START_US
from tests.quorums import DIGEST, HOUR_US, IDENTITIES, LEGAL_THEN_TWO, PEOPLE, RELEASE, Quorums, grants, quorum_world
from tests.unit.authority.test_journal import FailingDatabase

Test = Callable[[Quorums], Awaitable[None]]


def run(directory: Path, test: Test, text: str = "") -> None:
    """Run a test in a world with these rules; the log that it leaves is whole."""

    async def main() -> None:
        async with quorum_world(directory, text) as world:
            await test(world)
            assert world.broker.faults() == []
            assert world.broker.service.under_way == 0

    asyncio.run(main())


def released(reply: Signed | Pending) -> Signed:
    assert isinstance(reply, Signed)
    return reply


# Asking


def test_use_that_needs_a_quorum_waits_and_no_key_is_used(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        reply = await world.ask()
        assert isinstance(reply, Pending)
        assert reply.expires == to_rfc3339(START_US + HOUR_US)
        (stage,) = reply.needs
        assert (stage.name, stage.approvals, stage.of, stage.given, stage.is_open) == ("release/1", 2, ("managers",), (), True)
        assert world.broker.tokens.signed == 0
        (record,) = world.broker.records()
        assert (record["kind"], record["operation_id"], record["use"]) == ("operation", reply.operation, "")
        assert record["body"]["subject"]["tbs"] == {"hash": "sha256", "value": DIGEST.hex()}
        assert record["decision"]["grants"] == ["release"]
        assert world.broker.quorum.waiting() == 1

    run(tmp_path, test)


def test_use_that_needs_none_is_made_at_once(tmp_path: Path) -> None:
    more = """\
  - {id: free, workloads: ["spiffe://example.org/ci/other"], keys: [orders], operations: [sign-digest], algorithms: [ES256]}
"""

    async def test(world: Quorums) -> None:
        released(await world.ask("other-ci"))
        assert world.broker.kinds() == ["intent", "signed"]
        with pytest.raises(NotFoundError):
            await world.ask("eve")

    run(tmp_path, test, grants(more=more))


def test_explain_says_what_would_be_needed(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        body = SignBody(algorithm=Algorithm.ES256, digest=DIGEST)
        reply = await world.broker.service.explain(world.asker("ci"), Explain("orders", body))
        assert reply.allow
        assert reply.needs == ("1 approval of legal (release/1)", "2 approvals of managers (release/2)")
        assert world.of_kind("operation") == []

    run(tmp_path, test, grants(LEGAL_THEN_TWO))


def test_each_item_of_a_batch_is_an_operation_of_its_own(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        items = tuple(SignBody(algorithm=Algorithm.ES256, message=bytes([number])) for number in range(3))
        ask = SignBatch("orders", items, "batch-1", b"x" * 32)
        replies = await world.broker.service.sign_batch(world.asker("ci"), ask)
        operations = [reply.operation for reply in replies if isinstance(reply, Pending)]
        assert len(set(operations)) == 3
        again = await world.broker.service.sign_batch(world.asker("ci"), ask)
        assert [reply.operation for reply in again if isinstance(reply, Pending)] == operations
        assert len(world.of_kind("operation")) == 3

    run(tmp_path, test)


@pytest.mark.case(20)
def test_same_idempotency_key_and_body_get_the_same_operation_and_another_body_none(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        replies = await asyncio.gather(*(world.begin(idempotency_key="k1") for _ in range(5)))
        assert len(set(replies)) == 1
        with pytest.raises(IdempotencyMismatchError):
            await world.begin(idempotency_key="k1", reason="another")
        assert len(world.of_kind("operation")) == 1
        await world.approve(replies[0], "alice", "bob")
        (stage,) = (await world.ask(idempotency_key="k1")).needs  # type: ignore[union-attr]  # it is pending, and says how it stands now
        assert stage.given == ("alice", "bob")
        assert await world.begin() != replies[0]

    run(tmp_path, test)


@pytest.mark.case(77)
def test_workload_has_a_bounded_number_of_operations_that_wait(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        made = await asyncio.gather(*(world.ask() for _ in range(MAX_LIVE + 10)), return_exceptions=True)
        refused = [each for each in made if isinstance(each, RateLimitedError)]
        assert (len(refused), world.broker.quorum.waiting()) == (10, MAX_LIVE)
        assert all(each.retry_after > 0 for each in refused)
        assert isinstance(await world.ask("other-ci"), Pending)  # the others are not concerned
        world.broker.clock.time_us += HOUR_US
        assert isinstance(await world.ask(), Pending)

    run(tmp_path, test, grants(workloads='"spiffe://example.org/ci/*"'))


def test_reason_that_would_not_fit_into_the_record_of_so_many_approvals_is_refused(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        with pytest.raises(InvalidError) as caught:
            await world.ask(reason="\x01" * MAX_REASON_CHARACTERS)
        assert caught.value.pointers[0][0] == "/reason"
        operation = await world.begin(reason="€" * MAX_REASON_CHARACTERS)
        await world.approve(operation, "alice", "bob", "carol", "dora", "eve")
        released(await world.redeem(operation))

    many = PEOPLE.replace("bob, carol]", "bob, carol, dora, eve]").replace("groups:", "  eve: [spiffe://example.org/human/eve]\ngroups:")
    run(tmp_path, test, grants("{approvals: 5, of: [managers], expires: 1h}", people=many))


# Approving


@pytest.mark.case(28)
def test_use_is_made_with_enough_approvals_and_waits_with_one_less(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.begin()
        shown = await world.approve(operation, "alice")
        assert (shown.state, shown.stages[0].given) == ("pending", ("alice",))
        reply = await world.redeem(operation)
        assert isinstance(reply, Pending)
        assert reply.needs[0].given == ("alice",)
        assert world.broker.tokens.signed == 0
        assert (await world.approve(operation, "bob")).state == "ready"
        signed = released(await world.redeem(operation))
        assert verifies(Check(world.broker.tokens.spki, Algorithm.ES256, DIGEST, signed.signature))
        assert world.broker.kinds() == ["operation", "approval", "approval", "intent", "signed"]
        _, first, second, intent, outcome = world.broker.records()
        assert intent["operation_id"] == operation
        assert intent["approvals"] == [*first["approvals"], *second["approvals"]]
        assert outcome["outcome"] == "signed"
        shown = await world.show(operation)
        assert (shown.state, shown.use) == ("redeemed", signed.use)
        assert world.broker.quorum.waiting() == 0

    run(tmp_path, test)


@pytest.mark.case(29)
def test_person_counts_once_with_whichever_identity(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.begin()
        await world.approve(operation, "alice", "alice")
        assert len(world.of_kind("approval")) == 1  # the same approval again is one
        shown = await world.approve(operation, "alice-laptop")
        assert (shown.state, shown.stages[0].given) == ("pending", ("alice",))
        assert isinstance(await world.redeem(operation), Pending)
        assert (await world.approve(operation, "bob")).state == "ready"

    run(tmp_path, test)


@pytest.mark.case(29)
@pytest.mark.parametrize("approver", ["alice", "alice-laptop"])
def test_nobody_approves_what_he_asked_for_with_any_identity(tmp_path: Path, approver: str) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.begin("alice")
        shown = await world.show(operation, approver)
        assert shown.yours == ()
        with pytest.raises(SelfApprovalError):
            await world.approve(operation, approver)
        (denial,) = world.of_kind("denial")
        assert (denial["body"]["code"], denial["operation_id"], denial["trail"]["id"]) == ("self-approval", operation, IDENTITIES[approver])
        assert (await world.approve(operation, "bob", "carol")).state == "ready"
        released(await world.redeem(operation, "alice"))

    run(tmp_path, test, grants(workloads='"spiffe://example.org/human/alice"'))


@pytest.mark.case(29)
def test_own_approval_counts_for_nothing_when_the_requester_turns_out_to_be_the_approver(tmp_path: Path) -> None:
    """The person behind the workload is named only after she has approved."""

    async def test(world: Quorums) -> None:
        operation = await world.ready()
        await world.adopt(grants(people=PEOPLE.replace("laptop/alice", "ci/release")))
        assert isinstance(await world.redeem(operation), Pending)
        assert "own-operation" in (await world.events())[0]

    run(tmp_path, test)


def test_requester_is_told_that_its_own_approval_is_its_own_even_if_it_may_not_approve(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.begin()
        with pytest.raises(SelfApprovalError):
            await world.approve(operation, "ci", person="alice")

    run(tmp_path, test)


MISMATCHES: dict[str, dict[str, Any]] = {
    "another-tbs": {"subject_tbs": SubjectDigest("sha256", hashlib.sha256(b"evil").hexdigest())},
    "another-key": {"subject_key": SubjectKey("release", 1, "ab" * 32)},
    "another-workload": {"subject_workload": "spiffe://example.org/ci/other"},
    "another-decision": {"subject_decision": "cd" * 32},
    "another-log": {"subject_log": "example.org/other"},
    "another-operation": {"subject_operation": SubjectOperation("01JDGQ4F8M3Z6T9W2X5Y7ABCDE", "sign-digest")},
    "another-reason": {"subject_reason": "harmless"},
    "another-stage": {"stage": "release/2"},
    "another-person": {"person": "bob"},
    "another-approver": {"approver": IDENTITIES["bob"]},
    "issued-at-another-time": {"issued": to_rfc3339(START_US + 10 * 60_000_000)},
}


@pytest.mark.case(30)
@pytest.mark.parametrize("reason", MISMATCHES)
def test_statement_about_anything_else_is_a_mismatch(tmp_path: Path, reason: str) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.begin()
        with pytest.raises(ApprovalMismatchError) as caught:
            await world.approve(operation, "alice", **MISMATCHES[reason])
        assert caught.value.reasons == (reason,)
        assert world.of_kind("approval") == []
        assert world.of_kind("denial")[0]["body"]["code"] == "approval-mismatch"
        await world.approve(operation, "alice")

    run(tmp_path, test)


@pytest.mark.case(30)
def test_statement_about_another_algorithm_is_a_mismatch(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.begin()
        with pytest.raises(ApprovalMismatchError) as caught:
            await world.approve(operation, "alice", subject_algorithm="PS256")
        assert caught.value.reasons == ("another-algorithm",)

    run(tmp_path, test)


@pytest.mark.case(30)
def test_envelope_that_its_approver_did_not_sign_is_a_mismatch(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.begin()
        good = world.envelope(operation, "alice")
        other = world.envelope(operation, "alice", signer="bob")
        signature = msgspec.json.decode(good)["signatures"][0]["sig"].encode()
        cases = {
            "another-key": other,
            "bad-signature": good.replace(
                signature, msgspec.json.decode(world.envelope(operation, "alice"))["signatures"][0]["sig"].encode()
            ),
            "not-an-envelope": b"{}",
        }
        for reason, envelope in cases.items():
            with pytest.raises(ApprovalMismatchError) as caught:
                await world.give(operation, "alice", envelope)
            assert caught.value.reasons == (reason,)
        with pytest.raises(ApprovalMismatchError):  # alice's good approval, carried by bob
            await world.give(operation, "bob", good)
        assert world.of_kind("approval") == []
        await world.give(operation, "alice", good)

    run(tmp_path, test)


@pytest.mark.case(30)
def test_approval_of_one_operation_is_none_of_another_of_the_same_content(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        first, second = await world.begin(), await world.begin()
        envelope = world.envelope(first, "alice")
        with pytest.raises(ApprovalMismatchError) as caught:
            await world.give(second, "alice", envelope)
        assert "another-operation" in caught.value.reasons

    run(tmp_path, test)


@pytest.mark.parametrize("name", ["eve", "dora", "other-ci"])
def test_others_find_no_operation_and_learn_of_none(tmp_path: Path, name: str) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.begin()
        for each in (operation, "01JDGQ4F8M3Z6T9W2X5Y7ABCDE", "no ulid"):
            with pytest.raises(NotFoundError) as shown:
                await world.show(each, name)
            with pytest.raises(NotFoundError) as given:
                await world.give(each, name, world.envelope(operation, name))
            with pytest.raises(NotFoundError) as redeemed:
                await world.redeem(each, name)
            assert shown.value.detail == given.value.detail == redeemed.value.detail

    run(tmp_path, test)


def test_approver_does_not_redeem_and_the_workload_of_another_grant_neither(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.ready()
        with pytest.raises(DeniedError) as caught:
            await world.redeem(operation, "alice")
        assert caught.value.reasons == ("not-the-requester",)
        assert world.broker.tokens.signed == 0

    run(tmp_path, test)


def test_deny_keeps_a_member_from_approving(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.begin()
        with pytest.raises(DeniedError) as caught:
            await world.approve(operation, "alice")
        assert caught.value.reasons == ("denied-by:no-alice",)
        await world.approve(operation, "bob")

    deny = 'denies: [{id: no-alice, workloads: ["spiffe://example.org/human/alice"], operations: [approve]}]\n'
    run(tmp_path, test, grants() + deny)


def test_one_refusal_ends_it(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.ready()
        shown = await world.approve(operation, "carol", verdict="refuse")
        assert (shown.state, [each.counts for each in shown.approvals]) == ("refused", [True, True, False])
        for attempt in (
            world.redeem(operation),
            world.approve(operation, "alice-laptop"),
            world.approve(operation, "bob", verdict="refuse"),
        ):
            with pytest.raises(DeniedError) as caught:
                await attempt
            assert caught.value.reasons == ("refused",)
        assert world.broker.tokens.signed == 0
        assert world.broker.quorum.waiting() == 0

    run(tmp_path, test)


def test_member_of_a_later_stage_may_refuse_at_once_and_approve_in_his_turn(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.begin()
        with pytest.raises(DeniedError) as caught:
            await world.approve(operation, "alice", stage="release/2")
        assert caught.value.reasons == ("stage-not-reached",)
        with pytest.raises(DeniedError) as caught:
            await world.approve(operation, "alice")  # of the first stage, where she is no member
        assert caught.value.reasons == ("not-in-the-group",)
        assert (await world.show(operation, "alice")).yours == ()
        await world.approve(operation, "dora")
        assert (await world.show(operation, "alice")).yours == ("release/2",)
        shown = await world.approve(operation, "alice", "bob", stage="release/2")
        assert shown.state == "ready"
        released(await world.redeem(operation))
        refused = await world.begin()
        assert (await world.approve(refused, "alice", stage="release/2", verdict="refuse")).state == "refused"

    run(tmp_path, test, grants(LEGAL_THEN_TWO))


def test_quorums_of_all_grants_that_match_must_be_complete(tmp_path: Path) -> None:
    more = """\
  - id: also-legal
    workloads: ["spiffe://example.org/ci/*"]
    keys: ["*"]
    operations: [sign-digest]
    algorithms: [ES256]
    quorum: {approvals: 1, of: [legal], expires: 30m, cool_off: 10s}
"""

    async def test(world: Quorums) -> None:
        reply = await world.ask()
        assert isinstance(reply, Pending)
        assert [stage.name for stage in reply.needs] == ["also-legal/1", "release/1"]
        assert reply.expires == to_rfc3339(START_US + HOUR_US // 2)
        await world.approve(reply.operation, "alice", "bob")
        assert isinstance(await world.redeem(reply.operation), Pending)
        await world.approve(reply.operation, "dora", stage="also-legal/1")
        waiting = await world.redeem(reply.operation)
        assert isinstance(waiting, Pending)
        assert waiting.not_before == to_rfc3339(START_US + 10_000_000)
        world.broker.clock.time_us += 10_000_000
        released(await world.redeem(reply.operation))

    run(tmp_path, test, grants(more=more))


# Redeeming


@pytest.mark.case(39)
def test_nothing_is_asked_for_or_redeemed_while_the_clock_is_distrusted(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.ready()
        world.broker.clock.jump(-60_000_000)
        with pytest.raises(ClockUntrustedError):
            await world.redeem(operation)
        with pytest.raises(ClockUntrustedError):
            await world.ask()
        assert [record["body"]["code"] for record in world.of_kind("denial")] == ["clock-untrusted"] * 2
        assert world.broker.tokens.signed == 0

    run(tmp_path, test)


@pytest.mark.case(34)
def test_operation_is_redeemed_once(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.ready()
        made = await asyncio.gather(*(world.redeem(operation) for _ in range(50)), return_exceptions=True)
        assert [type(each) for each in made if not isinstance(each, ApprovalConsumedError)] == [Signed]
        assert len(world.of_kind("intent")) == 1
        assert world.broker.tokens.signed == 1
        with pytest.raises(ApprovalConsumedError):
            await world.redeem(operation)

    run(tmp_path, test)


def test_same_idempotency_key_gets_the_same_signature(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.ready()
        first = released(await world.redeem(operation, idempotency_key="k1"))
        assert await world.redeem(operation, idempotency_key="k1") == first
        with pytest.raises(ApprovalConsumedError):
            await world.redeem(operation, idempotency_key="k2")
        assert world.broker.tokens.signed == 1

    run(tmp_path, test)


@pytest.mark.case(31)
def test_operation_that_has_expired_is_neither_approved_nor_redeemed(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation, other = await world.ready(), await world.begin()
        late = world.envelope(other, "alice")
        world.broker.clock.time_us += HOUR_US
        with pytest.raises(ApprovalExpiredError):
            await world.redeem(operation)
        with pytest.raises(ApprovalExpiredError):
            await world.give(other, "alice", late)
        assert [record["body"]["code"] for record in world.of_kind("denial")] == ["approval-expired"] * 2
        assert (await world.show(operation)).state == "expired"
        assert world.broker.tokens.signed == 0

    run(tmp_path, test)


@pytest.mark.case(31)
def test_approval_that_was_given_for_less_time_counts_until_then(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.begin()
        await world.approve(operation, "alice", expires=to_rfc3339(START_US + 60_000_000))
        assert (await world.approve(operation, "bob")).state == "ready"
        world.broker.clock.time_us += 60_000_000
        assert isinstance(await world.redeem(operation), Pending)
        released_after = await world.approve(operation, "alice")  # again, for longer
        assert released_after.state == "ready"
        released(await world.redeem(operation))

    run(tmp_path, test)


LEFT = PEOPLE.replace("managers: [alice, bob, carol]", "managers: [bob, carol]")
RENAMED = PEOPLE.replace('"spiffe://example.org/human/alice", ', "")


@pytest.mark.case(32)
@pytest.mark.parametrize(("people", "rule"), [(LEFT, "not-in-the-group"), (RENAMED, "another-person")])
def test_approval_of_somebody_who_was_removed_does_not_count(tmp_path: Path, people: str, rule: str) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.ready()
        await world.adopt(grants(people=people))
        reply = await world.redeem(operation)
        assert isinstance(reply, Pending)
        assert reply.needs[0].given == ("bob",)
        (event,) = await world.events()
        assert event.startswith(operation)
        assert event.endswith(rule)
        assert world.broker.tokens.signed == 0
        await world.approve(operation, "carol")
        released(await world.redeem(operation))

    run(tmp_path, test)


@pytest.mark.case(32)
@pytest.mark.parametrize("by", ["spiffe_id", "svid_serial"])
def test_approval_of_somebody_on_the_deny_list_does_not_count(tmp_path: Path, by: str) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.ready()
        serial = format(world.svids["alice"].certificate.serial_number, "x")
        world.deny(f'{{{by}: "{IDENTITIES["alice"] if by == "spiffe_id" else serial}", reason: stolen}}')
        assert isinstance(await world.redeem(operation), Pending)
        assert (await world.events())[0].endswith("svid-denied")
        world.deny()
        released(await world.redeem(operation))

    run(tmp_path, test)


@pytest.mark.case(32)
def test_new_certificate_of_the_same_approver_counts_again(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.ready()
        serial = format(world.svids["alice"].certificate.serial_number, "x")
        world.deny(f'{{svid_serial: "{serial}", reason: stolen}}')
        world.issue("alice")
        assert (await world.approve(operation, "alice")).state == "ready"
        released(await world.redeem(operation))

    run(tmp_path, test)


def test_svid_that_expires_after_the_approval_voids_nothing(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        world.issue("alice", minutes=1)
        operation = await world.ready()
        world.broker.clock.time_us += 2 * 60_000_000
        with pytest.raises(SvidInvalidError):
            world.asker("alice")
        released(await world.redeem(operation))

    run(tmp_path, test)


@pytest.mark.case(33)
@pytest.mark.parametrize(
    "changed",
    [
        grants("{approvals: 3, of: [managers], expires: 1h}"),
        grants("{approvals: 1, of: [managers], expires: 1h}"),
        grants("{approvals: 2, of: [managers], expires: 1h, cool_off: 1m}"),
        grants("{approvals: 2, of: [managers], expires: 2h}"),
        grants("{approvals: 2, of: [managers, legal], expires: 1h}"),
        grants(LEGAL_THEN_TWO),
        grants(more='  - {id: more, workloads: ["**"], keys: [orders], operations: [sign-digest], algorithms: [ES256]}\n'),
        grants().replace("    quorum", "    not_after: 2099-01-01T00:00:00Z\n    quorum"),
        grants().replace(f"    quorum: {'{approvals: 2, of: [managers], expires: 1h}'}\n", ""),
    ],
    ids=["stricter", "looser", "cool-off", "longer", "more groups", "stages", "another grant", "end of grant", "no quorum"],
)
def test_change_of_what_applied_makes_it_stale(tmp_path: Path, changed: str) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.ready()
        await world.adopt(changed)
        with pytest.raises(ApprovalStaleError):
            await world.redeem(operation)
        assert world.of_kind("denial")[0]["body"]["code"] == "approval-stale"
        assert world.broker.tokens.signed == 0
        await world.adopt(grants())
        released(await world.redeem(operation))

    run(tmp_path, test)


@pytest.mark.case(33)
def test_edit_that_does_not_concern_it_voids_nothing(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.ready()
        more = '  - {id: more, workloads: ["spiffe://example.org/x/*"], keys: [orders], operations: [sign], algorithms: [ES256]}\n'
        await world.adopt(grants(more=more, people=PEOPLE.replace("legal: [dora]", "legal: [dora, bob]")))
        released(await world.redeem(operation))

    run(tmp_path, test)


@pytest.mark.case(33)
@pytest.mark.parametrize(
    ("text", "error"),
    [
        (grants() + 'denies: [{id: stop, workloads: ["**"], operations: [sign-digest]}]\n', DeniedError),
        (grants(workloads='"spiffe://example.org/ci/else"'), NotFoundError),
    ],
)
def test_use_that_is_not_allowed_any_more_is_denied_and_the_operation_unspent(tmp_path: Path, text: str, error: type[RefusalError]) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.ready()
        await world.adopt(text)
        with pytest.raises(error):
            await world.redeem(operation)
        await world.adopt(grants())
        released(await world.redeem(operation))

    run(tmp_path, test)


@pytest.mark.case(33)
@pytest.mark.parametrize("when", ["before the intent", "while the token signs"])
def test_change_under_way_binds_a_redemption(tmp_path: Path, when: str) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.ready()

        async def change() -> None:
            world.broker.tokens.on_sign = None
            world.deny(f'{{spiffe_id: "{IDENTITIES["alice"]}"}}')

        if when == "while the token signs":
            world.broker.tokens.on_sign = change
            with pytest.raises(ApprovalStaleError):
                await world.redeem(operation)
            assert world.broker.kinds()[-2:] == ["intent", "withheld"]
            with pytest.raises(ApprovalConsumedError):
                await world.redeem(operation)
        else:
            redemption = asyncio.ensure_future(world.redeem(operation))
            await change()
            assert isinstance(await redemption, Pending)
            assert world.of_kind("intent") == []

    run(tmp_path, test)


def test_message_of_a_redemption_must_be_the_one_that_was_approved_if_it_is_sent(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.ready(message=RELEASE, digest=msgspec.UNSET)
        with pytest.raises(ApprovalMismatchError):
            await world.redeem(operation, message=b"another")
        signed = released(await world.redeem(operation, message=RELEASE))
        assert verifies(Check(world.broker.tokens.spki, Algorithm.ES256, DIGEST, signed.signature))
        intent = world.of_kind("intent")[0]
        assert intent["request"] == world.of_kind("operation")[0]["request"]
        assert intent["request"]["content"] == {"fields": {}, "media_type": "", "size": len(RELEASE), "type": "message"}

    run(tmp_path, test)


def test_signature_has_the_format_that_was_asked_for(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        assert len(released(await world.redeem(await world.ready(format="p1363"))).signature) == 64

    run(tmp_path, test)


@pytest.mark.case(35)
def test_use_that_released_nothing_is_finished_by_the_idempotent_retry_alone(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.ready()
        world.broker.tokens.fault = SigningFailedError("timeout", may_have_signed=True)
        with pytest.raises(HsmTimeoutError):
            await world.redeem(operation, idempotency_key="k1")
        world.broker.tokens.fault = None
        for attempt in (world.redeem(operation), world.redeem(operation, idempotency_key="k2")):
            with pytest.raises(ApprovalConsumedError):
                await attempt
        signed = released(await world.redeem(operation, idempotency_key="k1"))
        lost, retry = world.of_kind("intent")
        assert retry["retry_of"] == lost["use"] != retry["use"] == signed.use
        assert lost["tbs"] == retry["tbs"]
        assert lost["operation_id"] == retry["operation_id"] == operation
        assert await world.redeem(operation, idempotency_key="k1") == signed
        assert len(world.of_kind("intent")) == 2

    run(tmp_path, test)


@pytest.mark.case(36)
def test_nothing_is_burned_when_the_intent_cannot_be_written(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.ready()
        real = world.broker.store._db
        world.broker.store._db = FailingDatabase(real, "COMMIT", sqlite3.SQLITE_FULL, "SQLITE_FULL")  # type: ignore[assignment]
        with pytest.raises(AuditUnavailableError):
            await world.redeem(operation)
        world.broker.store._db = real
        assert world.broker.tokens.signed == 0
        assert (await world.show(operation)).state == "ready"
        released(await world.redeem(operation))

    run(tmp_path, test)


@pytest.mark.case(36)
def test_approval_that_cannot_be_written_does_not_count(tmp_path: Path) -> None:
    async def test(world: Quorums) -> None:
        operation = await world.begin()
        real = world.broker.store._db
        world.broker.store._db = FailingDatabase(real, "COMMIT", sqlite3.SQLITE_FULL, "SQLITE_FULL")  # type: ignore[assignment]
        with pytest.raises(AuditUnavailableError):
            await world.approve(operation, "alice")
        world.broker.store._db = real
        assert (await world.show(operation)).approvals == ()

    run(tmp_path, test)


def test_operations_and_their_ends_survive_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        async with quorum_world(tmp_path) as before:
            done, ready, begun = await before.ready(), await before.ready(), await before.begin()
            released(await before.redeem(done))
        async with quorum_world(tmp_path, before=before) as world:
            with pytest.raises(ApprovalConsumedError):
                await world.redeem(done)
            released(await world.redeem(ready))
            assert isinstance(await world.redeem(begun), Pending)
            assert (await world.approve(begun, "alice", "bob")).state == "ready"

    asyncio.run(main())


def test_operation_is_stale_when_the_key_is_another_version(tmp_path: Path) -> None:
    async def main() -> None:
        async with quorum_world(tmp_path) as before:
            operation = await before.ready()
        before.broker.tokens = FakeTokens()
        async with quorum_world(tmp_path, before=before) as world:
            with pytest.raises(ApprovalStaleError):
                await world.redeem(operation)
            assert world.broker.tokens.signed == 0

    asyncio.run(main())


def test_sign_asks_again_although_an_operation_is_ready(tmp_path: Path) -> None:
    """Only a redemption spends an operation: the same request is a new one."""

    async def test(world: Quorums) -> None:
        operation = await world.ready()
        reply = await world.broker.service.sign(world.asker("ci"), Sign("orders", SignBody(algorithm=Algorithm.ES256, digest=DIGEST)))
        assert isinstance(reply, Pending)
        assert reply.operation != operation

    run(tmp_path, test)
