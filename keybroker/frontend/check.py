"""`keybroker check`, the frontend's part."""

from __future__ import annotations

from keybroker.config import FrontendConfig
from keybroker.errors import ConfigError
from keybroker.frontend.tls import ServerTls
from keybroker.identity.bundle import TrustBundles
from keybroker.identity.svid_file import SvidFile
from keybroker.process import uid_of


def problems(config: FrontendConfig) -> list[str]:
    """What is wrong, each with its cure; empty if nothing is."""
    found = []
    try:
        ServerTls(config.svid, TrustBundles.load(config.bundles))
        SvidFile.load(config.svid)
    except ConfigError as err:
        found.append(str(err))
    try:
        uid_of(config.authority_user)
    except ConfigError as err:
        found.append(str(err))
    return found
