"""Rules as the data that the policy walks, and the digest of the whole policy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec

from keybroker.audit.leaf import canonical
from keybroker.authority.policy.grants import Deny, Grant, Hours, Quorum, Rules, days_of, seconds_of
from keybroker.authority.policy.pattern import Pattern
from keybroker.model.decision import HoursWindow, Limit, Obligation, QuorumStage


def compile_rules(rules: Rules, module_sha256: str, engine: str) -> tuple[bytes, str]:
    """The policy's `data` document, canonical JSON, and the digest of the whole policy, which is in it.

    Args:
        module_sha256: of the compiled Rego.
        engine: which engine decides, and its version.
    """
    document = {
        "grants": _index(rules.grants, rules),
        "denies": _index(rules.denies, rules),
        "people": {identity: name for name, identities in rules.people.items() for identity in identities},
        "groups": rules.groups,
    }
    networks = {name: [str(each) for each in ranges] for name, ranges in rules.networks.items()}
    parts = {
        "module": module_sha256,
        "data": hashlib.sha256(canonical(document)).hexdigest(),
        "networks": hashlib.sha256(canonical(networks)).hexdigest(),
        "engine": engine,
    }
    digest = hashlib.sha256(canonical(parts)).hexdigest()
    return canonical({"keybroker_rules": {**document, "policy": digest}}), digest


def _index(some: Iterable[Grant | Deny], rules: Rules) -> dict[str, Any]:
    """Rules by whom they are for, so that a decision walks the caller's own rules, not everybody's."""
    shelves: dict[str, dict[str, list[dict[str, Any]]]] = {"exact": {}, "prefix": {}, "domain": {}}
    anybody: list[dict[str, Any]] = []
    for rule in some:
        compiled = _compiled(rule, rules)
        for pattern in map(Pattern.parse, rule.workloads):
            shelf, place = pattern.place
            entry = {**compiled, "path": pattern.path, "is_open": pattern.is_open}
            (anybody if shelf == "anybody" else shelves[shelf].setdefault(place, [])).append(entry)
    return {**shelves, "anybody": anybody}


def _compiled(rule: Grant | Deny, rules: Rules) -> dict[str, Any]:
    operations = set(rule.operations)
    if isinstance(rule, Grant) and operations & {"sign", "sign-digest"}:
        operations.add("read-key")  # who may sign with a key may read its public half
    demands = _demands(rule, rules) if isinstance(rule, Grant) else {}
    return {
        "id": rule.id,
        **demands,
        "operations": sorted(operations),
        "keys": rule.keys,
        "algorithms": tuple(each.value for each in rule.algorithms),
        "networks": rule.networks,
        "trails": tuple(_identities(Pattern.parse(text)) for text in rule.trails),
        "subjects": tuple(_identities(Pattern.parse(text)) for text in rule.subjects),
        "tokens": rule.tokens,
        "waives": rule.waives,
    }


def _demands(grant: Grant, rules: Rules) -> dict[str, Obligation]:
    """What is demanded, by what is done."""
    obligation = obligation_of(grant, rules)
    return {
        "obligation": obligation,
        "when_changed": msgspec.structs.replace(obligation, hours=(), limits=()),
        "when_read": when_read_of(grant),
    }


def when_read_of(grant: Grant) -> Obligation:
    """What is demanded of one who reads the key or the record: limits, hours and quorums are about what is done."""
    return Obligation(grant.id, grant.not_before or "", grant.not_after or "", (), (), (), 0, 0, (), observe_only=grant.observe_only)


def obligation_of(grant: Grant, rules: Rules) -> Obligation:
    """What is demanded of one who uses a key by this grant."""
    quorum = grant.quorum if isinstance(grant.quorum, Quorum) else None
    return Obligation(
        grant=grant.id,
        not_before=grant.not_before or "",
        not_after=grant.not_after or "",
        hours=tuple(_hours(each) for each in grant.hours),
        limits=tuple(Limit(each.max, seconds_of(each.window), each.per) for each in grant.limits),
        quorum=tuple(QuorumStage(each.approvals, each.of, rules.people_of(each.of)) for each in quorum.in_stages()) if quorum else (),
        cool_off_s=seconds_of(quorum.cool_off) if quorum else 0,
        expires_s=seconds_of(quorum.expires) if quorum else 0,
        evidence=(),
        observe_only=grant.observe_only,
    )


def _hours(hours: Hours) -> HoursWindow:
    return HoursWindow(days_of(hours.days), hours.opens, hours.closes, hours.zone, tuple(sorted(hours.excluded)))


def _identities(pattern: Pattern) -> dict[str, Any]:
    """A pattern of trails or subjects as the policy compares it: with the segments of `split(spiffe_id, "/")`."""
    path = () if pattern.is_anybody else ("spiffe:", "", pattern.trust_domain, *pattern.path)
    return {"is_any": pattern.is_anybody, "is_open": pattern.is_open, "path": path}
