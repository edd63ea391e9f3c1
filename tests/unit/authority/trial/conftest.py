"""What matters when a policy is tried is what it demands, not whether this version enforces it."""

from __future__ import annotations

import pytest

from keybroker.authority.policy import engine


@pytest.fixture(autouse=True)
def demanding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "unenforced", lambda _obligation: (), raising=False)
