"""What a grant demands beyond a yes: refused unless it can be meant, with file and line; and what the policy answers of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from keybroker.authority.policy.compiler import compile_rules
from keybroker.authority.policy.engine import ENGINE, decision_of
from keybroker.authority.policy.grants import days_of, seconds_of
from keybroker.authority.policy.wasm import WasmInstance
from keybroker.model.decision import HoursWindow, Limit, Obligation, QuorumStage, Verdict, no_obligation
from tests.policies import GOOD, decide, default_engine, default_module, load, refusal, request

HOURS = '{days: mon-fri, from: "08:00", to: "18:00", zone: Europe/Berlin, except: [2026-12-25]}'
PEOPLE = """\
people:
  alice: ["spiffe://example.org/human/alice", "spiffe://example.org/human/alice-laptop"]
  bob: ["spiffe://example.org/human/bob"]
groups:
  release-managers: [alice, bob]
  legal: [alice]
"""
WHOLE = f"""\
{GOOD}
    not_before: 2026-01-01T00:00:00Z
    not_after: 2027-06-30T00:00:00Z
    hours: [{HOURS}, {{days: "sat,sun", from: "22:00", to: "02:00", zone: UTC}}]
    limits: [{{max: 100, window: 1m, per: workload}}, {{max: 10000, window: 24h, per: key}}]
    quorum: {{stages: [{{approvals: 1, of: [legal]}}, {{approvals: 2, of: [release-managers, legal]}}], expires: 1h, cool_off: 5m}}
    observe_only: true
{PEOPLE}"""
MOMENT = "must be a moment in UTC, such as 2027-06-30T00:00:00Z"
TIME = 'must be a time of day in quotes, such as "08:00"'
ZONE = "no such time zone on this host; write an IANA name such as Europe/Berlin or UTC"
EMPTY = "an empty list means nobody or nothing; name something, or leave the rule out"
DATE = "must be a date such as 2026-12-25"
DAYS = "must be days such as mon-fri, or mon,wed,sat-sun"
DURATION = "must be a number and s, m, h or d, such as 90s or 24h"
NOT_SIGNING = "no operation of this rule signs; `not_before` and `not_after` bind every operation"


def hours(old: str, new: str) -> str:
    assert HOURS.count(old) == 1
    return f"hours: [{HOURS.replace(old, new)}]"


def limits(*texts: str) -> str:
    return f"limits: [{', '.join(f'{{{text}}}' for text in texts)}]"


def test_whole_grant_becomes_one_obligation_with_people_in_it(tmp_path: Path) -> None:
    rules = load(tmp_path, a=WHOLE)
    data, digest = compile_rules(rules, default_module().sha256, ENGINE)
    decision = WasmInstance(default_module(), data).evaluate(request())
    assert b'"observe_only":true' in decision
    expected = Obligation(
        grant="payments",
        not_before="2026-01-01T00:00:00Z",
        not_after="2027-06-30T00:00:00Z",
        hours=(
            HoursWindow(("mon", "tue", "wed", "thu", "fri"), "08:00", "18:00", "Europe/Berlin", ("2026-12-25",)),
            HoursWindow(("sat", "sun"), "22:00", "02:00", "UTC", ()),
        ),
        limits=(Limit(100, 60, "workload"), Limit(10_000, 86_400, "key")),
        quorum=(QuorumStage(1, ("legal",), ("alice",)), QuorumStage(2, ("release-managers", "legal"), ("alice", "bob"))),
        cool_off_s=300,
        expires_s=3600,
        evidence=(),
        observe_only=True,
    )
    answer = decision_of(decision.replace(digest.encode(), b"d" * 64), "d" * 64, ENGINE)
    assert answer.obligations in {(expected,), ()}  # none where this version does not enforce all of it: then it is a failure
    assert answer.verdict is (Verdict.ALLOW if answer.obligations else Verdict.FAILED)


def test_reading_the_key_is_bound_by_moments_alone(tmp_path: Path) -> None:
    without = WHOLE.replace("    not_before: 2026-01-01T00:00:00Z\n    not_after: 2027-06-30T00:00:00Z\n", "")
    assert without != WHOLE
    decision = decide(default_engine(load(tmp_path, a=without.replace("    observe_only: true\n", ""))), request("read-key"))
    assert decision.obligations == (no_obligation("payments"),)
    assert decision.verdict is Verdict.ALLOW


def test_people_and_groups_are_those_of_all_files_and_change_the_digest(tmp_path: Path) -> None:
    grant = f"{GOOD}    quorum: {{approvals: 2, of: [release-managers], expires: 1h}}\n"
    rules = load(tmp_path / "a", a=grant, b=PEOPLE)
    assert rules.person_of("spiffe://example.org/human/alice-laptop") == "alice"
    assert rules.person_of("spiffe://example.org/human/mallory") == ""
    assert rules.people_of(("legal", "release-managers")) == ("alice", "bob")
    digests = {
        compile_rules(load(tmp_path / name, a=grant, b=people), "m", "e")[1]
        for name, people in (
            ("b", PEOPLE),
            ("c", PEOPLE.replace("alice-laptop", "alice-desk")),
            ("d", PEOPLE.replace("legal: [alice]", "legal: [bob]")),
        )
    }
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("field", "error"),
    [
        # moments
        ("not_after: tomorrow", f".not_after: {MOMENT}"),
        ("not_after: 2027-06-30", f".not_after: {MOMENT}"),
        ("not_after: ''", f".not_after: {MOMENT}"),
        ("not_after: 2027-06-31T00:00:00Z", f".not_after: {MOMENT}"),
        ("not_after: 2027-06-30T00:00:00+02:00", f".not_after: {MOMENT}"),
        ("not_after: 2027-06-30T24:00:00Z", f".not_after: {MOMENT}"),
        ("not_before: 7", ".not_before: expected `str`, got `int`"),
        ("not_before: 2027-01-01T00:00:00Z\n    not_after: 2027-01-01T00:00:00Z",
         ".not_after: must be later than `not_before`; as it is, the grant never holds"),
        # hours
        ("hours: []", f".hours: {EMPTY}"),
        ("hours: [7]", ".hours[0]: expected `object`, got `int`"),
        (hours("mon-fri", "monday"), f".hours[0].days: {DAYS}"),
        (hours("mon-fri", "mon-"), f".hours[0].days: {DAYS}"),
        (hours("days: mon-fri, ", ""), ".hours[0]: object missing required field `days`"),
        (hours('"08:00"', '"8:00"'), f".hours[0].from: {TIME}"),
        (hours('"08:00"', '"24:00"'), f".hours[0].from: {TIME}"),
        (hours('"18:00"', '"24:01"'), f".hours[0].to: {TIME}"),
        (hours('"18:00"', '"18:60"'), f".hours[0].to: {TIME}"),
        (hours('"18:00"', "18"), ".hours[0].to: expected `str`, got `int`"),
        (hours('"18:00"', '"08:00"'), '.hours[0].to: must differ from `from`; a whole day is from "00:00" to "24:00"'),
        pytest.param(hours("Europe/Berlin", "Europe/Atlantis"), f".hours[0].zone: {ZONE}", marks=pytest.mark.case(42)),
        (hours("Europe/Berlin", "../etc/passwd"), f".hours[0].zone: {ZONE}"),
        (hours("Europe/Berlin", "/etc/localtime"), f".hours[0].zone: {ZONE}"),
        (hours("Europe/Berlin", "Europe"), f".hours[0].zone: {ZONE}"),
        (hours("Europe/Berlin", "localtime"), f".hours[0].zone: {ZONE}"),
        (hours("Europe/Berlin", "right/UTC"), f".hours[0].zone: {ZONE}"),
        (hours("[2026-12-25]", "[]"), f".hours[0].except: {EMPTY}"),
        (hours("2026-12-25", "2026-02-29"), f".hours[0].except[0]: {DATE}"),
        (hours("2026-12-25", "christmas"), f".hours[0].except[0]: {DATE}"),
        (hours("2026-12-25", "2026-12-25, 2026-12-25"), ".hours[0].except[1]: 2026-12-25 is named twice"),
        (hours("zone:", "timezone:"), ".hours[0].timezone: unknown field"),
        # limits
        ("limits: []", f".limits: {EMPTY}"),
        (limits("max: 0, window: 1m, per: key"), ".limits[0].max: must be from 1 to 1000000000; to allow nothing, leave the grant out"),
        (limits("max: -1, window: 1m, per: key"), ".limits[0].max: must be from 1 to 1000000000; to allow nothing, leave the grant out"),
        (limits("max: 1000000001, window: 1m, per: key"),
         ".limits[0].max: must be from 1 to 1000000000; to allow nothing, leave the grant out"),
        (limits("max: many, window: 1m, per: key"), ".limits[0].max: expected `int`, got `str`"),
        (limits("max: 1, window: 0s, per: key"), ".limits[0].window: must be from 1s to 31d"),
        (limits("max: 1, window: 32d, per: key"), ".limits[0].window: must be from 1s to 31d"),
        (limits("max: 1, window: 2678401s, per: key"), ".limits[0].window: must be from 1s to 31d"),
        (limits("max: 1, window: 60, per: key"), ".limits[0].window: expected `str`, got `int`"),
        (limits("max: 1, window: 1 minute, per: key"), f".limits[0].window: {DURATION}"),
        (limits("max: 1, window: 1w, per: key"), f".limits[0].window: {DURATION}"),
        (limits("max: 1, window: 1m, per: user"),
         ".limits[0].per: invalid enum value 'user'; there are workload, key, grant, principal"),
        (limits("max: 1, window: 1m"), ".limits[0]: object missing required field `per`"),
        (limits("max: 1, window: 60s, per: key", "max: 2, window: 1m, per: key"),
         ".limits[1]: another limit of this grant has the same window, per key; write the smaller one"),
        # quorum
        ("quorum: {}", ".quorum: object missing required field `expires`"),
        ("quorum: {expires: 1h}", ".quorum: needs `approvals` and `of`, or `stages`"),
        ("quorum: {approvals: 1, expires: 1h}", ".quorum: needs `approvals` and `of`, or `stages`"),
        ("quorum: {of: [legal], expires: 1h}", ".quorum: needs `approvals` and `of`, or `stages`"),
        ("quorum: {approvals: 1, of: [], expires: 1h}", f".quorum.of: {EMPTY}"),
        ("quorum: {stages: [], expires: 1h}", f".quorum.stages: {EMPTY}"),
        ("quorum: {approvals: 0, of: [legal], expires: 1h}",
         ".quorum.approvals: must be at least 1; where nobody has to approve, leave `quorum` out"),
        ("quorum: {approvals: 2, of: [legal], expires: 1h}", ".quorum.approvals: 2 of 1 people can never be reached: alice"),
        ("quorum: {approvals: 3, of: [legal, release-managers], expires: 1h}",
         ".quorum.approvals: 3 of 2 people can never be reached: alice, bob"),
        ("quorum: {approvals: 1, of: [legal, legal], expires: 1h}", ".quorum.of[1]: 'legal' is named twice"),
        ("quorum: {approvals: 1, of: [board], expires: 1h}", ".quorum.of[0]: no group is named 'board'; define it under `groups`"),
        ("quorum: {approvals: 1, of: [legal], expires: 0s}", ".quorum.expires: must be from 1s to 31d"),
        ("quorum: {approvals: 1, of: [legal], expires: 1h, cool_off: 60m}",
         ".quorum.cool_off: must be shorter than `expires`, or no use is ever possible"),
        ("quorum: {approvals: 1, of: [legal], stages: [{approvals: 1, of: [legal]}], expires: 1h}",
         ".quorum.of: either `approvals` and `of`, or `stages`"),
        ("quorum: {stages: [{approvals: 1, of: [legal]}, {approvals: 2, of: [legal]}], expires: 1h}",
         ".quorum.stages[1].approvals: 2 of 1 people can never be reached: alice"),
        ("quorum: {stages: [{approvals: 1}], expires: 1h}", ".quorum.stages[0]: object missing required field `of`"),
        ("quorum: {stages: [{approvals: 1, of: [board]}], expires: 1h}",
         ".quorum.stages[0].of[0]: no group is named 'board'; define it under `groups`"),
        # observing
        ("observe_only: true",
         ".observe_only: there is nothing to observe: the grant has no hours, limits, quorum, `not_before` or `not_after`"),
        ("observe_only: yes", ".observe_only: expected `bool`, got `str`"),
    ],
)  # fmt: skip
def test_demand_that_cannot_be_meant_is_refused_with_file_and_line(tmp_path: Path, field: str, error: str) -> None:
    where = "a.yaml:8" if "\n" in field else "a.yaml:7"
    assert f"{where}: grants[0]{error}" in refusal(tmp_path, a=f"{GOOD}    {field}\n", b=PEOPLE)


@pytest.mark.parametrize("field", ["limits", "hours", "quorum"])
def test_demand_on_uses_is_refused_where_the_grant_uses_no_key(tmp_path: Path, field: str) -> None:
    demand = {
        "limits": limits("max: 1, window: 1m, per: key"),
        "hours": f"hours: [{HOURS}]",
        "quorum": "quorum: {approvals: 1, of: [legal], expires: 1h}",
    }[field]
    reads = "grants:\n- id: r\n  workloads: ['**']\n  operations: [read-audit]\n  trails: ['**']\n  "
    assert refusal(tmp_path, a=f"{reads}{demand}\n", b=PEOPLE) == [f"a.yaml:6: grants[0].{field}: {NOT_SIGNING}"]
    assert load(tmp_path, a=f"{reads}not_after: 2027-06-30T00:00:00Z\n", b=PEOPLE).grants


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("people: []", "a.yaml:1: people: must be a mapping of names to lists of SPIFFE IDs"),
        ("groups:", "a.yaml:1: groups: must be a mapping of names to lists of people"),
        ("people: {Alice: [spiffe://example.org/a]}", "a.yaml:1: people.Alice: a person's name is [a-z0-9][a-z0-9._-]{0,63}"),
        ("people: {alice: []}", "a.yaml:1: people.alice: must be a list of at least one SPIFFE ID"),
        ("people: {alice: spiffe://example.org/a}", "a.yaml:1: people.alice: must be a list of at least one SPIFFE ID"),
        ("people: {alice: [alice]}",
         "a.yaml:1: people.alice[0]: must be a SPIFFE ID, written out, such as spiffe://example.org/human/alice"),
        ("people: {alice: ['spiffe://example.org/*']}",
         "a.yaml:1: people.alice[0]: must be a SPIFFE ID, written out, such as spiffe://example.org/human/alice"),
        ("people: {alice: [7]}",
         "a.yaml:1: people.alice[0]: must be a SPIFFE ID, written out, such as spiffe://example.org/human/alice"),
        ("people:\n  alice: [spiffe://example.org/a]\n  bob: [spiffe://example.org/a]",
         "a.yaml:3: people.bob[0]: spiffe://example.org/a is named at a.yaml:2; an identity stands for one person"),
        ("people:\n  alice: [spiffe://example.org/a, spiffe://example.org/a]",
         "a.yaml:2: people.alice[1]: spiffe://example.org/a is named at a.yaml:2; an identity stands for one person"),
        ("groups: {legal: [alice]}", "a.yaml:1: nobody is named 'alice'; define it under `people`"),
        ("groups: {legal: []}", "a.yaml:1: groups.legal: must be a list of at least one person"),
        ("groups: {legal: [7]}", "a.yaml:1: groups.legal[0]: must be the name of a person"),
        ("people: {alice: [spiffe://example.org/a]}\ngroups:\n  legal: [alice, alice]",
         "a.yaml:3: groups.legal[1]: 'alice' is named twice"),
    ],
)  # fmt: skip
def test_people_and_groups_that_are_not_clear_are_refused_with_file_and_line(tmp_path: Path, text: str, error: str) -> None:
    assert error in refusal(tmp_path, a=f"{text}\n")


def test_name_that_two_files_define_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, a=PEOPLE, b=PEOPLE.replace("alice", "carol").replace("bob", "dave")) == [
        "b.yaml:5: groups.release-managers: 'release-managers' is defined twice",
        "b.yaml:6: groups.legal: 'legal' is defined twice",
    ]


def test_days_are_those_of_the_text() -> None:
    assert days_of("mon") == ("mon",)
    assert days_of("mon-fri") == ("mon", "tue", "wed", "thu", "fri")
    assert days_of("sat-mon") == ("mon", "sat", "sun")
    assert days_of("wed, mon,wed") == ("mon", "wed")
    assert len(days_of("tue-mon")) == 7
    with pytest.raises(ValueError, match="x"):
        days_of("x")


def test_durations_are_seconds() -> None:
    assert [seconds_of(text) for text in ("0s", "90s", "1m", "24h", "31d")] == [0, 90, 60, 86_400, 31 * 86_400]
    with pytest.raises(ValueError, match="1w"):
        seconds_of("1w")
