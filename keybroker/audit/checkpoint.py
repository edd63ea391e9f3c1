"""Checkpoints: what a log said of itself at one size, as a signed note (C2SP tlog-checkpoint v1.0.0)."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass

from keybroker.audit.merkle import EMPTY_ROOT, HASH_BYTES
from keybroker.audit.note import Note, NoteError, NoteSignature, VerifierKey, decode_base64, parse_decimal


class EmptyRootError(NoteError):
    """A checkpoint of an empty log whose root is not the empty tree's."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tree head.

    Attributes:
        origin: which log.
        size: its leaves.
        root: the RFC 6962 root over them; 32 bytes.
        extensions: further lines. Nobody can check what they say.
    """

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()

    def text(self) -> str:
        """What is signed."""
        return "\n".join((self.origin, str(self.size), base64.b64encode(self.root).decode(), *self.extensions)) + "\n"

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """A checkpoint from a note's text.

        Raises:
            NoteError: not one.
        """
        lines = text.split("\n")
        if len(lines) < 4 or lines.pop() or not all(lines):
            raise NoteError("a checkpoint is at least three lines: origin, size and root, none of them empty")
        origin, size, root, *extensions = lines
        found = cls(origin, parse_decimal(size), decode_base64(root), tuple(extensions))
        if len(found.root) != HASH_BYTES:
            raise NoteError("the root in a checkpoint has 32 bytes")
        if found.size == 0 and found.root != EMPTY_ROOT:
            raise EmptyRootError("a checkpoint of an empty log has another root than the empty tree")
        return found


@dataclass(frozen=True, slots=True)
class SignedCheckpoint:
    """A checkpoint whose log's signature was verified.

    Attributes:
        note: as it was read, byte for byte.
        cosignatures: those of witnesses that were named, verified too.
    """

    checkpoint: Checkpoint
    note: bytes
    cosignatures: dict[VerifierKey, NoteSignature]

    @classmethod
    def open(cls, data: bytes, log: VerifierKey | Iterable[VerifierKey], witnesses: Iterable[VerifierKey] = ()) -> SignedCheckpoint:
        """Read and verify.

        Args:
            data: a signed note.
            log: the log's key, or those that it has had. Their name is the origin that is accepted.
            witnesses: keys whose cosignatures are looked for.

        Raises:
            NoteError: not a checkpoint, of another log, or not signed by it.
        """
        keys = (log,) if isinstance(log, VerifierKey) else tuple(log)
        note = Note.parse(data)
        checkpoint = Checkpoint.parse(note.text)
        if checkpoint.origin not in {key.name for key in keys}:
            raise NoteError("a checkpoint of another log")
        verified = note.verified((*keys, *witnesses))
        if not any(key in verified and key.name == checkpoint.origin for key in keys):
            raise NoteError("not signed by the log's key")
        return cls(checkpoint, data, {key: signature for key, signature in verified.items() if key not in keys})
