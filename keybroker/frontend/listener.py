"""The service's front door: accepts connections, waits until each has something to say, and lets it shake hands when it is its turn.

uvicorn would shake hands with as many clients as connect, for as long as they like. Here a connection passes what costs little before
it gets what costs much: an address that has not failed too often (`admission.py`), a place (`places.py`), a first byte that can be TLS,
a turn (`turns.py`), the handshake. From the moment it is accepted it has `HANDSHAKE_SECONDS` for all of it. Each handshake uses the TLS
context that is current then; the protocol object is made for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Callable

from keybroker.frontend.admission import Admission
from keybroker.frontend.failed_handshakes import FailedHandshakes
from keybroker.frontend.metrics import FrontendMetrics
from keybroker.frontend.places import Place, Places
from keybroker.frontend.tls import HandshakeError
from keybroker.frontend.turns import Turns
from keybroker.telemetry import logger

HANDSHAKE_SECONDS = 8.0
SHUTDOWN_SECONDS = 1.0
_BACKLOG = 1_024
_ACCEPTS = 32  # at most, each time around the event loop
_PAUSE_SECONDS = 0.2
_SEND_BUFFER_BYTES = 128 * 1024
_RECEIVE_BUFFER_BYTES = 32 * 1024
_UNREAD_MS = 8_000
_REST_BYTES = 4_096
_TLS_HANDSHAKE = b"\x16"  # the first byte of the record that a ClientHello comes in (RFC 8446 section 5.1)
_NOT_RECORDED = frozenset({"ok", "silent"})  # who connects, says nothing and goes is a load balancer that looks whether we are there

_log = logger()

ProtocolFactory = Callable[[str, Callable[[], None]], asyncio.Protocol]


class TlsListener:
    """Accepts until stopped. Made where an event loop runs.

    Args:
        sock: bound, not yet listening.
        context: the TLS context for the next connection.
        protocol: makes the protocol object of one connection, from the client's address and what to call when it has ended.
        max_connections: open connections, all together, handshakes included.
        max_per_address: the same, from one IP address.
        metrics: counts connections and how handshakes end.
        failures: told of each handshake that failed or was not begun.
        admission: says who may begin one.
        handshake_s: seconds from accepting a connection to the end of its handshake.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: Callable[[], ssl.SSLContext],
        protocol: ProtocolFactory,
        *,
        max_connections: int,
        max_per_address: int,
        metrics: FrontendMetrics,
        failures: FailedHandshakes,
        admission: Admission | None = None,
        handshake_s: float = HANDSHAKE_SECONDS,
    ) -> None:
        self._sock = sock
        self._context = context
        self._protocol = protocol
        self._places = Places(max_connections, max_per_address)
        self._metrics = metrics
        self._failures = failures
        self._admission = admission or Admission()
        self._handshake_s = handshake_s
        self._loop = asyncio.get_running_loop()
        self._turns = Turns()
        self._newcomers: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        metrics.connections.set_function(lambda: self._places.taken)

    @property
    def open_connections(self) -> int:
        """Connections that are open now, handshakes included."""
        return self._places.taken

    def start(self) -> None:
        """Listen, and accept in the background."""
        self._sock.settimeout(0)
        # Accepted sockets inherit these. A client that does not read its answer can hold so much of the kernel's memory, and for so long;
        # and what is read at once is what the event loop keeps a buffer for, on each connection.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_MS)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.listen(_BACKLOG)
        self._loop.add_reader(self._sock, self._accept)

    async def stop(self) -> None:
        """Accept no more and break off handshakes. Established connections go on."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock)
        for task in self._newcomers:
            task.cancel()
        await asyncio.gather(*self._newcomers, return_exceptions=True)
        self._sock.close()

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                sock, peer = self._sock.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue  # gone before it was accepted
            except OSError as err:
                _log.error("cannot accept connections", reason=err.strerror)
                self._loop.remove_reader(self._sock)
                self._pause = self._loop.call_later(_PAUSE_SECONDS, self._loop.add_reader, self._sock, self._accept)
                return
            self._admit(sock, plain_address(peer[0]))

    def _admit(self, sock: socket.socket, address: str) -> None:
        """Give a connection a place, or the door."""
        place = self._places.enter(address) if self._admission.admits(address) else None
        if place is None:
            sock.close()
            self._ended("refused", address)
            return
        sock.settimeout(0)
        task = self._loop.create_task(self._greet(sock, place))
        place.give_up = task.cancel
        self._newcomers.add(task)
        task.add_done_callback(self._newcomers.discard)

    async def _greet(self, sock: socket.socket, place: Place) -> None:
        """From an accepted connection to a completed handshake. This task is cancelled when the connection loses its place or its turn."""
        result = "timeout"
        try:
            async with asyncio.timeout(self._handshake_s):
                first = await self._first_byte(sock)
                if first == _TLS_HANDSHAKE:
                    result = await self._take_turn(sock, place)
                else:
                    result = "not-tls" if first else "silent"
        except TimeoutError:
            pass
        finally:
            if result != "ok":
                sock.close()
                if not place.is_taken:
                    result = "displaced"
                place.leave()
            self._ended(result, place.address)

    async def _first_byte(self, sock: socket.socket) -> bytes:
        """The first byte of a connection, which stays where it is; empty if the connection ends without one."""
        readable: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(sock, _wake, readable)
        try:
            await readable
        finally:
            self._loop.remove_reader(sock)
        try:
            first = sock.recv(1, socket.MSG_PEEK)
            if first != _TLS_HANDSHAKE:
                sock.recv(_REST_BYTES)  # so that closing the socket is no reset
        except OSError:
            return b""
        return first

    async def _take_turn(self, sock: socket.socket, place: Place) -> str:
        """Wait for a turn and use it: `ok`, or why there is no connection."""
        turn = await self._turns.take(place.address, place.give_up, is_known=self._admission.knows(place.address))
        try:
            if not self._admission.admits(place.address):
                return "refused"
            await self._shake_hands(sock, place)
        except HandshakeError as err:
            return err.result
        except OSError:
            return "lost"
        finally:
            self._turns.end(turn)
        place.keep()
        return "ok"

    async def _shake_hands(self, sock: socket.socket, place: Place) -> None:
        """From here on the event loop owns the socket, and closes it on failure before the alert has left: hence the second one.

        Raises:
            HandshakeError, OSError: there is no connection.
        """
        is_complete = False
        with sock.dup() as second:
            try:
                await self._loop.connect_accepted_socket(
                    lambda: self._protocol(place.address, place.leave),
                    sock,
                    ssl=self._context(),
                    ssl_handshake_timeout=self._handshake_s,  # our own time is up sooner
                    ssl_shutdown_timeout=SHUTDOWN_SECONDS,
                )
                is_complete = True
            except HandshakeError as err:
                with contextlib.suppress(OSError):
                    second.send(err.alert)
                raise
            finally:
                (self._admission.succeeded if is_complete else self._admission.failed)(place.address)

    def _ended(self, result: str, address: str) -> None:
        self._metrics.handshake(result)
        if result not in _NOT_RECORDED:
            self._failures.note(result, address)


def plain_address(text: str) -> str:
    """An IP address in its one form: no zone, and IPv4 as IPv4 even where an IPv6 socket took it."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.IPv6Address(int(address)))
    return str(address)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
