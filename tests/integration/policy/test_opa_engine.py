"""The engine that asks a real OPA server, which takes the signed bundle that the broker has."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from keybroker.authority.policy.bundle_holder import BundleHolder
from keybroker.authority.policy.bundle_maker import OwnPolicy
from keybroker.authority.policy.opa_engine import OpaEngine
from keybroker.config import OpaConfig, PolicyConfig
from keybroker.model.decision import Decision, Verdict
from tests.opa import OpaProcess, Publisher, opa_process
from tests.policies import GOOD, KEYS, compile_rego, edited, request

OTHER = edited("[orders]", "[invoices]")
PATIENT_MS = 5_000
SLACK = 15.0  # seconds that a busy machine may take on top

NO = '{"allow": false, "reasons": ["no-grant"], "grants": [], "policy": rules.policy, "obligations": []}'
YES = '{"allow": true, "reasons": [], "grants": ["g"], "policy": rules.policy, "obligations": []}'
REGO = f"""\
package keybroker

import data.keybroker_rules as rules

decision := {NO} if input.reason == ""

decision := {YES} if input.reason == "allow"

decision := null if input.reason == "null"

decision := "true" if input.reason == "text"

decision := true if input.reason == "true"

decision := 1 if input.reason == "1"

decision := {YES.replace("true", '"true"')} if input.reason == "allow is text"

decision := {YES.replace("rules.policy", '"0000"')} if input.reason == "another policy"

decision := 1 if input.reason == "contradiction"

decision := 2 if input.reason == "contradiction"

decision := {YES.replace('["g"]', "[to_number(input.operation)]")} if input.reason == "built-in error"

many := numbers.range(1, 20000)

decision := {YES} if {{
	input.reason == "slow"
	some a in many
	some b in many
	a + b == -1
}}

decision := {YES.replace("[]", '[text | some _ in numbers.range(1, 1000000); text := "0123456789"]', 1)} if input.reason == "10 MB"
"""


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Publisher]:
    made = Publisher(tmp_path_factory.mktemp("opa") / "p", scope="production")
    with made.serving():
        made.publish(GOOD)
        yield made


@pytest.fixture(scope="module")
def opa(publisher: Publisher) -> Iterator[OpaProcess]:
    """One server for all tests here; a test that changes or stops it leaves it as it was."""
    with opa_process(publisher) as made:
        yield made


@asynccontextmanager
async def holding(publisher: Publisher, opa: OpaProcess, deadline_ms: int = PATIENT_MS) -> AsyncIterator[BundleHolder]:
    """A broker's rules, once OPA has them."""
    config = PolicyConfig(
        engine="opa", bundle=publisher.config(by_url=True), opa=OpaConfig(url=opa.url, deadline_ms=deadline_ms)
    )  # fmt: skip
    made = await BundleHolder.load(config, publisher.state, KEYS)
    try:
        await until(lambda: served(made))
        yield made
    finally:
        await made.close()


async def served(made: BundleHolder) -> bool:
    return await made.trouble() == ""


async def until(holds: Callable[[], Awaitable[bool]], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not await holds():
        assert time.monotonic() < end, "it did not come true in time"
        await asyncio.sleep(0.05)


async def take_up(made: BundleHolder) -> None:
    """Adopt the next rules, as the watch does."""

    async def is_taken_up() -> bool:
        candidate = await made.refresh()
        if candidate is not None:
            made.adopt(candidate)
        return candidate is not None

    await until(is_taken_up)


def failed(decision: Decision, code: str) -> bool:
    return (decision.verdict, decision.reasons, decision.grants) == (Verdict.FAILED, (code,), ())


def test_decisions_of_opa_are_those_of_the_rules_and_name_engine_and_policy(publisher: Publisher, opa: OpaProcess) -> None:
    async def run() -> None:
        async with holding(publisher, opa) as made:
            allow, deny = await made.engine.decide(request()), await made.engine.decide(request(key="release"))
            assert (allow.verdict, allow.grants) == (Verdict.ALLOW, ("payments",))
            assert (deny.verdict, deny.reasons) == (Verdict.DENY, ("no-grant",))
            assert {allow.policy, deny.policy} == {made.engine.digest}
            assert allow.engine == json.loads(allow.record)["engine"] == "opa/1.22.2"

    asyncio.run(run())


ELSEWHERE = (
    *(("GET", path) for path in ("/v1/data", "/v1/config", "/v1/policies", "/v1/status", "/metrics", "/v1/data/keybroker/decision")),
    *(("POST", path) for path in ("/", "/v1/query", "/v1/compile", "/v1/data/keybroker", "/v0/data/keybroker/decision")),
    *(("PUT", path) for path in ("/v1/data/x", "/v1/policies/x", "/v1/data/keybroker/decision")),
    ("POST", "/v1/data/keybroker/decision/allow"),
    ("PATCH", "/v1/data/keybroker_rules"),
    ("DELETE", "/v1/policies/x"),
)


def test_opa_as_deployed_lets_nobody_write_or_look_around(publisher: Publisher, opa: OpaProcess) -> None:
    del publisher
    for method, path in ELSEWHERE:
        assert opa.ask(method, path, b"{}")[0] == 401, (method, path)
    assert opa.ask("POST", "/v1/data/keybroker/decision", b'{"input": {}}')[0] == 200


@pytest.mark.case(22)
def test_killed_opa_is_unavailable_and_decides_again_when_it_is_back(publisher: Publisher, opa: OpaProcess) -> None:
    async def run() -> None:
        async with holding(publisher, opa) as made:
            assert (await made.engine.decide(request())).verdict is Verdict.ALLOW
            opa.kill()
            for _ in range(3):
                assert failed(await made.engine.decide(request()), "policy-unavailable")
            await asyncio.to_thread(opa.start)
            await until(lambda: served(made))
            assert (await made.engine.decide(request())).verdict is Verdict.ALLOW

    asyncio.run(run())


@pytest.mark.case(22)
def test_hanging_opa_is_unavailable_within_the_deadline_for_all_who_ask(publisher: Publisher, opa: OpaProcess) -> None:
    async def run() -> None:
        async with holding(publisher, opa, 400) as made:
            opa.signal(signal.SIGSTOP)
            try:
                started = time.monotonic()
                decisions = await asyncio.gather(*(made.engine.decide(request(reason=f"{number}")) for number in range(200)))
                assert time.monotonic() - started < 0.4 + SLACK
            finally:
                opa.signal(signal.SIGCONT)
            assert all(failed(each, "policy-unavailable") for each in decisions)
            await until(lambda: served(made))

            async def allows() -> bool:
                return (await made.engine.decide(request())).verdict is Verdict.ALLOW

            await until(allows)

    asyncio.run(run())


def test_opa_with_another_bundle_than_the_broker_decides_nothing(publisher: Publisher, opa: OpaProcess, tmp_path: Path) -> None:
    other = Publisher(tmp_path / "other", scope="production", revision=publisher.revision - 1)
    other.publish(GOOD)  # the same rules and revision, from somebody else; and then others
    with other.serving():

        async def run() -> None:
            config = PolicyConfig(engine="opa", bundle=other.config(), opa=OpaConfig(url=opa.url, deadline_ms=1_500))
            made = await BundleHolder.load(config, other.state, KEYS)
            assert await made.trouble() == ""
            await made.close()
            other.publish(OTHER)
            made = await BundleHolder.load(config, other.state, KEYS)
            assert await made.trouble() == f'OPA does not serve revision {other.revision} of the bundle yet; it has "{publisher.revision}"'
            assert failed(await made.engine.decide(request(key="invoices")), "policy-error")
            assert failed(await made.engine.decide(request()), "policy-error")
            await made.close()

        asyncio.run(run())


@pytest.mark.case(25)
@pytest.mark.case(26)
def test_new_bundle_is_taken_up_once_opa_has_it_and_no_request_is_lost_or_decided_by_a_mix(publisher: Publisher, opa: OpaProcess) -> None:
    decisions: list[Decision] = []

    async def worker(made: BundleHolder, stop: asyncio.Event) -> None:
        while not stop.is_set():
            decisions.append(await made.engine.decide(request()))
            await asyncio.sleep(0.05)

    async def run() -> None:
        async with holding(publisher, opa) as made:
            grants_of = {made.engine.digest: ("payments",)}
            stop = asyncio.Event()
            workers = [asyncio.ensure_future(worker(made, stop)) for _ in range(8)]
            for swap in ("one", "two"):
                publisher.publish(GOOD.replace("id: payments", f"id: {swap}"))
                await take_up(made)
                grants_of[made.engine.digest] = (swap,)
                await asyncio.sleep(0.2)
            publisher.put(b"garbage")
            for _ in range(20):
                assert await made.refresh() is None
                await asyncio.sleep(0.05)
            assert made.problems
            publisher.publish(GOOD)
            await take_up(made)
            grants_of[made.engine.digest] = ("payments",)
            stop.set()
            await asyncio.gather(*workers)
            assert len(grants_of) == 3
            assert all(each.verdict is Verdict.ALLOW for each in decisions), {each.reasons for each in decisions}
            assert {each.policy for each in decisions} == set(grants_of)
            assert all(each.grants == grants_of[each.policy] for each in decisions)

    asyncio.run(run())


def test_request_that_opa_decided_by_newer_rules_waits_for_the_broker(publisher: Publisher, opa: OpaProcess) -> None:
    async def run() -> None:
        async with holding(publisher, opa) as made:
            old = made.engine
            assert isinstance(old, OpaEngine)
            publisher.publish(OTHER)

            async def is_ahead() -> bool:
                return "does not serve" in await old.trouble()

            await until(is_ahead)
            waiting = [asyncio.ensure_future(old.decide(request(key=key))) for key in ("orders", "invoices")]
            await take_up(made)
            decisions = await asyncio.gather(*waiting)
            assert [each.verdict for each in decisions] == [Verdict.DENY, Verdict.ALLOW]
            assert {each.policy for each in decisions} == {made.engine.digest} != {old.digest}
            publisher.publish(GOOD)
            await take_up(made)

    asyncio.run(run())


@pytest.mark.case(21)
@pytest.mark.case(22)
@pytest.mark.case(23)
def test_rego_that_does_not_decide_is_a_failure_and_never_a_yes(tmp_path: Path) -> None:
    module = compile_rego(tmp_path, REGO)
    (tmp_path / "my.wasm").write_bytes(module)
    own = OwnPolicy(tmp_path / "policy.rego", tmp_path / "my.wasm")
    publisher = Publisher(tmp_path / "p", own=own)
    address = f"unix://{tmp_path}/opa.sock"

    async def run(opa: OpaProcess) -> None:
        async with holding(publisher, opa) as made:
            assert (await made.engine.decide(request(reason="allow"))).verdict is Verdict.ALLOW
            assert (await made.engine.decide(request())).verdict is Verdict.DENY
            for reason in ("undefined", "null", "text", "true", "1", "allow is text", "contradiction", "built-in error"):
                assert failed(await made.engine.decide(request(reason=reason)), "policy-error"), reason
                assert (await made.engine.decide(request(reason="allow"))).verdict is Verdict.ALLOW
        async with holding(publisher, opa, 1_500) as made:
            for reason, code in (("slow", "policy-unavailable"), ("10 MB", "policy-unavailable"), ("another policy", "policy-error")):
                started = time.monotonic()
                slow, *others = await asyncio.gather(
                    made.engine.decide(request(reason=reason)), *(made.engine.decide(request(reason=f"1/{n}")) for n in range(5))
                )
                assert failed(slow, code), reason
                assert time.monotonic() - started < 1.5 + SLACK
                assert all(failed(each, "policy-error") or failed(each, "policy-unavailable") for each in others)

            async def allows() -> bool:
                return (await made.engine.decide(request(reason="allow"))).verdict is Verdict.ALLOW

            await until(allows)

    with publisher.serving():
        publisher.publish(GOOD)
        with opa_process(publisher, address) as opa:
            asyncio.run(run(opa))
