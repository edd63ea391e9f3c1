"""What can go wrong on the way to the broker. A refusal *by* the broker is a `RefusalError` (keybroker/errors.py) instead."""

from __future__ import annotations

from keybroker.errors import KeyBrokerError


class SettingsError(KeyBrokerError):
    """A setting is missing or makes no sense. The text names the flag and the variable to set."""


class BrokerUnreachableError(KeyBrokerError):
    """There was no answer: no connection, no TLS, or no time left.

    Attributes:
        was_sent: whether the request, or a part of it, may have reached the broker. If not, nothing has happened there; if so, whether
            it took effect is unknown.
    """

    def __init__(self, detail: str, *, was_sent: bool = True) -> None:
        super().__init__(detail)
        self.was_sent = was_sent


class BrokerIdentityError(KeyBrokerError):
    """Whoever answered is not the broker that was asked for. Not one byte of the request was sent to it."""


class BrokerAnswerError(KeyBrokerError):
    """The answer is not what the contract says (another program, or another version, answers at this address)."""
