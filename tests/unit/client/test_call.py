"""When a call is tried again, and after which pause. Time and chance are the test's."""

from __future__ import annotations

import pytest

from keybroker.client.call import MAX_ATTEMPTS, Call
from keybroker.client.errors import BrokerAnswerError, BrokerIdentityError, BrokerUnreachableError
from keybroker.errors import (
    DeniedError,
    HsmTimeoutError,
    InProgressError,
    KeyBrokerError,
    NotFoundError,
    OverloadedError,
    SvidInvalidError,
)


class Time:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def call(*, is_repeatable: bool = True, timeout_s: float = 30, time: Time | None = None, spread: float = 0.5) -> Call:
    return Call(is_repeatable=is_repeatable, timeout_s=timeout_s, clock=time or Time(), spread=lambda: spread)


LOST = BrokerUnreachableError("lost")
BUSY = OverloadedError("busy", retry_after=2)


def test_pause_doubles() -> None:
    made = call()
    assert [made.pause_after(LOST) for _ in range(MAX_ATTEMPTS - 1)] == pytest.approx([0.1, 0.2, 0.4, 0.8])


@pytest.mark.parametrize(("spread", "pause"), [(0.0, 0.05), (0.5, 0.1), (1.0, 0.15)])
def test_pause_is_spread_so_that_clients_do_not_come_back_together(spread: float, pause: float) -> None:
    assert call(spread=spread).pause_after(LOST) == pytest.approx(pause)


def test_pause_is_never_shorter_than_the_broker_asked_for() -> None:
    assert call(spread=0).pause_after(BUSY) >= 2


def test_last_error_is_raised_after_the_last_attempt() -> None:
    made = call()
    for _ in range(MAX_ATTEMPTS - 1):
        made.pause_after(LOST)
    last = BrokerUnreachableError("the last one")
    with pytest.raises(BrokerUnreachableError) as caught:
        made.pause_after(last)
    assert caught.value is last


def test_pause_that_does_not_fit_into_the_time_is_not_made() -> None:
    time = Time()
    made = call(time=time, timeout_s=5)
    assert made.pause_after(BUSY) == pytest.approx(2.1)
    time.now += 3
    assert made.left == pytest.approx(2)
    with pytest.raises(OverloadedError):
        made.pause_after(BUSY)


def test_no_time_is_left_after_the_end() -> None:
    time = Time()
    made = call(time=time, timeout_s=5)
    assert made.left == 5
    time.now += 7
    assert made.left == 0
    with pytest.raises(BrokerUnreachableError):
        made.pause_after(LOST)


@pytest.mark.parametrize("err", [LOST, BUSY, InProgressError("wait")], ids=lambda err: type(err).__name__)
def test_what_passes_is_tried_again_only_where_that_is_safe(err: KeyBrokerError) -> None:
    assert call().pause_after(err) > 0
    with pytest.raises(type(err)):
        call(is_repeatable=False).pause_after(err)


@pytest.mark.parametrize(
    "err",
    [
        DeniedError("no"),
        NotFoundError("no"),
        SvidInvalidError("no"),
        OverloadedError("busy, and says nothing of when to come back"),
        HsmTimeoutError("the token may have signed"),
        BrokerIdentityError("another"),
        BrokerAnswerError("nonsense"),
        KeyBrokerError("anything"),
    ],
    ids=lambda err: type(err).__name__,
)
def test_what_does_not_pass_is_raised_at_once(err: KeyBrokerError) -> None:
    with pytest.raises(type(err)) as caught:
        call().pause_after(err)
    assert caught.value is err
