"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("keybroker", deadline=None)  # how long one example takes says something about the machine alone
settings.load_profile("keybroker")
