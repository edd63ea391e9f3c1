"""The live rules where changes of the rules are operations: kept in the store, and changed by proposals alone.

The directory of grant files is read once, when the broker is first started like this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from keybroker.authority.policy import loader
from keybroker.authority.policy.grants import Quorum, Rules
from keybroker.authority.policy.holder import Candidate, HeldRules, build, compiled_policy
from keybroker.authority.policy.wasm import WasmModule
from keybroker.errors import ConfigError


class StoredPolicy(HeldRules[Candidate]):
    """Holds the live rules; looks nowhere else for other ones.

    Args:
        live: None until the first version is adopted, which is before anybody asks.
    """

    def __init__(self, module: WasmModule, known_keys: frozenset[str], live: Candidate) -> None:
        super().__init__(live)
        self._module = module
        self._known_keys = known_keys

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
        compiled = await compiled_policy(module)
        return cls(compiled, known_keys, await asyncio.to_thread(_built, files, compiled, known_keys))

    @property
    def rules(self) -> Rules:
        """The live rules, as they were written."""
        return self._live.rules

    @property
    def problems(self) -> tuple[str, ...]:
        """Nothing: what is wrong with a proposal is told to whoever made it."""
        return ()

    @property
    def outage(self) -> str:
        """Why the live rules could not decide; in this process they always can."""
        return ""

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
