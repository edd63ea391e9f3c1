"""What is signed of a notice: RFC 9421 (HTTP Message Signatures) over RFC 9530 (Content-Digest), one shape only.

Method, target and content are covered, and `created` and `keyid` as parameters. The tag is keybroker's own, so that a signature made for a
notice is none for anything else. The key is P-256: `ecdsa-p256-sha256`, r and s side by side (RFC 9421 section 3.3.4).
"""

from __future__ import annotations

import base64
import hashlib
import re

METHOD = "POST"
LABEL = "notice"
TAG = "keybroker-notice"
MAX_TARGET_CHARACTERS = 2_048

_TARGET = re.compile(r"https://[a-z0-9.-]+(?!:443/)(:[1-9][0-9]{0,4})?/[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*")
_DIGEST = re.compile(r"sha-256=:[A-Za-z0-9+/]{43}=:")
_KEY_ID = re.compile(r"[0-9a-f]{64}")
_MAX_CREATED = 2**40


class ComponentError(ValueError):
    """A component cannot stand in a signature base. The text names it."""


def is_target(url: str) -> bool:
    """Whether notices may go to a URL, in the spelling that a receiver sees: `https`, lower case, a path, no default port."""
    return len(url) <= MAX_TARGET_CHARACTERS and bool(_TARGET.fullmatch(url))


def content_digest(content: bytes) -> str:
    """The value of `Content-Digest`."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


def parameters(created: int, key_id: str) -> str:
    """Covered components and parameters: the value of `Signature-Input` without its label.

    Args:
        created: seconds since the epoch.
        key_id: SHA-256 of the public key (DER SubjectPublicKeyInfo), lower-case hex.

    Raises:
        ComponentError: one of the two cannot be.
    """
    if not 0 < created < _MAX_CREATED:
        raise ComponentError("created")
    if not _KEY_ID.fullmatch(key_id):
        raise ComponentError("keyid")
    return f'("@method" "@target-uri" "content-digest");created={created};keyid="{key_id}";alg="ecdsa-p256-sha256";tag="{TAG}"'


def signature_base(target: str, digest: str, created: int, key_id: str) -> bytes:
    """What is hashed and signed (RFC 9421 section 2.5).

    Args:
        target: the whole URL.
        digest: the value of `Content-Digest`.
        created: as for `parameters`.
        key_id: as for `parameters`.

    Raises:
        ComponentError: one of them cannot be.
    """
    if not is_target(target):
        raise ComponentError("@target-uri")
    if not _DIGEST.fullmatch(digest):
        raise ComponentError("content-digest")
    lines = (
        f'"@method": {METHOD}',
        f'"@target-uri": {target}',
        f'"content-digest": {digest}',
        f'"@signature-params": {parameters(created, key_id)}',
    )
    return "\n".join(lines).encode("ascii")


def header_fields(digest: str, created: int, key_id: str, signature: bytes) -> tuple[tuple[str, str], ...]:
    """The fields that carry a signature."""
    return (
        ("Content-Digest", digest),
        ("Signature-Input", f"{LABEL}={parameters(created, key_id)}"),
        ("Signature", f"{LABEL}=:{base64.b64encode(signature).decode()}:"),
    )
