"""What can go wrong on the way to the broker. A refusal *by* the broker is a `RefusalError` (keybroker/errors.py) instead."""

from __future__ import annotations

from keybroker.errors import KeyBrokerError


class SettingsError(KeyBrokerError):
    """A setting is missing or makes no sense. The text names the flag and the variable to set."""


class BrokerUnreachableError(KeyBrokerError):
    """There was no answer: no connection, no TLS, or no time left. Whether a request that was sent took effect is unknown."""


class BrokerIdentityError(KeyBrokerError):
    """Whoever answered is not the broker that was asked for. Not one byte of the request was sent to it."""


class BrokerAnswerError(KeyBrokerError):
    """The answer is not what the contract says (another program, or another version, answers at this address)."""
