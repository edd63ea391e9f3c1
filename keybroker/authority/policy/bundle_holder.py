"""The rules that are live where they come in signed bundles, and how a newer bundle takes their place.

A bundle is taken if its signature is good, its revision is higher, and its rules can be used; until then the old stays in force. The
last good one is kept beside the database: with it a broker starts while its source is away, and knows a bundle that is older.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from keybroker.audit.leaf import canonical
from keybroker.authority.policy import engine as embedded
from keybroker.authority.policy import loader
from keybroker.authority.policy.bundle import MAX_BUNDLE_BYTES, PolicyBundle
from keybroker.authority.policy.bundle_source import BundleSource, source_of
from keybroker.authority.policy.compiler import compile_rules
from keybroker.authority.policy.engine import OPA, EmbeddedEngine
from keybroker.authority.policy.grants import Rules
from keybroker.authority.policy.holder import BUILT_IN, Candidate, HeldRules
from keybroker.authority.policy.opa_address import OpaAddress
from keybroker.authority.policy.opa_engine import OpaEngine, Server
from keybroker.authority.policy.signatures import BundleKeys
from keybroker.authority.policy.wasm import WasmModule, WasmTrapError
from keybroker.config import BundleConfig, PolicyConfig
from keybroker.errors import ConfigError
from keybroker.telemetry import logger

KEPT = "policy-bundle.tar.gz"
_PATIENCE_SECONDS = 60.0
_PROBE_SECONDS = 1.0  # between two questions whether the live rules can decide
_REGO = BUILT_IN.with_name("keybroker.rego")

_log = logger()


@dataclass(frozen=True, slots=True)
class BundleCandidate(Candidate):
    """The rules of one bundle, ready and not in force yet."""

    bundle: PolicyBundle


class BundleHolder(HeldRules[BundleCandidate]):
    """Holds the live rules, and looks whether its source has a newer bundle."""

    def __init__(self, maker: _Maker, source: BundleSource, kept: Path, live: BundleCandidate) -> None:
        super().__init__(live)
        self._maker = maker
        self._source = source
        self._kept = kept
        self._pending: BundleCandidate | None = None
        self._pending_since = 0.0
        self._refused = ""  # what is wrong with the bundle that the source has now
        self._trouble = ""  # why the source could not be asked the last time
        self._seen = live.bundle.sha256
        self._outage = "OPA has not been asked yet" if maker.is_remote else ""
        self._next_probe = 0.0

    @classmethod
    async def load(cls, policy: PolicyConfig, state: Path, known_keys: frozenset[str], *, is_kept: bool = True) -> BundleHolder:
        """Load the first rules: from the source, or if it is away those that were kept.

        Args:
            state: directory of the database; the last good bundle is kept there.
            known_keys: the configured keys, for warnings.
            is_kept: whether what was loaded is kept; not where one only looks.

        Raises:
            ConfigError: there are no rules that can be used.
        """
        if policy.bundle is None:
            raise ConfigError("authority.policy.bundle is missing")
        maker = _Maker(policy, policy.bundle, known_keys)
        source = source_of(policy.bundle)
        path = state / KEPT
        try:
            live, trouble = await _first(maker, source, path)
            if is_kept:
                await asyncio.to_thread(_keep, path, live.bundle.packed)
        except BaseException:
            await source.close()
            await maker.close()
            raise
        made = cls(maker, source, path, live)
        made._trouble = trouble
        return made

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the live rules are not the newest; empty while they are, or could be."""
        return tuple(line for text in (self._trouble, self._refused, self._overdue()) for line in text.splitlines())

    @property
    def outage(self) -> str:
        """Why the live rules could not decide when they were last tried; empty if they could."""
        return self._outage

    @property
    def revision(self) -> int:
        """Of the bundle that is in force."""
        return self._live.bundle.revision

    async def refresh(self) -> BundleCandidate | None:
        """The rules of a newer bundle, if there is one that can be used, and where OPA decides: if OPA has it too."""
        try:
            packed = await self._source.look()
            self._trouble = ""
        except ConfigError as err:
            self._trouble, packed = str(err), None
        if packed is not None:
            await self._take(packed)
        await self._probe()
        pending = self._pending
        if pending is None or await self._maker.trouble(pending):
            return None
        try:
            await asyncio.to_thread(_keep, self._kept, pending.bundle.packed)
        except ConfigError as err:
            self._trouble = str(err)
            return None
        return pending  # until it is adopted, the next look finds it again

    def adopt(self, candidate: Candidate) -> None:
        """From now on these rules decide."""
        if not isinstance(candidate, BundleCandidate):
            raise TypeError(candidate)
        before, self._live = self._live, candidate
        self._outage = ""  # it has just answered
        if self._pending is not None and self._pending.bundle.sha256 == candidate.bundle.sha256:
            self._pending = None
        if isinstance(before.engine, OpaEngine) and isinstance(candidate.engine, OpaEngine):
            before.engine.supersede(candidate.engine)

    async def trouble(self) -> str:
        """Why the live rules cannot decide now; empty if they can."""
        return await self._maker.trouble(self._live)

    async def close(self) -> None:
        """End all connections."""
        await self._source.close()
        await self._maker.close()

    async def _probe(self) -> None:
        """Now and then, find out whether the live rules can decide, so that an outage is seen where nobody asks for anything."""
        if not self._maker.is_remote or time.monotonic() < self._next_probe:
            return
        before, self._outage = self._outage, await self._maker.trouble(self._live)
        self._next_probe = time.monotonic() + _PROBE_SECONDS
        if self._outage and self._outage != before:
            _log.error("the rules cannot decide", why=self._outage)

    async def _take(self, packed: bytes) -> None:
        """Make a candidate of what the source has, or remember what is wrong with it."""
        sha256 = hashlib.sha256(packed).hexdigest()
        if sha256 == self._seen:
            return
        self._seen = sha256
        self._refused = ""
        newest = self._pending or self._live
        if sha256 in {newest.bundle.sha256, self._live.bundle.sha256}:
            return
        try:
            bundle = await asyncio.to_thread(self._maker.read, packed, self._maker.source_name)
            _require_newer(bundle, newest.bundle, self._maker.source_name)
            candidate = await asyncio.to_thread(self._maker.candidate, bundle, self._maker.source_name)
        except ConfigError as err:
            self._refused = str(err)
            return
        self._pending, self._pending_since = candidate, time.monotonic()

    def _overdue(self) -> str:
        if self._pending is None or time.monotonic() - self._pending_since < _PATIENCE_SECONDS:
            return ""
        return f"{self._maker.source_name}: OPA has not taken up revision {self._pending.bundle.revision}; see its log"


class _Maker:
    """Makes candidates of bundles, for one engine."""

    def __init__(self, policy: PolicyConfig, bundle: BundleConfig, known_keys: frozenset[str]) -> None:
        self._keys = BundleKeys.load(bundle.keys, bundle.scope)
        self._known_keys = known_keys
        self.source_name = str(bundle.path or bundle.url)
        self._server = _server(policy) if policy.engine == "opa" else None
        self._modules: dict[str, WasmModule] = {}

    @property
    def is_remote(self) -> bool:
        """Whether the rules are decided by a server."""
        return self._server is not None

    def read(self, packed: bytes, source: str) -> PolicyBundle:
        """Check a bundle as far as it can be without its rules.

        Raises:
            ConfigError: it is not a good one.
        """
        return PolicyBundle.read(packed, self._keys, source)

    def candidate(self, bundle: PolicyBundle, source: str) -> BundleCandidate:
        """Make the rules of a bundle ready.

        Raises:
            ConfigError: they cannot be used.
        """
        signature = ((bundle.revision, bundle.sha256),)
        texts = {Path(source) / name: text for name, text in bundle.grants.items()}
        rules = loader.load_texts(texts, self._known_keys)
        if self._server is None:
            return BundleCandidate(self._embedded(bundle, rules, source), rules, signature, bundle)
        data, digest = compile_rules(rules, hashlib.sha256(bundle.rego).hexdigest(), OPA)
        try:
            is_same = canonical(msgspec.json.decode(bundle.data)) == data
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            is_same = False
        if not is_same:
            raise ConfigError(f"{source}: its data.json is not what its grants compile to here; make it with this version of keybroker")
        return BundleCandidate(OpaEngine(self._server, digest, bundle.revision), rules, signature, bundle)

    def _embedded(self, bundle: PolicyBundle, rules: Rules, source: str) -> EmbeddedEngine:
        module = self._module(bundle, source)
        data, digest = compile_rules(rules, module.sha256, embedded.ENGINE)
        try:
            return EmbeddedEngine(module, data, digest)
        except WasmTrapError as err:
            raise ConfigError(f"{source}: the rules are too large for the policy engine ({err})") from err

    def _module(self, bundle: PolicyBundle, source: str) -> WasmModule:
        """The bundle's own compiled policy, or the built-in one where its Rego is that. Compiled once."""
        if bundle.module is None and bundle.rego != _REGO.read_bytes():
            raise ConfigError(f"{source}: has a policy.rego of its own, and no policy.wasm to run it with; put both into the bundle")
        module = BUILT_IN.read_bytes() if bundle.module is None else bundle.module
        sha256 = hashlib.sha256(module).hexdigest()
        if sha256 not in self._modules:
            self._modules = {sha256: WasmModule(module, source)}
        return self._modules[sha256]

    async def trouble(self, candidate: BundleCandidate) -> str:
        """Why its engine could not decide now; empty if it can."""
        return await candidate.engine.trouble() if isinstance(candidate.engine, OpaEngine) else ""

    async def close(self) -> None:
        """End the connections to OPA."""
        if self._server is not None:
            await self._server.close()


def _server(policy: PolicyConfig) -> Server:
    if policy.opa is None:
        raise ConfigError("authority.policy.opa is missing")
    try:
        from keybroker.authority.policy.opa_server import OpaServer  # noqa: PLC0415  its packages come with an extra
    except ModuleNotFoundError as err:
        raise ConfigError(f"{err.name} is not installed: pip install 'keybroker[opa]'") from err
    address = OpaAddress.of(policy.opa.url, policy.opa.ca, policy.opa.token)
    return OpaServer(address, policy.opa.deadline_ms / 1000)


async def _first(maker: _Maker, source: BundleSource, kept: Path) -> tuple[BundleCandidate, str]:
    """The newer of what the source has and what was kept, and what is wrong with the source."""
    old = await asyncio.to_thread(_read_kept, maker, kept)
    trouble = f"{maker.source_name}: has no policy bundle"
    try:
        packed = await source.look()
        if packed is not None:
            new = await asyncio.to_thread(maker.read, packed, maker.source_name)
            if old is not None and new.sha256 != old.sha256:
                _require_newer(new, old, maker.source_name)
            return await asyncio.to_thread(maker.candidate, new, maker.source_name), ""
    except ConfigError as err:
        trouble = str(err)
    if old is None:
        raise ConfigError(trouble)
    try:
        return await asyncio.to_thread(maker.candidate, old, str(kept)), trouble
    except ConfigError as err:
        raise ConfigError(f"{trouble}\n{err}") from err


def _read_kept(maker: _Maker, kept: Path) -> PolicyBundle | None:
    """The bundle that was in force. What is older is refused, so a broker does not start without being able to tell."""
    try:
        with kept.open("rb") as file:
            packed = file.read(MAX_BUNDLE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as err:
        raise ConfigError(f"{kept}: cannot be read: {err.strerror}") from err
    try:
        return maker.read(packed, str(kept))
    except ConfigError as err:
        raise ConfigError(f"{err}; it is the bundle that was in force: if keys or scope were changed on purpose, remove it") from err


def _require_newer(new: PolicyBundle, old: PolicyBundle, source: str) -> None:
    if new.revision < old.revision:
        raise ConfigError(f"{source}: revision {new.revision} is older than {old.revision}, which this broker has; publish a newer one")
    if new.revision == old.revision:
        raise ConfigError(f"{source}: is another bundle of revision {new.revision} than this broker has; give each its own revision")


def _keep(path: Path, packed: bytes) -> None:
    """Put the bundle in the place of the one that was kept, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        if path.exists() and path.read_bytes() == packed:
            return
        new = path.with_name(f".{path.name}.new")
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:  # noqa: PTH123  with its mode
            file.write(packed)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as err:
        raise ConfigError(f"{path}: cannot be written: {err.strerror}") from err
