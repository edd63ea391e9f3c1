"""The part of the check that is about what grants demand: moments, limits, and quorums that nobody can reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from keybroker.authority.policy.grants import Grant, Quorum, Rules, Stage
from keybroker.authority.policy.pattern import Pattern
from keybroker.authority.trial.candidate import Candidate
from keybroker.authority.trial.findings import Finding
from keybroker.authority.trial.region import SIGNING, all_rules
from keybroker.authority.trial.shapes import Word, fits
from keybroker.authority.trial.words import listed
from keybroker.clock import from_rfc3339
from keybroker.model.identity import SpiffeId


def check_demands(loaded: Candidate, now_us: int) -> Iterator[Finding]:
    """What there is to say about the demands of all grants."""
    for grant in loaded.rules.grants:
        yield from _moments(loaded, grant, now_us)
        yield from _limits(loaded, grant)
        if isinstance(grant.quorum, Quorum):
            yield from _quorum(loaded, grant, grant.quorum.in_stages())


def unused_names(loaded: Candidate) -> Iterator[Finding]:
    """What has a name that nothing uses."""
    rules = loaded.rules
    networks = {name for rule in all_rules(rules) for name in rule.networks}
    quorums = [grant.quorum for grant in rules.grants if isinstance(grant.quorum, Quorum)]
    groups = {name for quorum in quorums for stage in quorum.in_stages() for name in stage.of}
    people = {name for members in rules.groups.values() for name in members}
    for part, names, used, user in (
        ("networks", rules.networks, networks, "rule"),
        ("groups", rules.groups, groups, "quorum"),
        ("people", rules.people, people, "group"),
    ):
        what = {"networks": "network", "groups": "group", "people": "person"}[part]
        for name in names:
            if name not in used:
                yield Finding.of(f"unused-{what}", loaded.places.other(part, name), "", f"no {user} names the {what} {name}")


def _moments(loaded: Candidate, grant: Grant, now_us: int) -> Iterator[Finding]:
    if grant.not_after and from_rfc3339(grant.not_after) <= now_us:
        where = loaded.places.rule(grant.id, "not_after")
        yield Finding.of("expired-grant", where, grant.id, f"{grant.id} gives nothing any more: it ended at {grant.not_after}")
    if grant.not_before and from_rfc3339(grant.not_before) > now_us:
        where = loaded.places.rule(grant.id, "not_before")
        yield Finding.of("early-grant", where, grant.id, f"{grant.id} gives nothing yet: it begins at {grant.not_before}")


def _limits(loaded: Candidate, grant: Grant) -> Iterator[Finding]:
    if grant.observe_only:
        where = loaded.places.rule(grant.id, "observe_only")
        yield Finding.of("observes-only", where, grant.id, f"what {grant.id} demands is watched, and does not bind")
    if not grant.limits and not grant.quorum and not SIGNING.isdisjoint(grant.operations):
        text = f"{grant.id} lets keys be used as often as its workloads like"
        yield Finding.of("no-limits", loaded.places.rule(grant.id), grant.id, text)


def _quorum(loaded: Candidate, grant: Grant, stages: Sequence[Stage]) -> Iterator[Finding]:
    """A person counts once in all stages, and never for what he asked for himself."""
    rules, where = loaded.rules, loaded.places.rule(grant.id, "quorum")
    wanted = sum(stage.approvals for stage in stages)
    if not can_be_met(stages, rules, ""):
        people = listed(rules.people_of(tuple(name for stage in stages for name in stage.of)))
        text = f"the quorum of {grant.id} can never be met: a person counts once in all stages, and {wanted} are wanted of {people}"
        yield Finding.of("quorum-cannot-be-met", where, grant.id, text)
        return
    alone = [person for person in requesters(grant, rules) if not can_be_met(stages, rules, person)]
    if alone:
        text = f"the quorum of {grant.id} can never be met for what {listed(alone)} asks: nobody approves an own request, and without that"
        yield Finding.of("quorum-needs-requester", where, grant.id, f"{text} person too few are left")


def requesters(grant: Grant, rules: Rules) -> tuple[str, ...]:
    """The people who may ask for something under a grant, by one of their identities."""
    patterns = [Pattern.parse(text) for text in grant.workloads]

    def may_ask(identity: str) -> bool:
        parsed = SpiffeId.parse(identity)
        return any(fits(pattern, Word(parsed.trust_domain, parsed.path)) for pattern in patterns)

    return tuple(name for name, identities in sorted(rules.people.items()) if any(map(may_ask, identities)))


def can_be_met(stages: Sequence[Stage], rules: Rules, without: str) -> bool:
    """Whether there are enough different people for all stages together, leaving one person out (a bipartite matching)."""
    wanted = [set(rules.people_of(stage.of)) - {without} for stage in stages for _ in range(stage.approvals)]
    seat_of: dict[str, int] = {}

    def seated(seat: int, asked: set[str]) -> bool:
        for person in wanted[seat] - asked:
            asked.add(person)
            if person not in seat_of or seated(seat_of[person], asked):
                seat_of[person] = seat
                return True
        return False

    return all(seated(seat, set()) for seat in range(len(wanted)))
