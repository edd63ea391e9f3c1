"""What rules cover, as boxes: who, what, on which target, with which algorithms, from where.

Boxes meet in boxes, and whether some boxes cover another is decided exactly (see `shapes`). That makes it possible to say what two
policies do differently from the rules themselves, without trying requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from keybroker.authority.policy.grants import Deny, Grant, Operation, Rules
from keybroker.authority.policy.pattern import Pattern
from keybroker.authority.trial.shapes import ANYBODY_PATTERN, FRESH, Word, depth_of, fits, meet, words
from keybroker.authority.trial.zones import Networks, Zones
from keybroker.model.decision import PolicyInput
from keybroker.model.identity import SpiffeId
from keybroker.model.key import Algorithm

SIGNING = frozenset({"sign", "sign-digest"})
OPERATIONS: tuple[str, ...] = get_args(Operation)
_ALGORITHMS = frozenset(each.value for each in Algorithm)
_NO_ALGORITHM = frozenset({""})
_ANY_KEY = "*"


@dataclass(frozen=True, slots=True)
class Target:
    """What is used or read: a key, any key, the trails of a pattern, the whole record, or the asker's own trail.

    Attributes:
        kind: `key`, `trail`, `record` (the whole of it) or `own-trail`.
        name: of a key; `*` is any.
        trails: of a `trail`.
    """

    kind: str
    name: str = ""
    trails: Pattern = ANYBODY_PATTERN


RECORD = Target("record")
OWN_TRAIL = Target("own-trail")


@dataclass(frozen=True, slots=True)
class Box:
    """One part of what a rule covers. `source` is the id of the rule, and takes no part in comparisons."""

    source: str
    workloads: Pattern
    operation: str
    target: Target
    algorithms: frozenset[str]
    zones: frozenset[int]


@dataclass(frozen=True, slots=True)
class Point:
    """A request, or the representative of many: `trail` is the trail that is read, `key` the key that is used."""

    workload: Word
    operation: str
    kind: str
    key: str
    trail: Word | None
    algorithm: str
    zone: int


def point_of(request: PolicyInput, zone: int) -> Point:
    """A request that comes from a zone, as a point."""
    caller = Word(request.caller.trust_domain, request.caller.path)
    if request.target.kind == "key":
        return Point(caller, request.operation, "key", request.target.id, None, request.algorithm, zone)
    if not request.target.workload:
        return Point(caller, request.operation, "record", "", None, request.algorithm, zone)
    trail = SpiffeId.parse(request.target.workload)
    return Point(caller, request.operation, "trail", "", Word(trail.trust_domain, trail.path), request.algorithm, zone)


def boxes_of(rule: Grant | Deny, networks: Networks, zones: Zones) -> Iterator[Box]:
    """What a rule covers."""
    is_deny = isinstance(rule, Deny)
    operations = set(rule.operations or OPERATIONS)
    if not is_deny and operations & SIGNING:
        operations.add("read-key")  # who may sign with a key may read its public half
    places = zones.of(networks, rule.networks)
    for operation in sorted(operations):
        algorithms = _algorithms(rule, operation, is_deny=is_deny)
        for target in _targets(rule, operation, is_deny=is_deny) if algorithms else ():
            for text in rule.workloads:
                yield Box(rule.id, Pattern.parse(text), operation, target, algorithms, places)


def all_rules(rules: Rules) -> tuple[Grant | Deny, ...]:
    """Grants and denies."""
    return (*rules.grants, *rules.denies)


def own_trail(zones: Zones) -> Box:
    """What everybody may do without a grant: read the own trail."""
    return Box("own-trail", ANYBODY_PATTERN, "read-audit", OWN_TRAIL, _NO_ALGORITHM, zones.everywhere)


def _algorithms(rule: Grant | Deny, operation: str, *, is_deny: bool) -> frozenset[str]:
    """For reading, no algorithm is named: a deny of algorithms is about signing alone."""
    if operation in SIGNING:
        return frozenset(each.value for each in rule.algorithms) or _ALGORITHMS
    return frozenset() if is_deny and rule.algorithms else _NO_ALGORITHM


def _targets(rule: Grant | Deny, operation: str, *, is_deny: bool) -> Iterator[Target]:
    is_any = is_deny and not (rule.keys or rule.trails)
    if operation != "read-audit":
        yield from (Target("key", name) for name in (rule.keys or ((_ANY_KEY,) if is_any else ())))
        return
    trails = [Pattern.parse(text) for text in rule.trails] or ([ANYBODY_PATTERN] if is_any else [])
    yield from (Target("trail", trails=each) for each in trails)
    if any(each.is_anybody for each in trails) or (is_deny and trails):
        yield RECORD  # who may not read one trail may not read the whole


def intersection(one: Box, other: Box) -> Box | None:
    """What is in both, as a part of the first; None if nothing is."""
    if one.operation != other.operation:
        return None
    algorithms, zones = one.algorithms & other.algorithms, one.zones & other.zones
    workloads = meet(one.workloads, other.workloads) if algorithms and zones else None
    if workloads is None:
        return None
    met = _targets_meet(one.target, other.target)
    if met is None:
        return None
    target, among = met
    workloads = meet(workloads, among)
    return replace(one, workloads=workloads, target=target, algorithms=algorithms, zones=zones) if workloads else None


def _targets_meet(one: Target, other: Target) -> tuple[Target, Pattern] | None:
    """The common target, and whom it leaves: the own trail is in a pattern of trails only for those who are in the pattern."""
    kinds = {one.kind, other.kind}
    if kinds == {"own-trail", "trail"}:
        return OWN_TRAIL, (other if one.kind == "own-trail" else one).trails
    if len(kinds) > 1:
        return None
    if one.kind == "key" and one.name != other.name:
        names = {one.name, other.name} - {_ANY_KEY}
        return (Target("key", names.pop()), ANYBODY_PATTERN) if len(names) == 1 else None
    if one.kind == "trail":
        trails = meet(one.trails, other.trails)
        return (replace(one, trails=trails), ANYBODY_PATTERN) if trails else None
    return one, ANYBODY_PATTERN


def contains(box: Box, point: Point) -> bool:
    """Whether a request is in a box."""
    return (
        box.operation == point.operation
        and point.algorithm in box.algorithms
        and point.zone in box.zones
        and _is_on(box.target, point)
        and fits(box.workloads, point.workload)
    )


def _is_on(target: Target, point: Point) -> bool:
    match target.kind:
        case "key":
            return point.kind == "key" and target.name in (_ANY_KEY, point.key)
        case "record":
            return point.kind == "record"
        case "own-trail":
            return (point.kind == "trail" and point.trail == point.workload and point.workload.is_concrete) or point.kind == "own-trail"
        case _:
            return point.kind in {"trail", "own-trail"} and point.trail is not None and fits(target.trails, point.trail)


def remainder(box: Box, covering: Iterable[Box]) -> tuple[list[Box], list[Box]]:
    """What of a box some others leave.

    Returns:
        The parts of the box that are not wholly covered, and those of the others that take something out of them. Each request in a
        part and in none of the takers is left; each part has at least one such request.
    """
    near = [each for each in covering if intersection(box, each)]
    by_algorithm: dict[frozenset[int], set[str]] = {}
    points = list(_points(box, near))
    for algorithm in sorted(box.algorithms):
        left = frozenset(
            zone
            for zone in box.zones
            if any(not any(contains(each, replace(point, algorithm=algorithm, zone=zone)) for each in near) for point in points)
        )
        if left:
            by_algorithm.setdefault(left, set()).add(algorithm)
    parts = [replace(box, algorithms=frozenset(algorithms), zones=zones) for zones, algorithms in by_algorithm.items()]
    return parts, [each for each in near if any(intersection(part, each) for part in parts)]


def is_covered(box: Box, covering: Iterable[Box]) -> bool:
    """Whether every request of a box is in one of some others."""
    return not remainder(box, covering)[0]


def _points(box: Box, near: Sequence[Box]) -> Iterator[Point]:
    """The representatives of a box against some others; algorithm and zone are left open."""
    depth = depth_of(pattern for each in near for pattern in (each.workloads, each.target.trails))
    for word in words(box.workloads, depth):
        match box.target.kind:
            case "key":
                name = FRESH if box.target.name == _ANY_KEY else box.target.name
                yield Point(word, box.operation, "key", name, None, "", 0)
            case "trail":
                for trail in words(box.target.trails, depth):
                    yield Point(word, box.operation, "trail", "", trail, "", 0)
            case kind:
                yield Point(word, box.operation, kind, "", word if kind == "own-trail" else None, "", 0)


class BoxIndex:
    """Boxes by target and by whom they are for, so that a large policy is not walked for each of its parts."""

    def __init__(self, boxes: Iterable[Box]) -> None:
        self._boxes: dict[tuple[str, str, str], dict[tuple[str, str], list[Box]]] = {}
        for box in boxes:
            shelf = self._boxes.setdefault((box.operation, box.target.kind, box.target.name), {})
            shelf.setdefault(box.workloads.place, []).append(box)

    def covering(self, box: Box) -> Iterator[Box]:
        """Every box that may cover a part of this one for all lengths of identities: none is left out that matters to `is_covered`."""
        pattern, target = box.workloads, box.target
        places: list[tuple[str, str]] = [("anybody", "")]
        if not pattern.is_anybody:
            places += [("domain", pattern.trust_domain), pattern.place]
            if pattern.path and pattern.path[0] != "*":
                places.append(("prefix", f"{pattern.trust_domain}/{pattern.path[0]}"))
        kinds = {"trail", "own-trail"} if target.kind in {"trail", "own-trail"} else {target.kind}
        names = {target.name, _ANY_KEY} if target.kind == "key" else {""}
        for kind in kinds:
            for name in names:
                shelf = self._boxes.get((box.operation, kind, name), {})
                for place in dict.fromkeys(places):
                    yield from shelf.get(place, ())

    def meeting(self, box: Box) -> list[Box]:
        """Every box that has something in common with this one."""
        if box.target.kind == "key" and box.target.name == _ANY_KEY:
            shelves = [each for (operation, kind, _), each in self._boxes.items() if (operation, kind) == (box.operation, "key")]
        else:
            kinds = {"trail", "own-trail"} if box.target.kind in {"trail", "own-trail"} else {box.target.kind}
            names = {box.target.name, _ANY_KEY} if box.target.kind == "key" else {""}
            shelves = [self._boxes.get((box.operation, kind, name), {}) for kind in kinds for name in names]
        return [each for shelf in shelves for boxes in shelf.values() for each in boxes if intersection(box, each)]
