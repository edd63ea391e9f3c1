"""Opening hours by the clocks of many places: ends of windows, midnight, dates that are closed, and the nights when clocks are moved."""

from __future__ import annotations

import datetime
import zoneinfo
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keybroker.authority.hours import is_open, unmet, zone_of
from keybroker.clock import from_rfc3339
from keybroker.model.decision import Day, HoursWindow, Obligation

WEEK: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
WORKDAYS = WEEK[:5]
MINUTE = 60_000_000


def window(
    days: tuple[Day, ...] = WEEK, opens: str = "08:00", closes: str = "18:00", zone: str = "UTC", excluded: tuple[str, ...] = ()
) -> HoursWindow:
    return HoursWindow(days, opens, closes, zone, excluded)


def opened(made: HoursWindow, moments: Iterable[str]) -> list[bool]:
    return [is_open(made, from_rfc3339(moment)) for moment in moments]


def test_window_is_open_from_its_first_minute_to_the_last_before_its_end() -> None:
    day = "2026-11-25T"  # a Wednesday
    moments = [f"{day}{time}Z" for time in ("07:59:59.999999", "08:00:00", "12:00:00", "17:59:59.999999", "18:00:00")]
    assert opened(window(WORKDAYS), moments) == [False, True, True, True, False]
    assert opened(window(("wed",)), moments[1:2]) == [True]
    assert opened(window(("tue", "thu")), moments) == [False] * 5


def test_whole_day_is_open_to_its_end() -> None:
    moments = [f"2026-11-{moment}Z" for moment in ("24T23:59:59", "25T00:00", "25T23:59:59", "26T00:00")]
    assert opened(window(("wed",), "00:00", "24:00"), moments) == [False, True, True, False]


def test_window_over_midnight_belongs_to_the_day_on_which_it_begins() -> None:
    night = window(("sat",), "22:00", "02:00")
    moments = ["2026-11-28T21:59Z", "2026-11-28T22:00Z", "2026-11-29T00:00Z", "2026-11-29T01:59Z", "2026-11-29T02:00Z", "2026-11-29T22:00Z",
               "2026-11-28T01:00Z"]  # fmt: skip
    assert opened(night, moments) == [False, True, True, True, False, False, False]


def test_excluded_date_is_closed_and_no_window_begins_on_it() -> None:
    christmas = window(WEEK, "22:00", "06:00", excluded=("2026-12-25",))
    moments = ["2026-12-24T23:00Z", "2026-12-25T01:00Z", "2026-12-25T23:00Z", "2026-12-26T01:00Z", "2026-12-26T23:00Z"]
    assert opened(christmas, moments) == [True, False, False, False, True]
    assert opened(window(excluded=("2026-12-25",)), ["2026-12-24T12:00Z", "2026-12-25T12:00Z", "2026-12-26T12:00Z"]) == [True, False, True]


def test_date_and_day_are_those_of_the_zone() -> None:
    auckland = window(("thu",), "08:00", "09:00", "Pacific/Auckland", ("2026-12-03",))
    assert opened(auckland, ["2026-11-25T19:30Z", "2026-11-26T19:30Z", "2026-12-02T19:30Z"]) == [True, False, False]
    assert opened(window(("tue",), "20:00", "21:00", "America/Los_Angeles"), ["2026-11-25T04:30Z", "2026-11-24T20:30Z"]) == [True, False]
    assert opened(window(("wed",), "05:45", "05:46", "Asia/Kathmandu"), ["2026-11-25T00:00Z", "2026-11-25T00:01Z"]) == [True, False]


@pytest.mark.case(39)
@pytest.mark.parametrize(
    ("zone", "window_", "first", "opens"),
    [
        # clocks are put forward: 02:00 becomes 03:00, and 02:30 does not happen
        ("Europe/Berlin", ("02:00", "03:00"), "2026-03-29T00:00Z", []),
        ("Europe/Berlin", ("01:30", "03:30"), "2026-03-29T00:00Z", ["00:30", "00:45", "01:00", "01:15"]),
        ("America/New_York", ("02:00", "03:00"), "2026-03-08T06:00Z", []),
        ("America/New_York", ("01:30", "03:15"), "2026-03-08T06:00Z", ["06:30", "06:45", "07:00"]),
        ("Australia/Lord_Howe", ("02:00", "02:30"), "2026-10-03T15:00Z", []),  # half an hour
        # clocks are put back: 02:30 happens twice
        (
            "Europe/Berlin",
            ("02:00", "03:00"),
            "2026-10-25T00:00Z",
            ["00:00", "00:15", "00:30", "00:45", "01:00", "01:15", "01:30", "01:45"],
        ),
        ("America/New_York", ("01:30", "02:00"), "2026-11-01T05:00Z", ["05:30", "05:45", "06:30", "06:45"]),
        ("Australia/Lord_Howe", ("01:30", "02:00"), "2026-04-04T14:00Z", ["14:30", "14:45", "15:00", "15:15"]),
        # and where nothing happens
        ("Africa/Lagos", ("02:00", "03:00"), "2026-03-29T00:00Z", ["01:00", "01:15", "01:30", "01:45"]),
    ],
)
def test_nights_when_clocks_are_moved(zone: str, window_: tuple[str, str], first: str, opens: list[str]) -> None:
    made, begin = window(WEEK, *window_, zone), from_rfc3339(first)
    times = [begin + step * 15 * MINUTE for step in range(10)]
    found = [datetime.datetime.fromtimestamp(us // 1_000_000, datetime.UTC).strftime("%H:%M") for us in times if is_open(made, us)]
    assert found == opens


ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Pacific/Chatham", "Australia/Lord_Howe", "America/St_Johns")


@settings(deadline=None)
@given(
    time_us=st.integers(from_rfc3339("2020-01-01T00:00Z"), from_rfc3339("2040-01-01T00:00Z")),
    zone=st.sampled_from(ZONES),
    days=st.sets(st.sampled_from(WEEK), min_size=1),
    opens=st.integers(0, 1439),
    length=st.integers(1, 1440),
)
def test_window_is_what_a_walk_over_its_minutes_says(time_us: int, zone: str, days: set[Day], opens: int, length: int) -> None:
    closes = (opens + length) % 1440
    if closes == opens:
        return
    text = [f"{minute // 60:02}:{minute % 60:02}" for minute in (opens, closes)]
    made = window(tuple(day for day in WEEK if day in days), text[0], "24:00" if closes == 0 else text[1], zone)
    local = datetime.datetime.fromtimestamp(time_us / 1_000_000, zoneinfo.ZoneInfo(zone)).replace(tzinfo=None, second=0, microsecond=0)
    begun = [local.replace(hour=opens // 60, minute=opens % 60) - datetime.timedelta(days=back) for back in (0, 1)]
    expected = any(begin <= local < begin + datetime.timedelta(minutes=length) and WEEK[begin.weekday()] in days for begin in begun)
    assert is_open(made, time_us) is expected


def test_moments_bind_to_the_second_and_hours_with_them() -> None:
    def reasons(moment: str) -> tuple[str, ...]:
        return unmet(made, from_rfc3339(moment))

    made = Obligation(
        "g", "2026-11-25T00:00:00Z", "2026-11-26T00:00:00Z", (window(("wed",)), window(("wed",), "20:00", "21:00")), (), (), 0, 0, (),
        observe_only=False,
    )  # fmt: skip
    assert reasons("2026-11-24T23:59:59.999999Z") == ("not-before:g", "hours:g")
    assert reasons("2026-11-25T00:00:00Z") == ("hours:g",)
    assert reasons("2026-11-25T12:00:00Z") == reasons("2026-11-25T20:30:00Z") == ()
    assert reasons("2026-11-25T23:59:59.999999Z") == ("hours:g",)
    assert reasons("2026-11-26T00:00:00Z") == ("not-after:g", "hours:g")


@pytest.mark.case(42)
@pytest.mark.parametrize(
    "name", ["", "Europe", "Europe/Atlantis", "../UTC", "/etc/localtime", "right/UTC", "localtime", "a" * 300, "UTC\0", "Ütc"]
)
def test_zone_that_there_is_not_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="no such time zone on this host"):
        zone_of(name)


def test_every_zone_that_this_host_lists_is_known() -> None:
    listed = zoneinfo.available_timezones() - {"localtime", "Factory"}
    assert len(listed) > 400
    assert all(zone_of(name).key == name for name in listed)
