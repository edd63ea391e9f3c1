"""The log's key signs checkpoints of one log, each of which continues those before, and nothing else."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keybroker.audit.checkpoint import SignedCheckpoint
from keybroker.audit.leaf import leaf_hash
from keybroker.audit.merkle import MAX_SIZE, consistency_proof, root_of
from keybroker.audit.note import Note, NoteSignature, SignatureType, VerifierKey
from keybroker.hsm.log_signer import LogSigner
from keybroker.model.task import CheckpointRefused, CheckpointSigned, LogOpened, SignCheckpoint

PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(32))
KEY = VerifierKey("example.org/log", SignatureType.ED25519, PRIVATE.public_key().public_bytes_raw())
LEAVES = [leaf_hash(b"%d" % number) for number in range(40)]
OTHERS = [leaf_hash(b"other %d" % number) for number in range(40)]


def signer() -> LogSigner:
    return LogSigner(KEY, PRIVATE.sign)


def task(size: int, previous: bytes = b"", leaves: list[bytes] = LEAVES) -> SignCheckpoint:
    """What an honest authority would ask."""
    before = SignedCheckpoint.open(previous, KEY).checkpoint.size if previous else 0
    proof = consistency_proof(min(before, size), size, lambda level, index: root_of(leaves[index << level : index + 1 << level]))
    return SignCheckpoint(size, root_of(leaves[:size]), previous, tuple(proof))


def signed(log: LogSigner, asked: SignCheckpoint) -> bytes:
    product = log.sign(asked)
    assert isinstance(product, CheckpointSigned), product
    return product.note


def refused(log: LogSigner, asked: SignCheckpoint) -> str:
    before = log.opened()
    product = log.sign(asked)
    assert isinstance(product, CheckpointRefused), product
    assert log.opened() == before
    assert product.last == before.last
    return product.rule


def test_checkpoint_is_signed_when_it_continues_the_one_before() -> None:
    log = signer()
    assert log.opened() == LogOpened(str(KEY), b"")
    note = signed(log, task(7))
    for size in (7, 8, 31):
        note = signed(log, task(size, note))
        head = SignedCheckpoint.open(note, KEY).checkpoint
        assert (head.origin, head.size, head.root) == ("example.org/log", size, root_of(LEAVES[:size]))
        assert log.opened().last == note


def test_checkpoint_is_refused_when_it_is_smaller_or_another_or_does_not_continue() -> None:
    log = signer()
    seven = signed(log, task(7))
    nine = signed(log, task(9, seven))
    assert refused(log, task(8, seven)) == "smaller-than-signed"
    assert refused(log, SignCheckpoint(7, root_of(LEAVES[:7]), seven)) == "smaller-than-signed"
    assert refused(log, task(12, seven)) == "previous-is-not-the-last"
    assert refused(log, task(12)) == "previous-is-not-the-last"
    assert refused(log, SignCheckpoint(9, root_of(OTHERS[:9]), nine)) == "inconsistent"
    assert refused(log, task(12, nine, OTHERS)) == "inconsistent"
    assert refused(log, SignCheckpoint(12, root_of(LEAVES[:12]), nine)) == "inconsistent"
    signed(log, task(12, nine))


def test_worker_that_started_anew_continues_what_its_key_has_signed() -> None:
    note = signed(signer(), task(9))
    fresh = signer()
    assert refused(fresh, task(12, note, OTHERS)) == "inconsistent"
    signed(fresh, task(12, note))
    assert refused(fresh, task(11, note)) == "smaller-than-signed"


def test_worker_adopts_what_another_worker_has_signed_in_the_meantime() -> None:
    one, two = signer(), signer()
    note = signed(one, task(5))
    note = signed(two, task(9, note))
    note = signed(one, task(12, note))
    assert SignedCheckpoint.open(note, KEY).checkpoint.size == 12


def test_fork_is_refused_when_two_workers_were_shown_two_logs() -> None:
    one, two = signer(), signer()
    signed(one, task(9))
    other = signed(two, task(9, leaves=OTHERS))
    assert refused(one, task(12, other, OTHERS)) == "fork"


def test_previous_checkpoint_counts_only_when_this_key_has_signed_it() -> None:
    note = signed(signer(), task(9))
    stranger = Ed25519PrivateKey.generate()
    text = Note.parse(note).text
    forged = bytes(Note(text, (NoteSignature(KEY.name, KEY.id, stranger.sign(text.encode())),)))
    for bad in (forged, note[:-5], b"not a note", note.replace(b"\n9\n", b"\n8\n")):
        assert refused(signer(), SignCheckpoint(12, root_of(LEAVES[:12]), bad)) == "previous-not-signed-by-this-key"


def test_what_is_no_checkpoint_is_refused() -> None:
    for bad in (SignCheckpoint(0, bytes(32)), SignCheckpoint(-1, bytes(32)), SignCheckpoint(MAX_SIZE + 1, bytes(32))):
        assert refused(signer(), bad) == "malformed"
    for root in (b"", bytes(31), bytes(33), b"\n" * 40):
        assert refused(signer(), SignCheckpoint(1, root)) == "malformed"


def test_signature_that_does_not_verify_is_not_given_out_and_not_remembered() -> None:
    lies = [True]
    log = LogSigner(KEY, lambda text: PRIVATE.sign(text + b"x") if lies else PRIVATE.sign(text))
    assert refused(log, task(7)) == "signature-does-not-verify"
    lies.clear()
    signed(log, task(7))
