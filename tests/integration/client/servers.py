"""Real TLS servers in this process, good and bad, that write down what they receive; and both clients, asked in one way."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import inspect
import itertools
import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from keybroker.client import AsyncClient, Client
from tests.authorities import CA_SHAPE, Authority, Issued, Shape

BROKER = "spiffe://example.org/keybroker"
WORKLOAD = "spiffe://example.org/payments/api"
PATIENCE_S = 10  # for a test that has gone wrong
WHOAMI = {"spiffe_id": WORKLOAD, "trust_domain": "example.org", "svid_sha256": "ab", "not_after": "2030-01-01T00:00:00Z", "address": "::1"}
SIGNED = {
    "signature": "c2ln", "key": "orders", "version": 1, "algorithm": "ES256", "use": "01J",
    "records": {"log": "example.org/1", "intent": 1, "outcome": 2},
}  # fmt: skip

_numbers = itertools.count()


def now() -> datetime.datetime:
    """These tests use the real clock, because OpenSSL does."""
    return datetime.datetime.now(datetime.UTC)


def authority() -> Authority:
    """A root that is valid now, with a name of its own."""
    day = datetime.timedelta(days=1)
    return Authority(f"root {next(_numbers)}", shape=dataclasses.replace(CA_SHAPE, not_before=now() - day, not_after=now() + day))


def shape(uri: str, seconds: float = 3_600, since: float = -3_600) -> Shape:
    """An SVID from `since` to `seconds` from now."""
    second = datetime.timedelta(seconds=1)
    return Shape(uris=(uri,), not_before=now() + since * second, not_after=now() + seconds * second)


@dataclass
class Place:
    """Where the files of one client are, and the authority that its broker must come from."""

    directory: Path
    authority: Authority = field(default_factory=authority)

    def __post_init__(self) -> None:
        self.bundle.write_bytes(self.authority.pem)
        self.write_svid(self.authority.issue(shape(WORKLOAD)))

    @property
    def svid(self) -> Path:
        return self.directory / "svid.pem"

    @property
    def bundle(self) -> Path:
        return self.directory / "bundle.pem"

    def write_svid(self, issued: Issued) -> None:
        issued.write(self.svid)

    def server_context(self, issued: Issued | None = None, clients: Authority | None = None) -> ssl.SSLContext:
        """TLS 1.3, client certificates required, as a broker has it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain((issued or self.authority.issue(shape(BROKER))).write(self.directory / "server.pem"))
        context.load_verify_locations(cadata=(clients or self.authority).pem.decode())
        return context


class Connection:
    """The server's end of one connection."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self.received = b""
        self.peer = b""

    def read_request(self) -> bytes:
        """One request, head and body; empty when the client has gone."""
        while b"\r\n\r\n" not in self.received:
            if not self._receive():
                return b""
        head, _, _ = self.received.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        size = len(head) + 4 + int(fields.get(b"content-length", b"0"))
        while len(self.received) < size:
            if not self._receive():
                return b""
        request, self.received = self.received[:size], self.received[size:]
        with self.server.lock:
            self.server.requests.append(request)
        return request

    def answer(self, value: object, status: str = "200 OK", *headers: str, media_type: str = "application/json") -> None:
        """One whole answer."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        head = [f"HTTP/1.1 {status}", f"Content-Type: {media_type}", f"Content-Length: {len(body)}", *headers]
        self.send("\r\n".join(head).encode() + b"\r\n\r\n" + body)

    def problem(self, code: str, status: str, *headers: str) -> None:
        """A problem document."""
        document = {"type": f"urn:keybroker:problem:{code}", "title": code, "status": int(status[:3]), "detail": "No."}
        self.answer(document, status, *headers, media_type="application/problem+json")

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def reset(self) -> None:
        """End it with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _receive(self) -> bytes:
        data = self.sock.recv(65_536)
        self.received += data
        with self.server.lock:
            self.server.received += data
        return data


Behaviour = Callable[[Connection], None]


def every(answer: Callable[[Connection, bytes], None]) -> Behaviour:
    """Answer each request on a connection, until the client ends it."""

    def behave(connection: Connection) -> None:
        while request := connection.read_request():
            answer(connection, request)

    return behave


def whoami(connection: Connection, request: bytes) -> None:
    """A broker's answer to /v1/whoami, or to a signature request."""
    connection.answer(SIGNED if request.startswith(b"POST") else WHOAMI)


def stays_silent(connection: Connection) -> None:
    """Say nothing until the test ends."""
    connection.server.stop.wait()


class Server:
    """Accepts connections until the test ends.

    Attributes:
        received: every byte that clients sent, after TLS where there is TLS.
        requests: whole requests.
        accepted: TCP connections.
        shaken: finished TLS handshakes, as the server sees it.
        ended: connections whose behaviour has ended.
        peers: DER certificates of clients.
        cue: for behaviours that wait for the test.
        stop: set when the test ends.
    """

    def __init__(self, context: ssl.SSLContext | None, behave: Behaviour) -> None:
        self.context = context
        self.behave = behave
        self.lock = threading.Lock()
        self.received = b""
        self.requests: list[bytes] = []
        self.accepted = 0
        self.shaken = 0
        self.ended = 0
        self.peers: list[bytes] = []
        self.cue = threading.Semaphore(0)
        self.stop = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._listener.settimeout(0.02)
        self.port = int(self._listener.getsockname()[1])
        self.url = f"https://127.0.0.1:{self.port}"
        self._threads = [threading.Thread(target=self._accept)]
        self._open: list[socket.socket] = []

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop.set()
        self._threads[0].join(PATIENCE_S)
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)
        self._listener.close()

    def _accept(self) -> None:
        while not self.stop.is_set():
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            self.accepted += 1
            self._open.append(sock)
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE_S)
        try:
            if self.context is not None:
                sock = self.context.wrap_socket(sock, server_side=True)
                self._open.append(sock)
            with self.lock:
                self.shaken += 1
                self.peers += [sock.getpeercert(binary_form=True) or b""] if isinstance(sock, ssl.SSLSocket) else []
            self.behave(Connection(self, sock))
        except OSError:
            pass  # the client went away, which is what many tests are about
        finally:
            sock.close()
            with self.lock:
                self.ended += 1


class Blocking:
    """`Client`, as the tests ask it."""

    def __init__(self, url: str, place: Place, **options: Any) -> None:
        self._client = Client(url, svid=place.svid, bundle=place.bundle, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def close(self) -> None:
        self._client.close()

    def end(self) -> None:
        """There is nothing more to end."""


class Awaited:
    """`AsyncClient`, asked as if it were blocking: each call runs an event loop until it has its answer."""

    def __init__(self, url: str, place: Place, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(url, svid=place.svid, bundle=place.bundle, **options)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        assert inspect.iscoroutinefunction(method)
        return lambda *args, **kwargs: self._runner.run(method(*args, **kwargs))

    def close(self) -> None:
        self._runner.run(self._client.aclose())

    def end(self) -> None:
        """Close the event loop."""
        self._runner.close()


Made = Blocking | Awaited
Kind = type[Blocking] | type[Awaited]


@contextlib.contextmanager
def asking(kind: Kind, server: Server | str, place: Place, **options: Any) -> Iterator[Made]:
    """A client, closed in the end."""
    client = kind(server if isinstance(server, str) else server.url, place, **{"timeout_s": PATIENCE_S, **options})
    try:
        yield client
    finally:
        client.close()
        client.end()


@contextlib.contextmanager
def facing(
    kind: Kind, place: Place, context: ssl.SSLContext | None, behave: Behaviour | None = None, **options: Any
) -> Iterator[tuple[Server, Made]]:
    """A server, and a client of it. Without a behaviour it answers as a broker would."""
    with Server(context, behave or every(whoami)) as server, asking(kind, server, place, **options) as client:
        yield server, client
