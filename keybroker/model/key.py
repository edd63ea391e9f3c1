"""Keys and algorithms. Algorithm names are JOSE's (RFC 7518 section 3.1, RFC 9864 for Ed25519)."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

KEY_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class KeyFamily(enum.Enum):
    """What a key is, as far as policy cares."""

    EC_P256 = "ec-p256"
    EC_P384 = "ec-p384"
    EC_P521 = "ec-p521"
    RSA = "rsa"
    ED25519 = "ed25519"


class Algorithm(enum.Enum):
    """A signature algorithm. There is no default, ever."""

    ES256 = "ES256"
    ES384 = "ES384"
    ES512 = "ES512"
    PS256 = "PS256"
    PS384 = "PS384"
    PS512 = "PS512"
    RS256 = "RS256"
    RS384 = "RS384"
    RS512 = "RS512"
    ED25519 = "Ed25519"

    @property
    def family(self) -> KeyFamily:
        """The one key family that this algorithm is for."""
        return _FAMILIES[self]

    @property
    def hash_name(self) -> str:
        """The hash of the digest that is signed; for Ed25519 the hash under which the message is recorded."""
        return _HASHES[self]

    @property
    def digest_size(self) -> int:
        """Bytes of that digest."""
        return int(_HASHES[self][3:]) // 8

    @property
    def signs_message(self) -> bool:
        """True where the token needs the whole message (Ed25519, RFC 8032), so that there is no digest form."""
        return self is Algorithm.ED25519

    @property
    def is_ecdsa(self) -> bool:
        """True where a signature has two forms, DER and P1363."""
        return self in _ECDSA


_ECDSA = frozenset({Algorithm.ES256, Algorithm.ES384, Algorithm.ES512})
_FAMILIES = {
    Algorithm.ES256: KeyFamily.EC_P256,
    Algorithm.ES384: KeyFamily.EC_P384,
    Algorithm.ES512: KeyFamily.EC_P521,
    Algorithm.PS256: KeyFamily.RSA,
    Algorithm.PS384: KeyFamily.RSA,
    Algorithm.PS512: KeyFamily.RSA,
    Algorithm.RS256: KeyFamily.RSA,
    Algorithm.RS384: KeyFamily.RSA,
    Algorithm.RS512: KeyFamily.RSA,
    Algorithm.ED25519: KeyFamily.ED25519,
}
_HASHES = {algorithm: "sha512" if algorithm is Algorithm.ED25519 else f"sha{algorithm.value[2:]}" for algorithm in Algorithm}


@dataclass(frozen=True, slots=True)
class KeyVersion:
    """One version of a key, as pinned in the inventory.

    Attributes:
        name: the key's name, one namespace per broker.
        version: from 1.
        family: what its public key is.
        spki: the public key, DER SubjectPublicKeyInfo (RFC 5280 section 4.1.2.7). Every signature is checked against it.
        spki_sha256: of `spki`, lower-case hex.
        token: the configured name of the token that holds the private key.
        labels: free text by the administrator; part of the policy input.
    """

    name: str
    version: int
    family: KeyFamily
    spki: bytes
    spki_sha256: str
    token: str
    labels: tuple[tuple[str, str], ...]
