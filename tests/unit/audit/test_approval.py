"""Approval statements: what is signed is what is read, and nothing else can be read."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from keybroker.audit import approval, dsse
from keybroker.audit.approval import PAYLOAD_TYPE, ApprovalError
from keybroker.audit.leaf import canonical
from keybroker.errors import ConfigError
from keybroker.identity.svid_file import SvidFile
from keybroker.model.approval import Statement, SubjectContent, SubjectDigest, SubjectKey, SubjectOperation
from keybroker.model.decision import Limit, Obligation, QuorumStage, no_obligation
from keybroker.model.key import Algorithm
from tests.approvals import KEYS, STATEMENT, SUBJECT, spki_of, statement, subject
from tests.authorities import Authority

KEY = KEYS["p256"]
SPKI = spki_of(KEY)
TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
STATEMENTS = st.builds(
    lambda reason, name, texts, size, verdict, confirmed: statement(
        subject=subject(reason=reason, content=SubjectContent("message", size, "text/plain", texts)),
        person=name,
        verdict=verdict,
        confirmed=confirmed,
    ),
    TEXT,
    TEXT.filter(bool),
    st.dictionaries(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=64), TEXT, max_size=4),
    st.integers(0, 2**53 - 1),
    st.sampled_from(["approve", "refuse"]),
    st.sampled_from(["prompt", "yes-flag", "file"]),
)


def payload(**changes: Any) -> dict[str, Any]:
    """The statement as plain values, with members of the top level changed; `None` takes one away."""
    value = json.loads(approval.payload_of(STATEMENT)) | changes
    return {name: member for name, member in value.items() if member is not None}


def refused(value: dict[str, Any] | bytes) -> str:
    """The rule by which a statement is refused that its approver has signed all the same."""
    data = value if isinstance(value, bytes) else rfc8785.dumps(value)
    with pytest.raises(ApprovalError) as caught:
        approval.verified(dsse.signed(PAYLOAD_TYPE, data, KEY), SPKI)
    return caught.value.rule


@pytest.mark.parametrize("name", KEYS)
def test_statement_comes_back_if_the_key_has_signed_it(name: str) -> None:
    assert approval.verified(approval.signed(STATEMENT, KEYS[name]), spki_of(KEYS[name])) == STATEMENT


@given(STATEMENTS)
def test_any_statement_comes_back_whatever_its_texts_are(made: Statement) -> None:
    assert approval.verified(approval.signed(made, KEY), SPKI) == made


@given(STATEMENTS)
def test_payload_equals_rfc8785(made: Statement) -> None:
    data = approval.payload_of(made)
    assert rfc8785.dumps(json.loads(data)) == data


@given(STATEMENTS, st.randoms(use_true_random=False))
def test_statement_is_refused_when_any_byte_of_it_changes(made: Statement, chance: random.Random) -> None:
    data = bytearray(approval.signed(made, KEY))
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    with pytest.raises(ApprovalError):
        approval.verified(bytes(data), SPKI)


def test_statement_is_refused_if_signed_as_another_type() -> None:
    data = dsse.signed("application/vnd.other+json", approval.payload_of(STATEMENT), KEY)
    with pytest.raises(ApprovalError, match="another-payload-type"):
        approval.verified(data, SPKI)


@pytest.mark.parametrize("name", sorted(payload()))
def test_statement_is_refused_without_one_of_its_members(name: str) -> None:
    assert refused(payload(**{name: None})) == "not-a-statement"


@pytest.mark.parametrize("name", sorted(payload()["subject"]))
def test_statement_is_refused_without_one_member_of_its_subject(name: str) -> None:
    rest = {each: value for each, value in payload()["subject"].items() if each != name}
    assert refused(payload(subject=rest)) == "not-a-statement"


@pytest.mark.parametrize(
    "place", [(), ("subject",), ("subject", "key"), ("subject", "operation"), ("subject", "tbs"), ("subject", "content")]
)
def test_statement_is_refused_with_a_member_that_is_not_known(place: tuple[str, ...]) -> None:
    value = payload()
    inner = value
    for step in place:
        inner = inner[step]
    inner["note"] = ""
    assert refused(value) == "not-a-statement"


@pytest.mark.parametrize("name", sorted(payload()))
def test_statement_is_refused_with_a_member_of_another_type(name: str) -> None:
    wrongs: tuple[object, ...] = (2, True, [], {}, 1.5, ["approve"])
    for wrong in wrongs:
        assert refused(payload(**{name: wrong})) == "not-a-statement"


SUBJECT_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"operation": SubjectOperation("01JDGQ4F8M3Z6T9W2X5Y7ABCD", "sign")}, "not-a-statement"),
    ({"operation": SubjectOperation("01JDGQ4F8M3Z6T9W2X5Y7ABCDE", "Sign")}, "not-a-statement"),
    ({"operation": SubjectOperation("01JDGQ4F8M3Z6T9W2X5Y7ABCDE", "sign\n")}, "not-a-statement"),
    ({"workload": "https://example.org/ci"}, "workload-not-a-spiffe-id"),
    ({"workload": "spiffe://example.org/ci/../admin"}, "workload-not-a-spiffe-id"),
    ({"workload": "spiffe://example.org/" + "a" * 2048}, "not-a-statement"),
    ({"key": SubjectKey("Release", 3, "0" * 64)}, "key-incomplete"),
    ({"key": SubjectKey("release", 0, "0" * 64)}, "key-incomplete"),
    ({"key": SubjectKey("release", 3, "")}, "key-incomplete"),
    ({"key": SubjectKey("", 0, "")}, "key-incomplete"),
    ({"key": SubjectKey("", 3, "")}, "key-incomplete"),
    ({"key": SubjectKey("release", 3, "0" * 63)}, "not-a-statement"),
    ({"key": SubjectKey("release", 3, "A" * 64)}, "not-a-statement"),
    ({"algorithm": "HS256"}, "algorithm-unknown"),
    ({"algorithm": ""}, "algorithm-unknown"),
    ({"algorithm": "ES384"}, "digest-of-another-algorithm"),
    ({"tbs": SubjectDigest("sha256", "0" * 128)}, "digest-length"),
    ({"tbs": SubjectDigest("sha1", "0" * 64)}, "not-a-statement"),  # type: ignore[arg-type]  # that is the test
    ({"content": SubjectContent("digest", -1, "", {})}, "not-a-statement"),
    ({"content": SubjectContent("digest", 2**53, "", {})}, "not-a-statement"),
    ({"content": SubjectContent("digest", 1, "ä", {})}, "media-type-not-ascii"),
    ({"content": SubjectContent("digest", 1, "", {"ä": ""})}, "not-a-statement"),
    ({"content": SubjectContent("digest", 1, "", {"a": "x" * 1_025})}, "not-a-statement"),
    ({"content": SubjectContent("digest", 1, "", {str(n): "" for n in range(65)})}, "not-a-statement"),
    ({"reason": "x" * 1_025}, "not-a-statement"),
    ({"reason": "\ud800"}, "not-a-statement"),
    ({"decision": "policy"}, "not-a-statement"),
    ({"log": ""}, "not-a-statement"),
    ({"log": "example.org/broker 1"}, "not-a-statement"),
    ({"expires": "2026-11-25T10:00:00Z"}, "not-a-statement"),
    ({"expires": "2026-13-25T10:00:00.000000Z"}, "not-a-time"),
    ({"expires": "2026-11-25T09:59:59.999999Z"}, "times-out-of-order"),
    ({"operation": SubjectOperation("01JDGQ4F8M3Z6T9W2X5Y7ABCDE", "unfreeze")}, "algorithm-without-signature"),
]


@pytest.mark.parametrize(("changes", "rule"), SUBJECT_FAULTS)
def test_subject_is_refused_by_whoever_signs_and_by_whoever_reads(changes: dict[str, Any], rule: str) -> None:
    made = statement(subject=subject(**changes))
    with pytest.raises(ApprovalError, match=rule):
        approval.signed(made, KEY)
    try:
        data = canonical(made)
    except UnicodeError:
        return  # it has no bytes
    assert refused(data) == rule


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"issued": "2026-11-25T10:00:00.000000Z"}, "times-out-of-order"),
        ({"expires": "2026-11-25T10:00:00.000001Z"}, "times-out-of-order"),
        ({"expires": "2026-02-30T10:00:00.000000Z"}, "not-a-time"),
        ({"issued": "2026-11-25T24:00:00.000000Z"}, "not-a-time"),
        ({"issued": "2026-11-25T09:05:60.000000Z"}, "not-a-time"),
        ({"verdict": "maybe"}, "not-a-statement"),
        ({"confirmed": ""}, "not-a-statement"),
        ({"nonce": "00" * 15}, "not-a-statement"),
        ({"stage": ""}, "not-a-statement"),
        ({"stage": "two words"}, "not-a-statement"),
        ({"approver": "spiffe://example.org/human/alice/"}, "approver-not-a-spiffe-id"),
        ({"person": ""}, "not-a-statement"),
        ({"v": 2}, "not-a-statement"),
    ],
)
def test_statement_is_refused_by_whoever_signs_and_by_whoever_reads(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ApprovalError, match=rule):
        approval.signed(statement(**changes), KEY)
    assert refused(payload(**changes)) == rule


def test_operation_that_signs_nothing_may_have_a_key_or_none() -> None:
    for kind, key in (("unfreeze", SubjectKey("", 0, "")), ("admin-rotate", SUBJECT.key)):
        made = statement(subject=subject(operation=SubjectOperation(SUBJECT.operation.id, kind), key=key, algorithm=""))
        assert approval.verified(approval.signed(made, KEY), SPKI) == made


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_statement_is_taken_for_every_algorithm_with_the_digest_that_it_signs(algorithm: Algorithm) -> None:
    digest = SubjectDigest(algorithm.hash_name, "ab" * algorithm.digest_size)  # type: ignore[arg-type]  # one of the three
    made = statement(subject=subject(algorithm=algorithm.value, tbs=digest))
    assert approval.verified(approval.signed(made, KEY), SPKI) == made


def test_payload_is_refused_unless_it_is_canonical() -> None:
    good = approval.payload_of(STATEMENT)
    for data in (
        good + b"\n",
        b" " + good,
        json.dumps(json.loads(good)).encode(),
        good.replace(b'"v":1', b'"v":1,"v":1'),
        good.replace(b'"v":1', b'"verdict":"refuse","v":1'),
        good.replace(b'"person":"alice"', b'"person":"\\u0061lice"'),
        good.replace(b'"approver"', b'"person":"bob","approver"'),
    ):
        assert refused(data) == "statement-not-canonical"
    for data in (b"", b"[]", b"null", b"\xff", b"{}", b"[" * 10_000, good[:-1], good.replace(b'"v":1', b'"v":1.0')):
        assert refused(data) == "not-a-statement"
    assert refused(good + b" " * approval.MAX_STATEMENT_BYTES) == "statement-too-large"


def obligation(grant: str, **changes: Any) -> Obligation:
    return msgspec.structs.replace(no_obligation(grant), **changes)


def quorum(approvals: int, *people: str) -> tuple[QuorumStage, ...]:
    return (QuorumStage(approvals, ("release-managers",), people),)


def test_decision_digest_is_the_same_whatever_order_the_grants_come_in() -> None:
    one, two = obligation("a", limits=(Limit(1, 60, "key"),)), obligation("b")
    assert approval.decision_digest(["a", "b"], [one, two]) == approval.decision_digest(["b", "a"], [two, one])


def test_decision_digest_is_the_same_whoever_is_in_the_groups() -> None:
    before, after = obligation("a", quorum=quorum(2, "alice", "bob")), obligation("a", quorum=quorum(2, "alice", "bob", "carol"))
    assert approval.decision_digest(["a"], [before]) == approval.decision_digest(["a"], [after])


def test_decision_digest_differs_when_a_grant_or_what_it_demands_differs() -> None:
    digests = {
        approval.decision_digest(["a"], [obligation("a")]),
        approval.decision_digest(["b"], [obligation("b")]),
        approval.decision_digest(["a", "b"], [obligation("a"), obligation("b")]),
        approval.decision_digest(["a"], [obligation("a", cool_off_s=1)]),
        approval.decision_digest(["a"], [obligation("a", quorum=quorum(2))]),
        approval.decision_digest(["a"], [obligation("a", quorum=quorum(3))]),
        approval.decision_digest(["a"], [obligation("a", quorum=quorum(2), observe_only=True)]),
    }
    assert len(digests) == 7


def test_svid_file_gives_the_key_that_signs_for_its_chain(tmp_path: Path) -> None:
    for key in KEYS.values():
        path = Authority().issue(key=key).write(tmp_path / "svid.pem")
        file, own = SvidFile.load_with_key(path)
        assert approval.verified(approval.signed(STATEMENT, own), spki_of(key)) == STATEMENT
        assert file == SvidFile.load(path)


def test_svid_file_is_refused_when_its_key_is_another_ones(tmp_path: Path) -> None:
    path = tmp_path / "svid.pem"
    issued, other = Authority().issue(), Authority().issue().write(tmp_path / "other.pem")
    path.write_bytes(issued.pem + other.read_bytes()[other.read_bytes().index(b"-----BEGIN PRIVATE KEY") :])
    with pytest.raises(ConfigError, match="not the first certificate's"):
        SvidFile.load_with_key(path)
