"""What is signed of a notice, held against RFC 9421 and RFC 9530 as they are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keybroker.model.message_signature import ComponentError, content_digest, header_fields, is_target, parameters, signature_base

KEY_ID = "5e" * 32
DIGEST = "sha-256=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:"


def test_content_digest_equals_the_example_of_rfc9530() -> None:
    assert content_digest(b'{"hello": "world"}\n') == "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:"  # section D.1


def test_signature_base_is_one_line_for_each_component_and_one_for_the_parameters() -> None:
    # RFC 9421 section 2.5: identifier, colon, space, value; newlines between lines and none at the end
    assert signature_base("https://hooks.example/a?b=c", DIGEST, 1_618_884_473, KEY_ID).decode() == (
        '"@method": POST\n'
        '"@target-uri": https://hooks.example/a?b=c\n'
        f'"content-digest": {DIGEST}\n'
        '"@signature-params": ("@method" "@target-uri" "content-digest");created=1618884473;'
        f'keyid="{KEY_ID}";alg="ecdsa-p256-sha256";tag="keybroker-notice"'
    )


def test_fields_say_what_the_base_says() -> None:
    fields = dict(header_fields(DIGEST, 7, KEY_ID, b"\x00" * 64))
    assert fields["Content-Digest"] == DIGEST
    assert fields["Signature-Input"] == f"notice={parameters(7, KEY_ID)}"
    assert fields["Signature"] == "notice=:" + "A" * 86 + "==:"


@pytest.mark.parametrize(
    "url",
    [
        "", "http://hooks.example/a", "https://hooks.example", "https://Hooks.example/a", "https://user@hooks.example/a",
        "HTTPS://hooks.example/a",
        "https://hooks.example:443/a", "https://hooks.example:0/a", "https://hooks.example:080/a",
        "https://hooks.example/a\n", "https://hooks.example/a b",
        "https://hooks.example/a#b", "https://hooks.example/ä", 'https://hooks.example/"', "https://[::1]/a",
        "https://hooks.example/" + "a" * 2_048,
    ],
)  # fmt: skip
def test_what_is_no_plain_https_url_is_no_target(url: str) -> None:
    assert not is_target(url)
    with pytest.raises(ComponentError, match="@target-uri"):
        signature_base(url, DIGEST, 7, KEY_ID)


@pytest.mark.parametrize(
    ("digest", "created", "key_id", "what"),
    [
        (DIGEST[:-1], 7, KEY_ID, "content-digest"),
        (DIGEST + "\n", 7, KEY_ID, "content-digest"),
        (DIGEST.replace("256", "512"), 7, KEY_ID, "content-digest"),
        (DIGEST, 0, KEY_ID, "created"),
        (DIGEST, 2**40, KEY_ID, "created"),
        (DIGEST, 7, KEY_ID.upper(), "keyid"),
        (DIGEST, 7, f'{KEY_ID[1:]}"', "keyid"),
    ],
)
def test_component_that_cannot_be_is_refused(digest: str, created: int, key_id: str, what: str) -> None:
    with pytest.raises(ComponentError, match=what):
        signature_base("https://hooks.example/a", digest, created, key_id)


@given(st.text(max_size=40))
def test_no_target_can_write_a_line_of_the_base(tail: str) -> None:
    url = f"https://hooks.example/{tail}"
    if is_target(url):
        assert signature_base(url, DIGEST, 7, KEY_ID).count(b"\n") == 3
