"""Envelopes: DSSE's own examples, and everything that is not exactly one spelling of one."""

from __future__ import annotations

import base64
import json
import random

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from keybroker.audit import dsse
from keybroker.audit.dsse import EnvelopeError
from tests.approvals import KEYS, spki_of
from tests.authorities import rsa_key

TYPE = "application/vnd.example+json"
KEY = KEYS["p256"]


def refused(data: bytes, key: dsse.PrivateKey = KEY, payload_type: str = TYPE) -> str:
    with pytest.raises(EnvelopeError) as caught:
        dsse.verified(data, payload_type, spki_of(key))
    return caught.value.rule


def test_pae_equals_the_example_of_the_specification() -> None:
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert dsse.pae("http://example.com/HelloWorld", b"hello world") == expected


def test_pae_counts_bytes_and_not_characters() -> None:
    # testvectors/vectors.json of DSSE: non-ascii-payload-type, empty-payload, empty-payload-type
    assert dsse.pae("application/vnd.exämple+json", b"").startswith(b"DSSEv1 29 ")
    assert dsse.pae("application/vnd.in-toto+json", b"") == b"DSSEv1 28 application/vnd.in-toto+json 0 "
    assert dsse.pae("", b"{}") == b"DSSEv1 0  2 {}"


def test_signature_equals_the_vector_of_the_specification_for_ed25519() -> None:
    # testvectors/vectors.json of DSSE: single-signature, by the key of RFC 8032 section 7.1, test 1
    key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
    payload = b'{"_type":"https://in-toto.io/Statement/v1"}'
    envelope = json.loads(dsse.signed("application/vnd.in-toto+json", payload, key))
    assert envelope["payload"] == "eyJfdHlwZSI6Imh0dHBzOi8vaW4tdG90by5pby9TdGF0ZW1lbnQvdjEifQ=="
    signature = "2WAfaHm5jluo0w+0rk8uVkluELJYWjSmU9x7EUzx+AyteDGJ4/nqyJXfmAUVFIAoQafWm7AxBZNw5M9ixNHiCA=="
    assert envelope["signatures"] == [{"keyid": dsse.key_id(spki_of(key)), "sig": signature}]


@pytest.mark.parametrize("name", KEYS)
def test_payload_comes_back_if_the_key_has_signed_it(name: str) -> None:
    assert dsse.verified(dsse.signed(TYPE, b"payload", KEYS[name]), TYPE, spki_of(KEYS[name])) == b"payload"


@pytest.mark.parametrize("name", KEYS)
def test_envelope_is_refused_if_another_key_of_the_kind_has_signed_it(name: str) -> None:
    others: dict[str, dsse.PrivateKey] = {
        "p256": ec.generate_private_key(ec.SECP256R1()),
        "p384": ec.generate_private_key(ec.SECP384R1()),
        "p521": ec.generate_private_key(ec.SECP521R1()),
        "rsa2048": rsa.generate_private_key(65537, 2048),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
    }
    other = others[name]
    envelope = json.loads(dsse.signed(TYPE, b"payload", other))
    assert refused(packed(envelope), KEYS[name]) == "another-key"
    envelope["signatures"][0]["keyid"] = dsse.key_id(spki_of(KEYS[name]))  # it only claims to be the right one
    assert refused(packed(envelope), KEYS[name]) == "bad-signature"


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("what", ["payload", "sig"])
def test_envelope_is_refused_when_any_bit_of_payload_or_signature_changes(name: str, what: str) -> None:
    envelope = json.loads(dsse.signed(TYPE, b"payload", KEYS[name]))
    place = envelope if what == "payload" else envelope["signatures"][0]
    data = bytearray(base64.b64decode(place[what]))
    for bit in random.Random(1).sample(range(len(data) * 8), 20):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        place[what] = base64.b64encode(changed).decode()
        assert refused(packed(envelope), KEYS[name]) == "bad-signature"


def test_envelope_of_another_type_is_refused_even_if_signed() -> None:
    assert refused(dsse.signed("application/vnd.other+json", b"payload", KEY)) == "another-payload-type"
    envelope = json.loads(dsse.signed("application/vnd.other+json", b"payload", KEY)) | {"payloadType": TYPE}
    assert refused(packed(envelope)) == "bad-signature"


GOOD = dsse.signed(TYPE, b'{"a":1}', KEY)
VALUE = json.loads(GOOD)
SIGNATURE = VALUE["signatures"][0]


def packed(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"", "not-an-envelope"),
        (b"\xff", "not-an-envelope"),
        (b"[]", "not-an-envelope"),
        (b"null", "not-an-envelope"),
        (b"[" * 20_000, "not-an-envelope"),
        (b"\xef\xbb\xbf" + GOOD, "not-an-envelope"),
        (packed(VALUE | {"signatures": []}), "not-an-envelope"),
        (packed(VALUE | {"signatures": [SIGNATURE, SIGNATURE]}), "not-an-envelope"),
        (packed(VALUE | {"signatures": SIGNATURE}), "not-an-envelope"),
        (packed(VALUE | {"signatures": [{"sig": SIGNATURE["sig"]}]}), "not-an-envelope"),
        (packed(VALUE | {"signatures": [SIGNATURE | {"keyid": SIGNATURE["keyid"].upper()}]}), "not-an-envelope"),
        (packed(VALUE | {"signatures": [SIGNATURE | {"cert": "x"}]}), "not-an-envelope"),
        (packed(VALUE | {"extra": 1}), "not-an-envelope"),
        (packed(VALUE | {"payload": None}), "not-an-envelope"),
        (packed(VALUE | {"payload": "_-8="}), "not-an-envelope"),
        (packed(VALUE | {"payload": VALUE["payload"].rstrip("=")}), "not-an-envelope"),
        (packed({name: value for name, value in VALUE.items() if name != "payload"}), "not-an-envelope"),
        (GOOD + b" ", "envelope-not-canonical"),
        (json.dumps(VALUE).encode(), "envelope-not-canonical"),
        (GOOD.replace(b'"payload":', b'"payload":"e30=","payload":', 1), "envelope-not-canonical"),
        (GOOD.replace(b"payloadType", b"payload\\u0054ype"), "envelope-not-canonical"),
        (packed(VALUE | {"payload": "eyJhIjoxfR=="}), "envelope-not-canonical"),  # bits beyond the end
        (b" " * (dsse.MAX_ENVELOPE_BYTES + 1), "too-large"),
    ],
)
def test_envelope_is_refused_unless_it_is_the_one_spelling(data: bytes, rule: str) -> None:
    assert refused(data) == rule


def test_envelope_is_refused_before_it_is_made_when_too_large() -> None:
    with pytest.raises(EnvelopeError, match="too-large"):
        dsse.signed(TYPE, bytes(dsse.MAX_ENVELOPE_BYTES), KEY)


@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP256K1()), rsa_key(1024)])
def test_key_that_is_unfit_signs_and_verifies_nothing(key: dsse.PrivateKey) -> None:
    with pytest.raises(EnvelopeError, match="key-unfit"):
        dsse.signed(TYPE, b"payload", key)
    assert refused(GOOD, key) == "key-unfit"


def test_bytes_that_are_no_key_verify_nothing() -> None:
    for spki in (b"", b"nonsense", spki_of(KEY)[:-1]):
        with pytest.raises(EnvelopeError, match="key-unfit"):
            dsse.verified(GOOD, TYPE, spki)


@given(st.binary(max_size=200), st.text(st.characters(codec="utf-8"), max_size=20))
def test_any_payload_of_any_type_comes_back(payload: bytes, payload_type: str) -> None:
    assert dsse.verified(dsse.signed(payload_type, payload, KEY), payload_type, spki_of(KEY)) == payload
