"""The rules that are live, and how others take their place: loaded beside them, put on record, and swapped in at once.

There is no moment without rules: whatever is wrong with the new ones, the old stay in force.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from keybroker.authority.policy import loader
from keybroker.authority.policy.compiler import compile_rules
from keybroker.authority.policy.engine import ENGINE, EmbeddedEngine, PolicyEngine
from keybroker.authority.policy.grants import Rules
from keybroker.authority.policy.wasm import WasmModule, WasmTrapError
from keybroker.errors import ConfigError
from keybroker.identity.watched_file import fingerprint

BUILT_IN = Path(__file__).parents[2] / "policies" / "policy.wasm"

_Signature = tuple[tuple[str | int, ...], ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """Rules that are ready and not in force yet."""

    engine: PolicyEngine
    rules: Rules
    signature: _Signature

    @property
    def digest(self) -> str:
        """Of the whole policy, lower-case hex SHA-256."""
        return self.engine.digest


_C = TypeVar("_C", bound=Candidate)


class LivePolicy(Protocol):
    """Whatever holds the live rules and finds those that take their place."""

    @property
    def engine(self) -> PolicyEngine:
        """The live rules."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed in the live rules but probably not meant."""
        ...

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with the rules as they are now where they come from."""
        ...

    @property
    def outage(self) -> str:
        """Why the live rules could not decide when they were last tried; empty if they could."""
        ...

    def networks_of(self, address: str) -> tuple[str, ...]:
        """The named networks that an address is in."""
        ...

    def person_of(self, spiffe_id: str) -> str:
        """The name of the person behind an identity; empty if it is nobody's."""
        ...

    def people_of(self, groups: tuple[str, ...]) -> tuple[str, ...]:
        """Everybody in these groups, by name."""
        ...

    async def refresh(self) -> Candidate | None:
        """Other rules, if there are any that can be used."""
        ...

    def adopt(self, candidate: Candidate) -> None:
        """From now on these rules decide."""
        ...

    async def trouble(self) -> str:
        """Why the live rules cannot decide now; empty if they can."""
        ...

    async def close(self) -> None:
        """End all connections."""
        ...


async def compiled_policy(path: Path | None) -> WasmModule:
    """A compiled policy; the one that is built in if no file is named.

    Raises:
        ConfigError: it cannot be used.
    """
    path = path or BUILT_IN
    try:
        data = path.read_bytes()
    except OSError as err:
        msg = f"{path}: cannot be read: {err.strerror}"
        raise ConfigError(msg) from err
    return await asyncio.to_thread(WasmModule, data, str(path))


class HeldRules(Generic[_C]):
    """What is asked of the live rules, wherever they come from."""

    def __init__(self, live: _C) -> None:
        self._live = live

    @property
    def engine(self) -> PolicyEngine:
        """The live rules."""
        return self._live.engine

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed in the live rules but probably not meant."""
        return self._live.rules.warnings

    def networks_of(self, address: str) -> tuple[str, ...]:
        """The named networks that an address is in."""
        return self._live.rules.networks_of(address)

    def person_of(self, spiffe_id: str) -> str:
        """The name of the person behind an identity; empty if it is nobody's."""
        return self._live.rules.person_of(spiffe_id)

    def people_of(self, groups: tuple[str, ...]) -> tuple[str, ...]:
        """Everybody in these groups, each once, in order of name."""
        return self._live.rules.people_of(groups)


class PolicyHolder(HeldRules[Candidate]):
    """Holds the live rules, and looks whether the files have others."""

    def __init__(self, directory: Path, module: WasmModule, known_keys: frozenset[str], live: Candidate) -> None:
        super().__init__(live)
        self._directory = directory
        self._module = module
        self._known_keys = known_keys
        self._looked_at = live.signature
        self._is_settled = False
        self._problems: tuple[str, ...] = ()

    @classmethod
    async def load(cls, directory: Path, module: Path | None, known_keys: frozenset[str]) -> PolicyHolder:
        """Load the first rules.

        Args:
            directory: of grant files.
            module: a compiled policy; None for the one that is built in.
            known_keys: the configured keys, for warnings.

        Raises:
            ConfigError: they cannot be used.
        """
        compiled = await compiled_policy(module)
        live = await asyncio.to_thread(_build, directory, compiled, known_keys, _signature(directory))
        return cls(directory, compiled, known_keys, live)

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with the files as they are now; empty while they are what is live, or could be."""
        return self._problems

    @property
    def outage(self) -> str:
        """Why the live rules could not decide; in this process they always can."""
        return ""

    async def refresh(self) -> Candidate | None:
        """Other rules, if the files have changed and can be used. Costs a few stat calls while they have not.

        What is new is read once more the next time: a file that changes twice within a tick of its file system's clock looks the same.
        """
        signature = _signature(self._directory)
        is_known = signature == self._looked_at
        if is_known and self._is_settled:
            return None
        self._is_settled = is_known
        try:
            candidate = await asyncio.to_thread(_build, self._directory, self._module, self._known_keys, signature)
        except ConfigError as err:
            self._looked_at = signature
            self._problems = tuple(str(err).splitlines())
            return None
        self._problems = ()
        if candidate.digest == self._live.digest:
            self._looked_at = signature
            return None
        return candidate  # until it is adopted, the next look finds it again

    def adopt(self, candidate: Candidate) -> None:
        """From now on these rules decide."""
        self._live = candidate
        self._looked_at = candidate.signature

    async def trouble(self) -> str:
        """Why the live rules cannot decide now; they always can."""
        return ""

    async def close(self) -> None:
        """Nothing is open."""


def _build(directory: Path, module: WasmModule, known_keys: frozenset[str], signature: _Signature) -> Candidate:
    return build(loader.load(directory, known_keys), module, signature, str(directory))


def build(rules: Rules, module: WasmModule, signature: _Signature, source: str) -> Candidate:
    """Rules that are ready and not in force yet.

    Raises:
        ConfigError: they are too large.
    """
    data, digest = compile_rules(rules, module.sha256, ENGINE)
    try:
        return Candidate(EmbeddedEngine(module, data, digest), rules, signature)
    except WasmTrapError as err:
        msg = f"{source}: the rules are too large for the policy engine ({err})"
        raise ConfigError(msg) from err


def _signature(directory: Path) -> _Signature:
    """Changes whenever a grant file does; empty while the directory cannot be read."""
    try:
        names = sorted(path.name for path in directory.iterdir() if path.suffix == ".yaml")
    except OSError:
        return ()
    return tuple((name, *fingerprint(directory / name)) for name in names)
