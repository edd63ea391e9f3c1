"""What an approver is shown before signing: everything, once, and nothing that a hostile requester could pass for something else."""

from __future__ import annotations

import ast
import unicodedata
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from keybroker.audit import approval
from keybroker.cli.approval_text import lines, quoted, words
from keybroker.model.approval import Statement, SubjectContent, SubjectKey, SubjectOperation
from tests.approvals import STATEMENT, SUBJECT, statement, subject

NASTY = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from(
            '"\\|\u202e\u2066\u200b\u200d\ufeff\u00ad\u034f\u115f\u3164\u2800\ufe0f\u0301\u20dd\u2028\x1b\x9b\x7f\r\n\t\0\u00a0\u0338'
        ),
    ),
    max_size=80,
)
NAMES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=20)
INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Me"}
LABELS = {
    "verdict", "operation", "requester", "key", "public key", "algorithm", "digest", "content", "media type", "field", "  in ASCII",
    "reason", "rules", "log", "ends", "stage", "approver", "person", "good until", "confirmed",
}  # fmt: skip


def hostile(reason: str, fields: dict[str, str], person: str) -> Statement:
    return statement(subject=subject(reason=reason, content=SubjectContent("digest", 32, "text/plain", fields)), person=person or "x")


def leaves(value: Any) -> Iterator[str]:
    """Every value of a statement as text, and the names of fields."""
    for name, member in value.items():
        if isinstance(member, dict):
            yield from member if name == "fields" else ()
            yield from leaves(member)
        else:
            yield str(member)


@given(NASTY)
def test_quoted_text_shows_as_itself_or_is_escaped_so_that_it_can_be_read_back(text: str) -> None:
    shown = quoted(text)
    assert not {unicodedata.category(char) for char in shown} & INVISIBLE
    assert "\n" not in shown
    assert ast.literal_eval(shown) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("release 2.1", '"release 2.1"'),
        ("für 100 €, नमस्ते, שלום", '"für 100 €, नमस्ते, שלום"'),
        ("a\u202eb\u2066c\u2069", r'"a\u202eb\u2066c\u2069"'),
        ("zero\u200bwidth\ufeff\u00ad", r'"zero\u200bwidth\ufeff\xad"'),
        ("\x1b[2J\x9b\r\n\0", r'"\x1b[2J\x9b\r\n\x00"'),
        ("no\u00a0break\u3000\u2003", r'"no\xa0break\u3000\u2003"'),
        ("\u3164\u115f\uffa0\u2800\u034f\ufe0f\U000e0101", r'"\u3164\u115f\uffa0\u2800\u034f\ufe0f\U000e0101"'),
        ("e\u0301\u0301\u0301", '"e\u0301\u0301\\u0301"'),
        ("\u0301a", r'"\u0301a"'),
        ("=\u0338", r'"=\u0338"'),
        ("a\u20dd", r'"a\u20dd"'),
        ('say "\\u202e"', r'"say \"\\u202e\""'),
        ("\ud800", r'"\ud800"'),
    ],
)
def test_quoted_text_is_what_it_should_be(text: str, shown: str) -> None:
    assert quoted(text) == shown


def test_text_that_is_not_ascii_is_shown_in_ascii_too() -> None:
    pairs = list(words(hostile("p\u0430ypal", {}, "alice")))
    place = pairs.index(("reason", '"p\u0430ypal"'))
    assert pairs[place + 1] == ("  in ASCII", r'"p\u0430ypal"')
    assert [name for name, _ in words(STATEMENT)].count("  in ASCII") == 0


@given(NASTY, st.dictionaries(NAMES, NASTY, max_size=3), NASTY, st.integers(40, 200))
def test_nothing_in_a_statement_can_write_a_line_of_its_own(reason: str, fields: dict[str, str], person: str, width: int) -> None:
    pairs = list(words(hostile(reason, fields, person)))
    left = max(len(name) for name, _ in pairs)
    labels = []
    for line in lines(pairs, width):
        assert cell_len(line) <= width
        label, gap, text = line[:left].rstrip(), line[left : left + 2], line[left + 2 :]
        assert gap == "  "
        assert label in LABELS or (label == "" and text.startswith("| "))
        labels.append(label)
    assert [label for label in labels if label] == [name for name, _ in pairs]


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=40), st.sampled_from(["approve", "refuse"]))
def test_every_member_of_a_statement_is_shown(reason: str, verdict: str) -> None:
    made = statement(subject=subject(reason=reason), verdict=verdict)
    shown = " ".join(text for _, text in words(made))
    for value in leaves(msgspec.to_builtins(made)):
        is_shown = value in shown or value.upper() in shown or quoted(value) in shown
        assert is_shown or value in {made.nonce, made.issued}, value


def test_operation_without_a_key_is_shown_without_one() -> None:
    about = subject(operation=SubjectOperation(SUBJECT.operation.id, "unfreeze"), key=SubjectKey("", 0, ""), algorithm="")
    approval.payload_of(statement(subject=about))  # it is one that can be signed
    assert {"key", "public key", "algorithm"}.isdisjoint(name for name, _ in words(statement(subject=about)))


def test_several_stages_are_shown_together() -> None:
    assert ("stage", "a/1, b/1") in list(words(statement(stage="a/1"), ["a/1", "b/1"]))


def test_how_it_was_confirmed_is_said_in_words() -> None:
    assert dict(words(statement(confirmed="yes-flag")))["confirmed"] == "yes-flag: by a flag or a program: nobody is asked"
