"""The self-check: every algorithm's good signature passes, and nothing else does."""

from __future__ import annotations

import asyncio
import hashlib

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from keybroker.authority.selfcheck import Check, SelfCheck, der_of_raw, verifies
from keybroker.model.key import Algorithm, KeyFamily

MESSAGE = b"a message"
HASHES = {"sha256": hashes.SHA256(), "sha384": hashes.SHA384(), "sha512": hashes.SHA512()}
CURVES = {KeyFamily.EC_P256: ec.SECP256R1(), KeyFamily.EC_P384: ec.SECP384R1(), KeyFamily.EC_P521: ec.SECP521R1()}
RSA = rsa.generate_private_key(65537, 2048)


def signed(algorithm: Algorithm) -> Check:
    """A good signature, made by another library's words for the same thing."""
    if algorithm is Algorithm.ED25519:
        key = ed25519.Ed25519PrivateKey.generate()
        spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return Check(spki, algorithm, MESSAGE, key.sign(MESSAGE))
    digest = HASHES[algorithm.hash_name]
    data = hashlib.new(algorithm.hash_name, MESSAGE).digest()
    if algorithm.is_ecdsa:
        curve_key = ec.generate_private_key(CURVES[algorithm.family])
        spki = curve_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return Check(spki, algorithm, data, curve_key.sign(MESSAGE, ec.ECDSA(digest)))
    spki = RSA.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    pad = padding.PSS(padding.MGF1(digest), digest.digest_size) if algorithm.value.startswith("PS") else padding.PKCS1v15()
    return Check(spki, algorithm, data, RSA.sign(MESSAGE, pad, digest))


@pytest.mark.parametrize("algorithm", Algorithm)
def test_good_signature_holds(algorithm: Algorithm) -> None:
    assert verifies(signed(algorithm))


@pytest.mark.case(49)
@pytest.mark.parametrize("algorithm", Algorithm)
def test_signature_with_a_flipped_bit_or_other_data_does_not_hold(algorithm: Algorithm) -> None:
    good = signed(algorithm)
    flipped = bytes([*good.signature[:-1], good.signature[-1] ^ 1])
    assert not verifies(Check(good.spki, algorithm, good.data, flipped))
    assert not verifies(Check(good.spki, algorithm, bytes([good.data[0] ^ 1, *good.data[1:]]), good.signature))
    assert not verifies(Check(good.spki, algorithm, good.data, b""))
    assert not verifies(Check(good.spki, algorithm, good.data, bytes(len(good.signature))))
    assert not verifies(Check(b"no key", algorithm, good.data, good.signature))


@pytest.mark.parametrize("algorithm", Algorithm)
def test_signature_under_another_algorithm_does_not_hold(algorithm: Algorithm) -> None:
    good = signed(algorithm)
    for other in Algorithm:
        if other is not algorithm:
            assert not verifies(Check(good.spki, other, good.data, good.signature))


@pytest.mark.parametrize("algorithm", [Algorithm.ES256, Algorithm.ES384], ids=["at once", "in the thread"])
def test_each_of_many_checks_gets_its_own_answer(algorithm: Algorithm) -> None:
    async def main() -> None:
        selfcheck = SelfCheck()
        good = signed(algorithm)
        bad = Check(good.spki, good.algorithm, good.data, b"")
        results = await asyncio.gather(*(selfcheck.holds((good, bad)[n % 2]) for n in range(40)))
        assert results == [True, False] * 20
        selfcheck.close()

    asyncio.run(main())


@given(st.integers(1, 2**256 - 1), st.integers(1, 2**256 - 1))
def test_der_of_raw_keeps_r_and_s(r: int, s: int) -> None:
    assert utils.decode_dss_signature(der_of_raw(r.to_bytes(32) + s.to_bytes(32))) == (r, s)


@pytest.mark.parametrize("raw", [b"", b"abc"])
def test_der_of_raw_refuses_what_is_no_pair(raw: bytes) -> None:
    with pytest.raises(ValueError, match="equal length"):
        der_of_raw(raw)
