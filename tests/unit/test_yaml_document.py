"""YAML files: strict, and every error with file and line."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
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
        ("a: &x 1\nb: *x\nc: {<<: {d: 1}}\n", "rules.yaml:3: a key must be plain text"),
        ("? [1]\n: 2\n", "rules.yaml:1: a key must be plain text"),
        ("a: \x07\n", "rules.yaml: not YAML"),
        ("[" * 5000, "rules.yaml"),
    ],
)
def test_file_outside_the_strict_subset_is_refused_with_its_line(text: str, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        YamlDocument.parse(HERE, text.encode())
    assert error in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("parts:\n- size: 1\n- size: big\n", "rules.yaml:3: parts[1].size: expected `int`, got `str`"),
        ("parts:\n- size: 1\n  colour: red\n", "rules.yaml:2: parts[0]: object contains unknown field `colour`"),
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


@given(st.binary(max_size=300) | st.text(alphabet="ab:-[]{}&*!|>'\"#% \n\t?,<1", max_size=80).map(str.encode))
def test_any_bytes_are_a_document_or_a_config_error(data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        YamlDocument.parse(HERE, data)
