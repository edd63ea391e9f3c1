"""`keybroker policy diff`: who gains and who loses what between two policies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keybroker.cli import output
from keybroker.cli.candidates import loaded, trial
from keybroker.cli.connection import Json


def diff(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="A directory of grant files: as it is.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Another: as it would be.")],
    as_json: Json = False,
) -> None:
    """Say who gains (+) and who loses (-) what, and for whom demands are tightened (!) or loosened (~), from the rules themselves.

    Examples:

        keybroker policy diff my-world/grants candidate
    """
    words = trial("compare_words")
    before, after = loaded(old), loaded(new)
    with output.busy("comparing"):
        comparison = trial("compare").compare(before.rules, after.rules)
    if as_json:
        output.json_object(words.as_json(comparison))
        return
    for sentence in words.sentences(comparison):
        output.say(output.visible(sentence))
    if not comparison.lines:
        output.note("no difference: every request gets the same answer")
