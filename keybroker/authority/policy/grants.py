"""Grant files: loaded strictly, with file and line in each error, and compiled to the data that the policy walks.

A field that this version does not build (limits, hours, quorum ...) is refused, never ignored: half a rule is another rule.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from keybroker.audit.leaf import canonical
from keybroker.errors import ConfigError
from keybroker.model.identity import SpiffeIdError, parse_trust_domain
from keybroker.model.key import KEY_NAME, Algorithm
from keybroker.yaml_document import Step, YamlDocument

EVERYTHING = "**"
OPERATIONS = ("sign", "sign-digest", "read-key", "read-audit")
OWN_TRAIL = "own-trail"

_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SEGMENT = re.compile(r"[a-zA-Z0-9._-]+")
_ENDS_WITH = " - at `"
_NOT_BUILT = frozenset({
    "limits", "hours", "quorum", "stages", "not_before", "not_after", "evidence", "observe_only", "people", "groups", "cool_off", "expires",
})  # fmt: skip

Operation = Literal["sign", "sign-digest", "read-key", "read-audit"]
Patterns = Annotated[
    tuple[str, ...],
    msgspec.Meta(description="SPIFFE ID patterns: `*` is one path segment, `**` (last only) is one or more; `**` alone is anybody."),
]


class Grant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One yes: who, which keys, what."""

    id: Annotated[str, msgspec.Meta(description="Unique over all files; stands in every record that this grant allowed.")]
    workloads: Patterns
    operations: Annotated[tuple[Operation, ...], msgspec.Meta(description="What may be done.")]
    keys: Annotated[tuple[str, ...] | None, msgspec.Meta(description='Key names; `["*"]` alone is every key.')] = None
    algorithms: Annotated[tuple[Algorithm, ...] | None, msgspec.Meta(description="JOSE names; needed for signing.")] = None
    trails: Annotated[tuple[str, ...] | None, msgspec.Meta(description="Whose records may be read; patterns like `workloads`.")] = None
    networks: Annotated[tuple[str, ...] | None, msgspec.Meta(description="Only from these named networks.")] = None


class Deny(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One no; it wins over every grant. A selector that is not given fits everything."""

    id: Annotated[str, msgspec.Meta(description="Unique over all files; stands in the reasons of what it refuses.")]
    workloads: Patterns
    operations: tuple[Operation, ...] | None = None
    keys: tuple[str, ...] | None = None
    algorithms: tuple[Algorithm, ...] | None = None
    trails: tuple[str, ...] | None = None
    networks: tuple[str, ...] | None = None


class GrantFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file of rules. All files of a directory count together."""

    grants: tuple[Grant, ...] = ()
    denies: tuple[Deny, ...] = ()
    networks: Annotated[dict[str, tuple[str, ...]], msgspec.Meta(description="Names for address ranges, for `networks` in rules.")] = {}


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

    Raises:
        ConfigError: everything that is wrong, a line for each, with file and line.
    """
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix == ".yaml" and not path.name.startswith("."))
    except OSError as err:
        msg = f"{directory}: cannot be read: {err.strerror}"
        raise ConfigError(msg) from err
    if not paths:
        msg = f"{directory}: holds no *.yaml file; without grants nobody may do anything, so write at least `grants: []`"
        raise ConfigError(msg)
    loader = _Loader(known_keys)
    for path in paths:
        try:
            loader.take(YamlDocument.load(path))
        except ConfigError as err:
            loader.errors.append(str(err))
    return loader.finish()


def compile_rules(rules: Rules, module_sha256: str, engine: str) -> tuple[bytes, str]:
    """The rules as the policy's `data` document, and the digest of the whole policy (which is in it)."""
    document = {
        "grants": _index([(grant.id, grant.workloads, _compiled_grant(grant)) for grant in rules.grants]),
        "denies": _index([(deny.id, deny.workloads, _compiled_deny(deny)) for deny in rules.denies]),
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


def schema() -> dict[str, Any]:
    """JSON Schema 2020-12 of a grant file, for editors."""
    made: dict[str, Any] = msgspec.json.schema(GrantFile)
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
        self._warnings: list[str] = []
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
        return Rules(grants, denies, dict(sorted(self._networks.items())), tuple(self._warnings))

    def _take_rule(self, document: YamlDocument, place: Place, kind: type[Grant | Deny]) -> None:
        value = _at(document.value, place)
        if isinstance(value, dict):
            unknown = [name for name in value if name not in kind.__struct_fields__]
            for name in unknown:
                self._fault(document, (*place, name), _unknown(name, ", ".join(f"`{each}`" for each in kind.__struct_fields__)))
            if unknown:
                return
        try:
            rule = msgspec.convert(value, kind)
        except msgspec.ValidationError as err:
            what, _, path = str(err).partition(_ENDS_WITH)
            self._fault(document, (*place, *_steps(path)), f"{what[0].lower()}{what[1:]}")
            return
        before = len(self.errors)
        self._check_id(document, place, rule.id)
        self._check_selectors(document, place, rule)
        if isinstance(rule, Grant):
            self._check_grant(document, place, rule)
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
        for name in ("workloads", "operations", "keys", "algorithms", "trails", "networks"):
            values = getattr(rule, name)
            if values is not None and not values:
                self._fault(document, (*place, name), "an empty list means nobody or nothing; name something, or leave the rule out")
        for name in ("workloads", "trails"):
            for index, text in enumerate(getattr(rule, name) or ()):
                try:
                    _pattern(text)
                except ValueError as err:
                    self._fault(document, (*place, name, index), str(err))
        for index, key in enumerate(rule.keys or ()):
            self._check_key(document, (*place, "keys", index), key, is_alone=len(rule.keys or ()) == 1)
        for index, network in enumerate(rule.networks or ()):
            self._network_uses.append((document.where((*place, "networks", index)), network))

    def _check_key(self, document: YamlDocument, place: Place, key: str, *, is_alone: bool) -> None:
        if key == "*":
            if not is_alone:
                self._fault(document, place, '"*" is every key and stands alone')
        elif not KEY_NAME.fullmatch(key):
            self._fault(document, place, "a key name is [a-z0-9][a-z0-9._-]{0,63}")
        elif key not in self._known_keys:
            self._warnings.append(f"{document.where(place)}: there is no key {key!r} in the configuration")

    def _check_grant(self, document: YamlDocument, place: Place, grant: Grant) -> None:
        signs = {"sign", "sign-digest"} & set(grant.operations)
        uses_keys = signs or "read-key" in grant.operations
        reads = "read-audit" in grant.operations
        rules = (
            (bool(grant.keys) or not uses_keys, "keys", "operations on keys need `keys`"),
            (bool(grant.algorithms) or not signs, "algorithms", "signing needs `algorithms`; there is no default"),
            (bool(grant.trails) or not reads, "trails", "`read-audit` needs `trails`"),
            (not grant.keys or bool(uses_keys), "keys", "no operation of this grant uses keys"),
            (not grant.algorithms or bool(signs), "algorithms", "no operation of this grant signs"),
            (not grant.trails or reads, "trails", "no operation of this grant reads trails"),
        )
        for holds, name, text in rules:
            if not holds:
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
                if not isinstance(text, str):
                    raise ValueError  # noqa: TRY004  said like any other malformed range
                yield ipaddress.ip_network(text)
            except ValueError:
                self._fault(document, (*place, index), "not an address range such as 192.0.2.0/24, with no bits behind the prefix")

    def _fault(self, document: YamlDocument, place: Place, text: str) -> None:
        self.errors.append(f"{document.where(place)}: {_shown(place)}: {text}")


@dataclass(frozen=True, slots=True)
class _Pattern:
    """A SPIFFE ID pattern taken apart; `is_any` is anybody."""

    trust_domain: str
    path: tuple[str, ...]
    is_open: bool
    is_any: bool = False
    text: str = field(default="", compare=False)


def _pattern(text: str) -> _Pattern:
    if text == EVERYTHING:
        return _Pattern("", (), is_open=True, is_any=True)
    form = "a pattern is spiffe://trust.domain/path with `*` for one segment and `**` at the end for one or more, or `**` alone"
    if not text.startswith("spiffe://"):
        raise ValueError(form)
    trust_domain, _, rest = text.removeprefix("spiffe://").partition("/")
    try:
        parse_trust_domain(trust_domain)
    except SpiffeIdError as err:
        msg = "the trust domain is written out, in lower case: a wildcard would trust domains that do not exist yet"
        raise ValueError(msg) from err
    *path, last = rest.split("/")
    is_open = last == "**"
    if not is_open:
        path.append(last)
    if not all(segment == "*" or (_SEGMENT.fullmatch(segment) and segment not in {".", ".."}) for segment in path):
        raise ValueError(form)
    return _Pattern(trust_domain, tuple(path), is_open, text=text)


def _index(rules: Iterable[tuple[str, tuple[str, ...], dict[str, Any]]]) -> dict[str, Any]:
    """Rules by whom they are for: exact identities, patterns with a literal first segment, other patterns of a domain, anybody."""
    exact: dict[str, list[dict[str, Any]]] = {}
    prefix: dict[str, list[dict[str, Any]]] = {}
    domain: dict[str, list[dict[str, Any]]] = {}
    anybody: list[dict[str, Any]] = []
    for _, workloads, compiled in rules:
        for pattern in map(_pattern, workloads):
            rule = {**compiled, "path": pattern.path, "is_open": pattern.is_open}
            if pattern.is_any:
                anybody.append(rule)
            elif not pattern.is_open and "*" not in pattern.path:
                exact.setdefault(pattern.text, []).append(rule)
            elif pattern.path and pattern.path[0] != "*":
                prefix.setdefault(f"{pattern.trust_domain}/{pattern.path[0]}", []).append(rule)
            else:
                domain.setdefault(pattern.trust_domain, []).append(rule)
    return {"exact": exact, "prefix": prefix, "domain": domain, "anybody": anybody}


def _compiled_grant(grant: Grant) -> dict[str, Any]:
    operations = set(grant.operations)
    if operations & {"sign", "sign-digest"}:
        operations.add("read-key")  # who may sign with a key may read its public half
    return _compiled(grant) | {"operations": sorted(operations)}


def _compiled_deny(deny: Deny) -> dict[str, Any]:
    return _compiled(deny) | {"operations": deny.operations or ()}


def _compiled(rule: Grant | Deny) -> dict[str, Any]:
    return {
        "id": rule.id,
        "keys": rule.keys or (),
        "algorithms": tuple(each.value for each in rule.algorithms or ()),
        "networks": rule.networks or (),
        "trails": tuple(_compiled_trail(_pattern(text)) for text in rule.trails or ()),
    }


def _compiled_trail(pattern: _Pattern) -> dict[str, Any]:
    """A trail pattern as the policy compares it: with the segments of `split(spiffe_id, "/")`."""
    return {
        "is_any": pattern.is_any,
        "is_open": pattern.is_open,
        "path": () if pattern.is_any else ("spiffe:", "", pattern.trust_domain, *pattern.path),
    }


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
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")
