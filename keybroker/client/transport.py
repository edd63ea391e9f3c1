"""Requests to one broker: mutual TLS 1.3, bounded in time and size, tried again only where that cannot use a key twice.

RFC 9110 (HTTP), RFC 9457 (problem details). Made on httpcore, which knows no proxies, redirects, cookies or environment.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpcore

from keybroker.client import asks, problems
from keybroker.client.asks import Ask
from keybroker.client.async_sockets import AsyncioBackend
from keybroker.client.call import Call
from keybroker.client.deadline import DeadlineBackend
from keybroker.client.errors import BrokerAnswerError, BrokerIdentityError, BrokerUnreachableError, PendingError, SettingsError
from keybroker.client.pools import Pools
from keybroker.client.tls import Credentials, WrongPeerError
from keybroker.errors import KeyBrokerError, SvidInvalidError
from keybroker.model.identity import SpiffeId

TIMEOUT_S = 30.0
MAX_CONNECTIONS = 100
MAX_ANSWER_BYTES = 32 * 1024 * 1024  # a page of records is cut at 8 MiB
_CONNECT_S = 5.0
_KEEP_S = 30.0  # half of what a broker keeps an idle connection for: neither end closes it under the other
_OK = 200
_ACCEPTED = 202
_DEFAULT_PORT = 443
_URL = re.compile(r"https://(?P<host>[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?/?", re.IGNORECASE | re.ASCII)
_FAILURES = (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError)

T = TypeVar("T")
P = TypeVar("P")


class _Base(Generic[P]):
    """What both transports know and neither does differently.

    Args:
        url: `https://HOST:PORT`.
        svid: PEM file with our own chain and key; read again when it changes.
        bundle: file with the CA certificates of our trust domain; read again when it changes.
        broker_id: the SPIFFE ID that the broker must prove; None for `spiffe://<our trust domain>/keybroker`.
        timeout_s: seconds for one call, all attempts together.
        make: a pool of connections with a TLS context.

    Raises:
        SettingsError: the URL cannot be used.
        ConfigError: the SVID or the bundle cannot be used.
    """

    def __init__(
        self, url: str, svid: Path, bundle: Path, broker_id: SpiffeId | None, timeout_s: float, make: Callable[[ssl.SSLContext], P]
    ) -> None:
        self._authority = authority_of(url)
        self._timeout_s = timeout_s
        self._pools = Pools(Credentials(svid, bundle, broker_id), make)

    def _call(self, ask: Ask[T]) -> Call:
        return Call(is_repeatable=ask.is_repeatable, timeout_s=self._timeout_s + ask.wait_s)

    def _request(self, ask: Ask[T], **timeouts: float) -> dict[str, Any]:
        """One request, as httpcore's pools take it."""
        common = [("Host", self._authority), ("Accept", "application/json, application/problem+json"), ("Accept-Encoding", "identity")]
        return {
            "method": ask.method,
            "url": f"https://{self._authority}{ask.target}",
            "headers": [*common, *ask.headers],
            "content": ask.body if ask.method == "POST" else None,
            "extensions": {"timeout": timeouts},
        }

    def _failure(self, err: Exception) -> KeyBrokerError:
        return failure(err, f"https://{self._authority}", self._timeout_s)


class Transport(_Base[httpcore.ConnectionPool]):
    """The way to one broker, for threads: any number of them at once."""

    def __init__(self, url: str, svid: Path, bundle: Path, broker_id: SpiffeId | None, timeout_s: float) -> None:
        super().__init__(url, svid, bundle, broker_id, timeout_s, _make_pool)

    def send(self, ask: Ask[T]) -> T:
        """Ask, and ask again after a pause while that is safe and there is time.

        Raises:
            PendingError: others have to approve it first.
            RefusalError: the broker said no; the subclass of the problem's code.
            BrokerUnreachableError: no answer.
            BrokerIdentityError: another than the broker answered.
            BrokerAnswerError: the answer makes no sense.
        """
        call = self._call(ask)
        while True:
            try:
                return ask.decode(self._once(ask, call))
            except KeyBrokerError as err:
                pause = call.pause_after(err)
            time.sleep(pause)

    def _once(self, ask: Ask[T], call: Call) -> bytes:
        pool = self._pools.take()
        end = call.deadline
        connect_end = min(end, time.monotonic() + _CONNECT_S)
        try:
            with pool.stream(**self._request(ask, pool=call.left, connect=connect_end, read=end, write=end)) as response:
                answer = Answer(response.status, response.headers)
                for piece in response.iter_stream():
                    answer.take(piece)
        except _FAILURES as err:
            raise self._failure(err) from err
        finally:
            for outdated in self._pools.give_back(pool):
                outdated.close()
        return answer.body()

    def close(self) -> None:
        """End all connections, those of calls that are under way when they have their answer."""
        for pool in self._pools.end():
            pool.close()


class AsyncTransport(_Base[httpcore.AsyncConnectionPool]):
    """The way to one broker, for tasks of one event loop: any number of them at once."""

    def __init__(self, url: str, svid: Path, bundle: Path, broker_id: SpiffeId | None, timeout_s: float) -> None:
        super().__init__(url, svid, bundle, broker_id, timeout_s, _make_async_pool)

    async def send(self, ask: Ask[T]) -> T:
        """As `Transport.send`."""
        call = self._call(ask)
        while True:
            try:
                return ask.decode(await self._once(ask, call))
            except KeyBrokerError as err:
                pause = call.pause_after(err)
            await asyncio.sleep(pause)

    async def _once(self, ask: Ask[T], call: Call) -> bytes:
        pool = self._pools.take()
        try:
            async with asyncio.timeout(call.left):
                async with pool.stream(**self._request(ask, connect=_CONNECT_S)) as response:
                    answer = Answer(response.status, response.headers)
                    async for piece in response.aiter_stream():
                        answer.take(piece)
        except _FAILURES as err:
            raise self._failure(err) from err
        finally:
            for outdated in self._pools.give_back(pool):
                await outdated.aclose()
        return answer.body()

    async def aclose(self) -> None:
        """End all connections, those of calls that are under way when they have their answer."""
        for pool in self._pools.end():
            await pool.aclose()


class Answer:
    """An answer that arrives piece by piece."""

    def __init__(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._status = status
        self._headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
        self._body = bytearray()

    def take(self, piece: bytes) -> None:
        """Keep the next piece of the body.

        Raises:
            BrokerAnswerError: it becomes larger than any answer of a broker.
        """
        self._body += piece
        if len(self._body) > MAX_ANSWER_BYTES:
            raise BrokerAnswerError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")

    def body(self) -> bytes:
        """The whole body of a 200.

        Raises:
            PendingError: nothing is done yet.
            RefusalError: the broker said no.
            BrokerAnswerError: it is none of these.
        """
        if self._status == _ACCEPTED:
            raise PendingError(asks.pending(bytes(self._body)))
        if self._status != _OK:
            raise problems.refusal(self._status, self._headers, bytes(self._body))
        return bytes(self._body)


def authority_of(url: str) -> str:
    """`HOST:PORT` of a broker's URL (RFC 3986 section 3.2).

    Raises:
        SettingsError: it is not `https://HOST:PORT`.
    """
    match = _URL.fullmatch(url)
    port = int(match["port"] or _DEFAULT_PORT) if match else 0
    if match is None or not 0 < port < 65_536:
        raise SettingsError("the URL of the broker must be https://HOST:PORT and nothing more (--url, KEYBROKER_URL)")
    return f"{match['host'].lower()}:{port}"


def failure(err: Exception, url: str, timeout_s: float) -> KeyBrokerError:
    """What a failure of the connection means."""
    # A NetworkError stands for the library's own error; the pool has cleared its __cause__, not its __context__.
    origin = (err.__cause__ or err.__context__ or err) if isinstance(err, httpcore.NetworkError) else err
    was_sent = not isinstance(err, (httpcore.ConnectError, httpcore.ConnectTimeout, httpcore.PoolTimeout))
    if isinstance(origin, WrongPeerError):
        return BrokerIdentityError(origin.detail)
    if isinstance(origin, ssl.SSLCertVerificationError):
        return BrokerIdentityError(f"{url} shows a certificate that the bundle does not vouch for: {origin.verify_message}")
    if isinstance(origin, ssl.SSLError):
        return _alert(origin, url, was_sent=was_sent)
    if isinstance(err, httpcore.ConnectTimeout):
        return BrokerUnreachableError(f"{url} does not answer", was_sent=False)
    if isinstance(err, (httpcore.TimeoutException, TimeoutError)):
        return BrokerUnreachableError(f"{url}: no complete answer in {timeout_s:g} s", was_sent=was_sent)
    return BrokerUnreachableError(f"{url}: {str(err) or type(err).__name__}", was_sent=was_sent)


def _alert(err: ssl.SSLError, url: str, *, was_sent: bool) -> KeyBrokerError:
    """An alert about our certificate is the broker's refusal of it (RFC 8446 section 6.2); anything else is trouble with TLS."""
    name = (err.reason or "").partition("_ALERT_")[2].lower().replace("_", "-")
    if "certificate" in name or name in {"unknown-ca", "access-denied", "decrypt-error"}:
        return SvidInvalidError("The broker refused this SVID in the TLS handshake.", reasons=(name,))
    return BrokerUnreachableError(f"{url}: no TLS 1.3 connection: {err.reason or err}", was_sent=was_sent)


def _make_pool(context: ssl.SSLContext) -> httpcore.ConnectionPool:
    return httpcore.ConnectionPool(context, max_connections=MAX_CONNECTIONS, keepalive_expiry=_KEEP_S, network_backend=DeadlineBackend())


def _make_async_pool(context: ssl.SSLContext) -> httpcore.AsyncConnectionPool:
    return httpcore.AsyncConnectionPool(
        context, max_connections=MAX_CONNECTIONS, keepalive_expiry=_KEEP_S, network_backend=AsyncioBackend()
    )
