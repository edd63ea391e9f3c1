"""How operations stand: people counted, stages in order, refusals, expiry, cool-off. Pure."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keybroker.authority.operations import End, Operation, Standing, State, Vote, is_own, stages_of, standing
from tests.approvals import SUBJECT

EXPIRES = 1_000
TWO_OF = ((2, ("managers",)),)
LEGAL_THEN_TWO = ((1, ("legal",)), (2, ("managers",)))


def operation(*quorums: tuple[str, tuple[tuple[int, tuple[str, ...]], ...]], cool_off_us: int = 0) -> Operation:
    stages = tuple(stage for grant, wanted in quorums for stage in stages_of(grant, wanted))
    return Operation(SUBJECT, "robin", stages, cool_off_us, "", 0, EXPIRES, 7)


def state(made: Operation, *votes: Vote, end: End = End.NONE, now_us: int = 500) -> State:
    return standing(made, votes, end, now_us).state


RELEASE = operation(("release", TWO_OF))
STAGED = operation(("release", LEGAL_THEN_TWO))
ALICE, BOB, CAROL = (Vote("release/1", name, at) for name, at in (("alice", 10), ("bob", 20), ("carol", 30)))


def test_stages_are_named_by_grant_and_number() -> None:
    assert [stage.name for stage in STAGED.stages] == ["release/1", "release/2"]


@pytest.mark.case(28)
def test_operation_is_ready_with_enough_people_and_pending_with_one_less() -> None:
    assert state(RELEASE) is State.PENDING
    assert state(RELEASE, ALICE) is State.PENDING
    assert state(RELEASE, ALICE, BOB) is State.READY
    assert state(RELEASE, ALICE, BOB, CAROL) is State.READY


@pytest.mark.case(29)
def test_person_counts_once_however_often_it_votes() -> None:
    assert state(RELEASE, ALICE, ALICE, Vote("release/1", "alice", 40)) is State.PENDING
    assert standing(RELEASE, (ALICE, ALICE), End.NONE, 500).stages[0].people == ("alice",)


def test_vote_counts_for_no_other_stage_and_for_nobody_without_a_name() -> None:
    assert state(RELEASE, ALICE, Vote("other/1", "bob", 20), Vote("release/1", "", 30)) is State.PENDING


def test_operation_without_stages_is_never_ready() -> None:
    assert state(operation(), ALICE, BOB) is State.PENDING


@pytest.mark.parametrize(
    ("end", "now_us", "expected"),
    [
        (End.NONE, EXPIRES - 1, State.READY),
        pytest.param(End.NONE, EXPIRES, State.EXPIRED, marks=pytest.mark.case(31)),
        (End.REFUSED, 500, State.REFUSED),
        (End.REFUSED, EXPIRES, State.REFUSED),
        (End.REDEEMED, 500, State.REDEEMED),
        (End.REDEEMED, EXPIRES, State.REDEEMED),
    ],
)
def test_end_is_final_and_expiry_counts_until_then(end: End, now_us: int, expected: State) -> None:
    made = standing(RELEASE, (ALICE, BOB), end, now_us)
    assert made.state is expected
    assert made.may_be_approved("release/1") == (expected is State.READY)


def test_second_stage_is_reached_when_the_first_is_complete() -> None:
    second = Vote("release/2", "alice", 20)
    before = standing(STAGED, (), End.NONE, 500)
    assert (before.may_be_approved("release/1"), before.may_be_approved("release/2"), before.may_be_approved("none")) == (
        True,
        False,
        False,
    )
    after = standing(STAGED, (Vote("release/1", "dora", 10), second), End.NONE, 500)
    assert after.may_be_approved("release/2")
    assert state(STAGED, Vote("release/1", "dora", 10), second, Vote("release/2", "bob", 30)) is State.READY
    assert state(STAGED, second, Vote("release/2", "bob", 30)) is State.PENDING  # the first stage has lost its approver


def test_person_counts_in_one_stage_of_a_grant_and_in_each_grant() -> None:
    dora = Vote("release/1", "dora", 10)
    assert state(STAGED, dora, Vote("release/2", "dora", 20), Vote("release/2", "bob", 30)) is State.PENDING
    both = operation(("a", ((1, ("managers",)),)), ("b", ((1, ("managers",)),)))
    assert state(both, Vote("a/1", "dora", 10)) is State.PENDING
    assert state(both, Vote("a/1", "dora", 10), Vote("b/1", "dora", 20)) is State.READY


def test_stages_of_several_grants_do_not_wait_for_each_other() -> None:
    both = operation(("a", LEGAL_THEN_TWO), ("b", TWO_OF))
    assert [each.is_reached for each in standing(both, (), End.NONE, 500).stages] == [True, False, True]


def test_cool_off_begins_when_the_last_needed_approval_is_given() -> None:
    made = operation(("release", TWO_OF), cool_off_us=100)
    assert standing(made, (ALICE,), End.NONE, 500).not_before_us == 0
    assert standing(made, (ALICE, BOB), End.NONE, 500).not_before_us == 120
    assert standing(made, (CAROL, BOB, ALICE), End.NONE, 500).not_before_us == 120  # one more does not put it off


@pytest.mark.case(29)
@pytest.mark.parametrize(
    ("identity", "expected"),
    [
        (SUBJECT.workload, True),
        ("spiffe://x/robin", True),
        ("spiffe://x/renamed", True),
        ("spiffe://x/alice", False),
        ("spiffe://x/no", False),
    ],
)
def test_own_operation_is_known_by_identity_and_by_person_then_and_now(identity: str, expected: bool) -> None:
    people = {"spiffe://x/robin": "robin", "spiffe://x/renamed": "rob", SUBJECT.workload: "rob", "spiffe://x/alice": "alice"}
    assert is_own(RELEASE, identity, lambda each: people.get(each, "")) is expected


def test_nobody_in_particular_is_not_the_same_person_as_nobody_in_particular() -> None:
    nobody = Operation(SUBJECT, "", RELEASE.stages, 0, "", 0, EXPIRES, 7)
    assert not is_own(nobody, "spiffe://x/alice", lambda _: "")


Quorums = dict[str, tuple[tuple[int, tuple[str, ...]], ...]]

names = st.sampled_from(["", "p", "q", "r", "s"])
votes = st.lists(st.builds(Vote, st.sampled_from(["a/1", "a/2", "b/1", "c/1"]), names, st.integers(1, 50)), max_size=12)
wanted = st.lists(st.tuples(st.integers(1, 3), st.just(("g",))), min_size=1, max_size=2).map(tuple)
all_quorums = st.dictionaries(st.sampled_from("ab"), wanted, min_size=1)


@given(all_quorums, votes)
def test_ready_means_that_each_stage_of_each_grant_has_its_own_people(quorums: Quorums, cast: list[Vote]) -> None:
    now: Standing = standing(operation(*quorums.items()), cast, End.NONE, 500)
    for grant in quorums:
        counted = Counter(person for each in now.stages if each.stage.grant == grant for person in each.people)
        assert all(count == 1 for count in counted.values())
        assert "" not in counted
    for each in now.stages:
        assert set(each.people) <= {vote.person for vote in cast if vote.stage == each.stage.name}
    enough = all(len(each.people) >= each.stage.approvals for each in now.stages)
    assert (now.state is State.READY) == enough
    assert (now.not_before_us > 0) == enough


@given(all_quorums, votes)
def test_order_in_which_votes_are_read_does_not_matter(quorums: Quorums, cast: list[Vote]) -> None:
    made = operation(*quorums.items())
    one, other = standing(made, cast, End.NONE, 500), standing(made, cast[::-1], End.NONE, 500)
    assert (one.state, one.not_before_us) == (other.state, other.not_before_us)
    assert [set(each.people) for each in one.stages] == [set(each.people) for each in other.stages]
