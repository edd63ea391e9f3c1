"""Every fuzz target holds for its seeds, for small changes of them, and for random bytes. `scripts/fuzz` goes on from there."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.targets import TARGETS


def damaged(seed: bytes, chance: random.Random) -> bytes:
    """One to four bytes changed, added or taken out, or a part of it repeated."""
    data = bytearray(seed)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data) + 1)
        match chance.randrange(4):
            case 0:
                data[place : place + 1] = chance.randbytes(1)
            case 1:
                data[place:place] = chance.randbytes(1)
            case 2:
                del data[place : place + chance.randint(1, 8)]
            case _:
                data += data[:place]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_parser_holds_for_seeds_and_for_seeds_that_were_damaged(name: str) -> None:
    target = TARGETS[name]
    attempt = target.make()
    chance = random.Random(name)
    for seed in target.seeds:
        attempt(seed)
        for _ in range(150):
            attempt(damaged(seed, chance))
    for _ in range(150):
        attempt(chance.randbytes(chance.randint(0, 64)))
