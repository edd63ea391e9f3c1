"""`keybroker policy simulate`: one request against a candidate. The verdict is the engine's; the reasoning says how the rules lead to it.

The reasoning reads the rules a second time, without Rego. Where the two do not agree, which only a compiled policy other than the one
that is built in can bring about, the reasoning says that it explains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from keybroker.authority.policy.grants import OWN_TRAIL, Deny, Grant, Quorum, Rules
from keybroker.authority.policy.pattern import Pattern
from keybroker.authority.trial.asking import bytes_of
from keybroker.authority.trial.candidate import Candidate
from keybroker.authority.trial.demands import demands_of_all
from keybroker.authority.trial.region import APPROVE, SIGNING, Target, all_rules, is_on, names_targets, point_of, targets_of
from keybroker.authority.trial.shapes import ANYBODY_PATTERN, Word, fits
from keybroker.authority.trial.words import listed, target_words
from keybroker.authority.trial.zones import ELSEWHERE
from keybroker.model.decision import Decision, PolicyInput, Verdict


@dataclass(frozen=True, slots=True)
class Fit:
    """How one selector of a rule takes a request.

    Attributes:
        selector: its name in the grant file; `target` for keys and trails.
        fits: whether the request is in it.
        text: why, in words.
    """

    selector: str
    fits: bool
    text: str


@dataclass(frozen=True, slots=True)
class Reading:
    """One rule, read for one request."""

    rule: str
    is_deny: bool
    where: str
    fits: tuple[Fit, ...]

    @property
    def matches(self) -> bool:
        """Whether every selector fits."""
        return all(each.fits for each in self.fits)

    @property
    def is_about_target(self) -> bool:
        """Whether it is a rule for this caller on this target, whatever else."""
        return all(each.fits for each in self.fits if each.selector in {"workloads", "target"})


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a candidate answers, and how its rules read.

    Attributes:
        decision: the engine's.
        readings: every rule; those that match first, then those that nearly do.
        is_explained: whether the rules, read plainly, come to the engine's answer.
    """

    request: PolicyInput
    decision: Decision
    readings: tuple[Reading, ...]
    is_explained: bool

    @property
    def needs(self) -> tuple[str, ...]:
        """What the decision demands beyond a yes, in words."""
        return tuple(sorted(each.text for each in demands_of_all(self.decision.obligations)))


def simulate(candidate: Candidate, request: PolicyInput) -> Simulation:
    """Ask a candidate, and read its rules."""
    decision = candidate.engine.decide_now(bytes_of(request))
    readings = [_reading(candidate, rule, request) for rule in all_rules(candidate.rules)]
    readings.sort(key=lambda each: (sum(not fit.fits for fit in each.fits), each.is_deny, each.rule))
    return Simulation(request, decision, tuple(readings), _agrees(decision, readings, request))


def is_own_trail(request: PolicyInput) -> bool:
    """Whether a workload asks for its own trail, which takes no grant."""
    target = request.target
    return request.operation == "read-audit" and target.kind == "trail" and target.workload == request.caller.spiffe_id


def _agrees(decision: Decision, readings: list[Reading], request: PolicyInput) -> bool:
    grants = {each.rule for each in readings if each.matches and not each.is_deny}
    if is_own_trail(request):
        grants.add(OWN_TRAIL)
    denies = {f"denied-by:{each.rule}" for each in readings if each.matches and each.is_deny}
    if decision.verdict is Verdict.ALLOW:
        return set(decision.grants) == grants and not denies
    said = {reason for reason in decision.reasons if reason.startswith("denied-by:")}
    return decision.verdict is Verdict.DENY and said == denies and (bool(denies) or not grants)


def _reading(candidate: Candidate, rule: Grant | Deny, request: PolicyInput) -> Reading:
    is_deny = isinstance(rule, Deny)
    if isinstance(rule, Grant) and request.operation == APPROVE:
        return Reading(rule.id, is_deny, candidate.places.rule(rule.id), _approval(candidate.rules, rule, request))
    found = [_workloads(rule, request), _target(rule, request), _operations(rule, request), _algorithms(rule, request)]
    if rule.networks:
        found.append(_networks(rule, request))
    return Reading(rule.id, is_deny, candidate.places.rule(rule.id), tuple(each for each in found if each))


def _approval(rules: Rules, grant: Grant, request: PolicyInput) -> tuple[Fit, ...]:
    """How a grant takes an approval: by the people of its quorum, and by who asked for what."""
    stages = grant.quorum.in_stages() if isinstance(grant.quorum, Quorum) else ()
    people = rules.people_of(tuple(name for stage in stages for name in stage.of))
    person = rules.person_of(request.caller.spiffe_id)
    quorum = Fit(
        "quorum", person in people, f"the caller is {person or 'nobody by name'}, {'of' if person in people else 'not of'} {listed(people)}"
    )
    point = point_of(request, ELSEWHERE)
    patterns = [Pattern.parse(text) for text in grant.workloads]
    has_asked = point.who is not None and any(fits(each, point.who) for each in patterns)
    asked = Fit("workloads", has_asked, f"{request.target.workload} has asked, {'in' if has_asked else 'not in'} {listed(grant.workloads)}")
    return quorum, asked, *([target] if (target := _target(grant, request)) else ())


def _workloads(rule: Grant | Deny, request: PolicyInput) -> Fit:
    word = Word(request.caller.trust_domain, request.caller.path)
    fitting = next((text for text in rule.workloads if fits(Pattern.parse(text), word)), None)
    if fitting is None:
        return Fit("workloads", False, f"the caller {request.caller.spiffe_id} is not in {listed(rule.workloads)}")  # noqa: FBT003  fits
    return Fit("workloads", True, f"the caller {request.caller.spiffe_id} is in {fitting}")  # noqa: FBT003  fits


def _target(rule: Grant | Deny, request: PolicyInput) -> Fit | None:
    """None for a deny of everything."""
    if isinstance(rule, Deny) and not names_targets(rule):
        return None
    point = point_of(request, ELSEWHERE)
    named = list(targets_of(rule, point.kind))
    is_named = any(is_on(each, point) for each in named)
    what = target_words(Target(point.kind, point.name, Pattern.parse(request.target.workload) if point.who else ANYBODY_PATTERN))
    return Fit("target", is_named, f"{what} is {'in' if is_named else 'not in'} {listed(map(target_words, named))}")


def _operations(rule: Grant | Deny, request: PolicyInput) -> Fit | None:
    if isinstance(rule, Deny) and not rule.operations:
        return None
    operation = request.operation
    if operation in rule.operations:
        return Fit("operations", True, f"{operation} is named")  # noqa: FBT003  fits
    if isinstance(rule, Grant) and operation == "read-key" and not SIGNING.isdisjoint(rule.operations):
        return Fit("operations", True, "whoever may sign may read the public key")  # noqa: FBT003  fits
    return Fit("operations", False, f"{operation} is not in {listed(rule.operations)}")  # noqa: FBT003  fits


def _algorithms(rule: Grant | Deny, request: PolicyInput) -> Fit | None:
    names = tuple(each.value for each in rule.algorithms)
    if isinstance(rule, Deny):
        if not names:
            return None
    elif request.operation not in SIGNING or not names:
        return None
    is_named = request.algorithm in names
    what = request.algorithm or "reading, which names no algorithm,"
    return Fit("algorithms", is_named, f"{what} is {'in' if is_named else 'not in'} {listed(names)}")


def _networks(rule: Grant | Deny, request: PolicyInput) -> Fit:
    inside = [name for name in request.caller.networks if name in rule.networks]
    where = f"the networks {listed(request.caller.networks)}" if request.caller.networks else "no named network"
    return Fit("networks", bool(inside), f"the caller is in {where}, {'of' if inside else 'none of'} {listed(rule.networks)}")
