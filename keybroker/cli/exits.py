"""What the program's exit status means, and what to do about each error: the one place where both are decided."""

from __future__ import annotations

import enum

from keybroker import errors
from keybroker.cli.arguments import UsageError
from keybroker.cli.connection import OwnFilesError
from keybroker.client.errors import (
    BrokerAnswerError,
    BrokerIdentityError,
    BrokerUnreachableError,
    NothingToApproveError,
    PendingError,
    SettingsError,
)


class ExitStatus(enum.IntEnum):
    """The contract with scripts."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    DENIED = 3
    PENDING = 4  # an approval is missing
    UNAVAILABLE = 5  # trying again later makes sense


_STATUSES: dict[type[errors.KeyBrokerError], ExitStatus] = {
    errors.KeyBrokerError: ExitStatus.FAILED,
    SettingsError: ExitStatus.USAGE,
    UsageError: ExitStatus.USAGE,
    errors.InvalidError: ExitStatus.USAGE,
    errors.TooLargeError: ExitStatus.USAGE,
    errors.UnauthenticatedError: ExitStatus.DENIED,
    errors.SvidInvalidError: ExitStatus.DENIED,
    errors.DeniedError: ExitStatus.DENIED,
    errors.NotFoundError: ExitStatus.DENIED,
    errors.SelfApprovalError: ExitStatus.DENIED,
    errors.ApprovalMismatchError: ExitStatus.DENIED,
    NothingToApproveError: ExitStatus.DENIED,
    PendingError: ExitStatus.PENDING,
    errors.FrozenError: ExitStatus.DENIED,
    errors.RequestTimeoutError: ExitStatus.UNAVAILABLE,
    errors.InProgressError: ExitStatus.UNAVAILABLE,
    errors.RateLimitedError: ExitStatus.UNAVAILABLE,
    errors.ClockUntrustedError: ExitStatus.UNAVAILABLE,
    errors.OverloadedError: ExitStatus.UNAVAILABLE,
    errors.HsmUnavailableError: ExitStatus.UNAVAILABLE,
    errors.HsmTimeoutError: ExitStatus.UNAVAILABLE,
    errors.SelfCheckError: ExitStatus.UNAVAILABLE,
    errors.PolicyUnavailableError: ExitStatus.UNAVAILABLE,
    errors.PolicyFailedError: ExitStatus.UNAVAILABLE,
    errors.AuditUnavailableError: ExitStatus.UNAVAILABLE,
    errors.RoomUnavailableError: ExitStatus.UNAVAILABLE,
    BrokerUnreachableError: ExitStatus.UNAVAILABLE,
}

_TRY_AGAIN = "try again; if it goes on, tell whoever runs the broker"
_CURES: dict[type[errors.KeyBrokerError], str] = {
    OwnFilesError: "check --svid (KEYBROKER_SVID) and --bundle (KEYBROKER_BUNDLE)",
    errors.TooLargeError: "a message is at most 256 KiB: use --digest, which sends only the hash of the file",
    errors.SvidInvalidError: "get a fresh SVID, and check --svid; `openssl x509 -text` shows what is in it",
    errors.DeniedError: "whoever writes the grants can change them; for a signature, `keybroker sign --explain` shows the rules",
    errors.NotFoundError: "check the name with `keybroker keys list`; if it is right, ask for a grant on it",
    errors.SelfApprovalError: "ask another approver",
    errors.ApprovalMismatchError: "look at it again with `keybroker operations show`, and approve what it shows",
    errors.ApprovalConsumedError: "its use is on record; ask for a new signature",
    errors.ApprovalStaleError: "ask for a new signature: what was approved is not what the rules ask for now",
    errors.ApprovalExpiredError: "ask for a new signature",
    NothingToApproveError: "`keybroker operations list` shows what waits for whom",
    PendingError: "approvers run `keybroker operations approve`; then `keybroker operations redeem`, or the same change with --operation",
    errors.FrozenError: "somebody has stopped this on purpose: ask whoever responds to incidents; `keybroker freezes` shows them why",
    errors.StaleBaseError: "look at the live rules with `keybroker policy live`, and propose again",
    errors.ReplayedError: "this change has been made already: nothing is left to do",
    errors.IdempotencyMismatchError: "give each new request its own idempotency key",
    errors.InProgressError: "ask again with the same idempotency key",
    errors.RateLimitedError: "wait; `keybroker sign --explain` shows what is left of each limit, `keybroker operations list` what waits",
    errors.ClockUntrustedError: "tell whoever runs the broker: `keybroker clock show` says what happened",
    errors.OverloadedError: _TRY_AGAIN,
    errors.HsmUnavailableError: _TRY_AGAIN,
    errors.HsmTimeoutError: "look the use up in the record: whether the token signed is unknown, nothing was released",
    errors.SelfCheckError: "tell whoever runs the broker: the token made a wrong signature, which was destroyed",
    errors.PolicyUnavailableError: _TRY_AGAIN,
    errors.PolicyFailedError: "tell whoever runs the broker: its policy gives no decision",
    errors.AuditUnavailableError: _TRY_AGAIN,
    BrokerUnreachableError: "is the broker running? check --url (KEYBROKER_URL)",
    BrokerIdentityError: "check --url, --bundle and --broker-id; nothing was sent",
    BrokerAnswerError: "check --url, and that program and broker are of versions that go together",
}


def status_of(error: errors.KeyBrokerError) -> ExitStatus:
    """The exit status of an error: that of the nearest class in the tree."""
    return next(_STATUSES[kind] for kind in type(error).__mro__ if kind in _STATUSES)


def cure_of(error: errors.KeyBrokerError) -> str:
    """What its reader can do; empty where the text of the error says it already."""
    return _CURES.get(type(error), "")
