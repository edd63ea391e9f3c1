"""Rules and what they cover, in words."""

from __future__ import annotations

from collections.abc import Iterable


def listed(names: Iterable[str]) -> str:
    """Names in a row, each once."""
    known = list(dict.fromkeys(names))
    if len(known) < 2:
        return known[0] if known else "nothing"
    return f"{', '.join(known[:-1])} and {known[-1]}"
