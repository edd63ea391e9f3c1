"""SVID validation: each rule with a certificate that breaks only that rule; caching, expiry, deny list, and hostile bytes."""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keybroker.errors import ConfigError, SvidInvalidError
from keybroker.identity.bundle import TrustBundles
from keybroker.identity.deny_list import DenyList
from keybroker.identity.x509_svid import MAX_CERTIFICATES, SWITCHES, SvidValidator
from tests.authorities import CA_SHAPE, HOUR, NOW, NOW_US, Authority, Issued, Shape, rsa_key
from tests.clocks import FixedClock

ROOT = Authority()
OTHER = Authority("other")
ODD = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")


def bundles_of(tmp_path: Path, **authorities: Authority) -> TrustBundles:
    paths = {}
    for name, authority in (authorities or {"example": ROOT, "other": OTHER}).items():
        paths[f"{name}.org"] = tmp_path / f"{name}.pem"
        paths[f"{name}.org"].write_bytes(authority.pem)
    return TrustBundles.load(paths)


def validator_of(tmp_path: Path, *allowed: str, **authorities: Authority) -> SvidValidator:
    return SvidValidator(bundles_of(tmp_path, **authorities), None, FixedClock(NOW_US), allowed)


def refused(validator: SvidValidator, chain: tuple[bytes, ...] | Issued) -> str:
    """The rule that a chain breaks."""
    with pytest.raises(SvidInvalidError) as caught:
        validator.validate(chain.chain if isinstance(chain, Issued) else chain)
    (rule,) = caught.value.reasons
    assert str(caught.value).isprintable()
    return rule


GOOD = {
    "plain": Shape(),
    "no extended usage": Shape(extended=None),
    "no subject": Shape(subject="", san_critical=True),
    "no basic constraints": Shape(ca=None),
    "key encipherment too": Shape(usage=frozenset({"digital_signature", "key_encipherment", "key_agreement"})),
    "long id": Shape(uris=("spiffe://example.org/" + "a" * 2027,)),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_svid_is_accepted(tmp_path: Path, name: str) -> None:
    issued = ROOT.issue(GOOD[name])
    svid = validator_of(tmp_path).validate(issued.chain)
    assert svid.id.text == GOOD[name].uris[0]
    assert svid.serial == format(issued.certificate.serial_number, "x")


@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP384R1()), rsa_key(2048), ed25519.Ed25519PrivateKey.generate()])
def test_leaf_of_every_usual_key_type_is_accepted(tmp_path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    assert validator_of(tmp_path).validate(ROOT.issue(key=key).chain).id.path == ("payments", "api")


def test_intermediates_are_used_in_any_order_and_the_shortest_life_counts(tmp_path: Path) -> None:
    first = ROOT.intermediate("first", dataclasses.replace(CA_SHAPE, not_after=NOW + HOUR / 2))
    chain = first.intermediate("second").issue().chain
    validator = validator_of(tmp_path)
    assert validator.validate(chain).not_after == int((NOW + HOUR / 2).timestamp())
    assert validator.validate((chain[0], chain[2], chain[1])).id.path == ("payments", "api")


@pytest.mark.case(4)
@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        (Shape(ca=True), "leaf-is-ca"),
        (Shape(usage=frozenset({"digital_signature", "key_cert_sign"})), "leaf-signs-certificates"),
        (Shape(usage=frozenset({"digital_signature", "crl_sign"})), "leaf-signs-crls"),
        (Shape(usage=frozenset({"key_encipherment"})), "no-digital-signature"),
        (Shape(usage=None), "no-key-usage"),
        (Shape(usage_critical=False), "key-usage-not-critical"),
        (Shape(extended=[ExtendedKeyUsageOID.CLIENT_AUTH]), "eku-incomplete"),
        (Shape(extended=[ExtendedKeyUsageOID.SERVER_AUTH]), "eku-incomplete"),
        (Shape(subject="", san_critical=False), "san-not-critical"),
    ],
)
def test_leaf_that_breaks_one_rule_is_refused_by_its_name(tmp_path: Path, shape: Shape, rule: str) -> None:
    assert refused(validator_of(tmp_path), ROOT.issue(shape)) == rule
    if rule in SWITCHES:
        assert validator_of(tmp_path, rule).validate(ROOT.issue(shape).chain)
    else:
        with pytest.raises(ConfigError, match="is no rule"):
            validator_of(tmp_path, rule)


@pytest.mark.case(5)
@pytest.mark.parametrize(
    ("uris", "rule"),
    [
        ((), "no-uri"),
        (("spiffe://example.org/a", "spiffe://example.org/b"), "several-uris"),
        (("spiffe://example.org/a", "https://example.org/"), "several-uris"),
        (("https://example.org/a",), "id-scheme"),
        (("SPIFFE://example.org/a",), "id-scheme"),
        (("spiffe://example.org",), "id-root"),
        (("spiffe://example.org/",), "id-empty-segment"),
        (("spiffe://example.org/a/",), "id-empty-segment"),
        (("spiffe://example.org//a",), "id-empty-segment"),
        (("spiffe://example.org/a/../b",), "id-relative-segment"),
        (("spiffe://example.org/./a",), "id-relative-segment"),
        (("spiffe://example.org/a%2fb",), "id-path-characters"),
        (("spiffe://example.org/a\n",), "id-path-characters"),
        (("spiffe://example.org/a\x00b",), "id-path-characters"),
        (("spiffe://example.org/a?b=c",), "id-path-characters"),
        (("spiffe://example.org/a#b",), "id-path-characters"),
        (("spiffe://Example.org/a",), "trust-domain-characters"),
        (("spiffe://example.org:443/a",), "trust-domain-characters"),
        (("spiffe://user@example.org/a",), "trust-domain-characters"),
        (("spiffe://%65xample.org/a",), "trust-domain-characters"),
        (("spiffe:///a",), "trust-domain-empty"),
        (("spiffe://example.org/" + "a" * 2030,), "id-too-long"),
        (("",), "id-scheme"),
    ],
)
def test_identity_that_is_none_is_refused_by_its_rule(tmp_path: Path, uris: tuple[str, ...], rule: str) -> None:
    assert refused(validator_of(tmp_path), ROOT.issue(Shape(uris=uris))) == rule


@pytest.mark.case(5)
def test_identity_that_is_not_ascii_never_passes(tmp_path: Path) -> None:
    good = ROOT.issue(Shape(uris=("spiffe://example.org/aXb",))).chain[0]
    assert refused(validator_of(tmp_path), (good.replace(b"aXb", b"a\xe9b"),)) in {"id-not-ascii", "not-a-certificate", "no-path"}


@pytest.mark.case(3)
def test_identity_of_one_domain_signed_by_another_is_refused_though_both_are_trusted(tmp_path: Path) -> None:
    assert refused(validator_of(tmp_path), OTHER.issue()) == "wrong-trust-domain"
    assert refused(validator_of(tmp_path), ROOT.issue(Shape(uris=("spiffe://other.org/x",)))) == "wrong-trust-domain"
    assert validator_of(tmp_path).validate(OTHER.issue(Shape(uris=("spiffe://other.org/x",))).chain).id.trust_domain == "other.org"


@pytest.mark.case(2)
def test_expired_and_early_and_unknown_are_refused(tmp_path: Path) -> None:
    validator = validator_of(tmp_path)
    assert refused(validator, ROOT.issue(Shape(not_after=NOW - HOUR / 2))) == "expired"
    assert refused(validator, ROOT.issue(Shape(not_before=NOW + HOUR / 2))) == "not-yet-valid"
    assert refused(validator, Authority("stranger").issue()) == "no-path"
    assert refused(validator, Authority("root").issue()) == "no-path"  # the same name, another key
    assert refused(validator, ROOT.issue(Shape(uris=("spiffe://nobody.org/x",)))) == "unknown-trust-domain"


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        (dataclasses.replace(CA_SHAPE, ca=False), "no-path"),
        (dataclasses.replace(CA_SHAPE, ca=None), "no-path"),
        (dataclasses.replace(CA_SHAPE, usage=frozenset({"digital_signature"})), "no-path"),
        (dataclasses.replace(CA_SHAPE, usage=None), "no-path"),
        (dataclasses.replace(CA_SHAPE, not_after=NOW - HOUR), "expired"),
        (dataclasses.replace(CA_SHAPE, uris=("spiffe://example.org/ca",)), "authority-id-has-path"),
        (dataclasses.replace(CA_SHAPE, uris=("spiffe://example.org",)), ""),
        (
            dataclasses.replace(CA_SHAPE, extra=[(x509.NameConstraints([x509.UniformResourceIdentifier("elsewhere.org")], None), True)]),
            "no-path",
        ),
        (
            dataclasses.replace(CA_SHAPE, extra=[(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), True)]),
            "no-path",
        ),
    ],
)
def test_signing_certificate_that_breaks_a_rule_carries_nobody(tmp_path: Path, shape: Shape, rule: str) -> None:
    issued = ROOT.intermediate(shape=shape).issue()
    if rule:
        assert refused(validator_of(tmp_path), issued) == rule
    else:
        assert validator_of(tmp_path).validate(issued.chain)


def test_path_length_and_leaves_as_authorities_are_refused(tmp_path: Path) -> None:
    short = Authority("short", dataclasses.replace(CA_SHAPE, path_length=0))
    validator = validator_of(tmp_path, example=short)
    assert validator.validate(short.issue().chain)
    assert refused(validator, short.intermediate().issue()) == "no-path"
    leaf = short.issue(Shape(subject="leaf"))
    forger = Authority("leaf", key=leaf.key)
    assert refused(validator, (forger.issue().chain[0], leaf.chain[0])) == "no-path"


def test_unknown_critical_extension_of_a_leaf_is_refused(tmp_path: Path) -> None:
    assert refused(validator_of(tmp_path), ROOT.issue(Shape(extra=[(ODD, True)]))) == "no-path"
    assert validator_of(tmp_path).validate(ROOT.issue(Shape(extra=[(ODD, False)])).chain)


@pytest.mark.case(9)
def test_pathological_chains_are_refused_at_once(tmp_path: Path) -> None:
    validator = validator_of(tmp_path)
    authority = ROOT
    for number in range(MAX_CERTIFICATES):
        authority = authority.intermediate(f"i{number}")
    huge = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x04\x82\xff\xf0" + bytes(65_520))
    wide = leaf_with_a_wide_key()
    started = time.monotonic()
    assert refused(validator, ()) == "chain-empty"
    assert refused(validator, authority.issue().chain) == "chain-too-long"
    assert refused(validator, ROOT.issue().chain * 100) == "chain-too-long"
    assert refused(validator, ROOT.issue(Shape(extra=[(huge, False)]))) == "chain-too-large"
    assert refused(validator, (wide,)) in {"key-too-large", "not-a-certificate"}
    assert time.monotonic() - started < 1


def leaf_with_a_wide_key() -> bytes:
    """A leaf with an RSA key of 16,384 bits, which nobody wants to generate: the modulus need not be a product of primes."""
    public = rsa.RSAPublicNumbers(65537, (1 << 16_383) | 1).public_key()
    certificate = ROOT.issue().certificate
    builder = x509.CertificateBuilder().subject_name(certificate.subject).issuer_name(certificate.issuer).public_key(public)
    builder = builder.serial_number(1).not_valid_before(NOW - HOUR).not_valid_after(NOW + HOUR)
    for extension in certificate.extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    return builder.sign(ROOT.key, hashes.SHA256()).public_bytes(Encoding.DER)


@pytest.mark.case(7)
def test_accepted_chain_is_refused_when_it_expires_or_its_authority_goes(tmp_path: Path) -> None:
    clock = FixedClock(NOW_US)
    bundles = bundles_of(tmp_path)
    validator = SvidValidator(bundles, None, clock)
    chain = ROOT.issue().chain
    assert validator.validate(chain) is validator.validate(chain)  # remembered
    (tmp_path / "example.pem").write_bytes(Authority("successor").pem)
    assert bundles.refresh()
    assert refused(validator, chain) == "no-path"
    (tmp_path / "example.pem").write_bytes(ROOT.pem + b"\n")
    assert bundles.refresh()
    assert validator.validate(chain)
    clock.time_us += 3601 * 1_000_000
    assert refused(validator, chain) == "expired"
    clock.time_us = NOW_US - 3601 * 1_000_000
    assert refused(validator, chain) == "not-yet-valid"


@pytest.mark.case(8)
def test_identity_or_certificate_on_the_deny_list_is_refused_though_remembered(tmp_path: Path) -> None:
    path = tmp_path / "denied.yaml"
    path.write_text("denied: []\n")
    denied = DenyList.load(path)
    validator = SvidValidator(bundles_of(tmp_path), denied, FixedClock(NOW_US))
    chain, other = ROOT.issue().chain, ROOT.issue().chain
    svid = validator.validate(chain)
    path.write_text(f"denied: [{{svid_serial: '{svid.serial.upper()}', reason: stolen}}]\n")
    assert denied.refresh()
    assert refused(validator, chain) == "denied"
    assert validator.validate(other)
    path.write_text("denied:\n- {spiffe_id: spiffe://example.org/payments/api, reason: incident}\n")
    assert denied.refresh()
    assert refused(validator, other) == "denied"
    path.write_text("denied:\n- {spiffe_id: nonsense}\n")
    assert not denied.refresh()
    assert "denied.yaml:2" in denied.problems[0]
    path.unlink()
    assert not denied.refresh()
    assert refused(validator, other) == "denied"  # a broken or lost file forgets no denial


def rewritten(der: bytes) -> bytes:
    """The same certificate with its ECDSA signature written in the other way: n - s for s. It takes no key to do that."""
    certificate = x509.load_der_x509_certificate(der)
    r, s = decode_dss_signature(certificate.signature)
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    signature = b"\0" + encode_dss_signature(r, order - s)
    ecdsa_with_sha256 = bytes.fromhex("300a06082a8648ce3d040302")
    content = certificate.tbs_certificate_bytes + ecdsa_with_sha256 + b"\x03" + bytes([len(signature)]) + signature
    return b"\x30\x82" + len(content).to_bytes(2) + content


@pytest.mark.case(8)
def test_denied_certificate_stays_denied_when_its_signature_is_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "denied.yaml"
    path.write_text("denied: []\n")
    denied = DenyList.load(path)
    validator = SvidValidator(bundles_of(tmp_path), denied, FixedClock(NOW_US))
    chain = ROOT.issue().chain
    other = (rewritten(chain[0]),)
    first, second = validator.validate(chain), validator.validate(other)
    assert first.sha256 != second.sha256
    assert first.serial == second.serial
    path.write_text(f'denied: [{{svid_serial: "{first.serial}"}}]\n')
    assert denied.refresh()
    assert refused(validator, chain) == refused(validator, other) == "denied"


def test_refusals_are_never_remembered_and_acceptances_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keybroker.identity.x509_svid.CACHED_SVIDS", 3)
    validator = validator_of(tmp_path)
    refused(validator, OTHER.issue())
    assert len(validator._accepted) == 0
    for _ in range(5):
        validator.validate(ROOT.issue().chain)
    assert len(validator._accepted) == 3


SAMPLE = ROOT.intermediate().issue().chain


@pytest.fixture(scope="module")
def validator(tmp_path_factory: pytest.TempPathFactory) -> SvidValidator:
    return validator_of(tmp_path_factory.mktemp("bundles"))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), count=st.integers(1, 6))
def test_mutated_certificates_are_accepted_or_refused_and_nothing_else(validator: SvidValidator, seed: int, count: int) -> None:
    rng = random.Random(seed)
    chain = [bytearray(each) for each in SAMPLE]
    for _ in range(count):
        target = rng.choice(chain)
        target[rng.randrange(len(target))] = rng.randrange(256)
    try:
        svid = validator.validate(tuple(map(bytes, chain)))
    except SvidInvalidError:
        return
    assert svid.id.text == "spiffe://example.org/payments/api"


@given(chain=st.lists(st.binary(max_size=60), max_size=10))
def test_any_bytes_are_refused(validator: SvidValidator, chain: list[bytes]) -> None:
    refused(validator, tuple(chain))
