"""A broker whose `release` key needs a quorum: real rules, real SVIDs, real approvals; only the token and the clock are fakes."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from keybroker.audit.approval import signed
from keybroker.authority.policy import holder
from keybroker.authority.policy.holder import PolicyHolder
from keybroker.authority.uses import Asker
from keybroker.clock import Clock, to_rfc3339
from keybroker.identity.bundle import TrustBundles
from keybroker.identity.deny_list import DenyList
from keybroker.identity.x509_svid import SvidValidator
from keybroker.model.approval import Statement
from keybroker.model.call import Approve, OperationReply, Pending, Redeem, ShowOperation, Sign, Signed
from keybroker.model.identity import Caller
from keybroker.model.key import Algorithm
from keybroker.model.request import SignBody
from tests.authorities import Authority, Issued, Shape
from tests.brokers import FakeBroker, fake_broker
from tests.clocks import START_US
from tests.policies import default_module

RELEASE = b"release 2.1.0"
DIGEST = hashlib.sha256(RELEASE).digest()
NOW = datetime.datetime.fromtimestamp(START_US / 1_000_000, datetime.UTC)
HOUR_US = 3600 * 1_000_000
IDENTITIES = {
    "ci": "spiffe://example.org/ci/release",
    "other-ci": "spiffe://example.org/ci/other",
    "alice": "spiffe://example.org/human/alice",
    "alice-laptop": "spiffe://example.org/laptop/alice",
    "bob": "spiffe://example.org/human/bob",
    "carol": "spiffe://example.org/human/carol",
    "dora": "spiffe://example.org/human/dora",
    "eve": "spiffe://example.org/human/eve",
}
PEOPLE = """\
people:
  alice: ["spiffe://example.org/human/alice", "spiffe://example.org/laptop/alice"]
  bob: ["spiffe://example.org/human/bob"]
  carol: ["spiffe://example.org/human/carol"]
  dora: ["spiffe://example.org/human/dora"]
groups:
  managers: [alice, bob, carol]
  legal: [dora]
"""
TWO_MANAGERS = "{approvals: 2, of: [managers], expires: 1h}"
LEGAL_THEN_TWO = "{stages: [{approvals: 1, of: [legal]}, {approvals: 2, of: [managers]}], expires: 1h}"

_numbers = itertools.count()


def grants(
    quorum: str = TWO_MANAGERS, *, workloads: str = '"spiffe://example.org/ci/release"', more: str = "", people: str = PEOPLE
) -> str:
    """A file of rules: `orders` (the one key there is) may be used with a quorum."""
    return f"""\
grants:
  - id: release
    workloads: [{workloads}]
    keys: [orders]
    operations: [sign, sign-digest]
    algorithms: [ES256]
    quorum: {quorum}
{more}{people}"""


@dataclass
class Quorums:
    """The broker, its rules, and everybody's SVIDs."""

    broker: FakeBroker
    directory: Path
    root: Authority
    svids: dict[str, Issued] = field(default_factory=dict)

    def issue(self, name: str, *, minutes: int = 600, key: ec.EllipticCurvePrivateKey | None = None) -> Issued:
        """A new SVID of somebody, in the place of the one before."""
        before, after = NOW - datetime.timedelta(minutes=5), NOW + datetime.timedelta(minutes=minutes)
        self.svids[name] = self.root.issue(Shape(uris=(IDENTITIES[name],), not_before=before, not_after=after), key)
        return self.svids[name]

    def asker(self, name: str) -> Asker:
        """Somebody asks, with a valid SVID."""
        chain = (self.svids.get(name) or self.issue(name)).chain
        svid = self.broker.validator.validate(chain)
        return Asker(Caller(svid, "127.0.0.1"), chain, f"01REQUEST{next(_numbers)}", "", ())

    async def ask(self, name: str = "ci", *, idempotency_key: str = "", **changes: Any) -> Pending | Signed:
        """Ask for the release to be signed."""
        given: dict[str, Any] = {"algorithm": Algorithm.ES256, "digest": DIGEST, "reason": "2.1.0"} | changes
        return await self.broker.service.sign(self.asker(name), Sign("orders", SignBody(**given), idempotency_key))

    async def begin(self, name: str = "ci", **changes: Any) -> str:
        """Ask, and be told to wait; the operation."""
        reply = await self.ask(name, **changes)
        assert isinstance(reply, Pending)
        return reply.operation

    async def show(self, operation: str, name: str = "ci") -> OperationReply:
        """What somebody is shown."""
        return await self.broker.operations.show(self.asker(name), ShowOperation(operation))

    def statement(self, operation: str, name: str, **changes: Any) -> Statement:
        """A good statement of somebody about an operation, with some members changed."""
        known = self.broker.quorum.find(operation)
        assert known is not None
        subject = known.operation.subject
        made = Statement(
            subject=subject,
            verdict="approve",
            approver=IDENTITIES[name],
            person=name.partition("-")[0],
            stage=known.operation.stages[0].name,
            confirmed="prompt",
            issued=to_rfc3339(self.broker.clock.now_us()),
            expires=subject.expires,
            nonce=secrets.token_hex(16),
            v=1,
        )
        about = {name.removeprefix("subject_"): value for name, value in changes.items() if name.startswith("subject_")}
        rest = {name: value for name, value in changes.items() if not name.startswith("subject_")}
        return msgspec.structs.replace(made, subject=msgspec.structs.replace(subject, **about), **rest)

    def envelope(self, operation: str, name: str, *, signer: str = "", **changes: Any) -> bytes:
        """The same, signed by its approver, or by somebody else."""
        self.asker(signer or name)
        key = self.svids[signer or name].key
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return signed(self.statement(operation, name, **changes), key)

    async def approve(self, operation: str, *names: str, stage: str = "release/1", **changes: Any) -> OperationReply:
        """Everybody named approves; what the last is shown."""
        replies = [await self.give(operation, name, self.envelope(operation, name, stage=stage, **changes)) for name in names]
        return replies[-1]

    async def give(self, operation: str, name: str, envelope: bytes) -> OperationReply:
        """Somebody hands in an envelope."""
        return await self.broker.operations.approve(self.asker(name), Approve(operation, envelope))

    async def redeem(self, operation: str, name: str = "ci", **changes: Any) -> Signed | Pending:
        """The requester wants it done."""
        asker = self.asker(name)
        known = await self.broker.operations.require_requester(asker, operation)
        return await self.broker.service.redeem(asker, known.operation, Redeem(operation, **changes))

    async def ready(self, **changes: Any) -> str:
        """An operation with a complete quorum."""
        operation = await self.begin(**changes)
        await self.approve(operation, "alice", "bob")
        return operation

    async def adopt(self, text: str) -> None:
        """Other rules, at once."""
        (self.directory / "rules.yaml").write_text(text)
        candidate = await self.broker.rules.refresh()  # type: ignore[attr-defined]  # the real holder
        assert candidate is not None
        self.broker.rules.adopt(candidate)  # type: ignore[attr-defined]
        self.broker.generation.advance()

    def deny(self, *entries: str) -> None:
        """Other entries on the deny list, at once."""
        deny_list = self.broker.validator._deny_list  # type: ignore[attr-defined]  # the real one
        deny_list._file.path.write_text("denied:\n" + "".join(f"  - {entry}\n" for entry in entries) if entries else "denied: []\n")
        deny_list._take(deny_list._file.read())
        self.broker.generation.advance()

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The records of one kind."""
        return [record for record in self.broker.records() if record["kind"] == kind]

    async def events(self) -> list[str]:
        """What the security events say."""
        await self.broker.security.flush()
        return [record["body"]["detail"] for record in self.of_kind("security") if record["body"]["event"] == "approval-void"]


def holder_of(directory: Path) -> PolicyHolder:
    """The rules in a directory, for the policy that is built in, which is compiled once for all tests."""
    known = frozenset({"orders"})
    return PolicyHolder(directory, default_module(), known, holder._build(directory, default_module(), known, holder._signature(directory)))


@contextlib.asynccontextmanager
async def quorum_world(directory: Path, text: str = "", before: Quorums | None = None) -> AsyncIterator[Quorums]:
    """A broker with these rules, on a fresh directory; or on the one where another has run before."""
    root = (
        before.root
        if before
        else Authority(
            shape=Shape(
                uris=(),
                ca=True,
                usage=frozenset({"key_cert_sign"}),
                extended=None,
                not_before=NOW - datetime.timedelta(days=9),
                not_after=NOW + datetime.timedelta(days=90),
            )
        )
    )
    rules, state = directory / "rules", directory / "state"
    for each in (rules, state):
        each.mkdir(exist_ok=True)
    (rules / "rules.yaml").write_text(text or grants())
    (directory / "bundle.pem").write_bytes(root.pem)
    (directory / "denied.yaml").write_text("denied: []\n")
    real_rules = holder_of(rules)
    bundles = TrustBundles.load({"example.org": directory / "bundle.pem"})
    deny_list = DenyList.load(directory / "denied.yaml")

    def validator(clock: Clock) -> SvidValidator:
        return SvidValidator(bundles, deny_list, clock)

    tokens = before.broker.tokens if before else None
    async with fake_broker(state, real_rules=real_rules, real_validator=validator, tokens=tokens) as broker:
        yield Quorums(broker, rules, root, before.svids if before else {})
