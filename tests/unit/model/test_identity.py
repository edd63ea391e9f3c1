"""SPIFFE IDs against an independent grammar, written another way."""

from __future__ import annotations

import string

from hypothesis import example, given
from hypothesis import strategies as st

from keybroker.model.identity import SpiffeId, SpiffeIdError

HOST = set(string.ascii_lowercase + string.digits + ".-_")
SEGMENT = HOST | set(string.ascii_uppercase)


def is_spiffe_id(text: str) -> bool:
    """The specification, read once more: character by character."""
    if len(text.encode("utf-8", "surrogatepass")) > 2048 or text[:9] != "spiffe://":
        return False
    host, *segments = text[9:].split("/")
    return (
        0 < len(host) <= 255
        and all(character in HOST for character in host)
        and all(segment not in {"", ".", ".."} and all(character in SEGMENT for character in segment) for segment in segments)
    )


def accepts(text: str) -> bool:
    try:
        return SpiffeId.parse(text).text == text
    except SpiffeIdError:
        return False


@given(st.text(max_size=40) | st.builds("spiffe://{}".format, st.text(alphabet="aZ0.-_/%:@?# \n\0é", max_size=20)))
@example("spiffe://example.org/a\n")
@example("spiffe://example.org\n")
@example("spiffe://example.org/\ud800")
@example("spiffe://ex\u0131mple.org/a")
@example("spiffe://example.org/\uff41")
def test_parse_accepts_exactly_what_the_grammar_does(text: str) -> None:
    assert accepts(text) == is_spiffe_id(text)


@given(st.from_regex(r"spiffe://[a-z0-9._-]{1,20}(/[a-zA-Z0-9_-]{1,9}){0,5}", fullmatch=True))
def test_parse_takes_apart_what_it_accepts(text: str) -> None:
    parsed = SpiffeId.parse(text)
    assert "/".join(("spiffe:", "", parsed.trust_domain, *parsed.path)) == text
