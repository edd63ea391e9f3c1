"""Signs checkpoints of one log, and never two that contradict each other (C2SP tlog-checkpoint, "Signatures").

The worker writes the note itself, from size and root, so that its key can sign nothing else. It remembers the last checkpoint that it
signed, and takes from the authority the last that another worker has signed, whose signature it checks; a new one must be shown to
continue both. A worker that was started anew remembers nothing, and believes the first checkpoint that its own key has signed.
"""

from __future__ import annotations

from collections.abc import Callable

from keybroker.audit.checkpoint import Checkpoint, SignedCheckpoint
from keybroker.audit.merkle import EMPTY_ROOT, HASH_BYTES, MAX_SIZE, ProofError, check_consistency
from keybroker.audit.note import Note, NoteError, NoteSignature, SignatureType, VerifierKey
from keybroker.model.task import CheckpointRefused, CheckpointSigned, KeyOpened, LogOpened, SignCheckpoint

_ED25519_BYTES = 32  # at the end of its SubjectPublicKeyInfo (RFC 8410 section 4)


def log_verifier_key(origin: str, opened: KeyOpened) -> VerifierKey:
    """The public half of a log's key, as others are given it."""
    return VerifierKey(origin, SignatureType.ED25519, opened.spki[-_ED25519_BYTES:])


class LogSigner:
    """The log's key and what it has said so far.

    Args:
        key: its public half; the name is the log's origin.
        sign: an Ed25519 signature of the private half; may raise what a token raises, and then nothing was signed.
    """

    def __init__(self, key: VerifierKey, sign: Callable[[bytes], bytes]) -> None:
        self._key = key
        self._sign = sign
        self._last = b""
        self._head = Checkpoint(key.name, 0, EMPTY_ROOT)

    def opened(self) -> LogOpened:
        """Which log this is, and what was signed last."""
        return LogOpened(str(self._key), self._last)

    def sign(self, task: SignCheckpoint) -> CheckpointSigned | CheckpointRefused:
        """A new checkpoint, or the rule that it would break."""
        try:
            previous = SignedCheckpoint.open(task.previous, self._key).checkpoint if task.previous else None
        except NoteError:
            return self._refused("previous-not-signed-by-this-key")
        rule = self._rule_broken(task, previous)
        if rule:
            return self._refused(rule)
        head = Checkpoint(self._key.name, task.size, task.root)
        text = head.text()
        signature = self._sign(text.encode())
        if not self._key.verifies(text.encode(), signature):
            return self._refused("signature-does-not-verify")
        note = bytes(Note(text, (NoteSignature(self._key.name, self._key.id, signature),)))
        self._last, self._head = note, head
        return CheckpointSigned(note)

    def _rule_broken(self, task: SignCheckpoint, previous: Checkpoint | None) -> str:
        """What is wrong with a request; empty if nothing is."""
        before = previous or Checkpoint(self._key.name, 0, EMPTY_ROOT)
        if not 0 < task.size <= MAX_SIZE or len(task.root) != HASH_BYTES:
            return "malformed"
        if task.size < max(before.size, self._head.size):
            return "smaller-than-signed"
        if before.size < self._head.size:
            return "previous-is-not-the-last"
        if before.size == self._head.size and before.root != self._head.root:
            return "fork"
        try:
            check_consistency(before.size, before.root, task.size, task.root, task.proof)
        except ProofError:
            return "inconsistent"
        return ""

    def _refused(self, rule: str) -> CheckpointRefused:
        return CheckpointRefused(rule, self._last)
