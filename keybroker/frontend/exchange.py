"""One request and whoever sent it, as TLS and TCP delivered them. Nothing here comes from a header but the trace context."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from ulid import ULID

from keybroker.tracing import Laps, Span, Tracer

EXTENSION = "keybroker.client"
_SCOPE_KEY = "keybroker.exchange"
# W3C Trace Context section 3.2.2: version 00; all-zero ids are not ids.
_TRACEPARENT = re.compile(rb"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class Client:
    """The other end of one connection.

    Attributes:
        chain: its certificates as TLS delivered them, DER, leaf first.
        address: its IP address; an IPv4 address is never written as an IPv6 one.
    """

    chain: tuple[bytes, ...] = field(repr=False)
    address: str


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request.

    Attributes:
        request_id: a ULID, made here; never taken from the caller.
        span: this room's part of the trace; its `traceparent` goes on to the authority.
        laps: the stages of this room's work, so far.
    """

    client: Client
    request_id: str
    span: Span
    laps: Laps

    @classmethod
    def begin(cls, scope: dict[str, Any], tracer: Tracer) -> Exchange:
        """The exchange of an ASGI scope, which keeps it."""
        span = tracer.begin("request", _traceparent(scope["headers"]))
        exchange = cls(scope["extensions"][EXTENSION], new_request_id(), span, Laps())
        scope[_SCOPE_KEY] = exchange
        return exchange

    @classmethod
    def of(cls, request: Request) -> Exchange:
        """The exchange that a request belongs to."""
        exchange: Exchange = request.scope[_SCOPE_KEY]
        return exchange


def new_request_id() -> str:
    """A fresh ULID."""
    return str(ULID())


def _traceparent(headers: list[tuple[bytes, bytes]]) -> str:
    """The trace context, if there is exactly one and it is well-formed; anything else is as good as none (section 3.2.2.2)."""
    found = [value for name, value in headers if name == b"traceparent"]
    return found[0].decode() if len(found) == 1 and _TRACEPARENT.fullmatch(found[0]) else ""
