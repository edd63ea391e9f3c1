"""Bundle and SVID files: what cannot be used is refused with its cure, and the old stays in force."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from keybroker.errors import ConfigError
from keybroker.identity.bundle import TrustBundles
from keybroker.identity.deny_list import DenyList
from keybroker.identity.svid_file import SvidFile
from tests.authorities import Authority, Shape

ROOT = Authority()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "neither PEM certificates nor a SPIFFE bundle"),
        (b"nonsense", "neither PEM"),
        (b"{", "not a SPIFFE bundle document"),
        (b'{"keys": [{"kty": "EC", "use": "x509-svid", "x5c": ["!!"]}]}', "not a base64 DER certificate"),
        (ROOT.issue().pem, "not an authority"),
        (ROOT.pem + b"-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n", "holds a private key"),
        (b"[" * 100_000, "neither PEM"),
        (b'{"keys":' * 20_000, "not a SPIFFE bundle document"),
    ],
)
def test_bundle_that_cannot_be_used_is_refused_with_its_cure(tmp_path: Path, data: bytes, error: str) -> None:
    (tmp_path / "bundle").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        TrustBundles.load({"example.org": tmp_path / "bundle"})
    assert error in str(caught.value)
    assert str(tmp_path / "bundle") in str(caught.value)


def test_bundle_for_a_name_that_is_no_trust_domain_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bundle").write_bytes(ROOT.pem)
    with pytest.raises(ConfigError, match="not a trust domain name"):
        TrustBundles.load({"Example.org": tmp_path / "bundle"})


def test_missing_bundle_is_refused_at_start_and_kept_later(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    with pytest.raises(ConfigError, match="cannot be read"):
        TrustBundles.load({"example.org": path})
    path.write_bytes(ROOT.pem)
    bundles = TrustBundles.load({"example.org": path})
    digest = bundles.digest
    for broken in (b"nonsense", None):
        path.unlink()
        if broken:
            path.write_bytes(broken)
        assert not bundles.refresh()
        assert bundles.problems
        assert bundles.digest == digest
    path.write_bytes(ROOT.pem)
    assert not bundles.refresh()  # the same authorities as ever
    assert bundles.problems == []


def test_refresh_is_true_only_when_the_authorities_change(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.write_bytes(ROOT.pem)
    bundles = TrustBundles.load({"example.org": path})
    assert not bundles.refresh()
    path.write_bytes(b"# a comment\n" + ROOT.pem * 2)
    assert not bundles.refresh()
    path.write_bytes(ROOT.pem + Authority("next").pem)
    assert bundles.refresh()
    assert bundles.ssl_trust_anchors().count("BEGIN CERTIFICATE") == 2


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "denied.yaml:1"),
        ("denied:\n- {}\n", "denied.yaml:2: denied[0]: give exactly one"),
        ("denied:\n- {spiffe_id: spiffe://a/b, svid_serial: x}\n", "give exactly one"),
        ("denied:\n- {svid_serial: XYZ}\n", "a serial number in hex"),
        ("denied:\n- {spiffe_id: spiffe://A/b}\n", "not a SPIFFE ID (trust-domain-characters)"),
        ("denied:\n- {spiffe_id: spiffe://a/b, since: x}\n", "unknown field `since`"),
    ],
)
def test_deny_list_that_cannot_be_used_is_refused_with_its_line(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "denied.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        DenyList.load(tmp_path / "denied.yaml")
    assert error in str(caught.value)


def test_svid_file_is_read_with_its_chain(tmp_path: Path) -> None:
    issued = ROOT.intermediate().issue()
    loaded = SvidFile.load(issued.write(tmp_path / "svid.pem"))
    assert loaded.id.text == "spiffe://example.org/payments/api"
    assert loaded.chain == issued.chain


def test_svid_file_that_cannot_be_used_is_refused_with_its_cure(tmp_path: Path) -> None:
    path = tmp_path / "svid.pem"
    with pytest.raises(ConfigError, match="cannot be read"):
        SvidFile.load(path)
    issued = ROOT.issue()
    path.write_bytes(issued.pem)
    with pytest.raises(ConfigError, match="its unencrypted private key"):
        SvidFile.load(path)
    key = ROOT.issue().key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(issued.pem + key)
    with pytest.raises(ConfigError, match="not the first certificate's"):
        SvidFile.load(path)
    with pytest.raises(ConfigError, match=r"not an X\.509-SVID"):
        SvidFile.load(ROOT.issue(Shape(uris=())).write(path))
