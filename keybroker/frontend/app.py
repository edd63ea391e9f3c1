"""The service as one ASGI application: an exchange begins, a route answers it, and whatever goes wrong becomes one problem document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast
from urllib.parse import parse_qsl

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import keybroker
from keybroker.errors import InvalidError, KeyBrokerError, MethodNotAllowedError, NotFoundError, RefusalError
from keybroker.frontend import openapi, problems
from keybroker.frontend.authority_link import AuthorityLink
from keybroker.frontend.exchange import Exchange
from keybroker.frontend.metrics import FrontendMetrics
from keybroker.frontend.problems import ProblemError
from keybroker.frontend.reading import Reading
from keybroker.frontend.signing import Signing, json_answer
from keybroker.telemetry import logger
from keybroker.tracing import Tracer

SIGN = "/v1/keys/{key}/sign"
DOCUMENT = "/v1/openapi.json"

_log = logger()


class Application:
    """Begins an exchange for each request and counts its answer, around FastAPI.

    Args:
        authority: asked on behalf of every caller.
        metrics: counts answers.
        tracer: begins a span for each request.
    """

    def __init__(self, authority: AuthorityLink, metrics: FrontendMetrics, tracer: Tracer) -> None:
        self._metrics = metrics
        self._tracer = tracer
        self._routes: ASGIApp = _routes(authority, metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        exchange = Exchange.begin(cast("dict[str, Any]", scope), self._tracer)
        status, is_whole = 0, False

        async def counted(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                is_whole = not message.get("more_body", False)
            await send(message)

        try:
            _refuse_repeated(scope["query_string"])
            await self._routes(scope, receive, counted)
        except Exception as err:
            if not status:
                await _refusal(exchange, err)(scope, receive, counted)
            elif not is_whole:  # Starlette raises again what it has answered
                raise
        route = getattr(scope.get("route"), "path", "none")
        self._metrics.answered(route, status)
        exchange.laps.lap("answer")
        exchange.span.end(exchange.laps, {"http.request.method": scope["method"], "http.route": route, "http.response.status_code": status})


class _PlainRoute(Route):
    """A route without FastAPI's work for each request; as FastAPI's own do, it leaves its template in the scope, for the metrics."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        return match, {**child, "route": self}


def _routes(authority: AuthorityLink, metrics: FrontendMetrics) -> FastAPI:
    app = FastAPI(title="keybroker", version=keybroker.__version__, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    signing = Signing(authority, metrics)
    for path, endpoint in ((SIGN, signing.sign), (f"{SIGN}/batch", signing.sign_batch), (f"{SIGN}/explain", signing.explain)):
        app.router.routes.append(_PlainRoute(path, endpoint, methods=["POST"]))
    app.include_router(Reading(authority).router())
    document = openapi.document(app)

    async def describe(_request: Request) -> Response:
        return json_answer(document)

    app.router.routes.append(_PlainRoute(DOCUMENT, describe, methods=["GET"]))
    for kind in (HTTPException, RequestValidationError, RefusalError, ProblemError, Exception):
        app.add_exception_handler(kind, _on_error)
    return app


async def _on_error(request: Request, err: Exception) -> Response:
    return _refusal(Exchange.of(request), err)


def _refusal(exchange: Exchange, err: Exception) -> Response:
    """Whatever went wrong, as a problem document."""
    headers: dict[str, str] = {}
    if isinstance(err, HTTPException):
        headers = dict(err.headers or {})
        err = MethodNotAllowedError("This route does not take that method.") if err.status_code == 405 else NotFoundError("")
    elif isinstance(err, RequestValidationError):
        err = _invalid(err.errors())
    if isinstance(err, RefusalError | ProblemError):
        problem = problems.problem_of(err)
    else:
        _log.error("request failed", request_id=exchange.request_id, exc_info=None if isinstance(err, KeyBrokerError) else err)
        problem = problems.unexpected()
    rendered = problems.render(problem, exchange.request_id, headers)
    return Response(rendered.body, rendered.status, rendered.headers)


def _invalid(faults: Sequence[Any]) -> RefusalError:
    """FastAPI's findings as pointers, without the values that it found. A path that does not fit is a thing that does not exist."""
    if any(fault["loc"][0] == "path" for fault in faults):
        return NotFoundError("")
    pointers = tuple(("/" + "/".join(str(part)[:64] for part in fault["loc"][1:]), _words(fault)) for fault in faults[:20])
    return InvalidError("A query parameter is not what it should be.", pointers=pointers)


def _words(fault: Any) -> str:
    if fault["type"] == "extra_forbidden":
        return "unknown"
    return str(fault["msg"])


def _refuse_repeated(query: bytes) -> None:
    """Two readers of one query must not see two questions.

    Raises:
        InvalidError: a parameter is given twice.
    """
    if b"&" not in query:
        return
    names = [name for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True)]
    repeated = {name for name in names if names.count(name) > 1} if len(names) <= 100 else {"too-many"}
    if repeated:
        raise InvalidError("A query parameter is given twice.", pointers=tuple((f"/{name[:64]}", "once") for name in sorted(repeated)))
