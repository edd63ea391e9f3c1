"""The box that policies run in: bounded work, time, memory and answers, nothing of the host, and nothing that is not a policy."""

from __future__ import annotations

import gc
import json
import time
import weakref
from typing import Any

import pytest
import wasmtime

from keybroker.authority.policy import wasm
from keybroker.authority.policy.wasm import MAX_ANSWER_BYTES, WasmAbortError, WasmInstance, WasmModule, WasmTrapError
from keybroker.errors import ConfigError
from tests.policies import REGO, Compile

ECHO = "package keybroker\n\ndecision := input\n"
LOOP = """\
package keybroker

some_numbers := numbers.range(1, 20000)

decision := "endless" if {
	input.slow
	some a in some_numbers
	some b in some_numbers
	some c in some_numbers
	a + b + c == -1
}

decision := "quick" if not input.slow
"""
GREEDY = """\
package keybroker

a := numbers.range(1, 50000)
b := array.concat(array.concat(a, a), array.concat(a, a))
c := array.concat(array.concat(b, b), array.concat(b, b))
decision := count(array.concat(array.concat(c, c), array.concat(c, c))) if input.greedy
decision := "modest" if not input.greedy
"""
CONTRADICTION = "package keybroker\n\ndecision := 1 if input.a\n\ndecision := 2 if input.b\n"


def instance_of(compiled: Compile, source: str, data: bytes = b"{}") -> WasmInstance:
    return WasmInstance(WasmModule(compiled(source), "test.wasm"), data)


def result_of(answer: bytes) -> Any:
    (only,) = json.loads(answer)
    return only["result"]


def test_policy_sees_input_and_data_and_nothing_of_the_decision_before(compiled: Compile) -> None:
    instance = instance_of(compiled, 'package keybroker\n\ndecision := {"i": input, "d": data.x}\n', b'{"x": [1, "two"]}')
    for number in range(200):
        given = {"n": number, "text": "x" * (number * 700)}
        assert result_of(instance.evaluate(json.dumps(given).encode())) == {"i": given, "d": [1, "two"]}


def test_undefined_rule_is_an_empty_result_set(compiled: Compile) -> None:
    assert instance_of(compiled, "package keybroker\n\ndecision := 1 if input.never\n").evaluate(b"{}") == b"[]"


@pytest.mark.case(23)
def test_unbounded_work_traps_by_fuel(compiled: Compile) -> None:
    instance = instance_of(compiled, LOOP)
    assert result_of(instance.evaluate(b'{"slow": false}')) == "quick"
    with pytest.raises(WasmTrapError, match=r"^out of fuel$"):
        instance.evaluate(b'{"slow": true}')


@pytest.mark.case(23)
def test_unbounded_time_traps_by_deadline_even_with_fuel_left(compiled: Compile, monkeypatch: pytest.MonkeyPatch, unhurried: int) -> None:
    monkeypatch.setattr(wasm, "FUEL", 10**15)
    instance = instance_of(compiled, LOOP)
    assert result_of(instance.evaluate(b'{"slow": false}')) == "quick"
    monkeypatch.setattr(wasm, "DEADLINE_TICKS", unhurried)
    started = time.monotonic()
    with pytest.raises(WasmTrapError, match=r"^interrupt$"):
        instance.evaluate(b'{"slow": true}')
    assert time.monotonic() - started < 30  # 0.15 s on an idle machine; without the deadline it would be hours


@pytest.mark.case(23)
def test_unbounded_memory_traps_by_limit(compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasm, "FUEL", 10**12)
    monkeypatch.setattr(wasm, "MEMORY_BYTES", 32 * 1024 * 1024)
    instance = instance_of(compiled, GREEDY)
    assert result_of(instance.evaluate(b'{"greedy": false}')) == "modest"
    with pytest.raises(WasmTrapError, match=r"^out of memory$"):
        instance.evaluate(b'{"greedy": true}')
    assert instance._memory.data_len(instance._store) <= 32 * 1024 * 1024


def test_request_that_does_not_fit_traps_by_limit(compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasm, "MEMORY_BYTES", 4 * 1024 * 1024)
    instance = instance_of(compiled, "package keybroker\n\ndecision := 1\n")
    assert result_of(instance.evaluate(b'"' + b"x" * 100_000 + b'"')) == 1
    with pytest.raises(WasmTrapError, match=r"^out of memory$"):
        instance.evaluate(b'"' + b"x" * 5_000_000 + b'"')


def test_rules_that_do_not_fit_trap_when_they_are_loaded(compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasm, "MEMORY_BYTES", 8 * 1024 * 1024)
    module = WasmModule(compiled(ECHO), "test.wasm")
    WasmInstance(module, json.dumps(["x"] * 1_000).encode())
    for rules in (["x" * 9_000_000], ["x"] * 1_000_000):
        with pytest.raises(WasmTrapError):
            WasmInstance(module, json.dumps(rules).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"nonsense", b"\xff"])
def test_rules_that_are_not_json_trap_when_they_are_loaded(compiled: Compile, data: bytes) -> None:
    module = WasmModule(compiled(ECHO), "test.wasm")
    with pytest.raises(WasmTrapError):
        WasmInstance(module, data)


@pytest.mark.case(22)
def test_answer_is_read_up_to_its_bound_and_not_beyond(compiled: Compile) -> None:
    around = len(b'[{"result":""}]')
    for size in (0, 1, 2_047, 2_048, 2_049, 16_384, 131_072, MAX_ANSWER_BYTES - around):
        assert len(result_of(instance_of(compiled, ECHO).evaluate(b'"%s"' % (b"x" * size)))) == size
    for size in (MAX_ANSWER_BYTES - around + 1, MAX_ANSWER_BYTES + 100_000):
        with pytest.raises(WasmTrapError, match=r"^the answer is too large$"):
            instance_of(compiled, ECHO).evaluate(b'"%s"' % (b"x" * size))
    with pytest.raises(WasmTrapError):
        instance_of(compiled, ECHO).evaluate(b'"%s"' % (b"x" * 10_000_000))


@pytest.mark.case(21)
def test_contradiction_in_the_rules_is_the_policys_own_failure(compiled: Compile) -> None:
    instance = instance_of(compiled, CONTRADICTION)
    assert result_of(instance.evaluate(b'{"a": true}')) == 1
    with pytest.raises(WasmAbortError):
        instance.evaluate(b'{"a": true, "b": true}')


@pytest.mark.parametrize("text", [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\\ud800", b"\\udc00", b"\\ud800x"])
def test_text_that_is_not_unicode_is_never_decided_on(compiled: Compile, text: bytes) -> None:
    with pytest.raises(WasmAbortError):
        instance_of(compiled, ECHO).evaluate(b'{"x": "%s"}' % text)


@pytest.mark.parametrize(
    "text", ["\0", "\x01\x1f", "\x7f", "\u00e9", "e\u0301", "\u202e", "\U0001f511", "\U0010ffff", "\ufeff", "\uffff", '"\\/']
)
def test_text_of_any_unicode_passes_unchanged(compiled: Compile, text: str) -> None:
    instance = instance_of(compiled, ECHO)
    assert result_of(instance.evaluate(json.dumps({text: text}, ensure_ascii=False).encode())) == {text: text}


def test_instance_that_trapped_is_freed(compiled: Compile) -> None:
    module = WasmModule(compiled(LOOP), "test.wasm")
    gone = []
    for _ in range(5):
        instance = WasmInstance(module, b"{}")
        gone.append(weakref.ref(instance))
        with pytest.raises(WasmTrapError):
            instance.evaluate(b'{"slow": true}')
        del instance
    gc.collect()
    assert [each() for each in gone] == [None] * 5


# What is refused when it is loaded.


@pytest.mark.case(24)
@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("time.now_ns() > 0", "time.now_ns"),
        ('http.send({"method": "get", "url": "http://127.0.0.1:1/"}).status_code == 200', "http.send"),
        ("opa.runtime().env.HOME", "opa.runtime"),
        ('io.jwt.decode_verify(input.token, {"secret": "x"})[0]', "io.jwt.decode_verify"),
        ('rand.intn("x", 2) == 1', "rand.intn"),
        ('uuid.rfc4122("x")', "uuid.rfc4122"),
        ('net.lookup_ip_addr("localhost")', "net.lookup_ip_addr"),
        ('sprintf("%d", [1]) == "1"', "sprintf"),
        ("crypto.sha256(input.x) == input.y", "crypto.sha256"),
    ],
)
def test_policy_that_asks_the_world_around_it_is_refused(compiled: Compile, call: str, name: str) -> None:
    source = f"package keybroker\n\ndecision := 1 if {{\n\tinput.rarely\n\t{call}\n}}\n"
    with pytest.raises(ConfigError) as caught:
        WasmModule(compiled(source), "mine.wasm")
    assert str(caught.value) == f"mine.wasm: the policy calls {name}, which a decision must not depend on; write it without"


def test_default_policy_needs_nothing_of_its_host(compiled: Compile) -> None:
    module = WasmModule(compiled(REGO.read_text()), "default")
    assert WasmInstance(module, b"{}").builtins == {}


def test_policy_without_the_entry_point_is_refused(compiled: Compile) -> None:
    source = "package keybroker\n\ndecision := 1\n\nother := 2\n"
    with pytest.raises(ConfigError, match=r"^mine\.wasm: has no entry point keybroker/decision; build it with `opa build -t wasm -e "):
        WasmModule(compiled(source, "keybroker/other"), "mine.wasm")
    assert result_of(instance_of(compiled, source).evaluate(b"{}")) == 1


def test_policy_with_much_text_of_its_own_is_taken(compiled: Compile) -> None:
    source = f'package keybroker\n\ndecision := 7 if input.x != "{"x" * 3_000_000}"\n'
    assert result_of(instance_of(compiled, source).evaluate(b'{"x": "y"}')) == 7


NOT_WASM = r"^mine\.wasm: not a WebAssembly module; build it with `scripts/policy build`$"
NOT_OPA = r"^mine\.wasm: not a policy that OPA compiled; build it with `opa build -t wasm -e keybroker/decision`$"


@pytest.mark.case(25)
@pytest.mark.parametrize("cut", [0, 4, 8, 1_000, -1])
def test_file_that_is_cut_short_is_refused(compiled: Compile, cut: int) -> None:
    with pytest.raises(ConfigError, match=NOT_OPA if cut == 8 else NOT_WASM):  # eight bytes are a module, with nothing in it
        WasmModule(compiled(ECHO)[:cut], "mine.wasm")


@pytest.mark.case(25)
@pytest.mark.parametrize("data", [REGO.read_bytes(), b"\x1f\x8b bundle", b"{}", b"\0asm\x02\0\0\0", b"\x7fELF" + bytes(100)])
def test_file_that_is_something_else_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match=NOT_WASM):
        WasmModule(data, "mine.wasm")


FORGED = """\
(module
  (import "env" "memory" (memory 2))
  (global (export "opa_wasm_abi_version") i32 (i32.const 1))
  (global (export "opa_wasm_abi_minor_version") i32 (i32.const 3))
  (data (i32.const 1024) "{}\\00")
  (data (i32.const 1040) "{\\22keybroker/decision\\22:0}\\00")
  (data (i32.const 1080) "[]\\00")
  (func (export "builtins") (result i32) (i32.const 1024))
  (func (export "entrypoints") (result i32) (i32.const 1040))
  (func (export "opa_json_dump") (param i32) (result i32) (local.get 0))
  (func (export "opa_malloc") (param i32) (result i32) (i32.const 2048))
  (func (export "opa_json_parse") (param i32 i32) (result i32) (i32.const 2048))
  (func (export "opa_heap_ptr_get") (result i32) (i32.const 65536))
  (func (export "opa_eval") (param i32 i32 i32 i32 i32 i32 i32) (result i32) (i32.const 1080))
)
"""


def forged(old: str = "", new: str = "") -> WasmModule:
    assert not old or FORGED.count(old) == 1
    return WasmModule(bytes(wasmtime.wat2wasm(FORGED.replace(old, new) if old else FORGED)), "mine.wasm")


def test_module_in_the_shape_of_a_policy_is_taken() -> None:
    assert WasmInstance(forged(), b"{}").evaluate(b"{}") == b"[]"


@pytest.mark.parametrize(("version", "minor"), [(1, 1), (1, 0), (0, 9)])
def test_policy_of_an_older_abi_is_refused(version: int, minor: int) -> None:
    source = FORGED.replace('_abi_version") i32 (i32.const 1)', f'_abi_version") i32 (i32.const {version})')
    source = source.replace('_minor_version") i32 (i32.const 3)', f'_minor_version") i32 (i32.const {minor})')
    with pytest.raises(ConfigError) as caught:
        WasmModule(bytes(wasmtime.wat2wasm(source)), "mine.wasm")
    assert str(caught.value) == f"mine.wasm: compiled for an older ABI ({version}, {minor}); build it with a current OPA"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('(export "opa_eval")', '(export "evaluate")'),
        ('(export "builtins")', '(export "builtin")'),
        ('(global (export "opa_wasm_abi_version") i32 (i32.const 1))', ""),
        ('(global (export "opa_wasm_abi_version") i32 (i32.const 1))', '(func (export "opa_wasm_abi_version"))'),
        ('(func (export "builtins") (result i32) (i32.const 1024))', '(global (export "builtins") i32 (i32.const 1024))'),
        ('(func (export "builtins") (result i32) (i32.const 1024))', '(func (export "builtins"))'),
        ('(func (export "builtins") (result i32) (i32.const 1024))', '(func (export "builtins") (result f64) (f64.const nan))'),
        ('(func (export "builtins") (result i32) (i32.const 1024))', '(func (export "builtins") (param i32) (result i32) (i32.const 0))'),
        ('(func (export "builtins") (result i32) (i32.const 1024))', '(func (export "builtins") (result i32) unreachable)'),
        ('(func (export "builtins") (result i32) (i32.const 1024))', '(func (export "builtins") (result i32) (i32.const 1080))'),
        ('(func (export "builtins") (result i32) (i32.const 1024))', '(func (export "builtins") (result i32) (i32.const 4096))'),
        ('(func (export "builtins") (result i32) (i32.const 1024))', '(func (export "builtins") (result i32) (i32.const -1))'),
        ('(func (export "builtins") (result i32) (i32.const 1024))', '(func (export "builtins") (result i32) (i32.const 2000000000))'),
        ('"{}\\00"', '"\\ff\\fe\\00"'),
        ('"{}\\00"', '"{\\22a\\22:\\22b\\22}\\00"'),
        ('"opa_malloc") (param i32) (result i32) (i32.const 2048)', '"opa_malloc") (param i32) (result i32) (i32.const -9)'),
        ('"opa_json_parse") (param i32 i32) (result i32) (i32.const 2048)', '"opa_json_parse") (param i32 i32) (result i32) (i32.const 0)'),
        ('(import "env" "memory" (memory 2))', '(import "env" "memory" (memory 20000))'),
        ('(import "env" "memory" (memory 2))', '(import "env" "memory" (memory 2 4))'),
        ('(import "env" "memory" (memory 2))', "(memory 2)"),
        ('(import "env" "memory" (memory 2))', '(import "env" "memory" (memory 2)) (import "env" "clock" (global i64))'),
        ('(import "env" "memory" (memory 2))', '(import "env" "memory" (memory 2)) (table 1000000 funcref)'),
        ('(import "env" "memory" (memory 2))',
         '(import "wasi" "random" (func $r (result i32))) (import "env" "memory" (memory 2)) (func $s (drop (call $r))) (start $s)'),
        ('(import "env" "memory" (memory 2))', '(import "env" "memory" (memory 2)) (func $s (call $s)) (start $s)'),
    ],
)  # fmt: skip
def test_module_that_only_looks_like_a_policy_is_refused(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=r"^mine\.wasm: not a policy that OPA compiled"):
        forged(old, new)


def test_module_that_never_ends_loading_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasm, "_LOAD_FUEL", 10**7)
    with pytest.raises(ConfigError, match=NOT_OPA):
        forged('(import "env" "memory" (memory 2))', '(import "env" "memory" (memory 2)) (func $s (loop (br 0))) (start $s)')


@pytest.mark.parametrize("address", ["-1", "-8", "2147483647", "100000000"])
def test_answer_at_a_wild_address_traps(address: str) -> None:
    old = "(param i32 i32 i32 i32 i32 i32 i32) (result i32) (i32.const 1080)"
    instance = WasmInstance(forged(old, old.replace("1080", address)), b"{}")
    with pytest.raises(WasmTrapError, match=r"^the answer is too large$"):
        instance.evaluate(b"{}")


def test_request_at_a_wild_address_traps() -> None:
    with pytest.raises(WasmTrapError, match=r"^out of memory$"):
        WasmInstance(forged("(result i32) (i32.const 65536)", "(result i32) (i32.const -1)"), b"{}").evaluate(b"{}")
