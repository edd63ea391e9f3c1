"""Frames between the authority and an hsm worker. A worker learns key references and bytes to sign, and nothing of users."""

from __future__ import annotations

from typing import Annotated

import msgspec

from keybroker.model.key import Algorithm

Word = Annotated[str, msgspec.Meta(pattern=r"\A[ -~]{1,64}\Z")]
"""What a worker calls something. It ends up in the record, so that a worker must not be able to make it long or odd."""
TokenText = Annotated[str, msgspec.Meta(max_length=64)]
"""What a token says of itself: at most 32 bytes by PKCS#11."""


class Work(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """The root of everything that an authority may ask of a worker."""


class OpenKey(Work, frozen=True):
    """Find a private key, judge its attributes, and keep its handle under `ref`.

    Attributes:
        ref: the authority's name for it: `NAME/VERSION`.
        label: CKA_LABEL; empty to ignore.
        object_id: CKA_ID; empty to ignore. At least one of the two is given.
    """

    ref: str
    label: str
    object_id: bytes


class SignTask(Work, frozen=True):
    """Sign with an open key. `data` is the digest, or for Ed25519 the message."""

    ref: str
    algorithm: Algorithm
    data: bytes


class Probe(Work, frozen=True):
    """Is the session alive? Costs one cheap call into the token."""


class OpenLog(Work, frozen=True):
    """Which log is signed for here, with which key, and what was signed last."""


class SignCheckpoint(Work, frozen=True):
    """Sign a checkpoint of the one log that this worker is configured for. The worker writes the note itself.

    Attributes:
        size: leaves of the log.
        root: its root.
        previous: the last signed checkpoint that the authority knows of, a signed note; empty if none.
        proof: that the log begins with what `previous` says (RFC 6962 section 2.1.2).
    """

    size: int
    root: bytes
    previous: bytes = b""
    proof: tuple[bytes, ...] = ()


class SignNotice(Work, frozen=True):
    """Sign a notice with the key that signs notices and nothing else. The worker writes what is signed itself (model/message_signature.py).

    Attributes:
        target: the URL that it goes to.
        digest: the value of `Content-Digest`.
        created: seconds since the epoch.
    """

    target: str
    digest: str
    created: int


AnyWork = OpenKey | SignTask | Probe | OpenLog | SignCheckpoint | SignNotice


class Task(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One piece of work; tasks of one connection are done in order."""

    id: int
    work: AnyWork


class Product(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """The root of everything that a worker may answer."""


class KeyOpened(Product, frozen=True):
    """The key is usable. `family` is a KeyFamily value, `spki` its DER SubjectPublicKeyInfo."""

    ref: str
    family: str
    bits: int
    spki: bytes


class KeyRefused(Product, frozen=True):
    """The key must not be used.

    `rule` is `key-missing`, `key-ambiguous`, `key-extractable`, `key-not-sensitive`, `key-always-authenticate`,
    `key-wrong-class`, `key-cannot-sign`, `key-unsupported`, `key-no-public-half`, `key-is-the-log-key`, `log-not-here`,
    `log-key-not-ed25519`, `key-is-the-notice-key`, `notice-key-not-here`, `notice-key-not-p256`, `notice-malformed` or
    `signature-does-not-verify`; `cure` is for the operator.
    """

    ref: str
    rule: Word
    cure: str


class RawSignature(Product, frozen=True):
    """A signature as PKCS#11 returns it (ECDSA: r and s side by side). `busy_ns` is the time inside the token."""

    signature: bytes
    busy_ns: int


class TaskFailed(Product, frozen=True):
    """The token refused or failed.

    Attributes:
        ckr: the CKR name, or the number in hex where it has none.
        may_have_signed: whether the token may have made a signature all the same.
        is_session_lost: the worker is about to end, so that a fresh session takes its place.
    """

    ckr: Word
    may_have_signed: bool
    is_session_lost: bool


class Alive(Product, frozen=True):
    """The session answers.

    Attributes:
        serial: the token's own.
        label: the token's own.
        open_keys: how many keys were opened.
        deadline_ms: a call that takes longer ends with the worker's death; 0 if nobody watches.
    """

    serial: TokenText
    label: TokenText
    open_keys: int
    deadline_ms: int = 0


class NeedsOperator(Product, frozen=True):
    """There is no session and no attempt at one: the token refused the PIN, and trying again could lock it.

    Attributes:
        reason: the CKR name, or `attempts-spent` where the token says that wrong PINs have been counted.
    """

    reason: Word


class LogOpened(Product, frozen=True):
    """The log that is signed for here.

    Attributes:
        key: the verifier key; its name is the log's origin.
        last: the last checkpoint that this worker has signed or was shown, a signed note; empty if none.
    """

    key: str
    last: bytes


class CheckpointSigned(Product, frozen=True):
    """The checkpoint, a signed note."""

    note: bytes


class CheckpointRefused(Product, frozen=True):
    """The checkpoint does not go with those that were signed before, or is none. `last` is as in `LogOpened`."""

    rule: Word
    last: bytes


class NoticeSigned(Product, frozen=True):
    """A signature over a notice that verifies: r and s side by side. `spki` is the public key, DER SubjectPublicKeyInfo."""

    signature: bytes
    spki: bytes


AnyProduct = (
    KeyOpened
    | KeyRefused
    | RawSignature
    | TaskFailed
    | Alive
    | NeedsOperator
    | LogOpened
    | CheckpointSigned
    | CheckpointRefused
    | NoticeSigned
)


class Result(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The product of the task with the same id."""

    id: int
    product: AnyProduct


MAX_TASK_BYTES = 512 * 1024  # one message of 256 KiB and room to spare
MAX_RESULT_BYTES = 64 * 1024
