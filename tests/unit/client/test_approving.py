"""What an approver's program signs, and when it signs nothing. No network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from keybroker.audit import approval
from keybroker.client import BrokerAnswerError, GivenApproval, Needs, NothingToApproveError, Pending, PendingError, Stage, approving
from keybroker.clock import from_rfc3339
from keybroker.errors import ConfigError
from keybroker.model.approval import SubjectDigest
from keybroker.model.identity import SpiffeId
from tests.approvals import SUBJECT, operation, spki_of, subject
from tests.authorities import Authority, Shape
from tests.clocks import FixedClock

ALICE = SpiffeId.parse("spiffe://example.org/human/alice")
CLOCK = FixedClock(from_rfc3339("2026-11-25T09:30:00Z"))
KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def svid(tmp_path: Path) -> Path:
    return Authority().issue(Shape(uris=(ALICE.text,)), KEY).write(tmp_path / "alice.pem")


def test_statement_is_about_what_the_broker_showed() -> None:
    (made,) = approving.statements(operation(), ALICE, "approve", "prompt", clock=CLOCK)
    assert made.subject == SUBJECT
    assert (made.verdict, made.approver, made.person, made.stage) == ("approve", ALICE.text, "alice", "release-signing/1")
    assert (made.confirmed, made.issued, made.expires) == ("prompt", "2026-11-25T09:30:00.000000Z", SUBJECT.expires)


def test_no_two_statements_are_equal() -> None:
    made = {approving.statements(operation(), ALICE, "approve", "prompt", clock=CLOCK)[0].nonce for _ in range(100)}
    assert len(made) == 100


def test_every_stage_that_waits_gets_an_approval_and_one_refusal_is_enough() -> None:
    waiting = operation(yours=("a/1", "b/1"))
    assert [each.stage for each in approving.statements(waiting, ALICE, "approve", "prompt")] == ["a/1", "b/1"]
    assert [each.stage for each in approving.statements(waiting, ALICE, "approve", "prompt", ["b/1"])] == ["b/1"]
    assert [each.stage for each in approving.statements(waiting, ALICE, "refuse", "prompt")] == ["a/1"]


GIVEN = GivenApproval("approve", "release-signing/1", "alice", ALICE.text, "2026-11-25T09:01:00.000000Z", 813, counts=True)


@pytest.mark.parametrize(
    ("changes", "stages", "why"),
    [
        ({"yours": (), "state": "redeemed"}, (), "it is redeemed"),
        ({"yours": (), "state": "expired"}, (), "it is expired"),
        ({"yours": (), "person": ""}, (), "your identity is nobody's"),
        ({"yours": (), "approvals": (GIVEN,)}, (), "you have approved it"),
        ({"yours": ()}, (), "does not wait for you"),
        ({}, ("another/1",), "does not wait for you"),
        ({}, ("release-signing/1", "another/1"), "does not wait for you"),
    ],
)
def test_nothing_is_signed_where_nothing_waits(changes: dict[str, Any], stages: tuple[str, ...], why: str) -> None:
    with pytest.raises(NothingToApproveError, match=why):
        approving.statements(operation(**changes), ALICE, "approve", "prompt", stages)


def test_statement_is_signed_with_the_key_of_the_svid(svid: Path) -> None:
    (made,) = approving.statements(operation(), approving.approver_of(svid), "approve", "file", clock=CLOCK)
    assert approval.verified(approving.signed(made, svid), spki_of(KEY)) == made


def test_statement_is_not_signed_with_an_svid_that_has_become_anothers(svid: Path) -> None:
    (made,) = approving.statements(operation(), ALICE, "approve", "prompt", clock=CLOCK)
    Authority().issue(Shape(uris=("spiffe://example.org/human/bob",))).write(svid)
    with pytest.raises(ConfigError, match="human/bob's by now"):
        approving.signed(made, svid)


def test_statement_is_not_signed_after_the_operation_has_ended(svid: Path) -> None:
    late = FixedClock(from_rfc3339(SUBJECT.expires))
    (made,) = approving.statements(operation(), ALICE, "approve", "prompt", clock=late)
    with pytest.raises(NothingToApproveError, match="has ended"):
        approving.signed(made, svid)


@pytest.mark.parametrize(
    "changes", [{"algorithm": "ES384"}, {"tbs": SubjectDigest("sha256", "0" * 128)}, {"decision": "?"}, {"workload": "x"}, {"log": "\n"}]
)
def test_what_makes_no_statement_is_not_signed(svid: Path, changes: dict[str, Any]) -> None:
    (made,) = approving.statements(operation(subject=subject(**changes)), ALICE, "approve", "prompt", clock=CLOCK)
    with pytest.raises(BrokerAnswerError, match="nothing that can be approved"):
        approving.signed(made, svid)


def test_pending_error_says_what_is_missing() -> None:
    stages = (Stage("a/1", 2, ("legal", "board"), ("carol",), is_open=True), Stage("a/2", 1, ("ops",), ("bob",), is_open=False))
    missing = PendingError(Pending("01J", Needs(stages), "2026-11-25T10:00:00.000000Z"))
    assert str(missing) == "operation 01J is pending: it needs 1 more of legal, board (a/1), until 2026-11-25T10:00:00.000000Z"
    waiting = PendingError(Pending("01J", Needs(stages[1:], "2026-11-25T09:45:00.000000Z"), "2026-11-25T10:00:00.000000Z"))
    assert "it can be redeemed from 2026-11-25T09:45:00.000000Z on" in str(waiting)
