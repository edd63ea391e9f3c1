"""`scripts/policy build FILE.rego`: the one command for whoever changes the Rego."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from keybroker.authority.policy.compiler import compile_rules
from keybroker.authority.policy.engine import ENGINE, EmbeddedEngine
from keybroker.authority.policy.wasm import WasmModule
from keybroker.model.decision import Verdict
from tests.policies import GOOD, REGO, decide, load, request

SCRIPT = Path(__file__).parents[3] / "scripts" / "policy"


def build(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), "build", *arguments], cwd=directory, capture_output=True, text=True, check=False, timeout=60)


def test_copy_of_the_default_policy_is_built_and_decides_as_it_was_changed(tmp_path: Path) -> None:
    (tmp_path / "rego").mkdir()
    changed = REGO.read_text().replace("count(denied_by) == 0\n", 'count(denied_by) == 0\n\tinput.reason != ""\n', 1)
    (tmp_path / "rego" / "my.rego").write_text(changed)
    done = build(tmp_path, "rego/my.rego")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}/rego/my.wasm\n", "")
    assert build(tmp_path, "rego/my.rego", "other.wasm").stdout == f"{tmp_path}/other.wasm\n"
    assert (tmp_path / "other.wasm").read_bytes() == (tmp_path / "rego" / "my.wasm").read_bytes()
    module = WasmModule((tmp_path / "other.wasm").read_bytes(), "other.wasm")
    data, digest = compile_rules(load(tmp_path / "grants", a=GOOD), module.sha256, ENGINE)
    engine = EmbeddedEngine(module, data, digest)
    assert decide(engine, request(reason="because")).verdict is Verdict.ALLOW
    assert decide(engine, request()).verdict is Verdict.DENY


@pytest.mark.case(24)
@pytest.mark.parametrize(
    ("source", "error"),
    [
        (
            "package keybroker\n\ndecision := time.now_ns()\n",
            "scripts/policy: my.rego: the policy calls time.now_ns, which a decision must not",
        ),
        ("package keybroker\n\ndecision := {\n", "rego_parse_error"),
        ("package keybroker\n\nother := 1\n", 'entrypoint "keybroker/decision" does not refer to a rule'),
        ("package keybroker\n\nimport data.x\n\ndecision := 1\n", "unused"),
    ],
)
def test_policy_that_keybroker_would_refuse_is_not_built(tmp_path: Path, source: str, error: str) -> None:
    (tmp_path / "my.rego").write_text(source)
    done = build(tmp_path, "my.rego")
    assert done.returncode == 1
    assert error in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["my.rego"]


def test_missing_file_and_wrong_usage_are_said(tmp_path: Path) -> None:
    done = build(tmp_path, "absent.rego")
    assert (done.returncode, done.stderr) == (1, "scripts/policy: absent.rego: no such file\n")
    done = build(tmp_path, "a.rego", "b.wasm", "c")
    assert done.returncode == 2
    assert "scripts/policy build FILE.rego [OUT.wasm]" in done.stderr
