"""Merkle trees straight from the definitions of RFC 6962 section 2.1 and docs/reference/log.md, without a thought for speed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def half(n: int) -> int:
    k = 1
    while 2 * k < n:
        k *= 2
    return k


def mth(d: Sequence[bytes]) -> bytes:
    """MTH over leaf hashes."""
    if not d:
        return sha(b"")
    if len(d) == 1:
        return d[0]
    k = half(len(d))
    return sha(b"\x01" + mth(d[:k]) + mth(d[k:]))


def path(m: int, d: Sequence[bytes]) -> list[bytes]:
    """PATH(m, D[n])."""
    if len(d) == 1:
        return []
    k = half(len(d))
    return [*path(m, d[:k]), mth(d[k:])] if m < k else [*path(m - k, d[k:]), mth(d[:k])]


def subproof(m: int, d: Sequence[bytes], *, b: bool = True) -> list[bytes]:
    """SUBPROOF(m, D[n], b)."""
    if m == len(d):
        return [] if b else [mth(d)]
    k = half(len(d))
    if m <= k:
        return [*subproof(m, d[:k], b=b), mth(d[k:])]
    return [*subproof(m - k, d[k:], b=False), mth(d[:k])]


def map_root(ends: Mapping[str, tuple[int, bytes]]) -> bytes:
    """The root of the map of trails."""
    leaves = []
    for trail, (count, head) in ends.items():
        key = sha(trail.encode())
        bits = "".join(f"{byte:08b}" for byte in key)
        leaves.append((bits, sha(b"\x00" + key + sha(count.to_bytes(8) + head))))
    return _map_node(leaves, 0)


def _map_node(leaves: list[tuple[str, bytes]], depth: int) -> bytes:
    if not leaves:
        return sha(b"")
    if len(leaves) == 1:
        return leaves[0][1]
    sides = [_map_node([leaf for leaf in leaves if leaf[0][depth] == side], depth + 1) for side in "01"]
    return sha(b"\x01" + sides[0] + sides[1])
