"""Operations that wait for a quorum: what they need, who has approved, how they stand. Pure: no I/O, no clock, no signatures.

What is approved does not matter here. An operation has stages, and a stage wants so many people of some groups. People are counted, not
identities; a person counts once in all stages of one grant; nobody counts who asked for it. The stages of one grant come one after
another, those of several grants do not wait for each other. One refusal ends an operation, and so does its expiry.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import msgspec

from keybroker.model.approval import SIGNING_KINDS, Subject
from keybroker.model.decision import TargetInput


class Stage(msgspec.Struct, frozen=True):
    """So many people of these groups.

    Attributes:
        name: `GRANT/NUMBER`, numbers from 1.
        grant: id of the grant that demands it.
        approvals: how many people.
        of: names of groups; being in one of them is enough.
    """

    name: str
    grant: str
    approvals: int
    of: tuple[str, ...]


class Operation(msgspec.Struct, frozen=True):
    """What was asked for, as it is on record. Times are microseconds since the epoch.

    Attributes:
        subject: what an approval is about, word for word.
        person: whose identity the requester was then; empty if nobody's.
        stages: what it needs, in order.
        cool_off_us: from the approval that completes the quorum until the redemption.
        format: of the signature; empty where there is no choice.
        requested_us: when it was put on record.
        expires_us: when it ends.
        record: index of its record in the log.
    """

    subject: Subject
    person: str
    stages: tuple[Stage, ...]
    cool_off_us: int
    format: str
    requested_us: int
    expires_us: int
    record: int

    @property
    def id(self) -> str:
        """Its ULID."""
        return self.subject.operation.id

    @property
    def requester(self) -> str:
        """SPIFFE ID of who asked for it, and may redeem it."""
        return self.subject.workload

    @property
    def target(self) -> TargetInput:
        """What policy is asked about when somebody wants to approve it: the key or the kind of change, and who asked for it."""
        kind = self.subject.operation.kind
        if kind in SIGNING_KINDS:
            return TargetInput("key", self.subject.key.name, self.requester)
        return TargetInput("change", kind, self.requester)


@dataclass(frozen=True, slots=True)
class Vote:
    """An approval that is worth something now: its signature, its signer and his membership hold. Who judges that is not here."""

    stage: str
    person: str
    given_us: int


class State(enum.Enum):
    """Where an operation stands. Only READY can lead to a redemption."""

    PENDING = "pending"
    READY = "ready"
    REDEEMED = "redeemed"
    REFUSED = "refused"
    EXPIRED = "expired"


class End(enum.Enum):
    """How an operation has ended, for ever; NONE while it has not."""

    NONE = ""
    REDEEMED = "redeemed"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class StageStanding:
    """How one stage stands.

    Attributes:
        people: whose approval counts, in the order in which it was given.
        complete_us: when it became complete; 0 while it is not.
        is_reached: whether the stages before it are complete.
    """

    stage: Stage
    people: tuple[str, ...]
    complete_us: int
    is_reached: bool


@dataclass(frozen=True, slots=True)
class Standing:
    """How an operation stands.

    Attributes:
        not_before_us: when the cool-off is over; 0 while the quorum is not complete.
    """

    state: State
    stages: tuple[StageStanding, ...]
    not_before_us: int

    def may_be_approved(self, name: str) -> bool:
        """Whether an approval of this stage is taken: the operation goes on, and the stages before it are complete."""
        is_alive = self.state in {State.PENDING, State.READY}
        return is_alive and any(each.stage.name == name and each.is_reached for each in self.stages)


def stages_of(grant: str, wanted: Iterable[tuple[int, tuple[str, ...]]]) -> Iterator[Stage]:
    """The stages of one grant's quorum, from (approvals, groups) pairs in order."""
    for number, (approvals, groups) in enumerate(wanted, 1):
        yield Stage(f"{grant}/{number}", grant, approvals, groups)


def standing(operation: Operation, votes: Iterable[Vote], end: End, now_us: int) -> Standing:
    """How an operation stands.

    Args:
        votes: the approvals that hold now, in any order.
        end: what is on record of its end.
    """
    in_order = sorted(votes, key=lambda vote: vote.given_us)
    counted: list[StageStanding] = []
    is_reached: dict[str, bool] = {}
    spoken_for: dict[str, set[str]] = {}  # by grant: who counts in a stage of it already
    for stage in operation.stages:
        taken = spoken_for.setdefault(stage.grant, set())
        people: dict[str, int] = {}
        for vote in in_order:
            if vote.stage == stage.name and vote.person and vote.person not in taken:
                people.setdefault(vote.person, vote.given_us)
        reached = is_reached.get(stage.grant, True)
        complete_us = sorted(people.values())[stage.approvals - 1] if stage.approvals and len(people) >= stage.approvals else 0
        counted.append(StageStanding(stage, tuple(people), complete_us, reached))
        taken.update(people)
        is_reached[stage.grant] = reached and complete_us > 0
    is_complete = bool(counted) and all(is_reached.values())
    not_before_us = max(each.complete_us for each in counted) + operation.cool_off_us if is_complete else 0
    return Standing(_state(operation, end, now_us, is_complete=is_complete), tuple(counted), not_before_us)


def _state(operation: Operation, end: End, now_us: int, *, is_complete: bool) -> State:
    match end:
        case End.REDEEMED:
            return State.REDEEMED
        case End.REFUSED:
            return State.REFUSED
        case End.NONE if now_us >= operation.expires_us:
            return State.EXPIRED
        case End.NONE:
            return State.READY if is_complete else State.PENDING


def is_own(operation: Operation, identity: str, person_of: Callable[[str], str]) -> bool:
    """Whether an identity is the requester, or belongs to the same person: then, or by the grants of now."""
    if identity == operation.requester:
        return True
    person = person_of(identity)
    return bool(person) and person in {operation.person, person_of(operation.requester)}
