"""An SVID of one's own, as a file: certificate chain and private key in one PEM file, as brokers and clients present it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from keybroker.errors import ConfigError
from keybroker.model.identity import SpiffeId, SpiffeIdError

SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True, slots=True)
class SvidFile:
    """What a file says, except for the private key: that is read by the TLS library, and by `load_with_key` for whoever signs with it.

    Attributes:
        chain: DER certificates, leaf first.
        not_after: of the leaf, seconds since the epoch.
    """

    path: Path
    id: SpiffeId
    chain: tuple[bytes, ...]
    not_after: int

    @classmethod
    def load(cls, path: Path) -> SvidFile:
        """Read a file and see that its parts belong together.

        Raises:
            ConfigError: unreadable, incomplete, or the key is another certificate's.
        """
        return cls._read(path)[0]

    @classmethod
    def load_with_key(cls, path: Path) -> tuple[SvidFile, SigningKey]:
        """The same, and the private key, which belongs to the chain because both were read at once.

        Raises:
            ConfigError: as `load`; or the key is of a kind that SVIDs do not have.
        """
        file, key = cls._read(path)
        if not isinstance(key, SigningKey):
            msg = f"{path}: the private key must be ECDSA, RSA or Ed25519"
            raise ConfigError(msg)
        return file, key

    @classmethod
    def _read(cls, path: Path) -> tuple[SvidFile, PrivateKeyTypes]:
        try:
            data = path.read_bytes()
        except OSError as err:
            msg = f"{path}: cannot be read: {err.strerror}"
            raise ConfigError(msg) from err
        try:
            certificates = x509.load_pem_x509_certificates(data)
            key = load_pem_private_key(data, password=None)
        except (ValueError, TypeError, x509.InvalidVersion) as err:
            msg = f"{path}: needs a certificate chain (leaf first) and its unencrypted private key, both PEM"
            raise ConfigError(msg) from err
        leaf = certificates[0]
        form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if leaf.public_key().public_bytes(*form) != key.public_key().public_bytes(*form):
            msg = f"{path}: the private key is not the first certificate's; put the leaf first"
            raise ConfigError(msg)
        chain = tuple(certificate.public_bytes(Encoding.DER) for certificate in certificates)
        return cls(path, _identity(path, leaf), chain, int(leaf.not_valid_after_utc.timestamp())), key


def _identity(path: Path, leaf: x509.Certificate) -> SpiffeId:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        return SpiffeId.parse(uri)
    except (x509.ExtensionNotFound, ValueError, SpiffeIdError) as err:
        msg = f"{path}: not an X.509-SVID: the leaf needs exactly one URI SAN, a SPIFFE ID"
        raise ConfigError(msg) from err
