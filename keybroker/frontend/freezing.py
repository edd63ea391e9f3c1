"""Freezes over HTTP: stop something, see what is stopped, lift it. FastAPI routes, declared for OpenAPI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from keybroker.errors import InvalidError, OverloadedError
from keybroker.frontend import bodies, signing
from keybroker.frontend.authority_link import AuthorityLink
from keybroker.frontend.exchange import Exchange, json_of
from keybroker.frontend.shapes import Freeze, Freezes, PendingUse
from keybroker.model.call import AskFreeze, AskUnfreeze, FreezeReply, FreezesReply, ListFreezes, Pending, UseReply
from keybroker.model.freeze import FREEZE_KINDS

Number = Annotated[str, Path(pattern="^[0-9A-HJKMNP-TV-Z]{26}$")]


class FreezeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to freeze: exactly one of the first four; and why."""

    reason: str
    workload: str | msgspec.UnsetType = msgspec.UNSET
    key: str | msgspec.UnsetType = msgspec.UNSET
    token: str | msgspec.UnsetType = msgspec.UNSET
    everything: bool | msgspec.UnsetType = msgspec.UNSET

    def ask(self) -> AskFreeze:
        """As the authority takes it.

        Raises:
            InvalidError: not exactly one target.
        """
        given = [kind for kind in FREEZE_KINDS if getattr(self, kind) is not msgspec.UNSET]
        if len(given) != 1 or self.everything is False:
            raise InvalidError("The body is not what this route takes.", pointers=(("", f"exactly one of {', '.join(FREEZE_KINDS)}"),))
        target = getattr(self, given[0])
        return AskFreeze(given[0], target if isinstance(target, str) else "", self.reason)


class LiftParameters(BaseModel):
    """The operation that others have approved; empty the first time. Unknown parameters are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    operation: str = Field(default="", max_length=26)


class Freezing:
    """Answers for responders."""

    def __init__(self, authority: AuthorityLink) -> None:
        self._authority = authority

    def router(self) -> APIRouter:
        """The routes under /v1/freezes."""
        router = APIRouter(prefix="/v1/freezes")
        for method, path, endpoint, extra in (
            ("GET", "", self.list, {"x-shape": "Freezes"}),
            ("POST", "", self.freeze, {"x-shape": "Freeze", "x-body": "FreezeBody"}),
            ("DELETE", "/{freeze}", self.unfreeze, {"x-shape": "Freeze", "x-waits": "yes"}),
        ):
            router.add_api_route(path, endpoint, methods=[method], openapi_extra=extra, response_model=None)
        return router

    async def list(self, request: Request) -> Response:
        """The freezes in force of what the caller may freeze or unfreeze."""
        reply = await self._authority.ask(Exchange.of(request), ListFreezes(), FreezesReply)
        return _json(Freezes(tuple(map(Freeze.of, reply.freezes))))

    async def freeze(self, request: Request) -> Response:
        """Stop a workload, a key, a token or everything, at once."""
        ask = bodies.json_body(await json_of(request), FreezeBody).ask()
        return _json(Freeze.of((await self._authority.ask(Exchange.of(request), ask, FreezeReply)).freeze))

    async def unfreeze(self, request: Request, freeze: Number, parameters: Annotated[LiftParameters, Query()]) -> Response:
        """Lift a freeze; where others have to approve that, begin an operation, or do what one has approved."""
        reply = await self._authority.ask(Exchange.of(request), AskUnfreeze(freeze, parameters.operation), UseReply)
        return changed(reply, lambda done: Freeze.of(done.freeze) if isinstance(done, FreezeReply) else None)


def changed(reply: UseReply, shape: Callable[[UseReply], Any]) -> Response:
    """200 with what was done, or 202 with the operation that waits for approvals.

    Raises:
        OverloadedError: neither; only a bug in one of our rooms.
    """
    if isinstance(reply, Pending):
        return _json(PendingUse.of(reply), 202)
    done = shape(reply)
    if done is None:
        raise OverloadedError("The request could not be finished.", retry_after=1)
    return _json(done)


def _json(shape: Any, status: int = 200) -> Response:
    answer = signing.json_answer(shape, status)
    return Response(answer.body, answer.status, answer.headers)
