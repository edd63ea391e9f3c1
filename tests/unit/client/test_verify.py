"""Signatures judged here. The signer is OpenSSL's command line or `cryptography`, never our own code."""

from __future__ import annotations

import hashlib
import io

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from keybroker.client.verify import WrongKeyError, is_good, signed_content
from keybroker.model.key import Algorithm
from keybroker.model.request import Format

MESSAGE = b"the message"
HASHES: dict[str, hashes.HashAlgorithm] = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}
EC = {
    Algorithm.ES256: ec.generate_private_key(ec.SECP256R1()),
    Algorithm.ES384: ec.generate_private_key(ec.SECP384R1()),
    Algorithm.ES512: ec.generate_private_key(ec.SECP521R1()),
}
RSA = rsa.generate_private_key(65537, 2048)
ED = ed25519.Ed25519PrivateKey.generate()


def spki_of(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def made(algorithm: Algorithm) -> tuple[bytes, bytes]:
    """The public key and a DER signature of MESSAGE."""
    name = algorithm.value
    if algorithm is Algorithm.ED25519:
        return spki_of(ED), ED.sign(MESSAGE)
    if name.startswith("ES"):
        return spki_of(EC[algorithm]), EC[algorithm].sign(MESSAGE, ec.ECDSA(HASHES[name[2:]]))
    digest = HASHES[name[2:]]
    pad = padding.PSS(padding.MGF1(digest), digest.digest_size) if name.startswith("PS") else padding.PKCS1v15()
    return spki_of(RSA), RSA.sign(MESSAGE, pad, digest)


def content_of(algorithm: Algorithm, message: bytes = MESSAGE) -> bytes:
    return signed_content(algorithm, io.BytesIO(message))


@pytest.mark.parametrize("algorithm", Algorithm, ids=lambda each: each.value)
def test_a_signature_is_good_for_its_message(algorithm: Algorithm) -> None:
    spki, signature = made(algorithm)
    assert is_good(spki, algorithm, content_of(algorithm), signature)


@pytest.mark.parametrize("algorithm", Algorithm, ids=lambda each: each.value)
def test_a_signature_is_not_good_for_another_message(algorithm: Algorithm) -> None:
    spki, signature = made(algorithm)
    assert not is_good(spki, algorithm, content_of(algorithm, b"another message"), signature)


@pytest.mark.parametrize("algorithm", Algorithm, ids=lambda each: each.value)
def test_a_signature_is_not_good_with_any_bit_changed(algorithm: Algorithm) -> None:
    spki, signature = made(algorithm)
    for position in range(0, len(signature), 7):
        changed = bytearray(signature)
        changed[position] ^= 1
        assert not is_good(spki, algorithm, content_of(algorithm), bytes(changed))


@pytest.mark.parametrize("algorithm", EC, ids=lambda each: each.value)
def test_both_forms_of_an_ecdsa_signature_are_good_and_neither_passes_for_the_other(algorithm: Algorithm) -> None:
    spki, der = made(algorithm)
    r, s = decode_dss_signature(der)
    size = (EC[algorithm].key_size + 7) // 8
    p1363 = r.to_bytes(size) + s.to_bytes(size)
    content = content_of(algorithm)
    assert is_good(spki, algorithm, content, p1363, "p1363")
    assert not is_good(spki, algorithm, content, p1363, "der")
    assert not is_good(spki, algorithm, content, der, "p1363")
    assert not is_good(spki, algorithm, content, p1363 + b"\0", "p1363")


@pytest.mark.parametrize("algorithm", Algorithm, ids=lambda each: each.value)
def test_a_key_of_another_family_is_refused_not_tried(algorithm: Algorithm) -> None:
    other = Algorithm.ES256 if algorithm.family is not Algorithm.ES256.family else Algorithm.PS256
    spki, _ = made(other)
    _, signature = made(algorithm)
    with pytest.raises(WrongKeyError, match=algorithm.value):
        is_good(spki, algorithm, content_of(algorithm), signature)


def test_rsa_pss_with_another_salt_length_is_not_good() -> None:
    signature = RSA.sign(MESSAGE, padding.PSS(padding.MGF1(hashes.SHA256()), 8), hashes.SHA256())
    assert not is_good(spki_of(RSA), Algorithm.PS256, content_of(Algorithm.PS256), signature)


@pytest.mark.parametrize("spki", [b"", b"\x30\x00", b"not a key"])
def test_bytes_that_are_no_public_key_are_refused(spki: bytes) -> None:
    with pytest.raises(WrongKeyError, match="not a public key"):
        is_good(spki, Algorithm.ES256, bytes(32), b"")


@given(signature=st.binary(max_size=200), algorithm=st.sampled_from(list(Algorithm)), form=st.sampled_from(["der", "p1363"]))
def test_no_bytes_are_a_good_signature_by_luck(signature: bytes, algorithm: Algorithm, form: Format) -> None:
    assert not is_good(made(algorithm)[0], algorithm, content_of(algorithm), signature, form)


@given(message=st.binary(max_size=5_000))
def test_what_is_signed_of_a_file_is_its_digest_and_for_ed25519_the_whole(message: bytes) -> None:
    assert content_of(Algorithm.ES384, message) == hashlib.sha384(message).digest()
    assert content_of(Algorithm.ED25519, message) == message
