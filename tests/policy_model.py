"""What the default policy must answer, written a second time from its documentation: slowly, plainly, and without Rego or an index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keybroker.authority.policy.grants import Deny, Grant, Quorum, Rules, Stage

SIGNING = {"sign", "sign-digest"}


@dataclass(frozen=True, slots=True)
class Expected:
    """The answer, with lists in order of the alphabet: which rules there are is documented, and their order is not."""

    allow: bool
    grants: list[str]
    reasons: list[str]


def fits(pattern: str, identity: str) -> bool:
    """`*` is one segment, `**` at the end is one or more, `**` alone is anybody."""
    if pattern == "**":
        return True
    wanted, given = pattern.split("/"), identity.split("/")
    if wanted[-1] == "**":
        wanted.pop()
        if len(given) <= len(wanted):
            return False
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(want in ("*", have) for want, have in zip(wanted, given, strict=True))


def any_fits(patterns: Sequence[str], identity: str) -> bool:
    return any(fits(pattern, identity) for pattern in patterns)


def concerns(rule: Grant | Deny, target: dict[str, Any]) -> bool:
    """Whether a rule names this target."""
    if target["kind"] == "key":
        return rule.keys == ("*",) or target["id"] in rule.keys
    named = {
        "trail": any_fits(rule.trails, target["workload"]),
        "workload": any_fits(rule.subjects, target["workload"]),
        "token": rule.tokens == ("*",) or target["id"] in rule.tokens,
        "everything": "**" in rule.subjects,
        "policy": "admin-policy" in rule.operations,
        "grant": target["id"] in rule.waives,
    }
    return named.get(target["kind"], False)


def is_inside(rule: Grant | Deny, asked: dict[str, Any]) -> bool:
    return not rule.networks or not set(rule.networks).isdisjoint(asked["caller"]["networks"])


def refuses(deny: Deny, asked: dict[str, Any]) -> bool:
    """Whether a deny fits: each selector that is given must. Whoever may not read one trail may not read the whole record."""
    target = asked["target"]
    is_whole = (deny.trails and target["kind"] == "trail" and not target["workload"]) or (deny.subjects and target["kind"] == "everything")
    names_targets = deny.keys or deny.trails or deny.subjects or deny.tokens or deny.waives
    return (
        any_fits(deny.workloads, asked["caller"]["spiffe_id"])
        and (not names_targets or concerns(deny, target) or bool(is_whole))
        and (not deny.operations or asked["operation"] in deny.operations)
        and (not deny.algorithms or asked["algorithm"] in {each.value for each in deny.algorithms})
        and is_inside(deny, asked)
    )


def may(grant: Grant, operation: str) -> bool:
    """Who may sign with a key may read its public half."""
    signs = not {"sign", "sign-digest"}.isdisjoint(grant.operations)
    return operation in grant.operations or (operation == "read-key" and signs)


def stages_of(grant: Grant) -> tuple[Stage, ...]:
    return grant.quorum.stages if isinstance(grant.quorum, Quorum) else ()


def demanded(rules: Rules, grant: Grant, operation: str) -> dict[str, Any]:
    """What a grant demands, as the policy must answer it. Only signing is a use of a key."""
    if operation == "approve":
        grant = Grant(id=grant.id, workloads=(), operations=())
    uses = operation in SIGNING
    asks_others = uses or operation in {"unfreeze", "admin-policy"}
    return {
        "grant": grant.id,
        "not_before": grant.not_before or "",
        "not_after": grant.not_after or "",
        "hours": [
            {"days": [each.days], "from": each.opens, "to": each.closes, "zone": each.zone, "except": list(each.excluded)}
            for each in grant.hours
            if uses
        ],
        "limits": [{"max": each.max, "window_s": int(each.window[:-1]), "per": each.per} for each in grant.limits if uses],
        "quorum": [
            {"approvals": each.approvals, "of": list(each.of), "people": list(rules.people_of(each.of))}
            for each in stages_of(grant)
            if asks_others
        ],
        "cool_off_s": 5 if asks_others and stages_of(grant) else 0,
        "expires_s": 60 if asks_others and stages_of(grant) else 0,
        "evidence": [],
        "observe_only": grant.observe_only,
    }


def may_approve(rules: Rules, grant: Grant, caller: str, target: dict[str, Any]) -> bool:
    """Whoever is in a stage's groups approves what the grant covers: the key or the change, asked for by this workload."""
    person = rules.person_of(caller)
    is_member = any(person in rules.people_of(stage.of) for stage in stages_of(grant))
    covers = target["id"] in grant.operations if target["kind"] == "change" else concerns(grant, target)
    return bool(person) and is_member and any_fits(grant.workloads, target["workload"]) and covers


def expected(rules: Rules, asked: dict[str, Any]) -> Expected:
    """Nothing said means no; all matching grants bind; a deny wins; who asks for its own trail may read it."""
    caller, target, operation = asked["caller"]["spiffe_id"], asked["target"], asked["operation"]
    named = [grant for grant in rules.grants if any_fits(grant.workloads, caller) and (concerns(grant, target) or target["kind"] == "any")]
    able = [grant for grant in named if may(grant, operation)]
    suited = [grant for grant in able if operation not in SIGNING or asked["algorithm"] in {each.value for each in grant.algorithms}]
    grants = [grant.id for grant in suited if is_inside(grant, asked)]
    if operation == "read-audit" and target["kind"] == "trail" and target["workload"] == caller:
        grants.append("own-trail")
    if operation == "approve" and target["kind"] in {"key", "change"}:
        grants += [grant.id for grant in rules.grants if may_approve(rules, grant, caller, target)]
    denied = [f"denied-by:{deny.id}" for deny in rules.denies if refuses(deny, asked)]
    reasons = list(denied)
    if not grants:
        rest = (("no-grant", named), ("operation-not-granted", able), ("algorithm-not-granted", suited))
        reasons.append(next((reason for reason, left in rest if not left), "network-not-granted"))
    allow = bool(grants) and not denied
    return Expected(allow, sorted(grants) if allow else [], sorted(reasons))
