"""Which settings of the clock are noticed, over what, and that steady time goes on through all of them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from keybroker.authority import hours
from keybroker.authority.clock_watch import ClockWatch
from keybroker.authority.store import acknowledgement
from keybroker.authority.timekeeper import ClockRow, Timekeeper
from tests.brokers import FakeBroker, fake_broker
from tests.clocks import START_US, FixedClock

SECOND, HOUR, DAY = 1_000_000, 3_600_000_000, 86_400_000_000


def keeper(clock: FixedClock, row: ClockRow | None = None, last_us: int = 0) -> Timekeeper:
    return Timekeeper(clock, row, last_us, 86_400)


def kept(made: Timekeeper) -> ClockRow:
    """What the store keeps of it."""
    made.look()
    made._is_due = True
    row = made.due()
    assert row is not None
    made.saved(row)
    return row


def test_time_that_passes_is_trusted_and_steady(clock: FixedClock) -> None:
    made = keeper(clock)
    first = made.look()
    for _ in range(100):
        clock.time_us += 2 * HOUR
        assert made.look().distrusted == ""
    assert made.look().steady_us - first.steady_us == 200 * HOUR
    assert made.look().time_us == clock.time_us


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock()


@pytest.mark.case(39)
@pytest.mark.parametrize(
    ("jump_us", "saw"),
    [
        (-HOUR, "the clock was set back by 3600 s"),
        (DAY, "the clock was set forward by 86400 s"),
        (-6 * SECOND, "the clock was set back by 6 s"),
        (6 * SECOND, "the clock was set forward by 6 s"),
        (-5 * SECOND, ""),
        (5 * SECOND, ""),
        (-SECOND, ""),  # a leap second
    ],
)
def test_setting_the_clock_is_noticed_beyond_a_small_step_and_steady_time_does_not_move(clock: FixedClock, jump_us: int, saw: str) -> None:
    made = keeper(clock)
    before = made.look()
    clock.jump(jump_us)
    after = made.look()
    assert after.distrusted.partition(" ")[2] == saw
    assert after.steady_us == before.steady_us
    clock.time_us += 10 * SECOND
    assert made.look().steady_us == before.steady_us + 10 * SECOND


@pytest.mark.case(39)
def test_clock_that_comes_back_by_itself_stays_distrusted_until_it_is_acknowledged(clock: FixedClock) -> None:
    made = keeper(clock)
    clock.jump(-HOUR)
    event = made.look().distrusted
    clock.jump(HOUR)
    assert made.look().distrusted == event
    made.acknowledge()
    assert made.look().distrusted == ""
    clock.jump(HOUR)
    assert made.look().distrusted.partition(" ")[0] not in {"", event.partition(" ")[0]}


@pytest.mark.case(39)
def test_clock_cannot_be_moved_far_in_small_steps(clock: FixedClock) -> None:
    made = keeper(clock)
    seen = []
    for _ in range(10):
        clock.jump(2 * SECOND)
        clock.time_us += 60 * SECOND
        seen.append(bool(made.look().distrusted))
    assert seen == [False, False, *[True] * 8]


def test_clock_that_drifts_as_ntp_slews_it_is_trusted(clock: FixedClock) -> None:
    made = keeper(clock)
    for _ in range(1_000):
        clock.time_us += 600 * SECOND
        clock.jump(600 * SECOND // 2_500)
        assert made.look().distrusted == ""


def test_restart_of_the_broker_goes_on_where_it_was(clock: FixedClock) -> None:
    made = keeper(clock)
    row, before = kept(made), made.look()
    clock.time_us += 3 * DAY  # a broker may be away as long as it likes while the host is up
    moment = keeper(clock, row).look()
    assert (moment.distrusted, moment.steady_us) == ("", before.steady_us + 3 * DAY)


@pytest.mark.case(39)
@pytest.mark.case(41)
@pytest.mark.parametrize("skew_us", [-60 * SECOND, 60 * SECOND])
def test_broker_that_takes_over_with_another_clock_counts_on_by_the_store(clock: FixedClock, skew_us: int) -> None:
    made = keeper(clock)
    row, before = kept(made), made.look()
    clock.jump(skew_us)
    clock.time_us += SECOND
    other = keeper(clock, row)
    assert other.look().distrusted
    assert other.look().steady_us == before.steady_us + SECOND
    again = keeper(clock, kept(other))
    assert again.look().distrusted == other.look().distrusted
    again.acknowledge()
    assert (again.look().distrusted, again.look().steady_us) == ("", before.steady_us + SECOND)


@pytest.mark.case(39)
@pytest.mark.parametrize(
    ("gap_us", "saw", "steady_us"),
    [
        (600 * SECOND, "", 600 * SECOND),
        (DAY, "", DAY),
        (DAY + SECOND, "after a boot the clock is 86401 s after the broker last looked at it", 0),
        (-SECOND, "", 0),
        (-HOUR, "after a boot the clock is 3600 s before the broker last looked at it", 0),
    ],
)
def test_gap_over_a_boot_is_believed_up_to_the_bound_and_never_backwards(clock: FixedClock, gap_us: int, saw: str, steady_us: int) -> None:
    made = keeper(clock)
    row, before = kept(made), made.look()
    clock.time_us += gap_us
    clock.reboot()
    after = keeper(clock, row).look()
    assert after.distrusted.partition(" ")[2] == saw
    assert after.steady_us == before.steady_us + steady_us


def test_time_that_was_away_counts_once_the_clock_is_acknowledged_and_only_then(clock: FixedClock) -> None:
    made = keeper(clock)
    row, before = kept(made), made.look()
    clock.time_us += 3 * DAY
    clock.reboot()
    other = keeper(clock, row)
    assert other.look().steady_us == before.steady_us
    clock.time_us += SECOND
    other.acknowledge()
    assert other.look().steady_us == before.steady_us + 3 * DAY + SECOND


def test_boot_without_a_name_is_another_boot(clock: FixedClock) -> None:
    clock.boot_id = ""
    row, before = kept(keeper(clock)), clock.time_us
    clock.time_us += HOUR
    assert keeper(clock, row).look().distrusted == ""
    clock.time_us = before - HOUR
    assert keeper(clock, row).look().distrusted


def test_store_of_a_version_that_kept_no_clock_is_judged_by_its_last_record(clock: FixedClock) -> None:
    assert keeper(clock, None, START_US - HOUR).look().distrusted == ""
    assert keeper(clock, None, START_US - 20 * DAY).look().distrusted == ""  # there are no units that it could refill
    assert keeper(clock, None, START_US + HOUR).look().distrusted


def test_process_that_was_stopped_between_two_readings_sees_no_jump() -> None:
    class Stopped(FixedClock):
        stops = 0

        def now_us(self) -> int:
            now_us = super().now_us()
            if self.stops:
                self.stops -= 1
                self.time_us += 60 * SECOND
            return now_us

    stopped = Stopped()
    made = keeper(stopped)
    for stops in (1, 2, 3):
        stopped.stops = stops
        assert made.look().distrusted == ""


# What is told, and who may say that it is right again.


def watched(tmp_path: Path, test: object) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            watch = ClockWatch(broker.timekeeper, broker.journal, broker.security, broker.generation, tmp_path)
            await test(broker, watch)  # type: ignore[operator]

    asyncio.run(main())


@pytest.mark.case(39)
def test_distrust_is_an_event_that_survives_a_restart_until_an_operator_acknowledges_it(tmp_path: Path) -> None:
    async def test(broker: FakeBroker, watch: ClockWatch) -> None:
        await watch.look()
        assert acknowledgement.distrusted(tmp_path) == ""
        broker.clock.jump(-HOUR)
        await watch.look()
        await watch.look()
        await broker.security.flush()
        events = [record["body"] for record in broker.records()]
        assert events == [{"event": "clock-untrusted", "detail": "the clock was set back by 3600 s", "count": 1}]
        event, _, saw = acknowledgement.distrusted(tmp_path).partition(" ")
        assert saw == "the clock was set back by 3600 s"

        acknowledgement.acknowledge(tmp_path, "01" * 13)  # of an event that there is not
        await watch.look()
        assert not acknowledgement.is_waiting(tmp_path)
        assert broker.timekeeper.distrusted

        acknowledgement.acknowledge(tmp_path, event)
        await watch.look()
        assert not acknowledgement.is_waiting(tmp_path)
        assert (broker.timekeeper.distrusted, acknowledgement.distrusted(tmp_path)) == ("", "")
        body = broker.records()[-1]["body"]
        assert (body["change"], body["event"], body["saw"]) == ("clock-acknowledged", event, saw)
        assert body["uid"] == str(os.getuid())

    watched(tmp_path, test)


def test_clock_is_kept_every_minute_though_nobody_writes(tmp_path: Path) -> None:
    async def test(broker: FakeBroker, watch: ClockWatch) -> None:
        await watch.look()
        for _ in range(3):
            broker.clock.time_us += 61 * SECOND
            await watch.look()
            row = broker.store.clock()
            assert row is not None
            assert row.time_us == broker.clock.time_us
        assert broker.records() == []

    watched(tmp_path, test)


@pytest.mark.case(42)
def test_change_of_the_time_zones_is_on_record_and_binds_uses_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(broker: FakeBroker, watch: ClockWatch) -> None:
        before, generation = hours.zones_digest(), broker.generation.number
        assert len(before) == 64
        await watch.look()
        assert broker.records() == []
        monkeypatch.setattr(hours, "zones_digest", lambda: "ab" * 32)
        await watch.look()
        await watch.look()
        assert [record["body"] for record in broker.records()] == [{"change": "tzdata", "from": before, "to": "ab" * 32}]
        assert broker.generation.number == generation + 1

    watched(tmp_path, test)
