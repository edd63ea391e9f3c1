"""A candidate against recorded decisions: what changes is exactly what the two engines answer differently."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from keybroker.audit import leaf as leaves
from keybroker.audit.leaf import canonical
from keybroker.authority.journal import Entry
from keybroker.authority.policy.grants import LimitRule, Rules
from keybroker.authority.trial import recorded, replay
from keybroker.authority.trial.candidate import Candidate, Places
from keybroker.authority.trial.recorded import Recorded
from keybroker.authority.trial.replay import Replay, Replayer
from keybroker.clock import to_rfc3339
from keybroker.errors import ConfigError
from keybroker.model.decision import Decision, PolicyInput, Verdict
from keybroker.model.key import Algorithm
from keybroker.model.record import EMPTY, Draft, RecordKind, SvidFacts
from tests.clocks import START_US, FixedClock
from tests.policies import decide, default_engine
from tests.random_policies import PolicyMaker, seen_from
from tests.unit.authority.store.logs import journal_on


def candidate_of(rules: Rules) -> Candidate:
    return Candidate(rules, default_engine(rules), Places(()))


def draft(asked: bytes, decision: Decision, address: str, count: int = 1) -> Draft:
    """The record of a decision, as the broker writes it."""
    is_allowed = decision.verdict is Verdict.ALLOW
    return Draft(
        kind=RecordKind.INTENT if is_allowed else RecordKind.DENIAL,
        trail=msgspec.json.decode(asked)["caller"]["spiffe_id"],
        request=msgspec.Raw(asked),
        svid=SvidFacts("", "", "", address) if address else None,
        decision=msgspec.Raw(decision.record),
        body={"request_id": "x"} if is_allowed else {"code": "denied", "request_id": "x", "count": count},
    )


def leaf_of(index: int, made: Draft, time_us: int = START_US) -> bytes:
    return leaves.encode(made, log="example.org/test", index=index, time=to_rfc3339(time_us + index * 1_000_000), salt="", trail=None)


def record_of(index: int, made: Draft) -> Recorded | None:
    return recorded.decoded(leaf_of(index, made))


def history(maker: PolicyMaker, old: Rules, new: Rules, count: int) -> list[tuple[PolicyInput, str, Draft]]:
    """Requests that the old rules have decided."""
    engine = default_engine(old)
    made = []
    for _ in range(count):
        request, address = maker.near(old, new), maker.address()
        asked = seen_from(request, old, address)
        made.append((request, address, draft(asked, decide(engine, asked), address)))
    return made


@pytest.mark.parametrize("seed", range(20))
def test_changes_are_those_between_the_engines(seed: int) -> None:
    maker = PolicyMaker(seed)
    old = maker.rules()
    new = maker.changed(old)
    before, after = default_engine(old), default_engine(new)
    made = history(maker, old, new, 60)
    expected: Counter[tuple[str, str, str]] = Counter()
    for request, address, _ in made:
        was, now = (decide(each, seen_from(request, rules, address)) for each, rules in ((before, old), (after, new)))
        if was.verdict is not now.verdict:
            target = request.target.id if request.target.kind == "key" else request.target.workload or "the whole record"
            expected[f"{was.verdict.value} to {now.verdict.value}", request.caller.spiffe_id, target] += 1
    done = Replayer(candidate_of(new)).take_all(record_of(index, each) for index, (_, _, each) in enumerate(made))
    got: Counter[tuple[str, str, str]] = Counter()
    for place, tally in done.changes.items():
        if not place.demand:
            got[place.change, place.workload, place.target] += tally.decisions
    assert got == expected
    assert (done.records, done.decisions, done.undecided) == (60, 60, 0)


def test_policy_that_decided_changes_nothing_and_some_other_does() -> None:
    changes = 0
    for seed in range(10):
        maker = PolicyMaker(seed)
        old = maker.rules()
        new = maker.changed(old)
        made = history(maker, old, new, 40)

        def over(rules: Rules, made: list[tuple[PolicyInput, str, Draft]] = made) -> Replay:
            return Replayer(candidate_of(rules)).take_all(record_of(index, each) for index, (_, _, each) in enumerate(made))

        assert over(old).changes == {}
        changes += len(over(new).changes)
    assert changes > 20


def signing(algorithm: str = "ES256", networks: tuple[str, ...] = ()) -> bytes:
    request = PolicyMaker(0).request()
    caller = msgspec.structs.replace(
        request.caller, spiffe_id="spiffe://example.org/a/b", trust_domain="example.org", path=("a", "b"), networks=networks
    )
    target = msgspec.structs.replace(request.target, kind="key", id="orders", workload="")
    return canonical(msgspec.structs.replace(request, caller=caller, operation="sign", target=target, algorithm=algorithm))


def only(maker: PolicyMaker, **fields: object) -> Rules:
    """One grant: a/* signs with orders, ES256."""
    grant = msgspec.structs.replace(
        maker.grant("g"), workloads=("spiffe://example.org/a/*",), operations=("sign",), keys=("orders",), algorithms=(Algorithm.ES256,),
        trails=(), networks=(), not_after=msgspec.UNSET, limits=(), hours=(), quorum=msgspec.UNSET, observe_only=False, **fields,
    )  # fmt: skip
    return Rules((grant,), (), maker.networks(), ())


def test_denials_that_are_only_counted_stand_for_all_of_them() -> None:
    maker = PolicyMaker(1)
    denied = decide(default_engine(Rules((), (), {}, ())), signing())
    done = Replayer(candidate_of(only(maker))).take_all([record_of(5, draft(signing(), denied, "192.0.2.1", count=900))])
    ((place, tally),) = done.changes.items()
    assert (place.change, tally.decisions, tally.records, tally.examples, tally.was) == ("deny to allow", 900, 1, [5], ("no-grant",))
    assert done.counted == 899
    assert any("899 denials" in note for note in done.notes())


def test_networks_are_looked_up_again_by_the_recorded_address() -> None:
    maker = PolicyMaker(1)
    rules = only(maker)
    inside = msgspec.structs.replace(rules.grants[0], networks=("office",))
    office = Rules((inside,), (), {"office": (ipaddress.ip_network("10.0.0.0/8"),)}, ())
    allowed = decide(default_engine(rules), signing())
    made = [draft(signing(), allowed, address) for address in ("10.1.2.3", "192.0.2.1", "")]
    done = Replayer(candidate_of(office)).take_all(record_of(index, each) for index, each in enumerate(made))
    ((place, tally),) = done.changes.items()
    assert (place.change, tally.examples, tally.now) == ("allow to deny", [1, 2], ("network-not-granted",))
    assert done.without_address == 1


def test_more_demands_are_changes_of_their_own() -> None:
    maker = PolicyMaker(1)
    rules = only(maker)
    grant = msgspec.structs.replace(rules.grants[0], limits=(LimitRule(max=5, window="1m", per="workload"),))
    limited = Rules((grant,), (), rules.networks, ())
    made = [record_of(0, draft(signing(), decide(default_engine(rules), signing()), "192.0.2.1"))]
    (place,) = Replayer(candidate_of(limited)).take_all(made).changes
    assert (place.change, place.demand) == ("tightened", "at most 5 uses in any 1m, for each workload (g)")
    made = [record_of(0, draft(signing(), decide(default_engine(limited), signing()), "192.0.2.1"))]
    (place,) = Replayer(candidate_of(rules)).take_all(made).changes
    assert (place.change, place.demand) == ("loosened", "at most 5 uses in any 1m, for each workload (g)")


def test_recorded_failure_of_the_policy_is_no_denial() -> None:
    failed = canonical({"allow": False, "engine": "x", "grants": (), "obligations": (), "policy": "p", "reasons": ("policy-error",)})
    nothing = Rules((), (), {}, ())
    made = msgspec.structs.replace(draft(signing(), decide(default_engine(nothing), signing()), ""), decision=msgspec.Raw(failed))
    done = Replayer(candidate_of(nothing)).take_all([record_of(0, made)])
    assert [place.change for place in done.changes] == ["failed to deny"]


def test_what_is_no_decision_is_left_out() -> None:
    asked, empty = signing(), Rules((), (), {}, ())
    decided = draft(asked, decide(default_engine(empty), asked), "192.0.2.1")
    others = [
        Draft(kind=RecordKind.OUTCOME),
        Draft(kind=RecordKind.START, body={"build": "1"}),
        msgspec.structs.replace(decided, kind=RecordKind.SECURITY, body={"event": "x", "detail": "y", "count": 1}),
        msgspec.structs.replace(decided, decision=EMPTY),
    ]
    records = [record_of(index, each) for index, each in enumerate(others)]
    done = Replayer(candidate_of(empty)).take_all([*records, recorded.decoded(b"{"), None])
    assert (done.records, done.decisions, done.unreadable) == (4, 0, 2)


def test_changes_beyond_the_bound_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_CHANGES", 2)
    maker = PolicyMaker(3)
    engine, rules = default_engine(Rules((), (), {}, ())), only(maker)
    grant = msgspec.structs.replace(rules.grants[0], workloads=("**",))
    made = []
    for number in range(6):
        asked = signing().replace(b"/a/b", b"/a/b%d" % number).replace(b'"b"', b'"b%d"' % number)
        made.append(record_of(number, draft(asked, decide(engine, asked), "192.0.2.1")))
    done = Replayer(candidate_of(Rules((grant,), (), {}, ()))).take_all(made)
    assert [(place.workload, tally.decisions) for place, tally in done.changes.items()] == [
        ("spiffe://example.org/a/b0", 1), ("spiffe://example.org/a/b1", 1), ("everything else", 4),
    ]  # fmt: skip


def test_records_of_a_store_and_of_its_export_are_the_same_and_can_begin_later(tmp_path: Path) -> None:
    maker = PolicyMaker(2)
    old = maker.rules()
    made = history(maker, old, old, 30)

    async def write() -> None:
        clock = FixedClock()
        async with journal_on(tmp_path / "state", clock) as (journal, _):
            for _, _, each in made:
                clock.time_us += 1_000_000
                await journal.write(Entry(each if each.kind is RecordKind.DENIAL else msgspec.structs.replace(each, kind=RecordKind.READ)))

    asyncio.run(write())
    seen: list[tuple[int, int]] = []
    stored = list(recorded.from_state(tmp_path / "state", None, lambda done, of: seen.append((done, of))))
    assert len(stored) == 30
    assert seen[-1] == (30, 30)
    export = tmp_path / "log.ndjson"
    with export.open("wb") as file:
        for index in range(30):
            file.write(recorded.leaf(tmp_path / "state", index) + b"\n")
    assert list(recorded.from_export(export, None, lambda _done, _of: None)) == stored
    later = START_US + 21_000_000
    assert [each and each.index for each in recorded.from_state(tmp_path / "state", later, lambda _done, _of: None)] == list(range(20, 30))
    assert [each and each.index for each in recorded.from_export(export, later, lambda _done, _of: None)] == list(range(20, 30))
    with pytest.raises(ConfigError, match="no record 30"):
        recorded.leaf(tmp_path / "state", 30)
    with pytest.raises(ConfigError, match="cannot be read"):
        list(recorded.from_export(tmp_path / "gone", None, lambda _done, _of: None))


def test_lines_of_an_export_that_are_no_records_are_counted(tmp_path: Path) -> None:
    export = tmp_path / "log.ndjson"
    export.write_text("not json\n" + json.dumps({"checkpoint": "x"}) + "\n")
    done = Replayer(candidate_of(Rules((), (), {}, ()))).take_all(recorded.from_export(export, None, lambda _done, _of: None))
    assert (done.unreadable, done.records) == (2, 0)
    assert any("2 lines are no records" in note for note in done.notes())
