"""Places: who gets one, who gives one up, and that each is counted once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keybroker.frontend.places import Place, Places, SvidShares


class Connection:
    """Has a place, until it is told to give it up."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.is_pushed_out = False
        place.give_up = self.give_up

    def give_up(self) -> None:
        self.is_pushed_out = True
        self.place.leave()  # as the task does that is cancelled


def enter(places: Places, address: str) -> Connection | None:
    place = places.enter(address)
    return None if place is None else Connection(place)


def entered(places: Places, address: str) -> Connection:
    connection = enter(places, address)
    assert connection is not None
    return connection


def test_place_is_given_while_there_are_some() -> None:
    places = Places(3, 2)
    assert [enter(places, address) is not None for address in ("a", "a", "b")] == [True] * 3
    assert places.taken == 3


@pytest.mark.case(76)
def test_newcomer_that_came_first_gives_its_place_up_when_all_are_taken() -> None:
    places = Places(3, 3)
    first, second, third = (entered(places, address) for address in ("a", "b", "c"))
    first.place.keep()
    assert enter(places, "d") is not None
    assert [each.is_pushed_out for each in (first, second, third)] == [False, True, False]
    assert places.taken == 3


@pytest.mark.case(76)
def test_address_pushes_out_its_own_newcomers_only() -> None:
    places = Places(10, 2)
    other, first, second = (entered(places, address) for address in ("b", "a", "a"))
    assert enter(places, "a") is not None
    assert [each.is_pushed_out for each in (other, first, second)] == [False, True, False]


@pytest.mark.case(76)
def test_nobody_gets_in_when_all_places_are_kept() -> None:
    places = Places(10, 2)
    for _ in range(2):
        entered(places, "a").place.keep()
    assert enter(places, "a") is None
    assert enter(places, "b") is not None
    full = Places(1, 1)
    entered(full, "a").place.keep()
    assert enter(full, "b") is None


def test_place_is_free_once_however_often_it_is_left() -> None:
    places = Places(2, 2)
    stays, goes = entered(places, "a"), entered(places, "a")
    stays.place.keep()
    goes.place.keep()
    for _ in range(3):
        goes.place.leave()
    assert places.taken == 1
    assert enter(places, "a") is not None
    assert places.taken == 2


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["enter", "keep", "leave"]), st.integers(0, 20))))
def test_counts_are_those_of_the_connections_there_are(steps: list[tuple[str, str, int]]) -> None:
    places = Places(5, 3)
    inside: list[Connection] = []
    for address, step, which in steps:
        if step == "enter":
            made = enter(places, address)
            inside = [each for each in inside if not each.is_pushed_out]
            inside += [made] if made else []
        elif inside and step == "keep":
            inside[which % len(inside)].place.keep()
        elif inside:
            inside.pop(which % len(inside)).place.leave()
        assert places.taken == len(inside) <= 5
        assert max((sum(each.place.address == name for each in inside) for name in "abc"), default=0) <= 3
    for each in inside:
        each.place.leave()
    assert places.taken == 0


def test_svid_has_as_many_connections_as_it_may_and_others_have_theirs() -> None:
    shares = SvidShares(2)
    assert [shares.enter(b"one") for _ in range(3)] == [True, True, False]
    assert shares.enter(b"two")
    shares.leave(b"one")
    assert [shares.enter(b"one") for _ in range(2)] == [True, False]
