"""Rules as the data that the policy walks, and the digest of the whole policy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from keybroker.audit.leaf import canonical
from keybroker.authority.policy.grants import Deny, Grant, Rules
from keybroker.authority.policy.pattern import Pattern


def compile_rules(rules: Rules, module_sha256: str, engine: str) -> tuple[bytes, str]:
    """The policy's `data` document, canonical JSON, and the digest of the whole policy, which is in it.

    Args:
        module_sha256: of the compiled Rego.
        engine: which engine decides, and its version.
    """
    document = {"grants": _index(rules.grants), "denies": _index(rules.denies)}
    networks = {name: [str(each) for each in ranges] for name, ranges in rules.networks.items()}
    parts = {
        "module": module_sha256,
        "data": hashlib.sha256(canonical(document)).hexdigest(),
        "networks": hashlib.sha256(canonical(networks)).hexdigest(),
        "engine": engine,
    }
    digest = hashlib.sha256(canonical(parts)).hexdigest()
    return canonical({"keybroker_rules": {**document, "policy": digest}}), digest


def _index(rules: Iterable[Grant | Deny]) -> dict[str, Any]:
    """Rules by whom they are for, so that a decision walks the caller's own rules, not everybody's."""
    shelves: dict[str, dict[str, list[dict[str, Any]]]] = {"exact": {}, "prefix": {}, "domain": {}}
    anybody: list[dict[str, Any]] = []
    for rule in rules:
        compiled = _compiled(rule)
        for pattern in map(Pattern.parse, rule.workloads):
            shelf, place = pattern.place
            entry = {**compiled, "path": pattern.path, "is_open": pattern.is_open}
            (anybody if shelf == "anybody" else shelves[shelf].setdefault(place, [])).append(entry)
    return {**shelves, "anybody": anybody}


def _compiled(rule: Grant | Deny) -> dict[str, Any]:
    operations = set(rule.operations)
    if isinstance(rule, Grant) and operations & {"sign", "sign-digest"}:
        operations.add("read-key")  # who may sign with a key may read its public half
    return {
        "id": rule.id,
        "operations": sorted(operations),
        "keys": rule.keys,
        "algorithms": tuple(each.value for each in rule.algorithms),
        "networks": rule.networks,
        "trails": tuple(_trail(Pattern.parse(text)) for text in rule.trails),
    }


def _trail(pattern: Pattern) -> dict[str, Any]:
    """A trail pattern as the policy compares it: with the segments of `split(spiffe_id, "/")`."""
    path = () if pattern.is_anybody else ("spiffe:", "", pattern.trust_domain, *pattern.path)
    return {"is_any": pattern.is_anybody, "is_open": pattern.is_open, "path": path}
