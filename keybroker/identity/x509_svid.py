"""Is this chain a valid X.509-SVID? X509-SVID section 5, on top of RFC 5280 path validation.

General TLS libraries do not ask this: they take a leaf that is a CA, one with two identities, or one of domain A that was signed
for domain B. So the leaf step is written here from the specification, the path is built by `cryptography` with the authorities of
one trust domain only, the one that the leaf's ID names, and cheap checks come first.
"""

from __future__ import annotations

import datetime
import hashlib
from collections import OrderedDict
from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import Criticality, ExtensionPolicy, Policy, PolicyBuilder, Store, VerificationError

from keybroker.clock import Clock
from keybroker.errors import ConfigError, SvidInvalidError
from keybroker.identity.bundle import TrustBundle, TrustBundles
from keybroker.identity.deny_list import DenyList
from keybroker.model.identity import SpiffeId, SpiffeIdError, Svid

MAX_CERTIFICATES = 8
MAX_CHAIN_BYTES = 64 * 1024
MAX_RSA_BITS = 8_192
CACHED_SVIDS = 4_096

# Rules that bind issuers, which some issuers break; a configuration may let each pass by its name. What X509-SVID section 5.2
# tells validators to refuse has no such name.
SWITCHES = {
    "no-digital-signature": "leaf SVIDs must set digitalSignature (section 4.3)",
    "no-key-usage": "the key usage extension must be set on all SVIDs (section 4.3)",
    "key-usage-not-critical": "key usage must be marked critical (section 4.3)",
    "eku-incomplete": "an extended key usage must hold both serverAuth and clientAuth (section 4.4)",
    "authority-id-has-path": "the SPIFFE ID of a signing certificate must not have a path (section 3.2)",
}

_TEXTS = SWITCHES | {
    "chain-empty": "no certificate was presented",
    "chain-too-long": f"at most {MAX_CERTIFICATES} certificates are taken",
    "chain-too-large": f"at most {MAX_CHAIN_BYTES} bytes of certificates are taken",
    "not-a-certificate": "a certificate of the chain cannot be parsed",
    "key-too-large": f"RSA keys of at most {MAX_RSA_BITS} bits are taken",
    "leaf-is-ca": "the leaf must not be a CA (section 5.2)",
    "leaf-signs-certificates": "the leaf must not set keyCertSign (section 5.2)",
    "leaf-signs-crls": "the leaf must not set cRLSign (section 5.2)",
    "no-uri": "the leaf needs exactly one URI SAN, and has none (section 2)",
    "several-uris": "the leaf needs exactly one URI SAN, and has several (section 5.2)",
    "san-not-critical": "the SAN must be critical where there is no subject (section 3.1)",
    "id-root": "the SPIFFE ID of a leaf must have a path (section 5.2)",
    "unknown-trust-domain": "this broker does not trust the SPIFFE ID's trust domain",
    "wrong-trust-domain": "the chain was signed for another trust domain than the SPIFFE ID names",
    "no-path": "the chain does not lead to an authority of the SPIFFE ID's trust domain",
    "expired": "the SVID has expired; get a new one from your SPIFFE provider",
    "not-yet-valid": "the SVID is not valid yet; check the clocks",
    "denied": "this identity is on the deny list",
}


class SvidValidator:
    """Validates chains. What was accepted is remembered for as long as the same bundles are in force; a refusal never is.

    Args:
        bundles: who speaks for which trust domain.
        deny_list: asked on every call.
        clock: for expiry, on every call.
        allowed: names of `SWITCHES` to let pass.

    Raises:
        ConfigError: a name in `allowed` is none.
    """

    def __init__(self, bundles: TrustBundles, deny_list: DenyList | None, clock: Clock, allowed: Iterable[str] = ()) -> None:
        self._bundles = bundles
        self._deny_list = deny_list
        self._clock = clock
        self._allowed = frozenset(allowed)
        unknown = self._allowed - SWITCHES.keys()
        if unknown:
            msg = f"allow_nonconforming_svids: {', '.join(sorted(unknown))} is no rule; there are: {', '.join(SWITCHES)}"
            raise ConfigError(msg)
        self._accepted: OrderedDict[tuple[bytes, ...], Svid] = OrderedDict()
        self._accepted_under = ""

    def validate(self, chain: tuple[bytes, ...], as_of_us: int | None = None) -> Svid:
        """The identity that a chain proves, now.

        Args:
            chain: DER certificates, leaf first, then intermediates in any order.
            as_of_us: if given, validity is judged for that moment, microseconds since the epoch; bundles and deny list are always
                those of now. For what somebody signed earlier, at a moment that he signed with it.

        Raises:
            SvidInvalidError: `reasons` holds the one rule that was broken; the text names it and repeats nothing of the chain.
        """
        if self._accepted_under != self._bundles.digest:
            self._accepted.clear()
            self._accepted_under = self._bundles.digest
        now_us = self._clock.now_us() if as_of_us is None else as_of_us
        svid = self._accepted.get(chain)
        if svid is not None:
            self._accepted.move_to_end(chain)
        else:
            svid = self._judge(chain, now_us)
            self._accepted[chain] = svid
            if len(self._accepted) > CACHED_SVIDS:
                self._accepted.popitem(last=False)
        now = now_us // 1_000_000
        if now > svid.not_after:
            raise _refusal("expired", svid.id.text)
        if now < svid.not_before:
            raise _refusal("not-yet-valid", svid.id.text)
        if self._deny_list is not None and self._deny_list.denies(svid):
            raise _refusal("denied", svid.id.text)
        return svid

    def _judge(self, chain: tuple[bytes, ...], now_us: int) -> Svid:
        certificates = _parse(chain)
        leaf = certificates[0]
        for certificate in certificates:
            _require_bounded_key(certificate)
        extensions = leaf.extensions
        self._require_leaf(extensions)
        identity = _identity(leaf, extensions)
        bundle = self._bundles.of(identity.trust_domain)
        if bundle is None:
            raise _refusal("unknown-trust-domain", identity.text)
        now = datetime.datetime.fromtimestamp(now_us / 1_000_000, datetime.UTC)
        path = self._build_path(leaf, certificates[1:], bundle, identity, now)
        return Svid(
            id=identity,
            sha256=hashlib.sha256(chain[0]).hexdigest(),
            serial=format(leaf.serial_number, "x"),
            not_before=max(_seconds(each.not_valid_before_utc) for each in path),
            not_after=min(_seconds(each.not_valid_after_utc) for each in path),
        )

    def _require_leaf(self, extensions: x509.Extensions) -> None:
        """X509-SVID section 5.2, then what sections 4.3 and 4.4 demand of issuers."""
        constraints = _get(extensions, x509.BasicConstraints)
        if constraints is not None and constraints.value.ca:
            raise _refusal("leaf-is-ca")
        usage = _get(extensions, x509.KeyUsage)
        if usage is not None and usage.value.key_cert_sign:
            raise _refusal("leaf-signs-certificates")
        if usage is not None and usage.value.crl_sign:
            raise _refusal("leaf-signs-crls")
        if usage is None:
            self._require("no-key-usage", holds=False)
        else:
            self._require("key-usage-not-critical", holds=usage.critical)
            self._require("no-digital-signature", holds=usage.value.digital_signature)
        extended = _get(extensions, x509.ExtendedKeyUsage)
        if extended is not None:
            has_both = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH} <= set(extended.value)
            self._require("eku-incomplete", holds=has_both)

    def _build_path(
        self, leaf: x509.Certificate, others: list[x509.Certificate], bundle: TrustBundle, identity: SpiffeId, now: datetime.datetime
    ) -> list[x509.Certificate]:
        """A path to an authority of this one trust domain, valid then (RFC 5280 section 6)."""
        path = _path(leaf, others, bundle, now)
        if path is None:
            rule, voucher = self._why_no_path(leaf, others, bundle, now)
            raise _refusal(rule, f"{identity.text}{voucher}")
        for certificate in path[1:]:
            self._require("authority-id-has-path", holds=not _has_path(certificate))
        return path

    def _why_no_path(
        self, leaf: x509.Certificate, others: list[x509.Certificate], bundle: TrustBundle, now: datetime.datetime
    ) -> tuple[str, str]:
        """A better word than "no path", where there is one, and who vouched instead. Only ever chooses between refusals."""
        if any(now > each.not_valid_after_utc for each in (leaf, *others)):
            return "expired", ""
        if any(now < each.not_valid_before_utc for each in (leaf, *others)):
            return "not-yet-valid", ""
        for domain in self._bundles.trust_domains():
            other = self._bundles.of(domain)
            if other is not None and other is not bundle and _path(leaf, others, other, now) is not None:
                return "wrong-trust-domain", f" signed for {domain}"
        return "no-path", ""

    def _require(self, switch: str, *, holds: bool) -> None:
        if not holds and switch not in self._allowed:
            raise _refusal(switch)


def _refusal(rule: str, about: str = "") -> SvidInvalidError:
    text = _TEXTS.get(rule, "the URI SAN is not a SPIFFE ID")
    refusal = SvidInvalidError(f"Your SVID is refused: {text}.", reasons=(rule,))
    refusal.about = about
    return refusal


def _parse(chain: tuple[bytes, ...]) -> list[x509.Certificate]:
    if not chain:
        raise _refusal("chain-empty")
    if len(chain) > MAX_CERTIFICATES:
        raise _refusal("chain-too-long")
    if sum(map(len, chain)) > MAX_CHAIN_BYTES:
        raise _refusal("chain-too-large")
    try:
        certificates = [x509.load_der_x509_certificate(der) for der in chain]
        # No trailing or non-canonical bytes. One certificate can still have several hashes, by its signature (identity/deny_list.py).
        is_exact = all(each.public_bytes(Encoding.DER) == der for each, der in zip(certificates, chain, strict=True))
        for each in certificates:  # the library parses a part when it is asked for it: what is looked at below is looked at here
            _ = (each.subject, each.issuer, each.extensions, each.public_key(), each.not_valid_before_utc, each.not_valid_after_utc)
    except Exception as err:  # whatever the library makes of bytes that are no certificate
        raise _refusal("not-a-certificate") from err
    if not is_exact:
        raise _refusal("not-a-certificate")
    return certificates


def _require_bounded_key(certificate: x509.Certificate) -> None:
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey) and key.key_size > MAX_RSA_BITS:
        raise _refusal("key-too-large")


def _get(extensions: x509.Extensions, kind: type[x509.ExtensionType]) -> x509.Extension | None:  # type: ignore[type-arg]  # generic over `kind`
    try:
        return extensions.get_extension_for_class(kind)
    except x509.ExtensionNotFound:
        return None


def _identity(leaf: x509.Certificate, extensions: x509.Extensions) -> SpiffeId:
    """The one SPIFFE ID of a leaf (X509-SVID sections 2, 3.1 and 5.2)."""
    names = _get(extensions, x509.SubjectAlternativeName)
    uris = [] if names is None else names.value.get_values_for_type(x509.UniformResourceIdentifier)
    if names is None or not uris:
        raise _refusal("no-uri")
    if len(uris) > 1:
        raise _refusal("several-uris")
    try:
        identity = SpiffeId.parse(uris[0])
    except SpiffeIdError as err:
        raise _refusal(err.rule) from err
    if not identity.path:
        raise _refusal("id-root")
    if not names.critical and not list(leaf.subject):
        raise _refusal("san-not-critical")
    return identity


def _path(
    leaf: x509.Certificate, others: list[x509.Certificate], bundle: TrustBundle, now: datetime.datetime
) -> list[x509.Certificate] | None:
    if not bundle.authorities:
        return None
    verifier = (
        PolicyBuilder()
        .store(Store(list(bundle.authorities)))
        .time(now)
        .max_chain_depth(MAX_CERTIFICATES)
        .extension_policies(ca_policy=_CA_POLICY, ee_policy=_LEAF_POLICY)
        .build_client_verifier()
    )
    try:
        return verifier.verify(leaf, others).chain
    except VerificationError:
        return None


def _must_sign_certificates(_policy: Policy, _certificate: x509.Certificate, usage: x509.KeyUsage) -> None:
    """RFC 5280 section 4.2.1.3: only a key with keyCertSign verifies signatures on certificates."""
    if not usage.key_cert_sign:
        msg = "keyCertSign is not set"
        raise ValueError(msg)


def _has_path(certificate: x509.Certificate) -> bool:
    """Whether an authority's own SPIFFE ID, if it has one, has a path (X509-SVID section 3.2)."""
    names = _get(certificate.extensions, x509.SubjectAlternativeName)
    uris = [] if names is None else names.value.get_values_for_type(x509.UniformResourceIdentifier)
    return any(uri.startswith("spiffe://") and uri.removeprefix("spiffe://").partition("/")[2] for uri in uris)


def _seconds(moment: datetime.datetime) -> int:
    return int(moment.timestamp())


# The web's own demands on extensions (key identifiers and the like) are not SPIFFE's, so they are not asked for; what RFC 5280 and
# X509-SVID demand of signing certificates is. Critical extensions that the library does not know are refused by it.
_CA_POLICY = (
    ExtensionPolicy.permit_all()
    .require_present(x509.BasicConstraints, Criticality.AGNOSTIC, None)
    .require_present(x509.KeyUsage, Criticality.AGNOSTIC, _must_sign_certificates)
)
_LEAF_POLICY = ExtensionPolicy.permit_all()
