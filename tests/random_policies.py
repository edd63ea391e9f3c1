"""Random policies over few names, so that rules meet, cover and deny each other; changes of them; and requests that come close."""

from __future__ import annotations

import ipaddress
import random
from typing import Any, get_args

import msgspec

from keybroker.audit.leaf import canonical
from keybroker.authority.policy.grants import Deny, Grant, Hours, LimitRule, Network, Operation, Quorum, Rules, Stage
from keybroker.model.decision import CallerInput, PolicyInput, TargetInput
from keybroker.model.identity import SpiffeId
from keybroker.model.key import Algorithm

DOMAINS = ("example.org", "example.com")
SEGMENTS = ("a", "b", "c")
KEYS = ("orders", "release")
OPERATIONS: tuple[str, ...] = tuple(dict.fromkeys((*get_args(Operation), "approve")))
GRANTED = tuple(each for each in OPERATIONS if each != "approve")  # which is granted by a place in a group
KEY_OPERATIONS = {"sign", "sign-digest", "read-key"}
FREEZING = {"freeze", "unfreeze"}
TOKENS = ("blue", "green")
ALGORITHMS = (Algorithm.ES256, Algorithm.PS256, Algorithm.ED25519)
RANGES = tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "10.1.0.0/16", "10.2.0.0/16", "192.0.2.0/24", "2001:db8::/32")))
ADDRESSES = ("10.1.0.1", "10.2.0.1", "10.9.0.1", "192.0.2.1", "2001:db8::1", "198.51.100.1", "2001:db9::1")
NAMES = ("lab", "office")
PEOPLE: dict[str, tuple[str, ...]] = {name: (f"spiffe://example.org/human/{name}",) for name in ("alice", "bob", "carol")}
GROUPS: dict[str, tuple[str, ...]] = {"managers": ("alice", "bob"), "legal": ("bob", "carol")}
NO_DEMANDS = {"not_after": msgspec.UNSET, "limits": (), "hours": (), "quorum": msgspec.UNSET, "observe_only": False}


class PolicyMaker:
    """Makes policies and requests from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def some(self, values: tuple[Any, ...], most: int = 2) -> tuple[Any, ...]:
        return tuple(self.random.sample(values, self.random.randint(1, min(most, len(values)))))

    def maybe(self, values: tuple[Any, ...], chance: float) -> tuple[Any, ...]:
        return self.some(values) if self.random.random() < chance else ()

    def pattern(self) -> str:
        if self.random.random() < 0.1:
            return "**"
        path = [self.random.choice((*SEGMENTS, "*", "*")) for _ in range(self.random.randint(1, 3))]
        if self.random.random() < 0.4:
            path[-1] = "**"
        return f"spiffe://{self.random.choice((DOMAINS[0], *DOMAINS))}/{'/'.join(path)}"

    def patterns(self) -> tuple[str, ...]:
        return tuple({self.pattern(): None for _ in range(self.random.randint(1, 2))})

    def keys(self) -> tuple[str, ...]:
        return ("*",) if self.random.random() < 0.2 else self.some(KEYS)

    def rules(self) -> Rules:
        grants = tuple(self.grant(f"g{number}") for number in range(self.random.choice((0, 1, 2, 4, 6))))
        denies = tuple(self.deny(f"d{number}") for number in range(self.random.choice((0, 0, 1, 2, 3))))
        return Rules(grants, denies, self.networks(), (), PEOPLE, GROUPS)

    def networks(self) -> dict[str, tuple[Network, ...]]:
        return {name: self.some(RANGES) for name in NAMES}

    def grant(self, name: str) -> Grant:
        operations = set(self.some(GRANTED))
        signs = not {"sign", "sign-digest"}.isdisjoint(operations)
        freezes = not FREEZING.isdisjoint(operations)
        targets: dict[str, Any] = {}
        if operations & KEY_OPERATIONS or (freezes and self.random.random() < 0.5):
            targets["keys"] = self.keys()
        if "read-audit" in operations:
            targets["trails"] = self.patterns()
        if freezes:
            targets |= {"subjects": self.patterns(), "tokens": self.maybe(TOKENS, 0.5)}
        if "break-glass" in operations:
            targets["waives"] = self.some(("g0", "g1"))
        return Grant(
            id=name,
            workloads=self.patterns(),
            operations=tuple(sorted(operations)),
            algorithms=self.some(ALGORITHMS) if signs else (),
            networks=self.maybe(NAMES, 0.3),
            **targets,
            **self.demands(signs=signs),
        )

    def demands(self, *, signs: bool) -> dict[str, Any]:
        """Now and then what a grant demands, out of few, so that demands of different grants keep each other."""
        demands: dict[str, Any] = {}
        if self.random.random() < 0.2:
            demands["not_after"] = self.random.choice(("2027-01-01T00:00:00Z", "2028-01-01T00:00:00Z"))
        if signs and self.random.random() < 0.3:
            demands["limits"] = (LimitRule(max=self.random.choice((10, 100)), window="1m", per="workload"),)
        if signs and self.random.random() < 0.2:
            demands["hours"] = (Hours(days=self.random.choice(("mon", "mon-fri")), opens="08:00", closes="18:00", zone="UTC"),)
        if signs and self.random.random() < 0.2:
            demands["quorum"] = Quorum(stages=(Stage(approvals=self.random.randint(1, 2), of=self.some(tuple(GROUPS))),), expires="1h")
        if demands and self.random.random() < 0.3:
            demands["observe_only"] = True
        return demands

    def deny(self, name: str) -> Deny:
        targets: dict[str, Any] = {
            "keys": self.keys() if self.random.random() < 0.4 else (),
            "trails": self.patterns() if self.random.random() < 0.3 else (),
        }
        if "freeze" in OPERATIONS and self.random.random() < 0.3:
            targets |= {"subjects": self.patterns(), "tokens": self.maybe(TOKENS, 0.5), "waives": self.maybe(("g0", "g1"), 0.5)}
        return Deny(
            id=name,
            workloads=self.patterns(),
            operations=self.maybe(OPERATIONS, 0.5),
            algorithms=self.maybe(ALGORITHMS, 0.3),
            networks=self.maybe(NAMES, 0.3),
            **targets,
        )

    def changed(self, rules: Rules) -> Rules:
        """Other rules that have much in common with these."""
        grants, denies, networks, groups = list(rules.grants), list(rules.denies), rules.networks, rules.groups
        for _ in range(self.random.randint(1, 3)):
            match self.random.randrange(8):
                case 0 if grants:
                    grants.pop(self.random.randrange(len(grants)))
                case 1:
                    grants.append(self.grant(f"n{len(grants)}-{self.random.randrange(10**6)}"))
                case 2 if grants:
                    place = self.random.randrange(len(grants))
                    other = self.grant(grants[place].id)
                    name = self.random.choice(("workloads", "networks"))
                    grants[place] = msgspec.structs.replace(grants[place], **{name: getattr(other, name)})
                case 6 if grants:
                    place = self.random.randrange(len(grants))
                    signs = not {"sign", "sign-digest"}.isdisjoint(grants[place].operations)
                    grants[place] = msgspec.structs.replace(grants[place], **(NO_DEMANDS | self.demands(signs=signs)))
                case 7:
                    groups = {"managers": ("alice", "bob", "carol"), "legal": ("carol",)}
                case 3 if denies:
                    denies.pop(self.random.randrange(len(denies)))
                case 4:
                    denies.append(self.deny(f"n{len(denies)}-{self.random.randrange(10**6)}"))
                case _:
                    networks = self.networks()
        return Rules(tuple(grants), tuple(denies), networks, (), PEOPLE, groups)

    def identity(self) -> SpiffeId:
        path = "/".join(self.random.choice((*SEGMENTS, "z")) for _ in range(self.random.choice((1, 1, 2, 2, 3, 4))))
        return SpiffeId.parse(f"spiffe://{self.random.choice((DOMAINS[0], *DOMAINS, 'z.org'))}/{path}")

    def address(self) -> str:
        return self.random.choice(ADDRESSES)

    def request(self) -> PolicyInput:
        """From no network yet: `seen_from` says from which."""
        operation: str = self.random.choice(OPERATIONS)
        caller = self.approver() if operation == "approve" else self.identity()
        algorithm = self.random.choice(ALGORITHMS).value if operation in {"sign", "sign-digest"} else ""
        target = self.target(operation, caller)
        return PolicyInput(CallerInput(caller.text, caller.trust_domain, caller.path, ()), operation, target, algorithm=algorithm)

    def approver(self) -> SpiffeId:
        """Mostly somebody with a name."""
        return SpiffeId.parse(self.random.choice([*(each for identities in PEOPLE.values() for each in identities), self.identity().text]))

    def target(self, operation: str, caller: SpiffeId) -> TargetInput:
        """Something that the operation is about."""
        key = TargetInput("key", self.random.choice((*KEYS, "other")))
        match operation:
            case "read-audit":
                return TargetInput("trail", "", self.random.choice(("", caller.text, self.identity().text, self.identity().text)))
            case "approve":
                change = TargetInput("change", self.random.choice(("unfreeze", "admin-policy")))
                about = self.random.choice((key, change)) if "admin-policy" in OPERATIONS else key
                return msgspec.structs.replace(about, workload=self.identity().text)
            case "freeze" | "unfreeze":
                others = (TargetInput("workload", "", self.identity().text), TargetInput("token", self.random.choice(TOKENS)))
                return self.random.choice((key, *others, TargetInput("everything")))
            case "admin-policy":
                return TargetInput("policy")
            case "break-glass":
                return TargetInput("grant", self.random.choice(("g0", "g1", "g2")))
            case _:
                return key

    def near(self, *policies: Rules) -> PolicyInput:
        """A request that some grant of some policies covers, or that somebody may approve, as far as denies and networks let it."""
        grants = [grant for rules in policies for grant in rules.grants]
        if not grants or self.random.random() < 0.3:
            return self.request()
        grant = self.random.choice(grants)
        operation: str = self.random.choice(grant.operations)
        if grant.quorum and self.random.random() < 0.3:
            operation = "approve"
        caller = self.approver() if operation == "approve" else self.within(self.random.choice(grant.workloads))
        target = self.target(operation, caller)
        if operation == "read-audit":
            target = TargetInput("trail", "", self.within(self.random.choice(grant.trails)).text)
        elif target.kind == "key" and grant.keys:
            target = msgspec.structs.replace(target, id=self.random.choice(grant.keys).replace("*", "other"))
        if operation == "approve":
            target = msgspec.structs.replace(target, workload=self.within(self.random.choice(grant.workloads)).text)
        algorithm = self.random.choice(grant.algorithms).value if operation in {"sign", "sign-digest"} else ""
        return PolicyInput(CallerInput(caller.text, caller.trust_domain, caller.path, ()), operation, target, algorithm=algorithm)

    def within(self, pattern: str) -> SpiffeId:
        """An identity in a pattern."""
        if pattern == "**":
            return self.identity()
        ends = "/".join(self.random.choice(SEGMENTS) for _ in range(self.random.randint(1, 2)))
        text = f"{pattern.removesuffix('**')}{ends}" if pattern.endswith("**") else pattern
        return SpiffeId.parse("/".join(self.random.choice(SEGMENTS) if segment == "*" else segment for segment in text.split("/")))


def seen_from(request: PolicyInput, rules: Rules, address: str) -> bytes:
    """The request as a policy sees it that comes from an address: canonical JSON."""
    caller = msgspec.structs.replace(request.caller, networks=rules.networks_of(address))
    return canonical(msgspec.structs.replace(request, caller=caller))
