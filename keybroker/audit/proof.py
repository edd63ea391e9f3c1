"""Proof files: one record is in the log, to be checked by anyone, offline (C2SP tlog-proof v1)."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass

from keybroker.audit.checkpoint import SignedCheckpoint
from keybroker.audit.merkle import HASH_BYTES, ProofError, check_inclusion
from keybroker.audit.note import NoteError, VerifierKey, decode_base64, parse_decimal

HEADER = "c2sp.org/tlog-proof@v1"
SUFFIX = ".tlog-proof"
MAX_HASHES = 63


@dataclass(frozen=True, slots=True)
class TlogProof:
    """A proof as it stands in its file.

    Attributes:
        index: of the record.
        hashes: the audit path, from the record's sibling up.
        checkpoint: a signed note, byte for byte, not verified.
        extra: anything at all. It is not authenticated.
    """

    index: int
    hashes: tuple[bytes, ...]
    checkpoint: bytes
    extra: bytes = b""

    def __bytes__(self) -> bytes:
        lines = [HEADER]
        if self.extra:
            lines.append("extra " + base64.b64encode(self.extra).decode())
        lines.append(f"index {self.index}")
        lines += [base64.b64encode(each).decode() for each in self.hashes]
        return "\n".join([*lines, "", ""]).encode() + self.checkpoint

    @classmethod
    def parse(cls, data: bytes) -> TlogProof:
        """A proof from its bytes.

        Raises:
            NoteError: not one.
        """
        head, gap, checkpoint = data.partition(b"\n\n")
        try:
            lines = head.decode("ascii").split("\n")
        except UnicodeDecodeError:
            raise NoteError("the lines of a proof before its checkpoint are ASCII") from None
        if not gap or lines.pop(0) != HEADER:
            raise NoteError(f"a proof begins with the line {HEADER} and has an empty line before its checkpoint")
        extra = b""
        if lines and lines[0].startswith("extra "):
            extra = decode_base64(lines.pop(0).removeprefix("extra "))
        if not lines or not lines[0].startswith("index "):
            raise NoteError("a proof has an index line")
        index = parse_decimal(lines.pop(0).removeprefix("index "))
        hashes = tuple(decode_base64(line) for line in lines)
        if len(hashes) > MAX_HASHES or any(len(each) != HASH_BYTES for each in hashes):
            raise NoteError("a proof has at most 63 hashes, of 32 bytes each")
        return cls(index, hashes, checkpoint, extra)

    def verify(self, leaf: bytes, log: VerifierKey, witnesses: Iterable[VerifierKey] = (), *, quorum: int = 0) -> SignedCheckpoint:
        """Check that the record with this leaf hash is in the log.

        Args:
            leaf: computed from the record itself by whoever asks.
            log: the key of the log that is accepted.
            witnesses: keys of those whose word counts.
            quorum: how many of them must have cosigned.

        Raises:
            NoteError: the checkpoint is not the log's, or too few witnesses have cosigned it.
            ProofError: the record is not shown to be in it.
        """
        signed = SignedCheckpoint.open(self.checkpoint, log, witnesses)
        if len(signed.cosignatures) < quorum:
            raise NoteError(f"cosigned by {len(signed.cosignatures)} of the witnesses named; {quorum} are needed")
        head = signed.checkpoint
        if self.index >= head.size:
            raise ProofError("the checkpoint is older than the record")
        check_inclusion(leaf, self.index, head.size, head.root, self.hashes)
        return signed
