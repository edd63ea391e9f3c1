"""The service's front door: accepts connections, counts them before TLS is spoken, and hands each to its own protocol object.

uvicorn would shake hands with as many clients as connect, for as long as they like. Here a connection over the limit is closed before
it costs a handshake, a handshake has a deadline, and each new connection gets the TLS context that is current then.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections import Counter
from collections.abc import Callable

from keybroker.frontend.admission import Admission
from keybroker.frontend.failed_handshakes import FailedHandshakes
from keybroker.frontend.metrics import FrontendMetrics
from keybroker.frontend.tls import HandshakeError
from keybroker.telemetry import logger

HANDSHAKE_SECONDS = 8.0
SHUTDOWN_SECONDS = 1.0
_BACKLOG = 1_024
_PAUSE_SECONDS = 0.2
_SEND_BUFFER_BYTES = 128 * 1024
_UNREAD_MS = 8_000

_log = logger()

ProtocolFactory = Callable[[str, Callable[[], None]], asyncio.Protocol]


class TlsListener:
    """Accepts until stopped.

    Args:
        sock: bound, not yet listening.
        context: the TLS context for the next connection.
        protocol: makes the protocol object of one connection, from the client's address and what to call when it has ended.
        max_connections: open connections, all together, handshakes included.
        max_per_address: the same, from one IP address.
        metrics: counts connections and how handshakes end.
        failures: told of each handshake that failed or was not begun.
        admission: says who may begin one.
        handshake_s: seconds for a handshake.
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
        self._max_connections = max_connections
        self._max_per_address = max_per_address
        self._metrics = metrics
        self._failures = failures
        self._admission = admission or Admission()
        self._handshake_s = handshake_s
        self._open = 0
        self._open_by_address: Counter[str] = Counter()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None

    @property
    def open_connections(self) -> int:
        """Connections that are open now, handshakes included."""
        return self._open

    def start(self) -> None:
        """Listen, and accept in the background."""
        self._sock.settimeout(0)
        # Accepted sockets inherit both. A client that does not read its answer can hold so much of the kernel's memory, and for so long.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_MS)
        self._sock.listen(_BACKLOG)
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    async def stop(self) -> None:
        """Accept no more and break off handshakes. Established connections go on."""
        tasks = [task for task in (self._accepting, *self._handshakes) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._sock.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, peer = await loop.sock_accept(self._sock)
            except ConnectionError:
                continue  # gone before it was accepted
            except OSError as err:
                _log.error("cannot accept connections", reason=err.strerror)
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            address = plain_address(peer[0])
            is_full = self._open >= self._max_connections or self._open_by_address[address] >= self._max_per_address
            if is_full or not self._admission.admits(address):
                self._metrics.handshake("refused")
                self._failures.note("refused", address)
                sock.close()
                continue
            task = loop.create_task(self._shake_hands(sock, address, self._admit(address)))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _shake_hands(self, sock: socket.socket, address: str, leave: Callable[[], None]) -> None:
        """From here on the event loop owns the socket, and closes it on failure before the alert has left: hence the second one."""
        loop = asyncio.get_running_loop()
        result = "failed"
        try:
            with sock.dup() as second:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    await loop.connect_accepted_socket(
                        lambda: self._protocol(address, leave),
                        sock,
                        ssl=self._context(),
                        ssl_handshake_timeout=self._handshake_s,
                        ssl_shutdown_timeout=SHUTDOWN_SECONDS,
                    )
                    result = "ok"
                except HandshakeError as err:
                    result = err.result
                    with contextlib.suppress(OSError):
                        second.send(err.alert)
        except ConnectionAbortedError:
            result = "timeout"
        except OSError:
            result = "lost"
        finally:
            if result != "ok":
                sock.close()
                leave()
                self._admission.failed(address)
                self._failures.note(result, address)
            self._metrics.handshake(result)

    def _admit(self, address: str) -> Callable[[], None]:
        """Count a connection; the answer is to be called when it has ended, and counts it out once however often it is called."""
        self._open += 1
        self._open_by_address[address] += 1
        self._metrics.connections.set(self._open)
        inside = [address]

        def leave() -> None:
            if inside:
                inside.clear()
                self._open -= 1
                self._open_by_address[address] -= 1
                if not self._open_by_address[address]:
                    del self._open_by_address[address]
                self._metrics.connections.set(self._open)

        return leave


def plain_address(text: str) -> str:
    """An IP address in its one form: no zone, and IPv4 as IPv4 even where an IPv6 socket took it."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.IPv6Address(int(address)))
    return str(address)
