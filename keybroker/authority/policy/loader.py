"""Grant files: loaded strictly, with file and line in each error."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import msgspec

from keybroker.authority.policy import demands
from keybroker.authority.policy.demands import Place
from keybroker.authority.policy.grants import (
    NOT_BUILT,
    OWN_TRAIL,
    RULE_NAME,
    TOKEN_NAME,
    Denied,
    Deny,
    Grant,
    GrantFile,
    Network,
    Operation,
    Rules,
)
from keybroker.authority.policy.pattern import Pattern, PatternError
from keybroker.errors import ConfigError
from keybroker.model.decision import Per
from keybroker.model.identity import SpiffeId, SpiffeIdError
from keybroker.model.key import KEY_NAME, Algorithm
from keybroker.yaml_document import YamlDocument

_RANGE = re.compile(r"[0-9a-fA-F.:]+(/[0-9]{1,3})?")  # without netmasks and zones
_ENDS_WITH = " - at `"
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.+)`")
_CHOICES = {"operations": get_args(Operation), "algorithms": tuple(each.value for each in Algorithm), "per": get_args(Per)}
_SIGNING = frozenset({"sign", "sign-digest"})
_FREEZING = frozenset({"freeze", "unfreeze"})
_NEEDING_OTHERS = frozenset({"unfreeze", "admin-policy"})
_CROWD = 2_000  # rules; a decision that walks about three times as many runs out of fuel
_EMPTY = "an empty list means nobody or nothing; name something, or leave the rule out"
_FILE_FIELDS = ", ".join(f"`{name}`" for name in GrantFile.__struct_fields__)


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


def load_texts(texts: Mapping[Path, bytes], known_keys: frozenset[str]) -> Rules:
    """The rules of grant files that have been read already, as `load` would find them.

    Args:
        texts: content by path; the path is for errors.
        known_keys: as for `load`.

    Raises:
        ConfigError: as for `load`.
    """
    if not texts:
        raise ConfigError("there is no grant file; without grants nobody may do anything, so write at least `grants: []`")
    loader = _Loader(known_keys)
    for path, text in sorted(texts.items()):
        try:
            loader.take(YamlDocument.parse(path, text))
        except ConfigError as err:
            loader.errors.append(str(err))
    return loader.finish()


class _Loader:
    """Collects rules and errors over all files."""

    def __init__(self, known_keys: frozenset[str]) -> None:
        self._known_keys = known_keys
        self._ids: dict[str, str] = {OWN_TRAIL: "a rule that is built in"}
        self._grants: list[Grant] = []
        self._denies: list[Deny] = []
        self._places: dict[str, tuple[YamlDocument, Place]] = {}
        self._networks: dict[str, tuple[Network, ...]] = {}
        self._network_uses: list[tuple[str, str]] = []
        self._waived: list[tuple[str, str]] = []
        self._people: dict[str, tuple[str, ...]] = {}
        self._owners: dict[str, str] = {}  # of identities
        self._groups: dict[str, tuple[str, ...]] = {}
        self._group_members: list[tuple[str, str]] = []
        self.warnings: list[str] = []
        self.errors: list[str] = []

    def take(self, document: YamlDocument) -> None:
        value = document.value
        if not isinstance(value, dict):
            self.errors.append(f"{document.where()}: a grant file has {_FILE_FIELDS} at its top")
            return
        for name in value:
            if name not in GrantFile.__struct_fields__:
                self._fault(document, (name,), _unknown(name, _FILE_FIELDS))
        for name, kind in (("grants", Grant), ("denies", Deny)):
            entries = value.get(name, [])
            if not isinstance(entries, list):
                self._fault(document, (name,), "must be a list")
                continue
            for index in range(len(entries)):
                self._take_rule(document, (name, index), kind)
        for name, ranges in self._named_lists(document, "networks", "network", "address range", self._networks):
            self._networks[name] = tuple(self._parsed_ranges(document, ("networks", name), ranges))
        for name, identities in self._named_lists(document, "people", "person's", "SPIFFE ID", self._people):
            self._people[name] = tuple(self._parsed_identities(document, name, identities))
        for name, members in self._named_lists(document, "groups", "group", "person", self._groups):
            self._groups[name] = tuple(self._parsed_members(document, name, members))

    def finish(self) -> Rules:
        for where, name in self._network_uses:
            if name not in self._networks:
                self.errors.append(f"{where}: no network is named {name!r}; define it under `networks`")
        ids = {rule.id for rule in self._grants}
        self.errors += [f"{where}: there is no grant {name!r}; name one that is there" for where, name in self._waived if name not in ids]
        for where, name in self._group_members:
            if name not in self._people:
                self.errors.append(f"{where}: nobody is named {name!r}; define it under `people`")
        grants = tuple(sorted(self._grants, key=lambda rule: rule.id))
        denies = tuple(sorted(self._denies, key=lambda rule: rule.id))
        warnings = (*self.warnings, *_crowds((*grants, *denies)))
        networks, people, groups = (dict(sorted(each.items())) for each in (self._networks, self._people, self._groups))
        rules = Rules(grants, denies, networks, warnings, people, groups)  # type: ignore[arg-type]  # one comprehension, three kinds
        for grant in grants:
            demands.check_people(grant, rules, partial(self._fault_in, *self._places[grant.id]))
        if self.errors:
            raise ConfigError("\n".join(self.errors))
        return rules

    def _take_rule(self, document: YamlDocument, place: Place, kind: type[Grant | Deny]) -> None:
        value = _at(document.value, place)
        if isinstance(value, dict):
            unknown = [name for name in value if name not in kind.__struct_fields__]
            for name in unknown:
                self._fault(document, (*place, name), _unknown(name, ", ".join(f"`{each}`" for each in kind.__struct_fields__)))
            empty = list(_empty_lists(value))
            for steps in empty:
                self._fault(document, (*place, *steps), _EMPTY)
            if unknown or empty:
                return
        try:
            rule = msgspec.convert(value, kind)
        except msgspec.ValidationError as err:
            self._fault_of(document, place, str(err))
            return
        before = len(self.errors)
        self._check_id(document, place, rule.id)
        self._check_selectors(document, place, rule)
        self._check_sense(document, place, rule)
        if isinstance(rule, Grant):
            self._places.setdefault(rule.id, (document, place))
            signs = not _SIGNING.isdisjoint(rule.operations)
            asks_others = not _NEEDING_OTHERS.isdisjoint(rule.operations)
            demands.check(rule, partial(self._fault_in, document, place), signs=signs, asks_others=asks_others)
        if len(self.errors) > before:
            return
        if isinstance(rule, Grant):
            self._grants.append(rule)
        else:
            self._denies.append(rule)

    def _fault_of(self, document: YamlDocument, place: Place, text: str) -> None:
        """A fault in msgspec's words, at its place."""
        what, _, path = text.partition(_ENDS_WITH)
        steps = _steps(path)
        unknown = _UNKNOWN_FIELD.fullmatch(what)
        if unknown:
            self._fault(document, (*place, *steps, unknown[1]), "unknown field")
            return
        last = next((str(step) for step in reversed(steps) if isinstance(step, str)), "")
        choices = _CHOICES.get(last, ()) if what.startswith("Invalid enum value") else ()
        one_of = f"; there are {', '.join(choices)}" if choices else ""
        self._fault(document, (*place, *steps), _printable(f"{what[0].lower()}{what[1:]}{one_of}"))

    def _check_id(self, document: YamlDocument, place: Place, name: str) -> None:
        where = (*place, "id")
        if not RULE_NAME.fullmatch(name):
            self._fault(document, where, "an id is [a-z0-9][a-z0-9._-]{0,63}")
        elif name in self._ids:
            self._fault(document, where, f"{name!r} is taken by {self._ids[name]}; an id stands for one rule")
        else:
            self._ids[name] = document.where(where)

    def _check_selectors(self, document: YamlDocument, place: Place, rule: Grant | Deny) -> None:
        for name in ("workloads", "trails", "subjects"):
            for index, text in enumerate(getattr(rule, name)):
                try:
                    Pattern.parse(text)
                except PatternError as err:
                    self._fault(document, (*place, name, index), str(err))
        for index, key in enumerate(rule.keys):
            self._check_key(document, (*place, "keys", index), key, is_alone=len(rule.keys) == 1)
        for index, token in enumerate(rule.tokens):
            if not TOKEN_NAME.fullmatch(token) or (token == "*" and len(rule.tokens) > 1):  # noqa: S105  every token
                self._fault(document, (*place, "tokens", index), 'a token name is [a-z0-9][a-z0-9-]{0,31}; "*" stands alone')
        self._waived += [(document.where((*place, "waives", index)), name) for index, name in enumerate(rule.waives)]
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
        operations = set(rule.operations or get_args(Denied))
        signs = not operations.isdisjoint(_SIGNING)
        uses_keys = signs or not operations.isdisjoint({"read-key", "approve"})
        reads = "read-audit" in operations
        freezes = not operations.isdisjoint(_FREEZING)
        freezable = rule.keys or rule.subjects or rule.tokens
        breaks = "break-glass" in operations
        mixed = rule.algorithms and signs and (rule.trails or not _SIGNING.issuperset(rule.operations))
        is_grant = isinstance(rule, Grant)
        faults = (
            (is_grant and uses_keys and not rule.keys, "keys", "operations on keys need `keys`"),
            (is_grant and signs and not rule.algorithms, "algorithms", "signing needs `algorithms`; there is no default"),
            (is_grant and reads and not rule.trails, "trails", "`read-audit` needs `trails`"),
            (is_grant and breaks and not rule.waives, "waives", "`break-glass` needs `waives`"),
            (is_grant and freezes and not freezable, "subjects", "freezing needs `subjects`, `keys` or `tokens`"),
            (rule.keys and not (uses_keys or freezes), "keys", "no operation of this rule uses keys"),
            (rule.subjects and not freezes, "subjects", "no operation of this rule freezes"),
            (rule.tokens and not freezes, "tokens", "no operation of this rule freezes"),
            (rule.waives and not breaks, "waives", "no operation of this rule breaks glass"),
            (rule.algorithms and not signs, "algorithms", "no operation of this rule signs"),
            (rule.trails and not reads, "trails", "no operation of this rule reads trails"),
            (not is_grant and mixed, "algorithms", "only signing names an algorithm: write one rule for signing and one for the rest"),
        )
        for is_fault, name, text in faults:
            if is_fault:
                self._fault(document, (*place, name), text)

    def _named_lists(
        self, document: YamlDocument, field: str, kind: str, item: str, known: dict[str, Any]
    ) -> Iterator[tuple[str, list[Any]]]:
        """The lists of a mapping at the top of a file, by name, where a name means the same in all files."""
        value = document.value.get(field, {})
        if not isinstance(value, dict):
            self._fault(document, (field,), f"must be a mapping of names to lists of {_plural(item)}")
            return
        for name, items in value.items():
            place: Place = (field, name)
            if not RULE_NAME.fullmatch(name):
                self._fault(document, place, f"a {kind} name is [a-z0-9][a-z0-9._-]{{0,63}}")
            elif name in known:
                self._fault(document, place, f"{name!r} is defined twice")
            elif not isinstance(items, list) or not items:
                self._fault(document, place, f"must be a list of at least one {item}")
            else:
                yield name, items

    def _parsed_identities(self, document: YamlDocument, person: str, identities: list[Any]) -> Iterator[str]:
        for index, text in enumerate(identities):
            place: Place = ("people", person, index)
            try:
                identity = SpiffeId.parse(text if isinstance(text, str) else "").text
            except SpiffeIdError:
                self._fault(document, place, "must be a SPIFFE ID, written out, such as spiffe://example.org/human/alice")
                continue
            owner = self._owners.setdefault(identity, document.where(place))
            if owner != document.where(place) or identity in identities[:index]:
                self._fault(document, place, f"{identity} is named at {owner}; an identity stands for one person")
            yield identity

    def _parsed_members(self, document: YamlDocument, group: str, members: list[Any]) -> Iterator[str]:
        for index, name in enumerate(members):
            place: Place = ("groups", group, index)
            if not isinstance(name, str):
                self._fault(document, place, "must be the name of a person")
            elif name in members[:index]:
                self._fault(document, place, f"{_printable(name)!r} is named twice")
            else:
                self._group_members.append((document.where(place), name))
                yield name

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

    def _fault_in(self, document: YamlDocument, around: Place, place: Place, text: str) -> None:
        self._fault(document, (*around, *place), text)

    def _fault(self, document: YamlDocument, place: Place, text: str) -> None:
        self.errors.append(f"{document.where(place)}: {_shown(place)}: {text}")


def _unknown(name: str, known: str) -> str:
    if name in NOT_BUILT:
        return "is not supported by this version, and half a rule is another rule: take it out, or switch the file off (*.yaml.off)"
    return f"unknown field; there are {known}"


def _empty_lists(value: Any, place: Place = ()) -> Iterator[Place]:
    """Where an empty list stands, at any depth."""
    if value == []:
        yield place
    elif isinstance(value, dict | list):
        for step, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _empty_lists(each, (*place, step))


def _plural(item: str) -> str:
    return {"person": "people"}.get(item, f"{item}s")


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
