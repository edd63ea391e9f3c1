"""Who may begin a handshake: failures cost, time gives back, success is free."""

from __future__ import annotations

import asyncio

import pytest

from keybroker.errors import RoomUnavailableError
from keybroker.frontend.admission import Admission
from keybroker.frontend.failed_handshakes import ELSEWHERE, FailedHandshakes
from keybroker.model.call import MAX_FAILED_HANDSHAKES


class Seconds:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


def fail(admission: Admission, address: str, times: int) -> None:
    for _ in range(times):
        admission.failed(address)


def test_address_is_admitted_while_its_handshakes_succeed(clock: Seconds) -> None:
    admission = Admission(burst=3, per_second=1, clock=clock)
    assert all(admission.admits("192.0.2.1") for _ in range(1_000))
    assert admission.remembered == 0


@pytest.mark.case(77)
def test_address_is_turned_away_when_it_has_failed_too_often_and_admitted_again_after_a_while(clock: Seconds) -> None:
    admission = Admission(burst=3, per_second=0.5, clock=clock)
    fail(admission, "192.0.2.1", 2)
    assert admission.admits("192.0.2.1")
    fail(admission, "192.0.2.1", 1)
    assert not admission.admits("192.0.2.1")
    assert admission.admits("192.0.2.2")
    clock.now += 1.9
    assert not admission.admits("192.0.2.1")
    clock.now += 0.2
    assert admission.admits("192.0.2.1")
    clock.now += 1_000
    fail(admission, "192.0.2.1", 2)
    assert admission.admits("192.0.2.1")  # it never holds more than the burst
    fail(admission, "192.0.2.1", 1)
    assert not admission.admits("192.0.2.1")


def test_more_failures_than_the_bucket_holds_do_not_lengthen_the_wait(clock: Seconds) -> None:
    admission = Admission(burst=2, per_second=1, clock=clock)
    fail(admission, "192.0.2.1", 500)
    clock.now += 1.01
    assert admission.admits("192.0.2.1")


def test_ipv6_addresses_of_one_64_are_one(clock: Seconds) -> None:
    admission = Admission(burst=2, per_second=1, clock=clock)
    fail(admission, "2001:db8::1", 1)
    fail(admission, "2001:db8::ffff:2", 1)
    assert not admission.admits("2001:db8::3")
    assert admission.admits("2001:db8:0:1::3")


@pytest.mark.case(77)
def test_known_address_is_admitted_when_too_many_strangers_have_failed(clock: Seconds) -> None:
    admission = Admission(burst=3, per_second=1, total_burst=10, total_per_second=1, clock=clock)
    admission.succeeded("192.0.2.1")
    admission.succeeded("192.0.2.2")
    for number in range(10):
        fail(admission, f"198.51.100.{number}", 1)
    assert admission.admits("192.0.2.1")
    assert not admission.admits("203.0.113.1")
    fail(admission, "192.0.2.2", 1)
    assert not admission.admits("192.0.2.2")  # it may be part of the flood
    clock.now += 1.1
    assert admission.admits("203.0.113.1")
    assert admission.admits("192.0.2.2")


def test_address_is_known_while_it_does_not_fail(clock: Seconds) -> None:
    admission = Admission(burst=3, per_second=1, max_addresses=2, clock=clock)
    assert not admission.knows("192.0.2.1")
    admission.succeeded("192.0.2.1")
    assert admission.knows("192.0.2.1")
    fail(admission, "192.0.2.1", 1)
    assert not admission.knows("192.0.2.1")
    clock.now += 1.1
    assert admission.knows("192.0.2.1")
    for number in range(2, 4):
        admission.succeeded(f"192.0.2.{number}")
    assert [admission.knows(f"192.0.2.{number}") for number in range(1, 4)] == [False, True, True]


def test_table_is_bounded_and_forgets_the_longest_silent(clock: Seconds) -> None:
    admission = Admission(burst=1, per_second=0.001, max_addresses=3, clock=clock)
    for number in range(5):
        fail(admission, f"192.0.2.{number}", 1)
    assert admission.remembered == 3
    assert [admission.admits(f"192.0.2.{number}") for number in range(5)] == [True, True, False, False, False]


class FakeAuthority:
    """Hears, or is away."""

    def __init__(self) -> None:
        self.heard: list[tuple[tuple[str, str, int], ...]] = []
        self.is_away = False

    async def handshakes_failed(self, counts: tuple[tuple[str, str, int], ...]) -> None:
        if self.is_away:
            raise RoomUnavailableError("away")
        self.heard.append(counts)


def tell(failures: FailedHandshakes, authority: FakeAuthority) -> None:
    asyncio.run(failures.tell(authority))  # type: ignore[arg-type]  # in its shape


def test_failures_are_told_once_with_their_counts() -> None:
    failures, authority = FailedHandshakes(), FakeAuthority()
    for _ in range(7):
        failures.note("no-certificate", "192.0.2.1")
    failures.note("timeout", "192.0.2.1")
    tell(failures, authority)
    tell(failures, authority)
    assert authority.heard == [(("no-certificate", "192.0.2.1", 7), ("timeout", "192.0.2.1", 1))]


def test_failures_are_kept_while_the_authority_is_away() -> None:
    failures, authority = FailedHandshakes(), FakeAuthority()
    authority.is_away = True
    for _ in range(3):
        failures.note("timeout", "192.0.2.1")
    tell(failures, authority)
    authority.is_away = False
    failures.note("timeout", "192.0.2.1")
    tell(failures, authority)
    assert authority.heard == [(("timeout", "192.0.2.1", 4),)]


def test_failures_from_very_many_addresses_fit_into_one_message_and_none_is_lost() -> None:
    failures, authority = FailedHandshakes(), FakeAuthority()
    for number in range(1_000):
        failures.note("timeout", f"10.0.{number // 250}.{number % 250}")
        failures.note("lost", f"10.0.{number // 250}.{number % 250}")
    tell(failures, authority)
    (counts,) = authority.heard
    assert len(counts) <= MAX_FAILED_HANDSHAKES
    assert sum(count for _, _, count in counts) == 2_000
    assert {result for result, address, _ in counts if address == ELSEWHERE} == {"timeout", "lost"}
