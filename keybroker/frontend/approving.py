"""The routes of operations that wait for a quorum: who may sees them, waits for them, approves them and redeems them.

What is read are FastAPI routes, declared for OpenAPI; the two that take a body are plain, like those that sign.
"""

from __future__ import annotations

from typing import Annotated, get_args

from fastapi import APIRouter, Query
from pydantic import AfterValidator, Field
from starlette.requests import Request
from starlette.responses import Response

from keybroker.frontend import bodies
from keybroker.frontend.authority_link import ASK_SECONDS, AuthorityLink
from keybroker.frontend.exchange import Exchange, HttpAnswer, HttpRequest
from keybroker.frontend.reading import Number, Parameters, one_of
from keybroker.frontend.shapes import Operation, Operations
from keybroker.frontend.signing import idempotency_key_of, json_answer, json_body, use_answer
from keybroker.model.call import Approve, ListOperations, OperationReply, OperationsReply, OperationState, Redeem, ShowOperation, UseReply

MAX_WAIT_SECONDS = 30
MAX_LISTED = 100

State = Annotated[str, AfterValidator(one_of(get_args(OperationState)))]
Wait = Annotated[Number, Field(ge=0, le=MAX_WAIT_SECONDS, description="seconds")]


class OperationParameters(Parameters):
    """Wait so long until the operation is not pending any more."""

    wait: Wait = 0


class OperationsParameters(Parameters):
    """Which operations; with `wait`, as soon as their mark is another than `mark`."""

    state: State = ""
    wait: Wait = 0
    mark: str = Field(default="", max_length=64, description="`mark` of the list that is known already")
    limit: Number = Field(default=MAX_LISTED, ge=1, le=MAX_LISTED)


class Approving:
    """Answers everything about operations."""

    def __init__(self, authority: AuthorityLink) -> None:
        self._authority = authority

    def router(self) -> APIRouter:
        """The routes under /v1 that read."""
        router = APIRouter(prefix="/v1")
        for path, endpoint, shape in (
            ("/operations", self.operations, "Operations"),
            ("/operations/{operation}", self.operation, "Operation"),
        ):
            router.add_api_route(path, endpoint, methods=["GET"], openapi_extra={"x-shape": shape}, response_model=None)
        return router

    async def operations(self, request: Request, parameters: Annotated[OperationsParameters, Query()]) -> Response:
        """The operations that the caller asked for or may approve, newest first."""
        ask = ListOperations(parameters.state, parameters.wait, parameters.mark, parameters.limit)
        reply = await self._authority.ask(Exchange.of(request), ask, OperationsReply, ASK_SECONDS + parameters.wait)
        return _response(json_answer(Operations(tuple(Operation.of(each) for each in reply.operations), reply.mark)))

    async def operation(self, request: Request, operation: str, parameters: Annotated[OperationParameters, Query()]) -> Response:
        """One operation: what is to be done, what it needs, who has approved it."""
        ask = ShowOperation(operation, parameters.wait)
        reply = await self._authority.ask(Exchange.of(request), ask, OperationReply, ASK_SECONDS + parameters.wait)
        return _response(json_answer(Operation.of(reply)))

    async def approve(self, exchange: Exchange, operation: str, request: HttpRequest) -> HttpAnswer:
        """A signed approval or refusal."""
        ask = Approve(operation, bodies.approval(json_body(request)))
        return json_answer(Operation.of(await self._authority.ask(exchange, ask, OperationReply)))

    async def redeem(self, exchange: Exchange, operation: str, request: HttpRequest) -> HttpAnswer:
        """Do what a complete quorum has approved, once."""
        ask = Redeem(operation, bodies.redemption(json_body(request)), idempotency_key_of(request))
        return use_answer(await self._authority.ask(exchange, ask, UseReply))


def _response(answer: HttpAnswer) -> Response:
    return Response(answer.body, answer.status, answer.headers)
