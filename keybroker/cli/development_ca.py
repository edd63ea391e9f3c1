"""A throw-away certificate authority for one trust domain, for development and tests. Never for production.

X.509-SVID sections 2 to 4: P-256, the SPIFFE ID as the only URI SAN, critical keyUsage, both extended key usages.
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from keybroker.model.identity import SpiffeId

CA_LIFETIME = datetime.timedelta(days=365)
SVID_LIFETIME = datetime.timedelta(days=7)
_BACKDATED = datetime.timedelta(minutes=1)  # for a client whose clock is a little behind
_LOOPBACK: tuple[x509.GeneralName, ...] = (
    x509.DNSName("localhost"),
    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    x509.IPAddress(ipaddress.ip_address("::1")),
)


@dataclass(frozen=True, slots=True)
class DevelopmentCa:
    """The CA certificate of a trust domain and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def make(cls, trust_domain: str, now: datetime.datetime) -> DevelopmentCa:
        """A new CA, self-signed, that may sign leaves only."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{trust_domain} development CA")])
        builder = _builder(name, name, key, now, CA_LIFETIME)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(is_ca=True), critical=True)
        san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")])
        builder = builder.add_extension(san, critical=False)
        return cls(builder.sign(key, hashes.SHA256()), key)

    def svid(self, identity: SpiffeId, name: str, now: datetime.datetime, *, is_on_loopback: bool = False) -> bytes:
        """A new X.509-SVID: chain and key, PEM, in one file.

        Args:
            identity: the SPIFFE ID.
            name: the common name, for people; it decides nothing.
            now: the time.
            is_on_loopback: also name localhost, 127.0.0.1 and ::1, for clients that check DNS names (curl).
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = [x509.UniformResourceIdentifier(identity.text), *(_LOOPBACK if is_on_loopback else ())]
        builder = _builder(subject, self.certificate.subject, key, now, SVID_LIFETIME)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(is_ca=False), critical=True)
        both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(both, critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        leaf = builder.add_extension(authority, critical=False).sign(self.key, hashes.SHA256())
        return leaf.public_bytes(Encoding.PEM) + _key_pem(key)

    @property
    def certificate_pem(self) -> bytes:
        """The CA certificate."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """Its key, PKCS#8, unencrypted."""
        return _key_pem(self.key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime.datetime, lifetime: datetime.timedelta
) -> x509.CertificateBuilder:
    public = key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
