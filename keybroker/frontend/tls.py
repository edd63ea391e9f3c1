"""The TLS side of the service: RFC 8446, mutual, nothing older, nothing resumed, renewed while it runs.

TLS checks that a client's chain leads to a CA of some trust domain. Whether it is an X.509-SVID, and of that CA's own trust domain, is
for the authority to judge, on every request.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

from keybroker.errors import ConfigError
from keybroker.identity.bundle import TrustBundles
from keybroker.identity.watched_file import fingerprint
from keybroker.telemetry import logger

_POLL_SECONDS = 1.0
_RESULTS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no-certificate",
    "CERTIFICATE_VERIFY_FAILED": "bad-certificate",
    "UNSUPPORTED_PROTOCOL": "old-protocol",
    "HTTP_REQUEST": "not-tls",
    "WRONG_VERSION_NUMBER": "not-tls",
}

_log = logger()


class HandshakeError(OSError):
    """A TLS handshake failed.

    Attributes:
        result: why, as one of a few words: a metric label.
        alert: the bytes that tell the client (RFC 8446 section 6), which the event loop would throw away.
    """

    def __init__(self, result: str, alert: bytes) -> None:
        super().__init__(result)
        self.result = result
        self.alert = alert


class _SslObject(ssl.SSLObject):
    outgoing: ssl.MemoryBIO

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as err:
            raise HandshakeError(_RESULTS.get(err.reason or "", "failed"), self.outgoing.read()) from err


class _SslContext(ssl.SSLContext):
    """Makes connections that keep the alert of a failed handshake at hand."""

    sslobject_class = _SslObject

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,  # noqa: FBT001, FBT002  the signature of ssl.SSLContext
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> _SslObject:
        made = super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)
        if not isinstance(made, _SslObject):
            raise TypeError("ssl.SSLContext.sslobject_class is not honoured")
        made.outgoing = outgoing
        return made


class ServerTls:
    """The context for new connections, renewed when the broker's SVID or a trust bundle changes. Old connections go on with theirs.

    Args:
        svid: PEM file with the broker's own chain and key.
        bundles: whose CAs clients may come from.

    Raises:
        ConfigError: the SVID cannot be used.
    """

    def __init__(self, svid: Path, bundles: TrustBundles) -> None:
        self._svid = svid
        self._bundles = bundles
        self._seen = fingerprint(svid)
        self._context = make_context(svid, bundles)

    @property
    def context(self) -> ssl.SSLContext:
        """For the next connection."""
        return self._context

    def refresh(self) -> bool:
        """Look at the files; True if there is a new context. A file that cannot be used changes nothing. Blocks; one call at a time."""
        is_changed = self._bundles.refresh()
        seen = fingerprint(self._svid)
        if not is_changed and seen == self._seen:
            return False
        self._seen = seen
        try:
            self._context = make_context(self._svid, self._bundles)
        except ConfigError as err:
            _log.error("new SVID cannot be used, going on with the old one", reason=str(err))
            return False
        _log.info("TLS renewed")
        return True

    async def keep_fresh(self, period_s: float = _POLL_SECONDS) -> None:
        """Look at the files for ever, off the event loop."""
        while True:
            await asyncio.sleep(period_s)
            try:
                await asyncio.to_thread(self.refresh)
            except Exception:  # noqa: BLE001  whatever it is, the old context is good until it is mended
                _log.exception("cannot look for a new SVID")


def make_context(svid: Path, bundles: TrustBundles) -> ssl.SSLContext:
    """A server context: TLS 1.3 only, a client certificate required, no session tickets (so an expired SVID is never resumed).

    Raises:
        ConfigError: the SVID or a CA cannot be used.
    """
    context = _SslContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_REQUIRED
    # A bundle may hold a CA that is not self-signed (X.509-SVID section 4.1 does not ask for it).
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(svid, password=_refuse_password)
        context.load_verify_locations(cadata=bundles.ssl_trust_anchors())
    except (OSError, ValueError) as err:
        reason = err.strerror if isinstance(err, OSError) and err.strerror else type(err).__name__
        raise ConfigError(f"{svid}: not a PEM file with our chain and its key: {reason}") from err
    return context


def _refuse_password() -> str:
    raise ValueError("the key is encrypted")
