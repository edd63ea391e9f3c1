"""Shadow mode: a candidate decides beside the live policy, and where the two differ goes on record. It never affects an answer.

What the live policy has decided is handed over in two cheap steps, a look at a length and an append, and everything else is another
thread's: it has at most a share of one core, a full queue drops, a candidate that traps, runs for ever or cannot be loaded is a
difference or a warning like any other. The requests of a record are whole, so each difference can be looked into with `policy simulate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import msgspec

from keybroker.authority.journal import Entry, Journal
from keybroker.authority.metrics import AuthorityMetrics
from keybroker.authority.policy.engine import PolicyEngine
from keybroker.authority.security_events import SecurityEvents
from keybroker.authority.service import Rules
from keybroker.authority.trial import candidate as candidates
from keybroker.authority.trial.candidate import Candidate
from keybroker.authority.trial.demands import demands_of_all, not_kept
from keybroker.config import ShadowConfig
from keybroker.errors import AuditUnavailableError, ConfigError
from keybroker.identity.watched_file import fingerprint
from keybroker.model.decision import Decision, PolicyInput, Verdict
from keybroker.model.record import Draft, RecordKind
from keybroker.telemetry import logger

QUEUE = 4_096  # decisions that wait; beyond them they are dropped, and counted
PERIOD_SECONDS = 0.05
LOOK_SECONDS = 1.0
FLUSH_SECONDS = 10.0
SHARE = 0.2  # of one core
MAX_DIFFERENCES = 64  # records in one flush; the rest are counted together

_log = logger()
_decode_input = msgspec.json.Decoder(PolicyInput).decode


@dataclass(slots=True)
class _Difference:
    """One kind of difference since the last flush: the request and the candidate's decision of the first, and how many."""

    request: bytes
    decision: bytes
    count: int = 0


class Shadow:
    """Takes decisions, has the candidate make them too, and writes down where it differs.

    Args:
        config: which candidate; None for none, and then nothing is done.
        module: the live compiled policy, for a candidate that has none of its own.
    """

    def __init__(
        self, config: ShadowConfig | None, module: Path | None, journal: Journal, security: SecurityEvents, metrics: AuthorityMetrics
    ) -> None:
        self._config = config
        self._module = module
        self._journal = journal
        self._security = security
        self._metrics = metrics
        self._queue: deque[tuple[bytes, Decision]] = deque()
        self._candidate: Candidate | None = None
        self._next: Candidate | None = None  # loaded, and not on record yet
        self._looked_at: object = None
        self._found: dict[str, _Difference] = {}
        self._writing: asyncio.Future[None] | None = None
        self._flushed = time.monotonic() - FLUSH_SECONDS
        self._lock = threading.Lock()  # around `_found`
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)

    def over(self, rules: Rules) -> Rules:
        """The same rules, with this shadow watching what they decide; themselves, if there is none."""
        return ShadowedRules(rules, self) if self._config else rules

    def offer(self, request: bytes, decision: Decision) -> None:
        """What the live policy has decided. Returns at once, whatever happens to it."""
        if self._candidate is None:
            return
        if len(self._queue) >= QUEUE:
            self._metrics.shadowed("dropped")
            return
        self._queue.append((request, decision))

    async def run(self) -> None:
        """Load the candidate, and again whenever its files change; write down what differs. Until cancelled."""
        if self._config is None:
            return
        self._thread.start()
        while True:
            try:
                await self._look(self._config)
                if self._found and self._is_due():
                    self._flushed = time.monotonic()
                    self._writing = asyncio.ensure_future(self.flush())
                    await asyncio.shield(self._writing)  # whoever cancels this waits in `stop` for what is being written
            except AuditUnavailableError:
                _log.warning("what the shadow policy would change waits to be recorded")
            except Exception:  # noqa: BLE001  the shadow may fail in any way; the broker goes on
                _log.exception("the shadow policy failed")
            await asyncio.sleep(LOOK_SECONDS)

    async def flush(self) -> None:
        """Write down what differs.

        Raises:
            AuditUnavailableError: not all of it; the rest is kept for the next time.
        """
        with self._lock:
            found, self._found = self._found, {}
        try:
            for detail in list(found):
                each = found.pop(detail)
                body = {"event": "shadow-differs", "detail": detail, "count": each.count}
                draft = Draft(kind=RecordKind.SECURITY, request=msgspec.Raw(each.request), decision=msgspec.Raw(each.decision), body=body)
                try:
                    await self._journal.write(Entry(draft))
                except AuditUnavailableError:
                    found[detail] = each
                    raise
        finally:
            with self._lock:
                for detail, each in found.items():
                    self._count(detail, each)

    def _is_due(self) -> bool:
        """The first difference is on record at once; after that they are counted for a while."""
        return time.monotonic() - self._flushed >= FLUSH_SECONDS

    async def stop(self) -> None:
        """End the thread, and write down what it has found. What it has not compared is dropped."""
        self._stopping.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, 5)
        with contextlib.suppress(AuditUnavailableError):
            if self._writing is not None:
                await self._writing
            await self.flush()

    async def _look(self, config: ShadowConfig) -> None:
        """Take another candidate if its files have changed. One that cannot be used is on record, and the one before goes on."""
        signature = _signature(config.grants)
        if signature != self._looked_at:
            self._looked_at = signature
            try:
                self._next = await asyncio.to_thread(candidates.load, config.grants, config.module or self._module)
            except ConfigError as err:
                _log.error("the shadow policy cannot be used", problem=str(err).splitlines()[0])
                self._security.note("shadow-refused", str(err).splitlines()[0][:200])
        if self._next is not None:
            body = {"change": "shadow", "to": self._next.engine.digest}
            await self._journal.write(Entry(Draft(kind=RecordKind.ADMIN, body=body)))
            _log.info("shadow policy changed", policy=self._next.engine.digest)
            self._candidate, self._next = self._next, None

    def _work(self) -> None:
        """The thread: compares what has come, and rests four times as long as it worked."""
        while not self._stopping.wait(PERIOD_SECONDS):
            began = time.thread_time()
            with contextlib.suppress(IndexError):
                while not self._stopping.is_set():
                    request, decision = self._queue.popleft()
                    self._compare(request, decision)
                    spent = time.thread_time() - began
                    if spent > PERIOD_SECONDS * SHARE:
                        self._stopping.wait(spent * (1 - SHARE) / SHARE)
                        began = time.thread_time()

    def _compare(self, request: bytes, live: Decision) -> None:
        candidate = self._candidate
        if candidate is None:
            return
        try:
            shadow = candidate.engine.decide_now(request)
            details = _differences(request, live, shadow)
        except Exception:  # noqa: BLE001  as above
            _log.exception("the shadow policy failed on a request")
            self._metrics.shadowed("failed")
            return
        result = "failed" if shadow.verdict is Verdict.FAILED else "differs" if details else "same"
        self._metrics.shadowed(result)
        with self._lock:
            for detail in details:
                self._count(detail, _Difference(request, shadow.record, 1))

    def _count(self, detail: str, seen: _Difference) -> None:
        if detail not in self._found and len(self._found) >= MAX_DIFFERENCES:
            detail = "more of the same"
        known = self._found.setdefault(detail, _Difference(seen.request, seen.decision))
        known.count += seen.count


class ShadowedRules:
    """The live rules, with a shadow that sees what they decide.

    Attributes:
        engine: decides as the live one does.
    """

    def __init__(self, rules: Rules, shadow: Shadow) -> None:
        self._rules = rules
        self._shadow = shadow

    @property
    def engine(self) -> PolicyEngine:
        """The live policy."""
        return _SeenEngine(self._rules.engine, self._shadow)

    def networks_of(self, address: str) -> tuple[str, ...]:
        """The named networks that an address is in, by the live policy."""
        return self._rules.networks_of(address)


class _SeenEngine:
    """An engine whose decisions are offered to the shadow."""

    def __init__(self, engine: PolicyEngine, shadow: Shadow) -> None:
        self._engine = engine
        self._shadow = shadow

    @property
    def digest(self) -> str:
        return self._engine.digest

    async def decide(self, request: bytes) -> Decision:
        decision = await self._engine.decide(request)
        self._shadow.offer(request, decision)
        return decision


def _differences(request: bytes, live: Decision, shadow: Decision) -> list[str]:
    """What the candidate would do differently, in words, each with whom and what it is about."""
    if live.verdict is not shadow.verdict:
        return [f"{live.verdict.value} to {shadow.verdict.value}: {_about(request)}"]
    if live.verdict is not Verdict.ALLOW or live.obligations == shadow.obligations:
        return []
    before, after = demands_of_all(live.obligations), demands_of_all(shadow.obligations)
    more = [f"tightened: {_about(request)}: {each.text}" for each in sorted(not_kept(after, before), key=str)]
    return more + [f"loosened: {_about(request)}: {each.text}" for each in sorted(not_kept(before, after), key=str)]


def _about(request: bytes) -> str:
    asked = _decode_input(request)
    target = asked.target.id if asked.target.kind == "key" else asked.target.workload or "the whole record"
    return f"{asked.caller.spiffe_id} {asked.operation} {target}"


def _signature(directory: Path) -> object:
    """Changes whenever a grant file does."""
    try:
        return tuple((path.name, fingerprint(path)) for path in sorted(directory.iterdir()) if path.suffix == ".yaml")
    except OSError:
        return ()
