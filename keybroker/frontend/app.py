"""The service: an exchange begins, a route answers it, and whatever goes wrong becomes one problem document.

Requests and answers are whole. The routes that take a body are plain functions, found by their path; all others are FastAPI's.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import parse_qsl

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message

import keybroker
from keybroker.errors import InvalidError, KeyBrokerError, MethodNotAllowedError, NotFoundError, RefusalError
from keybroker.frontend import openapi, problems
from keybroker.frontend.approving import Approving
from keybroker.frontend.authority_link import AuthorityLink
from keybroker.frontend.breaking import Breaking
from keybroker.frontend.changing import Changing
from keybroker.frontend.exchange import SCOPE_KEY, Exchange, HttpAnswer, HttpRequest
from keybroker.frontend.freezing import Freezing
from keybroker.frontend.log_routes import LogRoutes
from keybroker.frontend.metrics import FrontendMetrics
from keybroker.frontend.problems import ProblemError
from keybroker.frontend.reading import Reading, refuse_parameters
from keybroker.frontend.signing import Signing, json_answer
from keybroker.telemetry import logger
from keybroker.tracing import Tracer

SIGN = "/v1/keys/{key}/sign"
OPERATION = "/v1/operations/{operation}"
DOCUMENT = "/v1/openapi.json"
_PLAIN_PATH = re.compile(r"/v1/(?:keys/([^/]+)(/sign|/sign/batch|/sign/explain)|operations/([^/]+)(/approvals|/redeem))")

_log = logger()

PlainRoute = Callable[[Exchange, str, HttpRequest], Awaitable[HttpAnswer]]


class Application:
    """Begins an exchange for each request, finds who answers it, and counts the answer.

    Args:
        authority: asked on behalf of every caller.
        metrics: counts answers.
        tracer: begins a span for each request.
    """

    def __init__(self, authority: AuthorityLink, metrics: FrontendMetrics, tracer: Tracer) -> None:
        self._metrics = metrics
        self._tracer = tracer
        signing = Signing(authority, metrics)
        approving = Approving(authority)
        self._plain: dict[str, PlainRoute] = {
            f"{SIGN}": signing.sign,
            f"{SIGN}/batch": signing.sign_batch,
            f"{SIGN}/explain": signing.explain,
            f"{OPERATION}/approvals": approving.approve,
            f"{OPERATION}/redeem": approving.redeem,
        }
        self._others = _FastApiRoutes(authority)

    async def answer(self, request: HttpRequest) -> HttpAnswer:
        """Answer one request. Raises nothing."""
        exchange = Exchange.begin(request, self._tracer)
        plain = _PLAIN_PATH.fullmatch(request.path)
        route = _template(plain) if plain else "none"
        try:
            _refuse_repeated(request.query)
            if plain:
                answer = await self._post(self._plain[route], exchange, plain[1] or plain[3], request)
            else:
                route, answer = await self._others.answer(exchange, request)
        except Exception as err:  # noqa: BLE001  whatever it is, the caller gets an answer
            answer = _refusal(exchange, err)
        self._metrics.answered(route, answer.status)
        exchange.laps.lap("answer")
        attributes: dict[str, str | int] = {
            "http.request.method": request.method,
            "http.route": route,
            "http.response.status_code": answer.status,
        }
        exchange.span.end(exchange.laps, attributes)
        return answer

    async def _post(self, answer: PlainRoute, exchange: Exchange, name: str, request: HttpRequest) -> HttpAnswer:
        if request.method != "POST":
            raise HTTPException(405, headers={"allow": "POST"})
        refuse_parameters(request.query)
        return await answer(exchange, name, request)


def _template(found: re.Match[str]) -> str:
    return f"/v1/keys/{{key}}{found[2]}" if found[1] else f"{OPERATION}{found[4]}"


class _FastApiRoutes:
    """Everything that takes no body, behind ASGI."""

    def __init__(self, authority: AuthorityLink) -> None:
        app = FastAPI(
            title="keybroker", version=keybroker.__version__, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False
        )
        routers = (
            Reading(authority).router(),
            Approving(authority).router(),
            Freezing(authority).router(),
            Changing(authority).router(),
            Breaking(authority).router(),
            LogRoutes(authority).router(),
        )
        for router in routers:
            app.include_router(router)
        described = json_answer(openapi.document(app))

        async def describe(request: Request) -> Response:
            refuse_parameters(request.scope["query_string"])
            return Response(described.body, described.status, described.headers)

        app.add_api_route(DOCUMENT, describe, methods=["GET", "HEAD"], include_in_schema=False, response_model=None)
        for kind in (HTTPException, RequestValidationError, RefusalError, ProblemError):
            app.add_exception_handler(kind, _on_error)
        self._app = app
        self._routes = [each for owner in (*routers, app) for each in owner.routes if isinstance(each, Route)]

    async def answer(self, exchange: Exchange, request: HttpRequest) -> tuple[str, HttpAnswer]:
        """The template of the route that was found, and its answer."""
        scope = _scope(exchange, request)
        status, fields, body = 0, {}, []

        async def receive() -> Message:
            return {"type": "http.request", "body": request.take_body(), "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status, fields
            if message["type"] == "http.response.start":
                status, fields = message["status"], {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                body.append(message["body"])

        try:
            await self._app(scope, receive, send)
            if status == 405:  # Starlette names the methods of one route only, and a path may have several (RFC 9110 section 15.5.6)
                fields["allow"] = self._allowed(request.path)
            answer = HttpAnswer(status, fields, b"".join(body))
        except Exception as err:  # noqa: BLE001  Starlette has answered it in plain text, and raises it again
            answer = _refusal(exchange, err)
        return getattr(scope.get("route"), "path", "none"), answer

    def _allowed(self, path: str) -> str:
        """The methods that a path takes."""
        return ", ".join(sorted({method for each in self._routes if each.path_regex.match(path) for method in each.methods or ()}))


def _scope(exchange: Exchange, request: HttpRequest) -> dict[str, Any]:
    """What ASGI knows of a request (HTTP connection scope, version 2.3)."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "https",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": request.headers,
        "client": (request.client.address, 0),
        "server": None,
        SCOPE_KEY: exchange,
    }


async def _on_error(request: Request, err: Exception) -> Response:
    answer = _refusal(Exchange.of(request), err)
    return Response(answer.body, answer.status, answer.headers)


def _refusal(exchange: Exchange, err: Exception) -> HttpAnswer:
    """Whatever went wrong, as a problem document."""
    headers: dict[str, str] = {}
    if isinstance(err, HTTPException):
        headers = {name.lower(): value for name, value in (err.headers or {}).items()}
        err = MethodNotAllowedError("This route does not take that method.") if err.status_code == 405 else NotFoundError("")
    elif isinstance(err, RequestValidationError):
        err = _invalid(err.errors())
    if isinstance(err, RefusalError | ProblemError):
        problem = problems.problem_of(err)
    else:
        _log.error("request failed", request_id=exchange.request_id, exc_info=None if isinstance(err, KeyBrokerError) else err)
        problem = problems.unexpected()
    return problems.render(problem, exchange.request_id, headers)


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
