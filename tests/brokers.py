"""An authority in memory, but for its store: fakes that allow, deny and fail, so that a test can break one step at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keybroker.audit.chain import ChainFault, check
from keybroker.audit.leaf import canonical, decode
from keybroker.authority.acts import Acts
from keybroker.authority.approvals import ApprovalJudge
from keybroker.authority.breakers import Breakers
from keybroker.authority.denials import Denials
from keybroker.authority.freezes import Freezes
from keybroker.authority.generation import Generation
from keybroker.authority.glass import Glass
from keybroker.authority.journal import Journal
from keybroker.authority.keyring import Keyring
from keybroker.authority.metrics import AuthorityMetrics
from keybroker.authority.operation_desk import OperationDesk
from keybroker.authority.others import Others
from keybroker.authority.quorum import Quorum
from keybroker.authority.reads import Reads
from keybroker.authority.responders import Responders
from keybroker.authority.security_events import SecurityEvents
from keybroker.authority.selfcheck import SelfCheck
from keybroker.authority.service import KeyUseService
from keybroker.authority.store.faults import StoreBrokenError
from keybroker.authority.store.reader import Reader
from keybroker.authority.store.sqlite import Pin, SqliteStore
from keybroker.authority.timekeeper import Timekeeper
from keybroker.authority.tokens import TokenSignature
from keybroker.authority.uses import Asker
from keybroker.config import AuthorityConfig, KeyConfig, KeyVersionConfig, TelemetryConfig, TokenLink
from keybroker.errors import HsmUnavailableError, SvidInvalidError
from keybroker.model.decision import Decision, Obligation, Verdict, no_obligation
from keybroker.model.identity import Caller, SpiffeId, Svid
from keybroker.model.key import Algorithm
from keybroker.model.record import TokenFacts
from keybroker.tracing import Tracer
from tests.clocks import START_US, FixedClock

LOG = "example.org/test"


class FakeEngine:
    """Answers what it is told to, and counts."""

    digest = "fake"

    def __init__(self) -> None:
        self.verdict = Verdict.ALLOW
        self.reasons: tuple[str, ...] = ()
        self.obligations: tuple[Obligation, ...] = ()
        self.asked: list[bytes] = []
        self.on_decide: Any = lambda: None

    async def decide(self, request: bytes) -> Decision:
        self.asked.append(request)
        self.on_decide()
        grants = ("g",) if self.verdict is Verdict.ALLOW else ()
        obligations = self.obligations or tuple(no_obligation(grant) for grant in grants)
        record = canonical({"allow": self.verdict is Verdict.ALLOW, "grants": grants, "reasons": self.reasons, "policy": self.digest})
        return Decision(self.verdict, self.reasons, grants, obligations, self.digest, "fake", record)


class FakeRules:
    """Rules with one engine and no networks."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.networks = ("loopback",)

    def networks_of(self, address: str) -> tuple[str, ...]:
        return self.networks if address == "127.0.0.1" else ()

    def person_of(self, spiffe_id: str) -> str:
        del spiffe_id
        return ""

    def people_of(self, groups: tuple[str, ...]) -> tuple[str, ...]:
        del groups
        return ()


class FakeValidator:
    """Takes any chain, until told to refuse."""

    def __init__(self, svid: Svid) -> None:
        self.svid = svid
        self.refuses = False

    def validate(self, chain: tuple[bytes, ...], as_of_us: int | None = None) -> Svid:
        del as_of_us
        if self.refuses or not chain:
            raise SvidInvalidError("refused", reasons=("denied",))
        return self.svid


class FakeTokens:
    """A token in software: signs, unless told to fail, lie or wait."""

    def __init__(self) -> None:
        self.private = ec.generate_private_key(ec.SECP256R1())
        self.spki = self.private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.fault: Exception | None = None
        self.lies = False
        self.signed = 0
        self.distrusted: list[str] = []
        self.available = True
        self.on_sign: Any = None

    def is_available(self, token: str, ref: str) -> bool:
        del token, ref
        return self.available

    async def wait(self, token: str, ref: str) -> None:
        del token, ref
        raise HsmUnavailableError("none", retry_after=1)

    def distrust(self, worker: str) -> None:
        self.distrusted.append(worker)

    async def sign(self, token: str, ref: str, algorithm: Algorithm, data: bytes) -> TokenSignature:
        del token, ref, algorithm
        if not self.available:
            raise HsmUnavailableError("none", retry_after=1)
        if self.on_sign is not None:
            await self.on_sign()
        if self.fault is not None:
            raise self.fault
        self.signed += 1
        digest = bytes(32) if self.lies else data
        r, s = utils.decode_dss_signature(self.private.sign(digest, ec.ECDSA(utils.Prehashed(hashes.SHA256()))))
        return TokenSignature(r.to_bytes(32) + s.to_bytes(32), TokenFacts("01", "fake"), "fake-0", 1)


@dataclass(slots=True)
class FakeBroker:
    """The authority's parts, wired to fakes."""

    state: Path
    clock: FixedClock
    generation: Generation
    rules: FakeRules
    validator: FakeValidator
    tokens: FakeTokens
    store: SqliteStore
    journal: Journal
    keyring: Keyring
    service: KeyUseService
    reads: Reads
    security: SecurityEvents
    denials: Denials
    timekeeper: Timekeeper
    metrics: AuthorityMetrics
    asker: Asker
    quorum: Quorum
    operations: OperationDesk
    freezes: Freezes
    acts: Acts
    responders: Responders
    others: Others
    glass: Glass
    breakers: Breakers
    broken: list[StoreBrokenError] = field(default_factory=list)

    def leaves(self) -> list[bytes]:
        return read_leaves(self.state)

    def records(self) -> list[dict[str, Any]]:
        return [decode(leaf) for leaf in self.leaves()]

    def kinds(self) -> list[str]:
        return [record["outcome"] or record["kind"] for record in self.records()]

    def faults(self) -> list[ChainFault]:
        return check(self.leaves())


def read_leaves(state: Path) -> list[bytes]:
    reader = Reader(state)
    try:
        return reader.leaves()
    finally:
        reader.close()


def svid_of(text: str = "spiffe://example.org/payments/api") -> Svid:
    return Svid(SpiffeId.parse(text), "ab" * 32, "01", 0, 4_000_000_000)


def asker_of(svid: Svid) -> Asker:
    return Asker(Caller(svid, "127.0.0.1"), (b"chain",), "01REQUEST", "", ("loopback",))


def authority_config(state: Path) -> AuthorityConfig:
    return AuthorityConfig(
        socket=state / "authority.sock",
        state=state,
        log=LOG,
        bundles={},
        grants=state,
        tokens={"fake": TokenLink(sockets=(state / "hsm.sock",))},
        keys={"orders": KeyConfig(token="fake", versions=(KeyVersionConfig(version=1, object="orders"),))},
    )


@contextlib.asynccontextmanager
async def fake_broker(
    state: Path,
    clock: FixedClock | None = None,
    *,
    real_rules: Any = None,
    real_validator: Any = None,
    tokens: FakeTokens | None = None,
) -> AsyncIterator[FakeBroker]:
    """A broker on a fresh or existing state directory; closed when the block is left.

    Args:
        real_rules: in the place of fake ones.
        real_validator: in the place of the fake one, made for a clock.
        tokens: of a broker that ran on this directory before.
    """
    clock = clock or FixedClock()
    generation, tokens = Generation(), tokens or FakeTokens()
    rules = real_rules or FakeRules()
    store = SqliteStore.open(state)
    broken: list[StoreBrokenError] = []
    timekeeper = Timekeeper(clock, store.clock(), store.tail().time_us, 86_400)
    metrics = AuthorityMetrics(["orders"])
    journal = Journal(store, LOG, generation, timekeeper, broken.append, metrics.observed)
    config = authority_config(state)
    keyring = Keyring(config, [Pin("orders", 1, "ec-p256", tokens.spki, START_US)], journal, clock)
    security = SecurityEvents(journal, metrics)
    denials = Denials(journal, metrics)
    svid = svid_of()
    validator: Any = real_validator(clock) if real_validator else FakeValidator(svid)
    selfcheck, reader = SelfCheck(), Reader(state)
    judge = ApprovalJudge(validator, rules)
    quorum = Quorum(judge=judge, people=rules, journal=journal, reader=reader, security=security, timekeeper=timekeeper)
    operations = OperationDesk(
        rules=rules,
        people=rules,
        chains=validator,
        judge=judge,
        quorum=quorum,
        keyring=keyring,
        journal=journal,
        denials=denials,
        generation=generation,
        timekeeper=timekeeper,
    )
    reads = Reads(
        rules=rules,
        keyring=keyring,
        journal=journal,
        denials=denials,
        reader=Reader(state),
        timekeeper=timekeeper,
        metrics=metrics,
    )
    freezes = Freezes(store.freezes())
    glass = Glass(store.glass(), timekeeper)
    acts = Acts(rules, denials, freezes, timekeeper)
    others = Others(quorum, journal, generation)
    breakers = Breakers(
        acts=acts,
        glass=glass,
        people=rules,
        journal=journal,
        generation=generation,
        security=security,
        metrics=metrics,
        timekeeper=timekeeper,
        max_s=3_600,
    )
    responders = Responders(
        acts=acts,
        others=others,
        freezes=freezes,
        keyring=keyring,
        tokens=frozenset(config.tokens),
        journal=journal,
        generation=generation,
        metrics=metrics,
        clock=clock,
    )
    service = KeyUseService(
        validator=validator,
        rules=rules,
        keyring=keyring,
        freezes=freezes,
        glass=glass,
        tokens=tokens,
        selfcheck=selfcheck,
        journal=journal,
        denials=denials,
        reader=reader,
        timekeeper=timekeeper,
        generation=generation,
        security=security,
        metrics=metrics,
        tracer=Tracer("authority", TelemetryConfig()),
        quorum=quorum,
    )
    try:
        yield FakeBroker(
            state,
            clock,
            generation,
            rules,
            validator,
            tokens,
            store,
            journal,
            keyring,
            service,
            reads,
            security,
            denials,
            timekeeper,
            metrics,
            asker_of(svid),
            quorum,
            operations,
            freezes,
            acts,
            responders,
            others,
            glass,
            breakers,
            broken,
        )
    finally:
        await asyncio.sleep(0)
        selfcheck.close()
        reads.close()
        reader.close()
        journal.close()
