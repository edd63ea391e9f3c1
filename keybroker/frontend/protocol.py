"""HTTP/1.1 on one connection (RFC 9112), bounded in time and size. What is not plainly one request gets one 400 and the door.

uvicorn's protocol reads what it is sent for as long and as much as it is sent, answers in plain text, and starts the application
before a request is whole. Here the application sees whole requests only: until then this file alone answers, so that there is never a
second answer to one request. Requests are not pipelined: whoever sends a second one before the first is answered gets the first answer
and the end of the connection.
"""

from __future__ import annotations

import asyncio
import enum
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NoReturn

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

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
from keybroker.frontend.exchange import EXTENSION, Client, new_request_id
from keybroker.frontend.metrics import FrontendMetrics
from keybroker.identity.tls_peer import peer_chain

_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]{1,300}")  # what RFC 3986 section 3.2.2 makes hosts and ports of
_FIRST_LINE_BYTES = 1024  # method, version and white space, generously
_NOT_HTTP = "The request is not HTTP/1.1 as it should be."


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """How much and how long one connection may send.

    Attributes:
        request_s: seconds for a whole request, from its first byte; for the first one from the end of the TLS handshake.
        idle_s: seconds between an answer and the next request.
        send_s: seconds in which a client that has stopped reading must begin again.
        linger_s: seconds in which the rest of a body that is too large is dropped, so that its sender gets to read the answer.
        linger_bytes: of it that are read at all in that time.
        target_bytes: of the request target.
        header_bytes: names and values of all header fields, with four bytes for each.
        header_fields: how many.
        body_bytes: for the path of a request target, how large a body may be.
    """

    body_bytes: Callable[[bytes], int]
    request_s: float = 8.0
    idle_s: float = 60.0
    send_s: float = 8.0
    linger_s: float = 1.0
    linger_bytes: int = 1024 * 1024
    target_bytes: int = 8 * 1024
    header_bytes: int = 16 * 1024
    header_fields: int = 100


@dataclass(slots=True)
class BodyBudget:
    """Bytes of bodies that all connections together hold at one time."""

    left: int


class _Phase(enum.Enum):
    QUIET = enum.auto()  # nothing of a request is there
    HEAD = enum.auto()
    BODY = enum.auto()
    ANSWERING = enum.auto()
    DEAF = enum.auto()  # what still arrives is dropped


class BoundedHttpProtocol(HttpToolsProtocol):
    """One client connection.

    Args:
        config: of the uvicorn server that this connection is part of.
        server_state: of the same server; shutting it down drains its connections.
        limits: for this connection.
        budget: shared by all connections.
        metrics: counts what is answered here.
        address: of the client.
        on_lost: called once, when the connection has ended.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        *,
        limits: HttpLimits,
        budget: BodyBudget,
        metrics: FrontendMetrics,
        address: str,
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__(config, server_state, app_state={})
        self._limits = limits
        self._budget = budget
        self._metrics = metrics
        self._address = address
        self._on_lost = on_lost
        self._peer = Client((), address)
        self._phase = _Phase.QUIET
        self._fault: RefusalError | None = None
        self._is_draining = False
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf  # of the loop's clock: when this phase has taken too long
        self._head_bytes = 0  # of an unfinished head, as they came
        self._field_bytes = 0  # of its whole fields, as they are counted
        self._body = bytearray()
        self._body_limit = 0
        self._borrowed = 0
        self._dropped = 0

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """TLS is established: remember who is there, and start the clock."""
        self.connections.add(self)
        self.transport = transport
        self.flow = FlowControl(transport)
        self.client = (self._address, 0)
        self.scheme = "https"
        self._peer = Client(peer_chain(transport.get_extra_info("ssl_object")), self._address)
        self._due = self.loop.time() + self._limits.request_s
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything. What the authority was asked is finished and recorded all the same."""
        self._phase = _Phase.DEAF
        if self._timer is not None:
            self._timer.cancel()
        self._return_body()
        super().connection_lost(exc)
        self._on_lost()

    def shutdown(self) -> None:
        """The server drains: finish the request that is under way, if there is one, then close."""
        self._is_draining = True
        if self._phase is _Phase.QUIET:
            self.transport.close()
        elif self._phase is _Phase.ANSWERING:
            self.cycle.keep_alive = False

    # What arrives

    def data_received(self, data: bytes) -> None:
        """Parse; whatever breaks a rule ends here, with one answer."""
        if self._phase is _Phase.DEAF:
            self._dropped += len(data)
            if self._dropped > self._limits.linger_bytes:
                self.flow.pause_reading()
            return
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._end_with(self._fault or MalformedError(_NOT_HTTP))
        else:
            if self._phase is _Phase.HEAD:
                self._bound_head(data)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        if self._phase is _Phase.ANSWERING:
            self._stop(MalformedError(_NOT_HTTP))  # pipelined: the answer under way is the last one
        super().on_message_begin()
        self._phase = _Phase.HEAD
        self._head_bytes = self._field_bytes = 0
        if self.cycle is not None:  # the first request's time began with the connection
            self._due = self.loop.time() + self._limits.request_s

    def on_url(self, url: bytes) -> None:
        """A piece of the request target."""
        self.url += url
        if len(self.url) > self._limits.target_bytes:
            self._stop(UriTooLongError(f"A request target is at most {self._limits.target_bytes} bytes."))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One whole field."""
        if self._phase is _Phase.BODY:
            self._stop(MalformedError("Trailer fields are not taken."))
        self.headers.append((name.lower(), value.strip(b" \t")))  # the parser leaves white space at the end (RFC 9110 section 5.5)
        self._field_bytes += len(name) + len(value) + 4
        if self._field_bytes > self._limits.header_bytes or len(self.headers) > self._limits.header_fields:
            self._stop(self._too_large_head())

    def on_headers_complete(self) -> None:
        """Everything but the body is there: judge it."""
        self._phase = _Phase.BODY
        if self.parser.get_http_version() != "1.1":
            self._stop(MalformedError("Only HTTP/1.1 is spoken here."))
        if self.parser.should_upgrade():
            self._stop(MalformedError("This server speaks HTTP/1.1 and nothing else."))
        target = httptools.parse_url(self.url)
        if not target.path or b"#" in self.url:  # a fragment is no part of a request target (RFC 9112 section 3.2)
            self._stop(MalformedError(_NOT_HTTP))
        self._body_limit = self._limits.body_bytes(target.path)
        self._judge_fields()
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]  # a TypedDict is a dict
        scope["method"] = self.parser.get_method().decode()
        # Not decoded: a path with percent-encoding names nothing here, so that there is one spelling of every resource.
        scope["path"] = target.path.decode()
        scope["raw_path"] = target.path
        scope["query_string"] = target.query or b""
        scope["extensions"] = {EXTENSION: self._peer}

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        size = len(body)
        if len(self._body) + size > self._body_limit:
            self._stop(TooLargeError(f"A body is at most {self._body_limit} bytes here."))
        if size > self._budget.left:
            self._stop(OverloadedError("Too much is being uploaded.", retry_after=1))
        self._budget.left -= size
        self._borrowed += size
        self._body += body

    def on_message_complete(self) -> None:
        """The request is whole: the application may have it."""
        self._phase = _Phase.ANSWERING
        self._due = math.inf
        whole = asyncio.Event()
        whole.set()
        self.cycle = RequestResponseCycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=[],
            message_event=whole,
            expect_100_continue=False,
            keep_alive=self.parser.should_keep_alive() and not self._is_draining,
            on_response=self.on_response_complete,
        )
        self.cycle.body = self._body
        self.cycle.more_body = False
        self._body = bytearray()
        self._start_asgi_task(self.cycle, self.app)

    def on_response_complete(self) -> None:
        """The answer is written: wait for the next request."""
        self.server_state.total_requests += 1
        self._return_body()
        if self._phase is _Phase.ANSWERING:
            self._phase = _Phase.QUIET
            if not self.flow.write_paused:
                self._due = self.loop.time() + self._limits.idle_s

    def pause_writing(self) -> None:
        """The client does not read its answer: it has a while."""
        super().pause_writing()
        self._due = self.loop.time() + self._limits.send_s
        self._watch()

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        if self._phase is _Phase.ANSWERING:
            self._due = math.inf
        elif self._phase is _Phase.QUIET:
            self._due = self.loop.time() + self._limits.idle_s

    # What ends a connection

    def _judge_fields(self) -> None:
        hosts: list[bytes] = []
        is_waiting = False
        for name, value in self.headers:
            if name == b"host":
                hosts.append(value)
            elif name == b"transfer-encoding" and value.lower() != b"chunked":
                self._stop(MalformedError("The only transfer coding is chunked."))
            elif name == b"content-length" and int(value) > self._body_limit:
                self._stop(TooLargeError(f"A body is at most {self._body_limit} bytes here."))
            elif name == b"expect":
                is_waiting = value.lower() == b"100-continue"
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
            self._stop(MalformedError("Exactly one Host field is needed, with a host and maybe a port."))
        if is_waiting:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _bound_head(self, data: bytes) -> None:
        """A head that is not whole yet: the parser keeps an unfinished field to itself, so its bytes are counted here."""
        self._head_bytes += len(data)
        if self._head_bytes > self._limits.header_bytes + self._limits.target_bytes + _FIRST_LINE_BYTES:
            self._end_with(self._too_large_head())
        elif b"\n" in data.lstrip(b"\r\n") and self.parser.get_http_version() == "0.0":
            self._end_with(MalformedError("Only HTTP/1.1 is spoken here."))  # HTTP/0.9: a line without a version

    def _too_large_head(self) -> HeadersTooLargeError:
        return HeadersTooLargeError(f"At most {self._limits.header_fields} header fields of {self._limits.header_bytes} bytes together.")

    def _stop(self, fault: RefusalError) -> NoReturn:
        """Leave the parser, from inside one of its callbacks."""
        self._fault = fault
        raise fault

    def _end_with(self, fault: RefusalError) -> None:
        """The last thing that is said on this connection."""
        if self._phase is _Phase.ANSWERING:
            # The application answers an earlier request: that answer goes out, and nothing after it.
            self._phase = _Phase.DEAF
            self.cycle.keep_alive = False
            self.flow.pause_reading()
            return
        self._phase = _Phase.DEAF
        self._return_body()
        if self.transport.is_closing():
            return
        answer = problems.render(problems.problem_of(fault), new_request_id(), {"connection": "close"})
        self._metrics.answered("none", answer.status)
        lines = [
            f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}",
            *(f"{name}: {value}" for name, value in answer.headers.items()),
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + answer.body)
        if isinstance(fault, TooLargeError):
            self._due = self.loop.time() + self._limits.linger_s
            self._watch()
        else:
            self.transport.close()

    def _watch(self) -> None:
        """Close when the time is up. One timer a connection: `_due` moves often, the timer looks at it now and then."""
        if self._timer is not None:
            self._timer.cancel()
        left = self._due - self.loop.time()
        if left > 0:
            # No later than the shortest time that may be set from here on, so that none of them is overslept.
            self._timer = self.loop.call_later(min(left, self._limits.request_s, self._limits.idle_s, self._limits.send_s), self._watch)
            return
        self._timer = None
        if self._phase in {_Phase.HEAD, _Phase.BODY}:
            self._end_with(RequestTimeoutError(f"A request is to arrive within {self._limits.request_s:g} seconds."))
        elif self.flow.write_paused or self._dropped > self._limits.linger_bytes:
            self.transport.abort()  # an orderly end would wait for a client that has stopped reading, or read on from one that sends on
        elif not self.transport.is_closing():
            self.transport.close()

    def _return_body(self) -> None:
        self._budget.left += self._borrowed
        self._borrowed = 0
