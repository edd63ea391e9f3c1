"""Signed notes: a text, and lines that say who signed it (C2SP signed-note v1.0.0, tlog-cosignature).

Two types of signature are known, both Ed25519: of the text itself (0x01), and of the text at a time, as a witness makes it (0x04).
Signatures of other types, and of keys that nobody named, are carried along and prove nothing.
"""

from __future__ import annotations

import base64
import binascii
import enum
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

MAX_NOTE_BYTES = 1_000_000
MAX_SIGNATURES = 100
"""More than the 16 that every verifier must accept; a note with more is refused."""

_DASH = "— "
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")
_KEY_ID = re.compile(r"[0-9a-f]{8}")
_ED25519_BYTES = 32
_MAX_TIMESTAMP = 2**63 - 1


class NoteError(ValueError):
    """Not a note, not a key, or not signed as it must be. Says which."""


class SignatureType(enum.IntEnum):
    """What a key signs. The number is the type byte in its ID and its text form."""

    ED25519 = 0x01
    COSIGNATURE_V1 = 0x04


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """A public key that somebody has decided to trust.

    Attributes:
        name: like `example.org/broker-1`; never empty, without spaces and `+`.
        type: what its signatures sign.
        public: 32 bytes (RFC 8032).
    """

    name: str
    type: SignatureType
    public: bytes

    @classmethod
    def parse(cls, text: str) -> VerifierKey:
        """A key from its text form, `NAME+ID+KEY`.

        Raises:
            NoteError: not one, of another type, or its ID is not the ID of its key.
        """
        name, _, rest = text.partition("+")
        key_id, _, encoded = rest.partition("+")
        if not is_key_name(name) or not _KEY_ID.fullmatch(key_id):
            raise NoteError("a verifier key is NAME+ID+KEY, with an ID of 8 lower-case hex digits")
        data = decode_base64(encoded)
        try:
            kind = SignatureType(data[0])
        except (IndexError, ValueError):
            raise NoteError("a verifier key of a type that is not known here (known: 1, Ed25519; 4, cosignature/v1)") from None
        if len(data) != 1 + _ED25519_BYTES:
            raise NoteError("an Ed25519 verifier key has 32 bytes")
        key = cls(name, kind, data[1:])
        if key.id.hex() != key_id:
            raise NoteError("the ID in this verifier key is not the ID of its name and key: it was mistyped or changed")
        return key

    @property
    def id(self) -> bytes:
        """The first four bytes of SHA-256 of name, newline, type and key."""
        return hashlib.sha256(self.name.encode() + b"\n" + bytes([self.type]) + self.public).digest()[:4]

    def __str__(self) -> str:
        return f"{self.name}+{self.id.hex()}+{base64.b64encode(bytes([self.type]) + self.public).decode()}"

    def verifies(self, text: bytes, signature: bytes) -> bool:
        """Whether a signature, without the key ID, is this key's over a note's text."""
        message = text
        if self.type is SignatureType.COSIGNATURE_V1:
            timestamp, signature = int.from_bytes(signature[:8]), signature[8:]
            if timestamp > _MAX_TIMESTAMP:
                return False
            message = cosigned_message(text, timestamp)
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


@dataclass(frozen=True, slots=True)
class NoteSignature:
    """One signature line. `data` is what follows the key ID."""

    name: str
    key_id: bytes
    data: bytes

    def __str__(self) -> str:
        return f"{_DASH}{self.name} {base64.b64encode(self.key_id + self.data).decode()}\n"

    @classmethod
    def parse(cls, line: str) -> NoteSignature:
        """A signature from its line, without the newline.

        Raises:
            NoteError: not one.
        """
        name, _, encoded = line.removeprefix(_DASH).partition(" ")
        if not line.startswith(_DASH) or not is_key_name(name):
            raise NoteError("a signature line is a dash (U+2014), a key name and base64, one space between them")
        data = decode_base64(encoded)
        if len(data) <= 4:
            raise NoteError("a signature is longer than its key ID")
        return cls(name, data[:4], data[4:])

    @property
    def timestamp(self) -> int:
        """Of a cosignature: when it was made, seconds since the epoch."""
        return int.from_bytes(self.data[:8])


@dataclass(frozen=True, slots=True)
class Note:
    """A text that ends in a newline, and the signatures under it, not verified."""

    text: str
    signatures: tuple[NoteSignature, ...] = field(default=())

    @classmethod
    def parse(cls, data: bytes) -> Note:
        """A note from its bytes. What it says must not be believed before `verified` has said by whom.

        Raises:
            NoteError: not a note.
        """
        if len(data) > MAX_NOTE_BYTES:
            raise NoteError("a note of more than a million bytes")
        try:
            whole = data.decode()
        except UnicodeDecodeError:
            raise NoteError("a note is UTF-8") from None
        if _CONTROL.search(whole):
            raise NoteError("a note has no control characters but the newline")
        end = whole.rfind("\n\n")
        if end < 0 or not whole.endswith("\n"):
            raise NoteError("a note is a text, an empty line, and signature lines that end in newlines")
        lines = whole[end + 2 :].split("\n")[:-1]
        if not 1 <= len(lines) <= MAX_SIGNATURES:
            raise NoteError(f"a note has between 1 and {MAX_SIGNATURES} signatures")
        return cls(whole[: end + 1], tuple(NoteSignature.parse(line) for line in lines))

    def __bytes__(self) -> bytes:
        return (self.text + "\n" + "".join(map(str, self.signatures))).encode()

    def verified(self, keys: Iterable[VerifierKey]) -> dict[VerifierKey, NoteSignature]:
        """Which of these keys have signed, each with its signature.

        Raises:
            NoteError: none of them has, or a signature that names one of them is not its own.
        """
        known = {(key.name, key.id): key for key in keys}
        text, found = self.text.encode(), dict[VerifierKey, NoteSignature]()
        for signature in self.signatures:
            key = known.get((signature.name, signature.key_id))
            if key is None:
                continue
            if not key.verifies(text, signature.data):
                raise NoteError(f"the signature of {key.name} does not verify")
            found.setdefault(key, signature)
        if not found:
            raise NoteError("not signed by a key that is trusted here")
        return found


def is_key_name(name: str) -> bool:
    """Whether a name may stand in a signature line and a key: not empty, no space of any kind, no `+`."""
    return bool(name) and "+" not in name and not any(each.isspace() or each < " " for each in name)


def cosigned_message(text: bytes, timestamp: int) -> bytes:
    """What an Ed25519 cosignature signs: two lines, then the note's text. `timestamp` is seconds since the epoch."""
    return b"cosignature/v1\ntime %d\n" % timestamp + text


def decode_base64(text: str) -> bytes:
    """RFC 4648 section 4, with padding, and only the one way to write each value.

    Raises:
        NoteError: not that.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise NoteError("not base64") from None
    if base64.b64encode(data).decode() != text:
        raise NoteError("not base64 as RFC 4648 section 4 writes it")
    return data


def parse_decimal(text: str) -> int:
    """A number below 2^63 in decimal digits, without leading zeroes.

    Raises:
        NoteError: not that.
    """
    if not text.isascii() or not text.isdigit() or len(text) > 19 or (text != "0" and text[0] == "0") or int(text) >= 2**63:
        raise NoteError("not a decimal number below 2^63 without leading zeroes")
    return int(text)
