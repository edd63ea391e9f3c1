"""Where a request comes from, cut into zones: ranges of addresses that no named network of the policies in question divides.

Two policies may mean different addresses by one name, so they are compared by address and not by name.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Iterable, Mapping

from keybroker.authority.policy.grants import Network

ELSEWHERE = 0
"""The zone of all addresses that are in no named network."""

Networks = Mapping[str, tuple[Network, ...]]
_Range = tuple[int, int, int]  # version of IP, first address, last address


class Zones:
    """The zones of some policies.

    Args:
        policies: the named networks of each.
    """

    def __init__(self, *policies: Networks) -> None:
        ranges = {_range(each) for networks in policies for of_name in networks.values() for each in of_name}
        self._ranges: list[_Range] = [(4, 0, -1)]  # ELSEWHERE has no range of its own
        for version in (4, 6):
            cuts = sorted({cut for of, first, last in ranges if of == version for cut in (first, last + 1)})
            for first, after in itertools.pairwise(cuts):
                if any(of == version and low <= first and after - 1 <= high for of, low, high in ranges):
                    self._ranges.append((version, first, after - 1))
        self.everywhere = frozenset(range(len(self._ranges)))

    def of(self, networks: Networks, names: Iterable[str]) -> frozenset[int]:
        """The zones of some named networks, as one policy defines them; everywhere for no name."""
        named = tuple(names)
        if not named:
            return self.everywhere
        wanted = [_range(each) for name in named for each in networks.get(name, ())]
        return frozenset(zone for zone, each in enumerate(self._ranges) if zone and any(_is_within(each, other) for other in wanted))

    def at(self, address: str) -> int:
        """The zone of an IP address; an IPv4 address that is written as IPv6 is that IPv4 address."""
        parsed = ipaddress.ip_address(address)
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped:
            parsed = parsed.ipv4_mapped
        place = (parsed.version, int(parsed), int(parsed))
        return next((zone for zone, each in enumerate(self._ranges) if zone and _is_within(place, each)), ELSEWHERE)

    def addresses(self, zones: Iterable[int]) -> tuple[str, ...]:
        """The address ranges of some zones, in CIDR form; `elsewhere` for what is in no named network."""
        found: list[str] = []
        for version in (4, 6):
            parts = [each for zone in sorted(zones) if zone for each in _networks(self._ranges[zone]) if each.version == version]
            found += map(str, ipaddress.collapse_addresses(parts))  # type: ignore[type-var]  # all are of one version
        return (*found, *(["elsewhere"] if ELSEWHERE in zones else []))


def _range(network: Network) -> _Range:
    return network.version, int(network.network_address), int(network.broadcast_address)


def _is_within(inner: _Range, outer: _Range) -> bool:
    return inner[0] == outer[0] and outer[1] <= inner[1] and inner[2] <= outer[2]


def _networks(zone: _Range) -> Iterable[Network]:
    version, first, last = zone
    if version == 4:
        return ipaddress.summarize_address_range(ipaddress.IPv4Address(first), ipaddress.IPv4Address(last))
    return ipaddress.summarize_address_range(ipaddress.IPv6Address(first), ipaddress.IPv6Address(last))
