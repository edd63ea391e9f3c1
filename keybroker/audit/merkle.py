"""The Merkle tree over the leaves of a log: roots, inclusion proofs, consistency proofs (RFC 6962 section 2.1, RFC 9162 section 2.1).

A node is named by its level and its index there: node (l, i) is the root over the leaves from i * 2^l to (i + 1) * 2^l. Only complete
nodes are ever named, so that a node, once it is known, never changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

HASH_BYTES = 32
MAX_SIZE = 2**63 - 1
EMPTY_ROOT = hashlib.sha256().digest()
"""The root of a tree without leaves."""

Nodes = Callable[[int, int], bytes]
"""Gives the hash of a complete node: its level, its index."""

_TILE_HEIGHT = 8  # C2SP tlog-tiles: 256 hashes
_sha256 = hashlib.sha256


class ProofError(ValueError):
    """A proof does not show what it should. Says what is wrong with it."""


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256 of 0x01 and two hashes."""
    return _sha256(b"\x01" + left + right).digest()


@dataclass(slots=True)
class Frontier:
    """A tree that grows: the complete nodes at its right edge, largest first, and nothing else.

    One leaf costs one hash on average, and there are never more than 63 nodes, whatever the size.

    Attributes:
        size: leaves so far.
        nodes: one for each bit that is set in `size`, the highest bit first.
    """

    size: int = 0
    nodes: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, size: int, nodes: Nodes) -> Frontier:
        """The frontier of a tree whose nodes are kept somewhere."""
        return cls(size, [nodes(level, index) for level, index in _range_nodes(0, size)])

    def copy(self) -> Frontier:
        """Another one, that grows on its own."""
        return Frontier(self.size, self.nodes.copy())

    def append(self, leaf: bytes) -> list[tuple[int, int, bytes]]:
        """Add a leaf hash; the roots of the tiles that it fills: level (from 1), index, hash."""
        place, nodes = self.size, self.nodes
        filled: list[tuple[int, int, bytes]] = []
        height = 0
        while place & 1:
            leaf = _sha256(b"\x01" + nodes.pop() + leaf).digest()
            place, height = place >> 1, height + 1
            if height % _TILE_HEIGHT == 0:
                filled.append((height // _TILE_HEIGHT, place, leaf))
        nodes.append(leaf)
        self.size += 1
        return filled

    def root(self) -> bytes:
        """The tree's root."""
        return _fold(self.nodes) if self.nodes else EMPTY_ROOT


def root_of(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes."""
    frontier = Frontier()
    for leaf in leaves:
        frontier.append(leaf)
    return frontier.root()


def root_at(size: int, nodes: Nodes) -> bytes:
    """The root that a tree had at a size."""
    return _range_hash(0, size, nodes) if size else EMPTY_ROOT


def inclusion_proof(index: int, size: int, nodes: Nodes) -> list[bytes]:
    """The audit path of a leaf (RFC 6962 section 2.1.1), from its sibling up.

    Raises:
        ProofError: there is no such leaf.
    """
    if not 0 <= index < size:
        raise ProofError("no leaf of that index in a tree of that size")
    return _path(index, 0, size, nodes)


def consistency_proof(old: int, size: int, nodes: Nodes) -> list[bytes]:
    """What shows that a tree of `size` leaves begins with the tree of `old` leaves (RFC 6962 section 2.1.2).

    Raises:
        ProofError: the old tree is not the smaller one.
    """
    if not 0 <= old <= size:
        raise ProofError("the older tree is larger than the newer one")
    if old in {0, size}:
        return []
    return _subproof(old, 0, size, nodes)


def root_from_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes]) -> bytes:
    """The root that a leaf hash and its audit path lead to (RFC 9162 section 2.1.3.2).

    Raises:
        ProofError: the path is not as long as index and size demand.
    """
    if not 0 <= index < size:
        raise ProofError("no leaf of that index in a tree of that size")
    place, last, root = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            raise ProofError("the inclusion proof is too long")
        if place & 1 or place == last:
            root = node_hash(sibling, root)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            root = node_hash(root, sibling)
        place, last = place >> 1, last >> 1
    if last:
        raise ProofError("the inclusion proof is too short")
    return root


def check_inclusion(leaf: bytes, index: int, size: int, root: bytes, proof: Sequence[bytes]) -> None:
    """Check that a leaf hash stands at an index of the tree with this size and root.

    Raises:
        ProofError: it is not shown.
    """
    if root_from_inclusion(leaf, index, size, proof) != root:
        raise ProofError("the inclusion proof leads to another root")


def check_consistency(old: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]) -> None:
    """Check that a tree begins with another one (RFC 9162 section 2.1.4.2). An empty tree is consistent with every other.

    Raises:
        ProofError: it is not shown.
    """
    if not 0 <= old <= size:
        raise ProofError("the older tree is larger than the newer one")
    if old in {0, size}:
        if proof:
            raise ProofError("the consistency proof is too long")
        if old_root != (root if old else EMPTY_ROOT):
            raise ProofError("two roots for one size")
        return
    path = list(proof)
    if old & (old - 1) == 0:
        path.insert(0, old_root)
    before, after = _both_roots(old, size, path)
    if before != old_root:
        raise ProofError("the consistency proof leads to another root for the older tree")
    if after != root:
        raise ProofError("the consistency proof leads to another root for the newer tree")


def _both_roots(old: int, size: int, path: Sequence[bytes]) -> tuple[bytes, bytes]:
    """The roots of the older and the newer tree that a consistency proof leads to."""
    if not path:
        raise ProofError("the consistency proof is too short")
    place, last = old - 1, size - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    before = after = path[0]
    for sibling in path[1:]:
        if last == 0:
            raise ProofError("the consistency proof is too long")
        if place & 1 or place == last:
            before, after = node_hash(sibling, before), node_hash(sibling, after)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            after = node_hash(after, sibling)
        place, last = place >> 1, last >> 1
    if last:
        raise ProofError("the consistency proof is too short")
    return before, after


def _split(size: int) -> int:
    """The largest power of two that is smaller."""
    return 1 << (size - 1).bit_length() - 1


def _path(index: int, low: int, high: int, nodes: Nodes) -> list[bytes]:
    if high - low == 1:
        return []
    middle = low + _split(high - low)
    if index < middle:
        return [*_path(index, low, middle, nodes), _range_hash(middle, high, nodes)]
    return [*_path(index, middle, high, nodes), _range_hash(low, middle, nodes)]


def _subproof(old: int, low: int, high: int, nodes: Nodes) -> list[bytes]:
    """RFC 6962's SUBPROOF; its flag is true exactly where `low` is 0."""
    if old == high:
        return [] if low == 0 else [_range_hash(low, high, nodes)]
    middle = low + _split(high - low)
    if old <= middle:
        return [*_subproof(old, low, middle, nodes), _range_hash(middle, high, nodes)]
    return [*_subproof(old, middle, high, nodes), _range_hash(low, middle, nodes)]


def _range_nodes(low: int, high: int) -> list[tuple[int, int]]:
    """The complete nodes that a range is made of, left to right; `low` is a multiple of the largest power of two in the range."""
    found = []
    while low < high:
        level = (high - low).bit_length() - 1
        found.append((level, low >> level))
        low += 1 << level
    return found


def _range_hash(low: int, high: int, nodes: Nodes) -> bytes:
    return _fold([nodes(level, index) for level, index in _range_nodes(low, high)])


def _fold(hashes: list[bytes]) -> bytes:
    root = hashes[-1]
    for left in reversed(hashes[:-1]):
        root = _sha256(b"\x01" + left + root).digest()
    return root
