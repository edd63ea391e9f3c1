"""`keybroker clock`, on a state on which no broker runs; what a broker makes of it: tests/e2e/test_limits.py."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from keybroker.authority.store import acknowledgement
from keybroker.cli import app
from tests.unit.authority.store.logs import tampering, whole

EVENT = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


def distrusting(directory: Path) -> Path:
    state = whole(directory)
    with tampering(state) as db:
        db.execute("UPDATE clock SET distrusted = ?", (f"{EVENT} the clock was set back by 3600 s",))
    return state


def test_clock_that_is_trusted_has_nothing_to_acknowledge(tmp_path: Path) -> None:
    state = whole(tmp_path)
    shown = CliRunner().invoke(app, ["clock", "show", "--state", str(state), "--json"])
    assert (shown.exit_code, json.loads(shown.stdout)["trusted"]) == (0, True)
    assert CliRunner().invoke(app, ["clock", "acknowledge", "--state", str(state)]).exit_code == 0
    assert not acknowledgement.is_waiting(state)


def test_store_of_a_version_that_kept_no_clock_is_trusted(tmp_path: Path) -> None:
    state = whole(tmp_path)
    with tampering(state) as db:
        db.execute("DROP TABLE clock")
    shown = CliRunner().invoke(app, ["clock", "show", "--state", str(state), "--json"])
    assert (shown.exit_code, json.loads(shown.stdout)["trusted"]) == (0, True)


def test_operator_is_shown_what_happened_and_asked(tmp_path: Path) -> None:
    state = distrusting(tmp_path)
    shown = CliRunner().invoke(app, ["clock", "show", "--state", str(state)])
    assert shown.exit_code == 0
    assert "the clock was set back by 3600 s" in shown.stdout
    refused = CliRunner().invoke(app, ["clock", "acknowledge", "--state", str(state)], input="n\n")
    assert (refused.exit_code, acknowledgement.is_waiting(state)) == (1, False)
    taken = CliRunner().invoke(app, ["clock", "acknowledge", "--state", str(state)], input="y\n")
    assert (taken.exit_code, acknowledgement.is_waiting(state)) == (0, True)
    assert (state / acknowledgement.ACKNOWLEDGEMENT).read_text() == f"{EVENT}\n"
