"""Every error has an exit status that scripts can rely on, and a cure."""

from __future__ import annotations

import pytest

from keybroker import errors
from keybroker.cli.arguments import UsageError
from keybroker.cli.connection import OwnFilesError
from keybroker.cli.exits import ExitStatus, cure_of, status_of
from keybroker.cli.moments import MomentError
from keybroker.cli.world import PlanError, WorldError
from keybroker.client import Needs, Pending
from keybroker.client.errors import (
    BrokerAnswerError,
    BrokerIdentityError,
    BrokerUnreachableError,
    NothingToApproveError,
    PendingError,
    SettingsError,
)
from keybroker.errors import ConfigError, KeyBrokerError, RefusalError

DENIED = {"unauthenticated", "svid-invalid", "denied", "not-found", "self-approval", "approval-mismatch", "frozen"}
USAGE = {"invalid", "too-large"}
FAILED = {
    "malformed", "method-not-allowed", "uri-too-long", "headers-too-large", "unsupported-media-type", "idempotency-mismatch",
    "approval-consumed", "approval-stale", "approval-expired", "",
    "stale-base", "replayed",
}  # fmt: skip


@pytest.mark.parametrize("code", sorted(RefusalError.registry))
def test_refusal_has_the_status_of_what_can_be_done_about_it(code: str) -> None:
    status = status_of(RefusalError.of(code)("No."))
    if code in DENIED:
        assert status is ExitStatus.DENIED
    elif code in USAGE:
        assert status is ExitStatus.USAGE
    else:
        assert status is (ExitStatus.FAILED if code in FAILED else ExitStatus.UNAVAILABLE)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyBrokerError("x"), 1),
        (ConfigError("x"), 1),
        (OwnFilesError("x"), 1),
        (WorldError("x"), 1),
        (BrokerIdentityError("x"), 1),
        (BrokerAnswerError("x"), 1),
        (SettingsError("x"), 2),
        (UsageError("x"), 2),
        (MomentError("x"), 2),
        (PlanError("x"), 2),
        (BrokerUnreachableError("x"), 5),
        (errors.RoomUnavailableError("x"), 5),
        (NothingToApproveError("x"), 3),
        (PendingError(Pending("01J", Needs(()), "")), 4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_errors_have_their_status(error: KeyBrokerError, status: int) -> None:
    assert status_of(error) == status


@pytest.mark.parametrize("error", [BrokerUnreachableError("x"), BrokerIdentityError("x"), OwnFilesError("x"), errors.DeniedError("x")])
def test_error_that_does_not_say_its_cure_has_one(error: KeyBrokerError) -> None:
    assert cure_of(error)


def test_what_trying_again_may_help_says_so() -> None:
    for code, kind in RefusalError.registry.items():
        if status_of(kind("No.")) is ExitStatus.UNAVAILABLE and code != "request-timeout":
            assert cure_of(kind("No.")), code
