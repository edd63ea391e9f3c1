"""One request against a candidate: the verdict is the engine's, and the reasoning never contradicts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keybroker.audit.leaf import canonical
from keybroker.authority.policy.compiler import compile_rules
from keybroker.authority.policy.engine import ENGINE, EmbeddedEngine
from keybroker.authority.policy.grants import Rules
from keybroker.authority.policy.wasm import WasmModule
from keybroker.authority.trial import candidate as candidates
from keybroker.authority.trial.asking import AskingError, ShortRequest, read_input
from keybroker.authority.trial.candidate import Candidate, Places
from keybroker.authority.trial.simulate import Simulation, is_own_trail, simulate
from keybroker.model.decision import PolicyInput, Verdict
from tests.policies import GOOD, Compile, default_engine
from tests.random_policies import PolicyMaker, seen_from

API = "spiffe://example.org/payments/api"


def loaded(directory: Path, text: str = GOOD) -> Candidate:
    directory.mkdir(exist_ok=True)
    (directory / "a.yaml").write_text(text)
    return candidates.load(directory)


def of(candidate: Candidate, **fields: object) -> Simulation:
    short = ShortRequest(**{"workload": API, "key": "orders", "algorithm": "ES256", **fields})  # type: ignore[arg-type]  # by name
    return simulate(candidate, short.policy_input(candidate.rules))


@pytest.mark.parametrize("seed", range(30))
def test_reasoning_agrees_with_the_engine_on_every_request(seed: int) -> None:
    maker = PolicyMaker(seed)
    rules = maker.rules()
    candidate = Candidate(rules, default_engine(rules), Places(()))
    for _ in range(60):
        asked = seen_from(maker.request(), rules, maker.address())
        simulation = simulate(candidate, read_input(asked, rules))
        assert simulation.is_explained, asked
        matching = {each.rule for each in simulation.readings if each.matches}
        denies = {each.rule for each in simulation.readings if each.matches and each.is_deny}
        given = (matching - denies) | ({"own-trail"} if is_own_trail(simulation.request) else set())
        assert (simulation.decision.verdict is Verdict.ALLOW) == (bool(given) and not denies), asked
        if simulation.decision.verdict is Verdict.ALLOW:
            assert set(simulation.decision.grants) == given, asked


def test_reasoning_explains_nothing_where_the_compiled_policy_decides_in_its_own_way(compiled: Compile, tmp_path: Path) -> None:
    source = """\
package keybroker
import data.keybroker_rules as rules
decision := {"allow": false, "reasons": ["not-today"], "grants": [], "policy": rules.policy, "obligations": []}
"""
    module = WasmModule(compiled(source), "mine.wasm")
    candidate = loaded(tmp_path / "g")
    data, digest = compile_rules(candidate.rules, module.sha256, ENGINE)
    simulation = of(Candidate(candidate.rules, EmbeddedEngine(module, data, digest), candidate.places))
    assert (simulation.decision.verdict, simulation.decision.reasons) == (Verdict.DENY, ("not-today",))
    assert not simulation.is_explained


def test_reasoning_explains_nothing_where_the_policy_gives_no_answer(compiled: Compile, tmp_path: Path) -> None:
    module = WasmModule(compiled("package keybroker\ndecision := 1 if input.v == 2\n"), "mine.wasm")
    candidate = loaded(tmp_path / "g")
    data, digest = compile_rules(candidate.rules, module.sha256, ENGINE)
    simulation = of(Candidate(candidate.rules, EmbeddedEngine(module, data, digest), candidate.places))
    assert (simulation.decision.verdict, simulation.is_explained) == (Verdict.FAILED, False)


def test_selectors_say_which_fit_and_which_do_not(tmp_path: Path) -> None:
    deny = 'denies:\n  - {id: not-abroad, workloads: ["**"], networks: [abroad]}\nnetworks:\n  abroad: ["192.0.2.0/24"]\n'
    candidate = loaded(tmp_path / "g", GOOD + deny)
    assert of(candidate).decision.verdict is Verdict.ALLOW
    simulation = of(candidate, algorithm="ES384", address="192.0.2.9")
    assert simulation.decision.reasons == ("algorithm-not-granted", "denied-by:not-abroad")
    assert [(each.rule, each.is_deny, each.matches, each.where) for each in simulation.readings] == [
        ("not-abroad", True, True, f"{tmp_path}/g/a.yaml:8"),
        ("payments", False, False, f"{tmp_path}/g/a.yaml:2"),
    ]
    texts = {fit.selector: (fit.fits, fit.text) for fit in simulation.readings[1].fits}
    assert texts == {
        "workloads": (True, f"the caller {API} is in spiffe://example.org/payments/*"),
        "target": (True, "orders is in orders"),
        "operations": (True, "sign is named"),
        "algorithms": (False, "ES384 is not in ES256"),
    }


def test_approval_is_read_by_the_people_of_the_quorum_and_by_who_asked(tmp_path: Path) -> None:
    people = (
        'people:\n  alice: ["spiffe://example.org/human/alice"]\n  bob: ["spiffe://example.org/human/bob"]\ngroups:\n  managers: [alice]\n'
    )
    candidate = loaded(tmp_path / "g", GOOD + "    quorum: {approvals: 1, of: [managers], expires: 1h}\n" + people)
    asked = {"operation": "approve", "algorithm": "", "requester": API}
    allowed = of(candidate, workload="spiffe://example.org/human/alice", **asked)
    assert (allowed.decision.verdict, allowed.is_explained) == (Verdict.ALLOW, True)
    refused = of(candidate, workload="spiffe://example.org/human/bob", **asked)
    assert (refused.decision.verdict, refused.is_explained) == (Verdict.DENY, True)
    assert [(fit.selector, fit.fits) for fit in refused.readings[0].fits] == [("quorum", False), ("workloads", True), ("target", True)]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"workload": "payments"}, "workload: 'payments' is not a SPIFFE ID"),
        ({"operation": "shred"}, "operation: one of sign"),
        ({"algorithm": ""}, "algorithm: one of ES256"),
        ({"algorithm": "none"}, "algorithm: one of ES256"),
        ({"operation": "read-key"}, "none for reading"),
        ({"key": ""}, "key: the name of a key"),
        ({"key": "Orders"}, "key: the name of a key"),
        ({"trail": API}, "trail: a SPIFFE ID, or"),
        ({"key": "", "trail": "*"}, "trail: '\\*' is not a SPIFFE ID"),
        ({"address": "here"}, "address: an IP address"),
        ({"networks": ("lab",)}, "no network is named 'lab'; there are none"),
        ({"family": "dsa"}, "family: one of ec-p256"),
        ({"requester": API}, "requester: the SPIFFE ID that asked, for `approve` only"),
        ({"operation": "approve", "algorithm": ""}, "requester: the SPIFFE ID that asked"),
    ],
)
def test_request_that_makes_no_sense_is_refused_with_field_and_cure(fields: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(AskingError, match=says):
        of(loaded(tmp_path / "g"), **fields)


def test_input_of_a_record_is_looked_at_from_where_it_came(tmp_path: Path) -> None:
    text = GOOD + '    networks: [office]\nnetworks:\n  office: ["10.0.0.0/8"]\n'
    candidate = loaded(tmp_path / "g", text)
    request = ShortRequest(workload=API, key="orders", algorithm="ES256").policy_input(candidate.rules)
    record = {"kind": "intent", "svid": {"address": "10.1.2.3"}, "request": json.loads(canonical(request))}
    assert read_input(canonical(record), candidate.rules).caller.networks == ("office",)
    assert read_input(canonical(request), candidate.rules) == request


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"v": "1"}, "not a policy input"),
        ({"more": 1}, "every field is there, and no other"),
        ({"reason": None}, "not a policy input"),
        ({"caller": None}, "not a policy input"),
    ],
)
def test_input_that_is_not_whole_is_refused(edit: dict[str, object], says: str, tmp_path: Path) -> None:
    request = json.loads(seen_from(PolicyMaker(1).request(), Rules((), (), {}, ()), "192.0.2.1"))
    with pytest.raises(AskingError, match=says):
        read_input(canonical({**request, **edit}), loaded(tmp_path / "g").rules)


def test_input_that_names_two_identities_is_refused(tmp_path: Path) -> None:
    rules = loaded(tmp_path / "g").rules
    request = PolicyMaker(1).request()
    document = json.loads(canonical(request))
    document["caller"]["path"] = ["admin"]
    with pytest.raises(AskingError, match="name different identities"):
        read_input(canonical(document), rules)
    with pytest.raises(AskingError, match="not JSON"):
        read_input(b"{", rules)
    with pytest.raises(AskingError, match="nothing was asked in this record"):
        read_input(b'{"kind":"outcome","request":{}}', rules)
    assert isinstance(read_input(canonical(request), rules), PolicyInput)
