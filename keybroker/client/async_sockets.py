"""Sockets for asyncio that lose nothing that the peer has said.

A broker that refuses our SVID says so in an alert after the handshake (TLS 1.3), and closes. asyncio's own transports drop what has
arrived when a write fails, and with it the reason; here, as with blocking sockets, a write may fail and the next read still gets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, TypeVar

import httpcore

_PIECE_BYTES = 64 * 1024

R = TypeVar("R")


class AsyncioBackend(httpcore.AsyncNetworkBackend):
    """Opens TCP connections on the running event loop."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  the signature of httpcore
        local_address: str | None = None,  # noqa: ARG002  as above; our pools never give it
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,  # noqa: ARG002  as above
    ) -> httpcore.AsyncNetworkStream:
        """Open a connection to the first address of the host that takes it."""
        async with _mapped(timeout, httpcore.ConnectTimeout, httpcore.ConnectError):
            return _PlainStream(await _connect(host, port))


class _PlainStream(httpcore.AsyncNetworkStream):
    """TCP, until TLS starts on it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  as above
    ) -> httpcore.AsyncNetworkStream:
        stream = _TlsStream(self._sock, ssl_context, server_hostname)
        try:
            async with _mapped(timeout, httpcore.ConnectTimeout, httpcore.ConnectError):
                await stream.shake_hands()
        except BaseException:
            await stream.aclose()
            raise
        return stream

    async def aclose(self) -> None:
        self._sock.close()

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":  # of an idle connection: the peer has ended it
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            return bool(poll.poll(0))
        return None


class _TlsStream(_PlainStream):
    def __init__(self, sock: socket.socket, context: ssl.SSLContext, hostname: str | None) -> None:
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=hostname)

    async def shake_hands(self) -> None:
        """Finish the handshake. What the last step would send stays here where the step fails: our certificate is for the broker."""
        await self._step(self._tls.do_handshake)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109  as above
        async with _mapped(timeout, httpcore.ReadTimeout, httpcore.ReadError):
            try:
                return await self._step(lambda: self._tls.read(max_bytes))
            except ssl.SSLEOFError:  # no close_notify: HTTP knows whether it has the whole
                return b""

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109  as above
        async with _mapped(timeout, httpcore.WriteTimeout, httpcore.WriteError):
            for start in range(0, len(buffer), _PIECE_BYTES):
                await self._write(buffer[start : start + _PIECE_BYTES])

    def get_extra_info(self, info: str) -> Any:
        return self._tls if info == "ssl_object" else super().get_extra_info(info)

    async def _write(self, piece: bytes) -> None:
        await self._step(lambda: self._tls.write(piece))

    async def _step(self, step: Callable[[], R]) -> R:
        """One step of TLS, with as many bytes out and in as it takes."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                await self._flush()
                if data := await loop.sock_recv(self._sock, _PIECE_BYTES):
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            else:
                await self._flush()
                return result

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await asyncio.get_running_loop().sock_sendall(self._sock, self._outgoing.read())


async def _connect(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    failure: OSError = OSError("the name has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)  # noqa: FBT003  the signature of the standard library
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(sock, address)
        except BaseException as err:
            sock.close()
            if not isinstance(err, OSError):
                raise
            failure = err
        else:
            return sock
    raise failure


@contextlib.asynccontextmanager
async def _mapped(seconds: float | None, late: type[httpcore.TimeoutException], broken: type[httpcore.NetworkError]) -> AsyncIterator[None]:
    """Bounded in time; failures become httpcore's."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as err:
        raise late(str(err)) from err
    except OSError as err:
        raise broken(str(err)) from err
