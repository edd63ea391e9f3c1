"""Rules in grant files: refused unless every part of them is understood, with file and line."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml

from keybroker.authority.policy import grants, loader
from keybroker.authority.policy.grants import Deny, Grant
from keybroker.errors import ConfigError
from keybroker.model.key import Algorithm
from tests.policies import GOOD, KEYS, deny, edited, load, refusal, role


def test_good_file_is_taken_whole(tmp_path: Path) -> None:
    rules = load(tmp_path, a=GOOD)
    assert rules.grants == (
        Grant(
            id="payments",
            workloads=("spiffe://example.org/payments/*",),
            keys=("orders",),
            operations=("sign",),
            algorithms=(Algorithm.ES256,),
        ),
    )
    assert rules.denies == ()
    assert rules.warnings == ()


def test_files_of_a_directory_count_together_in_order_of_id(tmp_path: Path) -> None:
    rules = load(tmp_path, b=GOOD, a="denies: [{id: z, workloads: ['**']}, {id: a, workloads: ['**']}]\n", c="grants: []\n")
    assert [rule.id for rule in rules.grants] == ["payments"]
    assert rules.denies == (Deny(id="a", workloads=("**",)), Deny(id="z", workloads=("**",)))


def test_hidden_and_switched_off_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / ".editor.yaml").write_text("broken: [")
    (tmp_path / "release.yaml.off").write_text("broken: [")
    assert load(tmp_path, a=GOOD).warnings == ()


def test_file_with_another_ending_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "forgotten.yml").write_text(deny(""))
    assert load(tmp_path, a=GOOD).warnings == (f"{tmp_path}/forgotten.yml: is not read; grant files end in .yaml",)


def test_directory_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no \\*\\.yaml file"):
        loader.load(tmp_path, KEYS)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        loader.load(tmp_path / "absent", KEYS)
    (tmp_path / "a.yaml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        loader.load(tmp_path, KEYS)


FORM = "a pattern is spiffe://trust.domain/path with `*` for one segment and `**` at the end for one or more, or `**` alone"
DOMAIN = "the trust domain is written out, in lower case: a wildcard would trust domains that do not exist yet"
EMPTY = "an empty list means nobody or nothing; name something, or leave the rule out"
NOT_BUILT = "is not supported by this version, and half a rule is another rule: take it out, or switch the file off (*.yaml.off)"
NO_SUCH = f"unknown field; there are {', '.join(f'`{each}`' for each in Grant.__struct_fields__)}"
OPERATIONS = f"there are {', '.join(get_args(grants.Operation))}"
ALGORITHMS = f"there are {', '.join(each.value for each in Algorithm)}"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        # the file
        ("", "a.yaml:1: a grant file has `grants`, `denies`, `networks`, `people`, `groups` at its top"),
        ("# nothing\n", "a.yaml:1: a grant file has `grants`, `denies`, `networks`, `people`, `groups` at its top"),
        ("- a\n", "a.yaml:1: a grant file has `grants`, `denies`, `networks`, `people`, `groups` at its top"),
        ("grants:\n", "a.yaml:1: grants: must be a list"),
        ("\ndenies: {}\n", "a.yaml:2: denies: must be a list"),
        ("networks:\n", "a.yaml:1: networks: must be a mapping of names to lists of address ranges"),
        ("grants: []\nrules: []\n", "a.yaml:2: rules: unknown field; there are `grants`, `denies`, `networks`, `people`, `groups`"),
        ('grants: []\n"a\\nb.yaml:9: c": 1\n',
         "a.yaml:2: a\\nb.yaml:9: c: unknown field; there are `grants`, `denies`, `networks`, `people`, `groups`"),
        # a rule
        ("grants: [7]\n", "a.yaml:1: grants[0]: expected `object`, got `int`"),
        ("grants:\n- [a]\n", "a.yaml:2: grants[0]: expected `object`, got `array`"),
        ("grants:\n-\n", "a.yaml:2: grants[0]: expected `object`, got `null`"),
        (edited("keys:", "key:"), f"a.yaml:4: grants[0].key: {NO_SUCH}"),
        (edited("    keys: [orders]\n", ""), "a.yaml:2: grants[0].keys: operations on keys need `keys`"),
        (edited("    algorithms: [ES256]\n", ""), "a.yaml:2: grants[0].algorithms: signing needs `algorithms`; there is no default"),
        (edited("    operations: [sign]\n", ""), "a.yaml:2: grants[0]: object missing required field `operations`"),
        (edited('    workloads: ["spiffe://example.org/payments/*"]\n', ""),
         "a.yaml:2: grants[0]: object missing required field `workloads`"),
        (edited("  - id: payments\n", "  -\n"), "a.yaml:3: grants[0]: object missing required field `id`"),
        # ids
        (edited("id: payments", "id: Payments"), "a.yaml:2: grants[0].id: an id is [a-z0-9][a-z0-9._-]{0,63}"),
        (edited("id: payments", f"id: {'x' * 65}"), "a.yaml:2: grants[0].id: an id is [a-z0-9][a-z0-9._-]{0,63}"),
        (edited("id: payments", 'id: "payments\\n"'), "a.yaml:2: grants[0].id: an id is [a-z0-9][a-z0-9._-]{0,63}"),
        (edited("id: payments", "id: ''"), "a.yaml:2: grants[0].id: an id is [a-z0-9][a-z0-9._-]{0,63}"),
        (edited("id: payments", "id: 7"), "a.yaml:2: grants[0].id: expected `str`, got `int`"),
        (edited("id: payments", "id: own-trail"),
         "a.yaml:2: grants[0].id: 'own-trail' is taken by a rule that is built in; an id stands for one rule"),
        # lists
        (edited("keys: [orders]", "keys: []"), f"a.yaml:4: grants[0].keys: {EMPTY}"),
        (edited("operations: [sign]", "operations: []"), f"a.yaml:5: grants[0].operations: {EMPTY}"),
        (edited("algorithms: [ES256]", "algorithms: []"), f"a.yaml:6: grants[0].algorithms: {EMPTY}"),
        (edited("algorithms: [ES256]", "algorithms: [ES256]\n    networks:\n    #- office"),
         "a.yaml:7: grants[0].networks: expected `array`, got `null`"),
        (edited("algorithms: [ES256]", "algorithms: [ES256]\n    networks: []"), f"a.yaml:7: grants[0].networks: {EMPTY}"),
        (edited('["spiffe://example.org/payments/*"]', "[]"), f"a.yaml:3: grants[0].workloads: {EMPTY}"),
        (deny("keys: []"), f"a.yaml:2: denies[0].keys: {EMPTY}"),
        (deny("trails: []"), f"a.yaml:2: denies[0].trails: {EMPTY}"),
        (deny("algorithms: ~"), "a.yaml:2: denies[0].algorithms: expected `array`, got `null`"),
        (edited("keys: [orders]", "keys: orders"), "a.yaml:4: grants[0].keys: expected `array`, got `str`"),
        (edited("keys: [orders]", "keys:\n    - release\n    - 7"), "a.yaml:6: grants[0].keys[1]: expected `str`, got `int`"),
        # operations and algorithms
        (edited("[sign]", "[sign, sing]"), f"a.yaml:5: grants[0].operations[1]: invalid enum value 'sing'; {OPERATIONS}"),
        (edited("[sign]", "[approve]"), f"a.yaml:5: grants[0].operations[0]: invalid enum value 'approve'; {OPERATIONS}"),
        (edited("[ES256]", "[HS256]"), f"a.yaml:6: grants[0].algorithms[0]: invalid enum value 'HS256'; {ALGORITHMS}"),
        (edited("[ES256]", "[none]"), f"a.yaml:6: grants[0].algorithms[0]: invalid enum value 'none'; {ALGORITHMS}"),
        (edited("[ES256]", "[yes]"), f"a.yaml:6: grants[0].algorithms[0]: invalid enum value 'yes'; {ALGORITHMS}"),
        (edited("[ES256]", "[true]"), "a.yaml:6: grants[0].algorithms[0]: expected `str`, got `bool`"),
        # keys
        (edited("[orders]", "['*', orders]"), 'a.yaml:4: grants[0].keys[0]: "*" is every key and stands alone'),
        (edited("[orders]", "[Orders]"), "a.yaml:4: grants[0].keys[0]: a key name is [a-z0-9][a-z0-9._-]{0,63}"),
        (edited("[orders]", "['ord*']"), "a.yaml:4: grants[0].keys[0]: a key name is [a-z0-9][a-z0-9._-]{0,63}"),
        (edited("[orders]", "['**']"), "a.yaml:4: grants[0].keys[0]: a key name is [a-z0-9][a-z0-9._-]{0,63}"),
        # what goes together
        (edited("[sign]", "[read-key]"), "a.yaml:6: grants[0].algorithms: no operation of this rule signs"),
        (edited("[sign]", "[read-audit]"), "a.yaml:2: grants[0].trails: `read-audit` needs `trails`"),
        (edited("[sign]", "[sign, read-audit]"), "a.yaml:2: grants[0].trails: `read-audit` needs `trails`"),
        (edited("[sign]", "[sign]\n    trails: ['**']"), "a.yaml:6: grants[0].trails: no operation of this rule reads trails"),
        (deny("operations: [read-audit], keys: [orders]"), "a.yaml:2: denies[0].keys: no operation of this rule uses keys"),
        (deny("operations: [read-audit], algorithms: [RS256]"), "a.yaml:2: denies[0].algorithms: no operation of this rule signs"),
        (deny("operations: [read-key], algorithms: [RS256]"), "a.yaml:2: denies[0].algorithms: no operation of this rule signs"),
        (deny("operations: [sign], trails: ['**']"), "a.yaml:2: denies[0].trails: no operation of this rule reads trails"),
        (deny("operations: [sign], subjects: ['**']"), "a.yaml:2: denies[0].subjects: no operation of this rule freezes"),
        (deny("operations: [sign], tokens: [main]"), "a.yaml:2: denies[0].tokens: no operation of this rule freezes"),
        (deny("operations: [sign], waives: [payments]"), "a.yaml:2: denies[0].waives: no operation of this rule breaks glass"),
        (role("freeze"), "a.yaml:2: grants[0].subjects: freezing needs `subjects`, `keys` or `tokens`"),
        (role("unfreeze", "algorithms: [ES256], keys: [orders]"), "a.yaml:2: grants[0].algorithms: no operation of this rule signs"),
        (role("freeze", "subjects: ['*']"), f"a.yaml:2: grants[0].subjects[0]: {FORM}"),
        (role("freeze", "tokens: ['*', main]"), 'a.yaml:2: grants[0].tokens[0]: a token name is [a-z0-9][a-z0-9-]{0,31}; "*" stands alone'),
        (role("freeze", "tokens: []"), f"a.yaml:2: grants[0].tokens: {EMPTY}"),
        (role("freeze", "keys: [orders], quorum: {approvals: 1, of: [a], expires: 1h}"),
         "a.yaml:2: grants[0].quorum: no operation of this rule signs; `not_before` and `not_after` bind every operation"),
        (role("unfreeze", "keys: [orders], limits: [{max: 1, window: 1h, per: key}]"),
         "a.yaml:2: grants[0].limits: no operation of this rule signs; `not_before` and `not_after` bind every operation"),
        (role("admin-policy", "keys: [orders]"), "a.yaml:2: grants[0].keys: no operation of this rule uses keys"),
        (role("break-glass"), "a.yaml:2: grants[0].waives: `break-glass` needs `waives`"),
        (role("break-glass", "waives: [r, other]"), "a.yaml:2: there is no grant 'other'; name one that is there"),
        (deny("operations: [sign, read-key], algorithms: [RS256]"),
         "a.yaml:2: denies[0].algorithms: only signing names an algorithm: write one rule for signing and one for the rest"),
        (deny("trails: ['**'], algorithms: [RS256]"),
         "a.yaml:2: denies[0].algorithms: only signing names an algorithm: write one rule for signing and one for the rest"),
        # networks
        (edited("[sign]", "[sign]\n    networks: [lab]"), "a.yaml:6: no network is named 'lab'; define it under `networks`"),
        (deny("networks: [lab]"), "a.yaml:2: no network is named 'lab'; define it under `networks`"),
    ],
)  # fmt: skip
def test_rule_that_is_not_understood_is_refused_with_file_and_line(tmp_path: Path, text: str, error: str) -> None:
    assert error in refusal(tmp_path, a=text)


def test_field_of_a_feature_that_is_not_built_is_refused_rather_than_ignored(tmp_path: Path) -> None:
    assert refusal(tmp_path, a=f"{GOOD}    evidence: [tpm]\n") == [f"a.yaml:7: grants[0].evidence: {NOT_BUILT}"]
    assert refusal(tmp_path, a=deny("evidence: [tpm]")) == [f"a.yaml:2: denies[0].evidence: {NOT_BUILT}"]


@pytest.mark.parametrize("field", ["limits", "hours", "quorum", "not_before", "not_after", "observe_only"])
def test_deny_demands_nothing(tmp_path: Path, field: str) -> None:
    (line,) = refusal(tmp_path, a=deny(f"{field}: x"))
    assert line.startswith(f"a.yaml:2: denies[0].{field}: unknown field; there are `id`, `workloads`")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("*", FORM),
        ("", FORM),
        ("***", FORM),
        ("example.org/payments", FORM),
        ("SPIFFE://example.org/a", FORM),
        ("spiffe://example.org", FORM),
        ("spiffe://example.org/", FORM),
        ("spiffe://example.org//a", FORM),
        ("spiffe://example.org/a/", FORM),
        ("spiffe://example.org/a/../b", FORM),
        ("spiffe://example.org/./b", FORM),
        ("spiffe://example.org/a/**/b", FORM),
        ("spiffe://example.org/**/b", FORM),
        ("spiffe://example.org/a*", FORM),
        ("spiffe://example.org/***", FORM),
        ("spiffe://example.org/a%2fb", FORM),
        ("spiffe://example.org/a\n", FORM),
        ("spiffe://example.org/caf\u00e9", FORM),
        ("spiffe://example.org/\u0430dmin", FORM),
        ("spiffe://example.org/" + "a" * 2048, FORM),
        ("spiffe://*/a", DOMAIN),
        ("spiffe://**", DOMAIN),
        ("spiffe://*.example.org/a", DOMAIN),
        ("spiffe://Example.org/a", DOMAIN),
        ("spiffe:///a", DOMAIN),
        ("spiffe://example.org:443/a", DOMAIN),
        ("spiffe://user@example.org/a", DOMAIN),
        (f"spiffe://{'a' * 256}/a", DOMAIN),
    ],
)
@pytest.mark.parametrize("field", ["workloads", "trails"])
def test_pattern_that_is_none_is_refused(tmp_path: Path, text: str, error: str, field: str) -> None:
    rule = {"id": "r", "workloads": ["**"], "operations": ["read-audit"], "trails": ["**"], field: ["**", text]}
    lines = refusal(tmp_path, a=yaml.safe_dump({"grants": [rule]}, sort_keys=True, width=10_000))
    assert [line.partition(": ")[2] for line in lines] == [f"grants[0].{field}[1]: {error}"]


@pytest.mark.parametrize(
    "text",
    ["**", "spiffe://example.org/**", "spiffe://example.org/*", "spiffe://example.org/*/b/**", "spiffe://example.org/A.b_c-9/*/x",
     "spiffe://example.org/...", "spiffe://1.2.3.4/a", "spiffe://example.org/" + "a" * 2027],
)  # fmt: skip
def test_pattern_in_the_documented_form_is_taken(tmp_path: Path, text: str) -> None:
    rule = {"id": "r", "workloads": [text], "operations": ["read-audit"], "trails": [text]}
    assert load(tmp_path, a=yaml.safe_dump({"grants": [rule]})).grants[0].trails == (text,)


def test_repeated_id_is_refused_over_files_and_between_grants_and_denies(tmp_path: Path) -> None:
    other = GOOD.replace("\n", "\n", 1)
    assert refusal(tmp_path, a=GOOD, b=f"# second\n{other}") == [
        f"b.yaml:3: grants[0].id: 'payments' is taken by {'a.yaml:2'}; an id stands for one rule"
    ]
    assert refusal(tmp_path, b="grants: []\n", a=GOOD + "denies:\n  - id: payments\n    workloads: ['**']\n") == [
        "a.yaml:8: denies[0].id: 'payments' is taken by a.yaml:2; an id stands for one rule"
    ]


def test_all_errors_of_all_files_are_named_at_once(tmp_path: Path) -> None:
    lines = refusal(
        tmp_path,
        a=edited("[orders]", "[Orders]").replace("id: payments", "id: P"),
        b="grants: [",
        c=edited("keys:", "key:"),
        d="denies:\n- {id: d, workloads: [x], networks: [lab]}\n",
    )
    assert [line.split(": ")[0] for line in lines] == ["a.yaml:2", "a.yaml:4", "b.yaml:2", "c.yaml:4", "d.yaml:2", "d.yaml:2"]


def test_key_that_does_not_exist_is_a_warning_with_file_and_line(tmp_path: Path) -> None:
    rules = load(tmp_path, a=edited("[orders]", "[orders, odrers]"), b=deny("keys: [relaese]"))
    assert rules.warnings == (
        f"{tmp_path}/a.yaml:4: there is no key 'odrers' in the configuration",
        f"{tmp_path}/b.yaml:2: there is no key 'relaese' in the configuration",
    )
    assert load(tmp_path, a=edited("[orders]", "['*']"), b="grants: []").warnings == ()


def test_crowd_of_rules_for_the_same_callers_is_a_warning(tmp_path: Path) -> None:
    def denies(count: int, workload: str) -> str:
        return "denies:\n" + "".join(f"- {{id: d{n}, workloads: ['{workload}'], keys: [orders]}}\n" for n in range(count))

    (warning,) = load(tmp_path, a=denies(2001, "spiffe://example.org/payments/*")).warnings
    assert warning == "2001 rules are for example.org/payments: each decision walks them all, and fails if that takes too long"
    (warning,) = load(tmp_path, a=denies(2001, "**")).warnings
    assert warning.startswith("2001 rules are for anybody: ")
    assert load(tmp_path, a=denies(2000, "spiffe://example.org/payments/*")).warnings == ()
    assert load(tmp_path, a=denies(2001, "spiffe://example.org/payments/*").replace("payments/*", "payments/x", 10)).warnings == ()
