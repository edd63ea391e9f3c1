"""Refusals as RFC 9457 problem details: the one file that knows HTTP statuses.

A problem's text names the rule that was broken, never the data that broke it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from keybroker.errors import KeyBrokerError, OverloadedError, RefusalError
from keybroker.frontend.exchange import HttpAnswer
from keybroker.frontend.shapes import ProblemDocument, ProblemPointer
from keybroker.model.call import Problem

MEDIA_TYPE = "application/problem+json"
_TYPE = "urn:keybroker:problem:"
_INSTANCE = "urn:keybroker:request:"
_NOT_FOUND = "There is no such thing, or nothing of it is granted to you."

RULES: Mapping[str, tuple[int, str]] = MappingProxyType(
    {
        "malformed": (400, "Malformed request"),
        "unauthenticated": (401, "No client certificate"),
        "svid-invalid": (401, "Not a valid SVID"),
        "denied": (403, "Denied"),
        "self-approval": (403, "Nobody approves his own request"),
        "approval-mismatch": (403, "Not an approval of this operation"),
        "not-found": (404, "Not found"),
        "method-not-allowed": (405, "Method not allowed"),
        "request-timeout": (408, "Request took too long"),
        "stale-base": (409, "Written for another version"),
        "replayed": (409, "Has taken effect before"),
        "in-progress": (409, "The first request is still under way"),
        "approval-consumed": (409, "The operation has been redeemed"),
        "approval-stale": (409, "The rules have changed since the request"),
        "approval-expired": (410, "The operation has expired"),
        "too-large": (413, "Body too large"),
        "uri-too-long": (414, "Request target too long"),
        "unsupported-media-type": (415, "Unsupported media type"),
        "invalid": (422, "Invalid request"),
        "idempotency-mismatch": (422, "Idempotency key used with another request"),
        "rate-limited": (429, "A limit is reached"),
        "frozen": (423, "Frozen"),
        "headers-too-large": (431, "Header fields too large"),
        "overloaded": (503, "Overloaded"),
        "hsm-unavailable": (503, "No token session in service"),
        "hsm-timeout": (504, "The token did not answer in time"),
        "policy-unavailable": (503, "The rules could not be asked"),
        "policy-error": (503, "The rules gave no decision"),
        "clock-untrusted": (503, "The broker's clock cannot be trusted"),
        "audit-unavailable": (503, "The use cannot be recorded"),
        "signature-self-check-failed": (503, "The signature did not verify"),
    }
)
"""Problem code to HTTP status and title."""


class ProblemError(KeyBrokerError):
    """A refusal by the authority, whole: with the use that it may name."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.code)
        self.problem = problem


def problem_of(err: RefusalError | ProblemError) -> Problem:
    """The parts of a refusal, whoever made it."""
    if isinstance(err, ProblemError):
        return err.problem
    return Problem.of(err)


def unexpected() -> Problem:
    """What a caller is told of a fault of ours: nothing but that it may try again."""
    return Problem("overloaded", "The request could not be finished.", retry_after=1)


def document(problem: Problem, request_id: str, pointer_prefix: str = "") -> ProblemDocument:
    """A problem as JSON sees it.

    Args:
        problem: a code that is not known is an outage.
        request_id: a ULID.
        pointer_prefix: where the faulty object is in the body; empty for the whole of it.
    """
    code = problem.code if problem.code in RULES else OverloadedError.code
    status, title = RULES[code]
    return ProblemDocument(
        type=_TYPE + code,
        title=title,
        status=status,
        detail=_NOT_FOUND if status == 404 else problem.detail,
        instance=_INSTANCE + request_id,
        errors=tuple(ProblemPointer(pointer_prefix + pointer, detail) for pointer, detail in problem.pointers),
        reasons=problem.reasons,
        use=problem.use,
    )


def render(problem: Problem, request_id: str, extra_headers: Mapping[str, str] | None = None) -> HttpAnswer:
    """A problem as an HTTP answer. Every 503 and 429 says when to try again; after a 401 the connection is of no more use."""
    shown = document(problem, request_id)
    body = msgspec.json.encode(shown)
    headers = {"content-type": MEDIA_TYPE, "cache-control": "no-store"}
    if shown.status in {429, 503} or problem.retry_after:
        headers["retry-after"] = str(problem.retry_after or 1)
    if shown.status == 401:
        headers["connection"] = "close"
    return HttpAnswer(shown.status, headers | dict(extra_headers or {}), body)
