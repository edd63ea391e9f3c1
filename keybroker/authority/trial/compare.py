"""`keybroker policy diff`: who gains and who loses what between two policies, from the rules themselves.

With G for what grants give and D for what denies take, a request is gained if it is in G(new) and not in D(new), and not in G(old) or in
D(old). That is two differences of boxes, `G(new) - G(old) - D(new)` and `G(new) & D(old) - D(new)`, and `region` decides both exactly. A
loss is the same with old and new exchanged. A demand is new where both policies allow and no demand of the old one keeps it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from keybroker.authority.policy.grants import Rules
from keybroker.authority.policy.pattern import Pattern
from keybroker.authority.trial.demands import Demand, granted_demands
from keybroker.authority.trial.region import (
    OPERATIONS,
    Box,
    BoxIndex,
    Point,
    Target,
    boxes_of,
    contains,
    intersection,
    own_trail,
    remainder,
)
from keybroker.authority.trial.zones import Zones


class Change(enum.Enum):
    """What becomes of some requests."""

    GAINED = "gained"  # denied, and now allowed
    LOST = "lost"  # allowed, and now denied
    TIGHTENED = "tightened"  # allowed, and now more is demanded
    LOOSENED = "loosened"  # allowed, and now less is demanded


@dataclass(frozen=True, slots=True)
class Line:
    """Some requests, each of which changes in the same way: every combination of these, but for what is in an exception.

    Attributes:
        cause: in words: which rule is new, gone or another.
        demand: what is demanded, or no longer.
        exceptions: parts of rules whose requests do not change (not for this cause).
    """

    change: Change
    cause: str
    workloads: frozenset[Pattern]
    operations: frozenset[str]
    targets: frozenset[Target]
    algorithms: frozenset[str]
    zones: frozenset[int]
    demand: Demand | None = None
    exceptions: frozenset[Box] = frozenset()

    def covers(self, point: Point) -> bool:
        """Whether a request is one of them."""
        if any(contains(each, point) for each in self.exceptions):
            return False
        return any(contains(each, point) for each in self.boxes())

    def boxes(self) -> Iterator[Box]:
        """The combinations."""
        for workloads in self.workloads:
            for operation in self.operations:
                for target in self.targets:
                    yield Box("", workloads, operation, target, self.algorithms, self.zones)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that two policies do differently. `zones` are those of both."""

    zones: Zones
    lines: tuple[Line, ...]


class _Side:
    """One of the two policies, in boxes."""

    def __init__(self, rules: Rules, zones: Zones) -> None:
        self.rules = rules
        self.zones = zones
        self.grants = {grant.id: (grant, tuple(boxes_of(grant, rules, zones))) for grant in rules.grants}
        self.denies = {deny.id: (deny, tuple(boxes_of(deny, rules, zones))) for deny in rules.denies}
        self.own_trail = own_trail(zones)
        self.given = BoxIndex([self.own_trail, *(box for _, boxes in self.grants.values() for box in boxes)])
        self.taken = BoxIndex(box for _, boxes in self.denies.values() for box in boxes)
        self.demands = {
            (grant.id, operation): granted_demands(grant, rules, operation) for grant in rules.grants for operation in OPERATIONS
        }

    def gives_alike(self, other: _Side, name: str) -> bool:
        """Whether a grant covers the same in the other policy, and demands the same."""
        mine, its = self.grants[name], other.grants.get(name)
        demand_alike = all(self.demands[name, each] == other.demands.get((name, each)) for each in OPERATIONS)
        return its is not None and mine[1] == its[1] and demand_alike

    def takes_alike(self, other: _Side, name: str) -> bool:
        """Whether a deny covers the same in the other policy."""
        its = other.denies.get(name)
        return its is not None and self.denies[name][1] == its[1]


def compare(old: Rules, new: Rules) -> Comparison:
    """What another policy changes."""
    zones = Zones(old.networks, new.networks)
    before, after = _Side(old, zones), _Side(new, zones)
    lines = [
        *_allowed(Change.GAINED, before, after),
        *_allowed(Change.LOST, after, before),
        *_demanded(Change.TIGHTENED, before, after),
        *_demanded(Change.LOOSENED, after, before),
    ]
    return Comparison(zones, tuple(lines))


def _allowed(change: Change, one: _Side, other: _Side) -> list[Line]:
    """What the other side allows and this one does not."""
    parts: dict[str, list[_Part]] = {}
    is_gain = change is Change.GAINED
    for name, (_, boxes) in other.grants.items():
        if other.gives_alike(one, name):
            continue
        cause = _cause("grant", name, name in one.grants, "new" if is_gain else "gone")
        for box in boxes:
            parts.setdefault(cause, []).extend(_left(box, [*one.given.meeting(box), *other.taken.meeting(box)]))
    known = [part.box for each in parts.values() for part in each if not part.takers]
    for name, (_, boxes) in one.denies.items():
        if one.takes_alike(other, name):
            continue
        cause = _cause("deny", name, name in other.denies, "gone" if is_gain else "new")
        for box in boxes:
            for given in other.given.meeting(box):
                both = intersection(given, box)
                if both and not any(_is_part(both, each) for each in known):
                    parts.setdefault(cause, []).extend(_left(both, other.taken.meeting(both)))
    return [line for cause, found in parts.items() for line in _merged(change, cause, None, found)]


def _demanded(change: Change, one: _Side, other: _Side) -> list[Line]:
    """What the other side demands where both allow, and this side does not."""
    lines: list[Line] = []
    for name, (_, boxes) in other.grants.items():
        if other.gives_alike(one, name):
            continue
        word = "new" if change is Change.TIGHTENED else "gone"
        cause = _cause("grant", name, name in one.grants, word)
        parts: dict[Demand, list[_Part]] = {}
        for box in boxes:
            for demand in other.demands[name, box.operation]:
                parts.setdefault(demand, []).extend(_newly_demanded(box, demand, one, other))
        for demand, found in sorted(parts.items(), key=lambda each: each[0].text):
            lines += _merged(change, cause, demand, found)
    return lines


def _newly_demanded(box: Box, demand: Demand, one: _Side, other: _Side) -> Iterator[_Part]:
    near = list(one.given.meeting(box))
    keeping = [each for each in near if any(mine.keeps(demand) for mine in one.demands.get((each.source, each.operation), ()))]
    for each in near:
        both = intersection(box, each)
        if both:
            yield from _left(both, [*keeping, *one.taken.meeting(both), *other.taken.meeting(both)])


@dataclass(frozen=True, slots=True)
class _Part:
    box: Box
    takers: frozenset[Box]


def _left(box: Box, takers: Iterable[Box]) -> Iterator[_Part]:
    parts, taking = remainder(box, takers)
    for part in parts:
        yield _Part(part, frozenset(each for each in taking if intersection(part, each)))


def _is_part(box: Box, of: Box) -> bool:
    """Whether a box is one that is in another, as far as equality shows."""
    return replace(box, source=of.source) == of


@dataclass(slots=True)
class _Product:
    """Boxes on the way to a line."""

    sides: dict[str, frozenset[object]]
    exceptions: frozenset[Box] = field(default_factory=frozenset)


_SIDES: tuple[tuple[str, Callable[[Box], frozenset[object]]], ...] = (
    ("algorithms", lambda box: frozenset(box.algorithms)),
    ("targets", lambda box: frozenset({box.target})),
    ("operations", lambda box: frozenset({box.operation})),
    ("workloads", lambda box: frozenset({box.workloads})),
)


def _merged(change: Change, cause: str, demand: Demand | None, parts: list[_Part]) -> Iterator[Line]:
    """As few lines as a simple merge makes: parts that differ in one respect only become one.

    A request in an exception of any part is none that changes for this cause, so the exceptions of all parts may stand together.
    """
    products = [
        _Product({"zones": frozenset(part.box.zones), **{name: side(part.box) for name, side in _SIDES}}, part.takers) for part in parts
    ]
    for name, _ in _SIDES:
        groups: dict[object, _Product] = {}
        for each in products:
            rest = tuple(side for other, side in each.sides.items() if other != name)
            place = (rest, frozenset(taker.source for taker in each.exceptions))
            known = groups.get(place)
            if known is None:
                groups[place] = each
            else:
                known.sides[name] |= each.sides[name]
                known.exceptions |= each.exceptions
        products = list(groups.values())
    for each in products:
        yield Line(change, cause, demand=demand, exceptions=each.exceptions, **each.sides)  # type: ignore[arg-type]  # by name


def _cause(kind: str, name: str, is_in_both: bool, otherwise: str) -> str:  # noqa: FBT001  a fact
    return f"the {kind} {name} {'has changed' if is_in_both else f'is {otherwise}'}"
