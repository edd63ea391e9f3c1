"""One request and whoever sent it: the trace context is taken if it is exactly one, the request's id never is."""

from __future__ import annotations

import re

import pytest

from keybroker.config import TelemetryConfig
from keybroker.frontend.exchange import Client, Exchange, HttpRequest, new_request_id
from keybroker.tracing import Tracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CLIENT = Client((b"certificate bytes",), "192.0.2.1")


def exchange(*headers: tuple[bytes, bytes]) -> Exchange:
    request = HttpRequest(CLIENT, "GET", "/", b"", list(headers), b"")
    return Exchange.begin(request, Tracer("frontend", TelemetryConfig()))


@pytest.mark.parametrize("flags", ["00", "01", "ff"])
def test_trace_context_is_taken_as_it_is(flags: str) -> None:
    text = f"00-{TRACE}-{PARENT}-{flags}"
    assert exchange((b"traceparent", text.encode())).span.traceparent == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01 ",
        f"00-{TRACE}-{PARENT}-01\n",
        f"01-{TRACE}-{PARENT}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE[1:]}-{PARENT}-01",
        f"00-{TRACE}{PARENT}-01",
        f"00-{'g' * 32}-{PARENT}-01",
        f"00_{TRACE}_{PARENT}_01",
        "x" * 10_000,
        "\u00ff",
    ],
)
def test_trace_context_is_as_good_as_none_if_it_is_malformed(text: str) -> None:
    assert not exchange((b"traceparent", text.encode())).span.traceparent


def test_trace_context_is_as_good_as_none_if_there_are_two() -> None:
    field = (b"traceparent", f"00-{TRACE}-{PARENT}-01".encode())
    assert not exchange(field, field).span.traceparent
    assert not exchange().span.traceparent


def test_client_is_what_the_connection_says() -> None:
    made = exchange((b"x-forwarded-client-cert", b"other"), (b"forwarded", b"for=203.0.113.1"))
    assert made.client is CLIENT
    assert "certificate bytes" not in repr(made)


def test_request_id_is_a_fresh_ulid() -> None:
    ids = {new_request_id() for _ in range(1_000)}
    assert len(ids) == 1_000
    assert all(re.fullmatch(r"[0-7][0-9A-HJKMNP-TV-Z]{25}", each) for each in ids)
    assert exchange((b"x-request-id", b"mine")).request_id != exchange((b"x-request-id", b"mine")).request_id
