"""Mutual TLS 1.3 with a broker that proves its SPIFFE ID, not a DNS name (X.509-SVID section 5.2).

The check happens in the handshake, before the socket is handed to anyone who could write a request to it. The bundle judges
twice: OpenSSL builds the chain, and the same validator that the broker uses for its callers judges the certificates.
"""

from __future__ import annotations

import ssl
import time
from pathlib import Path

from keybroker.clock import SystemClock
from keybroker.errors import ConfigError, SvidInvalidError
from keybroker.identity.bundle import TrustBundles
from keybroker.identity.svid_file import SvidFile
from keybroker.identity.tls_peer import peer_chain
from keybroker.identity.watched_file import Fingerprint, fingerprint
from keybroker.identity.x509_svid import SvidValidator
from keybroker.model.identity import SpiffeId

_BROKER_PATH = "keybroker"


class WrongPeerError(ssl.SSLError):
    """The handshake succeeded, with somebody else. An SSLError, so that the layers above close the socket and pass it on."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class _BrokerSocket(ssl.SSLSocket):
    """A socket whose handshake includes the check of the peer's identity."""

    def do_handshake(self, block: bool = False) -> None:  # noqa: FBT001, FBT002  the signature of the base class
        super().do_handshake(block)
        _check_peer(self)


class _BrokerObject(ssl.SSLObject):
    """The same, where the bytes are moved by others: for asyncio."""

    def do_handshake(self) -> None:
        super().do_handshake()
        _check_peer(self)


class BrokerContext(ssl.SSLContext):
    """TLS 1.3 with our SVID, to one broker.

    Attributes:
        good_until: seconds since the epoch; the earliest end of our own SVID and of all chains that were accepted.
    """

    sslsocket_class = _BrokerSocket
    sslobject_class = _BrokerObject
    validator: SvidValidator
    broker_id: SpiffeId
    good_until: float

    def check_peer(self, chain: tuple[bytes, ...]) -> None:
        """Whether this chain (DER, leaf first) is the broker's.

        Raises:
            WrongPeerError: it is not a valid SVID, or another's.
        """
        try:
            peer = self.validator.validate(chain)
        except SvidInvalidError as err:
            raise WrongPeerError(f"whoever answers has no valid X.509-SVID ({', '.join(err.reasons)})") from err
        if peer.id != self.broker_id:
            raise WrongPeerError(f"whoever answers is {peer.id}, not {self.broker_id}")
        self.good_until = min(self.good_until, peer.not_after)


def _check_peer(tls: ssl.SSLSocket | ssl.SSLObject) -> None:
    context = tls.context
    if not isinstance(context, BrokerContext):
        raise WrongPeerError("the connection has lost the identity that it must check")
    context.check_peer(peer_chain(tls))


class Credentials:
    """Our SVID, our bundle and whom we expect: as TLS contexts, a new one whenever a file has changed or something has expired.

    A file that cannot be used (half written, or gone for a moment) leaves the old context in force for as long as that is good.
    """

    def __init__(self, svid: Path, bundle: Path, broker_id: SpiffeId | None) -> None:
        self._svid = svid
        self._bundle = bundle
        self._broker_id = broker_id
        self._seen: tuple[Fingerprint, ...] = ()
        self._context: BrokerContext | None = None

    def context(self) -> BrokerContext:
        """The context for connections that are made now. One call at a time.

        Raises:
            ConfigError: a file cannot be used.
        """
        seen = (fingerprint(self._svid), fingerprint(self._bundle))
        context = self._context
        is_good = context is not None and time.time() < context.good_until
        if context is None or not is_good or seen != self._seen:
            try:
                context = _context(self._svid, self._bundle, self._broker_id)
            except ConfigError:
                if context is None or not is_good:
                    raise
                return context
            self._seen, self._context = seen, context
        return context


def _context(svid: Path, bundle: Path, broker_id: SpiffeId | None) -> BrokerContext:
    """TLS 1.3 only, our chain shown, no session resumed, the broker's identity checked in the handshake.

    Raises:
        ConfigError: a file cannot be used.
    """
    own = SvidFile.load(svid)
    expected = broker_id or SpiffeId.parse(f"spiffe://{own.id.trust_domain}/{_BROKER_PATH}")
    bundles = TrustBundles.load({expected.trust_domain: bundle})
    context = BrokerContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the SPIFFE ID is checked instead
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.validator = SvidValidator(bundles, None, SystemClock())
    context.broker_id = expected
    context.good_until = own.not_after
    try:
        context.load_cert_chain(svid)
        context.load_verify_locations(cadata=bundles.ssl_trust_anchors())
    except (OSError, ValueError) as err:
        raise ConfigError(f"{svid}: cannot be used for TLS: {err}") from err
    return context
