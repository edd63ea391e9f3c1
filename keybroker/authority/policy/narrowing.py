"""Does a change of the rules only take away? A small check of its own, from the rules themselves. Pure: no engine, no store.

It errs to one side: whatever it cannot show to be narrower counts as wider. So a change that it finds nothing in lets nobody do anything
that the rules before did not let him do, under terms that are no weaker. Three things make that more than "each grant became smaller":

- Grants bind together. Where a grant that demands something no longer matches, a request that another grant allows is free of the demand.
- A deny, a network or a person that goes away can let somebody in.
- Who may approve is access, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import zip_longest

from keybroker.authority.policy.grants import OWN_TRAIL, Deny, Grant, Quorum, Rules, seconds_of
from keybroker.authority.policy.pattern import Pattern

_SIGNING = frozenset({"sign", "sign-digest"})
_KEY_OPERATIONS = _SIGNING | {"read-key"}
_PATTERNS = ("workloads", "trails", "subjects")
_NAMES = ("keys", "tokens", "waives", "algorithms")
_TARGETS = ("keys", "trails", "subjects", "tokens", "waives")


def widenings(old: Rules, new: Rules) -> tuple[str, ...]:
    """Why the change from one set of rules to the other may widen access, a line for each reason; nothing if it only narrows."""
    return tuple(_of_grants(old, new)) + tuple(_of_denies(old, new)) + tuple(_of_names(old, new))


def _of_grants(old: Rules, new: Rules) -> Iterator[str]:
    before, after = {each.id: each for each in old.grants}, {each.id: each for each in new.grants}
    for name, grant in after.items():
        if name not in before:
            yield f"grant {name} is new"
            continue
        yield from (f"grant {name}: {why}" for why in (*_wider_selectors(before[name], grant), *_weaker_demands(before[name], grant)))
    for name, grant in before.items():
        if not _demands(grant) or (name in after and _selectors(grant) == _selectors(after[name])):
            continue
        free = [each.id for each in new.grants if each.id != name and _may_meet(grant, each)]
        free += [OWN_TRAIL] if "read-audit" in grant.operations else []  # which everybody has
        if free:
            yield f"grant {name} no longer binds all that it did, and {free[0]} may allow some of that"


def _wider_selectors(old: Grant, new: Grant) -> Iterator[str]:
    for name in _PATTERNS:
        if not _patterns_within(getattr(new, name), getattr(old, name)):
            yield f"more {name}"
    for name in _NAMES:
        if not _names_within(getattr(new, name), getattr(old, name)):
            yield f"more {name}"
    if not _operations(new) <= _operations(old):
        yield "more operations"
    if old.networks and not (new.networks and set(new.networks) <= set(old.networks)):
        yield "more networks"


def _weaker_demands(old: Grant, new: Grant) -> Iterator[str]:
    if new.observe_only and _demands(old):
        yield "it is only observed"
    if old.not_before and not (new.not_before and new.not_before >= old.not_before):
        yield "it begins earlier"
    if old.not_after and not (new.not_after and new.not_after <= old.not_after):
        yield "it ends later"
    if old.hours and not (new.hours and all(each in old.hours for each in new.hours)):
        yield "other hours"
    bounds = {(seconds_of(each.window), each.per): each.max for each in new.limits}
    if any(bounds.get((seconds_of(each.window), each.per), each.max + 1) > each.max for each in old.limits):
        yield "a weaker limit"
    yield from _weaker_quorum(old, new)


def _weaker_quorum(old: Grant, new: Grant) -> Iterator[str]:
    if not isinstance(new.quorum, Quorum):
        if isinstance(old.quorum, Quorum):
            yield "no quorum any more"
        return
    if not isinstance(old.quorum, Quorum):
        yield "people who may approve it"
        return
    if seconds_of(new.quorum.expires) > seconds_of(old.quorum.expires) or seconds_of(new.quorum.cool_off) < seconds_of(old.quorum.cool_off):
        yield "other times for its quorum"
    for was, now in zip_longest(old.quorum.in_stages(), new.quorum.in_stages()):
        if was is None or now is None or now.approvals < was.approvals or not set(now.of) <= set(was.of):
            yield "another quorum"
            return


def _of_denies(old: Rules, new: Rules) -> Iterator[str]:
    after = {each.id: each for each in new.denies}
    for deny in old.denies:
        if deny.id not in after:
            yield f"deny {deny.id} is gone"
        elif not _denies_as_much(deny, after[deny.id]):
            yield f"deny {deny.id} may deny less"


def _denies_as_much(old: Deny, new: Deny) -> bool:
    """A selector that is not given fits everything."""
    fits_all_targets = not any(getattr(new, name) for name in _TARGETS)
    fitted_all_targets = not any(getattr(old, name) for name in _TARGETS)
    targets = fits_all_targets or (
        not fitted_all_targets
        and all(_patterns_within(getattr(old, name), getattr(new, name)) for name in ("trails", "subjects"))
        and all(_names_within(getattr(old, name), getattr(new, name)) for name in ("keys", "tokens", "waives"))
    )
    others = ((old.operations, new.operations), (old.algorithms, new.algorithms), (old.networks, new.networks))
    return (
        targets
        and _patterns_within(old.workloads, new.workloads)
        and all(not now or (bool(was) and set(was) <= set(now)) for was, now in others)
    )


def _of_names(old: Rules, new: Rules) -> Iterator[str]:
    """Names that rules use, and that may have come to mean more."""
    everything: tuple[Grant | Deny, ...] = (*old.grants, *old.denies, *new.grants, *new.denies)
    used = {name for rule in everything for name in rule.networks}
    yield from (f"network {name} is another" for name in sorted(used) if old.networks.get(name) != new.networks.get(name))
    if old.people != new.people:
        yield "people have other identities"
    for name, members in new.groups.items():
        if not set(members) <= set(old.groups.get(name, ())):
            yield f"group {name} has more people"


def _selectors(grant: Grant) -> tuple[object, ...]:
    return tuple(getattr(grant, name) for name in ("operations", "networks", *_PATTERNS, *_NAMES))


def _demands(grant: Grant) -> bool:
    """Whether it demands anything that binds."""
    return not grant.observe_only and bool(grant.not_before or grant.not_after or grant.hours or grant.limits or grant.quorum)


def _operations(grant: Grant) -> frozenset[str]:
    """Whoever may sign with a key may read its public half."""
    given = frozenset(grant.operations)
    return given | {"read-key"} if given & _SIGNING else given


def _may_meet(old: Grant, new: Grant) -> bool:
    """Whether there may be a request that both match. Only what is certain says no."""
    shared = _operations(old) & _operations(new)
    if shared <= _KEY_OPERATIONS and not _names_meet(old.keys, new.keys):
        return False
    if shared <= _SIGNING and not set(old.algorithms) & set(new.algorithms):
        return False
    return bool(shared) and _any_pair(_patterns_meet, old.workloads, new.workloads)


def _any_pair(holds: Callable[[Pattern, Pattern], bool], some: tuple[str, ...], others: tuple[str, ...]) -> bool:
    return any(holds(Pattern.parse(one), Pattern.parse(other)) for one in some for other in others)


def _names_meet(some: tuple[str, ...], others: tuple[str, ...]) -> bool:
    return "*" in some or "*" in others or not set(some).isdisjoint(others)


def _names_within(inner: tuple[object, ...], outer: tuple[object, ...]) -> bool:
    return "*" in outer or set(inner) <= set(outer)


def _patterns_within(inner: tuple[str, ...], outer: tuple[str, ...]) -> bool:
    """Whether every identity that one of the inner patterns fits is fitted by one of the outer ones, each by a single one."""
    return all(any(_is_within(Pattern.parse(one), Pattern.parse(other)) for other in outer) for one in inner)


def _is_within(inner: Pattern, outer: Pattern) -> bool:
    if outer.is_anybody or inner.is_anybody:
        return outer.is_anybody
    if inner.trust_domain != outer.trust_domain or (inner.is_open and not outer.is_open):
        return False
    longer = len(inner.path) - len(outer.path)
    fits_length = longer == 0 if inner.is_open == outer.is_open and not outer.is_open else longer >= (0 if inner.is_open else 1)
    return fits_length and all(want in ("*", have) for want, have in zip(outer.path, inner.path, strict=False))


def _patterns_meet(one: Pattern, other: Pattern) -> bool:
    if one.is_anybody or other.is_anybody:
        return True
    if one.trust_domain != other.trust_domain:
        return False
    if not one.is_open and not other.is_open and len(one.path) != len(other.path):
        return False
    return all("*" in (left, right) or left == right for left, right in zip(one.path, other.path, strict=False))
