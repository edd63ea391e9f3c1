"""Who may begin a TLS handshake: an address whose handshakes fail has to wait, before the next one costs anything.

A full handshake takes the event loop one to two milliseconds, a refusal at accept a few microseconds. So a flood of handshakes that fail
(no certificate, one of another CA, garbage, silence) is worth stopping before the handshake, and what tells a flood from a client
is that its handshakes fail. Each address has a bucket: a failure takes a token, time gives them back, and while the bucket is empty
connections from there are closed as they come. Nothing is taken from an address whose handshakes succeed, however many they are.

Honest clients behind the same address as a flood share its fate while the flood lasts; clients behind other addresses do not notice it.
IPv6 addresses count by their /64, because that is what one customer gets. The table is bounded: the address that was heard of longest ago
is forgotten, which gives it a full bucket, and an attacker with that many addresses is held by the limit of connections instead.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

BURST = 40.0
PER_SECOND = 4.0
MAX_ADDRESSES = 8_192


class Admission:
    """Remembers which addresses have failed lately.

    Args:
        burst: failures that an address may have at once.
        per_second: and from then on.
        max_addresses: remembered.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        burst: float = BURST,
        per_second: float = PER_SECOND,
        max_addresses: int = MAX_ADDRESSES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst = burst
        self._per_second = per_second
        self._max_addresses = max_addresses
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens left, and when that was

    @property
    def remembered(self) -> int:
        """Addresses that have failed and are not forgotten."""
        return len(self._buckets)

    def admits(self, address: str) -> bool:
        """Whether a handshake with this address may begin now."""
        return self._tokens(_network(address)) >= 1.0

    def failed(self, address: str) -> None:
        """A handshake with this address has failed."""
        network = _network(address)
        self._buckets[network] = (max(self._tokens(network) - 1.0, 0.0), self._clock())
        self._buckets.move_to_end(network)
        if len(self._buckets) > self._max_addresses:
            self._buckets.popitem(last=False)

    def _tokens(self, network: str) -> float:
        tokens, since = self._buckets.get(network, (self._burst, 0.0))
        return min(self._burst, tokens + (self._clock() - since) * self._per_second)


def _network(address: str) -> str:
    """What counts as one address: an IPv4 address, an IPv6 /64."""
    if ":" not in address:
        return address
    return str(ipaddress.IPv6Address(int(ipaddress.IPv6Address(address)) >> 64 << 64))
