"""Three opinions on each request: the embedded WebAssembly, a real OPA server, and a model in Python. They must be one.

Both engines get the same bytes, and their answers are compared as whole objects. A failure names its seed.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any, get_args

import msgspec
import pytest

from keybroker.audit.leaf import canonical
from keybroker.authority.policy import wasm
from keybroker.authority.policy.compiler import compile_rules
from keybroker.authority.policy.engine import ENGINE
from keybroker.authority.policy.grants import OWN_TRAIL, Denied, Deny, Grant, Hours, LimitRule, Operation, Quorum, Rules, Stage
from keybroker.authority.policy.wasm import WasmInstance
from keybroker.model.key import Algorithm
from tests.policies import OpaServer, default_module, opa_server
from tests.policy_model import Expected, demanded, expected

SEEDS = range(1, 13)
REQUESTS = 800  # of each seed
DOMAINS = ("example.org", "example.com", "a", "1.2.3.4")
SEGMENTS = ("payments", "api", "ci", "release", "a", "b", "v1.2", "0", "007", "-", "_", "A")
KEYS = ("orders", "release", "a", "0", "1e3", "true", "null")
NETWORKS = ("office", "lab", "0")
OPERATIONS = get_args(Denied)
GRANTED = get_args(Operation)
FREEZING = ("freeze", "unfreeze")
USUAL = {
    "key": ("sign", "sign-digest", "read-key", "sign", "sign-digest", "read-key", *OPERATIONS), "trail": ("read-audit",),
    "workload": FREEZING, "token": FREEZING, "everything": FREEZING, "policy": ("admin-policy",), "grant": ("break-glass",),
}  # fmt: skip
HOURS = Hours(days="mon", opens="08:00", closes="18:00", zone="UTC", excluded=("2026-12-25",))
PEOPLE = ("alice", "bob", "carol", "dora", "eve", "0", "null")
GROUPS = ("managers", "legal", "1e3")
LIMIT = LimitRule(max=7, window="60s", per="key")

# Text that nobody should send: what is a glob, a quote, a brace, an escape, a number or a variable somewhere, and what looks the same.
HOSTILE = (
    "*", "**", "***", "?", "[a-z]", "{a,b}", "a*", "*a", "(", ")", "$", "^", "\\", "\\*", "\\u0061", "'", '"', '"}', "`", "${a}", "{{a}}",
    "%2f", "%s", "%!d", ".", "..", "...", " ", "  ", "a ", " a", "\t", "\n", "\r\n", "\x01", "\x1b[31m", "\x7f", "\x85", "\u00a0", "\u200b",
    "\u200d", "\ufeff", "\u202ea", "\u2066a\u2069", "\u0430pi", "\u0251", "\uff41", "a\u0301", "\u00e1", "\u1ec7", "e\u0323\u0302",
    "\u00df", "SS", "\u0130", "i\u0307", "\u212a", "k", "\U0001f511", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U00010000",
    "\U0010ffff", "\U00100061", "\ud7ff", "\ue000", "\ufffd", "\uffff", "0", "-0", "00", "1", "1.0", "1e3", "1E400", "0x1", "NaN",
    "Infinity", "9007199254740993", "true", "false", "null", "undefined", "None", "[]", "{}", "input", "data.keybroker.allow", "rule", "_",
    "", "spiffe:", "spiffe:;", "example.org", "a" * 300, "\u00e9" * 700, "\U0001f511" * 200, "x" * 9_000, "constructor", "__proto__",
    "<script>", "--", "' or 1=1", "\u0661", "\u2028", "\u2029",
)  # fmt: skip


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is not what is compared."""
    monkeypatch.setattr(wasm, "DEADLINE_TICKS", 2_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpaServer]:
    with opa_server(tmp_path_factory.mktemp("opa") / "log") as running:
        yield running


class Maker:
    """Makes rules, and requests that come close to them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.is_hostile = seed % 3 == 0  # names in the rules that no file could hold; the engines must agree on them all the same
        self.keys = (*KEYS, *self.random.sample(HOSTILE, 12)) if self.is_hostile else KEYS
        self.networks = (*NETWORKS, *self.random.sample(HOSTILE, 8)) if self.is_hostile else NETWORKS

    def some(self, values: tuple[Any, ...], least: int = 1, most: int = 3) -> tuple[Any, ...]:
        return tuple(self.random.sample(values, min(len(values), self.random.randint(least, most))))

    def maybe(self, values: tuple[Any, ...], chance: float = 0.5) -> tuple[Any, ...]:
        return self.some(values) if self.random.random() < chance else ()

    def pattern(self) -> str:
        if self.random.random() < 0.1:
            return "**"
        path = [self.random.choice((*SEGMENTS[:6], "*", "*")) for _ in range(self.random.randint(1, 3))]
        if self.random.random() < 0.3:
            path[-1] = "**"
        return f"spiffe://{self.random.choice(DOMAINS[:2])}/{'/'.join(path)}"

    def patterns(self) -> tuple[str, ...]:
        return tuple(self.pattern() for _ in range(self.random.randint(1, 3)))

    def some_keys(self) -> tuple[str, ...]:
        return ("*",) if self.random.random() < 0.15 else tuple(key for key in self.some(self.keys) if key != "*") or ("a",)

    def name(self, prefix: str, number: int) -> str:
        return f"{prefix}{number}{self.random.choice(HOSTILE) if self.is_hostile else ''}"

    def rules(self) -> Rules:
        grants = [self.grant(number) for number in range(self.random.choice((0, 3, 10, 30, 60)))]
        denies = [self.deny(number) for number in range(self.random.choice((0, 0, 1, 3, 6)))]
        identities = list(dict.fromkeys(self.trail() for _ in range(30)))  # each belongs to one person
        people = {name: tuple(identities[number :: len(PEOPLE)][:3]) for number, name in enumerate(PEOPLE)}
        groups = {name: self.some(PEOPLE) for name in GROUPS}
        return Rules(tuple(grants), tuple(denies), {}, (), people, groups)

    def grant(self, number: int) -> Grant:
        operations = self.some(GRANTED)
        signs = not {"sign", "sign-digest"}.isdisjoint(operations)
        return Grant(
            id=self.name("g", number),
            workloads=self.patterns(),
            operations=operations,
            keys=self.some_keys() if not set(operations) <= {"read-audit", "admin-policy", "break-glass"} else (),
            algorithms=self.some(tuple(Algorithm)) if signs else (),
            trails=self.patterns() if "read-audit" in operations else (),
            subjects=self.patterns() if "freeze" in operations else (),
            tokens=self.some_keys() if "unfreeze" in operations else (),
            waives=self.some(("g0", "g1", "g2")) if "break-glass" in operations else (),
            networks=self.maybe(self.networks, 0.3),
            not_after=self.random.choice(("2027-06-30T00:00:00Z", msgspec.UNSET)),
            hours=self.maybe((HOURS,), 0.3) if signs else (),
            limits=self.maybe((LIMIT, msgspec.structs.replace(LIMIT, per="grant")), 0.3) if signs else (),
            quorum=self.quorum() if signs and self.random.random() < 0.4 else msgspec.UNSET,
            observe_only=self.random.random() < 0.2,
        )

    def quorum(self) -> Quorum:
        stages = tuple(Stage(approvals=self.random.randint(1, 3), of=self.some(GROUPS)) for _ in range(self.random.randint(1, 2)))
        return Quorum(stages=stages, expires="60s", cool_off="5s")

    def deny(self, number: int) -> Deny:
        return Deny(
            id=self.name("d", number),
            workloads=self.patterns(),
            operations=self.maybe(OPERATIONS),
            keys=self.some_keys() if self.random.random() < 0.4 else (),
            algorithms=self.maybe(tuple(Algorithm), 0.3),
            trails=self.patterns() if self.random.random() < 0.3 else (),
            subjects=self.patterns() if self.random.random() < 0.2 else (),
            tokens=self.some_keys() if self.random.random() < 0.2 else (),
            waives=self.maybe(("g0", "g1"), 0.1),
            networks=self.maybe(self.networks, 0.3),
        )

    def text(self, *usual: str, hostile: float = 0.08) -> str:
        """One of the usual words; now and then one that is not, or one with something hostile in it."""
        word = self.random.choice(usual)
        if self.random.random() > hostile:
            return word
        other = self.random.choice(HOSTILE)
        return self.random.choice((other, word + other, other + word, word.upper(), word[:-1], word.replace("a", "\u0430")))

    def identity(self) -> tuple[str, tuple[str, ...]]:
        """A trust domain and a path; slashes only between segments, as in what was parsed."""
        path = [self.text(*SEGMENTS[:6]).replace("/", "") for _ in range(self.random.choice((0, 1, 2, 2, 3, 3, 4)))]
        return self.text(*DOMAINS[:2], hostile=0.03).replace("/", ""), tuple(path)

    def request(self) -> dict[str, Any]:
        domain, path = self.identity()
        caller = "/".join((f"spiffe://{domain}", *path))
        oddity = "/".join(("spiffe:/", *self.identity()[1]))
        trail = self.random.choice((caller, "", oddity, *[self.trail() for _ in range(3)]))
        kind = self.text("key", "key", "key", "trail", "workload", "token", "everything", "policy", "grant", "any", hostile=0.02)
        usual = USUAL.get(kind, OPERATIONS)
        operation = self.text(*usual, hostile=0.05)
        names_workload = kind in {"trail", "workload"}
        return {
            "v": 1,
            "caller": {
                "spiffe_id": caller, "trust_domain": domain, "path": path,
                "method": "x509-svid", "bearer": False, "proof_of_possession": False,
                "networks": [self.text(*self.networks) for _ in range(self.random.randint(0, 3))], "evidence": [],
            },
            "principal": {"present": False, "issuer": "", "subject": "", "groups": [], "chain": []},
            "operation": operation,
            "target": {
                "kind": kind,
                "id": "" if names_workload else self.text("g0", "g1") if kind == "grant" else self.text(*self.keys),
                "workload": trail if names_workload else "",
            },
            "key": {"name": "", "version": self.random.choice((0, 2**53 - 1)), "family": "", "labels": {self.text("a"): self.text("b")}},
            "algorithm": self.text(*(each.value for each in Algorithm), "", hostile=0.05),
            "content": {"type": "", "size": self.random.randrange(2**18), "media_type": self.text("", hostile=0.3), "fields": {}},
            "reason": self.text("", "because", hostile=0.5),
        }  # fmt: skip

    def approval(self, rules: Rules) -> dict[str, Any]:
        """Somebody who is in the rules, or nearly, wants to approve something that is in them, or nearly."""
        asked = self.request() | {"operation": self.text("approve"), "algorithm": self.text("", "ES256")}
        caller = self.random.choice([each for identities in rules.people.values() for each in identities])
        domain, *path = caller.removeprefix("spiffe://").split("/")
        asked["caller"] |= {"spiffe_id": caller, "trust_domain": domain, "path": path}
        demanding = [each for each in rules.grants if isinstance(each.quorum, Quorum)]
        grant = self.random.choice(demanding) if demanding and self.random.random() < 0.7 else None
        workload = self.random.choice(grant.workloads).replace("**", "a/b").replace("*", "a") if grant else self.trail()
        key = self.random.choice(grant.keys) if grant else self.text(*self.keys)
        kind = self.text("key", "key", "change")
        what = self.text("unfreeze", "admin-policy", "sign") if kind == "change" else key
        asked["target"] = {"kind": kind, "id": what, "workload": self.text(workload, hostile=0.03)}
        return asked

    def trail(self) -> str:
        domain, path = self.identity()
        return "/".join((f"spiffe://{domain}", *path))

    def broken(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The same with one part missing or of another type: nobody sends that, and still nobody may decide it in two ways."""
        place = self.random.choice((asked, asked["caller"], asked["target"]))
        name = self.random.choice(list(place))
        if self.random.random() < 0.4:
            del place[name]
        else:
            place[name] = self.random.choice(
                (None, True, 0, -1, 1.5, 10**20, "", "a", "*", [], ["a"], [None], {}, {"a": "b"}, [["payments"]])
            )
        return asked


def opinion(result: dict[str, Any]) -> Expected:
    return Expected(result["allow"], sorted(result["grants"]), sorted(result["reasons"]))


def both(server: OpaServer, instance: WasmInstance, asked: bytes) -> tuple[Any, Any]:
    """The answers of the embedded engine and of the server; undefined is None."""
    embedded = json.loads(instance.evaluate(asked))
    return embedded[0]["result"] if embedded else None, json.loads(server.decide(asked)).get("result")


@pytest.mark.parametrize("seed", SEEDS)
def test_embedded_engine_server_and_model_agree_on_every_request(server: OpaServer, seed: int) -> None:
    maker = Maker(seed)
    rules = maker.rules()
    data, digest = compile_rules(rules, default_module().sha256, ENGINE)
    instance = WasmInstance(default_module(), data)
    server.load(data)
    for number in range(REQUESTS):
        request = maker.approval(rules) if number % 4 == 0 else maker.request()
        asked = canonical(request)
        embedded, served = both(server, instance, asked)
        where = f"seed {seed}, request {number}: {asked.decode()}"
        assert embedded == served, where
        assert opinion(embedded) == expected(rules, request), where
        assert embedded["policy"] == digest, where
        assert [each["grant"] for each in embedded["obligations"]] == embedded["grants"], where
        by_id = {grant.id: grant for grant in rules.grants} | {OWN_TRAIL: Grant(id=OWN_TRAIL, workloads=(), operations=())}
        assert embedded["obligations"] == [demanded(rules, by_id[name], request["operation"]) for name in embedded["grants"]], where
        assert len(set(embedded["grants"])) == len(embedded["grants"]), where


@pytest.mark.parametrize("seed", [101, 102, 103])
def test_embedded_engine_and_server_agree_on_requests_that_are_not_whole(server: OpaServer, seed: int) -> None:
    maker = Maker(seed)
    data, _ = compile_rules(maker.rules(), default_module().sha256, ENGINE)
    instance = WasmInstance(default_module(), data)
    server.load(data)
    for number in range(300):
        asked = canonical(maker.broken(maker.request()))
        embedded, served = both(server, instance, asked)
        assert embedded == served, f"seed {seed}, request {number}: {asked.decode()}"


def test_requests_of_the_comparison_reach_every_verdict_and_every_reason() -> None:
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        maker = Maker(seed)
        rules = maker.rules()
        for number in range(REQUESTS):
            request = maker.approval(rules) if number % 4 == 0 else maker.request()
            answer = expected(rules, request)
            seen.update(["approver"] if answer.allow and request["operation"] == "approve" else [])
            seen.update(["allow"] if answer.allow else {reason.split(":")[0] for reason in answer.reasons})
            seen.update(["two grants"] if len(answer.grants) > 1 else [])
            seen.update(["own-trail"] if "own-trail" in answer.grants else [])
    kinds = ("allow", "no-grant", "operation-not-granted", "algorithm-not-granted", "network-not-granted", "denied-by", "own-trail")
    rare = {name: seen[name] for name in (*kinds, "two grants", "approver") if seen[name] < 100}
    assert not rare, seen


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_hostile_text_matches_itself_and_nothing_else(server: OpaServer, text: str) -> None:
    if text in {"", "*"}:
        text = f"{text}x"
    grant = Grant(id="g", workloads=("**",), operations=("sign",), keys=(text,), algorithms=(Algorithm.ES256,), networks=(text,))
    data, _ = compile_rules(Rules((grant,), (), {}, ()), default_module().sha256, ENGINE)
    instance = WasmInstance(default_module(), data)
    server.load(data)
    for other in (text, *random.Random(text).sample(HOSTILE, 5)):
        request = Maker(0).request() | {"operation": "sign", "algorithm": "ES256", "target": {"kind": "key", "id": other, "workload": ""}}
        request["caller"]["networks"] = [other]
        embedded, served = both(server, instance, canonical(request))
        assert embedded == served
        assert embedded["allow"] is (other == text)
