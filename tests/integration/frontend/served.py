"""A whole frontend in this process, as `frontend/room.py` puts it together, in front of an authority that says what a test wants.

TLS, HTTP, the wire and the validation of SVIDs are the real ones; only the authority's answers are made up. Clients are raw sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import itertools
import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import structlog
import uvloop

from keybroker.clock import SystemClock
from keybroker.config import TelemetryConfig
from keybroker.frontend.app import Application
from keybroker.frontend.authority_link import ASK_SECONDS, AuthorityLink, R
from keybroker.frontend.exchange import Exchange
from keybroker.frontend.failed_handshakes import FailedHandshakes
from keybroker.frontend.limits import ByteBudget, HttpLimits
from keybroker.frontend.listener import TlsListener
from keybroker.frontend.metrics import FrontendMetrics
from keybroker.frontend.places import SvidShares
from keybroker.frontend.protocol import BoundedHttpProtocol, Shared
from keybroker.frontend.signing import body_limit
from keybroker.frontend.tls import ServerTls
from keybroker.identity.bundle import TrustBundles
from keybroker.identity.x509_svid import SvidValidator
from keybroker.model.call import (
    MAX_ANSWER_BYTES,
    Answer,
    AnyAsk,
    Call,
)
from keybroker.tracing import Tracer
from keybroker.wire import Link
from tests.authorities import CA_SHAPE, Authority, Issued, Shape
from tests.integration.frontend.fake_authority import FakeAuthority

PATIENCE_S = 20.0  # for a test that has gone wrong
BROKER = "spiffe://example.org/keybroker"
WORKLOAD = "spiffe://example.org/payments/api"

_numbers = itertools.count()
T = TypeVar("T")


def authority(shape: Shape = CA_SHAPE) -> Authority:
    """A root that is valid now, with a name of its own."""
    day = datetime.timedelta(days=1)
    now = datetime.datetime.now(datetime.UTC)
    return Authority(f"root {next(_numbers)}", dataclasses.replace(shape, not_before=now - day, not_after=now + day))


def current(**changes: Any) -> Shape:
    """A good SVID for the next hour, with changes."""
    now = datetime.datetime.now(datetime.UTC)
    hour = datetime.timedelta(hours=1)
    return Shape(**{"uris": (WORKLOAD,), "not_before": now - hour, "not_after": now + hour, **changes})


class ImpatientLink(AuthorityLink):
    """Waits for `patience_s` at most."""

    patience_s = ASK_SECONDS

    async def ask(self, exchange: Exchange, ask: AnyAsk, expected: type[R], seconds: float = ASK_SECONDS) -> R:
        """As the link, sooner."""
        return await super().ask(exchange, ask, expected, min(seconds, self.patience_s))


@dataclass
class Answered:
    """One HTTP answer. Header names are lower-case."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Served:
    """The frontend, its files, and what it logged.

    Attributes:
        faults: log records with a traceback.
        events: what was logged, as structlog has it.
    """

    directory: Path
    limits: HttpLimits = field(default_factory=lambda: HttpLimits(body_bytes=body_limit, linger_s=0.3))
    max_connections: int = 256
    max_per_svid: int = 256
    budget: ByteBudget = field(default_factory=lambda: ByteBudget(64 * 1024 * 1024))
    answers: ByteBudget = field(default_factory=lambda: ByteBudget(64 * 1024 * 1024))
    root: Authority = field(default_factory=authority)
    port: int = 0
    faults: list[str] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bundle.write_bytes(self.root.pem)
        self.root.issue(current(uris=(BROKER,))).write(self.directory / "broker.pem")
        self.svid = self.root.issue(current()).write(self.directory / "workload.pem")
        bundles = TrustBundles.load({"example.org": self.bundle})
        self.authority = FakeAuthority(self.directory / "authority.sock", SvidValidator(bundles, None, SystemClock()))
        self.metrics = FrontendMetrics()
        self.shared = Shared(self.budget, self.answers, SvidShares(self.max_per_svid))
        self.failures = FailedHandshakes()
        self._bundles = bundles
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def bundle(self) -> Path:
        """What clients trust."""
        return self.directory / "bundle.pem"

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.on_loop(self._start())
        except BaseException:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.on_loop(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    def on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Run this where the frontend runs, and wait for it."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(PATIENCE_S)

    def write_svid(self, issued: Issued, name: str = "other") -> Path:
        """A client's file."""
        return issued.write(self.directory / f"{name}.pem")

    def counter(self, line: str) -> float:
        """A metric's value by everything that stands before it; 0 if it is not there."""
        values = [each.rpartition(" ")[2] for each in self.metrics.text().decode().splitlines() if each.rpartition(" ")[0] == line]
        return float(values[0]) if values else 0.0

    def client_context(self, svid: Path | None) -> ssl.SSLContext:
        """Of a client with or without a certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(self.bundle)
        if svid is not None:
            context.load_cert_chain(svid)
        return context

    @contextlib.contextmanager
    def connected(self, svid: Path | None = None) -> Iterator[Conversation]:
        """A client's raw connection, over TLS."""
        context = self.client_context(svid or self.svid)
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE_S) as plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with context.wrap_socket(plain) as tls:
                yield Conversation(tls)

    def ask(self, data: bytes, svid: Path | None = None, *, is_head: bool = False) -> list[Answered]:
        """Every answer that these bytes get before the server closes, on a connection of their own."""
        with self.connected(svid) as conversation:
            conversation.send(data)
            return conversation.rest(is_head=is_head)

    async def _start(self) -> None:
        self.tls = ServerTls(self.directory / "broker.pem", self._bundles)
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        self.port = int(sock.getsockname()[1])
        await self.authority.start()
        self.link = Link[Call, Answer](self.directory / "authority.sock", os.getuid(), Answer, MAX_ANSWER_BYTES)
        self.asking = ImpatientLink(self.link)
        app = Application(self.asking, self.metrics, Tracer("frontend", TelemetryConfig()))

        def make(address: str, on_lost: Callable[[], None]) -> asyncio.Protocol:
            return BoundedHttpProtocol(
                app.answer, limits=self.limits, shared=self.shared, metrics=self.metrics, address=address, on_lost=on_lost
            )

        self.listener = TlsListener(
            sock,
            lambda: self.tls.context,
            make,
            max_connections=self.max_connections,
            max_per_address=self.max_connections,
            metrics=self.metrics,
            failures=self.failures,
        )
        self.link.start()
        self.listener.start()
        while not self.link.is_up:
            await asyncio.sleep(0.005)

    async def _stop(self) -> None:
        await self.listener.stop()
        for connection in list(self.shared.connections):
            connection.abort()
        await self.link.stop()
        await self.authority.stop()
        await asyncio.sleep(0.05)


class Conversation:
    """A raw client connection."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self.sock = sock
        self.received = b""

    def send(self, data: bytes) -> None:
        """Send as much as the server takes: it may have closed."""
        with contextlib.suppress(OSError):
            self.sock.sendall(data)

    def exchange(self, data: bytes) -> Answered:
        """Send one request and read one answer; the connection stays."""
        self.send(data)
        return self.one()

    def one(self) -> Answered:
        """One answer."""
        while True:
            answer, rest = parse(self.received)
            if answer is not None:
                self.received = rest
                return answer
            piece = self.sock.recv(65_536)
            assert piece, "the server closed before it answered"
            self.received += piece

    def rest(self, *, is_head: bool = False) -> list[Answered]:
        """Everything until the server closes. Raises TimeoutError if it does not."""
        with contextlib.suppress(ConnectionResetError, ssl.SSLEOFError):
            while piece := self.sock.recv(65_536):
                self.received += piece
        answers = []
        while self.received:
            answer, self.received = parse(self.received, is_head=is_head)
            assert answer is not None, f"half an answer: {self.received[:200]!r}"
            answers.append(answer)
        return answers


def parse(data: bytes, *, is_head: bool = False) -> tuple[Answered | None, bytes]:
    """The first whole answer of some bytes, and what follows it. Every answer but an interim one has a Content-Length."""
    head, end, rest = data.partition(b"\r\n\r\n")
    if not end:
        return None, data
    status, *lines = head.decode().split("\r\n")
    assert status.startswith("HTTP/1.1 ")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    assert len(headers) == len(lines), "a header field is there twice"
    if status.startswith("HTTP/1.1 100"):
        return Answered(100, headers, b""), rest
    size = 0 if is_head else int(headers["content-length"])
    assert "content-length" in headers
    if len(rest) < size:
        return None, data
    return Answered(int(status[9:12]), headers, rest[:size]), rest[size:]


def request(target: str = "/v1/whoami", *fields: str, method: str = "GET", body: bytes | None = None, close: bool = False) -> bytes:
    """A request that is well-formed unless its parts are not."""
    lines = [f"{method} {target} HTTP/1.1", "Host: broker", *fields]
    if close:
        lines.append("Connection: close")
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def sign(body: bytes, *fields: str, target: str = "/v1/keys/orders/sign", close: bool = False) -> bytes:
    """A sign request."""
    return request(target, "Content-Type: application/json", *fields, method="POST", body=body, close=close)


class Tracebacks(logging.Handler):
    """Collects what the standard library's loggers say with a traceback, or as an error."""

    def __init__(self, into: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._into = into

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self._into.append(f"{record.name}: {record.getMessage()} {record.exc_info}")


@contextlib.contextmanager
def listening_to_logs(served: Served) -> Iterator[None]:
    """Everything that is logged while the block runs."""
    handler = Tracebacks(served.faults)
    logging.getLogger().addHandler(handler)
    try:
        with structlog.testing.capture_logs() as events:
            served.events = events
            yield
    finally:
        logging.getLogger().removeHandler(handler)
