"""Changes of the rules as operations: what one person may do alone, what nobody may, and what is on record. With the real policy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from keybroker.authority import policy_start
from keybroker.authority.acts import Acts
from keybroker.authority.policy.holder import PolicyHolder
from keybroker.authority.policy.stored import StoredPolicy
from keybroker.authority.policy_changes import PolicyChanges
from keybroker.authority.timekeeper import Timekeeper
from keybroker.config import AuthorityConfig
from keybroker.errors import (
    ConfigError,
    DeniedError,
    FrozenError,
    InvalidError,
    RefusalError,
    ReplayedError,
    StaleBaseError,
)
from keybroker.model.call import PolicyChanged, ProposePolicy
from keybroker.model.decision import Verdict
from keybroker.model.freeze import Freeze
from tests.brokers import FakeBroker, asker_of, authority_config, fake_broker, svid_of
from tests.policies import request

ALICE = asker_of(svid_of("spiffe://example.org/human/alice"))
EVE = asker_of(svid_of("spiffe://example.org/human/eve"))
RULES = """\
grants:
  - {id: payments, workloads: ["spiffe://example.org/payments/*"], keys: [orders], operations: [sign], algorithms: [ES256, ES384]}
  - {id: alone, workloads: ["spiffe://example.org/human/alice"], operations: [admin-policy]}
  - {id: together, workloads: ["spiffe://example.org/human/bob"], operations: [admin-policy],
     quorum: {approvals: 1, of: [admins], expires: 1h}}
people: {alice: ["spiffe://example.org/human/alice"], bob: ["spiffe://example.org/human/bob"]}
groups: {admins: [alice, bob]}
"""
NARROWER = RULES.replace("[ES256, ES384]", "[ES256]")
WIDER = RULES.replace("payments/*", "**")


@dataclass
class Changing:
    """A broker whose rules are in its store."""

    broker: FakeBroker
    policy: StoredPolicy
    changes: PolicyChanges

    async def propose(self, text: str, asker: Any = ALICE, base: str = "", **names: str) -> PolicyChanged:
        base = base or (await self.changes.show(ALICE)).base
        reply = await self.changes.propose(asker, ProposePolicy(base, {"a.yaml": text, **names}, "less is more"))
        assert isinstance(reply, PolicyChanged)
        return reply

    async def verdict(self, algorithm: str = "ES384") -> Verdict:
        return (await self.policy.engine.decide(request(algorithm=algorithm))).verdict

    def changed(self) -> list[dict[str, Any]]:
        return [each for each in self.broker.records() if each["kind"] == "admin"]


def config_of(directory: Path) -> AuthorityConfig:
    made = authority_config(directory / "state")
    grants = directory / "grants"
    if not grants.exists():
        grants.mkdir()
        (grants / "a.yaml").write_text(RULES)
    return AuthorityConfig(
        **({name: getattr(made, name) for name in made.__struct_fields__} | {"grants": grants, "policy_changes": "operations"})
    )


@asynccontextmanager
async def changing(directory: Path) -> AsyncIterator[Changing]:
    (directory / "state").mkdir(exist_ok=True)
    async with fake_broker(directory / "state") as broker:
        rules = await policy_start.start(config_of(directory), broker.store, broker.clock)
        await rules.record(broker.journal)
        assert rules.stored is not None
        assert rules.version is not None
        changes = PolicyChanges(
            acts=Acts(rules.stored, broker.denials, broker.freezes, Timekeeper(broker.clock, None, 0, 3_600)),
            others=broker.others,
            policy=rules.stored,
            live=rules.version,
            made=broker.store.policy_changes(),
            journal=broker.journal,
            generation=broker.generation,
            security=broker.security,
            clock=broker.clock,
        )
        yield Changing(broker, rules.stored, changes)
        await broker.security.flush()
        assert broker.faults() == []


def with_rules(tmp_path: Path, *tests: Callable[[Changing], Awaitable[None]]) -> None:
    """Each test on a broker that was started anew."""

    async def main() -> None:
        for test in tests:
            async with changing(tmp_path) as made:
                await test(made)

    asyncio.run(main())


async def security_events(made: Changing) -> list[str]:
    await made.broker.security.flush()
    return [each["body"]["event"] for each in made.broker.records() if each["kind"] == "security"]


def test_first_rules_are_those_of_the_directory_and_on_record(tmp_path: Path) -> None:
    async def test(made: Changing) -> None:
        (record,) = made.changed()
        assert record["body"] == {"change": "policy", "from": "", "to": made.policy.engine.digest, "revision": "1"}
        shown = await made.changes.show(ALICE)
        assert (shown.revision, shown.files) == (1, {"a.yaml": RULES})
        assert await made.verdict() is Verdict.ALLOW

    with_rules(tmp_path, test)


def test_files_on_disk_change_nothing_after_that(tmp_path: Path) -> None:
    async def before(made: Changing) -> None:
        assert await made.verdict() is Verdict.ALLOW
        (tmp_path / "grants" / "a.yaml").write_text(NARROWER)
        assert await made.policy.refresh() is None

    async def after(made: Changing) -> None:
        assert await made.verdict() is Verdict.ALLOW
        assert len(made.changed()) == 1

    with_rules(tmp_path, before, after)


def test_narrowing_takes_one_and_is_on_record_before_it_decides_and_survives_a_restart(tmp_path: Path) -> None:
    async def before(made: Changing) -> None:
        old, generation = made.policy.engine.digest, made.broker.generation.number
        reply = await made.propose(NARROWER)
        assert reply.revision == 2
        assert await made.verdict() is Verdict.DENY
        assert made.broker.generation.number > generation
        record = made.changed()[-1]
        assert record["body"] | {"request_id": ""} == {
            "change": "policy", "from": old, "to": made.policy.engine.digest, "revision": "2", "request_id": "",
        }  # fmt: skip
        assert record["trail"]["id"] == ALICE.caller.id.text
        assert record["request"]["reason"] == "less is more"
        assert record["decision"]["policy"] == old

    async def after(made: Changing) -> None:
        assert await made.verdict() is Verdict.DENY
        assert (await made.changes.show(ALICE)).revision == 2

    with_rules(tmp_path, before, after)


@pytest.mark.case(72)
def test_sole_admin_widens_nothing(tmp_path: Path) -> None:
    async def test(made: Changing) -> None:
        digest = made.policy.engine.digest
        people = 'people: {eve: ["spiffe://example.org/human/eve"], '
        for text in (
            WIDER,
            RULES.replace("expires: 1h", "expires: 2h"),
            RULES.replace("admins: [alice, bob]", "admins: [alice, bob, eve]").replace("people: {", people),
            RULES.replace("people: {", people),
            RULES.replace("id: alone", "id: alone-2"),
        ):
            with pytest.raises(DeniedError) as refused:
                await made.propose(text)
            assert refused.value.reasons[0] == "widens"
        assert made.policy.engine.digest == digest
        assert len(made.changed()) == 1
        assert "policy-widening" in await security_events(made)

    with_rules(tmp_path, test)


@pytest.mark.case(73)
def test_proposal_for_older_rules_and_one_that_was_made_before_are_refused(tmp_path: Path) -> None:
    first: list[str] = []

    async def before(made: Changing) -> None:
        first.append((await made.changes.show(ALICE)).base)
        await made.propose(NARROWER, base=first[0])
        with pytest.raises(ReplayedError):
            await made.propose(NARROWER, base=first[0])
        with pytest.raises(StaleBaseError):
            await made.propose(NARROWER + "# other\n", base=first[0])
        assert {"policy-replayed", "policy-stale-base"} <= set(await security_events(made))

    async def after(made: Changing) -> None:
        with pytest.raises(ReplayedError):
            await made.propose(NARROWER, base=first[0])
        with pytest.raises(StaleBaseError):
            await made.propose(NARROWER, base="0" * 64)
        assert len(made.changed()) == 2

    with_rules(tmp_path, before, after)


def test_two_proposals_for_the_same_rules_take_effect_once(tmp_path: Path) -> None:
    async def test(made: Changing) -> None:
        base = (await made.changes.show(ALICE)).base
        texts = [NARROWER + f"# {number}\n" for number in range(20)]
        results = await asyncio.gather(*(made.propose(text, base=base) for text in texts), return_exceptions=True)
        assert [type(each) for each in results if isinstance(each, Exception)] == [StaleBaseError] * 19
        assert len(made.changed()) == 2

    with_rules(tmp_path, test)


def test_stranger_and_frozen_admin_see_and_change_nothing(tmp_path: Path) -> None:
    async def test(made: Changing) -> None:
        base = (await made.changes.show(ALICE)).base
        with pytest.raises(DeniedError):
            await made.changes.show(EVE)
        with pytest.raises(DeniedError):
            await made.propose(NARROWER, asker=EVE, base=base)
        made.broker.freezes.add(Freeze("01FREEZE", "workload", ALICE.caller.id.text, "incident 7", "", ""))
        with pytest.raises(FrozenError):
            await made.propose(NARROWER, base=base)
        assert [each for each in made.broker.kinds() if each == "denial"] == ["denial"] * 3
        assert await made.verdict() is Verdict.ALLOW

    with_rules(tmp_path, test)


@pytest.mark.parametrize(
    ("text", "pointer", "fault"),
    [
        ("grants: [", "/files", "a.yaml"),
        ("grants: [{id: a}]", "/files", "a.yaml:1: grants[0]: object missing required field `workloads`"),
        (
            RULES.replace(",\n     quorum: {approvals: 1, of: [admins], expires: 1h}", ""),
            "/files",
            "keep at least one grant of `admin-policy`",
        ),
        ("grants: []\n", "/files", "keep at least one grant of `admin-policy`"),
    ],
)
def test_rules_that_cannot_be_used_are_refused_with_file_and_line(tmp_path: Path, text: str, pointer: str, fault: str) -> None:
    async def test(made: Changing) -> None:
        with pytest.raises(InvalidError) as refused:
            await made.propose(text)
        where, what = refused.value.pointers[0]
        assert where == pointer
        assert what.startswith(fault)
        assert str(tmp_path) not in what
        assert made.broker.kinds()[-1] == "denial"

    with_rules(tmp_path, test)


@pytest.mark.parametrize(
    "ask",
    [
        ProposePolicy("x", {"a.yaml": RULES}, "r"),
        ProposePolicy("0" * 64, {}, "r"),
        ProposePolicy("0" * 64, {"../a.yaml": RULES}, "r"),
        ProposePolicy("0" * 64, {"a.yml": RULES}, "r"),
        ProposePolicy("0" * 64, {"a.yaml": RULES}, " "),
        ProposePolicy("0" * 64, {"a.yaml": "#" * (2 * 1024 * 1024 + 1)}, "r"),
        ProposePolicy("0" * 64, {f"{number}.yaml": "" for number in range(201)}, "r"),
    ],
)
def test_proposal_that_cannot_be_one_is_refused(tmp_path: Path, ask: ProposePolicy) -> None:
    async def test(made: Changing) -> None:
        with pytest.raises(InvalidError):
            await made.changes.propose(ALICE, ask)

    with_rules(tmp_path, test)


def test_rules_that_nobody_could_ever_widen_are_no_first_rules(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    (tmp_path / "grants" / "a.yaml").write_text("grants: []\n")

    async def main() -> None:
        (tmp_path / "state").mkdir()
        async with fake_broker(tmp_path / "state") as broker:
            with pytest.raises(ConfigError, match="nobody could ever widen"):
                await policy_start.start(config, broker.store, broker.clock)

    asyncio.run(main())


def test_broker_that_goes_back_to_files_says_so_and_begins_anew_from_the_directory_later(tmp_path: Path) -> None:
    async def first(made: Changing) -> None:
        await made.propose(NARROWER)

    async def third(made: Changing) -> None:
        assert (await made.changes.show(ALICE)).revision == 4
        assert await made.verdict() is Verdict.ALLOW  # what the directory says
        assert [each["body"].get("revision") for each in made.changed()] == ["1", "2", "3", "4"]
        with pytest.raises(StaleBaseError):
            await made.propose(NARROWER + "# x\n", base="0" * 64)

    with_rules(tmp_path, first)

    async def files() -> None:
        config = config_of(tmp_path)
        config = msgspec.structs.replace(config, policy_changes="files")
        async with fake_broker(tmp_path / "state") as broker:
            for is_new in (True, False):  # twice the same
                rules = await policy_start.start(config, broker.store, broker.clock)
                assert isinstance(rules.live, PolicyHolder)
                assert (rules.stored, rules.is_new) == (None, is_new)
                await rules.record(broker.journal)

    asyncio.run(files())
    with_rules(tmp_path, third)


def test_refusals_of_proposals_are_on_record_with_their_code(tmp_path: Path) -> None:
    async def test(made: Changing) -> None:
        codes: list[str] = []
        for error, text, base in ((DeniedError, WIDER, ""), (StaleBaseError, NARROWER, "0" * 64), (InvalidError, "x: [", "")):
            with pytest.raises(RefusalError) as refused:
                await made.propose(text, base=base)
            assert type(refused.value) is error
            codes.append(refused.value.code)
        denials = [each for each in made.broker.records() if each["kind"] == "denial"]
        assert [each["body"]["code"] for each in denials] == codes
        assert all(each["request"]["content"]["type"] == "policy-change" for each in denials)

    with_rules(tmp_path, test)


def test_identity_that_is_another_network_is_asked_about_as_it_is(tmp_path: Path) -> None:
    async def test(made: Changing) -> None:
        elsewhere = replace(ALICE, networks=("lab",))
        assert (await made.changes.show(elsewhere)).revision == 1
        assert made.broker.records()[-1]["request"]["caller"]["networks"] == ["lab"]

    with_rules(tmp_path, test)
