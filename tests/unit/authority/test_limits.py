"""Limits against a model that keeps every use and counts them all: never over, whatever happens; exactly at it up to the exact bound."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from keybroker.authority import limits as limits_module
from keybroker.authority.limits import Limits, Subject, counter_of, seconds_until
from keybroker.authority.store import schema
from keybroker.authority.store.units import UnitTable
from keybroker.model.decision import Limit, Obligation, no_obligation
from tests.clocks import START_US

SECOND = 1_000_000
A, B = Subject("spiffe://example.org/a", "orders", ""), Subject("spiffe://example.org/b", "orders", "")
SUBJECTS = (A, B, Subject("spiffe://example.org/a", "invoices", ""))


def database(path: str = ":memory:") -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    schema.migrate(db)
    return db


def obligation(*limits: Limit, grant: str = "g") -> Obligation:
    empty = no_obligation(grant)
    return Obligation(grant, "", "", (), limits, (), 0, 0, empty.evidence, observe_only=False)


def use(limits: Limits, demanded: Obligation, subject: Subject, now_us: int) -> bool:
    """One use, as the journal makes it: whether it may happen."""
    free, spent = limits.ask(demanded, subject, now_us)
    if not spent:
        limits.take(free, now_us)
    return not spent


def which(limit: Limit, subject: Subject) -> object:
    return "" if limit.per == "grant" else getattr(subject, limit.per)


class Model:
    """Every use, for ever."""

    def __init__(self) -> None:
        self.uses: list[tuple[int, Subject]] = []

    def count(self, limit: Limit, subject: Subject, now_us: int) -> int:
        """Uses in the window that ends now, both ends in it."""
        since_us = now_us - limit.window_s * SECOND
        return sum(since_us <= at for at, other in self.uses if which(limit, other) == which(limit, subject))


class LimitsMachine(RuleBasedStateMachine):
    """Uses by several callers, in transactions that commit or not, with restarts, sweeps, and time that passes or stands still."""

    shares = 1  # how many units may share a row of the coarse limit

    def __init__(self) -> None:
        super().__init__()
        self.db = database()
        self.now_us = START_US
        self.model = Model()
        self.demanded = obligation(Limit(3, 10, "workload"), Limit(5, 60, "key"))
        self.limits = Limits(UnitTable(self.db))

    @initialize(
        chosen=st.lists(
            st.builds(
                Limit,
                max=st.integers(1, 6),
                window_s=st.integers(1, 30),
                per=st.sampled_from(["workload", "key", "grant", "principal"]),
            ),
            min_size=1,
            max_size=3,
            unique_by=lambda limit: (limit.window_s, limit.per),
        )
    )
    def choose(self, chosen: list[Limit]) -> None:
        self.demanded = obligation(*chosen)

    @rule(subject=st.sampled_from(SUBJECTS), times=st.integers(1, 8), commits=st.booleans())
    def several_in_one_transaction(self, subject: Subject, times: int, commits: bool) -> None:
        before = list(self.model.uses)
        self.db.execute("BEGIN IMMEDIATE")
        self.limits._units.begin()
        for _ in range(times):
            self.use_once(subject)
        self.db.execute("COMMIT" if commits else "ROLLBACK")
        if not commits:
            self.model.uses = before

    def use_once(self, subject: Subject) -> None:
        expected = all(self.model.count(limit, subject, self.now_us) < limit.max for limit in self.demanded.limits)
        assert use(self.limits, self.demanded, subject, self.now_us) is expected
        if expected:
            self.model.uses.append((self.now_us, subject))

    @rule(us=st.one_of(st.sampled_from([1, SECOND, 10 * SECOND - 1, 10 * SECOND, 10 * SECOND + 1]), st.integers(1, 40 * SECOND)))
    def time_passes(self, us: int) -> None:
        self.now_us += us

    @rule()
    def broker_restarts(self) -> None:
        self.limits = Limits(UnitTable(self.db))

    @rule(rows=st.integers(1, 5))
    def what_has_left_is_swept(self, rows: int) -> None:
        self.limits._units.begin()
        self.limits._units.sweep(self.now_us, rows)

    @rule(subject=st.sampled_from(SUBJECTS))
    def retry_after_is_true(self, subject: Subject) -> None:
        self.limits._units.begin()
        _, spent = self.limits.ask(self.demanded, subject, self.now_us)
        if spent:
            wait_s = max(seconds_until(each.until_us, self.now_us) for each in spent)
            self.now_us += wait_s * SECOND
            assert self.limits.ask(self.demanded, subject, self.now_us)[1] == []

    @invariant()
    def what_is_left_is_what_the_model_leaves(self) -> None:
        self.limits._units.begin()
        for limit in self.demanded.limits:
            for subject in SUBJECTS:
                left = self.limits.left("g", limit, subject, self.now_us)
                assert left.left == limit.max - self.model.count(limit, subject, self.now_us)
                assert (left.left == 0) is (left.retry_after > 0)

    def teardown(self) -> None:
        self.db.close()


LimitsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
TestLimits = LimitsMachine.TestCase


@pytest.mark.parametrize("size", [150, 1_500])
def test_coarse_limit_is_never_over_and_under_by_less_than_its_share(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "EXACT", 100)  # a hundredth of the real bounds
    monkeypatch.setattr(limits_module, "SHARES", 10)
    db = database()
    limits, model, demanded = Limits(UnitTable(db)), Model(), obligation(Limit(size, 60, "grant"))
    now_us, under, refused = START_US, 0, 0
    db.execute("BEGIN")
    for step in range(3 * size):  # bursts with pauses: three windows' worth of uses in about two windows
        now_us += 30 * SECOND // size if step % (size // 7) else 2 * SECOND
        count = model.count(demanded.limits[0], A, now_us)
        if use(limits, demanded, A, now_us):
            assert count < size
            model.uses.append((now_us, A))
        else:
            refused += 1
            under = max(under, size - count)
    assert 0 < refused < 2 * size
    assert under < size // limits_module.SHARES
    assert db.execute("SELECT count(*) FROM limit_unit").fetchone()[0] <= 3 * limits_module.SHARES
    db.close()


def test_row_for_each_unit_up_to_the_exact_bound_and_at_most_a_thousand_rows_above() -> None:
    assert (limits_module.EXACT, limits_module.SHARES) == (10_000, 1_000)
    db = database()
    limits = Limits(UnitTable(db))
    db.execute("BEGIN")
    exact, coarse = obligation(Limit(10_000, 60, "grant"), grant="exact"), obligation(Limit(10_001, 60, "grant"))
    for demanded, expected in ((exact, 10_000), (coarse, 1_001)):
        allowed = sum(use(limits, demanded, A, START_US + step) for step in range(10_100))
        assert allowed == demanded.limits[0].max
        counter = counter_of(demanded.grant, 60, "grant", A)
        assert db.execute("SELECT count(*) FROM limit_unit WHERE counter = ?", (counter,)).fetchone()[0] == expected
    db.close()


def test_rows_of_a_limit_at_its_bound_stay_as_many_as_its_units() -> None:
    db = database()
    limits, demanded = Limits(UnitTable(db)), obligation(Limit(5, 1, "grant"))
    for step in range(100):
        assert use(limits, demanded, A, START_US + step * SECOND)
    assert db.execute("SELECT count(*) FROM limit_unit").fetchone()[0] <= 5


def test_sweep_forgets_what_has_left_whoever_it_was_and_nothing_else() -> None:
    db = database()
    table = UnitTable(db)
    limits, demanded = Limits(table), obligation(Limit(5, 10, "workload"))
    for number in range(30):
        assert use(limits, demanded, Subject(f"w{number}", "orders", ""), START_US + (number % 2) * 5 * SECOND)
    for _ in range(20):
        table.sweep(START_US + 11 * SECOND, 4)
    assert db.execute("SELECT count(*) FROM limit_unit").fetchone()[0] == 15
    for _ in range(20):
        table.sweep(START_US + 16 * SECOND, 4)
    assert db.execute("SELECT count(*) FROM limit_unit").fetchone()[0] == 0


def test_raised_and_lowered_limit_counts_the_same_uses() -> None:
    db = database()
    limits = Limits(UnitTable(db))
    for step in range(10):
        assert use(limits, obligation(Limit(10, 60, "key")), A, START_US + step)
    assert not use(limits, obligation(Limit(10, 60, "key")), A, START_US + 10)
    assert not use(limits, obligation(Limit(4, 60, "key")), A, START_US + 11)
    assert [use(limits, obligation(Limit(12, 60, "key")), A, START_US + step) for step in (12, 13, 14)] == [True, True, False]


@pytest.mark.parametrize(
    ("per", "others"), [("workload", [A, SUBJECTS[2]]), ("key", [A, B]), ("grant", list(SUBJECTS)), ("principal", list(SUBJECTS))]
)
def test_what_is_counted_apart_is_what_the_limit_says(per: Any, others: list[Subject]) -> None:
    demanded, limits = obligation(Limit(1, 60, per)), Limits(UnitTable(database()))
    assert use(limits, demanded, A, START_US)
    for subject in SUBJECTS:
        assert use(limits, demanded, subject, START_US) is (subject not in others)
    assert use(limits, obligation(Limit(1, 60, per), grant="another"), A, START_US)


def test_units_are_there_after_the_database_was_closed(tmp_path: Path) -> None:
    demanded = obligation(Limit(2, 60, "key"))
    for expected in (True, True, False):
        db = database(str(tmp_path / "db"))
        assert use(Limits(UnitTable(db)), demanded, A, START_US) is expected
        db.close()
