"""Times as people write them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keybroker.cli.moments import MomentError, moment

NOW_US = 1_790_000_000_000_000  # 2026-09-21T14:13:20Z


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1s", "2026-09-21T14:13:19.000000Z"),
        ("2m", "2026-09-21T14:11:20.000000Z"),
        ("2h", "2026-09-21T12:13:20.000000Z"),
        ("1d", "2026-09-20T14:13:20.000000Z"),
        ("1w", "2026-09-14T14:13:20.000000Z"),
        ("999999999w", "1970-01-01T00:00:00.000000Z"),
        ("2026-11-24T08:00:00Z", "2026-11-24T08:00:00.000000Z"),
        ("2026-11-24T08:00:00+02:00", "2026-11-24T06:00:00.000000Z"),
        ("2026-11-24T08:00:00.5Z", "2026-11-24T08:00:00.500000Z"),
    ],
)
def test_time_is_told_in_utc(text: str, expected: str) -> None:
    assert moment(text, NOW_US) == expected


@pytest.mark.parametrize("text", ["", "2", "h", "0h", "-2h", "2 h", "2h\n", "2y", "yesterday", "2026-11-24", "2026-11-24T08:00:00"])
def test_what_is_not_a_time_is_refused_with_how_to_write_one(text: str) -> None:
    with pytest.raises(MomentError, match="write 2h"):
        moment(text, NOW_US)


@settings(deadline=None)
@given(text=st.text(max_size=30))
def test_no_text_is_anything_but_a_time_or_refused(text: str) -> None:
    with contextlib.suppress(MomentError):
        assert moment(text, NOW_US).endswith("Z")
