"""Shadow mode: what the candidate would change is on record, and nothing that it does affects the live policy."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from keybroker.authority import shadow as shadows
from keybroker.authority.journal import Entry, Journal
from keybroker.authority.metrics import SHADOW_RESULTS, AuthorityMetrics
from keybroker.authority.policy import engine, loader
from keybroker.authority.policy.engine import EmbeddedEngine, PolicyEngine
from keybroker.authority.security_events import SecurityEvents
from keybroker.authority.shadow import Shadow, ShadowedRules
from keybroker.authority.store.reader import Reader
from keybroker.authority.trial import recorded, shadowed
from keybroker.config import ShadowConfig
from keybroker.errors import AuditUnavailableError
from keybroker.model.decision import Verdict
from tests.policies import GOOD, Compile, default_engine, request
from tests.unit.authority.store.logs import journal_on

SECONDS = 60
LOOP = """\
package keybroker

numbers := [n | some a in ROW; some b in ROW; some c in ROW; n := (a * b) + c]

decision := count([1 | some a in numbers; some b in numbers; a == b])
""".replace("ROW", str(list(range(40))))


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadows, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(shadows, "PERIOD_SECONDS", 0.01)
    monkeypatch.setattr(shadows, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(engine, "unenforced", lambda _obligation: (), raising=False)


@dataclass(slots=True)
class Live:
    """Rules that are live, as the service has them."""

    engine: PolicyEngine

    def networks_of(self, _address: str) -> tuple[str, ...]:
        return ("office",)


@dataclass(slots=True)
class Shown:
    """A live policy with its shadow, and what both leave behind."""

    shadow: Shadow
    rules: ShadowedRules
    live: EmbeddedEngine
    metrics: AuthorityMetrics
    security: SecurityEvents
    state: Path
    journal: Journal
    candidate: Path
    running: asyncio.Task[None]

    async def stop(self) -> None:
        """End it, as the room does."""
        self.running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.running
        await self.shadow.stop()

    def counts(self) -> dict[str, int]:
        return {result: int(self.metrics._shadow[result]._value.get()) for result in SHADOW_RESULTS}

    def records(self, kind: str) -> list[dict[str, Any]]:
        with contextlib.closing(Reader(self.state)) as reader:
            return [record for leaf in reader.leaves() if (record := json.loads(leaf))["kind"] == kind]

    async def until(self, **wanted: int) -> None:
        """Wait for these metrics."""
        for _ in range(SECONDS * 50):
            if all(self.counts()[name] >= count for name, count in wanted.items()):
                return
            await asyncio.sleep(0.02)
        pytest.fail(f"{self.counts()} never came to {wanted}")

    async def loaded(self) -> None:
        for _ in range(SECONDS * 50):
            if self.shadow._candidate is not None:
                return
            await asyncio.sleep(0.02)
        pytest.fail("the candidate was never loaded")


@contextlib.asynccontextmanager
async def shown(tmp_path: Path, candidate: str, policy: bytes | None = None, live: str = GOOD) -> AsyncIterator[Shown]:
    (tmp_path / "live").mkdir()
    (tmp_path / "live" / "a.yaml").write_text(live)
    (tmp_path / "candidate").mkdir()
    (tmp_path / "candidate" / "a.yaml").write_text(candidate)
    module = tmp_path / "mine.wasm" if policy else None
    if module and policy:
        module.write_bytes(policy)
    answering = default_engine(loader.load(tmp_path / "live", frozenset({"orders"})))
    async with journal_on(tmp_path / "state") as (journal, _):
        metrics = AuthorityMetrics(["orders"])
        security = SecurityEvents(journal, metrics)
        shadow = Shadow(ShadowConfig(grants=tmp_path / "candidate", module=module), None, journal, security, metrics)
        rules = ShadowedRules(Live(answering), shadow)
        running = asyncio.create_task(shadow.run())
        both = Shown(shadow, rules, answering, metrics, security, tmp_path / "state", journal, tmp_path / "candidate", running)
        try:
            yield both
        finally:
            await both.stop()


def test_differences_are_on_record_with_request_and_counts(tmp_path: Path) -> None:
    async def main() -> None:
        async with shown(tmp_path, GOOD.replace("ES256", "ES384")) as both:
            await both.loaded()
            for _ in range(3):
                assert (await both.rules.engine.decide(request())).verdict is Verdict.ALLOW
            assert (await both.rules.engine.decide(request(workload="spiffe://example.org/x"))).verdict is Verdict.DENY
            await both.until(differs=3, same=1)
            await both.stop()
            found = both.records("security")
            assert sum(each["body"]["count"] for each in found) == 3
            assert {each["body"]["event"] for each in found} == {"shadow-differs"}
            assert {each["body"]["detail"] for each in found} == {"allow to deny: spiffe://example.org/payments/api sign orders"}
            assert found[0]["request"] == json.loads(request())
            (change,) = both.records("admin")
            assert change["body"] == {"change": "shadow", "to": found[0]["decision"]["policy"]}
            assert both.live.digest != found[0]["decision"]["policy"]
            (seen,) = shadowed.seen(recorded.from_state(both.state, None, lambda _done, _of: None, "security"))
            assert (seen.detail, seen.decisions) == (found[0]["body"]["detail"], 3)

    asyncio.run(main())


def test_demands_that_differ_are_differences(tmp_path: Path) -> None:
    async def main() -> None:
        async with shown(tmp_path, GOOD + "    limits: [{max: 5, window: 1m, per: key}]\n") as both:
            await both.loaded()
            await both.rules.engine.decide(request())
            await both.until(differs=1)
            await both.stop()
            (found,) = both.records("security")
            about = "spiffe://example.org/payments/api sign orders"
            assert found["body"]["detail"] == f"tightened: {about}: at most 5 uses in any 1m, for each key (payments)"

    asyncio.run(main())


def test_same_candidate_leaves_no_record(tmp_path: Path) -> None:
    async def main() -> None:
        async with shown(tmp_path, GOOD) as both:
            await both.loaded()
            await both.rules.engine.decide(request())
            await both.until(same=1)
            await both.stop()
            assert both.records("security") == []
            assert both.rules.networks_of("192.0.2.1") == ("office",)
            assert both.rules.engine.digest == both.live.digest

    asyncio.run(main())


def test_candidate_that_traps_affects_no_answer_and_is_a_difference(compiled: Compile, tmp_path: Path) -> None:
    async def main() -> None:
        async with shown(tmp_path, GOOD, compiled(LOOP)) as both:
            await both.loaded()
            for number in range(200):
                decision = await both.rules.engine.decide(request(reason=str(number)))
                assert (decision.verdict, decision.grants) == (Verdict.ALLOW, ("payments",))
            assert both.counts()["failed"] < 200  # the answers have not waited for the candidate
            await both.until(failed=3)
            await both.stop()
            assert {each["body"]["detail"] for each in both.records("security")} == {
                "allow to failed: spiffe://example.org/payments/api sign orders"
            }

    asyncio.run(main())


def test_full_queue_drops_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadows, "QUEUE", 10)
    monkeypatch.setattr(shadows, "PERIOD_SECONDS", 3_600.0)

    async def main() -> None:
        async with shown(tmp_path, GOOD) as both:
            await both.loaded()
            for _ in range(25):
                assert (await both.rules.engine.decide(request())).verdict is Verdict.ALLOW
            assert both.counts() == {"same": 0, "differs": 0, "failed": 0, "dropped": 15}
            assert len(both.shadow._queue) == 10

    asyncio.run(main())


def test_broken_candidate_is_on_record_and_the_one_before_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with shown(tmp_path, GOOD.replace("ES256", "ES384")) as both:
            await both.loaded()
            (both.candidate / "a.yaml").write_text("grants: {")
            for _ in range(SECONDS * 50):
                if any(event == "shadow-refused" for event, _ in both.security._counts):
                    break
                await asyncio.sleep(0.02)
            await both.security.flush()
            await both.rules.engine.decide(request())
            await both.until(differs=1)
            await both.stop()
            events = [each["body"] for each in both.records("security")]
            assert any(each["event"] == "shadow-refused" and "a.yaml" in each["detail"] for each in events)

    asyncio.run(main())


def test_candidate_that_never_loads_leaves_the_live_policy_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with shown(tmp_path, "grants: {") as both:
            assert (await both.rules.engine.decide(request())).verdict is Verdict.ALLOW
            assert both.counts() == dict.fromkeys(SHADOW_RESULTS, 0)
            (both.candidate / "a.yaml").write_text(GOOD)
            await both.loaded()

    asyncio.run(main())


def test_many_differences_share_one_record_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadows, "MAX_DIFFERENCES", 3)
    monkeypatch.setattr(shadows.Shadow, "_is_due", lambda _self: False)

    async def main() -> None:
        async with shown(tmp_path, "grants: []\n") as both:
            await both.loaded()
            for number in range(10):
                await both.rules.engine.decide(request(workload=f"spiffe://example.org/payments/p{number}"))
            await both.until(differs=10)
            await both.stop()
            found = [each["body"] for each in both.records("security")]
            assert [each["count"] for each in found] == [1, 1, 1, 7]
            assert found[3]["detail"] == "more of the same"

    asyncio.run(main())


def test_differences_that_cannot_be_recorded_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadows.Shadow, "_is_due", lambda _self: False)

    async def main() -> None:
        async with shown(tmp_path, "grants: []\n") as both:
            await both.loaded()
            await both.rules.engine.decide(request())
            await both.until(differs=1)
            write = both.journal.write

            async def refuse(_entry: Entry) -> int:
                raise AuditUnavailableError("not now", retry_after=1)

            monkeypatch.setattr(both.journal, "write", refuse)
            with pytest.raises(AuditUnavailableError):
                await both.shadow.flush()
            monkeypatch.setattr(both.journal, "write", write)
            await both.shadow.flush()
            (found,) = both.records("security")
            assert found["body"]["count"] == 1

    asyncio.run(main())


def test_candidate_that_cannot_be_recorded_waits_until_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with shown(tmp_path, "grants: {") as both:
            write = both.journal.write

            async def refuse(_entry: Entry) -> int:
                raise AuditUnavailableError("not now", retry_after=1)

            monkeypatch.setattr(both.journal, "write", refuse)
            (both.candidate / "a.yaml").write_text(GOOD)
            for _ in range(SECONDS * 50):
                if both.shadow._next is not None:
                    break
                await asyncio.sleep(0.02)
            assert both.shadow._candidate is None
            monkeypatch.setattr(both.journal, "write", write)
            await both.loaded()
            assert [each["body"]["change"] for each in both.records("admin")] == ["shadow"]

    asyncio.run(main())
