"""What a grant file may say, typed; `loader` reads and checks. A field that is not here is refused, never ignored."""

from __future__ import annotations

import functools
import ipaddress
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import msgspec

from keybroker.model.decision import MAX_UNITS, Day, Per
from keybroker.model.key import KEY_NAME, Algorithm

OWN_TRAIL = "own-trail"

Operation = Literal["sign", "sign-digest", "read-key", "read-audit", "freeze", "unfreeze", "admin-policy", "break-glass"]
Denied = Literal[Operation, "approve"]  # whoever is in a group of a quorum may approve, without a grant

RULE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
DAYS: tuple[Day, ...] = get_args(Day)
TOKEN_NAME = re.compile(r"\*|[a-z0-9][a-z0-9-]{0,31}")
NOT_BUILT = frozenset({"evidence"})

_DAY = f"({'|'.join(DAYS)})"
DAYS_FORM = re.compile(rf"{_DAY}(-{_DAY})?(, ?{_DAY}(-{_DAY})?)*")
DURATION = re.compile(r"(0|[1-9][0-9]{0,6})([smhd])")
CLOCK = re.compile(r"([01][0-9]|2[0-3]):[0-5][0-9]|24:00")
DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
MOMENT = re.compile(rf"{DATE.pattern}T[0-9]{{2}}:[0-9]{{2}}:[0-9]{{2}}Z")


def _list_schema(description: str) -> msgspec.Meta:
    """For editors only. The loader refuses an empty list too, in words of its own."""
    return msgspec.Meta(description=description, extra_json_schema={"minItems": 1})


def _text_schema(form: str, description: str) -> msgspec.Meta:
    """For editors only, like the lists."""
    return msgspec.Meta(description=description, extra_json_schema={"pattern": f"^({form})$"})


_Name = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": f"^{RULE_NAME.pattern}$"})]
_PatternText = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": r"^(\*\*|spiffe://[a-z0-9._-]+/[a-zA-Z0-9._*/-]+)$"})]
_Workloads = Annotated[
    tuple[_PatternText, ...],
    _list_schema("SPIFFE ID patterns: `*` is one path segment, `**` (last only) is one or more; `**` alone is anybody."),
]
_Operations = Annotated[tuple[Operation, ...], _list_schema("What may be done.")]
_Keys = Annotated[
    tuple[Annotated[str, msgspec.Meta(extra_json_schema={"pattern": rf"^(\*|{KEY_NAME.pattern})$"})], ...],
    _list_schema('Key names; `["*"]` alone is every key.'),
]
_Algorithms = Annotated[tuple[Algorithm, ...], _list_schema("JOSE names; a grant that signs needs them.")]
_Trails = Annotated[tuple[_PatternText, ...], _list_schema("Whose records; patterns like `workloads`, and `**` alone is the whole record.")]
_Subjects = Annotated[
    tuple[_PatternText, ...], _list_schema("Whom a freeze may stop; patterns like `workloads`, and `**` alone is everybody and everything.")
]
_Tokens = Annotated[
    tuple[Annotated[str, msgspec.Meta(extra_json_schema={"pattern": f"^({TOKEN_NAME.pattern})$"})], ...],
    _list_schema('Tokens that a freeze may stop; `["*"]` alone is every token.'),
]
_Waives = Annotated[tuple[_Name, ...], _list_schema("Ids of the grants whose hours, limits and quorum `break-glass` may waive.")]
_Networks = Annotated[tuple[_Name, ...], _list_schema("Only from these named networks.")]
_Moment = Annotated[str, _text_schema(MOMENT.pattern, "A moment in UTC, such as 2027-06-30T00:00:00Z.")]
_Clock = Annotated[str, _text_schema(CLOCK.pattern, "HH:MM, in quotes; 24:00 is the end of the day.")]
_Groups = Annotated[tuple[_Name, ...], _list_schema("Groups; everybody in one of them may approve.")]
_Approvals = Annotated[int, msgspec.Meta(description="How many different people must approve.", extra_json_schema={"minimum": 1})]


class Hours(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """When a key may be used."""

    days: Annotated[str, _text_schema(DAYS_FORM.pattern, "On which days it begins: mon-fri, or mon,wed,sat-sun.")]
    opens: _Clock = msgspec.field(name="from")
    closes: _Clock = msgspec.field(name="to")
    zone: Annotated[str, msgspec.Meta(description="IANA time zone, such as Europe/Berlin.")]
    excluded: Annotated[tuple[Annotated[str, _text_schema(DATE.pattern, "")], ...], _list_schema("Dates that are closed.")] = msgspec.field(
        name="except", default=()
    )


class LimitRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Never more than so many uses in any window of that length."""

    max: Annotated[int, msgspec.Meta(description="Uses in any one window.", extra_json_schema={"minimum": 1, "maximum": MAX_UNITS})]
    window: Annotated[str, _text_schema(DURATION.pattern, "From 1s to 31d: a number and s, m, h or d.")]
    per: Annotated[Per, msgspec.Meta(description="What is counted apart.")]


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Approvals of one kind."""

    approvals: _Approvals
    of: _Groups


class Quorum(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who must approve before a use: either `approvals` and `of`, or `stages`."""

    approvals: _Approvals | msgspec.UnsetType = msgspec.UNSET
    of: _Groups = ()
    stages: Annotated[tuple[Stage, ...], _list_schema("One after the other.")] = ()
    expires: Annotated[str, _text_schema(DURATION.pattern, "How long all of it may take, from 1s to 31d.")]
    cool_off: Annotated[str, _text_schema(DURATION.pattern, "How long to wait after the last approval.")] = "0s"

    def in_stages(self) -> tuple[Stage, ...]:
        """The stages, of which there is one where none are written."""
        return self.stages or (Stage(approvals=self.approvals if isinstance(self.approvals, int) else 0, of=self.of),)


class Grant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One yes: who, which keys, what, and what is demanded beyond it."""

    id: Annotated[_Name, msgspec.Meta(description="Unique over all files; stands in every record that this grant allowed.")]
    workloads: _Workloads
    operations: _Operations
    keys: _Keys = ()
    algorithms: _Algorithms = ()
    trails: _Trails = ()
    subjects: _Subjects = ()
    tokens: _Tokens = ()
    waives: _Waives = ()
    networks: _Networks = ()
    not_before: _Moment | msgspec.UnsetType = msgspec.UNSET
    not_after: _Moment | msgspec.UnsetType = msgspec.UNSET
    hours: Annotated[tuple[Hours, ...], _list_schema("Open if one of them is.")] = ()
    limits: Annotated[tuple[LimitRule, ...], _list_schema("All of them bind.")] = ()
    quorum: Quorum | msgspec.UnsetType = msgspec.UNSET
    observe_only: Annotated[bool, msgspec.Meta(description="What this grant demands is watched and recorded, and does not bind.")] = False


class Deny(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One no; it wins over every grant. A selector that is not given fits everything; several kinds of targets fit each."""

    id: Annotated[_Name, msgspec.Meta(description="Unique over all files; stands in the reasons of what it refuses.")]
    workloads: _Workloads
    operations: Annotated[tuple[Denied, ...], _list_schema("What may not be done.")] = ()
    keys: _Keys = ()
    algorithms: _Algorithms = ()
    trails: _Trails = ()
    subjects: _Subjects = ()
    tokens: _Tokens = ()
    waives: _Waives = ()
    networks: _Networks = ()


class GrantFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file of rules. All files of a directory count together."""

    grants: tuple[Grant, ...] = ()
    denies: tuple[Deny, ...] = ()
    networks: Annotated[
        dict[_Name, Annotated[tuple[str, ...], _list_schema("Ranges such as 192.0.2.0/24.")]],
        msgspec.Meta(description="Names for address ranges, for `networks` in rules."),
    ] = {}
    people: Annotated[
        dict[_Name, Annotated[tuple[str, ...], _list_schema("SPIFFE IDs, written out.")]],
        msgspec.Meta(description="Who is behind which identities: one person may have several, and counts once."),
    ] = {}
    groups: Annotated[
        dict[_Name, Annotated[tuple[_Name, ...], _list_schema("People.")]],
        msgspec.Meta(description="Names for people together, for `of` in quorums."),
    ] = {}


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Rules:
    """All files of a directory, checked.

    Attributes:
        warnings: what is allowed but probably not meant, for example a key that does not exist.
        people: the identities of each person.
        groups: the people of each group.
    """

    grants: tuple[Grant, ...]
    denies: tuple[Deny, ...]
    networks: dict[str, tuple[Network, ...]]
    warnings: tuple[str, ...]
    people: dict[str, tuple[str, ...]] = field(default_factory=dict)
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def networks_of(self, address: str) -> tuple[str, ...]:
        """The named networks that an address is in, in order of name."""
        parsed = _parsed(address)
        if parsed is None:
            return ()
        return tuple(name for name, ranges in self.networks.items() if any(parsed in each for each in ranges))

    def person_of(self, spiffe_id: str) -> str:
        """The name of the person behind an identity; empty if it is nobody's."""
        return next((name for name, identities in self.people.items() if spiffe_id in identities), "")

    def people_of(self, groups: tuple[str, ...]) -> tuple[str, ...]:
        """Everybody in these groups, each once, in order of name."""
        return tuple(sorted({person for group in groups for person in self.groups.get(group, ())}))


@functools.lru_cache(maxsize=4_096)  # asked on every request, and parsing one costs more than all else that identifies a caller
def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    return parsed.ipv4_mapped or parsed if isinstance(parsed, ipaddress.IPv6Address) else parsed


def seconds_of(duration: str) -> int:
    """The seconds of a duration that the loader has checked.

    Raises:
        ValueError: it is none.
    """
    match = DURATION.fullmatch(duration)
    if match is None:
        raise ValueError(duration)
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]


def days_of(text: str) -> tuple[Day, ...]:
    """The days of `mon-fri` or `mon,wed`, in order of the week, each once; a range may go over the end of the week.

    Raises:
        ValueError: it is none of these.
    """
    if DAYS_FORM.fullmatch(text) is None:
        raise ValueError(text)
    found: set[str] = set()
    for part in text.replace(" ", "").split(","):
        first, _, last = part.partition("-")
        names: tuple[str, ...] = DAYS
        begin, end = names.index(first), names.index(last or first)
        found.update(DAYS[index % 7] for index in range(begin, end + 1 if end >= begin else end + 8))
    return tuple(day for day in DAYS if day in found)


def schema() -> dict[str, Any]:
    """JSON Schema 2020-12 of a grant file, for editors."""
    made: dict[str, Any] = msgspec.json.schema(GrantFile)
    for definition in made["$defs"].values():
        for member in definition.get("properties", {}).values():
            member.pop("default", None)  # "not given" is not the empty list, which is refused
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "keybroker grants", **made}
