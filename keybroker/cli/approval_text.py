"""An approval statement in words, for the person who is to sign it: all of it, and so that nothing in it can pass for something else.

Most of a statement has a form that leaves no room for tricks. The rest (the requester's reason, the fields of the content, names of
people) is anybody's text. Such text stands in quotation marks; whatever does not show as itself is escaped, as are quotation marks and
backslashes, so that two texts never look the same by an escape; what is not ASCII is shown once more in ASCII; and what is longer than a
line goes on behind a mark that no text can make, so that it cannot end one line and write the next.
"""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from keybroker.model.approval import Confirmation, Statement, Subject

_CONTINUED = "| "
_MAX_MARKS = 2  # accents on one letter; more of them reach into other lines
_MIN_WIDTH = 24

# Characters that Unicode calls letters, marks or symbols, and that show as nothing or as a space: the default ignorable ones that are
# not format characters (DerivedCoreProperties.txt), and blanks.
_BLANK = frozenset(
    chr(each)
    for first, last in (
        (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2800, 0x2800), (0x3164, 0x3164), (0xFE00, 0xFE0F),
        (0xFFA0, 0xFFA0), (0x16FE4, 0x16FE4), (0x1D159, 0x1D159), (0xE0100, 0xE01EF),
    )
    for each in range(first, last + 1)
)  # fmt: skip
_CONFIRMED: dict[Confirmation, str] = {
    "prompt": "by a person, asked on a terminal",
    "file": "by a person, asked on a terminal, who has a file with this digest",
    "yes-flag": "by a flag or a program: nobody is asked",
}


def words(statement: Statement, stages: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """Every member of a statement but the nonce and the moment of signing, as name and text, in the order in which people ask.

    Args:
        statement: what is signed.
        stages: where several are signed that differ in nothing but the stage: all of the stages.
    """
    yield "verdict", statement.verdict.upper()
    yield from subject_words(statement.subject)
    yield "stage", ", ".join(stages) or statement.stage
    yield "approver", statement.approver
    yield "person", quoted(statement.person)
    yield from _in_ascii(statement.person)
    yield "good until", statement.expires
    yield "confirmed", f"{statement.confirmed}: {_CONFIRMED[statement.confirmed]}"


def subject_words(subject: Subject) -> Iterator[tuple[str, str]]:
    """Every member of what is approved."""
    key = subject.key
    yield "operation", f"{subject.operation.kind}, {subject.operation.id}"
    yield "requester", subject.workload
    if key.name:
        yield "key", f"{key.name}, version {key.version}"
        yield "public key", f"sha256 {key.spki_sha256}"
    if subject.algorithm:
        yield "algorithm", subject.algorithm
    yield "digest", f"{subject.tbs.hash} {subject.tbs.value}"
    yield "content", f"{subject.content.type}, {subject.content.size} bytes"
    if subject.content.media_type:
        yield "media type", quoted(subject.content.media_type)
    for name, text in sorted(subject.content.fields.items()):
        yield "field", f"{quoted(name)} = {quoted(text)}"
        yield from _in_ascii(text)
    yield "reason", quoted(subject.reason)
    yield from _in_ascii(subject.reason)
    yield "rules", f"sha256 {subject.decision}"
    yield "log", subject.log
    yield "ends", subject.expires


def lines(pairs: Iterable[tuple[str, str]], width: int = 0) -> Iterator[str]:
    """The pairs in two columns; a text that is longer than a line goes on in the next, behind a mark.

    Args:
        pairs: name and text, all of it visible.
        width: of a line, in columns; that of the terminal if 0.
    """
    from rich.cells import chop_cells

    known = list(pairs)
    left = max(len(name) for name, _ in known)
    width = width or shutil.get_terminal_size((100, 24)).columns
    room = max(width - left - 2 - len(_CONTINUED), _MIN_WIDTH)
    for name, text in known:
        first, *rest = chop_cells(text, room) or [""]
        yield f"{name:<{left}}  {first}"
        for piece in rest:
            yield f"{'':<{left}}  {_CONTINUED}{piece}"


def quoted(text: str) -> str:
    """Anybody's text, in quotation marks, with everything escaped that does not show as itself."""
    shown, marks = [], _MAX_MARKS  # a mark that has no letter to stand on would stand on the quotation mark
    for char in text:
        category = unicodedata.category(char)
        is_mark = category in {"Mn", "Mc"}
        marks = marks + 1 if is_mark else 0 if category.startswith("L") else _MAX_MARKS
        if char in {'"', "\\"}:
            shown.append("\\" + char)
        elif not char.isprintable() or char in _BLANK or category == "Me" or (is_mark and marks > _MAX_MARKS):
            shown.append(_escape(char))
        else:
            shown.append(char)
    return '"' + "".join(shown) + '"'


def _in_ascii(text: str) -> Iterator[tuple[str, str]]:
    """The same text once more, if letters may look like others."""
    if not text.isascii():
        yield (
            "  in ASCII",
            '"' + "".join("\\" + char if char in '"\\' else char if " " <= char <= "~" else _escape(char) for char in text) + '"',
        )


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()
