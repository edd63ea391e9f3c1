"""What a workload asks: one use of one key, typed and bounded. Parsed at the edge, and checked again inside."""

from __future__ import annotations

from typing import Literal

import msgspec

from keybroker.errors import InvalidError
from keybroker.model.key import Algorithm

MAX_MESSAGE_BYTES = 256 * 1024
MAX_BATCH_ITEMS = 1_000
MAX_BATCH_BYTES = 1024 * 1024
MAX_REASON_CHARACTERS = 1_024
MAX_MEDIA_TYPE_CHARACTERS = 127

Format = Literal["der", "p1363"]


class SignBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """The body of a sign request. The HTTP field names are these names.

    Attributes:
        algorithm: a JOSE name.
        message: what to sign; the broker hashes it. Base64 (RFC 4648 section 4) in JSON, bytes in a frame.
        digest: what to sign, already hashed. Exactly one of `message` and `digest` is given.
        format: of an ECDSA signature: `der` (RFC 3279 section 2.2.3) or `p1363` (r and s side by side). Absent otherwise.
        reason: why, for people who read the record.
        media_type: of the message, for policy.
    """

    algorithm: Algorithm
    message: bytes | msgspec.UnsetType = msgspec.UNSET
    digest: bytes | msgspec.UnsetType = msgspec.UNSET
    format: Format | msgspec.UnsetType = msgspec.UNSET
    reason: str = ""
    media_type: str = ""

    def __repr__(self) -> str:
        return f"SignBody(algorithm={self.algorithm.value})"  # payload bytes stay out of logs and tracebacks

    @property
    def is_digest(self) -> bool:
        """True where the caller hashed the message itself, which needs the operation `sign-digest`."""
        return self.digest is not msgspec.UNSET

    @property
    def content(self) -> bytes:
        """The message or the digest, whichever was given."""
        given = self.message if self.message is not msgspec.UNSET else self.digest
        return given if isinstance(given, bytes) else b""

    def check(self) -> None:
        """Refuse what the types alone cannot.

        Raises:
            InvalidError: with a JSON pointer for each fault.
        """
        faults: list[tuple[str, str]] = []
        if (self.message is msgspec.UNSET) == (self.digest is msgspec.UNSET):
            faults.append(("", "give exactly one of `message` and `digest`"))
        if isinstance(self.message, bytes) and len(self.message) > MAX_MESSAGE_BYTES:
            faults.append(("/message", f"at most {MAX_MESSAGE_BYTES} bytes; send a `digest` for more"))
        if isinstance(self.digest, bytes):
            if self.algorithm.signs_message:
                faults.append(("/digest", f"{self.algorithm.value} signs messages; send `message`"))
            elif len(self.digest) != self.algorithm.digest_size:
                faults.append(("/digest", f"{self.algorithm.value} takes a digest of {self.algorithm.digest_size} bytes"))
        if self.format is not msgspec.UNSET and not self.algorithm.is_ecdsa:
            faults.append(("/format", "only ECDSA signatures have a format"))
        if len(self.reason) > MAX_REASON_CHARACTERS:
            faults.append(("/reason", f"at most {MAX_REASON_CHARACTERS} characters"))
        if len(self.media_type) > MAX_MEDIA_TYPE_CHARACTERS or not self.media_type.isascii():
            faults.append(("/media_type", f"at most {MAX_MEDIA_TYPE_CHARACTERS} ASCII characters"))
        if faults:
            raise InvalidError("The request has fields that cannot be used.", pointers=tuple(faults))
