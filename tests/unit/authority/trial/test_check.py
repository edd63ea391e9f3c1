"""What a check of a policy finds, and that what it calls superfluous is."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from keybroker.authority.policy.grants import Rules
from keybroker.authority.trial import check as checks
from keybroker.authority.trial.candidate import Candidate, Inventory, Places
from keybroker.authority.trial.findings import CODES, Finding, Severity
from keybroker.authority.trial.region import all_rules
from keybroker.model.key import KeyFamily
from tests import policy_model
from tests.clocks import START_US
from tests.policies import GOOD, default_engine
from tests.random_policies import PolicyMaker, seen_from

ORDERS = Inventory(frozenset({"orders"}), {"orders": KeyFamily.EC_P256})
SUPERFLUOUS = {"superfluous-grant", "superfluous-deny", "unreachable-grant"}


def found(directory: Path, text: str, inventory: Inventory = ORDERS, but: str = "no-limits") -> list[Finding]:
    """All findings but those of one code."""
    directory.mkdir(exist_ok=True)
    (directory / "a.yaml").write_text(text)
    return [each for each in checks.check(directory, None, inventory, START_US) if each.code != but]


def codes(findings: list[Finding]) -> list[tuple[str, str]]:
    """Each code with its line."""
    return [(each.code, each.where.rpartition(":")[2]) for each in findings]


def test_good_rules_have_no_findings(tmp_path: Path) -> None:
    assert found(tmp_path / "g", GOOD) == []


def test_faults_of_the_loader_are_errors_with_file_line_and_cure(tmp_path: Path) -> None:
    (finding,) = found(tmp_path / "g", GOOD.replace("sign]", "sing]"))
    assert (finding.code, finding.severity, finding.where) == ("cannot-be-loaded", Severity.ERROR, f"{tmp_path}/g/a.yaml:5")
    assert "operations" in finding.text
    assert "sign-digest" in finding.cure


def test_directory_without_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "g").mkdir()
    assert [each.code for each in checks.check(tmp_path / "g", None, ORDERS, START_US)] == ["cannot-be-loaded"]


def test_key_that_does_not_exist_is_a_warning_where_the_keys_are_known(tmp_path: Path) -> None:
    text = GOOD.replace("[orders]", "[orders, ordres]")
    assert codes(found(tmp_path / "g", text)) == [("unknown-key", "4")]
    assert codes(found(tmp_path / "g", text, Inventory())) == []


def test_key_that_cannot_do_any_algorithm_of_the_grant_is_a_warning(tmp_path: Path) -> None:
    assert codes(found(tmp_path / "g", GOOD.replace("ES256", "PS256"))) == [("key-cannot-sign", "4")]
    assert codes(found(tmp_path / "g", GOOD.replace("ES256", "PS256, ES256"))) == []
    assert codes(found(tmp_path / "g", GOOD.replace("ES256", "PS256"), Inventory(ORDERS.keys))) == []


def test_grant_that_denies_cover_together_is_unreachable(tmp_path: Path) -> None:
    denies = """\
denies:
  - {id: no-use, workloads: ["spiffe://example.org/payments/**"], operations: [sign, sign-digest]}
  - {id: no-look, workloads: ["spiffe://example.org/*/*"], operations: [read-key]}
"""
    (finding,) = found(tmp_path / "g", GOOD + denies)
    assert (finding.code, finding.severity, finding.rule) == ("unreachable-grant", Severity.WARNING, "payments")
    assert "denied by no-look and no-use" in finding.text


def test_grant_of_which_a_deny_takes_a_part_is_reachable(tmp_path: Path) -> None:
    one = 'denies:\n  - {id: not-api, workloads: ["spiffe://example.org/payments/api"]}\n'
    assert codes(found(tmp_path / "g", GOOD + one)) == []
    whole = 'denies:\n  - {id: no-sign, workloads: ["**"], operations: [sign]}\n'
    assert codes(found(tmp_path / "g", GOOD + whole)) == [("partly-unreachable-grant", "2")]


def test_grant_that_others_give_already_is_superfluous(tmp_path: Path) -> None:
    wider = GOOD + GOOD.partition("\n")[2].replace("payments\n", "wider\n").replace("payments/*", "**")
    assert codes(found(tmp_path / "g", wider)) == [("superfluous-grant", "2")]


def test_of_two_equal_rules_only_one_is_superfluous(tmp_path: Path) -> None:
    twice = GOOD + GOOD.partition("\n")[2].replace("id: payments", "id: same")
    denies = 'denies:\n  - {id: d, workloads: ["**"], keys: [x]}\n  - {id: e, workloads: ["**"], keys: [x]}\n'
    assert [each.rule for each in found(tmp_path / "g", twice, Inventory())] == ["payments"]
    assert [(each.code, each.rule) for each in found(tmp_path / "g", twice + denies, Inventory())] == [
        ("superfluous-grant", "payments"), ("superfluous-deny", "d"), ("idle-deny", "e"),
    ]  # fmt: skip


def test_names_that_nothing_uses_are_notes(tmp_path: Path) -> None:
    assert codes(found(tmp_path / "g", GOOD + 'networks:\n  lab: ["10.0.0.0/8"]\n')) == [("unused-network", "8")]
    extra = PEOPLE.replace("[alice, bob]", "[alice]")
    assert codes(found(tmp_path / "g", GOOD + extra)) == [("unused-person", "9"), ("unused-group", "11")]


LIMITED = GOOD + "    limits: [{max: 100, window: 1m, per: workload}]\n"
WIDER = LIMITED.partition("\n")[2].partition("    limits")[0].replace("id: payments", "id: wider").replace("payments/*", "**")
PEOPLE = """\
people:
  alice: ["spiffe://example.org/human/alice"]
  bob: ["spiffe://example.org/human/bob"]
groups:
  managers: [alice, bob]
"""


def quorum(text: str, workloads: str = "spiffe://example.org/payments/*") -> str:
    return GOOD.replace("spiffe://example.org/payments/*", workloads) + f"    quorum: {{{text}, expires: 1h}}\n{PEOPLE}"


def test_grant_without_limits_is_a_note_and_with_limits_or_a_quorum_none(tmp_path: Path) -> None:
    assert codes(found(tmp_path / "g", GOOD, but="")) == [("no-limits", "2")]
    assert codes(found(tmp_path / "g", LIMITED, but="")) == []
    assert codes(found(tmp_path / "g", quorum("approvals: 2, of: [managers]"), but="")) == []
    assert codes(found(tmp_path / "g", GOOD.replace("[sign]", "[read-key]").replace("    algorithms: [ES256]\n", ""), but="")) == []


def test_grant_that_demands_something_is_never_superfluous(tmp_path: Path) -> None:
    assert codes(found(tmp_path / "g", LIMITED + WIDER)) == [("only-tightens", "2")]


def test_grant_that_demands_nothing_lifts_nothing_that_another_demands(tmp_path: Path) -> None:
    narrow = WIDER.replace("org/**", "org/payments/api")
    (finding,) = found(tmp_path / "g", LIMITED + narrow)
    assert (finding.code, finding.severity, finding.rule) == ("does-not-loosen", Severity.WARNING, "wider")
    assert "obligations add up" in finding.text


@pytest.mark.parametrize(
    ("field", "code"),
    [
        ("not_after: 2026-09-21T13:00:00Z", [("expired-grant", "7")]),
        ("not_after: 2027-09-21T13:00:00Z", []),
        ("not_before: 2026-09-21T15:00:00Z", [("early-grant", "7")]),
        ("not_before: 2026-09-21T13:00:00Z", []),
        ("hours: [{days: mon, from: '08:00', to: '09:00', zone: UTC}]\n    observe_only: true", [("observes-only", "8")]),
    ],
)
def test_moments_of_a_grant_are_held_against_now(field: str, code: list[tuple[str, str]], tmp_path: Path) -> None:
    assert codes(found(tmp_path / "g", f"{GOOD}    {field}\n")) == code


@pytest.mark.parametrize(
    ("text", "workloads", "code"),
    [
        ("approvals: 2, of: [managers]", "spiffe://example.org/payments/*", []),
        ("approvals: 2, of: [managers]", "**", ["quorum-needs-requester"]),
        ("approvals: 2, of: [managers]", "spiffe://example.org/human/bob", ["quorum-needs-requester"]),
        ("approvals: 1, of: [managers]", "spiffe://example.org/human/bob", []),
        ("stages: [{approvals: 1, of: [managers]}, {approvals: 1, of: [managers]}]", "spiffe://example.org/ci/*", []),
        ("stages: [{approvals: 1, of: [managers]}, {approvals: 2, of: [managers]}]", "spiffe://example.org/ci/*", ["quorum-cannot-be-met"]),
        ("approvals: 3, of: [managers]", "spiffe://example.org/ci/*", ["cannot-be-loaded"]),
    ],
)
def test_quorum_that_cannot_be_met_is_an_error(text: str, workloads: str, code: list[str], tmp_path: Path) -> None:
    findings = found(tmp_path / "g", quorum(text, workloads))
    assert [each.code for each in findings] == code
    assert all(each.severity is Severity.ERROR for each in findings)


def test_person_who_is_wanted_in_two_stages_takes_the_one_where_nobody_else_can(tmp_path: Path) -> None:
    text = quorum("stages: [{approvals: 1, of: [managers]}, {approvals: 1, of: [legal]}]").replace(
        "groups:\n", "groups:\n  legal: [alice]\n"
    )
    assert found(tmp_path / "g", text) == []
    both = [each.code for each in found(tmp_path / "g", text.replace("managers: [alice, bob]", "managers: [alice]"))]
    assert both == ["quorum-cannot-be-met", "unused-person"]


@pytest.mark.parametrize("seed", range(25))
def test_taking_out_all_that_is_called_superfluous_changes_no_answer(seed: int) -> None:
    maker = PolicyMaker(seed)
    rules = maker.rules()
    more = Rules((*rules.grants, *(maker.grant(f"x{each}") for each in range(6))), rules.denies, rules.networks, ())
    loaded = Candidate(more, default_engine(more), Places(()))
    gone = {each.rule for each in checks._Reach(loaded).findings() if each.code in SUPERFLUOUS}
    assert gone <= {rule.id for rule in all_rules(more)}
    grants = tuple(each for each in more.grants if each.id not in gone)
    denies = tuple(each for each in more.denies if each.id not in gone)
    kept = Rules(grants, denies, more.networks, ())
    for _ in range(300):
        asked = json.loads(seen_from(maker.request(), more, maker.address()))
        assert policy_model.expected(more, asked).allow == policy_model.expected(kept, asked).allow, (gone, asked)


def test_something_is_superfluous_in_the_random_policies() -> None:
    seen: set[str] = set()
    for seed in range(25):
        maker = PolicyMaker(seed)
        rules = maker.rules()
        grants = (*rules.grants, *(maker.grant(f"y{each}") for each in range(6)))
        rules = Rules(
            grants, (*rules.denies, *(maker.deny(f"x{each}") for each in range(4))), rules.networks, (), rules.people, rules.groups
        )
        seen |= {each.code for each in checks._Reach(Candidate(rules, default_engine(rules), Places(()))).findings()}
    assert seen >= SUPERFLUOUS | {"partly-unreachable-grant", "idle-deny"}


def test_thousands_of_grants_are_checked_in_seconds(tmp_path: Path) -> None:
    one = '  - {{id: g{0}, workloads: ["spiffe://example.org/team-{0}/*"], keys: [k{0}], operations: [sign], algorithms: [ES256]}}\n'
    denies = 'denies:\n  - {id: old, workloads: ["**"], algorithms: [RS256]}\n'
    started = time.monotonic()
    findings = found(tmp_path / "g", "grants:\n" + "".join(one.format(each) for each in range(3_000)) + denies, Inventory())
    assert [each.code for each in findings] == ["idle-deny"]
    assert time.monotonic() - started < 60


def test_every_code_has_a_cure() -> None:
    assert all(cure for _, cure in CODES.values())
