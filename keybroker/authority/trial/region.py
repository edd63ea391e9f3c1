"""What rules cover, as boxes: who, what, on which target, with which algorithms, from where.

Boxes meet in boxes, and whether some boxes cover another is decided exactly (see `shapes`). That makes it possible to say what two
policies do differently from the rules themselves, without trying requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from keybroker.authority.policy.grants import Deny, Grant, Operation, Quorum, Rules
from keybroker.authority.policy.pattern import ANYBODY, Pattern
from keybroker.authority.trial.shapes import ANYBODY_PATTERN, FRESH, Word, depth_of, fits, meet, words
from keybroker.authority.trial.zones import Zones
from keybroker.model.decision import PolicyInput
from keybroker.model.identity import SpiffeId
from keybroker.model.key import Algorithm

SIGNING = frozenset({"sign", "sign-digest"})
ANY_NAME = "*"
APPROVE = "approve"  # granted by a place in a group of a quorum
OPERATIONS: tuple[str, ...] = tuple(dict.fromkeys((*get_args(Operation), APPROVE)))
_ALGORITHMS = frozenset(each.value for each in Algorithm)
_NO_ALGORITHM = frozenset({""})
_KINDS = {
    "sign": ("key",), "sign-digest": ("key",), "read-key": ("key",), "read-audit": ("trail", "record"), APPROVE: ("key", "change"),
    "freeze": ("key", "workload", "token", "everything"), "unfreeze": ("key", "workload", "token", "everything"),
    "admin-policy": ("policy",), "break-glass": ("grant",),
}  # fmt: skip
KEY_OPERATIONS = SIGNING | {"read-key", APPROVE}
TARGET_KINDS = tuple(sorted({kind for kinds in _KINDS.values() for kind in kinds} - {"record"}))
"""The kinds of targets that a policy input may name."""
_CHANGES = frozenset({"unfreeze", "admin-policy"})  # what is not the use of a key, and may still need approvals
_NAMES = {"key": "keys", "token": "tokens", "grant": "waives"}  # kinds of targets that have names, and the fields that list them
_PATTERNS = {"trail": "trails", "workload": "subjects"}
_WHOLES = {"record": "trails", "everything": "subjects"}  # a deny of some of these denies the whole


@dataclass(frozen=True, slots=True)
class Target:
    """What is used, read, stopped or approved.

    Attributes:
        kind: as in the policy input; and `record` for the whole record, `own-trail` for the asker's own trail.
        name: of a key, token, grant or change; `*` is any.
        who: whose trail is read, who is stopped, or for approvals who asks.
    """

    kind: str
    name: str = ""
    who: Pattern = ANYBODY_PATTERN


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
    """A request, or the representative of many. `name` and `who` are those of its target; None is nobody that a pattern could fit."""

    workload: Word
    operation: str
    kind: str
    name: str
    who: Word | None
    algorithm: str
    zone: int


def point_of(request: PolicyInput, zone: int) -> Point:
    """A request that comes from a zone, as a point."""
    caller = Word(request.caller.trust_domain, request.caller.path)
    target = request.target
    kind = "record" if target.kind == "trail" and not target.workload else target.kind
    who = SpiffeId.parse(target.workload) if target.workload else None
    word = Word(who.trust_domain, who.path) if who else None
    return Point(caller, request.operation, kind, target.id, word, request.algorithm, zone)


def boxes_of(rule: Grant | Deny, rules: Rules, zones: Zones) -> Iterator[Box]:
    """What a rule covers: what it says itself, and for a grant with a quorum the approvals of that."""
    operations = set(rule.operations or OPERATIONS)
    if isinstance(rule, Grant) and operations & SIGNING:
        operations.add("read-key")  # who may sign with a key may read its public half
    places = zones.of(rules.networks, rule.networks)
    for operation in sorted(operations):
        algorithms = _algorithms(rule, operation)
        for kind in _KINDS[operation] if algorithms else ():
            for target in targets_of(rule, kind):
                for text in rule.workloads:
                    yield Box(rule.id, Pattern.parse(text), operation, target, algorithms, places)
    if isinstance(rule, Grant):
        yield from approvals_of(rule, operations, rules, zones)


def approvals_of(grant: Grant, operations: Iterable[str], rules: Rules, zones: Zones) -> Iterator[Box]:
    """Whoever is in a group of a quorum may approve what that grant covers, from anywhere."""
    if not isinstance(grant.quorum, Quorum):
        return
    people = {person for stage in grant.quorum.in_stages() for person in rules.people_of(stage.of)}
    named = [("key", key) for key in grant.keys]
    named += [("change", each) for each in sorted(_CHANGES.intersection(operations))]
    for identity in sorted(identity for person in people for identity in rules.people[person]):
        for kind, name in named:
            for text in grant.workloads:
                target = Target(kind, name, Pattern.parse(text))
                yield Box(grant.id, Pattern.parse(identity), APPROVE, target, _NO_ALGORITHM, zones.everywhere)


def targets_of(rule: Grant | Deny, kind: str) -> Iterator[Target]:
    """The targets of one kind that a rule names; for a deny that names none at all, every one of that kind."""
    is_deny = isinstance(rule, Deny)
    if is_deny and not names_targets(rule):
        yield Target(kind, ANY_NAME if kind in {*_NAMES, "change"} else "")
    elif kind in _NAMES:
        yield from (Target(kind, name) for name in _listed(rule, _NAMES[kind]))
    elif kind in _PATTERNS:
        yield from (Target(kind, who=Pattern.parse(text)) for text in _listed(rule, _PATTERNS[kind]))
    elif kind in _WHOLES:
        texts = _listed(rule, _WHOLES[kind])
        if ANYBODY in texts or (is_deny and texts):
            yield Target(kind)
    elif kind == "policy" and "admin-policy" in rule.operations:
        yield Target(kind)
    elif kind == "change" and not is_deny:
        yield from (Target(kind, name) for name in rule.operations)


def names_targets(rule: Grant | Deny) -> bool:
    """Whether a rule says which targets it is about."""
    return any(_listed(rule, field) for field in (*_NAMES.values(), *_PATTERNS.values()))


def _listed(rule: Grant | Deny, field: str) -> tuple[str, ...]:
    """What a selector lists; nothing where the grant language has no such selector."""
    listed: tuple[str, ...] = getattr(rule, field, ())
    return listed


def is_on(target: Target, point: Point) -> bool:
    """Whether a request is about a target."""
    if target.kind == "own-trail":
        return point.kind == "own-trail" or (point.kind == "trail" and point.who == point.workload and point.workload.is_concrete)
    kinds = {"trail", "own-trail"} if target.kind == "trail" else {target.kind}
    if point.kind not in kinds or target.name not in {ANY_NAME, point.name}:
        return False
    return target.who.is_anybody or (point.who is not None and fits(target.who, point.who))


def all_rules(rules: Rules) -> tuple[Grant | Deny, ...]:
    """Grants and denies."""
    return (*rules.grants, *rules.denies)


def own_trail(zones: Zones) -> Box:
    """What everybody may do without a grant: read the own trail."""
    return Box("own-trail", ANYBODY_PATTERN, "read-audit", OWN_TRAIL, _NO_ALGORITHM, zones.everywhere)


def _algorithms(rule: Grant | Deny, operation: str) -> frozenset[str]:
    """Only signing names an algorithm: a deny of algorithms is about signing alone."""
    if operation in SIGNING:
        return frozenset(each.value for each in rule.algorithms) or _ALGORITHMS
    return frozenset() if isinstance(rule, Deny) and rule.algorithms else _NO_ALGORITHM


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
        return OWN_TRAIL, (other if one.kind == "own-trail" else one).who
    names = {one.name, other.name}
    if len(kinds) > 1 or (len(names) > 1 and ANY_NAME not in names):
        return None
    who = meet(one.who, other.who)
    name = one.name if one.name != ANY_NAME else other.name
    return (Target(one.kind, name, who), ANYBODY_PATTERN) if who else None


def contains(box: Box, point: Point) -> bool:
    """Whether a request is in a box."""
    return (
        box.operation == point.operation
        and point.algorithm in box.algorithms
        and point.zone in box.zones
        and is_on(box.target, point)
        and fits(box.workloads, point.workload)
    )


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
    depth = depth_of(pattern for each in near for pattern in (each.workloads, each.target.who))
    name = FRESH if box.target.name == ANY_NAME else box.target.name
    for word in words(box.workloads, depth):
        if box.target.kind == "own-trail":
            yield Point(word, box.operation, "own-trail", "", word, "", 0)
            continue
        for who in words(box.target.who, depth):
            yield Point(word, box.operation, box.target.kind, name, who, "", 0)


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
        names = {target.name, ANY_NAME}
        for kind in kinds:
            for name in names:
                shelf = self._boxes.get((box.operation, kind, name), {})
                for place in dict.fromkeys(places):
                    yield from shelf.get(place, ())

    def meeting(self, box: Box) -> list[Box]:
        """Every box that has something in common with this one."""
        kinds = {"trail", "own-trail"} if box.target.kind in {"trail", "own-trail"} else {box.target.kind}
        if box.target.name == ANY_NAME:
            shelves = [each for (operation, kind, _), each in self._boxes.items() if operation == box.operation and kind in kinds]
        else:
            names = (box.target.name, ANY_NAME)
            shelves = [self._boxes.get((box.operation, kind, name), {}) for kind in kinds for name in names]
        return [each for shelf in shelves for boxes in shelf.values() for each in boxes if intersection(box, each)]
