"""The model itself: a true history passes, and each way in which a broker could cheat or lose is found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keybroker.audit import leaf as leaves
from keybroker.client.results import SignedUse, UsePlaces
from keybroker.model.key import Algorithm
from keybroker.model.record import Draft, KeyFacts, Outcome, RecordKind, Tbs, TrailFacts
from tests.faults.history import LOST, STRANGER, UNSENT, WORKLOAD, Attempt, Question
from tests.faults.model import digest_of, violations


@dataclass
class Story:
    """A log and a history that grow together; `told` and `recorded` may be made to differ."""

    private: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    history: list[Attempt] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)

    def violations(self) -> list[str]:
        spki = self.private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return violations(self.history, self.log(), {"orders": spki})

    def log(self) -> list[bytes]:
        heads: dict[str, tuple[int, str]] = {}
        log: list[bytes] = []
        for index, draft in enumerate(self.drafts):
            count, head = heads.get(draft.trail, (0, ""))
            trail = TrailFacts(draft.trail, count, head)
            time = f"2026-11-24T08:{index // 60:02}:{index % 60:02}.000000Z"
            log.append(leaves.encode(draft, log="example.org/test", index=index, time=time, salt="", trail=trail))
            heads[draft.trail] = (count + 1, leaves.leaf_hash(log[-1]).hex())
        return log

    def use(self, question: Question, use: str, ending: Outcome = Outcome.SIGNED, retry_of: str = "") -> SignedUse:
        """An intent and an outcome on record; the answer that would be true."""
        signature = self.private.sign(question.message, ec.ECDSA(hashes.SHA256()))
        self.drafts.append(
            Draft(
                kind=RecordKind.INTENT,
                trail=question.workload,
                use=use,
                retry_of=retry_of,
                key=KeyFacts(question.key, 1, ""),
                tbs=Tbs("sha256", digest_of(question)),
            )
        )
        hash_ = hashlib.sha256(signature).hexdigest() if ending is Outcome.SIGNED else ""
        self.drafts.append(Draft(kind=RecordKind.OUTCOME, trail=question.workload, use=use, outcome=ending, signature_sha256=hash_))
        places = UsePlaces("example.org/test", len(self.drafts) - 2, len(self.drafts) - 1)
        return SignedUse(signature, question.key, 1, question.algorithm, use, places)

    def tell(self, question: Question, status: int, code: str = "", signed: SignedUse | None = None) -> None:
        """An attempt that begins after every other has ended."""
        now = float(len(self.history))
        self.history.append(Attempt(question, 1, now, now + 0.5, status, code, signed))


def question(text: str, idempotency_key: str = "") -> Question:
    return Question(WORKLOAD, "orders", Algorithm.ES256, text.encode(), idempotency_key)


def true_story() -> Story:
    story = Story()
    story.tell(question("a"), 200, signed=story.use(question("a"), "a"))
    story.tell(question("never asked twice"), LOST)
    story.tell(question("lost"), LOST)
    story.use(question("lost"), "lost")
    story.tell(question("restarting"), 503, "overloaded")
    story.use(question("restarting"), "restarting")
    story.tell(question("failed"), 503, "hsm-unavailable")
    story.use(question("failed"), "failed", Outcome.FAILED)
    story.tell(question("again", "again"), LOST)
    story.use(question("again", "again"), "first", Outcome.UNKNOWN)
    second = story.use(question("again", "again"), "second", retry_of="first")
    story.tell(question("again", "again"), 200, signed=second)
    story.tell(question("again", "again"), 200, signed=second)
    story.tell(question("another", "again"), 422, "idempotency-mismatch")
    story.tell(question("unsent"), UNSENT)
    story.tell(Question(STRANGER, "orders", Algorithm.ES256, b"stranger"), 404, "not-found")
    story.drafts.append(Draft(kind=RecordKind.DENIAL, trail=STRANGER, body={"code": "not-found"}))
    return story


def test_true_history_has_no_violation() -> None:
    assert true_story().violations() == []


def test_denials_that_came_together_may_be_one_record_with_a_count() -> None:
    story = true_story()
    story.tell(Question(STRANGER, "orders", Algorithm.ES256, b"more"), 404, "not-found")
    assert "denials told" in story.violations()[0]
    story.drafts[-1] = Draft(kind=RecordKind.DENIAL, trail=STRANGER, body={"code": "not-found", "count": 2})
    assert story.violations() == []


def _answer(story: Story, **changes: object) -> None:
    """Change what the first answer said."""
    signed = story.history[0].signed
    assert signed is not None
    story.history[0] = replace(story.history[0], signed=msgspec.structs.replace(signed, **changes))


def _signed_without_outcome(story: Story) -> None:
    del story.drafts[1]


def _second_use_of_a_lost_one(story: Story) -> None:
    story.use(question("lost"), "lost-again")


def _use_of_what_never_left(story: Story) -> None:
    story.use(question("unsent"), "unsent")


def _signed_after_a_refusal(story: Story) -> None:
    story.tell(question("timeout"), 504, "hsm-timeout")
    story.use(question("timeout"), "timeout")


def _intent_after_a_denial(story: Story) -> None:
    story.tell(question("invalid"), 422, "invalid")
    story.use(question("invalid"), "invalid", Outcome.FAILED)


def _two_answers_to_one_key(story: Story) -> None:
    third = story.use(question("again", "again"), "third", retry_of="second")
    story.tell(question("again", "again"), 200, signed=third)


def _unnamed_retry(story: Story) -> None:
    story.drafts = [replace_retry(draft) for draft in story.drafts]


def replace_retry(draft: Draft) -> Draft:
    return msgspec.structs.replace(draft, retry_of="")


def _two_questions_under_one_key(story: Story) -> None:
    story.tell(question("other", "again"), 200, signed=story.use(question("other", "again"), "other"))


def _record_before_its_request(story: Story) -> None:
    """The use of the question that was asked last stands before one that was answered earlier."""
    late = Question(WORKLOAD, "orders", Algorithm.ES256, b"late")
    signed = story.use(late, "late")
    story.tell(question("early"), 200, signed=story.use(question("early"), "early"))
    story.tell(late, 200, signed=signed)


def _unexpected_status(story: Story) -> None:
    story.tell(question("broken"), 500, "")


def _lost_record(story: Story) -> None:
    del story.drafts[0:2]


@pytest.mark.parametrize(
    ("cheat", "finding"),
    [
        (lambda story: _answer(story, signature=b"forged"), "does not verify"),
        (lambda story: _answer(story, records=UsePlaces("", 2, 3)), "not on record where the answer says"),
        (lambda story: _answer(story, records=UsePlaces("", 0, 999)), "not on record where the answer says"),
        (_signed_without_outcome, "has no outcome"),
        (_lost_record, "not on record"),
        (_second_use_of_a_lost_one, "used more than once"),
        (_use_of_what_never_left, "nobody asked for"),
        (_signed_after_a_refusal, "and yet signed"),
        (_intent_after_a_denial, "and yet intended"),
        (_two_answers_to_one_key, "different answers"),
        (_unnamed_retry, "does not name the one"),
        (_two_questions_under_one_key, "both were worked on"),
        (_record_before_its_request, "stands before"),
        (_unexpected_status, "status 500"),
    ],
)
def test_violation_is_found(cheat: Callable[[Story], None], finding: str) -> None:
    story = true_story()
    cheat(story)
    assert any(finding in each for each in story.violations()), story.violations()


def test_broken_chain_is_found() -> None:
    story = true_story()
    log = story.log()
    log[2], log[4] = log[4], log[2]
    spki = story.private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert any("record 2: wrong-index" in each for each in violations(story.history, log, {"orders": spki}))


def test_outcome_of_another_signature_is_found() -> None:
    story = true_story()
    story.drafts[1] = msgspec.structs.replace(story.drafts[1], signature_sha256="00" * 32)
    assert any("of another signature" in each for each in story.violations())
