"""HTTP/1.1 on one connection (RFC 9112), bounded in time and size. What is not plainly one request gets one 400 and the door.

httptools parses; everything else is here. The service sees whole requests only, and gives whole answers: until a request is whole this
file alone answers, so that there is never a second answer to one request. Requests are not pipelined: whoever sends a second one before
the first is answered gets the first answer and the end of the connection.

Every phase ends by itself: see `limits.py`. Answers leave in pieces, so that it shows when nobody reads them.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import math
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import NoReturn

import httptools

from keybroker.errors import (
    HeadersTooLargeError,
    MalformedError,
    OverloadedError,
    RefusalError,
    RequestTimeoutError,
    TooLargeError,
    UriTooLongError,
)
from keybroker.frontend import problems
from keybroker.frontend.exchange import Client, Headers, HttpAnswer, HttpRequest, new_request_id
from keybroker.frontend.limits import ByteBudget, HttpLimits
from keybroker.frontend.metrics import FrontendMetrics
from keybroker.frontend.places import SvidShares
from keybroker.identity.tls_peer import peer_chain

_NOT_HTTP = "The request is not HTTP/1.1 as it should be."
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]{1,300}")  # what RFC 3986 section 3.2.2 makes hosts and ports of
_FIRST_LINE_BYTES = 1024  # method, version and white space, generously
_PIECE_BYTES = 64 * 1024
_COPIES = 3  # of a body that may be in memory: as it has arrived, decoded, and in a frame on its way to the authority
_STATUS_LINES = {each.value: f"HTTP/1.1 {each.value} {each.phrase}\r\n".encode() for each in HTTPStatus}

Answerer = Callable[[HttpRequest], Awaitable[HttpAnswer]]


@dataclass(slots=True)
class Shared:
    """What all connections have in common.

    Attributes:
        bodies: the memory that bodies of requests may take together.
        answers: the same for large answers on their way out.
        svids: how many connections each has.
        connections: those whose handshake is complete.
    """

    bodies: ByteBudget
    answers: ByteBudget
    svids: SvidShares
    connections: set[BoundedHttpProtocol] = field(default_factory=set)


class _Phase(enum.Enum):
    QUIET = enum.auto()  # nothing of a request is there
    HEAD = enum.auto()
    BODY = enum.auto()
    ANSWERING = enum.auto()
    LAST_ANSWER = enum.auto()  # what still arrives is dropped
    DEAF = enum.auto()  # and there will be no answer any more


class BoundedHttpProtocol(asyncio.Protocol):
    """One client connection.

    Args:
        answerer: answers whole requests, and raises nothing.
        limits: for this connection.
        shared: with all other connections.
        metrics: counts what is answered here.
        address: of the client.
        on_lost: called once, when the connection has ended.
    """

    def __init__(
        self,
        answerer: Answerer,
        *,
        limits: HttpLimits,
        shared: Shared,
        metrics: FrontendMetrics,
        address: str,
        on_lost: Callable[[], None],
    ) -> None:
        self._answerer = answerer
        self._limits = limits
        self._shared = shared
        self._metrics = metrics
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._client = Client((), address)
        self._svid: bytes | None = None  # the hash of its leaf, once it is counted
        self._phase = _Phase.QUIET
        self._fault: RefusalError | None = None
        self._is_draining = False
        self._is_first = True
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf  # of the loop's clock: when this phase has taken too long
        self._answering: asyncio.Task[None] | None = None
        self._writable: asyncio.Future[None] | None = None  # while nobody reads what was written
        self._line = b""  # the first line of this request, as it was sent: the parser takes RTSP/1.1 and ICE/1.1 for HTTP/1.1
        self._url = b""
        self._headers: Headers = []
        self._head_bytes = 0
        self._field_bytes = 0
        self._dropped = 0
        self._path = self._query = b""
        self._body: list[bytes] = []  # pieces of the same size, so that memory is not moved about as it grows
        self._body_end = bytearray()  # less than a piece
        self._body_bytes = 0
        self._body_limit = 0
        self._borrowed = 0

    # The connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """TLS is established: remember who is there, and start the clock."""
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # a stream transport is an asyncio.Transport
        self._transport.set_write_buffer_limits(high=_PIECE_BYTES)
        self._shared.connections.add(self)
        chain = peer_chain(transport.get_extra_info("ssl_object"))
        self._client = Client(chain, self._client.address)
        self._due = self._loop.time() + self._limits.request_s
        self._watch()
        svid = hashlib.sha256(chain[0]).digest() if chain else b""
        if self._shared.svids.enter(svid):
            self._svid = svid
        else:
            self._end_with(OverloadedError("There are too many connections with this SVID.", retry_after=1))

    def connection_lost(self, _exc: Exception | None) -> None:
        """Let go of everything. What the authority was asked is finished and recorded all the same."""
        self._phase = _Phase.DEAF
        self._shared.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._writable is not None:
            self.resume_writing()
        self._return_body()
        if self._svid is not None:
            self._shared.svids.leave(self._svid)
        self._on_lost()

    def pause_writing(self) -> None:
        """What was written is not read."""
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        """Now it is."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def shutdown(self) -> None:
        """The server drains: finish the request that is under way, if there is one, then close."""
        self._is_draining = True
        if self._phase is _Phase.QUIET:
            self._transport.close()

    def abort(self) -> None:
        """End at once, whatever is under way."""
        self._transport.abort()

    # What arrives

    def data_received(self, data: bytes) -> None:
        """Parse; whatever breaks a rule ends here, with one answer."""
        if self._phase in {_Phase.LAST_ANSWER, _Phase.DEAF}:
            self._dropped += len(data)
            if self._dropped > self._limits.linger_bytes:
                self._transport.pause_reading()
            return
        if self._phase is _Phase.QUIET or self._phase is _Phase.HEAD:
            self._keep_line(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._end_with(self._fault or MalformedError(_NOT_HTTP))
        else:
            if self._phase is _Phase.HEAD:
                self._bound_head(data)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        if self._phase is _Phase.ANSWERING:
            self._stop(MalformedError(_NOT_HTTP))  # pipelined: the answer under way is the last one
        self._phase = _Phase.HEAD
        self._url = b""
        self._headers = []
        self._head_bytes = self._field_bytes = 0
        if not self._is_first:  # the first request's time began with the connection
            self._due = self._loop.time() + self._limits.request_s
        self._is_first = False

    def on_url(self, url: bytes) -> None:
        """A piece of the request target."""
        self._url += url
        if len(self._url) > self._limits.target_bytes:
            self._stop(UriTooLongError(f"A request target is at most {self._limits.target_bytes} bytes."))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One whole field."""
        if self._phase is _Phase.BODY:
            self._stop(MalformedError("Trailer fields are not taken."))
        self._headers.append((name.lower(), value.strip(b" \t")))  # the parser leaves white space at the end (RFC 9110 section 5.5)
        self._field_bytes += len(name) + len(value) + 4
        if self._field_bytes > self._limits.header_bytes or len(self._headers) > self._limits.header_fields:
            self._stop(self._too_large_head())

    def on_headers_complete(self) -> None:
        """Everything but the body is there: judge it."""
        self._phase = _Phase.BODY
        if not self._line.endswith(b" HTTP/1.1\r\n"):
            self._stop(MalformedError("Only HTTP/1.1 is spoken here."))
        if self._parser.should_upgrade():
            self._stop(MalformedError("This server speaks HTTP/1.1 and nothing else."))
        target = httptools.parse_url(self._url)
        if not target.path or b"#" in self._url:  # a fragment is no part of a request target (RFC 9112 section 3.2)
            self._stop(MalformedError(_NOT_HTTP))
        self._path, self._query = target.path, target.query or b""
        self._body_limit = self._limits.body_bytes(self._path)
        self._judge_fields()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        size = len(body)
        self._body_bytes += size
        if self._body_bytes > self._body_limit:
            self._stop(self._too_large_body())
        if not self._shared.bodies.take(size * _COPIES):
            self._stop(OverloadedError("Too much is being uploaded.", retry_after=1))
        self._borrowed += size * _COPIES
        self._body_end += body
        if len(self._body_end) >= _PIECE_BYTES:
            self._body.append(bytes(self._body_end))
            self._body_end = bytearray()

    def on_message_complete(self) -> None:
        """The request is whole: have it answered."""
        self._phase = _Phase.ANSWERING
        self._due = math.inf
        self._line = b""
        body = b"".join((*self._body, self._body_end))
        self._clear_body()
        request = HttpRequest(self._client, self._parser.get_method().decode(), self._path.decode(), self._query, self._headers, body)
        self._answering = self._loop.create_task(self._answer(request, self._parser.should_keep_alive()))

    def _keep_line(self, data: bytes) -> None:
        if not self._line.endswith(b"\n"):
            if not self._line:
                data = data.lstrip(b"\r\n")  # a request may have empty lines before it (RFC 9112 section 2.2)
            self._line += data[: data.find(b"\n") + 1] or data

    # What leaves

    async def _answer(self, request: HttpRequest, keep_alive: bool) -> None:  # noqa: FBT001  what the parser says
        is_head = request.method == "HEAD"
        answer = await self._answerer(request)
        self._return_body()
        if self._phase is _Phase.DEAF:
            return
        borrowed = len(answer.body) if len(answer.body) > _PIECE_BYTES else 0
        if not self._shared.answers.take(borrowed):
            answer = problems.render(problems.unexpected(), new_request_id())
            borrowed = 0
        try:
            is_last = (
                not keep_alive or self._is_draining or self._phase is not _Phase.ANSWERING or answer.headers.get("connection") == "close"
            )
            await self._send(answer, is_head=is_head, is_last=is_last)
        finally:
            self._shared.answers.give_back(borrowed)

    async def _send(self, answer: HttpAnswer, *, is_head: bool, is_last: bool) -> None:
        """Write an answer; large ones piece by piece, each when the one before is on its way."""
        head = _head(answer, is_last=is_last)
        body = b"" if is_head else answer.body
        self._due = self._loop.time() + self._limits.answer_s + len(body) / self._limits.answer_bytes_per_s
        if len(body) <= _PIECE_BYTES and self._writable is None:
            self._transport.write(head + body)
        else:
            for piece in (head, *(body[start : start + _PIECE_BYTES] for start in range(0, len(body), _PIECE_BYTES))):
                if self._writable is not None:
                    await self._writable
                if self._phase is _Phase.DEAF:
                    return
                self._transport.write(piece)
        if is_last and self._writable is not None:
            await self._writable  # closing does not wait for long
        if is_last or self._is_draining or self._phase is not _Phase.ANSWERING:
            self._phase = _Phase.DEAF
            self._transport.close()
        else:
            self._phase = _Phase.QUIET
            self._due = self._loop.time() + self._limits.idle_s

    # What ends a connection

    def _judge_fields(self) -> None:
        hosts: list[bytes] = []
        codings = 0
        is_waiting = False
        for name, value in self._headers:
            if name == b"host":
                hosts.append(value)
            elif name == b"transfer-encoding":
                codings += 1
                if value.lower() != b"chunked" or codings > 1:
                    self._stop(MalformedError("The only transfer coding is chunked."))
            elif name == b"content-length" and int(value) > self._body_limit:
                self._stop(self._too_large_body())
            elif name == b"expect":
                is_waiting = value.lower() == b"100-continue"
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
            self._stop(MalformedError("Exactly one Host field is needed, with a host and maybe a port."))
        if is_waiting:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _bound_head(self, data: bytes) -> None:
        """A head that is not whole yet: the parser keeps an unfinished field to itself, so its bytes are counted here."""
        self._head_bytes += len(data)
        if self._head_bytes > self._limits.header_bytes + self._limits.target_bytes + _FIRST_LINE_BYTES:
            self._end_with(self._too_large_head())
        elif b"\n" in data.lstrip(b"\r\n") and self._parser.get_http_version() == "0.0":
            self._end_with(MalformedError("Only HTTP/1.1 is spoken here."))  # HTTP/0.9: a line without a version

    def _too_large_head(self) -> HeadersTooLargeError:
        return HeadersTooLargeError(f"At most {self._limits.header_fields} header fields of {self._limits.header_bytes} bytes together.")

    def _too_large_body(self) -> TooLargeError:
        return TooLargeError(f"A body is at most {self._body_limit} bytes here.")

    def _stop(self, fault: RefusalError) -> NoReturn:
        """Leave the parser, from inside one of its callbacks."""
        self._fault = fault
        raise fault

    def _end_with(self, fault: RefusalError) -> None:
        """The last thing that is said on this connection."""
        if self._phase is _Phase.ANSWERING:
            self._phase = _Phase.LAST_ANSWER  # to an earlier request; nothing goes out after it
            return
        self._phase = _Phase.DEAF
        self._return_body()
        if self._transport.is_closing():
            return
        answer = problems.render(problems.problem_of(fault), new_request_id())
        self._metrics.answered("none", answer.status)
        self._transport.write(_head(answer, is_last=True) + answer.body)
        if isinstance(fault, TooLargeError | OverloadedError):
            self._due = self._loop.time() + self._limits.linger_s
            self._watch()
        else:
            self._transport.close()

    def _watch(self) -> None:
        """Close when the time is up. One timer a connection: `_due` moves often, the timer looks at it now and then."""
        if self._timer is not None:
            self._timer.cancel()
        left = self._due - self._loop.time()
        if left > 0:
            # No later than the shortest time that may be set from here on, so that none of them is overslept.
            self._timer = self._loop.call_later(min(left, self._limits.request_s, self._limits.answer_s, self._limits.idle_s), self._watch)
            return
        self._timer = None
        if self._phase in {_Phase.HEAD, _Phase.BODY}:
            self._end_with(RequestTimeoutError(f"A request is to arrive within {self._limits.request_s:g} seconds."))
        elif self._phase in {_Phase.ANSWERING, _Phase.LAST_ANSWER}:
            self._transport.abort()  # nobody reads the answer
        elif self._dropped > self._limits.linger_bytes:
            self._transport.abort()  # an orderly end would read on from one that sends on
        elif not self._transport.is_closing():
            self._transport.close()

    def _clear_body(self) -> None:
        self._body = []
        self._body_end = bytearray()
        self._body_bytes = 0

    def _return_body(self) -> None:
        self._clear_body()
        self._shared.bodies.give_back(self._borrowed)
        self._borrowed = 0


def _head(answer: HttpAnswer, *, is_last: bool) -> bytes:
    """Status line and fields of an answer, to the empty line."""
    fields = {**answer.headers, "content-length": str(len(answer.body))}
    if is_last:
        fields["connection"] = "close"
    return _STATUS_LINES[answer.status] + "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode() + b"\r\n"
