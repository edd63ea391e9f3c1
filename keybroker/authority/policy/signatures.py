"""Who signed a policy bundle, and what: OPA's `.signatures.json` (https://www.openpolicyagent.org/docs/management-bundles#signing).

One JSON Web Signature (RFC 7515) over the name and SHA-256 of every file. Files that OPA takes for data are hashed as what they say,
not as they are written: keys in order, without spaces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from keybroker.audit.leaf import canonical
from keybroker.errors import ConfigError

PublicKey = EllipticCurvePublicKey | RSAPublicKey
PrivateKey = EllipticCurvePrivateKey | RSAPrivateKey

MAX_SIGNATURE_BYTES = 2 * 1024 * 1024  # it names every file
_SHA256 = "SHA-256"
_STRUCTURED = frozenset({".manifest", "data.json"})  # of the files that a bundle of ours may hold
_OF_CURVE = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_OF_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_MIN_RSA_BITS = 2048
_HEADER_FIELDS = frozenset({"alg", "typ", "kid"})


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    hash: str
    algorithm: str = _SHA256


class _Claims(msgspec.Struct, frozen=True):
    """What is signed. Others may have claims of their own in it."""

    files: tuple[_File, ...]
    scope: str = ""


class _Signatures(msgspec.Struct, frozen=True):
    signatures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BundleKeys:
    """Whose signature makes a bundle good.

    Attributes:
        keys: any of them; each with the JOSE algorithms that it may be used with.
        scope: must stand in the signature, so that a bundle for the laboratory is none for production; empty for none.
    """

    keys: tuple[tuple[PublicKey, tuple[str, ...]], ...] = field(repr=False)
    scope: str

    @classmethod
    def load(cls, paths: Iterable[Path], scope: str) -> BundleKeys:
        """Read public keys, PEM.

        Raises:
            ConfigError: one cannot be used.
        """
        keys = []
        for path in paths:
            try:
                key = load_pem_public_key(path.read_bytes())
            except OSError as err:
                raise ConfigError(f"{path}: cannot be read: {err.strerror}") from err
            except (ValueError, UnsupportedAlgorithm) as err:
                raise ConfigError(f"{path}: not a public key in PEM, such as `openssl pkey -pubout` writes") from err
            keys.append((_usable(key, path), algorithms_of(key, path)))
        if not keys:
            raise ConfigError("a policy bundle needs at least one key to verify it with")
        return cls(tuple(keys), scope)


def signing_key(path: Path) -> PrivateKey:
    """A private key that bundles are signed with, PEM, unencrypted.

    Raises:
        ConfigError: it cannot be used.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read: {err.strerror}") from err
    except (ValueError, TypeError, UnsupportedAlgorithm) as err:
        raise ConfigError(f"{path}: not an unencrypted private key in PEM") from err
    if not isinstance(key, EllipticCurvePrivateKey | RSAPrivateKey):
        raise ConfigError(f"{path}: bundles are signed with EC (P-256, P-384, P-521) or RSA keys")
    algorithms_of(key.public_key(), path)
    return key


def algorithms_of(key: object, path: Path) -> tuple[str, ...]:
    """The JOSE algorithms of a public key; the first is the one to sign with.

    Raises:
        ConfigError: none that bundles are signed with.
    """
    if isinstance(key, EllipticCurvePublicKey) and key.curve.name in _OF_CURVE:
        return (_OF_CURVE[key.curve.name],)
    if isinstance(key, RSAPublicKey) and key.key_size >= _MIN_RSA_BITS:
        return _OF_RSA
    raise ConfigError(f"{path}: bundles are signed with EC (P-256, P-384, P-521) or RSA keys of at least {_MIN_RSA_BITS} bits")


def sign(members: Mapping[str, bytes], key: PrivateKey, scope: str) -> bytes:
    """The `.signatures.json` over the other files of a bundle."""
    files = [{"algorithm": _SHA256, "hash": digest_of(name, data), "name": name} for name, data in sorted(members.items())]
    claims = {"files": files, **({"scope": scope} if scope else {})}
    (algorithm, *_) = algorithms_of(key.public_key(), Path())
    token = jwt.PyJWS().encode(json.dumps(claims).encode(), key, algorithm)
    return json.dumps({"signatures": [token]}).encode()


def verify(members: Mapping[str, bytes], signatures: bytes, keys: BundleKeys, source: str) -> None:
    """Hold the files of a bundle against its signature.

    Args:
        members: every file but the signature itself, by name.
        signatures: the content of `.signatures.json`.
        source: where the bundle came from, for errors.

    Raises:
        ConfigError: nobody whose signature counts has signed exactly these files for this scope.
    """
    claims = _signed_claims(signatures, keys, source)
    if claims.scope != keys.scope:
        raise ConfigError(f"{source}: is signed for the scope {ascii(claims.scope)[:80]}, and this broker wants {keys.scope!r}")
    signed = {each.name.removeprefix("/"): each for each in claims.files}
    if len(signed) != len(claims.files):
        raise ConfigError(f"{source}: its signature names a file twice")
    if signed.keys() != members.keys():
        odd = min(signed.keys() ^ members.keys())
        raise ConfigError(f"{source}: its signature is not over the files that it holds; see {ascii(odd)[:200]}")
    for name, data in members.items():
        try:
            digest = digest_of(name, data)
        except (ValueError, RecursionError) as err:
            raise ConfigError(f"{source}: {name} is not JSON") from err
        if signed[name].algorithm != _SHA256 or signed[name].hash != digest:
            raise ConfigError(f"{source}: {name} is not what was signed")


def _signed_claims(signatures: bytes, keys: BundleKeys, source: str) -> _Claims:
    """What was signed, from the first key that verifies."""
    try:
        if len(signatures) > MAX_SIGNATURE_BYTES:
            raise ValueError
        (token,) = msgspec.json.decode(signatures, type=_Signatures).signatures
    except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError) as err:
        raise ConfigError(f"{source}: its .signatures.json must hold one signature, at most {MAX_SIGNATURE_BYTES} bytes") from err
    for key, algorithms in keys.keys:
        try:
            verified = jwt.PyJWS().decode_complete(token, key, algorithms=algorithms)
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            continue
        if not verified["header"].keys() <= _HEADER_FIELDS:
            raise ConfigError(f"{source}: its signature has header fields that nobody here knows")
        try:
            return msgspec.json.decode(verified["payload"], type=_Claims)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as err:
            raise ConfigError(f"{source}: what is signed is not a list of files") from err
    raise ConfigError(f"{source}: is not signed by a key that this broker trusts")


def digest_of(name: str, data: bytes) -> str:
    """The hash of a file, lower-case hex, as OPA computes it.

    Raises:
        ValueError: a file of data that is not JSON.
    """
    if name in _STRUCTURED:
        # Our canonical JSON is Go's, but for two characters, and numbers such as 1.0, which no file of ours holds and none is hashed for.
        data = canonical(msgspec.json.decode(data)).replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
    return hashlib.sha256(data).hexdigest()


def _usable(key: object, path: Path) -> PublicKey:
    if isinstance(key, EllipticCurvePublicKey | RSAPublicKey):
        return key
    raise ConfigError(f"{path}: bundles are signed with EC or RSA keys")
