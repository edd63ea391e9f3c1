"""What is printed, to a terminal and to a pipe."""

from __future__ import annotations

import io
import json
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keybroker.cli import output
from keybroker.errors import DeniedError, InvalidError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard output, from now on."""
    made = Terminal()
    monkeypatch.setattr(sys, "stdout", made)
    return made


@settings(deadline=None)
@given(text=st.text())
def test_nothing_that_moves_a_cursor_is_printed(text: str) -> None:
    shown = output.visible(text)
    assert all(unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Zl", "Zp"} for char in shown)
    shown.encode()


def test_text_that_shows_is_left_alone() -> None:
    assert output.visible("orders für 100 €") == "orders für 100 €"
    assert output.visible("a\x1b[2Jb\nc\udcff\u202e") == r"a\x1b[2Jb\nc\udcff\u202e"


def test_rows_are_columns_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("A", "B"), [("1", "2\t3"), ("4", "")])
    columns = output.Columns((("A", 3), ("B", 3)))
    columns.add(("1", "\x1b"))
    assert capsys.readouterr().out == "1\t2\\t3\n4\t\n1\t\\x1b\n"


def test_rows_line_up_below_one_header_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    columns = output.Columns((("A", 3), ("B", 1)))
    columns.add(("1", "x"))
    columns.add(("12345", "y\n"))
    assert terminal.getvalue() == "A    B\n1    x\n12345  y\\n\n"


def test_table_has_a_header_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal = a_terminal(monkeypatch)
    output.table(("KEY", "FAMILY"), [("orders", "ec-p256"), ("[red]x[/red]", "rsa")])
    lines = terminal.getvalue().splitlines()
    assert lines[0].split() == ["KEY", "FAMILY"]
    assert lines[2].split() == ["[red]x[/red]", "rsa"]


def test_facts_line_up_on_a_terminal_and_are_columns_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    output.facts([("a", "1"), ("long name", "2"), ("empty", "")])
    assert terminal.getvalue() == "a          1\nlong name  2\nempty\n"
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    output.facts([("a", "1"), ("empty", "")])
    assert pipe.getvalue() == "a\t1\nempty\t\n"


def test_json_is_one_line_in_a_pipe_and_laid_out_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    output.json_object({"a": [1]})
    assert terminal.getvalue().count("\n") > 1
    assert json.loads(terminal.getvalue()) == {"a": [1]}
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    output.json_object({"a": [1]})
    assert pipe.getvalue() == '{"a":[1]}\n'


def test_answer_that_nobody_can_get_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OSError, match="Bad file descriptor"):
        output.say("x")
    output.note("where stderr is, there is no need for stdout")


def test_error_says_why_where_the_cure_and_what_to_quote(capsys: pytest.CaptureFixture[str]) -> None:
    output.error(DeniedError("A rule said no.", reasons=("no-grant", "x\n"), request_id="01JREQ", use="01JUSE"))
    output.error(InvalidError("Fields.", pointers=(("/a\x1b", "wrong"), ("", "also"))))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:5] == [
        "error: A rule said no.",
        "  reasons: no-grant, x\\n",
        "  cure: whoever writes the grants can change them; for a signature, `keybroker sign --explain` shows the rules",
        "  use: 01JUSE",
        "  request: 01JREQ",
    ]
    assert lines[5:] == ["error: Fields.", "  /a\\x1b: wrong", "  the request: also"]


def test_nothing_turns_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with output.busy("thinking"):
        pass
    assert capsys.readouterr() == ("", "")


def test_something_turns_on_a_terminal_and_is_wiped_away(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", made)
    with output.busy("thinking"):
        pass
    assert "thinking" in made.getvalue()
    assert made.getvalue().endswith("\x1b[2K")


def test_bar_shows_how_much_of_a_large_file_has_been_read_on_a_terminal_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"x" * 1_000)
    for terminal, large_bytes, is_shown in ((Terminal(), 1_000, True), (Terminal(), 1_001, False), (None, 1_000, False)):
        monkeypatch.setattr(output, "_LARGE_BYTES", large_bytes)
        monkeypatch.setenv("TERM", "xterm")
        with monkeypatch.context() as patch:
            if terminal:
                patch.setattr(sys, "stderr", terminal)
            with path.open("rb") as file, output.measured(file, "reading") as measured:
                assert measured.read() == b"x" * 1_000
        assert ("reading" in (terminal.getvalue() if terminal else "")) is is_shown
    assert capsys.readouterr() == ("", "")


def test_csv_has_a_header_quotes_what_needs_it_and_holds_no_formula(capsys: pytest.CaptureFixture[str]) -> None:
    made = output.Csv(["index", "what"])
    made.add(("7", 'say "a,b"\n'))
    made.add(("8", "=cmd|' /C calc'!A0"))
    assert capsys.readouterr().out.splitlines() == ["index,what", '7,"say ""a,b""\\n"', "8,'=cmd|' /C calc'!A0"]
