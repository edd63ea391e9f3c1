"""Who and what is in a development world. That it works is shown by the end-to-end tests, which live in one."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from keybroker import config
from keybroker.authority.policy import loader
from keybroker.cli import world_text
from keybroker.cli.development_ca import DevelopmentCa
from keybroker.cli.world import PlanError, WorldError, WorldPlan, make
from keybroker.identity.bundle import TrustBundles
from keybroker.identity.svid_file import SvidFile
from keybroker.identity.x509_svid import SvidValidator
from keybroker.model.identity import SpiffeId
from keybroker.model.key import KEY_NAME, Algorithm
from tests.clocks import FixedClock

NOW = datetime.datetime(2026, 9, 21, 12, 0, tzinfo=datetime.UTC)


def test_more_identities_and_keys_join_the_standard_ones() -> None:
    plan = WorldPlan.make(["spiffe://example.org/shop/checkout"], ["receipts:ES384", "a.b_c-d:RS256"])
    assert plan.identities["checkout"].text == "spiffe://example.org/shop/checkout"
    assert plan.keys["receipts"] is Algorithm.ES384
    assert {"orders", "release", "invoices", "sessions", "a.b_c-d"} < set(plan.keys)


@pytest.mark.parametrize(
    "text",
    [
        "", "checkout", "spiffe://example.org", "spiffe://other.example/x", "spiffe://example.org/shop/../x", "spiffe://example.org/a/",
        "spiffe://Example.org/x", "spiffe://example.org/broker", "spiffe://example.org/other/alice", "spiffe://example.org/x\n",
        "spiffe://example.org/" + "x" * 65, "https://example.org/x",
    ],
)  # fmt: skip
def test_identity_that_cannot_be_is_refused_by_the_name_of_its_option(text: str) -> None:
    with pytest.raises(PlanError, match="--workload"):
        WorldPlan.make([text], [])


def test_identity_given_twice_is_refused() -> None:
    with pytest.raises(PlanError, match=r"svids/x\.pem is taken"):
        WorldPlan.make(["spiffe://example.org/x", "spiffe://example.org/x"], [])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "receipts",
        ":ES256",
        "receipts:",
        "receipts:HS256",
        "receipts:es256",
        "Receipts:ES256",
        "a b:ES256",
        "../x:ES256",
        "orders:ES256",
    ],
)
def test_key_that_cannot_be_is_refused_by_the_name_of_its_option(text: str) -> None:
    with pytest.raises(PlanError, match="--key"):
        WorldPlan.make([], [text])


def test_key_given_twice_is_refused() -> None:
    with pytest.raises(PlanError, match="there is a key x already"):
        WorldPlan.make([], ["x:ES256", "x:ES384"])


@pytest.mark.parametrize("name", ["a#b", "a=b", "a\nb", "a\x1bb", "a\udcffb"])
def test_path_that_softhsm_cannot_read_is_refused_before_anything_is_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(WorldError, match="choose another"):
        make(tmp_path / name, WorldPlan.make([], []))
    assert list(tmp_path.iterdir()) == []


ODD_NAMES = st.sampled_from(["null", "true", "on", "1", "1.5", "0x1", "2026-01-01", "1e3", "y"])


@settings(max_examples=30, deadline=None)  # each writes a file
@given(names=st.lists(st.from_regex(KEY_NAME, fullmatch=True) | ODD_NAMES, min_size=1))
def test_configuration_means_what_was_asked_for_whatever_the_keys_are_called(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    names = list(dict.fromkeys(names))
    path = tmp_path_factory.mktemp("config") / "keybroker.yaml"
    uri = "pkcs11:token=t?module-path=/m.so&pin-source=file:pin"
    path.write_text(world_text.configuration("example.org", uri, (20_001, 20_002), 2, dict.fromkeys(names[:1], "payments"), names))
    loaded = config.load(path)
    assert loaded.authority is not None
    assert list(loaded.authority.keys) == names
    assert [key.versions[0].object for key in loaded.authority.keys.values()] == names
    assert yaml.safe_load(path.read_text())["frontend"]["listen"] == "127.0.0.1:20001"


def test_grants_are_ones_that_the_authority_takes(tmp_path: Path) -> None:
    (tmp_path / "development.yaml").write_text(world_text.grants("example.org"))
    assert loader.load(tmp_path, frozenset({"orders", "invoices", "sessions"}))


def test_svid_is_one_by_our_own_rules_and_names_the_loopback_only_where_asked(tmp_path: Path) -> None:
    ca = DevelopmentCa.make("example.org", NOW)
    (tmp_path / "bundle.pem").write_bytes(ca.certificate_pem)
    clock = FixedClock(int(NOW.timestamp()) * 1_000_000)
    validator = SvidValidator(TrustBundles.load({"example.org": tmp_path / "bundle.pem"}), None, clock)
    for is_on_loopback in (True, False):
        path = tmp_path / "svid.pem"
        path.write_bytes(ca.svid(SpiffeId.parse("spiffe://example.org/x"), "x", NOW, is_on_loopback=is_on_loopback))
        svid = SvidFile.load(path)
        assert validator.validate(svid.chain).id.text == "spiffe://example.org/x"
        names = x509.load_der_x509_certificate(svid.chain[0]).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert len(list(names)) == (4 if is_on_loopback else 1)
        assert svid.not_after == int((NOW + datetime.timedelta(days=7)).timestamp())
