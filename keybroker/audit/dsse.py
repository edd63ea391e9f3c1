"""Signed envelopes: DSSE version 1 (secure-systems-lab, protocol.md and envelope.md), narrowed so that an envelope has one spelling.

Envelopes end up in the record, and a record must not be readable in two ways. So, beyond DSSE: canonical JSON (RFC 8785), no other
members, exactly one signature, its `keyid`, and standard base64 with padding (RFC 4648 section 4). What is made here is DSSE, and any
DSSE verifier takes it.

The key alone says how it signs; nothing in an envelope is asked about that:

- ECDSA (FIPS 186-5, DER form of RFC 3279): P-256 with SHA-256, P-384 with SHA-384, P-521 with SHA-512.
- RSA, 2,048 to 8,192 bits: RSASSA-PSS (RFC 8017) with SHA-256, MGF1 with SHA-256, and a salt of 32 bytes.
- Ed25519 (RFC 8032).
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from keybroker.audit.leaf import canonical

MAX_ENVELOPE_BYTES = 32 * 1024
MIN_RSA_BITS = 2_048
MAX_RSA_BITS = 8_192

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
_PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey

_HASHES: dict[str, type[SHA256 | SHA384 | SHA512]] = {"secp256r1": SHA256, "secp384r1": SHA384, "secp521r1": SHA512}
_PSS = padding.PSS(padding.MGF1(SHA256()), SHA256.digest_size)


class EnvelopeError(ValueError):
    """This is not an envelope that can be believed. `rule` is a stable name for what is wrong; nothing of the data is repeated."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One signature. `keyid` is the SHA-256 of the signer's public key (DER SubjectPublicKeyInfo), lower-case hex."""

    keyid: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    sig: bytes


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """A DSSE envelope, as it is written in JSON."""

    payload: bytes
    payload_type: str
    signatures: tuple[Signature]


_decode = msgspec.json.Decoder(Envelope).decode


def pae(payload_type: str, payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def signed(payload_type: str, payload: bytes, key: PrivateKey) -> bytes:
    """The envelope of a payload, canonical JSON.

    Raises:
        EnvelopeError: `key-unfit`: a key of a kind or size that signs no envelopes; `too-large`.
    """
    public = key.public_key()
    _require_fit(public)
    message = pae(payload_type, payload)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        signature = key.sign(message)
    elif isinstance(key, rsa.RSAPrivateKey):
        signature = key.sign(message, _PSS, SHA256())
    else:
        signature = key.sign(message, ec.ECDSA(_HASHES[key.curve.name]()))
    spki = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    data = canonical(Envelope(payload, payload_type, (Signature(key_id(spki), signature),)))
    if len(data) > MAX_ENVELOPE_BYTES:
        raise EnvelopeError("too-large")
    return data


def verified(data: bytes, payload_type: str, spki: bytes) -> bytes:
    """The payload of an envelope that one key has signed. There is no way to a payload that nobody has signed.

    Args:
        data: the envelope.
        payload_type: the one that is expected.
        spki: the signer's public key, DER SubjectPublicKeyInfo, from a certificate that has been validated.

    Raises:
        EnvelopeError: names the rule.
    """
    envelope = _parsed(data)
    if envelope.payload_type != payload_type:
        raise EnvelopeError("another-payload-type")
    key = _public_key(spki)
    (signature,) = envelope.signatures
    if signature.keyid != key_id(spki):
        raise EnvelopeError("another-key")
    if not _is_good(key, pae(payload_type, envelope.payload), signature.sig):
        raise EnvelopeError("bad-signature")
    return envelope.payload


def key_id(spki: bytes) -> str:
    """SHA-256 of a public key (DER SubjectPublicKeyInfo), lower-case hex."""
    return hashlib.sha256(spki).hexdigest()


def _parsed(data: bytes) -> Envelope:
    if len(data) > MAX_ENVELOPE_BYTES:
        raise EnvelopeError("too-large")
    try:
        envelope = _decode(data)
        is_canonical = canonical(envelope) == data  # a member twice, white space, bits beyond the end of base64: all show here
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as err:
        raise EnvelopeError("not-an-envelope") from err
    if not is_canonical:
        raise EnvelopeError("envelope-not-canonical")
    return envelope


def _public_key(spki: bytes) -> _PublicKey:
    try:
        key = load_der_public_key(spki)
    except (ValueError, UnsupportedAlgorithm) as err:
        raise EnvelopeError("key-unfit") from err
    if not isinstance(key, _PublicKey):
        raise EnvelopeError("key-unfit")
    _require_fit(key)
    return key


def _require_fit(key: _PublicKey) -> None:
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name not in _HASHES:
        raise EnvelopeError("key-unfit")
    if isinstance(key, rsa.RSAPublicKey) and not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
        raise EnvelopeError("key-unfit")


def _is_good(key: _PublicKey, message: bytes, signature: bytes) -> bool:
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, message)
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, message, _PSS, SHA256())
        else:
            key.verify(signature, message, ec.ECDSA(_HASHES[key.curve.name]()))
    except InvalidSignature:
        return False
    return True
