"""Reports hold the numbers, and nothing in the record can write markup into them."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from keybroker.cli import impact_report
from keybroker.clock import to_rfc3339
from keybroker.model.impact import Hour, Impact, KeyRow, Question, Row, Tally

TALLY = Tally(7, 1, 2, 3, 40, to_rfc3339(0), to_rfc3339(10**12))
NOTHING = Tally(0, 0, 0, -1, -1, "", "")
HOSTILE = "<script>alert(1)</script> | [x](javascript:y) \x1b[2J\u202e`"


def impact_of(timeline: tuple[Hour, ...] = (), total: Tally = TALLY) -> Impact:
    row = (Row(HOSTILE, TALLY),)
    return Impact(
        log="example.org/test", question=Question(workload=HOSTILE), records=41, time=to_rfc3339(10**12), total=total,
        endings={"signed": 7}, keys=(KeyRow("orders", "1", "sign", "ES256", TALLY),), workloads=row, contents=(), fields=row,
        grants=row, people=(), addresses=(), svids=(), elsewhere=(), timeline=timeline, more={"svids": 5},
    )  # fmt: skip


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002  as the library calls it
        self.seen.append(tag)


@pytest.mark.parametrize("make", [impact_report.page, impact_report.markdown])
def test_text_of_the_record_moves_no_cursor(make: Callable[[Impact], str]) -> None:
    text = make(impact_of())
    assert not {"\x1b", "\u202e"} & set(text)
    assert "orders" in text
    assert "not shown of svids" in text


def test_text_of_the_record_is_no_markup() -> None:
    page = impact_report.page(impact_of())
    assert "script" not in Tags(page).seen
    assert "&lt;script&gt;" in page
    line = next(each for each in impact_report.markdown(impact_of()).splitlines() if each.startswith("- workload"))
    assert not re.search(r"(?<!\\)[<>|`\[\]()]", line)


def test_page_has_a_picture_with_the_numbers_of_each_bar() -> None:
    hours = tuple(Hour(to_rfc3339(hour * 3_600_000_000), hour, 0, 1) for hour in range(1, 6))
    tags = Tags(impact_report.page(impact_of(hours))).seen
    assert tags.count("g") == 5
    assert tags.count("rect") == 10
    days = tuple(Hour(to_rfc3339(day * 24 * 3_600_000_000), 1, 0, 0) for day in range(30))
    assert "a bar a day" in impact_report.page(impact_of(days))
    assert "<svg" not in impact_report.page(impact_of())


def test_report_of_nothing_says_so() -> None:
    text = impact_report.markdown(impact_of(total=NOTHING))
    assert "- signed: 0" in text
    assert "- first" not in text
