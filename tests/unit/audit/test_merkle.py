"""Trees and proofs against the definitions, written down naively, and against what other implementations made."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keybroker.audit import merkle
from keybroker.audit.leaf import leaf_hash
from keybroker.audit.map import EMPTY_MAP, MapProof, TrailEnd, TrailMap, map_of
from keybroker.audit.merkle import EMPTY_ROOT, Frontier, Nodes, ProofError
from keybroker.audit.tiles import ENTRIES, Tile, nodes_from, places, tiles_of
from tests.unit.audit import naive

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[2] / "vectors" / "tlog.json").read_text())
LEAVES = [leaf_hash(b"leaf %d" % number) for number in range(600)]
PROOFS = settings(max_examples=60, deadline=None)


def raw(text: str) -> bytes:
    return base64.b64decode(text)


def nodes_of(leaves: list[bytes]) -> Nodes:
    def node(level: int, index: int) -> bytes:
        low, high = index << level, index + 1 << level
        assert high <= len(leaves), "only complete nodes may be asked for"
        return naive.mth(leaves[low:high])

    return node


def test_roots_agree_with_other_implementations() -> None:
    frontier = Frontier()
    assert frontier.root() == EMPTY_ROOT == raw(VECTORS["Roots"][0])
    for leaf, root in zip(LEAVES, VECTORS["Roots"][1:], strict=True):
        frontier.append(leaf)
        assert frontier.root() == raw(root)
    assert Frontier.of(600, nodes_of(LEAVES)) == frontier


def test_inclusion_proofs_agree_with_other_implementations() -> None:
    for vector in VECTORS["Inclusions"]:
        size, index, proof = vector["Size"], vector["Index"], [raw(each) for each in vector["Proof"] or ()]
        assert merkle.inclusion_proof(index, size, nodes_of(LEAVES[:size])) == proof
        merkle.check_inclusion(LEAVES[index], index, size, raw(VECTORS["Roots"][size]), proof)


def test_consistency_proofs_agree_with_other_implementations() -> None:
    for vector in VECTORS["Consistent"]:
        old, size, proof = vector["Old"], vector["Size"], [raw(each) for each in vector["Proof"] or ()]
        assert merkle.consistency_proof(old, size, nodes_of(LEAVES[:size])) == proof
        merkle.check_consistency(old, raw(VECTORS["Roots"][old]), size, raw(VECTORS["Roots"][size]), proof)


@PROOFS
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))))
def test_inclusion_is_shown_for_the_one_leaf_and_index_only(case: tuple[int, int]) -> None:
    size, index = case
    leaves = LEAVES[:size]
    root, proof = naive.mth(leaves), naive.path(index, leaves)
    assert merkle.inclusion_proof(index, size, nodes_of(leaves)) == proof
    merkle.check_inclusion(leaves[index], index, size, root, proof)
    wrong = [(leaves[index], other, size, root, proof) for other in (index - 1, index + 1, size, -1) if other != index]
    wrong += [(LEAVES[-1], index, size, root, proof), (leaves[index], index, size, LEAVES[0] if size > 1 else LEAVES[1], proof)]
    wrong += [(leaves[index], index, size, root, [*proof, LEAVES[0]]), (leaves[index], index, size, root, [LEAVES[0], *proof])]
    wrong += [(leaves[index], index, size, root, proof[:place] + proof[place + 1 :]) for place in range(len(proof))]
    for each in wrong:
        with pytest.raises(ProofError):
            merkle.check_inclusion(*each)


@PROOFS
@given(st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_consistency_is_shown_for_the_two_trees_only(case: tuple[int, int]) -> None:
    old, size = case
    leaves = LEAVES[:size]
    before, after = naive.mth(leaves[:old]), naive.mth(leaves)
    proof = naive.subproof(old, leaves) if old else []
    assert merkle.consistency_proof(old, size, nodes_of(leaves)) == proof
    merkle.check_consistency(old, before, size, after, proof)
    other = LEAVES[-1]
    wrong: list[tuple[int, bytes, int, bytes, list[bytes]]] = [
        (old, other, size, after, proof),
        (old, before, size, after, [*proof, other]),
    ]
    wrong += [(old, before, size, other, proof)] if old else []
    wrong += [(size + 1, before, size, after, proof), (-1, before, size, after, proof)]
    wrong += [(old, before, size, after, proof[:place] + proof[place + 1 :]) for place in range(len(proof))]
    wrong += [(old, before, size, after, [*proof[:place], other, *proof[place + 1 :]]) for place in range(len(proof))]
    for each in wrong:
        with pytest.raises(ProofError):
            merkle.check_consistency(*each)


def test_proof_is_refused_for_what_is_not_in_the_tree() -> None:
    with pytest.raises(ProofError):
        merkle.inclusion_proof(5, 5, nodes_of(LEAVES[:5]))
    with pytest.raises(ProofError):
        merkle.consistency_proof(6, 5, nodes_of(LEAVES[:5]))


def test_nodes_come_out_of_tiles() -> None:
    """The tiles of a log are enough to make every proof."""

    def read(tile: Tile) -> list[bytes]:
        width = 256**tile.level
        assert tile.width <= places(tile.level, 600) - tile.start
        return [naive.mth(LEAVES[at * width : (at + 1) * width]) for at in range(tile.start, tile.start + tile.width)]

    nodes = nodes_from(read, 600)
    assert merkle.root_at(600, nodes) == raw(VECTORS["Roots"][600])
    for index in (0, 255, 256, 511, 512, 599):
        assert merkle.inclusion_proof(index, 600, nodes) == naive.path(index, LEAVES)
    for old in (1, 255, 256, 512, 599):
        assert merkle.consistency_proof(old, 600, nodes) == naive.subproof(old, LEAVES)
        assert merkle.root_at(old, nodes) == naive.mth(LEAVES[:old])


def test_tiles_agree_with_another_implementation() -> None:
    """Its paths name the height too, which C2SP fixes at 8."""
    made = {tile.path: tile for tile in tiles_of(600)}
    for vector in VECTORS["Tiles"]:
        path, size = vector["Path"].removeprefix("tile/8/"), vector["Size"]
        if size == 600:
            tile = made[path]
            width = 256**tile.level
            hashes = [naive.mth(LEAVES[at * width : (at + 1) * width]) for at in range(tile.start, tile.start + tile.width)]
            assert hashlib.sha256(b"".join(hashes)).digest() == raw(vector["SHA"])
        else:
            assert Tile.parse(path) == Tile(3, -size)
            assert Tile(3, -size).path == path
    assert len([tile for tile in made.values() if tile.level != ENTRIES]) == sum(vector["Size"] == 600 for vector in VECTORS["Tiles"])


# The map of trails

ENDS = st.dictionaries(
    st.text(max_size=20),
    st.tuples(st.integers(1, 2**40), st.binary(min_size=32, max_size=32)).map(lambda pair: TrailEnd(*pair)),
    max_size=30,
)


@PROOFS
@given(ENDS, ENDS)
def test_map_grows_to_what_its_definition_says(first: dict[str, TrailEnd], second: dict[str, TrailEnd]) -> None:
    whole = first | second
    grown = map_of(first).with_ends(second)
    assert grown.root == map_of(whole).root == naive.map_root({trail: (end.count, end.head) for trail, end in whole.items()})
    assert grown.trails == len(whole)


@PROOFS
@given(ENDS, st.text(max_size=20))
def test_map_shows_each_end_and_each_absence_and_nothing_else(ends: dict[str, TrailEnd], stranger: str) -> None:
    trails = map_of(ends)
    for trail in [*list(ends)[:5], stranger]:
        end, proof = ends.get(trail), trails.proof(trail)
        proof.check(trails.root, trail, end)
        lies = [TrailEnd(end.count + 1, end.head), TrailEnd(end.count, naive.sha(end.head)), None] if end else [TrailEnd(1, bytes(32))]
        for lie in lies:
            with pytest.raises(ProofError):
                proof.check(trails.root, trail, lie)
        with pytest.raises(ProofError):
            proof.check(bytes(32), trail, end)
        with pytest.raises(ProofError):
            MapProof((*proof.siblings, EMPTY_MAP), proof.other).check(trails.root, trail, end)


def test_map_proof_of_absence_does_not_serve_for_a_trail_that_stands_elsewhere() -> None:
    ends = {f"spiffe://example.org/{name}": TrailEnd(1, bytes([name]) * 32) for name in range(20)}
    trails = map_of(ends)
    present = next(iter(ends))
    for stranger in (f"spiffe://example.org/stranger-{number}" for number in range(40)):
        with pytest.raises(ProofError):
            trails.proof(stranger).check(trails.root, present, None)


def test_empty_map_has_the_hash_of_nothing() -> None:
    assert TrailMap().root == EMPTY_MAP == naive.map_root({})
    TrailMap().proof("a").check(EMPTY_MAP, "a", None)
    with pytest.raises(ProofError):
        TrailMap().proof("a").check(EMPTY_MAP, "a", TrailEnd(0, bytes(32)))
