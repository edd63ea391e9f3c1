"""The lines of a comparison in words, and as plain values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from keybroker.authority.policy.pattern import ANYBODY
from keybroker.authority.trial.compare import Change, Comparison, Line
from keybroker.authority.trial.region import SIGNING, Box
from keybroker.authority.trial.words import listed, target_words
from keybroker.authority.trial.zones import Zones

_SIGNS = {Change.GAINED: "+", Change.LOST: "-", Change.TIGHTENED: "!", Change.LOOSENED: "~"}
_SHOWN = 3  # places of an exception


def sentences(comparison: Comparison) -> list[str]:
    """One for each difference, with its exceptions in lines of their own below."""
    found: list[str] = []
    for line in comparison.lines:
        found.append(f"{_SIGNS[line.change]} {sentence(line, comparison.zones)}")
        found += [f"    but not {each}" for each in _exceptions(line)]
    return found


def sentence(line: Line, zones: Zones) -> str:
    """One difference."""
    who = listed(sorted("anybody" if each.text == ANYBODY else each.text for each in line.workloads))
    what = f"{_doing(line)}{_from(line, zones)}"
    match line.change:
        case Change.GAINED:
            return f"{who} may now {what}: {line.cause}"
        case Change.LOST:
            return f"{who} may no longer {what}: {line.cause}"
        case Change.TIGHTENED:
            return f"{who}, to {what}, are now asked more ({_demand(line)}): {line.cause}"
        case Change.LOOSENED:
            return f"{who}, to {what}, are asked less (no longer {_demand(line)}): {line.cause}"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison as plain values."""
    zones = comparison.zones
    return {
        "lines": [_line(each, zones) for each in comparison.lines],
    }


def _line(line: Line, zones: Zones) -> dict[str, Any]:
    return {
        "change": line.change.value,
        "cause": line.cause,
        "workloads": sorted(each.text for each in line.workloads),
        "operations": sorted(line.operations),
        "targets": sorted(map(target_words, line.targets)),
        "algorithms": sorted(line.algorithms - {""}),
        "addresses": None if line.zones == zones.everywhere else zones.addresses(line.zones),
        "demand": line.demand.text if line.demand else "",
        "exceptions": [
            {
                "rule": each.source,
                "workloads": each.workloads.text,
                "operation": each.operation,
                "target": target_words(each.target),
                "algorithms": sorted(each.algorithms - {""}),
                "addresses": None if each.zones == zones.everywhere else zones.addresses(each.zones),
            }
            for each in sorted(line.exceptions, key=lambda box: (box.source, box.workloads.text, box.operation, target_words(box.target)))
        ],
        "text": sentence(line, zones),
    }


def _doing(line: Line) -> str:
    targets = listed(sorted(map(target_words, line.targets)))
    operations = sorted(line.operations)
    if line.operations <= SIGNING:
        return f"{listed(operations)} with {targets} ({listed(sorted(line.algorithms))})"
    if operations == ["read-key"]:
        return f"read the public half of {targets}"
    if operations == ["approve"]:
        return f"approve the use of {targets}"
    return f"{listed(operations)} {targets}"


def _from(line: Line, zones: Zones) -> str:
    if line.zones == zones.everywhere:
        return ""
    places = ["addresses in no named network" if each == "elsewhere" else each for each in zones.addresses(line.zones)]
    return f" from {listed(places)}"


def _demand(line: Line) -> str:
    return line.demand.text if line.demand else ""


def _exceptions(line: Line) -> Iterable[str]:
    """For each rule, what of the line it keeps from changing."""
    places: dict[str, dict[str, None]] = defaultdict(dict)
    for box in sorted(line.exceptions, key=lambda each: (each.source, each.workloads.text, target_words(each.target))):
        places[box.source][_place(box)] = None
    for rule, known in places.items():
        shown = [*list(known)[:_SHOWN], *([f"{len(known) - _SHOWN} more"] if len(known) > _SHOWN else [])]
        yield f"where {rule} decides as before: {listed(shown)}"


def _place(box: Box) -> str:
    who = "anybody" if box.workloads.text == ANYBODY else box.workloads.text
    return f"{who} on {target_words(box.target)}"
