"""Grant files of every kind that the loader takes, and requests that come close to them, for hypothesis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from keybroker.authority.policy import loader
from keybroker.authority.policy.grants import Rules
from keybroker.model.key import Algorithm

OPERATIONS = ("sign", "sign-digest", "read-key", "read-audit")
ROLE_OPERATIONS = ("freeze", "unfreeze", "admin-policy", "break-glass")
TOKENS = ("blue", "green")
ALGORITHMS = tuple(each.value for each in Algorithm)
KEYS = ("orders", "release", "a", "0", "1e3", "true")
SEGMENTS = ("payments", "api", "ci", "a", "007", "-")
DOMAINS = ("example.org", "a")
NETWORKS = ("office", "lab")
PEOPLE = {name: [f"spiffe://example.org/human/{name}"] for name in ("alice", "bob", "carol", "dave")}
GROUPS = {"releasers": ["alice", "bob", "carol"], "legal": ["dave", "alice"]}


def lists(values: tuple[str, ...], most: int = 3) -> st.SearchStrategy[list[str]]:
    """One to three of these, each once."""
    return st.lists(st.sampled_from(values), min_size=1, max_size=most, unique=True)


@st.composite
def patterns(draw: st.DrawFn) -> str:
    if draw(st.integers(0, 9)) == 0:
        return "**"
    path = draw(st.lists(st.sampled_from((*SEGMENTS, "*")), min_size=1, max_size=3))
    if draw(st.integers(0, 3)) == 0:
        path[-1] = "**"
    return f"spiffe://{draw(st.sampled_from(DOMAINS))}/{'/'.join(path)}"


keys = st.one_of(st.just(["*"]), lists(KEYS))
chances: st.SearchStrategy[bool] = st.booleans()
many_patterns = st.lists(patterns(), min_size=1, max_size=3, unique=True)
hours = st.fixed_dictionaries(
    {
        "days": st.sampled_from(("mon-fri", "sat", "fri-mon", "mon,wed,sat-sun")),
        "from": st.sampled_from(("00:00", "08:00", "22:30")),
        "to": st.sampled_from(("06:00", "18:00", "24:00")),
        "zone": st.sampled_from(("UTC", "Europe/Berlin", "America/New_York")),
    },
    optional={"except": st.lists(st.sampled_from(("2026-12-25", "2026-01-01", "2027-03-28")), min_size=1, unique=True)},
)
limits = st.lists(
    st.fixed_dictionaries(
        {
            "max": st.integers(1, 10**9),
            "window": st.sampled_from(("1s", "1m", "24h", "31d")),
            "per": st.sampled_from(("workload", "key", "grant", "principal")),
        }
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda each: (each["window"], each["per"]),
)
stages = st.fixed_dictionaries({"approvals": st.integers(1, 2), "of": st.lists(st.sampled_from(tuple(GROUPS)), min_size=1, unique=True)})
times = {"expires": st.sampled_from(("1h", "31d")), "cool_off": st.sampled_from(("0s", "10m"))}
quorums = st.one_of(
    st.builds(lambda stage, rest: {**stage, **rest}, stages, st.fixed_dictionaries(times)),
    st.fixed_dictionaries({"stages": st.lists(stages, min_size=1, max_size=2), **times}),
)


@st.composite
def grants(draw: st.DrawFn, number: int) -> dict[str, Any]:
    """One grant that makes sense."""
    operations = draw(lists(OPERATIONS))
    signs = not {"sign", "sign-digest"}.isdisjoint(operations)
    made: dict[str, Any] = {"id": f"g{number}", "workloads": draw(many_patterns), "operations": operations}
    if operations != ["read-audit"]:
        made["keys"] = draw(keys)
    if signs:
        made["algorithms"] = draw(lists(ALGORITHMS, 10))
    if "read-audit" in operations:
        made["trails"] = draw(many_patterns)
    optional: dict[str, st.SearchStrategy[Any]] = {
        "networks": lists(NETWORKS),
        "not_before": st.just("2026-01-01T00:00:00Z"),
        "not_after": st.just("2027-06-30T00:00:00Z"),
    }
    if signs:
        optional |= {"hours": st.lists(hours, min_size=1, max_size=2), "limits": limits, "quorum": quorums}
    made |= draw(st.fixed_dictionaries({}, optional=optional))
    is_observed = draw(chances)
    if is_observed and made.keys() & {"not_before", "not_after", "hours", "limits", "quorum"}:
        made["observe_only"] = True
    return made


@st.composite
def role_grants(draw: st.DrawFn, number: int, waivable: tuple[str, ...]) -> dict[str, Any]:
    """One grant of acts that makes sense."""
    operations = draw(lists(ROLE_OPERATIONS if waivable else ROLE_OPERATIONS[:3]))
    made: dict[str, Any] = {"id": f"r{number}", "workloads": draw(many_patterns), "operations": operations}
    if not {"freeze", "unfreeze"}.isdisjoint(operations):
        what = draw(lists(("keys", "tokens", "subjects")))
        chosen = {"keys": keys, "tokens": st.one_of(st.just(["*"]), lists(TOKENS)), "subjects": many_patterns}
        made |= {name: draw(chosen[name]) for name in what}
    if "break-glass" in operations:
        made["waives"] = draw(lists(waivable))
    return made


@st.composite
def denies(draw: st.DrawFn, number: int) -> dict[str, Any]:
    """One deny that makes sense."""
    made: dict[str, Any] = {"id": f"d{number}", "workloads": draw(many_patterns)}
    if draw(chances):
        made["operations"] = draw(lists(("sign", "sign-digest")))
        optional: dict[str, st.SearchStrategy[Any]] = {"keys": keys, "algorithms": lists(ALGORITHMS), "networks": lists(NETWORKS)}
    else:
        optional = {"keys": keys, "trails": many_patterns, "networks": lists(NETWORKS)}
    return made | draw(st.fixed_dictionaries({}, optional=optional))


@st.composite
def rule_files(draw: st.DrawFn) -> str:
    """A grant file; JSON is YAML."""
    made = [draw(grants(number)) for number in range(draw(st.integers(0, 6)))]
    waivable = tuple(each["id"] for each in made if not {"sign", "sign-digest"}.isdisjoint(each["operations"]))
    made += [draw(role_grants(number, waivable)) for number in range(draw(st.integers(0, 2)))]
    return json.dumps(
        {
            "grants": made,
            "denies": [draw(denies(number)) for number in range(draw(st.integers(0, 2)))],
            "networks": {name: [f"192.0.2.{number}"] for number, name in enumerate(NETWORKS)},
            "people": PEOPLE,
            "groups": GROUPS,
        }
    )


def rules_of(text: str) -> Rules:
    """As a broker loads it."""
    return loader.load_texts({Path("a.yaml"): text.encode()}, frozenset(KEYS))


ACT_TARGETS = tuple(
    {"kind": kind, "id": name}
    for kind, names in {
        "key": KEYS, "token": TOKENS, "workload": ("",), "everything": ("",), "policy": ("",), "grant": ("g0", "g1"), "any": ("",),
    }.items()
    for name in names
)  # fmt: skip


texts = st.one_of(st.just(""), st.text(st.characters(exclude_categories=["Cs"]), max_size=8))


@st.composite
def identities(draw: st.DrawFn) -> tuple[str, list[str]]:
    path = draw(st.lists(st.sampled_from((*SEGMENTS, "human", "alice")), min_size=1, max_size=4))
    return draw(st.sampled_from(DOMAINS)), path


def spiffe_id(identity: tuple[str, list[str]]) -> str:
    return f"spiffe://{identity[0]}/{'/'.join(identity[1])}"


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A whole policy input; also some that no caller could bring about."""
    caller = draw(identities())
    operation = draw(st.sampled_from((*OPERATIONS, *ROLE_OPERATIONS, "approve", "")))
    is_trail = operation == "read-audit" and draw(st.integers(0, 9)) > 0
    own, other = spiffe_id(caller), spiffe_id(draw(identities()))
    key = draw(st.one_of(st.sampled_from(KEYS), texts))
    return {
        "v": 1,
        "caller": {"spiffe_id": own, "trust_domain": caller[0], "path": caller[1], "method": "x509-svid", "bearer": False,
                   "proof_of_possession": False, "networks": draw(st.lists(st.sampled_from((*NETWORKS, "x")), max_size=2)), "evidence": []},
        "principal": {"present": False, "issuer": "", "subject": "", "groups": [], "chain": []},
        "operation": operation,
        "target": {"kind": "trail", "id": "", "workload": draw(st.sampled_from((own, other, "")))} if is_trail
        else draw(st.sampled_from(ACT_TARGETS)) | {"workload": draw(st.sampled_from(("", other)))} if operation in ROLE_OPERATIONS
        else {"kind": draw(st.sampled_from(("key", "key", "key", ""))), "id": key, "workload": ""},
        "key": {"name": key, "version": draw(st.integers(0, 2**53 - 1)), "family": "ec-p256", "labels": {draw(texts): draw(texts)}},
        "algorithm": draw(st.sampled_from((*ALGORITHMS, ""))),
        "content": {"type": "message", "size": draw(st.integers(0, 2**18)), "media_type": draw(texts), "fields": {}},
        "reason": draw(texts),
    }  # fmt: skip
