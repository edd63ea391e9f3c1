"""`keybroker policy check`: what is wrong with a policy, found in the rules themselves.

Obligations add up: all matching grants bind together. So a grant whose every use another grant gives already is superfluous only if it
demands nothing. If it does demand something, it makes those uses stricter, and taking it out would loosen them. And a grant that
demands nothing lifts nothing that another one demands.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from keybroker.authority.policy.compiler import obligation_of
from keybroker.authority.policy.grants import Deny, Grant
from keybroker.authority.trial import candidate as candidates
from keybroker.authority.trial.candidate import Candidate, Inventory
from keybroker.authority.trial.check_demands import check_demands, unused_names
from keybroker.authority.trial.findings import Finding, Severity
from keybroker.authority.trial.region import SIGNING, Box, BoxIndex, all_rules, boxes_of, intersection, is_covered, own_trail
from keybroker.authority.trial.words import listed
from keybroker.authority.trial.zones import Zones
from keybroker.errors import ConfigError

_ORDER = list(Severity)


def check(directory: Path, policy: Path | None, inventory: Inventory, now_us: int) -> list[Finding]:
    """Everything that there is to say about a directory of grant files, the worst first.

    Args:
        policy: another compiled policy than the one that is built in.
        inventory: the keys that there are.
        now_us: microseconds since the epoch, to find what has expired.
    """
    try:
        loaded = candidates.load(directory, policy)
    except ConfigError as err:
        return [_refused(line) for line in str(err).splitlines()]
    found = [
        *(_loading(line) for line in loaded.rules.warnings),
        *_keys(loaded, inventory),
        *_Reach(loaded).findings(),
        *unused_names(loaded),
        *check_demands(loaded, now_us),
    ]
    return sorted(found, key=lambda each: (_ORDER.index(each.severity), *_file_and_line(each), each.code))


def _file_and_line(finding: Finding) -> tuple[str, int]:
    file, _, line = finding.where.rpartition(":")
    return file, int(line) if line.isdecimal() else 0


def _refused(line: str) -> Finding:
    """A line of the loader's: `file:line: field: what is wrong; cure`."""
    where, _, text = line.partition(": ")
    text, _, cure = text.partition("; ")
    return Finding.of("cannot-be-loaded", where, "", text, cure)


def _loading(line: str) -> Finding:
    where, _, text = line.partition(": ")
    return Finding.of("worth-a-look", where, "", text)


def _keys(loaded: Candidate, inventory: Inventory) -> Iterator[Finding]:
    """Keys that do not exist, and keys that cannot do what is granted."""
    for rule in all_rules(loaded.rules):
        for index, key in enumerate(rule.keys):
            if key == "*" or inventory.keys is None:
                continue
            where = loaded.places.rule(rule.id, "keys", index)
            if key not in inventory.keys:
                text = f"{rule.id} names the key {key}, which is not in the configuration"
                yield Finding.of("unknown-key", where, rule.id, text)
                continue
            family = inventory.families.get(key)
            if family is None or isinstance(rule, Deny) or SIGNING.isdisjoint(rule.operations):
                continue
            able = [each.value for each in rule.algorithms if each.family is family]
            if not able:
                names = ", ".join(each.value for each in rule.algorithms)
                text = f"{rule.id} lets nobody sign with {key}: it is a key of the family {family.value}, which cannot do {names}"
                yield Finding.of("key-cannot-sign", where, rule.id, text)


class _Reach:
    """Rules that change nothing, and why.

    A rule that was found superfluous gives nothing to the next one, so whoever takes out all of them changes no answer.
    """

    def __init__(self, loaded: Candidate) -> None:
        self._places = loaded.places
        self._rules = rules = loaded.rules
        zones = Zones(rules.networks)
        self._own_trail = own_trail(zones)
        self._boxes = {rule.id: list(boxes_of(rule, rules, zones)) for rule in all_rules(rules)}
        self._denied = BoxIndex(box for deny in rules.denies for box in self._boxes[deny.id])
        self._granted = BoxIndex([self._own_trail, *(box for grant in rules.grants for box in self._boxes[grant.id])])
        self._demanding = {grant.id for grant in rules.grants if not obligation_of(grant, rules).is_empty}
        self._superfluous: set[str] = set()

    def findings(self) -> Iterator[Finding]:
        """All of them."""
        for grant in self._rules.grants:
            dead = [box for box in self._boxes[grant.id] if is_covered(box, self._denied.covering(box))]
            if dead:
                yield self._denied_grant(grant, dead)
            if len(dead) < len(self._boxes[grant.id]):
                yield from self._given_elsewhere(grant)
        for deny in self._rules.denies:
            yield from self._without_effect(deny)

    def _denied_grant(self, grant: Grant, dead: list[Box]) -> Finding:
        where = self._places.rule(grant.id)
        who = listed(each.source for box in dead for each in self._denied.covering(box) if intersection(box, each))
        if len(dead) == len(self._boxes[grant.id]):
            text = f"{grant.id} gives nothing: every use that it covers is denied by {who}"
            return Finding.of("unreachable-grant", where, grant.id, text)
        parts = listed(sorted({f"{box.operation} for {box.workloads.text}" for box in dead}))
        text = f"{grant.id} gives less than it says: {parts} is denied by {who}"
        return Finding.of("partly-unreachable-grant", where, grant.id, text)

    def _given_elsewhere(self, grant: Grant) -> Iterator[Finding]:
        givers = self._coverers(grant, self._granted)
        if not givers:
            return
        where, names = self._places.rule(grant.id), listed(givers)
        if grant.id in self._demanding:
            text = f"{grant.id} gives nothing that {names} does not give; it only adds what it demands, because obligations add up"
            yield Finding.of("only-tightens", where, grant.id, text)
        elif self._demanding.intersection(givers):
            text = f"{grant.id} lifts nothing: {names} gives the same uses, and its demands bind all the same, because obligations add up"
            yield Finding.of("does-not-loosen", where, grant.id, text)
        else:
            self._superfluous.add(grant.id)
            yield Finding.of("superfluous-grant", where, grant.id, f"{grant.id} gives nothing that {names} does not give")

    def _without_effect(self, deny: Deny) -> Iterator[Finding]:
        where = self._places.rule(deny.id)
        others = self._coverers(deny, self._denied)
        if others:
            self._superfluous.add(deny.id)
            yield Finding.of("superfluous-deny", where, deny.id, f"{deny.id} denies nothing that {listed(others)} does not deny")
            return
        given = [self._own_trail, *(box for grant in self._rules.grants for box in self._boxes[grant.id])]
        if not any(intersection(box, each) for box in self._boxes[deny.id] for each in given):
            yield Finding.of("idle-deny", where, deny.id, f"{deny.id} denies nothing that any grant gives now")

    def _coverers(self, rule: Grant | Deny, index: BoxIndex) -> list[str]:
        """The other rules that cover all of this one; none if they leave something."""
        sources: set[str] = set()
        for box in self._boxes[rule.id]:
            near = [each for each in index.covering(box) if each.source != rule.id and each.source not in self._superfluous]
            if not is_covered(box, near):
                return []
            sources |= {each.source for each in near if intersection(box, each)}
        return sorted(sources)
