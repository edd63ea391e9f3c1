"""Notices wait, come back after pauses that grow, die, and can be sent again; over restarts, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from keybroker.courier import outbox as outboxes
from keybroker.courier.outbox import MAX_ATTEMPTS, Outbox
from keybroker.errors import StoreError

HOOKS = ("chat", "mail")
SECOND = 1_000_000


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "courier")


def test_records_wait_for_every_hook_in_order(outbox: Outbox) -> None:
    assert outbox.position == -1
    outbox.take([7, 9], HOOKS, 12, 0)
    assert outbox.position == 12
    for hook in HOOKS:
        first = outbox.due(hook, 0)
        assert first is not None
        assert (first.hook, first.record) == (hook, 7)
        outbox.delivered(first)
        second = outbox.due(hook, 0)
        assert second is not None
        assert second.record == 9
    assert outbox.counts() == (2, 0)


def test_nothing_is_taken_twice_and_what_is_known_survives_a_restart(outbox: Outbox, tmp_path: Path) -> None:
    outbox.take([7], HOOKS, 7, 0)
    outbox.close()
    again = Outbox(tmp_path / "courier")
    again.take([7], HOOKS, 7, 0)
    assert (again.position, again.counts()) == (7, (2, 0))


def test_pauses_double_are_spread_and_bounded_until_the_notice_is_dead(outbox: Outbox) -> None:
    outbox.take([7], ["chat"], 7, 0)
    pauses = []
    for attempt in range(MAX_ATTEMPTS):
        notice = outbox.due("chat", 10**15)
        assert notice is not None
        assert notice.attempts == attempt
        is_dead = outbox.failed(notice, "status 500", 0, spread=0.5)
        pauses.append(next(row[0] for row in outbox._base.execute("SELECT due_us FROM notice")) / SECOND)
        assert is_dead == (attempt == MAX_ATTEMPTS - 1)
    assert pauses[:4] == [2, 4, 8, 16]
    assert max(pauses) == 1_800
    assert outbox.due("chat", 10**15) is None
    (dead,) = outbox.dead()
    assert (dead.record, dead.attempts, dead.why) == (7, MAX_ATTEMPTS, "status 500")


def test_spread_is_from_half_a_pause_to_one_and_a_half(outbox: Outbox) -> None:
    outbox.take([7], HOOKS, 7, 0)
    for hook, spread, due_s in (("chat", 0.0, 1), ("mail", 1.0, 3)):
        notice = outbox.due(hook, 0)
        assert notice is not None
        outbox.failed(notice, "", 0, spread)
        assert outbox.due(hook, due_s * SECOND - 1) is None
        assert outbox.due(hook, due_s * SECOND) is not None


def dead_ones(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outboxes, "MAX_ATTEMPTS", 1)
    outbox.take([7, 8], HOOKS, 8, 0)
    for hook in HOOKS:
        while notice := outbox.due(hook, 0):
            outbox.failed(notice, "x" * 1_000, 0, 0.5)


@pytest.mark.parametrize(
    ("hook", "record", "count"), [("", -1, 4), ("chat", -1, 2), ("", 8, 2), ("mail", 7, 1), ("none", -1, 0), ("", 99, 0)]
)
def test_dead_notices_are_sent_again_all_or_those_that_are_named(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, hook: str, record: int, count: int
) -> None:
    dead_ones(outbox, monkeypatch)
    assert len(outbox.dead()[0].why) == 200
    assert outbox.revive(hook, record) == count
    assert outbox.counts() == (count, 4 - count)


def test_outbox_is_bounded_and_drops_dead_and_old_ones_first(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outboxes, "MAX_NOTICES", 3)
    dead_ones(outbox, monkeypatch)
    assert outbox.counts() == (0, 3)
    assert outbox.take([9, 10], ["chat"], 10, 0) == 2
    assert outbox.counts() == (2, 1)


def test_state_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="outbox cannot be used"):
        Outbox(tmp_path / "file" / "below")
