"""From a configuration to the rules that are live: grant files or signed bundles, decided in this process or by an OPA server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from keybroker.authority.policy.holder import LivePolicy, PolicyHolder
from keybroker.authority.policy.opa_address import UNIX, host_and_port_of
from keybroker.config import AuthorityConfig
from keybroker.errors import ConfigError
from keybroker.sandbox import around

# What the C library reads to find the address of a name.
_RESOLVER = tuple(Path("/etc", name) for name in ("hosts", "resolv.conf", "host.conf", "gai.conf"))


@dataclass(frozen=True, slots=True)
class Touches:
    """What of this host the rules and their engine need.

    Attributes:
        reads: files and directories.
        ports: TCP ports to connect to.
    """

    reads: tuple[Path, ...]
    ports: tuple[int, ...]


def touches(config: AuthorityConfig) -> Touches:
    """For the walls of the room."""
    policy = config.policy
    reads = [*around(policy.module)]
    urls = []
    if config.grants:
        reads.append(config.grants)
    if policy.bundle:
        bundle = policy.bundle
        reads += around(bundle.path, bundle.ca, bundle.token, *bundle.keys)
        reads += [bundle.path] if bundle.path else []
        urls += [bundle.url] if bundle.url else []
    if policy.opa:
        reads += around(policy.opa.ca, policy.opa.token)
        urls += [] if policy.opa.url.startswith(UNIX) else [policy.opa.url]
    if urls:
        reads += [*_RESOLVER, *(file.resolve() for file in _RESOLVER)]
    return Touches(tuple(reads), tuple(host_and_port_of(url)[1] for url in urls))


async def load(config: AuthorityConfig, *, is_kept: bool = True) -> LivePolicy:
    """The first rules.

    Args:
        is_kept: whether a bundle is kept beside the database; not where one only looks.

    Raises:
        ConfigError: they cannot be used.
    """
    known_keys = frozenset(config.keys)
    if config.policy.bundle:
        from keybroker.authority.policy.bundle_holder import BundleHolder  # noqa: PLC0415  takes packages that only bundles need

        return await BundleHolder.load(config.policy, config.state, known_keys, is_kept=is_kept)
    if config.grants is None:
        raise ConfigError("authority.grants is missing")
    return await PolicyHolder.load(config.grants, config.policy.module, known_keys)
