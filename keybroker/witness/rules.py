"""What a witness cosigns (C2SP tlog-witness, `add-checkpoint`): a checkpoint that is shown to continue the last one that it cosigned.

The last checkpoint of each log is compared and replaced in one transaction, and is on disk before the cosignature leaves.
"""

from __future__ import annotations

import base64
import hashlib
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keybroker.audit.checkpoint import Checkpoint, EmptyRootError
from keybroker.audit.merkle import EMPTY_ROOT, HASH_BYTES, ProofError, check_consistency
from keybroker.audit.note import Note, NoteError, NoteSignature, SignatureType, VerifierKey, cosigned_message, decode_base64, parse_decimal
from keybroker.clock import Clock

MAX_BODY_BYTES = 65_536
MAX_PROOF_LINES = 63
SIZE_MEDIA_TYPE = "text/x.tlog.size"

_TABLE = "CREATE TABLE IF NOT EXISTS latest (origin TEXT PRIMARY KEY, size INTEGER NOT NULL, root BLOB NOT NULL, note BLOB NOT NULL) STRICT"


@dataclass(frozen=True, slots=True)
class WitnessAnswer:
    """An HTTP answer."""

    status: int
    body: bytes = b""
    media_type: str = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class AddCheckpoint:
    """The body of a request."""

    old: int
    proof: tuple[bytes, ...]
    note: bytes = field(repr=False)

    @classmethod
    def parse(cls, data: bytes) -> AddCheckpoint:
        """A request from its bytes.

        Raises:
            NoteError: not one.
        """
        head, gap, note = data.partition(b"\n\n")
        try:
            first, *lines = head.decode("ascii").split("\n")
        except UnicodeDecodeError:
            raise NoteError("the lines before the checkpoint are ASCII") from None
        if not gap or not first.startswith("old "):
            raise NoteError("a request is an `old` line, proof lines, an empty line, and a checkpoint")
        proof = tuple(map(decode_base64, lines))
        if len(proof) > MAX_PROOF_LINES or any(len(each) != HASH_BYTES for each in proof):
            raise NoteError("at most 63 proof lines, of 32 bytes each")
        return cls(parse_decimal(first.removeprefix("old ")), proof, note)

    def __bytes__(self) -> bytes:
        lines = [f"old {self.old}", *(base64.b64encode(each).decode() for each in self.proof)]
        return "\n".join([*lines, "", ""]).encode() + self.note


class Witness:
    """Cosigns for the logs that it was told of.

    Args:
        name: of this witness.
        private: its key; for nothing else, and for no other witness.
        logs: verifier keys; several of one name are several keys of one log.
        state: file that remembers.
    """

    def __init__(self, name: str, private: Ed25519PrivateKey, logs: Iterable[VerifierKey], state: Path, clock: Clock) -> None:
        self.key = VerifierKey(name, SignatureType.COSIGNATURE_V1, private.public_key().public_bytes_raw())
        self._private = private
        self._logs: dict[str, list[VerifierKey]] = {}
        for log in logs:
            self._logs.setdefault(log.name, []).append(log)
        self._state = state
        self._clock = clock
        with closing(self._connect()) as db:
            db.execute(_TABLE)

    def add_checkpoint(self, body: bytes) -> WitnessAnswer:  # noqa: PLR0911  one line for each status
        """Cosign a checkpoint, or say why not. After an exception, nothing was remembered and nothing cosigned."""
        try:
            asked = AddCheckpoint.parse(body)
            note = Note.parse(asked.note)
        except NoteError as err:
            return _refused(400, err)
        origin = note.text.partition("\n")[0]
        keys = self._logs.get(origin)
        if keys is None:
            return _refused(404, "this witness does not know that log")
        try:
            verified = note.verified(keys)
        except NoteError as err:
            return _refused(403, err)
        try:
            head = Checkpoint.parse(note.text)
        except EmptyRootError as err:
            return _refused(422, err)
        except NoteError as err:
            return _refused(400, err)
        if asked.old > head.size:
            return _refused(400, "the old size is larger than the checkpoint's")
        return self._cosign(asked, head, Note(note.text, tuple(verified.values())))

    def latest(self, origin_hash: str) -> WitnessAnswer:
        """The last checkpoint of a log that was cosigned, with both signatures; the log by the SHA-256 of its origin, hex."""
        with closing(self._connect()) as db:
            for origin, note in db.execute("SELECT origin, note FROM latest"):
                if hashlib.sha256(origin.encode()).hexdigest() == origin_hash:
                    return WitnessAnswer(200, note)
        return _refused(404, "no checkpoint of that log was cosigned here")

    def _cosign(self, asked: AddCheckpoint, head: Checkpoint, note: Note) -> WitnessAnswer:
        with closing(self._connect()) as db:
            db.execute("BEGIN IMMEDIATE")
            row = db.execute("SELECT size, root FROM latest WHERE origin = ?", (head.origin,)).fetchone()
            size, root = row or (0, EMPTY_ROOT)
            if asked.old != size:
                return WitnessAnswer(409, b"%d\n" % size, SIZE_MEDIA_TYPE)
            try:
                check_consistency(size, root, head.size, head.root, asked.proof)
            except ProofError as err:
                return _refused(422, err)
            timestamp = self._clock.now_us() // 1_000_000
            data = timestamp.to_bytes(8) + self._private.sign(cosigned_message(note.text.encode(), timestamp))
            cosignature = NoteSignature(self.key.name, self.key.id, data)
            cosigned = bytes(Note(note.text, (*note.signatures, cosignature)))
            db.execute("INSERT OR REPLACE INTO latest VALUES (?, ?, ?, ?)", (head.origin, head.size, head.root, cosigned))
            db.execute("COMMIT")
        return WitnessAnswer(200, str(cosignature).encode())

    def _connect(self) -> sqlite3.Connection:
        """Closing it rolls back what was not committed."""
        db = sqlite3.connect(self._state, isolation_level=None, timeout=10)
        db.execute("PRAGMA synchronous = EXTRA")  # a rollback journal whose removal is on disk, too
        return db


def _refused(status: int, why: object) -> WitnessAnswer:
    return WitnessAnswer(status, f"{why}\n".encode())
