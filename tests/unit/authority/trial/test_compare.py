"""What two policies do differently: said from the rules, held against what the engine answers, request by request."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from keybroker.authority.policy import loader
from keybroker.authority.policy.grants import Rules
from keybroker.authority.trial import compare_words
from keybroker.authority.trial.compare import Change, Comparison, compare
from keybroker.authority.trial.demands import demands_of_all, not_kept
from keybroker.authority.trial.region import point_of
from keybroker.model.decision import Decision, PolicyInput, Verdict
from tests.policies import GOOD, decide, default_engine
from tests.random_policies import PolicyMaker, seen_from

SEEDS = range(60)
REQUESTS = 60


def covered(comparison: Comparison, change: Change, request: PolicyInput, address: str) -> list[object]:
    """The demands of the lines of one kind that cover a request; None for a line about a verdict."""
    point = point_of(request, comparison.zones.at(address))
    return [line.demand for line in comparison.lines if line.change is change and line.covers(point)]


@pytest.mark.parametrize("seed", SEEDS)
def test_lines_cover_exactly_what_changes_between_the_engines(seed: int) -> None:
    maker = PolicyMaker(seed)
    old = maker.rules()
    new = maker.changed(old)
    comparison = compare(old, new)
    engines = default_engine(old), default_engine(new)
    for _ in range(REQUESTS):
        request, address = maker.near(old, new), maker.address()
        before, after = (decide(each, seen_from(request, rules, address)) for each, rules in zip(engines, (old, new), strict=True))
        assert Verdict.FAILED not in {before.verdict, after.verdict}
        may, might = after.verdict is Verdict.ALLOW, before.verdict is Verdict.ALLOW
        where = f"seed {seed}: {request} from {address}"
        assert bool(covered(comparison, Change.GAINED, request, address)) == (may and not might), where
        assert bool(covered(comparison, Change.LOST, request, address)) == (might and not may), where
        both = may and might
        assert set(covered(comparison, Change.TIGHTENED, request, address)) == (more(before, after) if both else set()), where
        assert set(covered(comparison, Change.LOOSENED, request, address)) == (more(after, before) if both else set()), where


def more(one: Decision, other: Decision) -> set[object]:
    """What the other decision demands that this one does not."""
    return set(not_kept(demands_of_all(other.obligations), demands_of_all(one.obligations)))


def test_requests_of_the_comparison_meet_every_kind_of_change() -> None:
    seen: Counter[Change] = Counter()
    for seed in SEEDS:
        maker = PolicyMaker(seed)
        old = maker.rules()
        new = maker.changed(old)
        comparison = compare(old, new)
        for _ in range(REQUESTS):
            request, address = maker.near(old, new), maker.address()
            seen.update(change for change in Change if covered(comparison, change, request, address))
    assert min(seen[change] for change in Change) >= 25, seen


def test_policy_does_not_differ_from_itself() -> None:
    for seed in SEEDS:
        rules = PolicyMaker(seed).rules()
        comparison = compare(rules, rules)
        assert comparison.lines == ()


def rules_of(directory: Path, text: str) -> Rules:
    directory.mkdir()
    (directory / "a.yaml").write_text(text)
    return loader.load(directory, frozenset({"orders"}))


def test_order_of_rules_and_files_is_no_difference(tmp_path: Path) -> None:
    more_rules = GOOD.replace("id: payments", "id: more").replace("payments/*", "a/*").partition("\n")[2]
    one, other = rules_of(tmp_path / "a", GOOD + more_rules), rules_of(tmp_path / "b", "grants:\n" + more_rules + GOOD.partition("\n")[2])
    assert compare(one, other).lines == ()


def test_limit_that_is_lowered_is_tightened_only(tmp_path: Path) -> None:
    limit = "    limits: [{{max: {}, window: 1m, per: workload}}]\n"
    high, low = (rules_of(tmp_path / str(number), GOOD + limit.format(number)) for number in (100, 50))
    (line,) = compare(high, low).lines
    assert (line.change, line.cause) == (Change.TIGHTENED, "the grant payments has changed")
    assert line.demand is not None
    assert line.demand.text == "at most 50 uses in any 1m, for each workload (payments)"
    (line,) = compare(low, high).lines
    assert (line.change, line.demand and line.demand.text) == (
        Change.LOOSENED, "at most 50 uses in any 1m, for each workload (payments)",
    )  # fmt: skip


def test_network_that_means_other_addresses_is_a_gain_and_a_loss(tmp_path: Path) -> None:
    text = GOOD + '    networks: [office]\nnetworks:\n  office: ["{}"]\n'
    one, other = rules_of(tmp_path / "a", text.format("10.0.0.0/8")), rules_of(tmp_path / "b", text.format("10.0.0.0/9"))
    comparison = compare(one, other)
    assert {line.change for line in comparison.lines} == {Change.LOST}
    assert {comparison.zones.addresses(line.zones) for line in comparison.lines} == {("10.128.0.0/9",)}


def test_person_who_joins_a_group_may_approve(tmp_path: Path) -> None:
    people = 'people:\n  alice: ["spiffe://example.org/alice"]\n  bob: ["spiffe://example.org/bob"]\ngroups:\n  managers: [{}]\n'
    quorum = GOOD + "    quorum: {approvals: 1, of: [managers], expires: 1h}\n"
    one, other = rules_of(tmp_path / "a", quorum + people.format("alice")), rules_of(tmp_path / "b", quorum + people.format("alice, bob"))
    comparison = compare(one, other)
    assert compare_words.sentences(comparison)[0] == (
        "+ spiffe://example.org/bob may now approve the use of orders for spiffe://example.org/payments/*: the grant payments has changed"
    )
    assert [each.change for each in comparison.lines] == [Change.GAINED, Change.LOOSENED]


def test_differences_are_said_in_words_with_what_they_leave_out(tmp_path: Path) -> None:
    deny = 'denies:\n  - {id: not-b, workloads: ["spiffe://example.org/*/b"], operations: [sign]}\n'
    wider = GOOD.replace("payments/*", "**").replace("[orders]", '["*"]').replace("id: payments", "id: all")
    comparison = compare(rules_of(tmp_path / "a", GOOD), rules_of(tmp_path / "b", wider + deny))
    assert compare_words.sentences(comparison) == [
        "+ spiffe://example.org/** may now read the public half of every key: the grant all is new",
        "    but not where payments decides as before: spiffe://example.org/payments/* on orders",
        "+ spiffe://example.org/** may now sign with every key (ES256): the grant all is new",
        "    but not where not-b decides as before: spiffe://example.org/*/b on every key",
        "    but not where payments decides as before: spiffe://example.org/payments/* on orders",
        "- spiffe://example.org/payments/b may no longer sign with orders (ES256): the deny not-b is new",
    ]
    said = compare_words.as_json(comparison)
    assert [line["change"] for line in said["lines"]] == ["gained", "gained", "lost"]
    assert said["lines"][0]["exceptions"] == [
        {"rule": "payments", "workloads": "spiffe://example.org/payments/*", "operation": "read-key", "target": "orders", "algorithms": [],
         "addresses": None},
    ]  # fmt: skip


def test_own_trail_that_a_deny_takes_away_is_lost(tmp_path: Path) -> None:
    deny = 'denies:\n  - {id: blind, workloads: ["spiffe://example.org/a/*"], trails: ["spiffe://example.org/**"]}\n'
    comparison = compare(rules_of(tmp_path / "a", GOOD), rules_of(tmp_path / "b", GOOD + deny))
    assert compare_words.sentences(comparison) == [
        "- spiffe://example.org/a/* may no longer read-audit the own trail: the deny blind is new",
    ]


def test_every_sentence_of_random_comparisons_names_its_cause() -> None:
    for seed in SEEDS:
        maker = PolicyMaker(seed)
        old = maker.rules()
        comparison = compare(old, maker.changed(old))
        sentences = [each for each in compare_words.sentences(comparison) if not each.startswith("    ")]
        assert len(sentences) == len(comparison.lines)
        assert all(line.cause in sentence for line, sentence in zip(comparison.lines, sentences, strict=False))
        assert len(compare_words.as_json(comparison)["lines"]) == len(comparison.lines)
