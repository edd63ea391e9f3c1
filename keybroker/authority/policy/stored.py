"""The live rules where changes of the rules are operations: kept in the store, and changed by proposals alone.

The directory of grant files is read once, when the broker is first started like this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from keybroker.authority.policy import loader
from keybroker.authority.policy.engine import PolicyEngine
from keybroker.authority.policy.grants import Quorum, Rules
from keybroker.authority.policy.holder import BUILT_IN, Candidate, build
from keybroker.authority.policy.wasm import WasmModule
from keybroker.errors import ConfigError


class StoredPolicy:
    """Holds the live rules; looks nowhere else for other ones.

    Args:
        live: None until the first version is adopted, which is before anybody asks.
    """

    def __init__(self, module: WasmModule, known_keys: frozenset[str], live: Candidate) -> None:
        self._module = module
        self._known_keys = known_keys
        self._live = live

    @classmethod
    async def load(cls, files: Mapping[str, str], module: Path | None, known_keys: frozenset[str]) -> StoredPolicy:
        """Take the rules from the store.

        Args:
            files: grant files by name.
            module: a compiled policy; None for the one that is built in.
            known_keys: the configured keys, for warnings.

        Raises:
            ConfigError: they cannot be used.
        """
        path = module or BUILT_IN
        try:
            data = path.read_bytes()
        except OSError as err:
            msg = f"{path}: cannot be read: {err.strerror}"
            raise ConfigError(msg) from err
        compiled = await asyncio.to_thread(WasmModule, data, str(path))
        return cls(compiled, known_keys, await asyncio.to_thread(_built, files, compiled, known_keys))

    @property
    def engine(self) -> PolicyEngine:
        """The live rules."""
        return self._live.engine

    @property
    def rules(self) -> Rules:
        """The live rules, as they were written."""
        return self._live.rules

    @property
    def problems(self) -> tuple[str, ...]:
        """Nothing: what is wrong with a proposal is told to whoever made it."""
        return ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed in the live rules but probably not meant."""
        return self._live.rules.warnings

    @property
    def outage(self) -> str:
        """Why the live rules could not decide; in this process they always can."""
        return ""

    def networks_of(self, address: str) -> tuple[str, ...]:
        """The named networks that an address is in."""
        return self._live.rules.networks_of(address)

    def person_of(self, spiffe_id: str) -> str:
        """The person behind an identity; empty if it is nobody's."""
        return self._live.rules.person_of(spiffe_id)

    def people_of(self, groups: tuple[str, ...]) -> tuple[str, ...]:
        """Everybody in these groups, each once, in order of name."""
        return self._live.rules.people_of(groups)

    async def refresh(self) -> Candidate | None:
        """Nothing: other rules come as proposals."""
        return None

    async def build(self, files: Mapping[str, str]) -> Candidate:
        """Rules that are ready and not in force yet.

        Raises:
            ConfigError: they cannot be used; a line for each fault.
        """
        return await asyncio.to_thread(_built, files, self._module, self._known_keys)

    def adopt(self, candidate: Candidate) -> None:
        """From now on these rules decide."""
        self._live = candidate

    async def trouble(self) -> str:
        """Why the live rules cannot decide now; they always can."""
        return ""

    async def close(self) -> None:
        """Nothing is open."""


def read_files(directory: Path) -> dict[str, str]:
    """The grant files of a directory, by name.

    Raises:
        ConfigError: they cannot be read.
    """
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix == ".yaml" and not path.name.startswith("."))
        return {path.name: path.read_bytes().decode() for path in paths}
    except OSError as err:
        msg = f"{directory}: cannot be read: {err.strerror}"
        raise ConfigError(msg) from err
    except UnicodeError as err:
        msg = f"{directory}: a grant file is not UTF-8"
        raise ConfigError(msg) from err


def can_be_widened(rules: Rules) -> bool:
    """Whether anybody at all could ever widen these rules: some grant of `admin-policy` asks others."""
    return any("admin-policy" in each.operations and isinstance(each.quorum, Quorum) and not each.observe_only for each in rules.grants)


def _built(files: Mapping[str, str], module: WasmModule, known_keys: frozenset[str]) -> Candidate:
    rules = loader.load_texts({Path(name): text.encode() for name, text in files.items()}, known_keys)
    return build(rules, module, (), "the rules")
