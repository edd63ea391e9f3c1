"""Grant files: loaded strictly, with file and line in each error.

A field that this version does not build (limits, hours, quorum ...) is refused, never ignored: half a rule is another rule.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec

from keybroker.authority.policy.pattern import Pattern, PatternError
from keybroker.errors import ConfigError
from keybroker.model.key import KEY_NAME, Algorithm
from keybroker.yaml_document import Step, YamlDocument

OWN_TRAIL = "own-trail"

Operation = Literal["sign", "sign-digest", "read-key", "read-audit"]

_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RANGE = re.compile(r"[0-9a-fA-F.:]+(/[0-9]{1,3})?")  # without netmasks and zones
_ENDS_WITH = " - at `"
_CHOICES = {"operations": get_args(Operation), "algorithms": tuple(each.value for each in Algorithm)}
_SIGNING = frozenset({"sign", "sign-digest"})
_SELECTORS = ("workloads", "operations", "keys", "algorithms", "trails", "networks")
_CROWD = 2_000  # rules; a decision that walks about three times as many runs out of fuel
_NOT_BUILT = frozenset({
    "limits", "hours", "quorum", "stages", "not_before", "not_after", "evidence", "observe_only", "people", "groups", "cool_off", "expires",
})  # fmt: skip


def _list_schema(description: str) -> msgspec.Meta:
    """For editors only. The loader refuses an empty list too, in words of its own."""
    return msgspec.Meta(description=description, extra_json_schema={"minItems": 1})


_Name = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": f"^{_ID.pattern}$"})]
_PatternText = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": r"^(\*\*|spiffe://[a-z0-9._-]+/[a-zA-Z0-9._*/-]+)$"})]
_Workloads = Annotated[
    tuple[_PatternText, ...],
    _list_schema("SPIFFE ID patterns: `*` is one path segment, `**` (last only) is one or more; `**` alone is anybody."),
]
_Operations = Annotated[tuple[Operation, ...], _list_schema("What may be done, or for a deny what may not.")]
_Keys = Annotated[
    tuple[Annotated[str, msgspec.Meta(extra_json_schema={"pattern": rf"^(\*|{KEY_NAME.pattern})$"})], ...],
    _list_schema('Key names; `["*"]` alone is every key.'),
]
_Algorithms = Annotated[tuple[Algorithm, ...], _list_schema("JOSE names; a grant that signs needs them.")]
_Trails = Annotated[tuple[_PatternText, ...], _list_schema("Whose records; patterns like `workloads`, and `**` alone is the whole record.")]
_Networks = Annotated[tuple[_Name, ...], _list_schema("Only from these named networks.")]


class Grant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One yes: who, which keys, what."""

    id: Annotated[_Name, msgspec.Meta(description="Unique over all files; stands in every record that this grant allowed.")]
    workloads: _Workloads
    operations: _Operations
    keys: _Keys = ()
    algorithms: _Algorithms = ()
    trails: _Trails = ()
    networks: _Networks = ()


class Deny(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One no; it wins over every grant. A selector that is not given fits everything; `keys` and `trails` together fit either."""

    id: Annotated[_Name, msgspec.Meta(description="Unique over all files; stands in the reasons of what it refuses.")]
    workloads: _Workloads
    operations: _Operations = ()
    keys: _Keys = ()
    algorithms: _Algorithms = ()
    trails: _Trails = ()
    networks: _Networks = ()


class GrantFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file of rules. All files of a directory count together."""

    grants: tuple[Grant, ...] = ()
    denies: tuple[Deny, ...] = ()
    networks: Annotated[
        dict[_Name, Annotated[tuple[str, ...], _list_schema("Ranges such as 192.0.2.0/24.")]],
        msgspec.Meta(description="Names for address ranges, for `networks` in rules."),
    ] = {}


Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Place = tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Rules:
    """All files of a directory, checked.

    Attributes:
        warnings: what is allowed but probably not meant, for example a key that does not exist.
    """

    grants: tuple[Grant, ...]
    denies: tuple[Deny, ...]
    networks: dict[str, tuple[Network, ...]]
    warnings: tuple[str, ...]

    def networks_of(self, address: str) -> tuple[str, ...]:
        """The named networks that an address is in, in order of name."""
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return ()
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped:
            parsed = parsed.ipv4_mapped
        return tuple(name for name, ranges in self.networks.items() if any(parsed in each for each in ranges))


def load(directory: Path, known_keys: frozenset[str]) -> Rules:
    """Read every `*.yaml` file of a directory.

    Args:
        directory: of grant files.
        known_keys: the configured keys; another one in a rule is worth a warning.

    Raises:
        ConfigError: everything that is wrong, a line for each, with file and line.
    """
    try:
        found = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as err:
        msg = f"{directory}: cannot be read: {err.strerror}"
        raise ConfigError(msg) from err
    paths = [path for path in found if path.suffix == ".yaml"]
    if not paths:
        msg = f"{directory}: holds no *.yaml file; without grants nobody may do anything, so write at least `grants: []`"
        raise ConfigError(msg)
    loader = _Loader(known_keys)
    loader.warnings += [
        f"{path}: is not read; grant files end in .yaml" for path in found if path not in paths and path.suffix.lower() in {".yml", ".yaml"}
    ]
    for path in paths:
        try:
            loader.take(YamlDocument.load(path))
        except ConfigError as err:
            loader.errors.append(str(err))
    return loader.finish()


def schema() -> dict[str, Any]:
    """JSON Schema 2020-12 of a grant file, for editors."""
    made: dict[str, Any] = msgspec.json.schema(GrantFile)
    for definition in made["$defs"].values():
        for member in definition.get("properties", {}).values():
            member.pop("default", None)  # "not given" is not the empty list, which is refused
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "keybroker grants", **made}


class _Loader:
    """Collects rules and errors over all files."""

    def __init__(self, known_keys: frozenset[str]) -> None:
        self._known_keys = known_keys
        self._ids: dict[str, str] = {OWN_TRAIL: "a rule that is built in"}
        self._grants: list[Grant] = []
        self._denies: list[Deny] = []
        self._networks: dict[str, tuple[Network, ...]] = {}
        self._network_uses: list[tuple[str, str]] = []
        self.warnings: list[str] = []
        self.errors: list[str] = []

    def take(self, document: YamlDocument) -> None:
        value = document.value
        if not isinstance(value, dict):
            self.errors.append(f"{document.where()}: a grant file has `grants`, `denies` or `networks` at its top")
            return
        for name in value:
            if name not in {"grants", "denies", "networks"}:
                self._fault(document, (name,), _unknown(name, "`grants`, `denies` and `networks`"))
        for name, kind in (("grants", Grant), ("denies", Deny)):
            entries = value.get(name, [])
            if not isinstance(entries, list):
                self._fault(document, (name,), "must be a list")
                continue
            for index in range(len(entries)):
                self._take_rule(document, (name, index), kind)
        self._take_networks(document, value.get("networks", {}))

    def finish(self) -> Rules:
        for where, name in self._network_uses:
            if name not in self._networks:
                self.errors.append(f"{where}: no network is named {name!r}; define it under `networks`")
        if self.errors:
            raise ConfigError("\n".join(self.errors))
        grants = tuple(sorted(self._grants, key=lambda rule: rule.id))
        denies = tuple(sorted(self._denies, key=lambda rule: rule.id))
        warnings = (*self.warnings, *_crowds((*grants, *denies)))
        return Rules(grants, denies, dict(sorted(self._networks.items())), warnings)

    def _take_rule(self, document: YamlDocument, place: Place, kind: type[Grant | Deny]) -> None:
        value = _at(document.value, place)
        if isinstance(value, dict):
            unknown = [name for name in value if name not in kind.__struct_fields__]
            for name in unknown:
                self._fault(document, (*place, name), _unknown(name, ", ".join(f"`{each}`" for each in kind.__struct_fields__)))
            empty = [name for name in _SELECTORS if value.get(name) == []]
            for name in empty:
                self._fault(document, (*place, name), "an empty list means nobody or nothing; name something, or leave the rule out")
            if unknown or empty:
                return
        try:
            rule = msgspec.convert(value, kind)
        except msgspec.ValidationError as err:
            what, _, path = str(err).partition(_ENDS_WITH)
            steps = _steps(path)
            choices = _CHOICES.get(str(steps[0]), ()) if what.startswith("Invalid enum value") else ()
            one_of = f"; there are {', '.join(choices)}" if choices else ""
            self._fault(document, (*place, *steps), _printable(f"{what[0].lower()}{what[1:]}{one_of}"))
            return
        before = len(self.errors)
        self._check_id(document, place, rule.id)
        self._check_selectors(document, place, rule)
        self._check_sense(document, place, rule)
        if len(self.errors) > before:
            return
        if isinstance(rule, Grant):
            self._grants.append(rule)
        else:
            self._denies.append(rule)

    def _check_id(self, document: YamlDocument, place: Place, name: str) -> None:
        where = (*place, "id")
        if not _ID.fullmatch(name):
            self._fault(document, where, "an id is [a-z0-9][a-z0-9._-]{0,63}")
        elif name in self._ids:
            self._fault(document, where, f"{name!r} is taken by {self._ids[name]}; an id stands for one rule")
        else:
            self._ids[name] = document.where(where)

    def _check_selectors(self, document: YamlDocument, place: Place, rule: Grant | Deny) -> None:
        for name in ("workloads", "trails"):
            for index, text in enumerate(getattr(rule, name)):
                try:
                    Pattern.parse(text)
                except PatternError as err:
                    self._fault(document, (*place, name, index), str(err))
        for index, key in enumerate(rule.keys):
            self._check_key(document, (*place, "keys", index), key, is_alone=len(rule.keys) == 1)
        for index, network in enumerate(rule.networks):
            self._network_uses.append((document.where((*place, "networks", index)), network))

    def _check_key(self, document: YamlDocument, place: Place, key: str, *, is_alone: bool) -> None:
        if key == "*":
            if not is_alone:
                self._fault(document, place, '"*" is every key and stands alone')
        elif not KEY_NAME.fullmatch(key):
            self._fault(document, place, "a key name is [a-z0-9][a-z0-9._-]{0,63}")
        elif key not in self._known_keys:
            self.warnings.append(f"{document.where(place)}: there is no key {key!r} in the configuration")

    def _check_sense(self, document: YamlDocument, place: Place, rule: Grant | Deny) -> None:
        """Refuse a grant that says too little, and a rule of which a part could never fit: it would not do what it looks like."""
        operations = set(rule.operations or get_args(Operation))
        signs = not operations.isdisjoint(_SIGNING)
        uses_keys = signs or "read-key" in operations
        reads = "read-audit" in operations
        mixed = rule.algorithms and signs and (rule.trails or not _SIGNING.issuperset(rule.operations))
        is_grant = isinstance(rule, Grant)
        faults = (
            (is_grant and uses_keys and not rule.keys, "keys", "operations on keys need `keys`"),
            (is_grant and signs and not rule.algorithms, "algorithms", "signing needs `algorithms`; there is no default"),
            (is_grant and reads and not rule.trails, "trails", "`read-audit` needs `trails`"),
            (rule.keys and not uses_keys, "keys", "no operation of this rule uses keys"),
            (rule.algorithms and not signs, "algorithms", "no operation of this rule signs"),
            (rule.trails and not reads, "trails", "no operation of this rule reads trails"),
            (not is_grant and mixed, "algorithms", "reading names no algorithm: write one rule for signing and one for reading"),
        )
        for is_fault, name, text in faults:
            if is_fault:
                self._fault(document, (*place, name), text)

    def _take_networks(self, document: YamlDocument, value: Any) -> None:
        if not isinstance(value, dict):
            self._fault(document, ("networks",), "must be a mapping of names to lists of address ranges")
            return
        for name, ranges in value.items():
            place: Place = ("networks", name)
            if not _ID.fullmatch(name):
                self._fault(document, place, "a network name is [a-z0-9][a-z0-9._-]{0,63}")
            elif name in self._networks:
                self._fault(document, place, f"{name!r} is defined twice")
            elif not isinstance(ranges, list) or not ranges:
                self._fault(document, place, "must be a list of at least one address range")
            else:
                self._networks[name] = tuple(self._parsed_ranges(document, place, ranges))

    def _parsed_ranges(self, document: YamlDocument, place: Place, ranges: list[Any]) -> Iterator[Network]:
        for index, text in enumerate(ranges):
            try:
                if not isinstance(text, str) or not _RANGE.fullmatch(text):
                    raise ValueError
                network = ipaddress.ip_network(text)
            except ValueError:
                self._fault(document, (*place, index), "not an address range such as 192.0.2.0/24, with no bits behind the prefix")
                continue
            if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped:
                self._fault(document, (*place, index), "write it as an IPv4 range: addresses are compared in that form")
            yield network

    def _fault(self, document: YamlDocument, place: Place, text: str) -> None:
        self.errors.append(f"{document.where(place)}: {_shown(place)}: {text}")


def _unknown(name: str, known: str) -> str:
    if name in _NOT_BUILT:
        return "is not supported by this version, and half a rule is another rule: take it out, or switch the file off (*.yaml.off)"
    return f"unknown field; there are {known}"


def _at(value: Any, place: Place) -> Any:
    for step in place:
        value = value[step]
    return value


def _steps(path: str) -> Place:
    return tuple(int(index) if index else name for name, index in re.findall(r"\.([a-z_]+)|\[(\d+)\]", path))


def _shown(place: Place) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{_printable(step)}" for step in place).removeprefix(".")


def _printable(text: str) -> str:
    """What a file says, in an error: a line break in it must not look like another error."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _crowds(rules: tuple[Grant | Deny, ...]) -> list[str]:
    """Warnings of rules that are for the same callers in such numbers that a decision may not get through them."""
    counts = Counter(place for rule in rules for place in {Pattern.parse(text).place for text in rule.workloads})
    return [
        f"{count} rules are for {place or 'anybody'}: each decision walks them all, and fails if that takes too long"
        for (_, place), count in sorted(counts.items())
        if count > _CROWD
    ]
