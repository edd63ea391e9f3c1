"""Rules and what they cover, in words."""

from __future__ import annotations

from collections.abc import Iterable

from keybroker.authority.policy.pattern import ANYBODY
from keybroker.authority.trial.region import ANY_NAME, Target


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


def target_words(target: Target) -> str:
    """What is used, read, stopped or approved."""
    who = "anybody" if target.who.text == ANYBODY else target.who.text
    match target.kind:
        case "key" | "token" | "grant" | "change":
            name = f"every {target.kind}" if target.name == ANY_NAME else target.name
            return name if target.who.text == ANYBODY else f"{name} for {who}"
        case "record":
            return "the whole record"
        case "own-trail":
            return "the own trail"
        case "trail":
            return f"the trail of {who}"
        case "workload":
            return who
        case kind:
            return kind
