"""Signs notices, and nothing else: the worker writes the signature base itself, so that its key can sign nothing of any other form."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from keybroker.model.message_signature import ComponentError, signature_base
from keybroker.model.task import KeyRefused, NoticeSigned, SignNotice

_REF = "notices"
_HALF = 32  # bytes of r, and of s


class NoticeSigner:
    """The key that signs notices.

    Args:
        spki: its public half, P-256, DER SubjectPublicKeyInfo.
        sign: signs a digest; may raise what a token raises, and then nothing was signed.
    """

    def __init__(self, spki: bytes, sign: Callable[[bytes], bytes]) -> None:
        self._spki = spki
        self._key_id = hashlib.sha256(spki).hexdigest()
        self._sign = sign

    def sign(self, task: SignNotice) -> NoticeSigned | KeyRefused:
        """A signature that verifies, or why there is none."""
        try:
            base = signature_base(task.target, task.digest, task.created, self._key_id)
        except ComponentError:
            return KeyRefused(_REF, "notice-malformed", "the authority asked for something that is no notice")
        digest = hashlib.sha256(base).digest()
        signature = self._sign(digest)
        if not self._verifies(digest, signature):
            return KeyRefused(_REF, "signature-does-not-verify", "the token makes wrong signatures; take it out of service")
        return NoticeSigned(signature, self._spki)

    def _verifies(self, digest: bytes, signature: bytes) -> bool:
        key = load_der_public_key(self._spki)
        if len(signature) != 2 * _HALF or not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        der = encode_dss_signature(int.from_bytes(signature[:_HALF]), int.from_bytes(signature[_HALF:]))
        try:
            key.verify(der, digest, ec.ECDSA(Prehashed(SHA256())))
        except InvalidSignature:
            return False
        return True
