"""Break-glass over HTTP: open, see what has not been reviewed, close."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Path
from starlette.requests import Request
from starlette.responses import Response

from keybroker.frontend import bodies, signing
from keybroker.frontend.authority_link import AuthorityLink
from keybroker.frontend.exchange import Exchange, json_of
from keybroker.frontend.shapes import Glass, Glasses
from keybroker.model.call import BreakGlass, CloseGlass, GlassesReply, GlassReply, ListGlasses
from keybroker.model.glass import MAX_SECONDS

Number = Annotated[str, Path(pattern="^[0-9A-HJKMNP-TV-Z]{26}$")]


class GlassBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whose demands to waive, for how many seconds, and why."""

    grant: str
    seconds: Annotated[int, msgspec.Meta(ge=1, le=MAX_SECONDS)]
    reason: str


class NoteBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was found."""

    note: str


class Breaking:
    """Answers for those who may break glass."""

    def __init__(self, authority: AuthorityLink) -> None:
        self._authority = authority

    def router(self) -> APIRouter:
        """The routes under /v1/break-glass."""
        router = APIRouter(prefix="/v1/break-glass")
        for method, path, endpoint, extra in (
            ("GET", "", self.list, {"x-shape": "Glasses"}),
            ("POST", "", self.open, {"x-shape": "Glass", "x-body": "GlassBody"}),
            ("POST", "/{glass}/close", self.close, {"x-shape": "Glass", "x-body": "NoteBody"}),
        ):
            router.add_api_route(path, endpoint, methods=[method], openapi_extra=extra, response_model=None)
        return router

    async def list(self, request: Request) -> Response:
        """What has been opened and not been reviewed, of what the caller may open or close."""
        reply = await self._authority.ask(Exchange.of(request), ListGlasses(), GlassesReply)
        return _json(Glasses(tuple(map(Glass.of, reply.glasses))))

    async def open(self, request: Request) -> Response:
        """Waive hours, limits and quorum of one grant for a while."""
        body = bodies.json_body(await json_of(request), GlassBody)
        reply = await self._authority.ask(Exchange.of(request), BreakGlass(body.grant, body.seconds, body.reason), GlassReply)
        return _json(Glass.of(reply.glass))

    async def close(self, request: Request, glass: Number) -> Response:
        """End it; by somebody else than who opened it, this is the review."""
        body = bodies.json_body(await json_of(request), NoteBody)
        return _json(Glass.of((await self._authority.ask(Exchange.of(request), CloseGlass(glass, body.note), GlassReply)).glass))


def _json(shape: Any) -> Response:
    answer = signing.json_answer(shape)
    return Response(answer.body, answer.status, answer.headers)
