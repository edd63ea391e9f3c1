"""Policies compiled once for all tests, and decided without hurry."""

from __future__ import annotations

import functools

import pytest

from keybroker.authority.policy import wasm
from tests.policies import ENTRYPOINT, Compile, compile_rego


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """A function from Rego to WebAssembly; each source is compiled once."""

    @functools.cache
    def compile_once(source: str, entrypoint: str = ENTRYPOINT) -> bytes:
        return compile_rego(tmp_path_factory.mktemp("rego"), source, entrypoint)

    return compile_once


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> int:
    """On a busy machine a decision may be kept waiting; only a test of the deadline wants to meet it. The ticks that users have."""
    ticks = wasm.DEADLINE_TICKS
    monkeypatch.setattr(wasm, "DEADLINE_TICKS", 2_000)
    return ticks
