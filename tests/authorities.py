"""An X.509 authority in memory: makes good SVIDs, and each kind of bad one."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = datetime.datetime(2026, 9, 21, 12, 0, tzinfo=datetime.UTC)
NOW_US = int(NOW.timestamp()) * 1_000_000
HOUR = datetime.timedelta(hours=1)
BOTH_USAGES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
LEAF_USAGE = frozenset({"digital_signature"})
CA_USAGE = frozenset({"key_cert_sign", "crl_sign"})
_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign",
    "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What a certificate says; the defaults make a good SVID."""

    uris: Sequence[str] = ("spiffe://example.org/payments/api",)
    subject: str = "leaf"
    san_critical: bool = False
    ca: bool | None = False
    path_length: int | None = None
    usage: frozenset[str] | None = LEAF_USAGE
    usage_critical: bool = True
    extended: Sequence[x509.ObjectIdentifier] | None = BOTH_USAGES
    not_before: datetime.datetime = NOW - HOUR
    not_after: datetime.datetime = NOW + HOUR
    extra: Sequence[tuple[x509.ExtensionType, bool]] = ()


CA_SHAPE = Shape(uris=(), ca=True, usage=CA_USAGE, extended=None, not_before=NOW - 100 * HOUR, not_after=NOW + 100 * HOUR)


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, and the certificates above it but for the root."""

    certificate: x509.Certificate
    key: CertificateIssuerPrivateKeyTypes
    above: tuple[x509.Certificate, ...] = ()

    @property
    def chain(self) -> tuple[bytes, ...]:
        """DER, leaf first, without the root."""
        return tuple(each.public_bytes(Encoding.DER) for each in (self.certificate, *self.above))

    @property
    def pem(self) -> bytes:
        """The certificate alone."""
        return self.certificate.public_bytes(Encoding.PEM)

    def write(self, path: Path) -> Path:
        """Chain and private key in one file, as brokers and clients read it."""
        key = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.write_bytes(b"".join(each.public_bytes(Encoding.PEM) for each in (self.certificate, *self.above)) + key)
        path.chmod(0o600)
        return path


@dataclass
class Authority:
    """A root of one trust domain, or an intermediate below one."""

    name: str = "root"
    shape: Shape = CA_SHAPE
    key: CertificateIssuerPrivateKeyTypes = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    parent: Authority | None = None
    certificate: x509.Certificate = field(init=False)

    def __post_init__(self) -> None:
        issuer = self.parent or self
        self.certificate = _build(self.shape, self.name, self.key.public_key(), issuer.name, issuer.key)

    def issue(self, shape: Shape | None = None, key: CertificateIssuerPrivateKeyTypes | None = None) -> Issued:
        """A leaf of any shape."""
        shape = shape or Shape()
        key = key or ec.generate_private_key(ec.SECP256R1())
        return Issued(_build(shape, shape.subject, key.public_key(), self.name, self.key), key, self._above())

    def intermediate(self, name: str = "intermediate", shape: Shape = CA_SHAPE) -> Authority:
        """An authority below this one."""
        return Authority(name, shape, parent=self)

    @property
    def pem(self) -> bytes:
        """This authority's certificate."""
        return self.certificate.public_bytes(Encoding.PEM)

    def _above(self) -> tuple[x509.Certificate, ...]:
        return () if self.parent is None else (self.certificate, *self.parent._above())


def rsa_key(bits: int) -> rsa.RSAPrivateKey:
    """A fresh RSA key."""
    return rsa.generate_private_key(65537, bits)


def _build(shape: Shape, subject: str, public_key: object, issuer: str, key: CertificateIssuerPrivateKeyTypes) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(public_key)  # type: ignore[arg-type]  # any kind that the library takes
        .serial_number(x509.random_serial_number())
        .not_valid_before(shape.not_before)
        .not_valid_after(shape.not_after)
    )
    if shape.ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(shape.ca, shape.path_length), critical=True)
    if shape.usage is not None:
        usage = x509.KeyUsage(**{name: name in shape.usage for name in _USAGES})
        builder = builder.add_extension(usage, critical=shape.usage_critical)
    if shape.extended is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(shape.extended), critical=False)
    if shape.uris:
        names = [_uri(uri) for uri in shape.uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=shape.san_critical)
    for extension, critical in shape.extra:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(key, hashes.SHA256())


def _uri(text: str) -> x509.UniformResourceIdentifier:
    """A URI SAN, hostile ones included: what the library would refuse to build is what a hostile issuer builds."""
    uri = x509.UniformResourceIdentifier("x:")
    uri._value = text
    return uri


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else [])
