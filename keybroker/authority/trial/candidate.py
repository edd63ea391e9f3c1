"""A candidate: rules that are not live, ready to be asked, with the file and line of each."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keybroker.authority.policy import loader
from keybroker.authority.policy.compiler import compile_rules
from keybroker.authority.policy.engine import ENGINE, EmbeddedEngine
from keybroker.authority.policy.grants import Rules
from keybroker.authority.policy.holder import BUILT_IN
from keybroker.authority.policy.wasm import WasmModule, WasmTrapError
from keybroker.authority.store import opening
from keybroker.config import AuthorityConfig
from keybroker.errors import ConfigError
from keybroker.model.key import KeyFamily
from keybroker.yaml_document import Step, YamlDocument

_PARTS = ("grants", "denies")


@dataclass(frozen=True, slots=True)
class Inventory:
    """The keys that there are, as far as somebody who does not serve can know them.

    Attributes:
        keys: the configured names; None where there is no configuration to look at.
        families: of the current version of each key that a broker has pinned.
    """

    keys: frozenset[str] | None = None
    families: dict[str, KeyFamily] = field(default_factory=dict)

    @classmethod
    def of(cls, config: AuthorityConfig) -> Inventory:
        """The configured keys, with the families that are pinned in the broker's database, if there is one.

        Raises:
            StoreError: the database cannot be opened.
        """
        families: dict[str, KeyFamily] = {}
        if (config.state / opening.DATABASE).exists():
            with contextlib.closing(opening.reader(config.state)) as db, contextlib.suppress(sqlite3.Error):
                rows = db.execute("SELECT name, family FROM key_version ORDER BY version").fetchall()
                families = {name: KeyFamily(family) for name, family in rows}
        return cls(frozenset(config.keys), families)


class Places:
    """Where each rule of a directory is written."""

    def __init__(self, documents: Iterable[YamlDocument]) -> None:
        self._rules: dict[str, tuple[YamlDocument, tuple[Step, ...]]] = {}
        self._others: dict[tuple[str, str], tuple[YamlDocument, tuple[Step, ...]]] = {}
        for document in documents:
            for part in document.value:
                self._take(document, part)

    def rule(self, name: str, *steps: Step) -> str:
        """`file:line` of a rule, or of a field of it; empty for a rule that is built in."""
        document, place = self._rules.get(name, (None, ()))
        return document.where((*place, *steps)) if document else ""

    def other(self, part: str, name: str) -> str:
        """`file:line` of a named person, group or network."""
        document, place = self._others.get((part, name), (None, ()))
        return document.where(place) if document else ""

    def _take(self, document: YamlDocument, part: str) -> None:
        value = document.value[part]
        if part in _PARTS and isinstance(value, list):
            for index, rule in enumerate(value):
                if isinstance(rule, dict) and "id" in rule:
                    self._rules[str(rule["id"])] = document, (part, index)
        elif isinstance(value, dict):
            for name in value:
                self._others[part, name] = document, (part, name)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Rules, and the real engine that decides by them."""

    rules: Rules
    engine: EmbeddedEngine
    places: Places


def load(directory: Path, policy: Path | None = None) -> Candidate:
    """Load a directory of grant files, whatever keys it names.

    Args:
        policy: another compiled policy than the one that is built in.

    Raises:
        ConfigError: it cannot be used; a line for each fault.
    """
    documents = tuple(_documents(directory))
    rules = loader.load(directory, _named_keys(documents))
    path = policy or BUILT_IN
    try:
        module = _compiled(path.read_bytes(), str(path))
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read: {err.strerror}") from err
    data, digest = compile_rules(rules, module.sha256, ENGINE)
    try:
        engine = EmbeddedEngine(module, data, digest)
    except WasmTrapError as err:
        raise ConfigError(f"{directory}: the rules are too large for the policy engine ({err}); split them between brokers") from err
    return Candidate(rules, engine, Places(documents))


@functools.lru_cache(maxsize=4)
def _compiled(data: bytes, source: str) -> WasmModule:
    """Compiling takes a tenth of a second, and two candidates mostly have the same policy."""
    return WasmModule(data, source)


def _named_keys(documents: Iterable[YamlDocument]) -> frozenset[str]:
    """Every key that a rule names. Whether there are such keys is judged apart from the loading."""
    rules = [rule for document in documents for part in _PARTS for rule in _list(document.value.get(part))]
    return frozenset(str(key) for rule in rules if isinstance(rule, dict) for key in _list(rule.get("keys")))


def _documents(directory: Path) -> Iterator[YamlDocument]:
    """The files that can be read; the loader says what is wrong with the others."""
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix == ".yaml" and not path.name.startswith("."))
    except OSError:
        return
    for path in paths:
        with contextlib.suppress(ConfigError):
            document = YamlDocument.load(path)
            if isinstance(document.value, dict):
                yield document


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
