"""The map of trails: which workload has how many records and which is its last, under one hash (docs/reference/log.md).

A binary tree over SHA-256 of the trails' names. A subtree without a trail is the hash of nothing; one with a single trail is that
trail's leaf; any other is the hash of its halves. So a proof is as long as the logarithm of the number of trails, and it shows of
other trails only hashes that nobody can guess, because a head is the hash of a record with a random salt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from keybroker.audit.merkle import HASH_BYTES, ProofError

EMPTY_MAP = hashlib.sha256().digest()
KEY_BITS = 256

_sha256 = hashlib.sha256


@dataclass(frozen=True, slots=True)
class TrailEnd:
    """Where one trail ends: how many records it has, and the leaf hash of the last."""

    count: int
    head: bytes

    @property
    def value(self) -> bytes:
        """SHA-256 of the count, 8 bytes big-endian, and the head."""
        return _sha256(self.count.to_bytes(8) + self.head).digest()


def key_of(trail: str) -> bytes:
    """A trail's place in the map: SHA-256 of its name."""
    return _sha256(trail.encode()).digest()


def leaf_of(key: bytes, value: bytes) -> bytes:
    """The hash of a subtree that holds one trail."""
    return _sha256(b"\x00" + key + value).digest()


class _Leaf(NamedTuple):
    """A subtree with one trail."""

    hash: bytes
    key: bytes
    value: bytes


class _Node(NamedTuple):
    """A subtree with more than one."""

    hash: bytes
    left: _Tree
    right: _Tree


_Tree = _Leaf | _Node | None


@dataclass(frozen=True, slots=True)
class TrailMap:
    """The map at one moment. Never changes: `with_ends` gives another one, and shares with it all that is the same."""

    _tree: _Tree = None
    trails: int = 0

    @property
    def root(self) -> bytes:
        """The hash of the whole map; 32 bytes."""
        return _hash(self._tree)

    def with_ends(self, ends: Mapping[str, TrailEnd]) -> TrailMap:
        """The map after some trails have grown or begun. Costs about as many hashes as trails changed, times the depth."""
        items = []
        for trail, end in ends.items():
            key, value = key_of(trail), end.value
            items.append((int.from_bytes(key), _Leaf(leaf_of(key, value), key, value)))
        tree, new = _merge(self._tree, items, KEY_BITS - 1)
        return TrailMap(tree, self.trails + new)

    def proof(self, trail: str) -> MapProof:
        """What shows where a trail ends in this map, or that it is not in it."""
        key = key_of(trail)
        place, tree, found, bit = int.from_bytes(key), self._tree, list[bytes](), KEY_BITS - 1
        while isinstance(tree, _Node):
            near, far = (tree.right, tree.left) if place >> bit & 1 else (tree.left, tree.right)
            found.append(_hash(far))
            tree, bit = near, bit - 1
        other = (tree.key, tree.value) if tree is not None and tree.key != key else None
        return MapProof(tuple(found[::-1]), other)


def map_of(ends: Mapping[str, TrailEnd]) -> TrailMap:
    """The map of these trails."""
    return TrailMap().with_ends(ends)


def _merge(tree: _Tree, items: list[tuple[int, _Leaf]], bit: int) -> tuple[_Tree, int]:
    """A subtree with new leaves in it, and how many trails it has more."""
    if not items:
        return tree, 0
    left: _Tree = None
    right: _Tree = None
    new = 0
    if isinstance(tree, _Node):
        left, right = tree.left, tree.right
    elif len(items) == 1 and (tree is None or tree.key == items[0][1].key):
        return items[0][1], int(tree is None)
    elif tree is not None:  # it had this place to itself: it moves down, unless it is among those that have grown
        new = -1
        if all(leaf.key != tree.key for _, leaf in items):
            items = [*items, (int.from_bytes(tree.key), tree)]
    left, left_new = _merge(left, [item for item in items if not item[0] >> bit & 1], bit - 1)
    right, right_new = _merge(right, [item for item in items if item[0] >> bit & 1], bit - 1)
    node = _Node(_sha256(b"\x01" + _hash(left) + _hash(right)).digest(), left, right)
    return node, new + left_new + right_new


def _hash(tree: _Tree) -> bytes:
    return tree.hash if tree else EMPTY_MAP


@dataclass(frozen=True, slots=True)
class MapProof:
    """Shows where a trail ends, or that a map has no such trail.

    Attributes:
        siblings: the hashes beside the way, deepest first.
        other: where the trail is absent and another one has its place: that one's key and value.
    """

    siblings: tuple[bytes, ...]
    other: tuple[bytes, bytes] | None = None

    def check(self, root: bytes, trail: str, end: TrailEnd | None) -> None:
        """Check that a trail ends so; None: that the map does not have it.

        Raises:
            ProofError: it is not shown.
        """
        key = key_of(trail)
        place = int.from_bytes(key)
        if len(self.siblings) > KEY_BITS or any(len(each) != HASH_BYTES for each in self.siblings):
            raise ProofError("a map proof has at most 256 hashes, of 32 bytes each")
        if end is not None:
            if self.other is not None:
                raise ProofError("the map proof is of another trail")
            found = leaf_of(key, end.value)
        elif self.other is not None:
            other, value = self.other
            depth = len(self.siblings)
            if len(other) != HASH_BYTES or len(value) != HASH_BYTES or other == key:
                raise ProofError("the map proof does not show that the trail is absent")
            if depth and (place ^ int.from_bytes(other)) >> KEY_BITS - depth:
                raise ProofError("the trail in the map proof does not stand in this one's place")
            found = leaf_of(other, value)
        else:
            found = EMPTY_MAP
        for depth, sibling in zip(range(len(self.siblings) - 1, -1, -1), self.siblings, strict=True):
            pair = (sibling, found) if place >> KEY_BITS - 1 - depth & 1 else (found, sibling)
            found = _sha256(b"\x01" + pair[0] + pair[1]).digest()
        if found != root:
            raise ProofError("the map proof leads to another root")
