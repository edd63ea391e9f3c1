"""Where bundles come from over TLS: from whom they should, and by no other way."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from keybroker.authority.policy.bundle_source import HttpSource, source_of
from keybroker.config import BundleConfig
from keybroker.errors import ConfigError
from tests.authorities import CA_SHAPE, HOUR, Authority, Shape
from tests.impostor import http, impostor

_NOW = datetime.datetime.now(datetime.UTC)
LIVE: dict[str, Any] = {"not_before": _NOW - HOUR, "not_after": _NOW + HOUR}
SERVER = Shape(uris=(), extra=((x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False),), **LIVE)


def test_bundle_comes_from_the_server_that_the_named_ca_vouches_for_and_from_no_other(tmp_path: Path) -> None:
    ours, theirs = (Authority(name, replace(CA_SHAPE, **LIVE)) for name in ("ours", "theirs"))
    (tmp_path / "ca.pem").write_bytes(ours.pem)
    (tmp_path / "token").write_text("secret\n")

    async def fetch(signer: Authority, host: str = "127.0.0.1") -> tuple[bytes | None, list[str]]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(signer.issue(SERVER).write(tmp_path / "server.pem"))
        async with impostor(http(b"bundle"), context) as server:
            source = HttpSource(f"https://{host}:{server.port}/b.tar.gz", tmp_path / "ca.pem", tmp_path / "token", 0.2)
            try:
                return await source.look(), server.heads
            except ConfigError:
                return None, server.heads
            finally:
                await source.close()

    data, heads = asyncio.run(fetch(ours))
    assert data == b"bundle"
    assert heads[0].startswith("GET /b.tar.gz HTTP/1.1\r\n")
    assert "\r\nAuthorization: Bearer secret\r\n" in heads[0]
    assert asyncio.run(fetch(theirs)) == (None, [])
    assert asyncio.run(fetch(ours, "localhost")) == (None, [])


def test_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with impostor(http(b"theirs")) as proxy, impostor(http(b"ours")) as server:
            for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
                monkeypatch.setenv(name, proxy.url)
            source = HttpSource(server.url, None, None, 0.2)
            assert await source.look() == b"ours"
            await source.close()
            assert (server.connections, proxy.connections) == (1, 0)

    asyncio.run(run())


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1/b", "https://127.0.0.1/b", "http://a b/", "http://u:p@127.0.0.1/b", "file:///b", "http://[::1/b"]
)
def test_url_that_cannot_be_a_source_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        source_of(BundleConfig(url=url, keys=(Path("k"),)))


def test_directory_stands_for_the_bundle_in_it(tmp_path: Path) -> None:
    (tmp_path / "bundle.tar.gz").write_bytes(b"bundle")

    async def run() -> None:
        source = source_of(BundleConfig(path=tmp_path, keys=(Path("k"),)))
        assert [await source.look() for _ in range(3)] == [b"bundle", b"bundle", None]

    asyncio.run(run())
