"""Bodies of sign requests: what is taken, and each way in which bytes are not one request."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keybroker.errors import InvalidError, MalformedError
from keybroker.frontend import bodies
from keybroker.model.key import Algorithm
from keybroker.model.request import MAX_BATCH_ITEMS, MAX_MEDIA_TYPE_CHARACTERS, MAX_MESSAGE_BYTES, MAX_REASON_CHARACTERS, SignBody

GOOD = b'{"algorithm":"ES256","message":"aGk="}'


def pointers(data: bytes) -> list[str]:
    """Where a body is refused; the text repeats nothing of it."""
    with pytest.raises(InvalidError) as caught:
        bodies.sign_body(data)
    assert caught.value.pointers
    assert caught.value.detail.isascii()
    return [pointer for pointer, _ in caught.value.pointers]


def body(**members: Any) -> bytes:
    return json.dumps({"algorithm": "ES256", "message": "aGk=", **members}).encode()


def test_message_is_taken_with_every_member() -> None:
    made = bodies.sign_body(body(format="p1363", reason="why", media_type="text/plain"))
    assert made == SignBody(algorithm=Algorithm.ES256, message=b"hi", format="p1363", reason="why", media_type="text/plain")


@pytest.mark.parametrize("algorithm", [each for each in Algorithm if not each.signs_message])
def test_digest_of_the_right_length_is_taken(algorithm: Algorithm) -> None:
    digest = hashlib.new(algorithm.hash_name, b"hi").digest()
    made = bodies.sign_body(json.dumps({"algorithm": algorithm.value, "digest": base64.b64encode(digest).decode()}).encode())
    assert made == SignBody(algorithm=algorithm, digest=digest)


@pytest.mark.parametrize("algorithm", Algorithm)
def test_empty_message_is_a_message(algorithm: Algorithm) -> None:
    made = bodies.sign_body(json.dumps({"algorithm": algorithm.value, "message": ""}).encode())
    assert (made.content, made.is_digest) == (b"", False)


@pytest.mark.parametrize(
    "data",
    [
        b' { "algorithm" : "ES256" , "message" : "aGk=" } \r\n\t',
        b'{"message":"aGk=","algorithm":"ES256"}',
        b'{"\\u0061lgorithm":"ES256","message":"aGk="}',
        b'{"algorithm":"\\u0045S256","message":"aGk\\u003d"}',
    ],
)
def test_other_spelling_of_the_same_json_is_the_same_request(data: bytes) -> None:
    assert bodies.sign_body(data) == bodies.sign_body(GOOD)


@given(st.binary(max_size=200), st.text(st.characters(exclude_categories=["Cs"]), max_size=50), st.booleans())
def test_what_is_taken_is_what_was_sent(message: bytes, reason: str, is_ascii: bool) -> None:
    data = json.dumps(
        {"algorithm": "ES256", "message": base64.b64encode(message).decode(), "reason": reason}, ensure_ascii=is_ascii
    ).encode()
    assert bodies.sign_body(data) == SignBody(algorithm=Algorithm.ES256, message=message, reason=reason)


MALFORMED = {
    "nothing": b"",
    "white space": b" \n",
    "half": GOOD[:-1],
    "two values": GOOD + GOOD,
    "something after it": GOOD + b"x",
    "NUL after it": GOOD + b"\x00",
    "single quotes": b"{'algorithm':'ES256','message':'aGk='}",
    "comment": b'{"algorithm":"ES256",/* */"message":"aGk="}',
    "comma at the end": b'{"algorithm":"ES256","message":"aGk=",}',
    "no quotes": b'{algorithm:"ES256","message":"aGk="}',
    "raw control character": b'{"algorithm":"ES256","message":"aGk=","reason":"a\nb"}',
    "bad escape": b'{"algorithm":"ES256","message":"aGk=","reason":"\\x41"}',
    "NaN": b'{"algorithm":"ES256","message":NaN}',
    "Infinity": b'{"algorithm":"ES256","message":-Infinity}',
    "NaN in an unknown member": b'{"algorithm":"ES256","message":"aGk=","x":NaN}',
    "leading zero": b'{"algorithm":"ES256","message":01}',
    "plus": b'{"algorithm":"ES256","message":+1}',
    "member twice": b'{"algorithm":"ES256","algorithm":"ES384","message":"aGk="}',
    "member twice, the same": b'{"algorithm":"ES256","message":"aGk=","message":"aGk="}',
    "member twice, once escaped": b'{"algorithm":"ES256","message":"aGk=","\\u006dessage":"eW8="}',
    "member twice, both escaped": b'{"\\u0061lgorithm":"ES256","algorith\\u006d":"ES384","message":"aGk="}',
    "unknown member twice": b'{"algorithm":"ES256","message":"aGk=","x":1,"x":2}',
    "empty reason twice": b'{"algorithm":"ES256","message":"aGk=","reason":"","reason":""}',
    "reason twice, the last one empty": b'{"algorithm":"ES256","message":"aGk=","reason":"a","reason":""}',
    "member twice, further in": b'{"algorithm":"ES256","message":{"a":1,"a":2}}',
    "lone high surrogate": b'{"algorithm":"ES256","message":"aGk=","reason":"\\ud800"}',
    "lone low surrogate": b'{"algorithm":"ES256","message":"aGk=","reason":"\\udc00"}',
    "surrogates in the wrong order": b'{"algorithm":"ES256","message":"aGk=","reason":"\\udc00\\ud800"}',
    "lone surrogate in a name": b'{"algorithm":"ES256","message":"aGk=","\\ud800":1}',
    "raw surrogate": b'{"algorithm":"ES256","message":"aGk=","reason":"\xed\xa0\x80"}',
    "not UTF-8": b'{"algorithm":"ES256","message":"aGk=","reason":"\xff"}',
    "overlong UTF-8": b'{"algorithm":"ES256","message":"aGk=","reason":"\xc0\xaf"}',
    "UTF-16": GOOD.decode().encode("utf-16"),
    "UTF-16 without a mark": GOOD.decode().encode("utf-16-le"),
    "UTF-32": GOOD.decode().encode("utf-32"),
    "byte order mark": b"\xef\xbb\xbf" + GOOD,
    "depth of 10,000 objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "depth of 10,000 arrays": b'{"algorithm":"ES256","message":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "depth of 10,000 without an end": b"[" * 10_000,
}


@pytest.mark.case(12)
@pytest.mark.parametrize("name", MALFORMED)
def test_body_is_malformed_if_it_is_not_json_that_everyone_reads_alike(name: str) -> None:
    with pytest.raises(MalformedError):
        bodies.sign_body(MALFORMED[name])


@pytest.mark.case(12)
@pytest.mark.parametrize("name", MALFORMED)
def test_item_of_a_batch_is_malformed_as_a_body_is(name: str) -> None:
    with pytest.raises(MalformedError):
        bodies.batch_items(b'{"items":[' + GOOD + b"," + MALFORMED[name] + b"]}")


WRONG: dict[str, tuple[bytes, str]] = {
    "null": (b"null", ""),
    "array": (b"[]", ""),
    "text": (b'"x"', ""),
    "number": (b"1", ""),
    "empty": (b"{}", "/algorithm"),
    "unknown member": (body(extra=1), "/extra"),
    "unknown member with a hostile name": (body(**{"~/\n": 1}), "/~0~1\n"),
    "unknown member with a long name": (body(**{"x" * 5_000: 1}), "/" + "x" * 64),
    "other case": (body(Message="aGk="), "/Message"),
    "no algorithm": (b'{"message":"aGk="}', "/algorithm"),
    "unknown algorithm": (body(algorithm="none"), "/algorithm"),
    "algorithm in lower case": (body(algorithm="es256"), "/algorithm"),
    "algorithm null": (body(algorithm=None), "/algorithm"),
    "algorithm in a list": (body(algorithm=["ES256"]), "/algorithm"),
    "message null": (body(message=None), "/message"),
    "message true": (body(message=True), "/message"),
    "message 1": (body(message=1), "/message"),
    "message -1": (body(message=-1), "/message"),
    "message 2^64": (body(message=2**64), "/message"),
    "message of 5,000 digits": (b'{"algorithm":"ES256","message":' + b"9" * 5_000 + b"}", "/message"),
    "message 1e999": (b'{"algorithm":"ES256","message":1e999}', "/message"),
    "message in a list": (body(message=["aGk="]), "/message"),
    "unknown member of 2^64": (body(extra=2**64), "/extra"),
    "format unknown": (body(format="DER"), "/format"),
    "format null": (body(format=None), "/format"),
    "reason null": (body(reason=None), "/reason"),
    "reason 1": (body(reason=1), "/reason"),
    "reason too long": (body(reason="x" * (MAX_REASON_CHARACTERS + 1)), "/reason"),
    "media type too long": (body(media_type="x" * (MAX_MEDIA_TYPE_CHARACTERS + 1)), "/media_type"),
    "media type not ASCII": (body(media_type="text/ö"), "/media_type"),
    "both": (body(digest=base64.b64encode(bytes(32)).decode()), ""),
    "neither": (b'{"algorithm":"ES256"}', ""),
    "message too large": (body(message=base64.b64encode(bytes(MAX_MESSAGE_BYTES + 1)).decode()), "/message"),
    "format of RSA": (body(algorithm="PS256", format="der"), "/format"),
    "format of Ed25519": (body(algorithm="Ed25519", format="p1363"), "/format"),
}


@pytest.mark.case(14)
@pytest.mark.parametrize("name", WRONG)
def test_body_is_invalid_with_a_pointer_if_a_member_is_not_what_it_should_be(name: str) -> None:
    data, pointer = WRONG[name]
    assert pointers(data) == [pointer]


@pytest.mark.case(14)
@pytest.mark.parametrize(
    "text",
    ["aGk", "aGk==", "aGk=\\n", " aGk=", "aG k=", "aGk=aGk=", "aGk=\\u0000", "a", "ab", "abc", "====", "=", "aG=k", "-_-_", "_w==", "ä===",
     "aGk\\u003d=", "aGl=", "aGm=", "aGn=", "aR==", "af==", "a/==", "AAB="],
)  # fmt: skip
def test_base64_is_invalid_in_any_but_its_one_form(text: str) -> None:
    data = b'{"algorithm":"ES256","message":"' + text.encode() + b'"}'
    assert pointers(data) == ["/message"]
    assert pointers(data.replace(b"message", b"digest")) == ["/digest"]


@given(st.text("ABab01+/-_= \n", max_size=8))
def test_base64_that_is_taken_is_what_its_bytes_encode_to(text: str) -> None:
    data = json.dumps({"algorithm": "ES256", "message": text}).encode()
    try:
        made = bodies.sign_body(data)
    except InvalidError:
        return
    assert base64.b64encode(made.content).decode() == text


@pytest.mark.case(15)
@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("size", [0, 1, 20, 31, 32, 33, 47, 48, 49, 63, 64, 65])
def test_digest_is_invalid_unless_it_has_the_length_of_its_algorithm(algorithm: Algorithm, size: int) -> None:
    data = json.dumps({"algorithm": algorithm.value, "digest": base64.b64encode(bytes(size)).decode()}).encode()
    if size == algorithm.digest_size and not algorithm.signs_message:
        assert bodies.sign_body(data).is_digest
    else:
        assert pointers(data) == ["/digest"]


def test_every_fault_is_named_at_once() -> None:
    data = body(algorithm="PS256", format="der", reason="x" * 2_000, media_type="ö", digest="")
    assert pointers(data) == ["", "/digest", "/format", "/reason", "/media_type"]


def test_batch_has_its_items_in_order() -> None:
    first, second = bodies.batch_items(b'{"items":[%s, %s]}' % (GOOD, body(algorithm="ES384")))
    assert first == SignBody(algorithm=Algorithm.ES256, message=b"hi")
    assert second == SignBody(algorithm=Algorithm.ES384, message=b"hi")


def test_faulty_item_is_a_refusal_of_that_item_alone() -> None:
    first, second, third, fourth = bodies.batch_items(b'{"items":[%s, {"algorithm":"ES256"}, %s, 7]}' % (GOOD, GOOD))
    assert first == third == SignBody(algorithm=Algorithm.ES256, message=b"hi")
    assert isinstance(second, InvalidError)
    assert isinstance(fourth, InvalidError)


@pytest.mark.parametrize("count", [1, MAX_BATCH_ITEMS])
def test_batch_of_a_permitted_size_is_taken(count: int) -> None:
    assert len(bodies.batch_items(b'{"items":[' + b",".join([GOOD] * count) + b"]}")) == count


@pytest.mark.case(14)
@pytest.mark.parametrize(
    ("data", "pointer"),
    [
        (b"{}", "/items"),
        (b"[]", ""),
        (b'{"items":[]}', "/items"),
        (b'{"items":null}', "/items"),
        (b'{"items":{}}', "/items"),
        (b'{"items":[' + b",".join([GOOD] * (MAX_BATCH_ITEMS + 1)) + b"]}", "/items"),
        (b'{"items":[' + GOOD + b'],"more":1}', "/more"),
        (GOOD, "/algorithm"),
    ],
)
def test_batch_is_invalid_in_any_other_shape(data: bytes, pointer: str) -> None:
    with pytest.raises(InvalidError) as caught:
        bodies.batch_items(data)
    assert [place for place, _ in caught.value.pointers] == [pointer]


@pytest.mark.case(12)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b'{"items":[' + GOOD + b'],"items":[' + GOOD + b"]}",
        b'{"items":[' + GOOD + b'],"item\\u0073":[' + GOOD + b"]}",
        b'{"items":[' + GOOD + b"]}}",
        b'{"items":[{"items":1,"items":2}]}',
    ],
)
def test_batch_is_malformed_if_it_could_be_read_in_two_ways(data: bytes) -> None:
    with pytest.raises(MalformedError):
        bodies.batch_items(data)


def test_refusal_repeats_nothing_of_the_body() -> None:
    secret = "5ecret"
    for data in (
        body(algorithm=secret),
        body(message=secret),
        body(format=secret),
        body(reason=secret * 1_000),
        body(media_type=secret * 100),
    ):
        with pytest.raises(InvalidError) as caught:
            bodies.sign_body(data)
        assert secret not in repr((caught.value, caught.value.pointers, caught.value.detail))


def test_pointer_escapes_as_rfc_6901_has_it() -> None:
    assert bodies.pointer_to("a/b~c") == "/a~1b~0c"


def test_encoded_body_of_the_client_is_taken() -> None:
    made = SignBody(algorithm=Algorithm.ES256, message=b"hello!", reason="why")
    assert bodies.sign_body(msgspec.json.encode(made)) == made
