"""What the authority counts, in Prometheus's words. No label has unbounded values: keys are the configured ones, a SPIFFE ID is none."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from keybroker.errors import RefusalError
from keybroker.model.record import Outcome
from keybroker.stage_times import StageTimes
from keybroker.tracing import Laps

_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
SECURITY_EVENTS = (
    "approval-void",
    "clock-untrusted",
    "file-refused",
    "glass-broken",
    "handshake-failed",
    "key-refused",
    "policy-replayed",
    "policy-stale-base",
    "policy-widening",
    "record-damaged",
    "record-not-writable",
    "self-check-failed",
    "shadow-refused",
    "svid-invalid",
    "token-needs-operator",
)
DEMANDS = ("clock-untrusted", "hours", "limit", "not-after", "not-before", "quorum")
SHADOW_RESULTS = ("same", "differs", "failed", "dropped")
_STAGES = ("decide", "record", "hsm", "token", "check", "release")


class AuthorityMetrics:
    """One registry, so that tests can have several in one process."""

    def __init__(self, keys: list[str]) -> None:
        self._registry = CollectorRegistry()
        signs = Counter("keybroker_sign", "Uses of keys by how they ended", ["outcome", "key"], registry=self._registry)
        self._signs = {(outcome, key): signs.labels(outcome.value, key) for outcome in Outcome for key in keys}
        self._stages = StageTimes("keybroker_sign_seconds", "Where a use spends its time", _BUCKETS, _STAGES, self._registry)
        self._refusals = Counter("keybroker_refusals", "Requests for keys that were refused, by code", ["code"], registry=self._registry)
        self._security = Counter("keybroker_security_events", "Things that should not happen", ["event"], registry=self._registry)
        self._sessions = Gauge("keybroker_hsm_sessions", "Workers by token and state", ["token", "state"], registry=self._registry)
        self._pending = Gauge("keybroker_pending_operations", "Operations that have not ended", registry=self._registry)
        self._reviews = Gauge("keybroker_break_glass_reviews", "Times that glass was broken, not reviewed yet", registry=self._registry)
        self._glass_uses = Counter("keybroker_break_glass_uses", "Uses under broken glass", registry=self._registry)
        self._freezes = Gauge("keybroker_freezes", "Freezes in force", registry=self._registry)
        self._log_size = Gauge("keybroker_log_size", "Records in the log", registry=self._registry)
        self._writable = Gauge("keybroker_record_writable", "1 while the record can be written", registry=self._registry)
        self._clock = Gauge("keybroker_clock_trusted", "1 while the clock is trusted", registry=self._registry)
        self._observed = Counter("keybroker_observed", "Demands of grants that only observe, not met", ["demand"], registry=self._registry)
        shadow = Counter("keybroker_shadow", "Decisions shown to the shadow policy", ["result"], registry=self._registry)
        self._shadow = {result: shadow.labels(result) for result in SHADOW_RESULTS}
        # A counter that appears with its first event shows no increase: what may happen is there from the start, at zero.
        for code in RefusalError.registry:
            self._refusals.labels(code)
        for event in SECURITY_EVENTS:
            self._security.labels(event)
        for demand in DEMANDS:
            self._observed.labels(demand)

    def signed(self, outcome: Outcome, key: str) -> None:
        """A use has ended."""
        self._signs[outcome, key].inc()

    def stages(self, laps: Laps) -> None:
        """A use has gone through these stages."""
        for stage, began_ns, ended_ns in laps.stages:
            self._stages.observe(stage, ended_ns - began_ns)

    def token(self, busy_ns: int) -> None:
        """The part of the stage `hsm` that a call into the token took, as its worker says."""
        self._stages.observe("token", busy_ns)

    def observed(self, reasons: tuple[str, ...]) -> None:
        """A grant that only observes would have refused a use, for these reasons."""
        for reason in reasons:
            self._observed.labels(reason.partition(":")[0]).inc()

    def refused(self, code: str) -> None:
        """A request was refused, with this problem code."""
        self._refusals.labels(code).inc()

    def security(self, event: str, count: int = 1) -> None:
        """Security events of this name."""
        self._security.labels(event).inc(count)

    def shadowed(self, result: str) -> None:
        """The shadow policy has decided, or was not asked (`dropped`)."""
        self._shadow[result].inc()

    def glass(self, count: int) -> None:
        """So many times that somebody broke the glass have not been reviewed."""
        self._reviews.set(count)

    def used_glass(self) -> None:
        """A use went without something that a grant demands."""
        self._glass_uses.inc()

    def frozen(self, count: int) -> None:
        """So many freezes are in force."""
        self._freezes.set(count)

    def text(
        self, sessions: dict[str, tuple[int, int]], log_size: int, pending: int = 0, *, is_writable: bool, is_clock_trusted: bool = True
    ) -> bytes:
        """Everything in Prometheus's text format.

        Args:
            sessions: for each token, workers in service and workers configured.
            pending: operations that have not ended.
        """
        for token, (serving, configured) in sessions.items():
            self._sessions.labels(token, "serving").set(serving)
            self._sessions.labels(token, "lost").set(configured - serving)
        self._log_size.set(log_size)
        self._pending.set(pending)
        self._writable.set(is_writable)
        self._clock.set(is_clock_trusted)
        return generate_latest(self._registry)
