"""The inventory: which keys there are, in which versions, and the public half that each was pinned with.

A key version's public key is pinned, durably and on record, when it is first seen. From then on only a token that shows the
same public key is asked to use it, and only a signature that verifies with it is released.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass

from keybroker.authority.journal import Entry, Journal
from keybroker.authority.store.sqlite import Pin
from keybroker.clock import Clock
from keybroker.config import AuthorityConfig, KeyConfig
from keybroker.model.key import Algorithm, KeyFamily, KeyVersion
from keybroker.model.record import Draft, KeyFacts, RecordKind
from keybroker.model.task import KeyOpened, KeyRefused, OpenKey
from keybroker.telemetry import logger

_FAMILIES = frozenset(family.value for family in KeyFamily)

_log = logger()


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """One configured key and its pinned versions, oldest first."""

    name: str
    token: str
    labels: tuple[tuple[str, str], ...]
    versions: tuple[KeyVersion, ...]

    @property
    def current(self) -> KeyVersion | None:
        """The version that signs: the highest. None until a token has shown it."""
        return self.versions[-1] if self.versions else None

    @property
    def algorithms(self) -> tuple[Algorithm, ...]:
        """What the current version can do."""
        return tuple(each for each in Algorithm if self.current and each.family is self.current.family)


def ref_of(name: str, version: int) -> str:
    """The name by which a worker knows a key version."""
    return f"{name}/{version}"


class Keyring:
    """Configured keys, joined with what the tokens show and what was pinned."""

    def __init__(self, config: AuthorityConfig, pins: list[Pin], journal: Journal, clock: Clock) -> None:
        self._config = config.keys
        self._journal = journal
        self._clock = clock
        self._pins = {ref_of(pin.name, pin.version): pin for pin in pins}
        self._refusals: dict[tuple[str, str], str] = {}  # by worker and key version
        self._one_at_a_time = asyncio.Lock()  # two workers may show a new key at once: the first pins it, the second is compared
        self._entries = {name: self._entry(name, key) for name, key in config.keys.items()}

    def find(self, name: str) -> KeyEntry | None:
        """A key by its name, or None."""
        return self._entries.get(name)

    def names(self) -> list[str]:
        """All configured keys, in order."""
        return sorted(self._entries)

    def refusals(self) -> dict[str, str]:
        """Key versions that some worker must not use, with the rules that they break there."""
        found: dict[str, dict[str, None]] = {}
        for (_, ref), rule in self._refusals.items():
            found.setdefault(ref, {})[rule] = None
        return {ref: ", ".join(rules) for ref, rules in found.items()}

    def to_open(self) -> dict[str, tuple[OpenKey, ...]]:
        """For each token, what its workers have to find."""
        wanted: dict[str, list[OpenKey]] = {}
        for name, key in self._config.items():
            for version in key.versions:
                task = OpenKey(ref_of(name, version.version), version.object, bytes.fromhex(version.id))
                wanted.setdefault(key.token, []).append(task)
        return {token: tuple(tasks) for token, tasks in wanted.items()}

    async def judge(self, token: str, worker: str, found: KeyOpened | KeyRefused) -> bool:
        """Whether a worker may be asked to use what it found. Pins what is new; refuses, on record, what is wrong."""
        async with self._one_at_a_time:
            if isinstance(found, KeyRefused):
                await self._refuse(token, worker, found.ref, found.rule)
                return False
            if found.family not in _FAMILIES:
                await self._refuse(token, worker, found.ref, "key-unsupported")
                return False
            pin = self._pins.get(found.ref) or await self._pin(token, found)
            if pin.spki != found.spki:
                await self._refuse(token, worker, found.ref, "key-is-not-the-pinned-one")
                return False
            self._refusals.pop((worker, found.ref), None)
            return True

    async def _pin(self, token: str, found: KeyOpened) -> Pin:
        name, _, version = found.ref.rpartition("/")
        pin = Pin(name, int(version), KeyFamily(found.family).value, found.spki, self._clock.now_us())
        facts = KeyFacts(name, pin.version, hashlib.sha256(pin.spki).hexdigest())
        draft = Draft(kind=RecordKind.ADMIN, key=facts, body={"change": "key-pinned", "token": token})
        await self._journal.write(Entry(draft, pin=pin))
        self._pins[found.ref] = pin
        self._entries[name] = self._entry(name, self._config[name])
        _log.info("key pinned", key=name, version=pin.version)
        return pin

    async def _refuse(self, token: str, worker: str, ref: str, rule: str) -> None:
        """On record once, however many workers of the token find the same."""
        is_news = all(each != rule for (_, refused), each in self._refusals.items() if refused == ref)
        self._refusals[worker, ref] = rule
        if not is_news:
            return
        _log.error("key refused", key=ref, token=token, rule=rule)
        await self._journal.write(
            Entry(Draft(kind=RecordKind.SECURITY, body={"event": "key-refused", "detail": f"{ref}: {rule}", "count": 1}))
        )

    def _entry(self, name: str, key: KeyConfig) -> KeyEntry:
        labels = tuple(sorted(key.labels.items()))
        versions: list[KeyVersion] = []
        for each in key.versions:
            pin = self._pins.get(ref_of(name, each.version))
            if pin:
                digest = hashlib.sha256(pin.spki).hexdigest()
                versions.append(KeyVersion(name, each.version, KeyFamily(pin.family), pin.spki, digest, key.token, labels))
        return KeyEntry(name, key.token, labels, tuple(versions))
