"""What can go wrong on the way to the broker. A refusal *by* the broker is a `RefusalError` (keybroker/errors.py) instead."""

from __future__ import annotations

from keybroker.client.results import Pending
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


class PendingError(KeyBrokerError):
    """Nothing is signed yet, because others have to approve it first, or a cool-off is not over. Ask again by redeeming the operation.

    Attributes:
        pending: the operation that waits, and what it needs.
    """

    def __init__(self, pending: Pending) -> None:
        open_stages = [each for each in pending.needs.stages if len(each.given) < each.approvals]
        what = "; ".join(f"{each.approvals - len(each.given)} more of {', '.join(each.of)} ({each.name})" for each in open_stages)
        waits = f"it can be redeemed from {pending.needs.not_before} on" if not what and pending.needs.not_before else f"it needs {what}"
        super().__init__(f"operation {pending.operation} is pending: {waits}, until {pending.expires}")
        self.pending = pending


class NothingToApproveError(KeyBrokerError):
    """No stage of this operation waits for us: it is not pending, it is ours, we have approved it, or it is another's turn."""


class BrokerIdentityError(KeyBrokerError):
    """Whoever answered is not the broker that was asked for. Not one byte of the request was sent to it."""


class BrokerAnswerError(KeyBrokerError):
    """The answer is not what the contract says (another program, or another version, answers at this address)."""
