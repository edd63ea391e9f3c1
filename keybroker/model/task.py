"""Frames between the authority and an hsm worker. A worker learns key references and bytes to sign, and nothing of users."""

from __future__ import annotations

import msgspec

from keybroker.model.key import Algorithm


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


AnyWork = OpenKey | SignTask | Probe


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
    `key-wrong-class`, `key-cannot-sign`, `key-unsupported` or `key-no-public-half`; `cure` is for the operator.
    """

    ref: str
    rule: str
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

    ckr: str
    may_have_signed: bool
    is_session_lost: bool


class Alive(Product, frozen=True):
    """The session answers. Serial and label are the token's own."""

    serial: str
    label: str
    open_keys: int


AnyProduct = KeyOpened | KeyRefused | RawSignature | TaskFailed | Alive


class Result(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The product of the task with the same id."""

    id: int
    product: AnyProduct


MAX_TASK_BYTES = 512 * 1024  # one message of 256 KiB and room to spare
MAX_RESULT_BYTES = 64 * 1024
