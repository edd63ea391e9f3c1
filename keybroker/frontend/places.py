"""Places for connections: in all, of one address, of one SVID. No I/O.

A connection takes a place before TLS costs anything. Where all are taken, the connection that has been there longest without having
completed its handshake gives its place up to the next one: an honest client needs milliseconds for a handshake, so clients that connect
and say nothing, or begin and do not go on, push out each other. Connections that have completed theirs are never pushed out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

Name = TypeVar("Name")


class Place:
    """The place of one connection.

    Attributes:
        address: the IP address that it counts for.
        give_up: called when another connection gets this place.
        is_taken: until the connection has ended, or has been pushed out.
    """

    __slots__ = ("_places", "address", "give_up", "is_taken")

    def __init__(self, places: Places, address: str) -> None:
        self._places = places
        self.address = address
        self.give_up: Callable[[], object] = _nothing
        self.is_taken = True

    def keep(self) -> None:
        """The handshake is complete: nobody gets this place before the connection has ended."""
        self.give_up = _nothing
        self._places.forget_newcomer(self)

    def leave(self) -> None:
        """The connection has ended. However often it is called, the place is free once."""
        if self.is_taken:
            self.is_taken = False
            self._places.free(self)


class Places:
    """Counts connections.

    Args:
        in_all: places there are.
        per_address: of one IP address.
    """

    def __init__(self, in_all: int, per_address: int) -> None:
        self._in_all = in_all
        self._per_address = per_address
        self._taken = 0
        self._taken_by: Counter[str] = Counter()
        self._newcomers: dict[Place, None] = {}  # without a completed handshake; whoever came first is first
        self._newcomers_of: dict[str, dict[Place, None]] = {}  # the same, by address

    @property
    def taken(self) -> int:
        """Places that are taken."""
        return self._taken

    def enter(self, address: str) -> Place | None:
        """A place for a new connection; None if all are taken by connections that keep them."""
        if self._taken_by[address] >= self._per_address and not _push_out(self._newcomers_of.get(address, {})):
            return None
        if self._taken >= self._in_all and not _push_out(self._newcomers):
            return None
        place = Place(self, address)
        self._taken += 1
        self._taken_by[address] += 1
        self._newcomers[place] = None
        self._newcomers_of.setdefault(address, {})[place] = None
        return place

    def forget_newcomer(self, place: Place) -> None:
        """It is none any more."""
        if place in self._newcomers:
            del self._newcomers[place]
            others = self._newcomers_of[place.address]
            del others[place]
            if not others:
                del self._newcomers_of[place.address]

    def free(self, place: Place) -> None:
        """Somebody else can have it."""
        self.forget_newcomer(place)
        self._taken -= 1
        _count_down(self._taken_by, place.address)


class SvidShares:
    """Counts the connections of each SVID.

    Args:
        most: connections that one SVID may have.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: Counter[bytes] = Counter()

    def enter(self, svid: bytes) -> bool:
        """Count one connection; False, and not counted, if this SVID has as many as it may.

        Args:
            svid: what tells SVIDs apart, such as the hash of the leaf.
        """
        if self._taken[svid] >= self._most:
            return False
        self._taken[svid] += 1
        return True

    def leave(self, svid: bytes) -> None:
        """A connection that was counted has ended."""
        _count_down(self._taken, svid)


def _nothing() -> None:
    return


def _push_out(newcomers: dict[Place, None]) -> bool:
    """Free the place of the one that came first; False if there is none."""
    for place in newcomers:
        place.leave()
        place.give_up()
        return True
    return False


def _count_down(counts: Counter[Name], name: Name) -> None:
    counts[name] -= 1
    if not counts[name]:
        del counts[name]
