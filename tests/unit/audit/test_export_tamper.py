"""A thousand ways to tamper with an export, all found by two verifiers that share no code, with the first record that can be meant.

KEYBROKER_TAMPER_MUTATIONS sets how many (1,000 if absent), KEYBROKER_TAMPER_SEED which.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keybroker.audit import export
from keybroker.audit.chain import check
from keybroker.audit.checkpoint import Checkpoint, SignedCheckpoint
from keybroker.audit.export import Finding
from keybroker.audit.leaf import canonical, decode, leaf_hash
from keybroker.audit.map import TrailEnd, map_of
from keybroker.audit.merkle import root_of
from keybroker.audit.note import Note, NoteSignature
from keybroker.authority import log_reads
from keybroker.authority.log_reads import LogReads
from keybroker.authority.store.reader import Reader
from tests.unit.authority.store.logs import A, B
from tests.unit.authority.test_checkpoints import KEY, PRIVATE, Token, broker_on

MUTATIONS = int(os.environ.get("KEYBROKER_TAMPER_MUTATIONS", "1000"))
SEED = os.environ.get("KEYBROKER_TAMPER_SEED", "a thousand exports")
TRAILS = [A, B, "spiffe://example.org/c"]


def second_verifier() -> Any:
    path = Path(__file__).parents[3] / "tools" / "verify_export.py"
    spec = importlib.util.spec_from_file_location("verify_export", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SECOND = second_verifier()


@dataclass(frozen=True)
class Exported:
    """A whole export, the last checkpoint, and the trail of one workload."""

    lines: list[bytes]
    note: bytes
    trail: list[bytes]

    @property
    def size(self) -> int:
        return SignedCheckpoint.open(self.note, KEY).checkpoint.size

    def places(self) -> list[int]:
        """Where the leaves are among the lines."""
        return [place for place, line in enumerate(self.lines) if not line.startswith(b'{"checkpoint":')]

    def interval(self, index: int) -> tuple[int, int]:
        """The sizes of the checkpoints before and after a record."""
        sizes = [0, *(head_of(line).size for line in self.lines if line.startswith(b'{"checkpoint":'))]
        return max(size for size in sizes if size <= index), min(size for size in sizes if size > index)


def head_of(line: bytes) -> Checkpoint:
    return Checkpoint.parse(Note.parse(json.loads(line)["checkpoint"].encode()).text)


def signed(head: Checkpoint, private: Ed25519PrivateKey = PRIVATE) -> bytes:
    text = head.text()
    return bytes(Note(text, (NoteSignature(KEY.name, KEY.id, private.sign(text.encode())),)))


def line_of(note: bytes) -> bytes:
    return json.dumps({"checkpoint": note.decode()}, separators=(",", ":"), ensure_ascii=False).encode()


async def _write(state: Path) -> Exported:
    rng, parts = random.Random(str(state.name)), []
    async with broker_on(state, Token()) as broker:
        for number in range(60):
            await broker.use(f"use-{number}", rng.choice(TRAILS))
            if number % 7 == 6 or number == 59:
                await broker.sign()
        note, head = broker.checkpoints.latest
        reads = LogReads(None, broker.checkpoints, Reader(state))  # type: ignore[arg-type]  # nobody is asked here who may read
        try:
            parts.append(reads._export(0, note, broker.head.size).content)
            trail = reads._export_trail(A, 0, note, head).content
        finally:
            reads.close()
    return Exported(b"".join(parts).splitlines(), note, trail.splitlines())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_reads, "CHECKPOINT_RECORDS", 20)
        return asyncio.run(_write(tmp_path_factory.mktemp("one") / "state"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Another log of the same name under the same key: a fork from its first record on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_reads, "CHECKPOINT_RECORDS", 20)
        return asyncio.run(_write(tmp_path_factory.mktemp("two") / "other"))


def ours(lines: list[bytes], *kept: bytes) -> Finding | None:
    return export.verify(iter(lines), KEY, kept).first


def theirs(lines: list[bytes], *kept: bytes) -> tuple[int, int] | None:
    key = SECOND.LogKey(str(KEY))
    try:
        SECOND.verify(iter(lines), key, dict(key.open(note.decode()) for note in kept))
    except SECOND.WrongError as wrong:
        return wrong.first, wrong.last
    return None


Expected = tuple[int, int, int]
"""From where, at the earliest, a fault may be named with others; the first changed record; up to where, at the latest."""
Mutation = Callable[[random.Random, Exported, Exported], tuple[list[bytes], Expected]]


def around(log: Exported, index: int) -> Expected:
    low, high = log.interval(min(index, log.size - 1))
    return low, index, high


def edit_byte(rng: random.Random, log: Exported, _other: Exported) -> tuple[list[bytes], Expected]:
    index = rng.randrange(log.size)
    place = log.places()[index]
    data = bytearray(log.lines[place])
    data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    return b"\n".join([*log.lines[:place], bytes(data), *log.lines[place + 1 :]]).split(b"\n"), around(log, index)


def edit_field(rng: random.Random, log: Exported, _other: Exported) -> tuple[list[bytes], Expected]:
    index = rng.randrange(log.size)
    place = log.places()[index]
    record = decode(log.lines[place])
    field = rng.choice(sorted(record))
    record[field] = rng.choice(["", {}, [], 7, "x", {"id": "x"}, None, True])
    changed = canonical(record)
    if changed == log.lines[place]:
        return edit_byte(rng, log, _other)
    return [*log.lines[:place], changed, *log.lines[place + 1 :]], around(log, index)


def edit_salt_of_the_last_in_its_trail(rng: random.Random, log: Exported, _other: Exported) -> tuple[list[bytes], Expected]:
    """Well-formed, and nothing after it in its chain: the `heads` record or the root shows it."""
    last = {}
    for index, place in enumerate(log.places()):
        last[decode(log.lines[place])["trail"].get("id", "")] = index
    index = rng.choice(sorted(last.values()))
    place = log.places()[index]
    record = decode(log.lines[place]) | {"salt": rng.randbytes(16).hex()}
    return [*log.lines[:place], canonical(record), *log.lines[place + 1 :]], around(log, index)


def delete(rng: random.Random, log: Exported, _other: Exported) -> tuple[list[bytes], Expected]:
    index = rng.randrange(log.size)
    place = log.places()[index]
    return [*log.lines[:place], *log.lines[place + 1 :]], around(log, index)


def swap(rng: random.Random, log: Exported, _other: Exported) -> tuple[list[bytes], Expected]:
    first, second = sorted(rng.sample(range(log.size), 2))
    lines, places = log.lines.copy(), log.places()
    lines[places[first]], lines[places[second]] = lines[places[second]], lines[places[first]]
    return lines, around(log, first)


def insert(rng: random.Random, log: Exported, _other: Exported) -> tuple[list[bytes], Expected]:
    """A forged record in a good place, made to look like the next."""
    index = rng.randrange(1, log.size)
    place = log.places()[index]
    record = decode(log.lines[place]) | {"kind": "denial", "use": "", "outcome": "", "salt": rng.randbytes(16).hex()}
    return [*log.lines[:place], canonical(record), *log.lines[place:]], around(log, index)


def repeat(rng: random.Random, log: Exported, _other: Exported) -> tuple[list[bytes], Expected]:
    index = rng.randrange(log.size)
    place = log.places()[index]
    return [*log.lines[: place + 1], *log.lines[place:]], around(log, min(index + 1, log.size))


def truncate(rng: random.Random, log: Exported, _other: Exported) -> tuple[list[bytes], Expected]:
    """After some record, checkpoint and all."""
    index = rng.randrange(1, log.size)
    low, _ = log.interval(index)
    if index == low:
        return truncate(rng, log, _other)
    return log.lines[: log.places()[index]], (low, low, index)  # those that are left after the last checkpoint are signed by nobody


def mix(rng: random.Random, log: Exported, other: Exported) -> tuple[list[bytes], Expected]:
    """A record of the fork in the place of this log's."""
    index = rng.randrange(min(log.size, other.size))
    place = log.places()[index]
    return [*log.lines[:place], other.lines[other.places()[index]], *log.lines[place + 1 :]], around(log, index)


def rewrite(rng: random.Random, log: Exported, _other: Exported) -> tuple[list[bytes], Expected]:
    """One record changed, and every chain and map after it made anew: only the signed roots are what they were."""
    index, lines, ends = rng.randrange(log.size), [], dict[str, tuple[int, str]]()
    for line in log.lines:
        if line.startswith(b'{"checkpoint":'):
            lines.append(line)
            continue
        record = decode(line)
        if record["index"] == index:
            record["salt"] = rng.randbytes(16).hex()
        if record["kind"] == "heads":
            trails = map_of({trail: TrailEnd(count, bytes.fromhex(head)) for trail, (count, head) in ends.items()})
            record["body"] = {"root": trails.root.hex(), "trails": trails.trails}
        if record["trail"]:
            count, head = ends.get(record["trail"]["id"], (0, ""))
            record["trail"] |= {"index": count, "previous": head}
            ends[record["trail"]["id"]] = (count + 1, leaf_hash(canonical(record)).hex())
        lines.append(canonical(record))
    assert check(line for line in lines if not line.startswith(b'{"checkpoint":')) == []
    return lines, around(log, index)


def strip_signature(rng: random.Random, log: Exported, _other: Exported) -> tuple[list[bytes], Expected]:
    place = rng.choice([place for place, line in enumerate(log.lines) if line.startswith(b'{"checkpoint":')])
    head = head_of(log.lines[place])
    bare = head.text().encode()
    unsigned = rng.choice([bare, bare + b"\n", bare + b"\n" + "\u2014 someone else AAAAAAAA\n".encode()])
    return [*log.lines[:place], line_of(unsigned), *log.lines[place + 1 :]], around(log, head.size - 1)


def replace_signature(rng: random.Random, log: Exported, _other: Exported) -> tuple[list[bytes], Expected]:
    """By another key, which says that it is the log's; or for another head, by the log's own."""
    place = rng.choice([place for place, line in enumerate(log.lines) if line.startswith(b'{"checkpoint":')])
    head = head_of(log.lines[place])
    notes = [
        signed(head, Ed25519PrivateKey.generate()),
        signed(Checkpoint(head.origin, head.size, bytes(32))),
        signed(Checkpoint("example.org/other", head.size, head.root)),
        signed(Checkpoint(head.origin, head.size - 1, root_of([leaf_hash(log.lines[at]) for at in log.places()[: head.size - 1]]))),
    ]
    return [*log.lines[:place], line_of(rng.choice(notes)), *log.lines[place + 1 :]], around(log, head.size - 1)


def edit_checkpoint(rng: random.Random, log: Exported, _other: Exported) -> tuple[list[bytes], Expected]:
    place = rng.choice([place for place, line in enumerate(log.lines) if line.startswith(b'{"checkpoint":')])
    head = head_of(log.lines[place])
    note = bytearray(json.loads(log.lines[place])["checkpoint"].encode())
    at = rng.randrange(len(note))
    note[at] = rng.choice([each for each in b"ABCXYZ019+/=\n " if each != note[at]])
    return [*log.lines[:place], line_of(bytes(note).decode(errors="replace").encode()), *log.lines[place + 1 :]], around(log, head.size - 1)


MUTATIONS_OF_A_LOG: list[Mutation] = [
    edit_byte, edit_field, edit_salt_of_the_last_in_its_trail, delete, swap, insert, repeat, truncate, mix, rewrite,
    strip_signature, replace_signature, edit_checkpoint,
]  # fmt: skip


@pytest.mark.case(68)
@pytest.mark.case(70)
def test_every_mutation_is_found_by_both_verifiers_with_the_first_record_that_can_be_meant(exported: Exported, other: Exported) -> None:
    assert (ours(exported.lines), theirs(exported.lines)) == (None, None)
    found = Counter[str]()
    for number in range(MUTATIONS):
        rng = random.Random(f"{SEED} {number}")
        mutation = MUTATIONS_OF_A_LOG[number % len(MUTATIONS_OF_A_LOG)]
        lines, (low, first, high) = mutation(rng, exported, other)
        what = f"{mutation.__name__} {number}"
        one, two = ours(lines), theirs(lines)
        assert one is not None, what
        assert two is not None, what
        for index, last in ((one.index, one.last), two):
            assert low <= index <= high, (what, index, last, low, first, high)
            assert index <= first if index < last else index >= first, (what, index, last, first)  # no innocent record is named alone
        found[mutation.__name__] += 1
    assert len(found) == len(MUTATIONS_OF_A_LOG)


@pytest.mark.case(68)
def test_older_copy_and_log_that_was_cut_at_a_checkpoint_are_found_by_a_checkpoint_that_was_kept(exported: Exported) -> None:
    for place, line in enumerate(exported.lines[:-1]):
        if line.startswith(b'{"checkpoint":'):
            cut, size = exported.lines[: place + 1], head_of(line).size
            assert (ours(cut), theirs(cut)) == (None, None)
            assert ours(cut, exported.note) == Finding(size, exported.size - 1, "ends-before-what-was-signed")
            assert theirs(cut, exported.note) == (size, exported.size - 1)
    assert (ours(exported.lines, exported.note), theirs(exported.lines, exported.note)) == (None, None)


@pytest.mark.case(69)
def test_fork_is_found_by_a_checkpoint_that_was_kept(exported: Exported, other: Exported) -> None:
    """Both are signed; the two notes together are the proof."""
    for log, kept in ((exported, other), (other, exported)):
        assert (ours(log.lines), theirs(log.lines)) == (None, None)
        size = min(log.size, kept.size)
        finding = ours(log.lines, kept.note)
        assert finding is not None
        assert finding.rule in {"not-what-was-signed-before", "ends-before-what-was-signed"}
        assert theirs(log.lines, kept.note) == (finding.index, finding.last)
        assert finding.index <= size


@pytest.mark.case(70)
def test_nothing_is_verified_with_another_key_or_without_a_checkpoint(exported: Exported) -> None:
    stranger = type(KEY)(KEY.name, KEY.type, Ed25519PrivateKey.generate().public_key().public_bytes_raw())
    assert export.verify(iter(exported.lines), stranger).first is not None
    with pytest.raises(SECOND.WrongError):
        SECOND.verify(iter(exported.lines), SECOND.LogKey(str(stranger)), {})
    bare = [line for line in exported.lines if not line.startswith(b'{"checkpoint":')]
    assert ours(bare) == Finding(0, exported.size - 1, "no-checkpoint")
    assert theirs(bare) == (0, exported.size - 1)
    assert ours([]) is not None
    assert theirs([]) is not None


@pytest.mark.case(68)
def test_every_mutation_of_a_trail_is_found_by_both_verifiers(exported: Exported, other: Exported) -> None:
    assert (ours(exported.trail), theirs(exported.trail)) == (None, None)
    count = len(exported.trail) - 2
    for number in range(MUTATIONS // 4):
        rng = random.Random(f"{SEED} trail {number}")
        lines = exported.trail.copy()
        place = rng.randrange(1, count + 1)
        match number % 7:
            case 0:
                data = bytearray(lines[place])
                data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
                lines[place] = bytes(data)
            case 1:
                del lines[place]
            case 2:
                lines.insert(place, lines[rng.randrange(1, count + 1)])
            case 3:
                del lines[rng.randrange(1, count + 1) : -1]
            case 4:
                lines[-1] = rng.choice([other.trail[-1], lines[-1].replace(b'"count":', b'"count":1')])
            case 5:
                proof = json.loads(lines[-1])
                name = rng.choice(sorted(proof["trail_proof"]))
                proof["trail_proof"][name] = rng.choice(
                    ["", "00" * 32, [], ["00" * 32], 0, 10**30, None, proof["trail_proof"]["trail"] + "x"]
                )
                lines[-1] = canonical(proof)
                if json.loads(lines[-1]) == json.loads(exported.trail[-1]):
                    continue
            case _:
                lines[place] = canonical(decode(lines[place]) | {"salt": base64.b16encode(rng.randbytes(16)).decode().lower()})
        assert ours(lines) is not None, number
        assert theirs(lines) is not None, number
