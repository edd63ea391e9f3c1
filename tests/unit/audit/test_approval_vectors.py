"""The published vectors of approvals: this program judges them as they say, and so does OpenSSL, which has never heard of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from keybroker.audit import approval
from keybroker.audit.approval import ApprovalError
from keybroker.model.decision import Obligation

ROOT = Path(__file__).parents[3]
VECTORS = ROOT / "tests" / "vectors" / "approval"
PAGE = ROOT / "docs" / "reference" / "approvals.md"
NAMES = sorted(path.stem for path in VECTORS.glob("*.json") if path.stem != "decision")
OPENSSL_OPTIONS = {
    "p256": ["-sha256"],
    "p384": ["-sha384"],
    "p521": ["-sha512"],
    "rsa": ["-sha256", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32"],
}


def vector(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text())
    return value


def pem(of: dict[str, Any]) -> bytes:
    return load_der_public_key(base64.b64decode(of["spki"])).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def pae(payload: bytes) -> bytes:
    """DSSE's encoding, written anew."""
    kind = b"application/vnd.keybroker.approval+json"
    return b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])


def test_there_are_vectors_of_both_kinds() -> None:
    kinds = [name.partition("-")[0] for name in NAMES]
    assert kinds.count("accept") >= 9
    assert kinds.count("refuse") >= 14


@pytest.mark.parametrize("name", NAMES)
def test_vector_is_judged_as_it_says(name: str) -> None:
    given = vector(name)
    spki, envelope = base64.b64decode(given["spki"]), given["envelope"].encode()
    if given["expect"] == "accept":
        statement = approval.verified(envelope, spki)
        assert approval.payload_of(statement).decode() == given["payload"]
        assert hashlib.sha256(pae(given["payload"].encode())).hexdigest() == given["pae_sha256"]
    else:
        with pytest.raises(ApprovalError) as caught:
            approval.verified(envelope, spki)
        assert caught.value.rule == given["expect"]


def openssl_verifies(name: str, payload: bytes, directory: Path) -> bool:
    """What OpenSSL says of a vector's signature over a payload."""
    given = vector(f"accept-{name}")
    (directory / "key.pem").write_bytes(pem(given))
    (directory / "sig").write_bytes(base64.b64decode(json.loads(given["envelope"])["signatures"][0]["sig"]))
    (directory / "pae").write_bytes(pae(payload))
    if name == "ed25519":
        command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "key.pem", "-rawin", "-in", "pae", "-sigfile", "sig"]
    else:
        command = ["openssl", "dgst", *OPENSSL_OPTIONS[name], "-verify", "key.pem", "-signature", "sig", "pae"]
    return subprocess.run(command, cwd=directory, capture_output=True, check=False, timeout=30).returncode == 0


@pytest.mark.parametrize("name", [*OPENSSL_OPTIONS, "ed25519"])
def test_openssl_agrees_about_the_signature_of_each_kind_of_key(name: str, tmp_path: Path) -> None:
    payload = vector(f"accept-{name}")["payload"].encode()
    assert openssl_verifies(name, payload, tmp_path)
    assert not openssl_verifies(name, payload.replace(b'"approve"', b'"refuse"'), tmp_path)


def test_what_the_page_says_to_run_verifies_a_good_approval_and_no_other(tmp_path: Path) -> None:
    section = PAGE.read_text().partition("## Check one with OpenSSL")[2]
    script = re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)[0]
    for name, verdict in (("accept-p256", "Verified OK"), ("refuse-changed-payload", "")):
        given = vector(name)
        (tmp_path / "approval.json").write_text(given["envelope"])
        (tmp_path / "approver.pem").write_bytes(pem(vector("accept-p256")))
        done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
        assert (done.returncode == 0) == bool(verdict)
        assert verdict in done.stdout


def test_page_shows_the_rules_that_refuse_and_no_others() -> None:
    table = PAGE.read_text().partition("## Why one is refused")[2].partition("\n## ")[0]
    documented = {name for row in re.findall(r"^\|(.*?)\|", table, re.MULTILINE) for name in re.findall(r"`([a-z0-9-]+)`", row)}
    sources = [ROOT / "keybroker" / place for place in ("audit/approval.py", "audit/dsse.py", "model/approval.py")]
    raised = r'(?:Error\(|_check_id\([a-z.]+, )"([a-z0-9-]+)"'
    assert documented == {rule for source in sources for rule in re.findall(raised, source.read_text())}


def test_decision_digest_equals_the_published_one() -> None:
    given = json.loads((VECTORS / "decision.json").read_text())
    obligations = msgspec.convert(given["obligations"], tuple[Obligation, ...])
    assert approval.decision_digest(given["grants"], obligations) == given["digest"]


def test_decision_digest_follows_from_the_page() -> None:
    given = json.loads((VECTORS / "decision.json").read_text())
    demanded = sorted(given["obligations"], key=lambda each: each["grant"])
    for stage in (stage for each in demanded for stage in each["quorum"]):
        stage["people"] = []
    text = json.dumps({"grants": sorted(given["grants"]), "obligations": demanded}, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == given["digest"]
