"""The three routes that a workload signs with: bytes of JSON in, one ask to the authority, bytes of JSON out.

They are past any framework, with a typed decoder, because a signature passes here: a framework's route costs as much as all the rest.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec

from keybroker.errors import InvalidError, OverloadedError
from keybroker.frontend import bodies, problems
from keybroker.frontend.authority_link import BATCH_SECONDS, AuthorityLink
from keybroker.frontend.exchange import Exchange, HttpAnswer, HttpRequest
from keybroker.frontend.metrics import FrontendMetrics
from keybroker.frontend.shapes import BatchResults, Explanation, PendingUse, ProblemDocument, SignedUse
from keybroker.model.call import BatchReply, Explain, ExplainReply, Pending, Problem, Sign, SignBatch, Signed, UseReply
from keybroker.model.request import MAX_BATCH_BYTES, SignBody

_IDEMPOTENCY_KEY = re.compile(rb"[A-Za-z0-9_-]{1,64}")
_BATCH_END = b"/sign/batch"
_APPROVALS_END = b"/approvals"
_CHANGES = b"/v1/admin/policy/changes"
MAX_CHANGE_BYTES = 3 * 1024 * 1024  # two of rules, escaped as badly as can be expected
_JSON_FIELDS = {"content-type": "application/json", "cache-control": "no-store"}


def body_limit(path: bytes) -> int:
    """How many bytes a body may have, by the path of the request target."""
    if path.endswith(_APPROVALS_END):
        return bodies.MAX_APPROVAL_BODY_BYTES
    if path == _CHANGES:
        return MAX_CHANGE_BYTES
    return MAX_BATCH_BYTES if path.endswith(_BATCH_END) else bodies.MAX_SIGN_BODY_BYTES


class Signing:
    """Answers `sign`, `sign/batch` and `sign/explain`: POST, the key's name from the path."""

    def __init__(self, authority: AuthorityLink, metrics: FrontendMetrics) -> None:
        self._authority = authority
        self._metrics = metrics

    async def sign(self, exchange: Exchange, key: str, request: HttpRequest) -> HttpAnswer:
        """One use of one key."""
        body = bodies.sign_body(json_body(request))
        ask = Sign(key, body, idempotency_key_of(request))
        exchange.laps.lap("parse")
        reply = await self._authority.ask(exchange, ask, UseReply)
        exchange.laps.lap("authority")
        answer = use_answer(reply)
        self._metrics.signed(exchange.laps)
        return answer

    async def sign_batch(self, exchange: Exchange, key: str, request: HttpRequest) -> HttpAnswer:
        """Several uses of one key. An item that cannot be read is a problem in its place; the others are asked for."""
        data = json_body(request)
        items = bodies.batch_items(data)
        idempotency_key = idempotency_key_of(request)
        digest = hashlib.sha256(data).digest() if idempotency_key else b""
        del data  # large ones are to be in memory once
        readable = tuple(item for item in items if isinstance(item, SignBody))
        # Asked even where no item can be read: who does not belong here is to be told so first.
        reply = await self._authority.ask(exchange, SignBatch(key, readable, idempotency_key, digest), BatchReply, BATCH_SECONDS)
        if len(reply.results) != len(readable):  # only a bug in one of our rooms: whose answer is whose is not to be guessed
            raise OverloadedError("The request could not be finished.", retry_after=1)
        answers = iter(reply.results)
        return json_answer(BatchResults(tuple(_result(item, answers, number, exchange) for number, item in enumerate(items))))

    async def explain(self, exchange: Exchange, key: str, request: HttpRequest) -> HttpAnswer:
        """The decision that `sign` would get."""
        ask = Explain(key, bodies.sign_body(json_body(request)))
        return json_answer(Explanation.of(await self._authority.ask(exchange, ask, ExplainReply)))


def json_answer(shape: Any, status: int = 200) -> HttpAnswer:
    """This in JSON; no cache keeps it."""
    return HttpAnswer(status, _JSON_FIELDS, msgspec.json.encode(shape))


def use_answer(reply: UseReply) -> HttpAnswer:
    """200 with a signature, or 202 with the operation that waits for approvals."""
    if isinstance(reply, Pending):
        return json_answer(PendingUse.of(reply), 202)
    return json_answer(SignedUse.of(_signed(reply)))


def _signed(reply: UseReply) -> Signed:
    if not isinstance(reply, Signed):  # only a bug in one of our rooms
        raise OverloadedError("The request could not be finished.", retry_after=1)
    return reply


def _result(item: SignBody | InvalidError, answers: Any, number: int, exchange: Exchange) -> SignedUse | PendingUse | ProblemDocument:
    answer: Signed | Pending | Problem = problems.problem_of(item) if isinstance(item, InvalidError) else next(answers)
    if isinstance(answer, Signed):
        return SignedUse.of(answer)
    if isinstance(answer, Pending):
        return PendingUse.of(answer)
    return problems.document(answer, exchange.request_id, f"/items/{number}")


def json_body(request: HttpRequest) -> bytes:
    """The body of a request, if it calls itself JSON.

    Raises:
        UnsupportedMediaTypeError: it does not.
    """
    bodies.require_json(request.values(b"content-type"))
    return request.take_body()


def idempotency_key_of(request: HttpRequest) -> str:
    """The idempotency key of a request, empty if there is none.

    Raises:
        InvalidError: it is not one.
    """
    given = request.values(b"idempotency-key")
    if not given:
        return ""
    if len(given) != 1 or not _IDEMPOTENCY_KEY.fullmatch(given[0]):
        raise InvalidError(
            "A header field is not what it should be.",
            pointers=(("/Idempotency-Key", "once, 1 to 64 characters of A-Z, a-z, 0-9, `_` and `-`"),),
        )
    return given[0].decode()
