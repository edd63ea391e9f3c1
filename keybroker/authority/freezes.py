"""The freezes in force: asked about before each use of a key, whatever the rules say."""

from __future__ import annotations

from collections.abc import Iterable

from keybroker.errors import FrozenError
from keybroker.model.freeze import Freeze, FreezeKind

_TEXTS: dict[FreezeKind, str] = {
    "workload": "Your identity is frozen.",
    "key": "This key is frozen.",
    "token": "The token of this key is frozen.",
    "everything": "Everything is frozen.",
}


class Freezes:
    """A set of freezes. Several may stop the same target: each is lifted by itself."""

    def __init__(self, stored: Iterable[Freeze]) -> None:
        self._by_id = {freeze.id: freeze for freeze in stored}
        self._targets = self._collect()

    def all(self) -> tuple[Freeze, ...]:
        """Every freeze in force, oldest first."""
        return tuple(self._by_id[each] for each in sorted(self._by_id))

    def find(self, number: str) -> Freeze | None:
        """A freeze by its id, or None."""
        return self._by_id.get(number)

    def add(self, freeze: Freeze) -> None:
        """From now on this is stopped."""
        self._by_id[freeze.id] = freeze
        self._targets = self._collect()

    def remove(self, number: str) -> None:
        """This freeze stops nothing any more."""
        del self._by_id[number]
        self._targets = self._collect()

    def refusal(self, workload: str, key: str, token: str) -> FrozenError | None:
        """Why this workload may not use this key now; None if no freeze says so."""
        if not self._targets:
            return None
        asked: tuple[tuple[FreezeKind, str], ...] = (("everything", ""), ("workload", workload), ("key", key), ("token", token))
        return next((_frozen(kind) for kind, target in asked if (kind, target) in self._targets), None)

    def refusal_of_caller(self, workload: str) -> FrozenError | None:
        """Why this identity may not act on the broker: it is frozen itself.

        A freeze of everything stops keys, not people: else nobody could lift it.
        """
        return _frozen("workload") if self.stops(workload) else None

    def stops(self, workload: str) -> bool:
        """Whether this identity is frozen itself."""
        return ("workload", workload) in self._targets

    def _collect(self) -> frozenset[tuple[FreezeKind, str]]:
        return frozenset((freeze.kind, freeze.target) for freeze in self._by_id.values())


def _frozen(kind: FreezeKind) -> FrozenError:
    return FrozenError(_TEXTS[kind], reasons=(f"frozen-{kind}",))
