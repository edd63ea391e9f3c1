"""`keybroker policy replay`: a candidate against the decisions that are on record.

A decision depends on nothing but its input and the rules, and the input is on record byte by byte; so equal inputs are decided once. Only
the networks of the caller are looked up again, by the address that is on record: the candidate may mean others by their names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from keybroker.audit.leaf import canonical
from keybroker.authority.trial.candidate import Candidate
from keybroker.authority.trial.demands import Demand, demands_of_all, not_kept
from keybroker.authority.trial.recorded import Recorded
from keybroker.errors import PolicyFailedError, PolicyUnavailableError
from keybroker.model.decision import Obligation, PolicyInput, Verdict

EXAMPLES = 3  # of each change
MAX_CHANGES = 10_000  # different ones; beyond them, changes are counted together
_MAX_KNOWN = 1_000_000  # answers that are remembered, some 150 bytes each
_ATTEMPTS = 3  # a deadline may pass because the machine is busy
_EVERYTHING_ELSE = "everything else"
_FAILURES = {PolicyFailedError.code, PolicyUnavailableError.code}
_NOT_DECISIONS = frozenset({"security", "outcome", "start"})


class _Decided(msgspec.Struct, frozen=True):
    """The `decision` of a record, as far as it is compared. Older records have obligations of another form: they are compared as none."""

    allow: bool
    reasons: tuple[str, ...] = ()
    grants: tuple[str, ...] = ()
    obligations: msgspec.Raw = msgspec.Raw(b"[]")
    policy: str = ""


_decode_decision = msgspec.json.Decoder(_Decided).decode
_decode_obligations = msgspec.json.Decoder(tuple[Obligation, ...]).decode
_decode_input = msgspec.json.Decoder(PolicyInput).decode


@dataclass(frozen=True, slots=True)
class Answer:
    """What one policy says: the recorded one, or the candidate."""

    verdict: Verdict
    why: tuple[str, ...]
    demands: frozenset[Demand] | None


@dataclass(frozen=True, slots=True)
class Place:
    """Whose requests for what: the changes are counted by this.

    Attributes:
        change: `allow to deny` and the like, `tightened` or `loosened`.
        target: the name of a key, the SPIFFE ID of a trail, or `the whole record`.
        demand: what is demanded, or no longer; empty for a change of verdict.
    """

    change: str
    workload: str
    operation: str
    target: str
    demand: str = ""


@dataclass(slots=True)
class Tally:
    """How often, and where to look.

    Attributes:
        decisions: how many were made; a record of denials may stand for many.
        records: how many records.
        first: index of the first, with its time; `last` of the last.
        was: why the recorded answer was what it was, of the first.
        now: why the candidate's is.
        examples: indexes of the first few.
    """

    first: int
    first_time: str
    was: tuple[str, ...]
    now: tuple[str, ...]
    decisions: int = 0
    records: int = 0
    last: int = 0
    last_time: str = ""
    examples: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Replay:
    """What a candidate would have answered.

    Attributes:
        records: that were looked at.
        decisions: of the rules, in them.
        distinct: different inputs among those.
        changes: by place; empty if every decision is the same.
        counted: denials that are on record as a number only: one input stands for all of them.
        without_address: decisions whose networks could not be looked up again.
        undecided: to which the candidate gives no answer.
        unreadable: lines that are no records.
        policies: digests of the policies that decided.
    """

    records: int = 0
    decisions: int = 0
    distinct: int = 0
    changes: dict[Place, Tally] = field(default_factory=dict)
    counted: int = 0
    without_address: int = 0
    undecided: int = 0
    unreadable: int = 0
    policies: set[str] = field(default_factory=set)

    def notes(self) -> list[str]:
        """What this replay does not show, in words."""
        found = ["what is demanded is replayed, not whether it was met: limits, hours and quorums depend on clock and history"]
        if self.counted:
            found.append(f"{self.counted} denials are on record as a number only: the first of its second stands for each of them")
        if self.without_address:
            found.append(f"{self.without_address} decisions have no address on record: their networks are those of the rules of then")
        if self.undecided:
            found.append(f"to {self.undecided} decisions the candidate gives no answer, and would refuse")
        if self.unreadable:
            found.append(f"{self.unreadable} lines are no records and were left out")
        return found


class Replayer:
    """Takes records one by one."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate
        self._known: dict[bytes, Answer] = {}
        self._recorded: dict[bytes, Answer] = {}
        self._networks: dict[str, tuple[tuple[str, ...], bytes]] = {}
        self.replay = Replay()

    def take_all(self, records: Iterable[Recorded | None]) -> Replay:
        """Take every record."""
        for each in records:
            if each is None:
                self.replay.unreadable += 1
            else:
                self.take(each)
        return self.replay

    def take(self, recorded: Recorded) -> None:
        """Take one record."""
        replay = self.replay
        replay.records += 1
        if recorded.kind in _NOT_DECISIONS or len(recorded.request) <= 2 or len(recorded.decision) <= 2:
            return
        was = self._was(bytes(recorded.decision))
        asked = self._asked(recorded)
        now = self._now(asked)
        count = max(recorded.body.count, 1)
        replay.decisions += count
        replay.counted += count - 1
        if now.verdict is Verdict.FAILED:
            replay.undecided += count
        if was.verdict is not now.verdict:
            self._note(f"{was.verdict.value} to {now.verdict.value}", "", recorded, asked, (was, now))
        elif now.verdict is Verdict.ALLOW and was.demands is not None and now.demands is not None and was.demands != now.demands:
            for change, demands in (
                ("tightened", not_kept(now.demands, was.demands)),
                ("loosened", not_kept(was.demands, now.demands)),
            ):
                for demand in demands:
                    self._note(change, demand.text, recorded, asked, (was, now))

    def _asked(self, recorded: Recorded) -> bytes:
        """The input as the candidate would see it: the recorded bytes, unless the address is in other networks now."""
        asked, address = bytes(recorded.request), recorded.svid.address
        if not address:
            self.replay.without_address += max(recorded.body.count, 1)
            return asked
        known = self._networks.get(address)
        if known is None:
            names = self._candidate.rules.networks_of(address)
            known = self._networks[address] = names, b'"networks":' + canonical(names)
        names, said = known
        if said in asked:  # no text in the input can look like this: a quote in it is escaped
            return asked
        request = _decode_input(asked)
        return canonical(msgspec.structs.replace(request, caller=msgspec.structs.replace(request.caller, networks=names)))

    def _was(self, decision: bytes) -> Answer:
        known = self._recorded.get(decision)
        if known is None:
            if len(self._recorded) >= _MAX_KNOWN:
                self._recorded.clear()
            known = self._recorded[decision] = self._read(decision)
        return known

    def _read(self, decision: bytes) -> Answer:
        decided = _decode_decision(decision)
        self.replay.policies.add(decided.policy)
        if decided.allow:
            return Answer(Verdict.ALLOW, decided.grants, _demands(bytes(decided.obligations)))
        failed = not _FAILURES.isdisjoint(decided.reasons)
        return Answer(Verdict.FAILED if failed else Verdict.DENY, decided.reasons, None)

    def _now(self, asked: bytes) -> Answer:
        digest = hashlib.blake2b(asked, digest_size=16).digest()
        known = self._known.get(digest)
        if known is None:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self.replay.distinct += 1
            known = self._known[digest] = self._decide(asked)
        return known

    def _decide(self, asked: bytes) -> Answer:
        decision = self._candidate.engine.decide_now(asked)
        for _ in range(_ATTEMPTS - 1):
            if PolicyUnavailableError.code in decision.reasons:
                decision = self._candidate.engine.decide_now(asked)
        if decision.verdict is Verdict.ALLOW:
            return Answer(decision.verdict, decision.grants, demands_of_all(decision.obligations))
        return Answer(decision.verdict, decision.reasons, None)

    def _note(self, change: str, demand: str, recorded: Recorded, asked: bytes, answers: tuple[Answer, Answer]) -> None:
        changes = self.replay.changes
        request = _decode_input(asked)
        target = request.target.id if request.target.kind == "key" else request.target.workload or "the whole record"
        place = Place(change, request.caller.spiffe_id, request.operation, target, demand)
        if place not in changes and len(changes) >= MAX_CHANGES:
            place = Place(change, _EVERYTHING_ELSE, "", "")
        was, now = answers
        tally = changes.setdefault(place, Tally(recorded.index, recorded.time, was.why, now.why))
        tally.decisions += max(recorded.body.count, 1)
        tally.records += 1
        tally.last, tally.last_time = recorded.index, recorded.time
        if len(tally.examples) < EXAMPLES:
            tally.examples.append(recorded.index)


def _demands(obligations: bytes) -> frozenset[Demand] | None:
    """None for obligations of another version, which cannot be compared."""
    try:
        return demands_of_all(_decode_obligations(obligations))
    except msgspec.MsgspecError:
        return None
