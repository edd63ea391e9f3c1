"""The error tree of every room. Imports nothing, knows no HTTP and no exit codes.

Two families. A `RefusalError` reaches a caller: it has a stable `code` (the last part of `urn:keybroker:problem:CODE`), and its text
names the rule that was broken, never the data that broke it. The others stay inside: they reach an operator, in a log or on stderr,
and say the cure.

One file turns codes into HTTP (`frontend/problems.py`) and one into exit codes (`cli/exits.py`).
"""

from __future__ import annotations

from typing import ClassVar


class KeyBrokerError(Exception):
    """The root of everything that keybroker raises on purpose."""


class ConfigError(KeyBrokerError):
    """A configuration, grant or bundle file cannot be used. The text names the file, the place and the cure."""


class WireError(KeyBrokerError):
    """A frame between two rooms is too large, malformed, or comes from a process that has no business there."""


class RoomUnavailableError(KeyBrokerError):
    """The room on the right does not answer (it is restarting, or its deadline has passed)."""


class TokenError(KeyBrokerError):
    """A PKCS#11 token refused or failed. The text holds the CKR name, never a PIN."""


class StoreError(KeyBrokerError):
    """The state directory cannot keep its promise (locked by another broker, unsafe settings, a newer format)."""


class RefusalError(KeyBrokerError):
    """A caller gets no for an answer.

    Attributes:
        detail: one sentence for people; never payload, PIN, path or SQL.
        pointers: (JSON pointer, what is wrong there) pairs, where the fault is in a body.
        reasons: machine-readable rule names, from the policy.
        retry_after: whole seconds after which trying again makes sense; 0 where it does not.
        request_id: how the broker names the request in its record and log; only where the refusal came over the network.
        use: ULID of the use that is on record although nothing was released; empty if there is none.
    """

    code: ClassVar[str] = ""
    registry: ClassVar[dict[str, type[RefusalError]]] = {}

    def __init__(
        self,
        detail: str,
        *,
        pointers: tuple[tuple[str, str], ...] = (),
        reasons: tuple[str, ...] = (),
        retry_after: int = 0,
        request_id: str = "",
        use: str = "",
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.pointers = pointers
        self.reasons = reasons
        self.retry_after = retry_after
        self.request_id = request_id
        self.use = use

    def __init_subclass__(cls) -> None:
        RefusalError.registry.setdefault(cls.code, cls)  # the first of a code is what others say it is

    @staticmethod
    def of(code: str) -> type[RefusalError]:
        """The class of a code that came over a wire; an unknown code is an outage, never a success."""
        return RefusalError.registry.get(code, OverloadedError)


class MalformedError(RefusalError):
    """The bytes are not what the content type says, or not HTTP."""

    code = "malformed"


class InvalidError(RefusalError):
    """Well-formed, but a field is missing, unknown, of the wrong type or out of bounds. `pointers` says which."""

    code = "invalid"


class MethodNotAllowedError(RefusalError):
    """The route exists, the method does not."""

    code = "method-not-allowed"


class RequestTimeoutError(RefusalError):
    """The caller took too long to send its request."""

    code = "request-timeout"


class TooLargeError(RefusalError):
    """The body is larger than the route takes."""

    code = "too-large"


class UriTooLongError(RefusalError):
    """The request target is longer than 8 KiB."""

    code = "uri-too-long"


class HeadersTooLargeError(RefusalError):
    """More than 100 header fields, or more than 16 KiB of them."""

    code = "headers-too-large"


class UnsupportedMediaTypeError(RefusalError):
    """A body that does not call itself application/json."""

    code = "unsupported-media-type"


class UnauthenticatedError(RefusalError):
    """No client certificate."""

    code = "unauthenticated"


class SvidInvalidError(RefusalError):
    """The certificate chain is not a valid X.509-SVID of a trust domain that this broker trusts.

    `reasons` holds the one rule that was broken, for example `leaf-is-ca`. `about` is for the record, not for the caller: the SPIFFE ID
    that was claimed, as far as it could be read, and whose authority vouched for it, if another's.
    """

    code = "svid-invalid"
    about: str = ""


class DeniedError(RefusalError):
    """A rule said no. Names the rule, never the request data."""

    code = "denied"


class NotFoundError(RefusalError):
    """No such thing, or nothing of it is granted to this caller: which of the two is not said."""

    code = "not-found"


class FrozenError(RefusalError):
    """The rules allow it, and somebody has stopped it for now. `reasons` says what is frozen."""

    code = "frozen"


class StaleBaseError(RefusalError):
    """A change was written for something that has changed meanwhile."""

    code = "stale-base"


class ReplayedError(RefusalError):
    """This very change has taken effect before."""

    code = "replayed"


class InProgressError(RefusalError):
    """The first request with this idempotency key is still running."""

    code = "in-progress"


class IdempotencyMismatchError(RefusalError):
    """The idempotency key was used before, with another body."""

    code = "idempotency-mismatch"


class RateLimitedError(RefusalError):
    """A limit of a grant has no unit left, or as much waits already as may. `retry_after` says when trying again makes sense."""

    code = "rate-limited"


class ClockUntrustedError(RefusalError):
    """The clock was set, or jumped over a boot; what depends on time is refused until an operator has acknowledged it."""

    code = "clock-untrusted"


class OverloadedError(RefusalError):
    """Too much at once, or the room that would answer is restarting."""

    code = "overloaded"


class HsmUnavailableError(RefusalError):
    """No session of the token that holds this key is in service. No key was used."""

    code = "hsm-unavailable"


class HsmTimeoutError(RefusalError):
    """The token did not answer in time. Whether it signed is unknown; nothing was released."""

    code = "hsm-timeout"


class SelfCheckError(RefusalError):
    """The token's signature does not verify with the pinned public key. It was destroyed, not released."""

    code = "signature-self-check-failed"


class PolicyUnavailableError(RefusalError):
    """The policy engine did not answer within its deadline."""

    code = "policy-unavailable"


class PolicyFailedError(RefusalError):
    """The policy answered something that is not a decision. Denied, and alerted like an outage."""

    code = "policy-error"


class AuditUnavailableError(RefusalError):
    """The use could not be made durable in the record, so it did not happen or was not released."""

    code = "audit-unavailable"


class AuditBusyError(AuditUnavailableError):
    """As above, because another process has held the database for longer than a commit waits; to callers, an overload."""

    code = OverloadedError.code


class SelfApprovalError(RefusalError):
    """Nobody approves what he asked for himself, with whichever of his identities."""

    code = "self-approval"


class ApprovalMismatchError(RefusalError):
    """The approval is not one of this operation by this caller: another statement, another signature. `reasons` says what differs."""

    code = "approval-mismatch"


class ApprovalConsumedError(RefusalError):
    """The operation has been redeemed."""

    code = "approval-consumed"


class ApprovalStaleError(RefusalError):
    """The rules or the key have changed since the operation was asked for; what was approved stands for nothing any more."""

    code = "approval-stale"


class ApprovalExpiredError(RefusalError):
    """The operation was not approved and redeemed in time."""

    code = "approval-expired"
