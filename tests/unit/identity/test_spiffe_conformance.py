# ruff: noqa: E501  sentences of the specifications are quoted whole
"""One test for each MUST and MUST NOT of the SPIFFE specifications that concerns a relying party, with its section and words.

Left out, because they bind others:
- SPIFFE-ID 3.1 "A signing authority MUST exist in each trust domain": issuers; without one, nothing validates (4.1.3 below).
- SPIFFE-ID 3.2 and X509-SVID 4.1 "signing certificates MUST set cA": issuers; the validator's side is 5.1 below.
- X509-SVID 6.1 `use`, `kid`, `x5c`: publishers; the consumer's side is 6.2 below.
- Trust Domain and Bundle 4.1.1 "MUST be changed whenever the contents are updated": publishers; 4.2 "SVID specifications MUST define": authors.
- Trust Domain and Bundle 5: bundle maps; keybroker is given one bundle for each trust domain by its configuration.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage

from keybroker.errors import ConfigError, SvidInvalidError
from keybroker.identity.bundle import TrustBundle, TrustBundles
from keybroker.identity.x509_svid import SvidValidator
from keybroker.model.identity import SpiffeId, SpiffeIdError
from tests.authorities import CA_SHAPE, LEAF_USAGE, NOW_US, Authority, Issued, Shape
from tests.clocks import FixedClock

ROOT = Authority()


def rule_of(text: str) -> str:
    with pytest.raises(SpiffeIdError) as caught:
        SpiffeId.parse(text)
    return caught.value.rule


def document(*keys: dict[str, Any], **members: Any) -> bytes:
    return json.dumps({"keys": list(keys), **members}).encode()


def jwk(authority: Authority = ROOT, **changes: Any) -> dict[str, Any]:
    x5c = [base64.b64encode(authority.certificate.public_bytes(Encoding.DER)).decode()]
    return {"kty": "EC", "use": "x509-svid", "x5c": x5c} | changes


def authorities_of(data: bytes) -> int:
    return len(TrustBundle.parse("example.org", data, "bundle.json").authorities)


def validator_of(tmp_path: Path, data: bytes = ROOT.pem) -> SvidValidator:
    (tmp_path / "bundle").write_bytes(data)
    return SvidValidator(TrustBundles.load({"example.org": tmp_path / "bundle"}), None, FixedClock(NOW_US))


def refused(tmp_path: Path, issued: Issued, data: bytes = ROOT.pem) -> str:
    with pytest.raises(SvidInvalidError) as caught:
        validator_of(tmp_path, data).validate(issued.chain)
    return caught.value.reasons[0]


# SPIFFE-ID


def test_id_2_scheme() -> None:
    """Section 2: "Valid SPIFFE IDs MUST have the scheme set to `spiffe`"."""
    assert {rule_of(text) for text in ("https://example.org/a", "spiffe:/example.org/a", "example.org/a", "xspiffe://e/a")} == {"id-scheme"}


def test_id_2_trust_domain_name_is_not_zero() -> None:
    """Section 2: "include a non-zero trust domain name"."""
    assert rule_of("spiffe://") == rule_of("spiffe:///a") == "trust-domain-empty"


def test_id_2_no_query_or_fragment() -> None:
    """Section 2: "MUST NOT include a query or fragment component"."""
    for text in (
        "spiffe://example.org/a?",
        "spiffe://example.org/a?b",
        "spiffe://example.org/a#",
        "spiffe://example.org?b",
        "spiffe://example.org#b",
    ):
        assert rule_of(text).endswith("characters")


def test_id_21_host_is_not_empty() -> None:
    """Section 2.1: "The `host` part of the authority MUST NOT be empty"."""
    assert rule_of("spiffe:///path") == "trust-domain-empty"


def test_id_21_userinfo_and_port_are_empty() -> None:
    """Section 2.1: "The `userinfo` and `port` parts of the authority component MUST be empty"."""
    for authority in ("u@example.org", "u:p@example.org", "@example.org", "example.org:", "example.org:443"):
        assert rule_of(f"spiffe://{authority}/a") == "trust-domain-characters"


def test_id_21_host_is_lowercase() -> None:
    """Section 2.1: "The `host` part of the authority MUST be lowercase"."""
    assert rule_of("spiffe://Example.org/a") == "trust-domain-characters"


def test_id_21_host_characters() -> None:
    """Section 2.1: "MUST contain only letters, numbers, dots, dashes, and underscores ([a-z0-9.-_])"."""
    assert SpiffeId.parse("spiffe://a-z_0.9/x").trust_domain == "a-z_0.9"
    for character in "!$&'()*+,;=~[]{}|\\^`\"<> \t\r\n\x00\x7f":
        assert rule_of(f"spiffe://exam{character}ple.org/a") == "trust-domain-characters"


def test_id_21_host_is_not_percent_encoded() -> None:
    """Section 2.1: "The `host` part of the authority MUST NOT contain percent-encoded characters"."""
    assert rule_of("spiffe://%65xample.org/a") == "trust-domain-characters"


def test_id_21_names_that_look_like_addresses_are_names() -> None:
    """Section 2.1: "MUST NOT process trust domain names differently whether or not they are valid IP addresses and/or valid DNS names"."""
    for name in ("192.0.2.1", "999.999.999.999", "-a-", "a..b", "_", "localhost", "example.org."):
        assert SpiffeId.parse(f"spiffe://{name}/a").trust_domain == name
    assert rule_of("spiffe://[::1]/a") == "trust-domain-characters"


def test_id_22_path_is_not_percent_encoded() -> None:
    """Section 2.2: "The path component MUST NOT include percent-encoded characters"."""
    assert rule_of("spiffe://example.org/a%20b") == "id-path-characters"


def test_id_22_no_empty_or_relative_segments() -> None:
    """Section 2.2: "MUST NOT include segments that are empty or are relative path modifiers (i.e. `.`, `..`)"."""
    assert rule_of("spiffe://example.org/a//b") == "id-empty-segment"
    assert rule_of("spiffe://example.org/a/./b") == rule_of("spiffe://example.org/..") == "id-relative-segment"
    assert SpiffeId.parse("spiffe://example.org/.../.a").path == ("...", ".a")


def test_id_22_no_trailing_slash() -> None:
    """Section 2.2: "The path component MUST NOT include a trailing `/`"."""
    assert rule_of("spiffe://example.org/a/") == rule_of("spiffe://example.org/") == "id-empty-segment"


def test_id_22_segment_characters() -> None:
    """Section 2.2: "Individual path segments MUST contain only letters, numbers, dots, dashes, and underscores ([a-zA-Z0-9.-_])"."""
    assert SpiffeId.parse("spiffe://example.org/aZ9.-_").path == ("aZ9.-_",)
    for character in "!$&'()*+,;=:@~[]{}|\\^`\"<> \t\r\n\x00\x7f":
        assert rule_of(f"spiffe://example.org/a{character}") == "id-path-characters"


def test_id_23_up_to_2048_bytes() -> None:
    """Section 2.3: "SPIFFE implementations MUST support SPIFFE URIs up to 2048 bytes in length"."""
    longest = "spiffe://example.org/" + "a" * 2027
    assert len(longest) == 2048
    assert SpiffeId.parse(longest).text == longest
    assert rule_of(longest + "a") == "id-too-long"
    assert SpiffeId.parse(f"spiffe://{'d' * 255}/a").trust_domain == "d" * 255
    assert rule_of(f"spiffe://{'d' * 256}/a") == "trust-domain-characters"


def test_id_32_identity_and_key_are_in_the_signed_part(tmp_path: Path) -> None:
    """Section 3.2: "The SPIFFE ID and the public key (if present) MUST be included in a portion of the payload which is signed"."""
    issued = ROOT.issue()
    forged = issued.chain[0].replace(b"/payments/api", b"/payments/ceo")
    assert forged != issued.chain[0]
    with pytest.raises(SvidInvalidError) as caught:
        validator_of(tmp_path).validate((forged,))
    assert caught.value.reasons == ("no-path",)


def test_id_33_only_a_defined_document_type(tmp_path: Path) -> None:
    """Section 3.3: "In order for an SVID to be considered valid, it MUST leverage a document type for which a corresponding specification has been defined"."""
    with pytest.raises(SvidInvalidError):
        validator_of(tmp_path).validate((b"spiffe://example.org/payments/api",))


# X509-SVID


@pytest.mark.parametrize("uris", [(), ("spiffe://example.org/a", "spiffe://example.org/a")])
def test_x509_2_exactly_one_uri(tmp_path: Path, uris: tuple[str, ...]) -> None:
    """Section 2: "An X.509 SVID MUST contain exactly one URI SAN"; "Validators encountering an SVID containing more than one URI SAN MUST reject the SVID"."""
    assert refused(tmp_path, ROOT.issue(Shape(uris=uris))) in {"no-uri", "several-uris"}


def test_x509_31_leaf_has_a_path(tmp_path: Path) -> None:
    """Section 3.1: "Leaf certificate SPIFFE IDs MUST have a non-root path component"."""
    assert refused(tmp_path, ROOT.issue(Shape(uris=("spiffe://example.org",)))) == "id-root"


def test_x509_31_san_is_critical_without_subject(tmp_path: Path) -> None:
    """Section 3.1: "the URI SAN extension MUST be marked as critical if Subject is omitted"."""
    assert refused(tmp_path, ROOT.issue(Shape(subject=""))) == "san-not-critical"


def test_x509_32_authority_has_no_path(tmp_path: Path) -> None:
    """Section 3.2: "the SPIFFE ID of a signing certificate MUST NOT have a path component"."""
    below = ROOT.intermediate(shape=dataclasses.replace(CA_SHAPE, uris=("spiffe://example.org/ca",)))
    assert refused(tmp_path, below.issue()) == "authority-id-has-path"


def test_x509_32_authority_is_no_identity(tmp_path: Path) -> None:
    """Section 3.2: "Signing certificates MUST NOT be used for authentication purposes"."""
    below = ROOT.intermediate(shape=dataclasses.replace(CA_SHAPE, uris=("spiffe://example.org/ca",)))
    assert refused(tmp_path, Issued(below.certificate, below.key)) == "leaf-is-ca"
    assert refused(tmp_path, Issued(ROOT.certificate, ROOT.key)) == "leaf-is-ca"


def test_x509_41_leaf_is_no_ca(tmp_path: Path) -> None:
    """Section 4.1: "leaf certificates MUST set the `cA` field to `false`"; 5.2: "the validator MUST ensure" it."""
    assert refused(tmp_path, ROOT.issue(Shape(ca=True))) == "leaf-is-ca"


def test_x509_43_key_usage_is_there_and_critical(tmp_path: Path) -> None:
    """Section 4.3: "The key usage extension MUST be set on all SVIDs, and MUST be marked critical"."""
    assert refused(tmp_path, ROOT.issue(Shape(usage=None))) == "no-key-usage"
    assert refused(tmp_path, ROOT.issue(Shape(usage_critical=False))) == "key-usage-not-critical"


def test_x509_43_authority_signs_certificates(tmp_path: Path) -> None:
    """Section 4.3: "SVID signing certificates MUST set `keyCertSign`"."""
    below = ROOT.intermediate(shape=dataclasses.replace(CA_SHAPE, usage=LEAF_USAGE))
    assert refused(tmp_path, below.issue()) == "no-path"


def test_x509_43_leaf_signs(tmp_path: Path) -> None:
    """Section 4.3: "Leaf SVIDs MUST set `digitalSignature`"."""
    assert refused(tmp_path, ROOT.issue(Shape(usage=frozenset({"key_agreement"})))) == "no-digital-signature"


@pytest.mark.parametrize("bit", ["key_cert_sign", "crl_sign"])
def test_x509_43_leaf_signs_no_certificates(tmp_path: Path, bit: str) -> None:
    """Section 4.3: "Leaf SVIDs MUST NOT set `keyCertSign` or `cRLSign`"; 5.2: "the validator MUST ensure" it."""
    assert refused(tmp_path, ROOT.issue(Shape(usage=LEAF_USAGE | {bit}))).startswith("leaf-signs")


def test_x509_44_extended_usage_has_both(tmp_path: Path) -> None:
    """Section 4.4: "When included, fields `id-kp-serverAuth` and `id-kp-clientAuth` MUST be set"."""
    for only in (Usage.CLIENT_AUTH, Usage.SERVER_AUTH, Usage.CODE_SIGNING):
        assert refused(tmp_path, ROOT.issue(Shape(extended=[only]))) == "eku-incomplete"


def test_x509_51_path_validation(tmp_path: Path) -> None:
    """Section 5.1: "MUST follow RFC 5280 path validation semantics" (each semantic is in test_x509_svid.py)."""
    assert validator_of(tmp_path).validate(ROOT.intermediate().issue().chain)
    assert refused(tmp_path, Authority("root").issue()) == "no-path"


def test_x509_52_scheme(tmp_path: Path) -> None:
    """Section 5.2: "The validator MUST also ensure that the scheme of the SPIFFE ID is set to `spiffe`"."""
    assert refused(tmp_path, ROOT.issue(Shape(uris=("https://example.org/payments/api",)))) == "id-scheme"


def test_x509_52_path(tmp_path: Path) -> None:
    """Section 5.2: "MUST ensure that the SPIFFE ID has a non-root path component"."""
    assert refused(tmp_path, ROOT.issue(Shape(uris=("spiffe://example.org/",)))) in {"id-root", "id-empty-segment"}


def test_x509_52_several_uris(tmp_path: Path) -> None:
    """Section 5.2: "SVIDs containing more than one URI SAN MUST be rejected"."""
    assert refused(tmp_path, ROOT.issue(Shape(uris=("spiffe://example.org/a", "urn:x")))) == "several-uris"


@pytest.mark.parametrize("entry", [jwk(x5c=[]), {"kty": "EC", "use": "x509-svid"}])
def test_x509_62_entry_without_certificate_is_ignored(entry: dict[str, Any]) -> None:
    """Section 6.2: "If `x5c` is not set, or is empty, then the entry MUST be ignored"."""
    assert authorities_of(document(entry)) == 0
    assert authorities_of(document(entry, jwk())) == 1


def test_x509_62_only_the_first_value_counts(tmp_path: Path) -> None:
    """Section 6.2: "If the `x5c` parameter contains multiple values, then all but the first MUST be ignored"."""
    other = Authority("other")
    entry = jwk(x5c=jwk()["x5c"] + jwk(other)["x5c"] + ["nonsense"])
    assert authorities_of(document(entry)) == 1
    assert validator_of(tmp_path, document(entry)).validate(ROOT.issue().chain)
    assert refused(tmp_path, other.issue(), document(entry)) == "no-path"


# Trust Domain and Bundle


def test_bundle_3_the_bundle_of_the_identity_s_own_domain(tmp_path: Path) -> None:
    """Section 3: "validators must choose the bundle corresponding to the trust domain that the SVID resides in"."""
    other = Authority("other")
    (tmp_path / "a").write_bytes(ROOT.pem)
    (tmp_path / "b").write_bytes(other.pem)
    bundles = TrustBundles.load({"example.org": tmp_path / "a", "other.org": tmp_path / "b"})
    with pytest.raises(SvidInvalidError) as caught:
        SvidValidator(bundles, None, FixedClock(NOW_US)).validate(other.issue().chain)
    assert caught.value.reasons == ("wrong-trust-domain",)


def test_bundle_41_undefined_members_are_not_required() -> None:
    """Section 4.1: "SPIFFE implementations MUST NOT require their presence in order to function"."""
    assert authorities_of(document(jwk())) == authorities_of(document(jwk(), vendor="x", spiffe_sequence=1)) == 1


@pytest.mark.parametrize("value", ["1", 1.5, -1, True, 2**63, [1]])
def test_bundle_411_sequence_is_an_integer_of_64_bits(value: Any) -> None:
    """Section 4.1.1: "its value MUST be a monotonically increasing integer"; "at least 64 bits of precision"."""
    with pytest.raises(ConfigError, match="spiffe_sequence"):
        authorities_of(document(jwk(), spiffe_sequence=value))
    assert authorities_of(document(jwk(), spiffe_sequence=2**63 - 1)) == 1


def test_bundle_411_sequence_never_falls(tmp_path: Path) -> None:
    """Section 4.1.1: "monotonically increasing"."""
    path = tmp_path / "bundle"
    path.write_bytes(document(jwk(), spiffe_sequence=7))
    bundles = TrustBundles.load({"example.org": path})
    path.write_bytes(document(jwk(), jwk(Authority("old")), spiffe_sequence=6))
    assert not bundles.refresh()
    assert "older than 7" in bundles.problems[0]
    path.write_bytes(document(jwk(), jwk(Authority("new")), spiffe_sequence=8))
    assert bundles.refresh()
    assert bundles.problems == []


@pytest.mark.parametrize("value", ["300", 1.5, False])
def test_bundle_412_refresh_hint_is_an_integer(value: Any) -> None:
    """Section 4.1.2: "When set, its value MUST be an integer"."""
    with pytest.raises(ConfigError, match="spiffe_refresh_hint"):
        authorities_of(document(jwk(), spiffe_refresh_hint=value))


@pytest.mark.parametrize("data", [b"{}", b'{"keys": {}}', b'{"keys": null}', b'{"keys": [1]}'])
def test_bundle_413_keys_are_there(data: bytes) -> None:
    """Section 4.1.3: "The parameter `keys` MUST be present"."""
    with pytest.raises(ConfigError, match="keys"):
        authorities_of(data)


def test_bundle_413_unknown_types_and_uses_are_ignored() -> None:
    """Section 4.1.3: "Clients encountering unknown key types or uses MUST ignore the corresponding JWK element"."""
    assert authorities_of(document(jwk(kty="quantum"), jwk(use="tea"), jwk(use="jwt-svid"), jwk())) == 1


@pytest.mark.parametrize("data", [document(), document(jwk(use="jwt-svid"))])
def test_bundle_413_empty_bundle_trusts_nobody(tmp_path: Path, data: bytes) -> None:
    """Section 4.1.3: "In both cases, workloads MUST treat all SVIDs from the trust domain as invalid and untrusted"."""
    assert refused(tmp_path, ROOT.issue(), data) == "no-path"


def test_bundle_421_key_type_is_there_and_known() -> None:
    """Section 4.2.1: "The `kty` parameter MUST be set"; "Clients encountering an unknown key type MUST ignore the entire JWK element"."""
    without = jwk()
    del without["kty"]
    assert authorities_of(document(without, jwk(kty="oct"), jwk(kty=7))) == 0


def test_bundle_422_use_is_there_and_known() -> None:
    """Section 4.2.2: "missing `use` parameter or an unknown `use` value MUST ignore the entire JWK element"; "case sensitive"."""
    without = jwk()
    del without["use"]
    assert authorities_of(document(without, jwk(use="X509-SVID"), jwk(use=""))) == 0


def test_bundle_63_duplicate_names_are_refused() -> None:
    """Section 6.3: "it is important that libraries parsing SPIFFE bundle maps employ duplicate key detection"."""
    with pytest.raises(ConfigError, match="given twice"):
        authorities_of(b'{"keys": [], "keys": []}')
