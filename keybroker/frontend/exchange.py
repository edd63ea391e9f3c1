"""One request, whoever sent it as TLS and TCP delivered them, and its answer. Nothing here comes from a header but the trace context."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from starlette.requests import Request
from ulid import ULID

from keybroker.frontend.bodies import require_json
from keybroker.tracing import Laps, Span, Tracer

SCOPE_KEY = "keybroker.exchange"
# W3C Trace Context section 3.2.2: version 00; all-zero ids are not ids.
_TRACEPARENT = re.compile(rb"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Client:
    """The other end of one connection.

    Attributes:
        chain: its certificates as TLS delivered them, DER, leaf first.
        address: its IP address; an IPv4 address is never written as an IPv6 one.
    """

    chain: tuple[bytes, ...] = field(repr=False)
    address: str


@dataclass(slots=True)
class HttpRequest:
    """A whole request, within all limits.

    Attributes:
        path: as it was sent. Not decoded: percent-encoding names nothing here, so that there is one spelling of every resource.
        query: what follows the question mark, as it was sent.
        headers: names in lower case.
        body: until it is taken.
    """

    client: Client
    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes = field(repr=False)

    def take_body(self) -> bytes:
        """The body, which is let go of here: large ones are to be in memory once."""
        body, self.body = self.body, b""
        return body

    def values(self, name: bytes) -> list[bytes]:
        """Every value of a header field."""
        return [value for each, value in self.headers if each == name]


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A whole answer. Header names are lower-case; `content-length` is added to them when it is sent."""

    status: int
    headers: dict[str, str]
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Exchange:
    """What goes with one request through this room.

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
    def begin(cls, request: HttpRequest, tracer: Tracer) -> Exchange:
        """The exchange that a request begins."""
        return cls(request.client, new_request_id(), tracer.begin("request", _traceparent(request.values(b"traceparent"))), Laps())

    @classmethod
    def of(cls, request: Request) -> Exchange:
        """The exchange that a FastAPI request belongs to."""
        exchange: Exchange = request.scope[SCOPE_KEY]
        return exchange


async def json_of(request: Request) -> bytes:
    """The body of a FastAPI request, if it calls itself JSON.

    Raises:
        UnsupportedMediaTypeError: it does not.
    """
    require_json([value.encode("latin-1") for value in request.headers.getlist("content-type")])
    return await request.body()


def new_request_id() -> str:
    """A fresh ULID."""
    return str(ULID())


def _traceparent(found: list[bytes]) -> str:
    """The trace context, if there is exactly one and it is well-formed; anything else is as good as none (section 3.2.2.2)."""
    return found[0].decode() if len(found) == 1 and _TRACEPARENT.fullmatch(found[0]) else ""
