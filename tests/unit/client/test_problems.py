"""Problem documents, good and bad."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keybroker.client.errors import BrokerAnswerError
from keybroker.client.problems import refusal
from keybroker.errors import OverloadedError, RefusalError

HEADERS = {"content-type": "application/problem+json"}
DENIED = b'{"type": "urn:keybroker:problem:denied", "title": "Denied"}'


@pytest.mark.parametrize("code", sorted(RefusalError.registry))
def test_each_code_has_its_class(code: str) -> None:
    err = refusal(400, HEADERS, b'{"type": "urn:keybroker:problem:%s", "detail": "No."}' % code.encode())
    assert type(err) is RefusalError.registry[code]
    assert str(err) == "No."


def test_title_speaks_where_there_is_no_detail() -> None:
    assert refusal(403, HEADERS, DENIED).detail == "Denied"
    assert "denied" in refusal(403, HEADERS, b'{"type": "urn:keybroker:problem:denied"}').detail


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("", 0), ("0", 0), ("7", 7), ("-1", 0), ("1.5", 0), ("+1", 0), ("1e3", 0), ("9" * 10, 0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0)],
)
def test_retry_after_is_whole_seconds_or_nothing(text: str, seconds: int) -> None:
    assert refusal(503, {**HEADERS, "retry-after": text}, DENIED).retry_after == seconds


@pytest.mark.parametrize(
    "media_type", ["application/problem+json; charset=utf-8", "APPLICATION/PROBLEM+JSON", " application/problem+json "]
)
def test_media_type_is_read_as_http_means_it(media_type: str) -> None:
    assert refusal(403, {"content-type": media_type}, DENIED).code == "denied"


@pytest.mark.parametrize("media_type", ["", "application/json", "text/html", "application/problem+jsonx"])
def test_another_media_type_is_not_a_refusal(media_type: str) -> None:
    with pytest.raises(BrokerAnswerError, match="status 403"):
        refusal(403, {"content-type": media_type}, DENIED)


@settings(deadline=None)
@given(code=st.text(max_size=10))
def test_unknown_code_is_an_outage_never_a_success(code: str) -> None:
    if code not in RefusalError.registry:
        assert RefusalError.of(code) is OverloadedError


@settings(deadline=None)
@given(
    body=st.binary(max_size=60)
    | st.text(max_size=40).map(lambda text: b'{"type": "urn:keybroker:problem:%s"}' % text.encode(errors="replace"))
)
def test_no_body_is_anything_but_a_refusal_or_an_error_of_its_own(body: bytes) -> None:
    try:
        assert isinstance(refusal(400, HEADERS, body), RefusalError)
    except BrokerAnswerError as err:
        assert "400" in str(err)  # noqa: PT017  either is right
