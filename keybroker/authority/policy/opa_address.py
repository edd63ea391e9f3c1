"""Where an OPA server is, and how it may be reached: TLS with a CA that was named for it, or without leaving the host."""

from __future__ import annotations

import ipaddress
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from keybroker.errors import ConfigError

UNIX = "unix:"
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{1,4096}")


@dataclass(frozen=True, slots=True)
class OpaAddress:
    """One server.

    Attributes:
        host: as it stands in a URL, an IPv6 address in brackets.
        tls: None for plain HTTP, which only goes to loopback and Unix sockets.
        unix_socket: absolute path; empty for TCP.
        token: for `--authentication=token`; empty for none.
    """

    host: str
    port: int
    tls: ssl.SSLContext | None = field(repr=False)
    unix_socket: str
    token: str = field(repr=False)

    @classmethod
    def of(cls, url: str, ca: Path | None, token: Path | None) -> OpaAddress:
        """From the configuration.

        Args:
            url: `https://HOST:PORT`, `http://127.0.0.1:PORT` or `unix:/PATH`.
            ca: PEM file of the CAs that may vouch for an https server.
            token: file with a bearer token on one line.

        Raises:
            ConfigError: not a safe way to an OPA server.
        """
        secret = read_token(token) if token else ""
        if url.startswith(UNIX):
            path = url.removeprefix(UNIX)
            if not path.startswith("/") or "\0" in path:
                raise ConfigError(f"{url!r}: a Unix socket is unix:/ABSOLUTE/PATH")
            return cls("localhost", 80, None, path, secret)
        host, port, is_tls = host_and_port_of(url, path="/")
        if not is_tls and not _is_loopback(host):
            raise ConfigError(f"{url!r}: plain HTTP goes to loopback (http://127.0.0.1:8181) or a Unix socket alone; use https:// and `ca`")
        return cls(host, port, tls_of(url, ca) if is_tls else None, "", secret)


def host_and_port_of(url: str, path: str | None = None) -> tuple[str, int, bool]:
    """Host (an IPv6 address in brackets) and port of an http or https URL, and whether it is https.

    Args:
        path: the only one that it may have besides none; None for any.

    Raises:
        ConfigError: another kind of URL.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError) as err:
        raise ConfigError(f"{url!r}: not a URL such as https://opa.example.org:8181") from err
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    is_clean = _HOST.fullmatch(host) and not (parts.username or parts.password or parts.fragment) and url.isascii() and url.isprintable()
    if not is_clean or " " in url or (path is not None and (parts.path not in {"", path} or parts.query)):
        raise ConfigError(f"{url!r}: not a URL such as https://opa.example.org:8181, without a user or anything behind it")
    return host, port, parts.scheme == "https"


def tls_of(url: str, ca: Path | None) -> ssl.SSLContext:
    """TLS 1.3 to a server that one of these CAs vouches for, and nobody else.

    Raises:
        ConfigError: no CA, or not usable.
    """
    if ca is None:
        raise ConfigError(f"{url!r}: https needs `ca`, a PEM file of the CAs that may vouch for that server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(ca)
    except OSError as err:  # ssl.SSLError is one
        raise ConfigError(f"{ca}: not a PEM file of CA certificates: {err.strerror or err}") from err
    return context


def read_token(path: Path) -> str:
    """A bearer token, the only line of a file.

    Raises:
        ConfigError: unreadable, or not a token.
    """
    try:
        text = path.read_text(encoding="ascii").removesuffix("\n")
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read: {err.strerror}") from err
    except UnicodeError as err:
        raise ConfigError(f"{path}: not a bearer token on one line") from err
    if not _TOKEN.fullmatch(text):
        raise ConfigError(f"{path}: not a bearer token on one line")
    return text


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
