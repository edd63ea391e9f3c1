"""Every example of docs/how-to/python-sdk.md, run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keybroker.client import AsyncClient, Client
from tests.worlds import World, clean_environment

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "python-sdk.md"
BLOCK = re.compile(r"^## (?P<heading>.+?)$|^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
TABLE_ROW = re.compile(r"`(\w+)`")


def blocks() -> list[tuple[str, str]]:
    """Each example with the heading that it stands under."""
    found, heading = [], ""
    for match in BLOCK.finditer(PAGE.read_text()):
        heading = match["heading"] or heading
        if match["code"]:
            found.append((heading, match["code"]))
    return found


def test_every_example_runs_one_after_the_other(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("KEYBROKER_URL", world.url)
    monkeypatch.setenv("KEYBROKER_SVID", str(world.svid("payments-api")))
    monkeypatch.setenv("KEYBROKER_BUNDLE", str(world.directory / "bundle.pem"))
    names: dict[str, Any] = {"__name__": "__main__"}
    printed: dict[str, str] = {}
    for heading, code in blocks():
        exec(compile(code, f"{PAGE.name}, {heading}", "exec", dont_inherit=True), names)  # noqa: S102  that is what the test is for
        printed[heading] = printed.get(heading, "") + capsys.readouterr().out
    assert re.fullmatch(r"30[0-9a-f]+\nuse [0-9A-Z]{26}, records \d+ and \d+\n", printed["Sign"])
    assert printed["Sign from asyncio"] == "3 signatures\n"
    signed, denied, missing, _ = printed["Handle refusals"].splitlines()
    assert re.fullmatch(r"[0-9A-Z]{26}", signed)
    assert re.fullmatch(r"a rule said no: .+ \(request [0-9A-Z]{26}\)", denied)
    assert missing.startswith("there is no such key, or nothing of it is granted to us")
    assert re.search(r"^\d+ \S+Z signed [0-9A-Z]{26}$", printed["Read the record"], re.MULTILINE)
    assert re.search(r"^\d+ intents$", printed["Read the record"], re.MULTILINE)


def test_every_example_has_the_right_types(tmp_path: Path) -> None:
    script = tmp_path / "examples.py"
    script.write_text("\n".join(code for _, code in blocks()))
    command = [sys.executable, "-m", "mypy", "--strict", "--allow-redefinition", "--cache-dir", str(tmp_path / "cache"), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PAGE.parents[2], env=clean_environment(), timeout=110)
    assert done.returncode == 0, done.stdout


def test_page_says_of_every_method_whether_it_is_tried_again() -> None:
    table = PAGE.read_text().partition("| Tried again |")[2].partition("\n\n")[0]
    methods = {name for name in vars(Client) if not name.startswith("_")}
    assert methods - {"close", "iter_records"} <= set(TABLE_ROW.findall(table))
    assert methods - {"close"} == {name for name in vars(AsyncClient) if not name.startswith("_")} - {"aclose"}
