"""Rules and what they cover, in words."""

from __future__ import annotations

from collections.abc import Iterable


def listed(names: Iterable[str]) -> str:
    """Names in a row, each once."""
    known = list(dict.fromkeys(names))
    if len(known) < 2:
        return known[0] if known else "nothing"
    return f"{', '.join(known[:-1])} and {known[-1]}"


def duration(seconds: int) -> str:
    """A duration as grants write it."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
