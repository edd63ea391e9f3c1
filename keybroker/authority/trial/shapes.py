"""Patterns of SPIFFE IDs as sets: do they meet, and do some of them hold all of another? Both are decided exactly.

A pattern is compared by representatives: identities in which each `*` is a segment that no rule names. Such an identity is in another
pattern only if that has `*` in the same places, and then so is every identity of the same length. There is one representative of a
pattern for each length, and from some length on they all behave alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from keybroker.authority.policy.pattern import ANYBODY, Pattern

FRESH = "\0"
"""A segment, or a trust domain, that no rule names."""


@dataclass(frozen=True, slots=True)
class Word:
    """An identity; `FRESH` stands for what no rule names."""

    trust_domain: str
    path: tuple[str, ...]

    @property
    def is_concrete(self) -> bool:
        """Whether it is one identity, and not the representative of many."""
        return FRESH not in (self.trust_domain, *self.path)


def fits(pattern: Pattern, word: Word) -> bool:
    """Whether an identity is in a pattern."""
    if pattern.is_anybody:
        return True
    if pattern.trust_domain != word.trust_domain or len(pattern.path) > len(word.path):
        return False
    if pattern.is_open == (len(pattern.path) == len(word.path)):
        return False
    return all(segment in ("*", given) for segment, given in zip(pattern.path, word.path, strict=False))


def words(pattern: Pattern, depth: int) -> list[Word]:
    """The representatives of a pattern.

    Args:
        depth: the most segments that any pattern has which they are held against.
    """
    domain = pattern.trust_domain or FRESH
    path = tuple(FRESH if segment == "*" else segment for segment in pattern.path)
    if not pattern.is_open:
        return [Word(domain, path)]
    lengths = range(len(path) + 1, max(depth, len(path)) + 2)
    return [Word(domain, path + (FRESH,) * (length - len(path))) for length in lengths]


def meet(one: Pattern, other: Pattern) -> Pattern | None:
    """The pattern of the identities that are in both; None if there are none."""
    if one.is_anybody or other.is_anybody:
        return other if one.is_anybody else one
    if one.trust_domain != other.trust_domain:
        return None
    short, long = sorted((one, other), key=lambda each: (len(each.path), not each.is_open))
    if short.is_open:
        has_common = long.is_open or len(short.path) < len(long.path)
    else:
        has_common = not long.is_open and len(short.path) == len(long.path)
    if not has_common:
        return None
    path: list[str] = []
    for index, segment in enumerate(long.path):
        known = short.path[index] if index < len(short.path) else "*"
        if "*" not in (segment, known) and segment != known:
            return None
        path.append(known if segment == "*" else segment)
    is_open = short.is_open and long.is_open
    text = f"spiffe://{one.trust_domain}/{'/'.join((*path, *(['**'] if is_open else [])))}"
    return Pattern(text, one.trust_domain, tuple(path), is_open)


def covers(pattern: Pattern, other: Pattern) -> bool:
    """Whether every identity of another pattern is in this one."""
    return all(fits(pattern, word) for word in words(other, depth_of([pattern])))


def depth_of(patterns: Iterable[Pattern]) -> int:
    """The most segments that any of the patterns spells out."""
    return max((len(pattern.path) for pattern in patterns), default=0)


ANYBODY_PATTERN = Pattern.parse(ANYBODY)
