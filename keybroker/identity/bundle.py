"""Trust bundles: which authorities speak for which trust domain (SPIFFE Trust Domain and Bundle; X509-SVID section 6).

A bundle file is PEM certificates or a SPIFFE bundle document; which of the two is told by its content. The trust domain is told
by the configuration, never by the file, so a file cannot speak for a domain that nobody gave it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from keybroker.errors import ConfigError
from keybroker.identity.watched_file import WatchedFile
from keybroker.model.identity import SpiffeIdError, parse_trust_domain

_KNOWN_KEY_TYPES = frozenset({"RSA", "EC", "OKP"})
_MAX_INT64 = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TrustBundle:
    """The authorities of one trust domain.

    Attributes:
        authorities: CA certificates; none means that nothing of this domain is trusted.
        sequence: `spiffe_sequence` of a bundle document, or None.
        digest: SHA-256 over the authorities, lower-case hex.
    """

    trust_domain: str
    authorities: tuple[x509.Certificate, ...] = field(repr=False)
    sequence: int | None
    digest: str

    @classmethod
    def parse(cls, trust_domain: str, data: bytes, source: str) -> TrustBundle:
        """Read a bundle file's content.

        Args:
            source: the file's name, for errors.

        Raises:
            ConfigError: not a bundle, or it holds something that cannot be an authority.
        """
        if data.lstrip()[:1] == b"{":
            certificates, sequence = _of_document(data, source)
        else:
            certificates, sequence = _of_pem(data, source), None
        for certificate in certificates:
            _require_authority(certificate, source)
        ders = sorted({certificate.public_bytes(Encoding.DER) for certificate in certificates})
        unique = tuple(x509.load_der_x509_certificate(der) for der in ders)
        return cls(trust_domain, unique, sequence, hashlib.sha256(b"".join(hashlib.sha256(der).digest() for der in ders)).hexdigest())


class TrustBundles:
    """All bundles that this room trusts, read again when their files change. A file that cannot be used leaves the old in force."""

    def __init__(self, bundles: dict[str, TrustBundle], files: dict[str, WatchedFile]) -> None:
        self._bundles = bundles
        self._files = files
        self._broken: dict[str, str] = {}
        self._digest = self._compute_digest()

    @classmethod
    def load(cls, paths: Mapping[str, Path]) -> TrustBundles:
        """Read every bundle.

        Args:
            paths: by trust domain name.

        Raises:
            ConfigError: one cannot be used.
        """
        files = {}
        bundles = {}
        for name, path in paths.items():
            try:
                parse_trust_domain(name)
            except SpiffeIdError as err:
                msg = f"{name!r} under `bundles` is not a trust domain name: lower-case letters, digits, dots, dashes and underscores"
                raise ConfigError(msg) from err
            files[name] = WatchedFile(path)
            bundles[name] = TrustBundle.parse(name, files[name].read(), str(path))
        return cls(bundles, files)

    @property
    def digest(self) -> str:
        """SHA-256 over all bundles, lower-case hex: the same exactly while the same authorities speak for the same domains."""
        return self._digest

    @property
    def problems(self) -> list[str]:
        """Files that cannot be used as they are now."""
        return list(self._broken.values())

    def of(self, trust_domain: str) -> TrustBundle | None:
        """The bundle of a trust domain, or None where that domain is not trusted."""
        return self._bundles.get(trust_domain)

    def trust_domains(self) -> list[str]:
        """The names of all trust domains, in order."""
        return sorted(self._bundles)

    def refresh(self) -> bool:
        """Read the files that have changed. True if what is trusted has changed."""
        for name, file in self._files.items():
            if not file.has_changed():
                continue
            try:
                bundle = TrustBundle.parse(name, file.read(), str(file.path))
                self._require_newer(bundle, file.path)
            except ConfigError as err:
                self._broken[name] = str(err)
                continue
            self._broken.pop(name, None)
            self._bundles[name] = bundle
        before, self._digest = self._digest, self._compute_digest()
        return self._digest != before

    def ssl_trust_anchors(self) -> str:
        """Every authority of every domain, PEM, for a TLS library that knows no trust domains.

        It only narrows who may speak; who is who is decided by `SvidValidator`, per domain.
        """
        return "".join(
            authority.public_bytes(Encoding.PEM).decode() for bundle in self._bundles.values() for authority in bundle.authorities
        )

    def _require_newer(self, bundle: TrustBundle, path: Path) -> None:
        """A sequence number never falls: an older document would bring back an authority that was taken out."""
        old = self._bundles[bundle.trust_domain].sequence
        if old is not None and bundle.sequence is not None and bundle.sequence < old:
            msg = f"{path}: spiffe_sequence {bundle.sequence} is older than {old}, which is in force; publish a newer bundle"
            raise ConfigError(msg)

    def _compute_digest(self) -> str:
        lines = "".join(f"{name} {bundle.digest}\n" for name, bundle in sorted(self._bundles.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def _of_pem(data: bytes, source: str) -> list[x509.Certificate]:
    try:
        certificates = x509.load_pem_x509_certificates(data)
    except (ValueError, x509.InvalidVersion) as err:
        msg = f"{source}: neither PEM certificates nor a SPIFFE bundle document"
        raise ConfigError(msg) from err
    if b"PRIVATE KEY" in data:
        msg = f"{source}: holds a private key; a bundle is public: give the certificates alone"
        raise ConfigError(msg)
    return certificates


def _of_document(data: bytes, source: str) -> tuple[list[x509.Certificate], int | None]:
    """Trust Domain and Bundle section 4, X509-SVID section 6.2."""
    try:
        document = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as err:
        msg = f"{source}: not a SPIFFE bundle document: {err if isinstance(err, _DuplicateKeyError) else 'not JSON'}"
        raise ConfigError(msg) from err
    entries = document.get("keys")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        msg = f"{source}: a SPIFFE bundle document needs `keys`, a list of JWKs"
        raise ConfigError(msg)
    sequence = document.get("spiffe_sequence")
    for name in ("spiffe_sequence", "spiffe_refresh_hint"):
        value = document.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_INT64):
            msg = f"{source}: `{name}` must be a whole number of at most 64 bits"
            raise ConfigError(msg)
    return [_of_x5c(entry["x5c"][0], source) for entry in entries if _is_x509_entry(entry)], sequence


def _is_x509_entry(entry: dict[str, Any]) -> bool:
    """Whether a JWK holds an X.509 authority; any other is ignored, as the specification says."""
    kind = entry.get("kty")
    if not isinstance(kind, str) or kind not in _KNOWN_KEY_TYPES or entry.get("use") != "x509-svid":
        return False
    x5c = entry.get("x5c")
    return isinstance(x5c, list) and bool(x5c)


def _of_x5c(value: object, source: str) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(base64.b64decode(str(value), validate=True))
    except (ValueError, binascii.Error, x509.InvalidVersion) as err:
        msg = f"{source}: an `x5c` value is not a base64 DER certificate"
        raise ConfigError(msg) from err


def _require_authority(certificate: x509.Certificate, source: str) -> None:
    try:
        is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        is_ca = False
    if not is_ca:
        msg = f"{source}: holds a certificate that is not an authority (basicConstraints cA is not true); leave only CA certificates"
        raise ConfigError(msg)


class _DuplicateKeyError(ValueError):
    """Which of two values counts would be a matter of luck."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            msg = "a name is given twice in one object"
            raise _DuplicateKeyError(msg)
        result[name] = value
    return result
