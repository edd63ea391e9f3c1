"""One attempt at one webhook: HTTP over verified TLS, bounded in time and in bytes, to exactly the address that was signed for.

No proxy, no redirect, no cookie, nothing of the environment; HTTP/1.1 is read by h11. Only a 2xx is a delivery, and what the receiver says
beyond its status is not read.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import h11

from keybroker.errors import ConfigError, KeyBrokerError

_DELIVERED = range(200, 300)
_HTTPS = 443
_MAX_HEAD_BYTES = 16 * 1024
_PIECE_BYTES = 4 * 1024


class UndeliveredError(KeyBrokerError):
    """The receiver did not take it, or was not there. The text says which, and nothing that the receiver has said."""


def context_for(ca: Path | None) -> ssl.SSLContext:
    """TLS 1.2 or later, receiver and host name verified.

    Args:
        ca: PEM file with the only authorities to believe; the system's if None.

    Raises:
        ConfigError: the file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as err:
        raise ConfigError(f"{ca}: cannot be used as CA certificates, PEM: {err}") from err
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


async def deliver(url: str, fields: Sequence[tuple[str, str]], content: bytes, context: ssl.SSLContext, timeout_s: float) -> None:
    """Post it, once.

    Raises:
        UndeliveredError: no 2xx came in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            status = await _post(url, fields, content, context)
    except TimeoutError as err:
        raise UndeliveredError(f"no answer in {timeout_s:g} s") from err
    except ssl.SSLCertVerificationError as err:
        raise UndeliveredError(f"the certificate is refused: {err.verify_message}") from err
    except ssl.SSLError as err:
        raise UndeliveredError(f"no TLS: {err.reason}") from err
    except OSError as err:
        raise UndeliveredError(f"no connection: {err.strerror or type(err).__name__}") from err
    except h11.RemoteProtocolError as err:
        raise UndeliveredError("the answer is not HTTP") from err
    if status not in _DELIVERED:
        raise UndeliveredError(f"status {status}")


async def _post(url: str, fields: Sequence[tuple[str, str]], content: bytes, context: ssl.SSLContext) -> int:
    """The status that a receiver answers with."""
    place = urlsplit(url)
    host, target = place.hostname or "", url.removeprefix(f"https://{place.netloc}")
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
    head = [
        ("Host", place.netloc), ("User-Agent", "keybroker"), ("Content-Type", "application/json"),
        ("Content-Length", str(len(content))), ("Connection", "close"), *fields,
    ]  # fmt: skip
    events = (h11.Request(method="POST", target=target, headers=head), h11.Data(data=content), h11.EndOfMessage())
    request = b"".join(http.send(event) or b"" for event in events)
    reader, writer = await asyncio.open_connection(host, place.port or _HTTPS, ssl=context, limit=_MAX_HEAD_BYTES)
    try:
        writer.write(request)
        while True:
            event = http.next_event()
            if isinstance(event, h11.Response):
                return event.status_code
            if event is h11.NEED_DATA:
                http.receive_data(await reader.read(_PIECE_BYTES))
            elif not isinstance(event, h11.InformationalResponse):
                raise UndeliveredError("no answer")
    finally:
        writer.transport.abort()  # nothing that comes after the status matters
