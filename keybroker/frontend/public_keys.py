"""Public keys in the three forms that programs want: PEM (RFC 7468), JWK (RFC 7517, 7518, 8037, 9864) and OpenSSH (RFC 4253, 8709)."""

from __future__ import annotations

import base64
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from keybroker.model.call import KeyReply, PublicVersion

_CURVES = {"secp256r1": ("P-256", "ES256"), "secp384r1": ("P-384", "ES384"), "secp521r1": ("P-521", "ES512")}


def pem(spki: bytes) -> str:
    """A DER SubjectPublicKeyInfo as PEM."""
    return load_der_public_key(spki).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def openssh(name: str, version: PublicVersion) -> str:
    """One line for `authorized_keys` or `allowed_signers`, with `NAME/VERSION` as its comment."""
    line = load_der_public_key(version.spki).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return f"{line} {name}/{version.version}\n"


def jwk(key: KeyReply, version: PublicVersion) -> dict[str, Any]:
    """A JWK. `kid` is `NAME/VERSION`; `alg` is there where the key does only one."""
    made = _parameters(version.spki)
    alg = made.pop("alg", "") or (key.algorithms[0] if len(key.algorithms) == 1 else "")
    return {"kid": f"{key.name}/{version.version}", "use": "sig", **({"alg": alg} if alg else {}), **made}


def jwk_set(keys: tuple[KeyReply, ...]) -> dict[str, Any]:
    """Every version of every key: whoever verifies needs the old ones too."""
    return {"keys": [jwk(key, version) for key in keys for version in key.versions]}


def _parameters(spki: bytes) -> dict[str, str]:
    """The members that are the key itself, and `alg` where the kind of key decides it.

    Raises:
        ValueError: a kind of key that has no JOSE algorithm here.
    """
    key = load_der_public_key(spki)
    if isinstance(key, ec.EllipticCurvePublicKey):
        curve, alg = _CURVES[key.curve.name]
        point, size = key.public_numbers(), (key.key_size + 7) // 8
        return {"kty": "EC", "crv": curve, "x": _unpadded(point.x.to_bytes(size)), "y": _unpadded(point.y.to_bytes(size)), "alg": alg}
    if isinstance(key, ed25519.Ed25519PublicKey):
        return {"kty": "OKP", "crv": "Ed25519", "x": _unpadded(key.public_bytes_raw()), "alg": "Ed25519"}
    if isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        return {"kty": "RSA", "n": _number(numbers.n), "e": _number(numbers.e)}
    raise ValueError("a public key of no kind that signs here")


def _number(value: int) -> str:
    """Base64urlUInt: as few bytes as it takes (RFC 7518 section 2)."""
    return _unpadded(value.to_bytes((value.bit_length() + 7) // 8))


def _unpadded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
