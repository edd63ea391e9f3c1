"""The three routes that a workload signs with: bytes of JSON in, one ask to the authority, bytes of JSON out.

They are plain routes with a typed decoder, not FastAPI's, because a signature passes here: see `signature, by stage` in bench/.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from keybroker.errors import InvalidError, OverloadedError, UnsupportedMediaTypeError
from keybroker.frontend import bodies, problems
from keybroker.frontend.authority_link import BATCH_SECONDS, AuthorityLink
from keybroker.frontend.exchange import Exchange
from keybroker.frontend.metrics import FrontendMetrics
from keybroker.frontend.shapes import BatchResults, Explanation, ProblemDocument, SignedUse
from keybroker.model.call import BatchReply, Explain, ExplainReply, Problem, Sign, SignBatch, Signed
from keybroker.model.request import MAX_BATCH_BYTES, SignBody

_JSON = re.compile(rb'application/json(?:[ \t]*;[ \t]*charset="?utf-8"?)?', re.IGNORECASE)
_IDEMPOTENCY_KEY = re.compile(rb"[A-Za-z0-9_-]{1,64}")
_BATCH_END = b"/sign/batch"


def body_limit(path: bytes) -> int:
    """How many bytes a body may have, by the path of the request target."""
    return MAX_BATCH_BYTES if path.endswith(_BATCH_END) else bodies.MAX_SIGN_BODY_BYTES


class Signing:
    """Answers `sign`, `sign/batch` and `sign/explain`."""

    def __init__(self, authority: AuthorityLink, metrics: FrontendMetrics) -> None:
        self._authority = authority
        self._metrics = metrics

    async def sign(self, request: Request) -> Response:
        """One use of one key."""
        exchange = Exchange.of(request)
        body = bodies.sign_body(await _json_body(request))
        ask = Sign(request.path_params["key"], body, _idempotency_key(request))
        exchange.laps.lap("parse")
        signed = await self._authority.ask(exchange, ask, Signed)
        exchange.laps.lap("authority")
        answer = json_answer(SignedUse.of(signed))
        self._metrics.signed(exchange.laps)
        return answer

    async def sign_batch(self, request: Request) -> Response:
        """Several uses of one key. An item that cannot be read is a problem in its place; the others are asked for."""
        exchange = Exchange.of(request)
        data = await _json_body(request)
        items = bodies.batch_items(data)
        readable = tuple(item for item in items if isinstance(item, SignBody))
        idempotency_key = _idempotency_key(request)
        digest = hashlib.sha256(data).digest() if idempotency_key else b""
        # Asked even where no item can be read: who does not belong here is to be told so first.
        ask = SignBatch(request.path_params["key"], readable, idempotency_key, digest)
        reply = await self._authority.ask(exchange, ask, BatchReply, BATCH_SECONDS)
        if len(reply.results) != len(readable):  # only a bug in one of our rooms: whose answer is whose is not to be guessed
            raise OverloadedError("The request could not be finished.", retry_after=1)
        answers = iter(reply.results)
        return json_answer(BatchResults(tuple(_result(item, answers, number, exchange) for number, item in enumerate(items))))

    async def explain(self, request: Request) -> Response:
        """The decision that `sign` would get."""
        ask = Explain(request.path_params["key"], bodies.sign_body(await _json_body(request)))
        return json_answer(Explanation.of(await self._authority.ask(Exchange.of(request), ask, ExplainReply)))


def json_answer(shape: Any) -> Response:
    """A 200 with this in JSON; no cache keeps it."""
    return Response(msgspec.json.encode(shape), media_type="application/json", headers={"cache-control": "no-store"})


def _result(item: SignBody | InvalidError, answers: Any, number: int, exchange: Exchange) -> SignedUse | ProblemDocument:
    answer: Signed | Problem = problems.problem_of(item) if isinstance(item, InvalidError) else next(answers)
    if isinstance(answer, Signed):
        return SignedUse.of(answer)
    return problems.document(answer, exchange.request_id, f"/items/{number}")


async def _json_body(request: Request) -> bytes:
    """The body, if it calls itself JSON.

    Raises:
        UnsupportedMediaTypeError: it does not.
    """
    types = [value for name, value in request.scope["headers"] if name == b"content-type"]
    if len(types) != 1 or not _JSON.fullmatch(types[0]):
        raise UnsupportedMediaTypeError("Send `Content-Type: application/json`.")
    return await request.body()


def _idempotency_key(request: Request) -> str:
    """The idempotency key, empty if there is none.

    Raises:
        InvalidError: it is not one.
    """
    given: list[bytes] = [value for name, value in request.scope["headers"] if name == b"idempotency-key"]
    if not given:
        return ""
    if len(given) != 1 or not _IDEMPOTENCY_KEY.fullmatch(given[0]):
        raise InvalidError(
            "A header field is not what it should be.",
            pointers=(("/Idempotency-Key", "once, 1 to 64 characters of A-Z, a-z, 0-9, `_` and `-`"),),
        )
    return given[0].decode()
