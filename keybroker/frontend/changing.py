"""The rules over HTTP, where changes of them are operations: look at the live ones, propose others."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from keybroker.frontend import bodies, signing
from keybroker.frontend.authority_link import AuthorityLink
from keybroker.frontend.exchange import Exchange, json_of
from keybroker.frontend.freezing import changed
from keybroker.frontend.shapes import Policy, PolicyVersion
from keybroker.model.call import PolicyChanged, PolicyReply, ProposePolicy, ShowPolicy, UseReply

CHANGES = "/v1/admin/policy/changes"


class ProposalBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Other rules: grant files by name, the `base` that they were written for, and why. `operation`: that others have approved."""

    base: str
    files: dict[str, str]
    reason: str
    operation: str = ""


class Changing:
    """Answers for admins."""

    def __init__(self, authority: AuthorityLink) -> None:
        self._authority = authority

    def router(self) -> APIRouter:
        """The routes under /v1/admin/policy."""
        router = APIRouter()
        router.add_api_route("/v1/admin/policy", self.show, methods=["GET"], openapi_extra={"x-shape": "Policy"}, response_model=None)
        extra = {"x-shape": "PolicyVersion", "x-body": "ProposalBody", "x-waits": "yes"}
        router.add_api_route(CHANGES, self.propose, methods=["POST"], openapi_extra=extra, response_model=None)
        return router

    async def show(self, request: Request) -> Response:
        """The live rules, whole."""
        return _json(Policy.of(await self._authority.ask(Exchange.of(request), ShowPolicy(), PolicyReply)))

    async def propose(self, request: Request) -> Response:
        """Other rules in the place of the live ones."""
        body = bodies.json_body(await json_of(request), ProposalBody)
        ask = ProposePolicy(body.base, body.files, body.reason, body.operation)
        reply = await self._authority.ask(Exchange.of(request), ask, UseReply)
        return changed(reply, lambda done: PolicyVersion.of(done) if isinstance(done, PolicyChanged) else None)


def _json(shape: Any) -> Response:
    answer = signing.json_answer(shape)
    return Response(answer.body, answer.status, answer.headers)
