"""Who is at the other end of a TLS connection: the certificates as the peer sent them, before anybody rearranged them."""

from __future__ import annotations

from typing import Any

_DER = 2  # _ssl.ENCODING_DER


def peer_chain(tls: Any) -> tuple[bytes, ...]:
    """The peer's certificates as it sent them, DER, leaf first; empty without TLS or without a certificate.

    Args:
        tls: the `ssl.SSLObject` or `ssl.SSLSocket` of the connection, or None.
    """
    if tls is None:
        return ()
    if hasattr(tls, "get_unverified_chain"):  # Python 3.13
        return tuple(tls.get_unverified_chain())
    chain = tls._sslobj.get_unverified_chain()  # noqa: SLF001  there is no public way before Python 3.13
    return tuple(certificate.public_bytes(_DER) for certificate in chain or ())
