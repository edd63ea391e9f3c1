"""Grant files as YAML: whatever could mean something other than it looks like is refused, and so is anything else that is odd."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keybroker.authority.policy import loader
from keybroker.errors import ConfigError
from tests.policies import GOOD, KEYS, edited, load, refusal


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (edited("    keys: [orders]\n", "    keys: [orders]\n    keys: ['*']\n"), r"a\.yaml:5: 'keys' is given twice"),
        (GOOD + "grants: []\n", r"a\.yaml:7: 'grants' is given twice"),
        ("grants: &all []\ndenies: *all\n", r"a\.yaml:1: anchors and aliases"),
        (edited("[orders]", "[*orders]"), r"a\.yaml:4: anchors and aliases"),
        (edited("[orders]", "[*]"), r"a\.yaml:4: not YAML: .*text that begins with \* goes in quotes"),
        (edited('["spiffe://example.org/payments/*"]', "[**]"), r"a\.yaml:3: not YAML: .*text that begins with \* goes in quotes"),
        ("grants:\n- <<: {id: a}\n  workloads: ['**']\n", r"a\.yaml:2: a key must be plain text"),
        (edited("[orders]", "!!set {orders}"), r"a\.yaml:4: tags"),
        (edited("id: payments", "id: !!str payments"), r"a\.yaml:2: tags"),
        (edited("id: payments", "id: !!python/object/apply:os.abort []"), r"a\.yaml:2: tags"),
        (GOOD + "---\n" + GOOD, r"a\.yaml:7: not YAML: a file holds one document"),
        ("grants: " + "[" * 100 + "]" * 100, r"a\.yaml:1: nested more than 64 levels deep"),
        ("grants: " + "[" * 500_000, r"a\.yaml:1: not YAML: exceeded maximum nesting depth"),
        ("grants: " + "{a: " * 500_000, r"a\.yaml:1: nested more than 64 levels deep"),
        (GOOD.encode("utf-16"), r"a\.yaml: not YAML in UTF-8"),
        (GOOD.replace("payments", "caf\u00e9").encode("latin-1"), r"a\.yaml: not YAML in UTF-8"),
        (b"\xff\xfe\x00", r"a\.yaml: not YAML in UTF-8"),
        (GOOD.encode() + b"\0", r"a\.yaml: not YAML in UTF-8, or with control characters in it"),
        (edited("id: payments", 'id: "pay\\0ments"'), r"a\.yaml:2: grants\[0\]\.id: an id is"),
        (edited("id: payments", 'id: "\\ud800"'), r"a\.yaml:2: not YAML: found invalid Unicode character escape code"),
        (edited("keys:", "\tkeys:"), r"a\.yaml:4: not YAML"),
    ],
)  # fmt: skip
def test_yaml_that_could_mean_something_else_is_refused(tmp_path: Path, text: str | bytes, error: str) -> None:
    lines = refusal(tmp_path, a=text)
    assert re.match(error, lines[0]), lines


def test_aliases_that_would_multiply_are_refused_before_they_do(tmp_path: Path) -> None:
    layers = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 40))
    assert refusal(tmp_path, a=f"l0: &l0 [x]\n{layers}\ngrants: *l39\n") == [
        "a.yaml:1: anchors and aliases (&, *) hide what a file says; text that begins with one goes in quotes"
    ]


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "2026-12-25", "1.5", "0x1f", "012", "08-00", "1e3"])
def test_unquoted_word_stays_the_text_that_it_looks_like(tmp_path: Path, word: str) -> None:
    assert load(tmp_path, a=edited("id: payments", f"id: {word}")).grants[0].id == word


def test_huge_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keybroker.yaml_document.MAX_FILE_BYTES", 1000)
    assert len(load(tmp_path, a=GOOD + "#" * (1000 - len(GOOD))).grants) == 1
    assert refusal(tmp_path, a=GOOD + "#" * (1001 - len(GOOD))) == ["a.yaml: larger than 1000 bytes"]


# Anything at all.

_WORDS = st.sampled_from(
    ["grants", "denies", "networks", "id", "workloads", "operations", "keys", "algorithms", "trails", "limits", "'**'", "'*'", "sign",
     "read-audit", "ES256", "orders", "spiffe://example.org/a", "'spiffe://example.org/*'", "192.0.2.0/24", "&a", "*a", "!!str", "<<", "~",
     "yes", "7", "{}", "[]"]
)  # fmt: skip
_PIECES = _WORDS | st.sampled_from([": ", ":\n", "\n", "\n  ", "\n- ", "- ", ", ", "[", "]", "{", "}", "|", ">", '"', "'", "#", "\t"])
_TREES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | _WORDS.map(lambda word: word.strip("'")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS | st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)
_NAMES = st.sampled_from(["id", "workloads", "operations", "keys", "algorithms", "trails", "networks"])
_FILES = st.fixed_dictionaries(
    {},
    optional={
        "grants": st.lists(st.dictionaries(_NAMES, _TREES, max_size=7), max_size=2) | _TREES,
        "denies": st.lists(st.dictionaries(_NAMES, _TREES, max_size=7), max_size=2) | _TREES,
        "networks": st.dictionaries(st.text(max_size=4), _TREES, max_size=2) | _TREES,
    },
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


def problems(directory: Path) -> list[str]:
    try:
        loader.load(directory, KEYS)
    except ConfigError as err:
        return str(err).splitlines()
    return []


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200) | st.lists(_PIECES, max_size=30).map(lambda pieces: "".join(pieces).encode()) | _FILES.map(msgspec.json.encode)
)
@example(b"grants: [{id: a, workloads: [''], operations: [sign], keys: [''], algorithms: [ES256]}]")
@example(b'networks: {"\\n": [a]}')
@example(b'grants: [{id: a, workloads: [a], operations: ["\\n"]}]')
@example(b'grants: [{"\\L": a}]')
@example(b'"\\e[2J": 1')
def test_any_bytes_are_rules_or_a_config_error_with_the_file(fuzzed: Path, data: bytes) -> None:
    (fuzzed / "a.yaml").write_bytes(data)
    assert all(line.startswith(f"{fuzzed}/a.yaml") for line in problems(fuzzed))
