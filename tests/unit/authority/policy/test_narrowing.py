"""A change that is judged narrower lets nobody do more: shown by example, and against the engine with rules and changes at random."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from keybroker.audit.leaf import canonical
from keybroker.authority.policy import wasm
from keybroker.authority.policy.compiler import compile_rules
from keybroker.authority.policy.grants import Deny, Grant, Hours, LimitRule, Quorum, Rules
from keybroker.authority.policy.narrowing import _is_within, _patterns_meet, widenings
from keybroker.authority.policy.pattern import Pattern
from keybroker.authority.policy.wasm import WasmInstance
from keybroker.model.decision import Obligation, PolicyAnswer
from keybroker.model.key import Algorithm
from tests.policies import default_module, load
from tests.policy_model import fits

BASE = """\
grants:
  - id: release
    workloads: ["spiffe://example.org/ci/*"]
    keys: [release, orders]
    operations: [sign]
    algorithms: [ES256, ES384]
    networks: [office, lab]
    not_before: 2026-01-01T00:00:00Z
    not_after: 2027-01-01T00:00:00Z
    hours: [{days: mon-fri, from: "08:00", to: "18:00", zone: UTC}, {days: sat, from: "08:00", to: "12:00", zone: UTC}]
    limits: [{max: 10, window: 1h, per: key}]
    quorum: {approvals: 2, of: [managers, lawyers], expires: 1h, cool_off: 1m}
  - {id: responders, workloads: ["spiffe://example.org/human/*"], operations: [freeze], subjects: ["spiffe://example.org/**"], tokens: [a]}
  - {id: glass, workloads: ["spiffe://example.org/human/a"], operations: [break-glass], waives: [release]}
denies:
  - {id: no-legacy, workloads: ["spiffe://example.org/**"], keys: [legacy], operations: [sign, sign-digest]}
networks: {office: ["192.0.2.0/24"], lab: ["198.51.100.0/24"]}
people: {a: ["spiffe://example.org/human/a"], b: ["spiffe://example.org/human/b"], c: ["spiffe://example.org/human/c"]}
groups: {managers: [a, b], lawyers: [b, c]}
"""

NARROWER = [
    ("ci/*", "ci/release"),
    ("[release, orders]", "[release]"),
    ("[ES256, ES384]", "[ES256]"),
    ("networks: [office, lab]", "networks: [lab]"),
    ("2026-01-01", "2026-02-01"),
    ("2027-01-01", "2026-12-01"),
    (', {days: sat, from: "08:00", to: "12:00", zone: UTC}]', "]"),
    ("max: 10", "max: 9"),
    ("limits: [", "limits: [{max: 1, window: 1s, per: key}, "),
    ("approvals: 2", "approvals: 3"),
    ("of: [managers, lawyers]", "of: [managers]"),
    ("expires: 1h", "expires: 30m"),
    ("cool_off: 1m", "cool_off: 90s"),
    ('subjects: ["spiffe://example.org/**"]', 'subjects: ["spiffe://example.org/ci/**"]'),
    (", tokens: [a]", ""),
    ("keys: [legacy], operations: [sign, sign-digest]", "operations: [sign, sign-digest]"),
    ("keys: [legacy]", "keys: [legacy, orders]"),
    (", operations: [sign, sign-digest]}", "}"),
    ("denies:\n", "denies:\n  - {id: more, workloads: ['**'], keys: [orders]}\n"),
    ("lawyers: [b, c]", "lawyers: [b]"),
    ('  - {id: glass, workloads: ["spiffe://example.org/human/a"], operations: [break-glass], waives: [release]}\n', ""),
]
WIDER = [
    ("ci/*", "ci/**", "grant release: more workloads"),
    ("ci/*", "*/release", "grant release: more workloads"),
    ("[release, orders]", '["*"]', "grant release: more keys"),
    ("operations: [sign]", "operations: [sign, sign-digest]", "grant release: more operations"),
    ("[ES256, ES384]", "[ES256, PS256]", "grant release: more algorithms"),
    ("    networks: [office, lab]\n", "", "grant release: more networks"),
    ("    not_before: 2026-01-01T00:00:00Z\n", "", "grant release: it begins earlier"),
    ("2027-01-01", "2027-01-02", "grant release: it ends later"),
    ('to: "18:00"', 'to: "18:01"', "grant release: other hours"),
    ("max: 10", "max: 11", "grant release: a weaker limit"),
    ("window: 1h", "window: 59m", "grant release: a weaker limit"),
    ("per: key", "per: workload", "grant release: a weaker limit"),
    ("    limits: [{max: 10, window: 1h, per: key}]\n", "", "grant release: a weaker limit"),
    ("approvals: 2", "approvals: 1", "grant release: another quorum"),
    (
        "approvals: 2, of: [managers, lawyers]",
        "stages: [{approvals: 1, of: [managers]}, {approvals: 1, of: [lawyers]}]",
        "grant release: another quorum",
    ),
    ("    quorum: {approvals: 2, of: [managers, lawyers], expires: 1h, cool_off: 1m}\n", "", "grant release: no quorum any more"),
    ("expires: 1h", "expires: 2h", "grant release: other times for its quorum"),
    ("cool_off: 1m", "cool_off: 59s", "grant release: other times for its quorum"),
    ("    quorum:", "    observe_only: true\n    quorum:", "grant release: it is only observed"),
    ('subjects: ["spiffe://example.org/**"]', 'subjects: ["**"]', "grant responders: more subjects"),
    ("tokens: [a]", 'tokens: ["*"]', "grant responders: more tokens"),
    ("waives: [release]", "waives: [release, responders]", "grant glass: more waives"),
    ("id: glass", "id: glass-2", "grant glass-2 is new"),
    (
        'workloads: ["spiffe://example.org/**"], keys: [legacy]',
        'workloads: ["spiffe://example.org/ci/*"], keys: [legacy]',
        "deny no-legacy may deny less",
    ),
    ("keys: [legacy]", "trails: ['**']", "deny no-legacy may deny less"),
    ("operations: [sign, sign-digest]}", "operations: [sign]}", "deny no-legacy may deny less"),
    ("id: no-legacy", "id: other", "deny no-legacy is gone"),
    ("192.0.2.0/24", "192.0.2.0/23", "network office is another"),
    ('"spiffe://example.org/human/b"]', '"spiffe://example.org/human/b", "spiffe://example.org/human/d"]', "people have other identities"),
    ("lawyers: [b, c]", "lawyers: [a, b, c]", "group lawyers has more people"),
]


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is not what is compared."""
    monkeypatch.setattr(wasm, "DEADLINE_TICKS", 2_000)


def changed(tmp_path: Path, old: str, new: str) -> tuple[Rules, Rules]:
    assert BASE.count(old) == 1, old
    return load(tmp_path / "old", a=BASE), load(
        tmp_path / "new", a=BASE.replace(old, new).replace("sign, sign-digest], trails", "read-audit], trails")
    )


@pytest.mark.parametrize(("old", "new"), NARROWER)
def test_change_that_takes_away_is_narrower_and_the_way_back_is_not(tmp_path: Path, old: str, new: str) -> None:
    before, after = changed(tmp_path, old, new)
    assert widenings(before, after) == ()
    assert widenings(after, before) != ()


@pytest.mark.case(72)
@pytest.mark.parametrize(("old", "new", "why"), WIDER)
def test_change_that_gives_more_is_wider_and_says_where(tmp_path: Path, old: str, new: str, why: str) -> None:
    if old == "keys: [legacy]":
        before, after = (
            load(tmp_path / "old", a=BASE),
            load(tmp_path / "new", a=BASE.replace("keys: [legacy], operations: [sign, sign-digest]", "trails: ['**']")),
        )
    else:
        before, after = changed(tmp_path, old, new)
    assert why in widenings(before, after)


def test_demand_that_is_watched_at_first_is_narrower_and_so_is_letting_it_bind(tmp_path: Path) -> None:
    free = "grants:\n  - {id: a, workloads: ['**'], keys: [orders], operations: [sign], algorithms: [ES256]DEMAND}\n"
    bound = ", limits: [{max: 1, window: 1h, per: key}]"
    demands = {"free": "", "watched": f"{bound}, observe_only: true", "bound": bound}
    rules = {name: load(tmp_path / name, a=free.replace("DEMAND", demand)) for name, demand in demands.items()}
    assert widenings(rules["free"], rules["watched"]) == ()
    assert widenings(rules["watched"], rules["bound"]) == ()
    assert widenings(rules["bound"], rules["watched"]) == ("grant a: it is only observed",)


def test_nothing_is_wider_than_itself(tmp_path: Path) -> None:
    rules = load(tmp_path, a=BASE)
    assert widenings(rules, rules) == ()


def test_grant_that_demands_something_can_go_only_where_no_other_allows_the_same(tmp_path: Path) -> None:
    free = "  - {id: free, workloads: ['**'], keys: [KEY], operations: [sign], algorithms: [ALG]}\n"
    for key, algorithm, is_narrower in (("release", "ES256", False), ("release", "PS256", True), ("invoices", "ES256", True)):
        other = free.replace("KEY", key).replace("ALG", algorithm)
        old = BASE.replace("denies:\n", f"{other}denies:\n")
        new = old.replace("keys: [release, orders]", "keys: [orders]")
        before, after = load(tmp_path / f"old-{key}-{algorithm}", a=old), load(tmp_path / f"new-{key}-{algorithm}", a=new)
        # `sign` includes `read-key`, which names no algorithm: only other keys are certainly apart
        expected = is_narrower and key != "release"
        assert (widenings(before, after) == ()) is expected, (key, algorithm)


SEGMENTS = ("ci", "human", "a", "*")
KEYS = ("release", "orders", "legacy")
OPERATIONS = ("sign", "read-key", "freeze", "admin-policy", "read-audit", "break-glass", "unfreeze")
QUESTIONS = (
    ("key", "sign"), ("key", "sign"), ("key", "sign"), ("key", "read-key"), ("key", "freeze"), ("trail", "read-audit"),
    ("workload", "freeze"), ("token", "unfreeze"), ("everything", "freeze"), ("policy", "admin-policy"), ("grant", "break-glass"),
    ("any", "freeze"), ("key", "approve"), ("change", "approve"),
)  # fmt: skip
NETWORKS = ("office", "lab")
PEOPLE: dict[str, tuple[str, ...]] = {name: (f"spiffe://example.org/human/{name}",) for name in ("a", "b", "c", "d")}


class Maker:
    """Makes rules, small changes of them, and requests that come close to both."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def some(self, values: tuple[Any, ...], least: int = 1) -> tuple[Any, ...]:
        return tuple(self.random.sample(values, self.random.randint(least, min(3, len(values)))))

    def patterns(self) -> tuple[str, ...]:
        return tuple(self.pattern() for _ in range(self.random.randint(1, 2)))

    def pattern(self) -> str:
        if self.random.random() < 0.1:
            return "**"
        path = [self.random.choice(SEGMENTS) for _ in range(self.random.randint(1, 2))]
        return f"spiffe://example.org/{'/'.join([*path, '**'] if self.random.random() < 0.3 else path)}"

    def keys(self) -> tuple[str, ...]:
        return ("*",) if self.random.random() < 0.2 else self.some(KEYS)

    def grant(self, name: str) -> Grant:
        operations = self.some(OPERATIONS)
        demands: dict[str, Any] = {}
        if self.random.random() < 0.4:
            demands["limits"] = (LimitRule(max=self.random.randint(1, 3), window="1h", per="key"),)
        if self.random.random() < 0.3:
            demands["quorum"] = Quorum(approvals=self.random.randint(1, 2), of=self.some(("g", "h")), expires="1h")
        if self.random.random() < 0.2:
            demands["hours"] = tuple(Hours(days=day, opens="08:00", closes="18:00", zone="UTC") for day in self.some(("mon", "tue")))
        if self.random.random() < 0.2:
            demands["not_after"] = self.random.choice(("2027-01-01T00:00:00Z", "2028-01-01T00:00:00Z"))
        return Grant(
            id=name, workloads=self.patterns(), operations=operations, keys=self.keys(), algorithms=self.some(tuple(Algorithm)[:2]),
            trails=self.patterns(), subjects=self.patterns(), tokens=self.keys(), waives=self.some(("g0", "g1")),
            networks=self.some(NETWORKS) if self.random.random() < 0.3 else (), observe_only=self.random.random() < 0.1, **demands,
        )  # fmt: skip

    def deny(self, name: str) -> Deny:
        def maybe(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return values if self.random.random() < 0.4 else ()

        return Deny(
            id=name, workloads=self.patterns(), operations=maybe(self.some(OPERATIONS)), keys=maybe(self.keys()),
            algorithms=maybe(self.some(tuple(Algorithm)[:2])), trails=maybe(self.patterns()), subjects=maybe(self.patterns()),
            tokens=maybe(self.keys()), waives=maybe(self.some(("g0", "g1"))), networks=maybe(self.some(NETWORKS)),
        )  # fmt: skip

    def rules(self) -> Rules:
        grants = tuple(self.grant(f"g{number}") for number in range(self.random.randint(1, 4)))
        denies = tuple(self.deny(f"d{number}") for number in range(self.random.randint(0, 2)))
        groups = {"g": self.some(tuple(PEOPLE)), "h": self.some(tuple(PEOPLE))}
        return Rules(grants, denies, {}, (), PEOPLE, groups)

    def changed(self, rules: Rules) -> Rules:
        """The same with one or two members of one or two rules as those of other rules, smaller more often than not; or a rule less."""
        grants, denies = list(rules.grants), list(rules.denies)
        groups = dict(rules.groups)
        for _ in range(self.random.randint(1, 2)):
            change = self.random.random()
            if change < 0.1 and len(grants) > 1:
                grants.pop(self.random.randrange(len(grants)))
            elif change < 0.15:
                groups["g"] = self.some(tuple(PEOPLE))
            elif change < 0.3 and denies:
                index = self.random.randrange(len(denies))
                denies[index] = self.mixed(denies[index], self.deny(denies[index].id))
            elif change < 0.4:
                denies.append(self.deny(f"e{len(denies)}"))
            else:
                index = self.random.randrange(len(grants))
                grants[index] = self.mixed(grants[index], self.grant(grants[index].id))
        return Rules(tuple(grants), tuple(denies), {}, (), rules.people, groups)

    def mixed(self, rule: Any, other: Any) -> Any:
        name = self.random.choice([each for each in rule.__struct_fields__ if each != "id"])
        value = getattr(rule, name)
        if isinstance(value, tuple) and len(value) > 1 and self.random.random() < 0.6:
            return msgspec.structs.replace(rule, **{name: value[1:]})
        return msgspec.structs.replace(rule, **{name: getattr(other, name)})

    def request(self) -> bytes:
        path = tuple(self.random.choice(("ci", "human", "a", "b")) for _ in range(self.random.randint(1, 3)))
        caller = "/".join(("spiffe://example.org", *path))
        kind, operation = self.random.choice(QUESTIONS)
        if operation == "approve":
            path = ("human", self.random.choice(tuple(PEOPLE)))
            caller = "/".join(("spiffe://example.org", *path))
        workload = "/".join(("spiffe://example.org", *(self.random.choice(("ci", "human", "a")) for _ in range(2))))
        named = {"key": self.random.choice(KEYS), "token": self.random.choice(KEYS), "grant": self.random.choice(("g0", "g1"))}
        named["change"] = self.random.choice(("admin-policy", "unfreeze"))
        return canonical({
            "v": 1,
            "caller": {
                "spiffe_id": caller, "trust_domain": "example.org", "path": path, "method": "x509-svid", "bearer": False,
                "proof_of_possession": False, "networks": self.some(NETWORKS, 0), "evidence": [],
            },
            "principal": {"present": False, "issuer": "", "subject": "", "groups": [], "chain": []},
            "operation": operation,
            "target": {
                "kind": kind, "id": named.get(kind, ""),
                "workload": {"trail": self.random.choice((workload, workload, caller, "")), "workload": workload}.get(
                    kind, workload if operation == "approve" else ""
                ),
            },
            "key": {"name": "", "version": 0, "family": "", "labels": {}},
            "algorithm": self.random.choice(tuple(Algorithm)[:2]).value if operation == "sign" else "",
            "content": {"type": "", "size": 0, "media_type": "", "fields": {}},
            "reason": "",
        })  # fmt: skip


class _Result(msgspec.Struct):
    result: PolicyAnswer


def engine(rules: Rules) -> Callable[[bytes], PolicyAnswer]:
    """The built-in policy with these rules, asked directly: what comes of obligations does not matter here."""
    instance = WasmInstance(default_module(), compile_rules(rules, default_module().sha256, "engine")[0])
    return lambda asked: msgspec.json.decode(instance.evaluate(asked), type=tuple[_Result])[0].result


def is_weaker(old: PolicyAnswer, new: PolicyAnswer) -> bool:
    """Whether something that bound an allowed request binds it no longer."""
    after = {each.grant: each for each in new.obligations}
    return any(not is_as_strict(each, after.get(each.grant)) for each in old.obligations if not each.observe_only and not each.is_empty)


def is_as_strict(old: Obligation, new: Obligation | None) -> bool:
    if new is None or new.observe_only:
        return False
    bounds = {(each.window_s, each.per): each.max for each in new.limits}
    return (
        all(bounds.get((each.window_s, each.per), 10**9) <= each.max for each in old.limits)
        and (not old.hours or (bool(new.hours) and set(new.hours) <= set(old.hours)))
        and (not old.not_after or bool(new.not_after and new.not_after <= old.not_after))
        and len(new.quorum) >= len(old.quorum)
        and all(n.approvals >= o.approvals and set(n.people) <= set(o.people) for o, n in zip(old.quorum, new.quorum, strict=False))
    )


@pytest.mark.parametrize("seed", range(4))
def test_no_request_gains_anything_by_a_change_that_is_judged_narrower(seed: int) -> None:
    maker = Maker(seed)
    narrower = gains = 0
    for _ in range(60):
        old = maker.rules()
        new = maker.changed(old)
        why = widenings(old, new)
        narrower += not why
        before, after = engine(old), engine(new)
        for _ in range(10 if why else 100):
            asked = maker.request()
            was, now = before(asked), after(asked)
            if now.allow and (not was.allow or is_weaker(was, now)):
                assert why, (seed, old, new, asked)
                gains += 1
    assert narrower >= 5  # both kinds of changes are among them
    assert gains >= 1


_MAKER = Maker(7)
PATTERNS = sorted({"spiffe://example.com/ci/*", "spiffe://example.org/ci/*/x", *(_MAKER.pattern() for _ in range(60))})


def test_patterns_are_compared_as_they_match() -> None:
    words = ("ci", "human", "a", "x")
    identities = [f"spiffe://{domain}/{'/'.join(path)}" for domain in ("example.org", "example.com") for path in (
        *((one,) for one in words), *((one, two) for one in words for two in words),
        *((one, two, three) for one in words for two in words for three in words), ("ci", "ci", "ci", "ci"), ("human", "a", "x", "x"),
    )]  # fmt: skip
    fitted = {pattern: {each for each in identities if fits(pattern, each)} for pattern in PATTERNS}
    for one, other in itertools.product(PATTERNS, repeat=2):
        assert not _is_within(Pattern.parse(one), Pattern.parse(other)) or fitted[one] <= fitted[other], (one, other)
        assert _patterns_meet(Pattern.parse(one), Pattern.parse(other)) or not fitted[one] & fitted[other], (one, other)
