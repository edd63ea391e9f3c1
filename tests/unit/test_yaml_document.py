"""YAML files: strict, and every error with file and line."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keybroker.errors import ConfigError
from keybroker.yaml_document import YamlDocument

HERE = Path("rules.yaml")


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: int


class Outer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    parts: list[Inner]


def test_values_mean_what_they_look_like() -> None:
    text = "a: 08:00\nb: 2026-11-24\nc: yes\nd: true\ne: 012\nf: 7\ng: ~\nh: '7'\ni: [x, 1.5]\n"
    assert YamlDocument.parse(HERE, text.encode()).value == {
        "a": "08:00", "b": "2026-11-24", "c": "yes", "d": True, "e": "012", "f": 7, "g": None, "h": "7", "i": ["x", "1.5"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a: 1\nb: 2\na: 3\n", "rules.yaml:3: 'a' is given twice"),
        ("a: 1\nb: [1\n", "rules.yaml:3: not YAML"),
        ("a: 1\nc: {<<: {d: 1}}\n", "rules.yaml:2: a key must be plain text"),
        ("a: 1\nb: &x 1\n", "rules.yaml:2: anchors and aliases"),
        ("a: 1\nb: *x\n", "rules.yaml:2: anchors and aliases"),
        ("&x a: 1\n", "rules.yaml:1: a key must be plain text"),
        ("a: 1\n*x : 2\n", "rules.yaml:2: a key must be plain text"),
        ("a: 1\n!!str b: 2\n", "rules.yaml:2: a key must be plain text"),
        (
            "a: [**]\n",
            "rules.yaml:1: not YAML: did not find expected alphabetic or numeric character; text that begins with * goes in quotes",
        ),
        ("a: !!str 7\n", "rules.yaml:1: tags (!) are not used here"),
        ("a:\n- !!python/object/apply:os.system [x]\n", "rules.yaml:2: tags (!) are not used here"),
        ("a: 1\n---\na: 2\n", "rules.yaml:2: not YAML: a file holds one document"),
        ("[" * 70 + "]" * 70, "rules.yaml:1: nested more than 64 levels deep"),
        ("[" * 1_000_000, "rules.yaml:1: not YAML: exceeded maximum nesting depth"),
        ("? [1]\n: 2\n", "rules.yaml:1: a key must be plain text"),
        ("a: \x07\n", "rules.yaml: not YAML in UTF-8, or with control characters in it"),
        ("a: \x00\n", "rules.yaml: not YAML in UTF-8, or with control characters in it"),
        ("[" * 5000, "rules.yaml"),
    ],
)
def test_file_outside_the_strict_subset_is_refused_with_its_line(text: str, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        YamlDocument.parse(HERE, text.encode())
    assert error in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-be", "utf-32"])
def test_file_in_another_encoding_is_refused(encoding: str) -> None:
    with pytest.raises(ConfigError, match=r"^rules\.yaml: not YAML in UTF-8"):
        YamlDocument.parse(HERE, "a: caf\u00e9\n".encode(encoding))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("parts:\n- size: 1\n- size: big\n", "rules.yaml:3: parts[1].size: expected `int`, got `str`"),
        ("parts:\n- size: 1\n  colour: red\n", "rules.yaml:3: parts[0]: object contains unknown field `colour`"),
        ("parts:\n- {}\n", "rules.yaml:2: parts[0]: object missing required field `size`"),
        ("", "rules.yaml:1: the file: expected `object`, got `null`"),
    ],
)
def test_wrong_type_is_named_with_line_and_field(text: str, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        YamlDocument.parse(HERE, text.encode()).convert(Outer)
    assert str(caught.value) == error


def test_unreadable_and_oversized_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        YamlDocument.load(tmp_path / "absent.yaml")
    monkeypatch.setattr("keybroker.yaml_document.MAX_FILE_BYTES", 10)
    (tmp_path / "large.yaml").write_text("a: 1234567890")
    with pytest.raises(ConfigError, match="larger than 10 bytes"):
        YamlDocument.load(tmp_path / "large.yaml")


@settings(deadline=None)
@given(st.binary(max_size=300) | st.text(alphabet="ab:-[]{}&*!|>'\"#% \n\t?,<1", max_size=80).map(str.encode))
def test_any_bytes_are_a_document_or_a_config_error(data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        YamlDocument.parse(HERE, data)
