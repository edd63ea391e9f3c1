"""What a courier would find wrong before it carries anything."""

from __future__ import annotations

from keybroker.config import CourierConfig
from keybroker.courier.delivery import context_for
from keybroker.errors import ConfigError, KeyBrokerError
from keybroker.process import uid_of


def problems(config: CourierConfig) -> list[str]:
    """Each problem, with its cure. Nothing is sent."""
    found: list[str] = []
    for name, hook in config.hooks.items():
        try:
            context_for(hook.ca)
        except ConfigError as err:
            found.append(f"courier.hooks.{name}: {err}")
    try:
        uid_of(config.authority_user)
    except KeyBrokerError as err:
        found.append(f"courier.authority_user: {err}")
    return found
