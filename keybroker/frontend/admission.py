"""Who may begin a TLS handshake: an address whose handshakes fail has to wait, before the next one costs anything.

A full handshake takes the event loop one to two milliseconds, a refusal at accept some 50 microseconds. So a flood of handshakes that fail
(no certificate, one of another CA, garbage, a beginning without an end) is worth stopping before the handshake, and what tells a flood from
a client is that its handshakes fail. Each address has a bucket: a failure takes a token, time gives them back, and while the bucket is
empty connections from there are closed as they come. Nothing is taken from an address whose handshakes succeed, however many they are.

Honest clients behind the same address as a flood share its few handshakes while the flood lasts; what they have connected before does not
suffer. So the bucket fills fast enough for a fleet that is misconfigured (`PER_SECOND`), which costs at most 3 % of the event loop's time.
Clients behind other addresses do not notice.

A flood from many addresses would get that much for each. So there is one more bucket for all failures together, and while that is empty
only those are admitted who have completed a handshake before and have not failed lately; strangers share what comes back into it.

IPv6 addresses count by their /64, because that is what one customer gets. Both tables are bounded: the address that was heard of longest
ago is forgotten, which gives it a full bucket, and makes it a stranger.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

BURST = 64.0
PER_SECOND = 20.0
TOTAL_BURST = 400.0
TOTAL_PER_SECOND = 100.0
MAX_ADDRESSES = 8_192


class Admission:
    """Remembers which addresses have failed lately, and which have succeeded.

    Args:
        burst: failures that an address may have at once.
        per_second: and from then on.
        total_burst: failures that all addresses together may have at once.
        total_per_second: and from then on.
        max_addresses: remembered, of either kind.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        burst: float = BURST,
        per_second: float = PER_SECOND,
        total_burst: float = TOTAL_BURST,
        total_per_second: float = TOTAL_PER_SECOND,
        max_addresses: int = MAX_ADDRESSES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst = burst
        self._per_second = per_second
        self._total_burst = total_burst
        self._total_per_second = total_per_second
        self._max_addresses = max_addresses
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens left, and when that was
        self._total = (total_burst, clock())
        self._known: OrderedDict[str, None] = OrderedDict()

    @property
    def remembered(self) -> int:
        """Addresses that have failed and are not forgotten."""
        return len(self._buckets)

    def admits(self, address: str) -> bool:
        """Whether a handshake with this address may begin now."""
        if self._tokens(_network(address)) < 1.0:
            return False
        return self._total_tokens() >= 1.0 or self.knows(address)

    def knows(self, address: str) -> bool:
        """Whether this address is known to be good: it has completed a handshake, and has not failed lately."""
        network = _network(address)
        return network in self._known and self._tokens(network) >= self._burst

    def failed(self, address: str) -> None:
        """A handshake with this address has failed."""
        network, now = _network(address), self._clock()
        self._total = (max(self._total_tokens() - 1.0, 0.0), now)
        self._buckets[network] = (max(self._tokens(network) - 1.0, 0.0), now)
        self._buckets.move_to_end(network)
        if len(self._buckets) > self._max_addresses:
            self._buckets.popitem(last=False)

    def succeeded(self, address: str) -> None:
        """A handshake with this address is complete."""
        network = _network(address)
        self._known[network] = None
        self._known.move_to_end(network)
        if len(self._known) > self._max_addresses:
            self._known.popitem(last=False)

    def _tokens(self, network: str) -> float:
        tokens, since = self._buckets.get(network, (self._burst, 0.0))
        return min(self._burst, tokens + (self._clock() - since) * self._per_second)

    def _total_tokens(self) -> float:
        tokens, since = self._total
        return min(self._total_burst, tokens + (self._clock() - since) * self._total_per_second)


def _network(address: str) -> str:
    """What counts as one address: an IPv4 address, an IPv6 /64."""
    if ":" not in address:
        return address
    return str(ipaddress.IPv6Address(int(ipaddress.IPv6Address(address)) >> 64 << 64))
