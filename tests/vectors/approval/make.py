"""Makes the test vectors of approvals anew: `python -m tests.vectors.approval.make`. Only for a new version of the format.

Signatures but Ed25519's are random, so every run gives other files that say the same. The private keys are thrown away, but for the
one of RFC 8032 section 7.1, test 1, with which anybody can make the Ed25519 vectors again, byte for byte.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from keybroker.audit import approval, dsse
from keybroker.audit.approval import PAYLOAD_TYPE
from keybroker.audit.dsse import PrivateKey
from keybroker.audit.leaf import canonical
from keybroker.model.approval import SubjectContent, SubjectDigest, SubjectKey, SubjectOperation
from keybroker.model.decision import Limit, QuorumStage, no_obligation
from tests.approvals import STATEMENT, SUBJECT, spki_of, statement, subject

HERE = Path(__file__).parent
KEYS: dict[str, PrivateKey] = {
    "p256": ec.generate_private_key(ec.SECP256R1()),
    "p384": ec.generate_private_key(ec.SECP384R1()),
    "p521": ec.generate_private_key(ec.SECP521R1()),
    "rsa": rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.from_private_bytes(
        bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    ),
}
HOSTILE = 'pay \u202e1.2 esaeler\u202c \u200b\x1b[2K"\\u0041"\r\n\U0001f511 \u20ac'


def write(name: str, description: str, expect: str, envelope: bytes, payload: bytes, key: str, payload_type: str = PAYLOAD_TYPE) -> None:
    """One vector, as one file."""
    value = {
        "description": description,
        "expect": expect,
        "spki": base64.b64encode(spki_of(KEYS[key])).decode(),
        "payload": payload.decode(),
        "pae_sha256": hashlib.sha256(dsse.pae(payload_type, payload)).hexdigest(),
        "envelope": envelope.decode(),
    }
    (HERE / f"{name}.json").write_text(json.dumps(value, indent=2, ensure_ascii=True) + "\n")


def good(name: str, description: str, made: Any, key: str) -> None:
    """A vector that is to be accepted."""
    write(name, description, "accept", approval.signed(made, KEYS[key]), approval.payload_of(made), key)


def bad(name: str, description: str, rule: str, payload: bytes, key: str = "ed25519") -> None:
    """A vector whose signature is good, and whose payload is not."""
    write(name, description, rule, dsse.signed(PAYLOAD_TYPE, payload, KEYS[key]), payload, key)


def main() -> None:
    """All of them."""
    for name in KEYS:
        good(f"accept-{name}", f"An approval by a key of the kind {name}.", STATEMENT, name)
    refusal = statement(
        verdict="refuse", confirmed="yes-flag", stage="release-signing/2", person="bob", approver="spiffe://example.org/human/bob"
    )
    good("accept-refusal", "A refusal, by another person, at the second stage, confirmed by a flag.", refusal, "ed25519")
    hostile = statement(subject=subject(reason=HOSTILE, content=SubjectContent("digest", 32, "", {"a": HOSTILE, "B": ""})))
    good("accept-hostile-text", "A reason and a field with control, bidirectional and other awkward characters.", hostile, "ed25519")
    message = SubjectDigest("sha512", "c3" * 64)
    signed = subject(
        operation=SubjectOperation(SUBJECT.operation.id, "sign"),
        algorithm="Ed25519",
        tbs=message,
        content=SubjectContent("message", 262_144, "text/plain", {}),
    )
    good("accept-message", "A message that is to be signed with Ed25519: the digest is its SHA-512.", statement(subject=signed), "ed25519")
    change = subject(
        operation=SubjectOperation(SUBJECT.operation.id, "unfreeze"),
        key=SubjectKey("", 0, ""),
        algorithm="",
        content=SubjectContent("unfreeze", 180, "", {"freeze": "01JDGQ4F8M3Z6T9W2X5Y7ABCDE"}),
    )
    good("accept-change", "An operation that signs nothing: no key, no algorithm.", statement(subject=change), "ed25519")

    payload = approval.payload_of(STATEMENT)
    value = json.loads(payload)
    envelope = json.loads(approval.signed(STATEMENT, KEYS["ed25519"]))
    signature = envelope["signatures"][0]

    def wrapped(name: str, description: str, rule: str, changed: bytes, about: bytes = payload) -> None:
        write(name, description, rule, changed, about, "ed25519")

    forged = payload.replace(b'"approve"', b'"refuse"')
    changed = canonical(envelope | {"payload": base64.b64encode(forged).decode()})
    wrapped("refuse-changed-payload", "The verdict was changed after it was signed.", "bad-signature", changed, forged)
    other = dsse.signed(PAYLOAD_TYPE, payload, KEYS["p256"])
    wrapped("refuse-another-key", "Signed by another key than the approver's.", "another-key", other)
    claimed = json.loads(other)
    claimed["signatures"][0]["keyid"] = signature["keyid"]
    wrapped("refuse-claimed-key", "Signed by another key, and the keyid claims the approver's.", "bad-signature", canonical(claimed))
    other_type = "application/vnd.in-toto+json"
    write(
        "refuse-another-type", "Signed as a payload of another type.", "another-payload-type",
        dsse.signed(other_type, payload, KEYS["ed25519"]), payload, "ed25519", other_type,
    )  # fmt: skip
    wrapped("refuse-two-signatures", "Two signatures.", "not-an-envelope", canonical(envelope | {"signatures": [signature, signature]}))
    wrapped("refuse-envelope-member", "A member that DSSE does not know.", "not-an-envelope", canonical(envelope | {"note": ""}))
    wrapped("refuse-envelope-spaces", "The envelope has white space.", "envelope-not-canonical", json.dumps(envelope).encode())
    bad("refuse-spaces", "The payload has white space.", "statement-not-canonical", json.dumps(value).encode())
    twice = payload.replace(b'"verdict":"approve"', b'"verdict":"refuse","verdict":"approve"')
    bad("refuse-member-twice", "A member of the payload is there twice.", "statement-not-canonical", twice)
    bad("refuse-unknown-member", "A member that is not known.", "not-a-statement", canonical(value | {"note": ""}))
    bad("refuse-missing-member", "Without a nonce.", "not-a-statement", re.sub(rb'"nonce":"[0-9a-f]+",', b"", payload))
    bad("refuse-version", "Another version of the format.", "not-a-statement", canonical(value | {"v": 2}))
    late = canonical(value | {"expires": "2026-11-25T10:00:00.000001Z"})
    bad("refuse-late-expiry", "Good for longer than the operation.", "times-out-of-order", late)
    wrong = canonical(value | {"subject": value["subject"] | {"algorithm": "ES384"}})
    bad("refuse-wrong-digest", "A SHA-256 digest for an algorithm that signs SHA-384.", "digest-of-another-algorithm", wrong)

    stage = QuorumStage(2, ("release-managers",), ("alice", "bob", "carol"))
    limits = (Limit(10, 3_600, "key"),)
    obligation = msgspec.structs.replace(no_obligation("release-signing"), limits=limits, quorum=(stage,), expires_s=3_600)
    plain = no_obligation("audit-everything")
    decision = {
        "grants": ["release-signing", "audit-everything"],
        "obligations": [msgspec.to_builtins(obligation), msgspec.to_builtins(plain)],
        "digest": approval.decision_digest(["release-signing", "audit-everything"], [obligation, plain]),
    }
    (HERE / "decision.json").write_text(json.dumps(decision, indent=2) + "\n")


if __name__ == "__main__":
    main()
