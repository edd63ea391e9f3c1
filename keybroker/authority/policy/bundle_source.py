"""Where policy bundles come from: a file that is replaced by renaming, or an HTTP(S) server that is asked with ETags.

What a source gives is trusted for nothing: its signature is checked by whoever takes it.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Protocol

import httpcore

from keybroker.authority.policy.bundle import MAX_BUNDLE_BYTES
from keybroker.authority.policy.opa_address import host_and_port_of, read_token, tls_of
from keybroker.config import BundleConfig
from keybroker.errors import ConfigError
from keybroker.identity.watched_file import WatchedFile

FETCH_SECONDS = 30.0
FILE_NAME = "bundle.tar.gz"  # in a directory; what `opa build` writes
_MAX_ETAG = 256


class BundleSource(Protocol):
    """Somewhere a bundle lies."""

    async def look(self) -> bytes | None:
        """A bundle that may be another than the last one; None where it is the same, or it is not yet time to look again.

        Raises:
            ConfigError: it cannot be had.
        """
        ...

    async def close(self) -> None:
        """End connections."""
        ...


def source_of(config: BundleConfig) -> BundleSource:
    """The source that a configuration names.

    Raises:
        ConfigError: it cannot be one.
    """
    return FileSource(config.path) if config.path else HttpSource(config.url, config.ca, config.token, config.poll_ms / 1000)


class FileSource:
    """A bundle file, or `bundle.tar.gz` in a directory. Costs a stat call while it is the same."""

    def __init__(self, path: Path) -> None:
        self._file = WatchedFile(path / FILE_NAME if path.is_dir() else path)
        self._is_settled = False

    async def look(self) -> bytes | None:
        """The content, if the file has changed; once more the time after, because two changes may fall within a tick of its clock."""
        has_changed = self._file.has_changed()
        if not has_changed and self._is_settled:
            return None
        self._is_settled = False  # while it cannot be read, the next look tries again
        data = await asyncio.to_thread(self._file.read)
        self._is_settled = not has_changed
        return data

    async def close(self) -> None:
        """Nothing is open."""


class HttpSource:
    """A URL, asked again every so often. One attempt each time: no redirect, no proxy, bounded in bytes and seconds.

    Args:
        url: http or https.
        ca: who may vouch for an https server.
        token: file with a bearer token, or None.
        poll_s: seconds between two looks.
    """

    def __init__(self, url: str, ca: Path | None, token: Path | None, poll_s: float) -> None:
        _, _, is_tls = host_and_port_of(url)
        self._url = url
        self._headers: dict[bytes | str, bytes | str] = {"Accept-Encoding": "identity", "User-Agent": "keybroker"}
        if token:
            self._headers["Authorization"] = f"Bearer {read_token(token)}"
        self._pool = httpcore.AsyncConnectionPool(ssl_context=tls_of(url, ca) if is_tls else None, max_connections=1, retries=0)
        self._poll_s = poll_s
        self._next = 0.0
        self._etag = ""
        self._trouble: ConfigError | None = None

    async def look(self) -> bytes | None:
        """The bundle, if it is time to look and it has another ETag than the last."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._poll_s
            self._trouble = None
            try:
                return await self._try()
            except ConfigError as err:
                self._trouble = err
        if self._trouble is not None:
            raise self._trouble
        return None

    async def close(self) -> None:
        """End its connection."""
        await self._pool.aclose()

    async def _try(self) -> bytes | None:
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                return await self._fetch()
        except TimeoutError as err:
            raise ConfigError(f"{self._url}: gave no policy bundle within {FETCH_SECONDS:.0f} seconds") from err
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError) as err:
            raise ConfigError(f"{self._url}: cannot be asked for a policy bundle: {str(err) or type(err).__name__}") from err

    async def _fetch(self) -> bytes | None:
        headers = self._headers | ({"If-None-Match": self._etag} if self._etag else {})
        async with self._pool.stream("GET", self._url, headers=headers) as response:
            if response.status == 304 and self._etag:
                return None
            if response.status != 200:
                raise ConfigError(f"{self._url}: answered with status {response.status} instead of a policy bundle")
            data = bytearray()
            async for piece in response.aiter_stream():
                data += piece
                if len(data) > MAX_BUNDLE_BYTES:
                    raise ConfigError(f"{self._url}: larger than {MAX_BUNDLE_BYTES} bytes")
            self._etag = _etag_of(response)
            return bytes(data)


def _etag_of(response: httpcore.Response) -> str:
    for name, value in response.headers:
        if name.lower() == b"etag" and len(value) <= _MAX_ETAG and value.isascii() and value.decode().isprintable():
            return str(value.decode())
    return ""
