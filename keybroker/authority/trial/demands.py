"""What a grant demands beyond a yes, one demand at a time, so that demands of two policies can be compared."""

from __future__ import annotations

from keybroker.authority.policy.grants import Grant


def demands_of(_grant: Grant) -> frozenset[str]:
    """Everything that a grant demands, each in words that say all of it."""
    return frozenset()
