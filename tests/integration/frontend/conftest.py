"""One frontend for all tests of a file, quiet again after each; a frontend of its own for a test that changes its limits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.frontend.served import Served, listening_to_logs
from tests.worlds import until


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("frontend")) as served:
        yield served


@pytest.fixture
def served(shared: Served) -> Iterator[Served]:
    """Whatever a test does: no traceback in the log, no connection left, no body kept."""
    shared.authority.answers = shared.authority.allow
    shared.authority.calls.clear()
    shared.faults.clear()
    budget = shared.budget.left
    with listening_to_logs(shared):
        yield shared
        until(lambda: shared.listener.open_connections == 0)
    assert shared.budget.left == budget
    assert not shared.faults
    assert not [event for event in shared.events if event.get("exc_info")]
