"""Demands: which keeps which, and how they are said."""

from __future__ import annotations

import pytest

from keybroker.authority.trial.demands import Approved, AtMost, Content, Demand, NotAfter, NotBefore, Open, not_kept
from keybroker.authority.trial.words import duration, listed
from keybroker.model.decision import HoursWindow, Limit, QuorumStage

EARLY, LATE = "2027-01-01T00:00:00Z", "2028-01-01T00:00:00Z"
OFFICE = HoursWindow(("mon", "tue"), "08:00", "18:00", "Europe/Berlin", ("2026-12-25",))
NIGHT = HoursWindow(("sat",), "22:00", "02:00", "UTC", ())


def at_most(most: int, window_s: int = 60, per: str = "key", grant: str = "g") -> AtMost:
    return AtMost(grant, Limit(most, window_s, per))  # type: ignore[arg-type]  # a word of the table


def approved(approvals: int, *people: str, cool_off_s: int = 0, expires_s: int = 3600) -> Approved:
    return Approved((QuorumStage(approvals, ("managers",), people),), cool_off_s, expires_s)


KEEPING = [
    (NotAfter(EARLY), NotAfter(LATE)),
    (NotBefore(LATE), NotBefore(EARLY)),
    (at_most(5), at_most(10)),
    (approved(2, "alice", "bob"), approved(1, "alice", "bob", "carol")),
    (approved(1, "alice", cool_off_s=60), approved(1, "alice")),
    (approved(1, "alice", expires_s=60), approved(1, "alice")),
]
APART = [
    (NotAfter(EARLY), NotBefore(EARLY)),
    (Open((OFFICE,)), Open((NIGHT,))),
    (at_most(5), at_most(10, grant="other")),
    (at_most(5), at_most(10, window_s=30)),
    (at_most(5), at_most(10, per="workload")),
    (approved(1, "alice"), approved(1, "bob")),
    (approved(1, "alice"), Approved((*approved(1, "alice").stages, *approved(1, "bob").stages), 0, 3600)),
    (approved(1, "alice"), at_most(1)),
]


@pytest.mark.parametrize(("strict", "lax"), KEEPING)
def test_stricter_demand_keeps_the_laxer_one_and_not_the_other_way_round(strict: Content, lax: Content) -> None:
    assert Demand(strict).keeps(Demand(lax))
    assert not Demand(lax).keeps(Demand(strict))
    assert Demand(strict).keeps(Demand(strict))
    assert not_kept({Demand(lax)}, {Demand(strict)}) == frozenset()


@pytest.mark.parametrize(("one", "other"), APART)
def test_demands_of_other_things_do_not_keep_each_other(one: Content, other: Content) -> None:
    assert not Demand(one).keeps(Demand(other))
    assert not Demand(other).keeps(Demand(one))
    assert not_kept({Demand(one)}, {Demand(other)}) == {Demand(one)}


@pytest.mark.parametrize("content", [NotAfter(EARLY), Open((OFFICE,)), at_most(5), approved(1, "alice")])
def test_demand_that_is_only_watched_keeps_none_that_binds(content: Content) -> None:
    assert Demand(content).keeps(Demand(content, is_observed=True))
    assert not Demand(content, is_observed=True).keeps(Demand(content))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (NotBefore(EARLY), "not before 2027-01-01T00:00:00Z"),
        (NotAfter(LATE), "not after 2028-01-01T00:00:00Z"),
        (
            Open((OFFICE, NIGHT)),
            "only mon and tue from 08:00 to 18:00, Europe/Berlin except on 2026-12-25 or sat from 22:00 to 02:00, UTC",
        ),
        (at_most(1, 86_400, "grant"), "at most 1 use in any 1d, for all uses of the grant together (g)"),
        (approved(2, "alice", "bob", cool_off_s=90), "approved by 2 of alice and bob (managers), within 1h, 90s after the last approval"),
    ],
)
def test_demand_is_said_in_words(content: Content, words: str) -> None:
    assert Demand(content).text == words
    assert Demand(content, is_observed=True).text == f"{words} (watched only)"


def test_names_and_durations_are_said_as_people_say_them() -> None:
    assert [listed(()), listed(["a"]), listed(["a", "b", "a"]), listed("abc")] == ["nothing", "a", "a and b", "a, b and c"]
    assert [duration(each) for each in (0, 59, 120, 7_200, 172_800)] == ["0s", "59s", "2m", "2h", "2d"]
