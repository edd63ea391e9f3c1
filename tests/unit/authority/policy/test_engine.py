"""What the policy answers becomes ALLOW, DENY or FAILED, and what was decided once is remembered exactly."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path

import pytest

from keybroker.authority.policy import engine as engine_module
from keybroker.authority.policy import wasm
from keybroker.authority.policy.compiler import compile_rules
from keybroker.authority.policy.engine import ENGINE, EmbeddedEngine, decision_of
from keybroker.authority.policy.grants import Rules
from keybroker.authority.policy.wasm import WasmInstance, WasmModule
from keybroker.model.decision import Decision, Verdict
from tests.policies import GOOD, Compile, decide, default_engine, default_module, deny, edited, load, request

NOTHING = Rules((), (), {}, ())
OBLIGATION = (
    '{"grant": "g", "not_before": "", "not_after": "", "hours": [], "limits": [], "quorum": [], "cool_off_s": 0, "expires_s": 0,'
    ' "evidence": [], "observe_only": false}'
)
WINDOW = '{"days": ["mon"], "from": "08:00", "to": "18:00", "zone": "UTC", "except": []}'
STAGE = '{"approvals": 1, "of": ["a"], "people": ["b"]}'
LIMIT = '{"max": 1, "window_s": 60, "per": "key"}'
DIGEST = "d" * 64


def answer(**members: str) -> str:
    """A Rego term: an allow by one grant, with members replaced, or left out where they are empty."""
    whole = {"allow": "true", "reasons": "[]", "grants": '["g"]', "policy": "rules.policy", "obligations": f"[{OBLIGATION}]"} | members
    return "{" + ", ".join(f'"{name}": {term}' for name, term in whole.items() if term) + "}"


def duty(old: str, new: str) -> str:
    return answer(obligations=f"[{OBLIGATION.replace(old, new)}]")


ANSWERS = {
    "allow": answer(),
    "deny": answer(allow="false", reasons='["because"]', grants="[]", obligations="[]"),
    "null": "null",
    "true": "true",
    "text true": '"true"',
    "1": "1",
    "empty object": "{}",
    "empty list": "[]",
    "list of answers": f"[{answer()}]",
    "allow is text": answer(allow='"true"'),
    "allow is 1": answer(allow="1"),
    "allow is null": answer(allow="null"),
    "allow is missing": answer(allow=""),
    "allow without grants": answer(grants="[]", obligations="[]"),
    "allow with reasons": answer(reasons='["denied-by:d"]'),
    "allow of another policy": answer(policy='"0000"'),
    "allow of no policy": answer(policy='""'),
    "allow, policy missing": answer(policy=""),
    "deny of another policy": answer(allow="false", grants="[]", policy='"0000"'),
    "grants is text": answer(grants='"g"'),
    "grants is an object": answer(grants='{"g": true}'),
    "grant is a number": answer(grants="[1]"),
    "reasons is null": answer(reasons="null"),
    "reason is a list": answer(allow="false", reasons='[["x"]]'),
    "obligations missing": answer(obligations=""),
    "obligation is null": answer(obligations="[null]"),
    "obligation incomplete": duty(', "evidence": []', ""),
    "obligation unknown": duty("{", '{"mood": [], '),
    "member unknown": answer(maybe="true"),
    "hours, unknown member": duty('"hours": []', '"hours": [{"days": "mon-fri"}]'),
    "hours, no days": duty('"hours": []', f'"hours": [{WINDOW}]'.replace('"mon"', "")),
    "hours, no time": duty('"hours": []', f'"hours": [{WINDOW}]'.replace("08:00", "8:00")),
    "not after, no time": duty('"not_after": ""', '"not_after": "tomorrow"'),
    "limits, none": duty('"limits": []', f'"limits": [{LIMIT}]'.replace("1,", "0,")),
    "limits, incomplete": duty('"limits": []', '"limits": [{"max": 1}]'),
    "quorum without an end": duty('"quorum": []', f'"quorum": [{STAGE}]'),
    "quorum of none": duty('"quorum": []', f'"quorum": [{STAGE}]'.replace("1", "0")),
    "quorum, incomplete": duty('"quorum": []', '"quorum": [{"approvals": 2}]'),
    "cool-off": duty('"cool_off_s": 0', '"cool_off_s": 1'),
    "cool-off, negative": duty('"cool_off_s": 0', '"cool_off_s": -1'),
    "expires": duty('"expires_s": 0', '"expires_s": 1'),
    "evidence": duty('"evidence": []', '"evidence": [{"kind": "tpm"}]'),
    "evidence is text": duty('"evidence": []', '"evidence": ["tpm"]'),
    "observe only is text": duty("false}", '"no"}'),
}
ENFORCED = {
    "not before": duty('"not_before": ""', '"not_before": "2026-01-01T00:00:00Z"'),
    "not after": duty('"not_after": ""', '"not_after": "2026-01-01T00:00:00Z"'),
    "hours": duty('"hours": []', f'"hours": [{WINDOW}]'),
    "limits": duty('"limits": []', f'"limits": [{LIMIT}]'),
    "observed limits": duty('"limits": []', f'"limits": [{LIMIT}]').replace("false}", "true}"),
}
CHOICES = "\n\n".join(f'decision := {term} if input.reason == "{name}"' for name, term in (ANSWERS | ENFORCED).items())
MANY_ANSWERS = f"""\
package keybroker

import data.keybroker_rules as rules

{CHOICES}

decision := 1 if input.reason == "contradiction"

decision := 2 if input.reason == "contradiction"

decision := {answer(policy="heavy")} if input.reason in ["slow", "large"]

many := numbers.range(1, 20000)

heavy := 1 if {{
	input.reason == "slow"
	some a in many
	some b in many
	a + b == -1
}}

heavy := concat("", [text | some _ in many; text := "0123456789ABCDEF"]) if input.reason == "large"
"""


def engine_of(module: bytes, rules: Rules = NOTHING) -> EmbeddedEngine:
    made = WasmModule(module, "test.wasm")
    data, digest = compile_rules(rules, made.sha256, ENGINE)
    return EmbeddedEngine(made, data, digest)


@pytest.fixture(scope="module")
def answering(compiled: Compile) -> EmbeddedEngine:
    """Answers whatever the reason of the request names."""
    return engine_of(compiled(MANY_ANSWERS))


def failed(decision: Decision, code: str) -> bool:
    """Whether it is a failure with that code, and says nothing that could be taken for more."""
    whole = (decision.verdict, decision.reasons, decision.grants, decision.obligations)
    return whole == (Verdict.FAILED, (code,), (), ()) and json.loads(decision.record)["allow"] is False


def test_whole_answer_is_an_allow_or_a_deny(answering: EmbeddedEngine) -> None:
    allow = decide(answering, request(reason="allow"))
    assert (allow.verdict, allow.reasons, allow.grants, allow.policy) == (Verdict.ALLOW, (), ("g",), answering.digest)
    denied = decide(answering, request(reason="deny"))
    assert (denied.verdict, denied.reasons, denied.grants, denied.policy) == (Verdict.DENY, ("because",), (), answering.digest)


@pytest.mark.parametrize("name", ENFORCED)
def test_answer_with_obligations_that_are_enforced_is_an_allow_that_carries_them(answering: EmbeddedEngine, name: str) -> None:
    decision = decide(answering, request(reason=name))
    assert decision.verdict is Verdict.ALLOW
    assert not decision.obligations[0].is_empty


def test_decision_is_recorded_as_it_was_given(answering: EmbeddedEngine) -> None:
    always = {"engine": ENGINE, "policy": answering.digest}
    allow = {"allow": True, "grants": ["g"], "obligations": [json.loads(OBLIGATION)], "reasons": []}
    assert json.loads(decide(answering, request(reason="allow")).record) == always | allow
    error = {"allow": False, "grants": [], "obligations": [], "reasons": ["policy-error"]}
    assert json.loads(decide(answering, request(reason="1")).record) == always | error


@pytest.mark.case(21)
@pytest.mark.parametrize("name", ["undefined", "contradiction", *(name for name in ANSWERS if name not in {"allow", "deny"})])
def test_answer_that_is_no_decision_is_a_failure_and_never_a_yes(answering: EmbeddedEngine, name: str) -> None:
    assert failed(decide(answering, request(reason=name)), "policy-error")
    assert decide(answering, request(reason="allow")).verdict is Verdict.ALLOW


@pytest.mark.case(22)
@pytest.mark.case(23)
@pytest.mark.parametrize("name", ["slow", "large"])
def test_answer_that_never_comes_is_a_failure_and_the_next_decision_works(answering: EmbeddedEngine, name: str) -> None:
    assert failed(decide(answering, request(reason=name)), "policy-unavailable")
    assert decide(answering, request(reason="allow", key=f"after-{name}")).verdict is Verdict.ALLOW
    assert decide(answering, request(reason="deny", key=f"after-{name}")).verdict is Verdict.DENY


@pytest.mark.case(22)
@pytest.mark.parametrize(
    "garbage",
    [b"", b"[]", b"{}", b"null", b"[null]", b'[{"result":{}}]', b'[{"result":true}]', b'{"result":true}', b"\xff",
     b"[" * 100_000, b'[{"result":'],
)  # fmt: skip
def test_bytes_that_are_no_result_set_are_a_failure(garbage: bytes) -> None:
    assert failed(decision_of(garbage, DIGEST, "test"), "policy-error")


def test_two_results_are_a_failure_and_one_is_a_decision() -> None:
    one = f'{{"result":{answer(policy=json.dumps(DIGEST))}}}'.encode()
    assert decision_of(b"[%s]" % one, DIGEST, "test").verdict is Verdict.ALLOW
    assert failed(decision_of(b"[%s,%s]" % (one, one), DIGEST, "test"), "policy-error")
    assert failed(decision_of(b'[{"result":{},%s]' % one[1:], DIGEST, "test"), "policy-error")


def test_rules_that_name_another_digest_are_a_failure() -> None:
    module = default_module()
    data, digest = compile_rules(NOTHING, module.sha256, ENGINE)
    assert decide(EmbeddedEngine(module, data, digest), request()).verdict is Verdict.DENY
    assert failed(decide(EmbeddedEngine(module, data, DIGEST), request()), "policy-error")


@pytest.mark.parametrize(
    "asked",
    [b"", b"{", b"{}x", b"\xff", request(reason="X").replace(b"X", b"\xff"), request(reason="X").replace(b"X", b"\\ud800"),
     request(reason="X").replace(b"X", b"\\udc00\\ud800"), request(reason="X").replace(b"X", b"\xed\xa0\x80"), request() + b"\0",
     request().replace(b'"v":1', b'"v":NaN'), b"[" * 100_000],
)  # fmt: skip
def test_request_that_is_not_json_is_a_failure_and_the_instance_stays(tmp_path: Path, asked: bytes) -> None:
    engine = default_engine(load(tmp_path, a=GOOD))
    instance = engine._instance
    assert failed(decide(engine, asked), "policy-error")
    assert engine._instance is instance
    assert decide(engine, request()).verdict is Verdict.ALLOW


@pytest.mark.case(27)
def test_escaped_characters_are_the_characters_and_no_others(compiled: Compile) -> None:
    source = f'package keybroker\n\nimport data.keybroker_rules as rules\n\ndecision := {answer()} if input.reason == "A"\n'
    engine = engine_of(compiled(source))
    asked = request(reason="X")
    for same in (b"A", b"\\u0041"):
        assert decide(engine, asked.replace(b"X", same)).verdict is Verdict.ALLOW
    for other in ("\U00100041", "\U00010041", "\u0141", "\u0410", "\uff21", "A\u0301", "A\0"):
        assert failed(decide(engine, asked.replace(b"X", json.dumps(other)[1:-1].encode())), "policy-error")
        assert failed(decide(engine, asked.replace(b"X", other.replace("\0", "\\u0000").encode())), "policy-error")


# The memo.


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the policy was really asked."""
    asked: list[bytes] = []
    evaluate = WasmInstance.evaluate

    def counted(instance: WasmInstance, given: bytes) -> bytes:
        asked.append(given)
        return evaluate(instance, given)

    monkeypatch.setattr(WasmInstance, "evaluate", counted)
    return asked


def test_same_request_is_decided_once_and_any_other_anew(tmp_path: Path, evaluated: list[bytes]) -> None:
    engine = default_engine(load(tmp_path, a=GOOD))
    first = decide(engine, request())
    assert decide(engine, request()) is first
    assert decide(engine, bytes(bytearray(request()))) is first
    denied = decide(engine, request(key="release"))
    assert decide(engine, request(key="release")) is denied
    assert (first.verdict, denied.verdict, len(evaluated)) == (Verdict.ALLOW, Verdict.DENY, 2)
    for other in (
        request(reason="x"),
        request(networks=("office",)),
        request() + b" ",
        request(workload="spiffe://example.org/payments/apI"),
    ):
        decide(engine, other)
    assert len(evaluated) == 6


def test_memo_keeps_what_was_asked_last_and_no_more_than_its_size(monkeypatch: pytest.MonkeyPatch, evaluated: list[bytes]) -> None:
    monkeypatch.setattr(engine_module, "MEMO_SIZE", 3)
    engine = default_engine(NOTHING)
    a, b, c, d = (request(key=name) for name in "abcd")
    for asked in (a, b, c, a, d):  # b is the one that was asked longest ago
        decide(engine, asked)
    assert len(engine._memo) == 3
    for asked in (a, c, d):
        decide(engine, asked)
    assert len(evaluated) == 4
    decide(engine, b)
    assert len(evaluated) == 5


def test_failure_is_never_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: list[bytes]) -> None:
    engine = default_engine(load(tmp_path, a=GOOD))
    with monkeypatch.context() as patched:
        patched.setattr(wasm, "FUEL", 1_000)
        assert failed(decide(engine, request()), "policy-unavailable")
        assert failed(decide(engine, request()), "policy-unavailable")
    assert decide(engine, request()).verdict is Verdict.ALLOW
    assert decide(engine, request()).verdict is Verdict.ALLOW
    assert len(evaluated) == 3


def test_answer_that_is_no_decision_is_never_remembered(answering: EmbeddedEngine, evaluated: list[bytes]) -> None:
    for _ in range(3):
        assert failed(decide(answering, request(reason="null")), "policy-error")
    assert len(evaluated) == 3


def test_instance_that_cannot_be_made_again_is_a_failure_until_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = default_engine(load(tmp_path, a=GOOD))
    with monkeypatch.context() as patched:
        patched.setattr(wasm, "FUEL", 1_000)
        patched.setattr(wasm, "MEMORY_BYTES", 70_000)
        assert failed(decide(engine, request()), "policy-unavailable")
        assert failed(decide(engine, request()), "policy-unavailable")
    assert decide(engine, request()).verdict is Verdict.ALLOW


def test_event_loop_goes_on_while_an_instance_is_made_again_and_one_is_made_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = default_engine(load(tmp_path, a=GOOD))
    made: list[int] = []

    def slowly(module: WasmModule, data: bytes) -> WasmInstance:
        made.append(threading.get_ident())
        time.sleep(0.3)
        return WasmInstance(module, data)

    async def main() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(wasm, "FUEL", 1_000)
            assert failed(await engine.decide(request()), "policy-unavailable")
        monkeypatch.setattr(engine_module, "WasmInstance", slowly)
        waiting = [asyncio.ensure_future(engine.decide(request(reason=f"reason {number}"))) for number in range(3)]
        await asyncio.sleep(0.05)
        assert len(made) == 1  # it is being made, and this runs
        assert not any(each.done() for each in waiting)
        assert [each.verdict for each in await asyncio.gather(*waiting)] == [Verdict.ALLOW] * 3
        assert made == [made[0]]
        assert made[0] != threading.get_ident()

    asyncio.run(main())


# The digest.


def test_digest_covers_module_data_networks_and_engine(tmp_path: Path) -> None:
    networks = "networks: {office: [192.0.2.0/24]}\n"
    rules = load(tmp_path / "a", a=GOOD, b=networks)
    digests = [
        compile_rules(rules, "m", "e")[1],
        compile_rules(rules, "n", "e")[1],
        compile_rules(rules, "m", "f")[1],
        compile_rules(load(tmp_path / "b", a=GOOD, b="networks: {office: [192.0.2.0/25]}\n"), "m", "e")[1],
        compile_rules(load(tmp_path / "c", a=GOOD, b="networks: {lab: [192.0.2.0/24]}\n"), "m", "e")[1],
        compile_rules(load(tmp_path / "d", a=GOOD, b="networks: {}\n"), "m", "e")[1],
        compile_rules(load(tmp_path / "e", a=edited("id: payments", "id: other"), b=networks), "m", "e")[1],
        compile_rules(load(tmp_path / "f", a=edited("payments/*", "payments/**"), b=networks), "m", "e")[1],
        compile_rules(load(tmp_path / "g", a=edited("[orders]", "[release]"), b=networks), "m", "e")[1],
        compile_rules(load(tmp_path / "h", a=edited("[sign]", "[sign-digest]"), b=networks), "m", "e")[1],
        compile_rules(load(tmp_path / "i", a=edited("[ES256]", "[ES384]"), b=networks), "m", "e")[1],
        compile_rules(load(tmp_path / "j", a=GOOD, b=networks, c=deny("keys: [orders]")), "m", "e")[1],
        compile_rules(load(tmp_path / "k", a=edited("[sign]", "[sign]\n    networks: [office]"), b=networks), "m", "e")[1],
    ]
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in digests)


def test_digest_is_the_same_for_the_same_rules_however_they_are_written(tmp_path: Path) -> None:
    other = edited("id: payments", "id: a")
    one = compile_rules(load(tmp_path / "a", a=GOOD, b=other), "m", "e")
    two = compile_rules(load(tmp_path / "b", z=GOOD.replace("[orders]", "\n    - orders # the same"), y=f"# first\n{other}"), "m", "e")
    assert one == two


def test_digest_is_in_the_data_and_so_in_each_answer(tmp_path: Path) -> None:
    data, digest = compile_rules(load(tmp_path, a=GOOD), "m", "e")
    assert json.loads(data)["keybroker_rules"]["policy"] == digest
    engine = default_engine(load(tmp_path, a=GOOD))
    assert {decide(engine, asked).policy for asked in (request(), request(key="x"), b"broken")} == {engine.digest}
