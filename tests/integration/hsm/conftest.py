"""One compiled shim for all tests of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tokens import build_shim


@pytest.fixture(scope="session")
def shim_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shim(tmp_path_factory.mktemp("shim"))
