"""Is this signature good? Judged here, with the public key alone: no broker is asked and none has to be believed.

ECDSA: FIPS 186-5 and RFC 3279 section 2.2.3 (DER), IEEE 1363 (r and s side by side). RSA: RFC 8017, PSS with a salt as long as the
hash (RFC 7518 section 3.5). Ed25519: RFC 8032.
"""

from __future__ import annotations

import hashlib
from typing import BinaryIO

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import load_der_public_key

from keybroker.errors import KeyBrokerError
from keybroker.model.key import Algorithm
from keybroker.model.request import Format

_PIECE_BYTES = 1024 * 1024
_HASHES: dict[str, type[HashAlgorithm]] = {"sha256": SHA256, "sha384": SHA384, "sha512": SHA512}
_CURVES: dict[Algorithm, type[ec.EllipticCurve]] = {
    Algorithm.ES256: ec.SECP256R1,
    Algorithm.ES384: ec.SECP384R1,
    Algorithm.ES512: ec.SECP521R1,
}


class WrongKeyError(KeyBrokerError):
    """The public key cannot have made a signature of this algorithm."""


def is_good(spki: bytes, algorithm: Algorithm, content: bytes, signature: bytes, signature_format: Format = "der") -> bool:
    """Whether a signature verifies.

    Args:
        spki: the public key, DER SubjectPublicKeyInfo.
        algorithm: what it was signed with.
        content: the digest of the message; for Ed25519 the message itself (`signed_content` makes either).
        signature: the bytes as the broker released them.
        signature_format: of an ECDSA signature; ignored for the others.

    Raises:
        WrongKeyError: the key is not one for this algorithm, or not a public key.
    """
    try:
        key = load_der_public_key(spki)
    except (ValueError, UnsupportedAlgorithm) as err:
        raise WrongKeyError("this is not a public key that can be used") from err
    try:
        if isinstance(key, ed25519.Ed25519PublicKey) and algorithm is Algorithm.ED25519:
            key.verify(signature, content)
        elif isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES.get(algorithm, ())):
            der = signature if signature_format == "der" else _to_der(signature, key.curve.key_size)
            key.verify(der, content, ec.ECDSA(Prehashed(_hash(algorithm))))
        elif isinstance(key, rsa.RSAPublicKey) and algorithm.value.startswith(("PS", "RS")):
            key.verify(signature, content, _padding(algorithm), Prehashed(_hash(algorithm)))
        else:
            raise WrongKeyError(f"this is not a key for {algorithm.value}")
    except (InvalidSignature, ValueError):
        return False
    return True


def signed_content(algorithm: Algorithm, file: BinaryIO) -> bytes:
    """What is signed of a file: its digest, read piece by piece; for Ed25519 the whole of it."""
    if algorithm.signs_message:
        return file.read()
    digest = hashlib.new(algorithm.hash_name)
    while piece := file.read(_PIECE_BYTES):
        digest.update(piece)
    return digest.digest()


def _hash(algorithm: Algorithm) -> HashAlgorithm:
    return _HASHES[algorithm.hash_name]()


def _padding(algorithm: Algorithm) -> padding.AsymmetricPadding:
    if algorithm.value.startswith("RS"):
        return padding.PKCS1v15()
    digest = _hash(algorithm)
    return padding.PSS(padding.MGF1(digest), digest.digest_size)


def _to_der(signature: bytes, bits: int) -> bytes:
    size = (bits + 7) // 8
    if len(signature) != 2 * size:
        raise InvalidSignature
    return encode_dss_signature(int.from_bytes(signature[:size]), int.from_bytes(signature[size:]))
