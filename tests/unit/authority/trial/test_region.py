"""Boxes against the plain reading of the rules, request by request."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable

import pytest

from keybroker.authority.policy.grants import Rules
from keybroker.authority.policy.pattern import Pattern
from keybroker.authority.trial.region import (
    Box,
    BoxIndex,
    Point,
    Target,
    all_rules,
    boxes_of,
    contains,
    intersection,
    is_covered,
    own_trail,
    point_of,
    remainder,
)
from keybroker.authority.trial.shapes import Word, covers, fits, meet
from keybroker.authority.trial.zones import Zones
from tests import policy_model
from tests.random_policies import ADDRESSES, PolicyMaker, seen_from

SEEDS = range(20)


@pytest.mark.parametrize("seed", SEEDS)
def test_patterns_meet_and_cover_as_their_identities_do(seed: int) -> None:
    maker = PolicyMaker(seed)
    for _ in range(40):
        one, other = Pattern.parse(maker.pattern()), Pattern.parse(maker.pattern())
        both = meet(one, other)
        assert meet(other, one) == both
        for _ in range(40):
            text = maker.identity().text
            in_one, in_other = policy_model.fits(one.text, text), policy_model.fits(other.text, text)
            assert (both is not None and policy_model.fits(both.text, text)) == (in_one and in_other), (one, other, both, text)
            assert not (covers(one, other) and in_other and not in_one), (one, other, text)
        if both is not None and both.text == other.text:
            assert covers(one, other)


@pytest.mark.parametrize(
    ("of", "by", "is_whole"),
    [
        ("a/*", ["a/**"], True),
        ("a/**", ["a/*"], False),
        ("a/**", ["a/*", "a/*/**"], True),
        ("a/**", ["a/*", "a/*/*/**"], False),
        ("a/**", ["a/*", "a/*/*", "*/*/*/**"], True),
        ("*/b", ["a/b", "b/b", "c/b"], False),
        ("a/b", ["*/b"], True),
        ("**", ["a/**"], False),
        ("**", ["**"], True),
        ("a/**", ["**"], True),
    ],
)
def test_patterns_cover_another_together_exactly_where_they_hold_all_of_it(of: str, by: list[str], is_whole: bool) -> None:
    def box(text: str) -> Box:
        pattern = Pattern.parse(text if text == "**" else f"spiffe://example.org/{text}")
        return Box("x", pattern, "sign", Target("key", "k"), frozenset({"ES256"}), frozenset({0}))

    assert is_covered(box(of), [box(text) for text in by]) is is_whole


@pytest.mark.parametrize("seed", SEEDS)
def test_boxes_hold_the_requests_that_their_rules_match(seed: int) -> None:
    maker = PolicyMaker(seed)
    rules = maker.rules()
    zones = Zones(rules.networks)
    boxes = {rule.id: list(boxes_of(rule, rules, zones)) for rule in all_rules(rules)}
    for _ in range(200):
        request, address = maker.request(), maker.address()
        asked = json.loads(seen_from(request, rules, address))
        point = point_of(request, zones.at(address))
        for deny in rules.denies:
            assert any(contains(box, point) for box in boxes[deny.id]) == policy_model.refuses(deny, asked), (deny, asked)
        held = sorted(grant.id for grant in rules.grants if any(contains(box, point) for box in boxes[grant.id]))
        given = policy_model.expected(Rules(rules.grants, (), rules.networks, (), rules.people, rules.groups), asked).grants
        assert held == [name for name in given if name != "own-trail"], asked
        assert contains(own_trail(zones), point) == ("own-trail" in given), asked


@pytest.mark.parametrize("seed", SEEDS)
def test_remainder_and_intersection_are_those_of_the_requests(seed: int) -> None:
    maker = PolicyMaker(seed)
    grants, denies = tuple(maker.grant(f"g{number}") for number in range(5)), tuple(maker.deny(f"d{number}") for number in range(3))
    rules = Rules(grants, denies, maker.networks(), ())
    zones = Zones(rules.networks)
    boxes = [own_trail(zones), *(box for rule in all_rules(rules) for box in boxes_of(rule, rules, zones))]
    points = [point_of(maker.request(), zones.at(maker.address())) for _ in range(300)]

    def holds(them: Iterable[Box], point: Point) -> bool:
        return any(contains(each, point) for each in them)

    for box in maker.random.sample(boxes, min(6, len(boxes))):
        others = [each for each in boxes if each.source != box.source]
        parts, takers = remainder(box, others)
        assert is_covered(box, BoxIndex(others).covering(box)) == (not parts)
        for point in points:
            is_left = contains(box, point) and not holds(others, point)
            assert (holds(parts, point) and not holds(takers, point)) == is_left, (box, point)
            for other in others[:5]:
                both = intersection(box, other)
                assert (both is not None and contains(both, point)) == (contains(box, point) and contains(other, point)), (
                    box,
                    other,
                    point,
                )


def test_zones_are_the_pieces_of_all_networks_and_go_back_to_ranges() -> None:
    one = {"office": (ipaddress.ip_network("10.0.0.0/8"),), "lab": (ipaddress.ip_network("10.1.0.0/16"),)}
    other = {"office": (ipaddress.ip_network("192.0.2.0/24"),)}
    zones = Zones(one, other)
    assert zones.addresses(zones.of(one, ["lab"])) == ("10.1.0.0/16",)
    assert zones.addresses(zones.of(one, ["office"])) == ("10.0.0.0/8",)
    assert zones.addresses(zones.of(other, ["office", "gone"])) == ("192.0.2.0/24",)
    assert zones.of(other, ["gone"]) == frozenset()
    assert zones.of(other, []) == zones.everywhere
    assert zones.addresses(zones.everywhere) == ("10.0.0.0/8", "192.0.2.0/24", "elsewhere")
    assert [zones.at(address) in zones.of(one, ["office"]) for address in ADDRESSES] == [True, True, True, False, False, False, False]


def test_pattern_fits_what_is_in_it_and_nothing_else() -> None:
    assert fits(Pattern.parse("spiffe://example.org/a/**"), Word("example.org", ("a", "b")))
    assert not fits(Pattern.parse("spiffe://example.org/a/**"), Word("example.org", ("a",)))
    assert not fits(Pattern.parse("spiffe://example.org/a"), Word("example.com", ("a",)))
