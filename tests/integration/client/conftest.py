"""Both clients, and a place with an SVID and a bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from keybroker.client import call
from tests.integration.client.servers import Awaited, Blocking, Kind, Place


@pytest.fixture(params=[Blocking, Awaited], ids=["blocking", "awaited"])
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "_FIRST_PAUSE_S", 0.01)
