"""Approval statements for tests: a good one, and any of its members changed."""

from __future__ import annotations

from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keybroker.audit.dsse import PrivateKey
from keybroker.client.results import Operation, Stage
from keybroker.model.approval import Statement, Subject, SubjectContent, SubjectDigest, SubjectKey, SubjectOperation

SUBJECT = Subject(
    log="example.org/broker-1",
    operation=SubjectOperation("01JDGQ4F8M3Z6T9W2X5Y7ABCDE", "sign-digest"),
    workload="spiffe://example.org/ci/release",
    key=SubjectKey("release", 3, "5ef07b4ee16bb9386b99e009b31aa09d6f71d382aa0c1b2d3e4f5061728394a5"),
    algorithm="ES256",
    tbs=SubjectDigest("sha256", "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9"),
    content=SubjectContent("digest", 32, "application/gzip", {"version": "2.1.0"}),
    reason="release 2.1.0, built from the tag",
    decision="9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    expires="2026-11-25T10:00:00.000000Z",
)
STATEMENT = Statement(
    subject=SUBJECT,
    verdict="approve",
    approver="spiffe://example.org/human/alice",
    person="alice",
    stage="release-signing/1",
    confirmed="prompt",
    issued="2026-11-25T09:05:00.123456Z",
    expires="2026-11-25T10:00:00.000000Z",
    nonce="00112233445566778899aabbccddeeff",
    v=1,
)


def subject(**changes: Any) -> Subject:
    """A good subject with some members changed."""
    return msgspec.structs.replace(SUBJECT, **changes)


def statement(**changes: Any) -> Statement:
    """A good statement with some members changed."""
    return msgspec.structs.replace(STATEMENT, **changes)


def spki_of(key: PrivateKey) -> bytes:
    """The public key, DER SubjectPublicKeyInfo."""
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


OPERATION = Operation(
    id=SUBJECT.operation.id,
    state="pending",
    subject=SUBJECT,
    requested="2026-11-25T09:00:00.000000Z",
    not_before="",
    stages=(Stage("release-signing/1", 2, ("release-managers",), (), is_open=True),),
    approvals=(),
    person="alice",
    yours=("release-signing/1",),
    use="",
    record=812,
)


def operation(**changes: Any) -> Operation:
    """What a broker shows alice of the good subject, with some members changed."""
    return msgspec.structs.replace(OPERATION, **changes)


KEYS: dict[str, PrivateKey] = {
    "p256": ec.generate_private_key(ec.SECP256R1()),
    "p384": ec.generate_private_key(ec.SECP384R1()),
    "p521": ec.generate_private_key(ec.SECP521R1()),
    "rsa2048": rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate(),
}
