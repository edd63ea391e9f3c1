# ruff: noqa: E501  sentences of the specification are quoted whole
"""One test for each MUST and MUST NOT of C2SP tlog-witness on `add-checkpoint` and retrieval that concerns a witness, with its words.

Left out: `sign-subtree`, which is OPTIONAL and not made; "SHOULD use ML-DSA-44": see tests/unit/audit/test_c2sp_conformance.py; what binds
clients ("The client MUST NOT send more than 63 consistency proof lines" is refused here, "MUST ignore any cosignatures from unknown keys" is
`test_checkpoint_unknown_signatures` there).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.applications import Starlette

from keybroker.audit.checkpoint import Checkpoint, SignedCheckpoint
from keybroker.audit.leaf import leaf_hash
from keybroker.audit.merkle import EMPTY_ROOT
from keybroker.audit.note import Note, NoteError, NoteSignature, SignatureType, VerifierKey
from keybroker.witness.room import application, open_witness
from keybroker.witness.rules import AddCheckpoint, Witness, WitnessAnswer
from tests.clocks import START_US, FixedClock
from tests.unit.audit import naive

LOG_PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(32))
LOG = VerifierKey("example.org/log", SignatureType.ED25519, LOG_PRIVATE.public_key().public_bytes_raw())
LEAVES = [leaf_hash(b"%d" % number) for number in range(40)]
OTHERS = [leaf_hash(b"other %d" % number) for number in range(40)]


@pytest.fixture
def witness(tmp_path: Path) -> Witness:
    return started(tmp_path)


def started(directory: Path) -> Witness:
    return Witness("witness.example/w1", Ed25519PrivateKey.from_private_bytes(b"w" * 32), [LOG], directory / "memory", FixedClock())


def note_of(size: int, leaves: list[bytes] = LEAVES, root: bytes | None = None, origin: str = LOG.name) -> bytes:
    text = Checkpoint(origin, size, naive.mth(leaves[:size]) if root is None else root).text()
    return bytes(Note(text, (NoteSignature(LOG.name, LOG.id, LOG_PRIVATE.sign(text.encode())),)))


def asked(old: int, size: int, leaves: list[bytes] = LEAVES) -> bytes:
    proof = naive.subproof(old, leaves[:size]) if 0 < old <= size else []
    return bytes(AddCheckpoint(old, tuple(proof), note_of(size, leaves)))


def cosigns(witness: Witness, body: bytes) -> bool:
    """Whether it does; if not, nothing is remembered."""
    before = memory(witness)
    answer = witness.add_checkpoint(body)
    if answer.status != 200:
        assert memory(witness) == before
        return False
    note = AddCheckpoint.parse(body).note + answer.body
    assert witness.key in SignedCheckpoint.open(note, LOG, [witness.key]).cosignatures
    return True


async def asked_of(app: Starlette, method: str, path: str, body: bytes = b"") -> tuple[int, str, bytes]:
    """Status, media type and body of an answer."""
    scope = {"type": "http", "http_version": "1.1", "method": method, "path": path, "query_string": b"", "headers": []}
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    types = [value.decode() for name, value in sent[0]["headers"] if name == b"content-type"]
    return sent[0]["status"], types[0] if types else "", b"".join(each["body"] for each in sent[1:])


def memory(witness: Witness) -> WitnessAnswer:
    return witness.latest(hashlib.sha256(LOG.name.encode()).hexdigest())


def test_body_is_a_sequence_of_lines(witness: Witness) -> None:
    """ "The request body MUST be a sequence of an old size line, zero or more consistency proof lines, and an empty line, followed by a checkpoint. Each line MUST terminate in a newline character"; "MUST consist of the string `old`, a single space (0x20), and the tree size" ... "with no leading zeroes"; "MUST NOT send more than 63 consistency proof lines"."""
    good = asked(0, 7)
    line = base64.b64encode(bytes(32))
    assert bytes(AddCheckpoint.parse(good)) == good
    for bad in (
        b"", b"\n", good[1:], good.replace(b"old 0", b"old 00"), good.replace(b"old 0", b"old  0"), good.replace(b"old 0", b"old -1"),
        good.replace(b"old 0\n", b"old 0\nAAAA\n"), good.replace(b"\n\n", b"\n", 1), good[:-1], good.replace(b"old 0\n", b"old 0\n" + (line + b"\n") * 64),
    ):  # fmt: skip
        assert witness.add_checkpoint(bad).status == 400, bad
    assert cosigns(witness, good)


def test_unknown_origin_is_404(witness: Witness) -> None:
    """ "If the checkpoint origin is unknown, the witness MUST respond with a "404 Not Found" HTTP status code."""
    assert witness.add_checkpoint(bytes(AddCheckpoint(0, (), note_of(7, origin="example.org/stranger")))).status == 404


def test_unsigned_or_wrongly_signed_is_403(witness: Witness) -> None:
    """ "MUST respond with a "403 Forbidden" HTTP status code if either no signature from a trusted key for the origin is present, or a signature line's key name and ID match a trusted key but the signature itself fails to verify"; "it MUST ignore signatures from unknown keys"."""
    text = Note.parse(note_of(7)).text
    unknown, forged = NoteSignature("x", b"abcd", bytes(64)), NoteSignature(LOG.name, LOG.id, bytes(64))
    good = Note.parse(note_of(7)).signatures[0]
    for signatures in ((unknown,), (forged,), (good, forged)):
        assert witness.add_checkpoint(bytes(AddCheckpoint(0, (), bytes(Note(text, signatures))))).status == 403
    assert cosigns(witness, bytes(AddCheckpoint(0, (), bytes(Note(text, (unknown, good))))))


def test_old_size_larger_than_the_checkpoint_is_400(witness: Witness) -> None:
    """ "The old size MUST be equal to or lower than the checkpoint size. Otherwise, the witness MUST respond with a "400 Bad Request"."""
    assert witness.add_checkpoint(asked(8, 7)).status == 400


@pytest.mark.case(69)
def test_old_size_must_be_what_it_remembers(witness: Witness) -> None:
    """ "The witness MUST check that the old size matches the size of the latest checkpoint it cosigned" ... "MUST respond with a "409 Conflict"" ... "The response body MUST consist of the tree size of the latest cosigned checkpoint in decimal, followed by a newline (U+000A). The response MUST have a `Content-Type` of `text/x.tlog.size`."""
    assert witness.add_checkpoint(asked(3, 7)) == WitnessAnswer(409, b"0\n", "text/x.tlog.size")
    assert cosigns(witness, asked(0, 7))
    for old, size in ((0, 7), (0, 9), (3, 9), (0, 5), (8, 9)):
        assert witness.add_checkpoint(asked(old, size)) == WitnessAnswer(409, b"7\n", "text/x.tlog.size")


def test_empty_log_has_the_empty_root(witness: Witness) -> None:
    """ "A checkpoint of size zero MUST have the root hash of the empty tree" ... "Otherwise, the witness MUST respond with a "422 Unprocessable Entity"."""
    assert witness.add_checkpoint(bytes(AddCheckpoint(0, (), note_of(0, root=bytes(32))))).status == 422
    assert cosigns(witness, bytes(AddCheckpoint(0, (), note_of(0, root=EMPTY_ROOT))))


def test_first_proof_is_empty(witness: Witness) -> None:
    """ "If the old size is zero, the consistency proof MUST be empty" ... "If the proof is not empty when the old size is zero" ... "422"."""
    assert witness.add_checkpoint(bytes(AddCheckpoint(0, (bytes(32),), note_of(7)))).status == 422
    assert cosigns(witness, asked(0, 7))


@pytest.mark.case(69)
def test_fork_and_rollback_are_not_cosigned(witness: Witness) -> None:
    """ "or if a Merkle Consistency Proof doesn't verify, the witness MUST respond with a "422"; "If the old size matches the checkpoint size, the witness MUST check that the root hashes are also identical. If they don't match, the witness MUST respond with a "422"; "MUST NOT cosign the checkpoint"."""
    assert cosigns(witness, asked(0, 7))
    for body in (
        asked(7, 12, OTHERS),
        asked(7, 7, OTHERS),
        bytes(AddCheckpoint(7, (), note_of(12))),
        bytes(AddCheckpoint(7, tuple(naive.subproof(7, LEAVES[:12])), note_of(12, OTHERS))),
        bytes(AddCheckpoint(7, tuple(naive.subproof(7, LEAVES[:12]))[1:], note_of(12))),
    ):
        assert witness.add_checkpoint(body).status == 422
        assert not cosigns(witness, body)
    assert cosigns(witness, asked(7, 7))
    assert cosigns(witness, asked(7, 12))


def test_cosignature_is_one_line_with_a_time(witness: Witness) -> None:
    """ "The response body MUST be a sequence of one or more note signature lines, each starting with the `—` character (U+2014) and ending with a newline character (U+000A). The signatures MUST be cosignatures from the witness key(s) on the checkpoint."; "the timestamp MUST NOT be zero"."""
    answer = witness.add_checkpoint(asked(0, 7))
    line = answer.body.decode()
    assert line.startswith("\u2014 witness.example/w1 ")
    assert line.endswith("\n")
    assert NoteSignature.parse(line[:-1]).timestamp == START_US // 1_000_000 > 0


@pytest.mark.case(69)
def test_checkpoint_is_remembered_before_it_is_answered(witness: Witness, tmp_path: Path) -> None:
    """ "The witness MUST persist the new checkpoint before responding."; another process on the same memory knows it."""
    assert cosigns(witness, asked(0, 7))
    assert started(tmp_path).add_checkpoint(asked(0, 9)).status == 409
    assert cosigns(started(tmp_path), asked(7, 9))
    assert witness.add_checkpoint(asked(7, 8)).status == 409


def test_nothing_is_cosigned_when_it_cannot_be_remembered(witness: Witness, tmp_path: Path) -> None:
    assert cosigns(witness, asked(0, 7))
    with sqlite3.connect(tmp_path / "memory") as db:
        db.execute("CREATE TRIGGER no BEFORE INSERT ON latest BEGIN SELECT RAISE(ABORT, 'no'); END")
    with pytest.raises(sqlite3.Error):
        witness.add_checkpoint(asked(7, 9))
    with sqlite3.connect(tmp_path / "memory") as db:
        db.execute("DROP TRIGGER no")
    assert cosigns(witness, asked(7, 12))


def test_last_checkpoint_is_shown_with_both_signatures(witness: Witness) -> None:
    """Retrieval: "The response body MUST be a checkpoint for the log identified by the origin, and it MUST include the cosignature(s)" ... "and the cosignature from the log key(s) that the witness verified"; "If the witness has never cosigned a checkpoint for that log, it MUST respond with a "404"."""
    assert memory(witness).status == 404
    cosigns(witness, asked(0, 7))
    opened = SignedCheckpoint.open(memory(witness).body, LOG, [witness.key])
    assert (opened.checkpoint.size, list(opened.cosignatures)) == (7, [witness.key])


def test_it_is_served_over_http(tmp_path: Path) -> None:
    """ "The request MUST be an HTTP POST." and, for retrieval, "an HTTP GET"; the key is made once."""
    witness = open_witness("witness.example/w1", tmp_path / "w", [LOG])
    assert open_witness("witness.example/w1", tmp_path / "w", [LOG]).key == witness.key
    place = f"/{hashlib.sha256(LOG.name.encode()).hexdigest()}/checkpoint"

    async def main() -> None:
        app = application(witness)
        assert (await asked_of(app, "GET", "/add-checkpoint"))[0] == 405
        assert (await asked_of(app, "GET", place))[0] == 404
        assert (await asked_of(app, "POST", "/add-checkpoint", asked(0, 7)))[0] == 200
        assert await asked_of(app, "POST", "/add-checkpoint", asked(0, 7)) == (409, "text/x.tlog.size", b"7\n")
        assert (await asked_of(app, "GET", place))[0] == 200
        assert (await asked_of(app, "POST", place))[0] == 405
        assert (await asked_of(app, "POST", "/add-checkpoint", bytes(70_000)))[0] == 413

    asyncio.run(main())


def test_what_is_no_request_is_refused_by_its_parser() -> None:
    for bad in (b"old 1", b"old \n\n", b"\xff\n\n", b"new 1\n\nx"):
        with pytest.raises(NoteError):
            AddCheckpoint.parse(bad)
