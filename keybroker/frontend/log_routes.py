"""What auditors fetch over HTTP to verify by themselves: checkpoint, proofs, tiles (C2SP tlog-tiles), exports."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from keybroker.frontend.authority_link import AuthorityLink
from keybroker.frontend.exchange import Exchange
from keybroker.frontend.reading import MAX_INDEX, Moment, Number, Parameters
from keybroker.model.call import AnyAsk, AskImpact, ExportLog, LogReply, ProveConsistency, ProveInclusion, ShowCheckpoint, ShowTile
from keybroker.model.impact import Question

_FOR_EVER = "private, max-age=31536000, immutable"


class InclusionParameters(Parameters):
    """Which record."""

    index: Number = Field(ge=0, le=MAX_INDEX)


class ConsistencyParameters(Parameters):
    """Between which sizes; `size` is that of the newest checkpoint if it is 0."""

    old: Number = Field(ge=0, le=MAX_INDEX)
    size: Number = Field(default=0, ge=0, le=MAX_INDEX)


class ExportParameters(Parameters):
    """Where to begin, and of which workload; all that the caller may read if that is empty."""

    start: Number = Field(default=0, ge=0, le=MAX_INDEX, description="`next` in the last line of the part before")
    workload: str = Field(default="", max_length=2_048, description="SPIFFE ID: the trail to export")


class ImpactParameters(Parameters):
    """Whose deeds; what is empty does not narrow, and at least one is given."""

    workload: str = Field(default="", max_length=2_048, description="SPIFFE ID")
    key: str = Field(default="", max_length=64)
    svid: str = Field(default="", max_length=40, pattern="^[0-9a-fA-F]*$", description="serial number of a certificate, hex")
    person: str = Field(default="", max_length=64, description="who approved")
    since: Moment = ""
    until: Moment = ""


class LogRoutes:
    """Answers everything about the log as a log."""

    def __init__(self, authority: AuthorityLink) -> None:
        self._authority = authority

    def router(self) -> APIRouter:
        """The routes under /v1/audit."""
        router = APIRouter(prefix="/v1/audit")
        for path, endpoint, shape in (
            ("/checkpoint", self.checkpoint, "Checkpoint"),
            ("/proof/inclusion", self.inclusion, "InclusionProof"),
            ("/proof/consistency", self.consistency, "ConsistencyProof"),
            ("/tile/{path:path}", self.tile, "Tile"),
            ("/export", self.export, "Export"),
            ("/impact", self.impact, "Impact"),
        ):
            router.add_api_route(path, endpoint, methods=["GET"], openapi_extra={"x-shape": shape}, response_model=None)
        return router

    async def impact(self, request: Request, parameters: Annotated[ImpactParameters, Query()]) -> Response:
        """What an identity, a key, a certificate, a person or a time window did and tried to do."""
        return await self._answer(request, AskImpact(Question(**parameters.model_dump())))

    async def checkpoint(self, request: Request) -> Response:
        """The newest signed checkpoint of the log (C2SP tlog-checkpoint)."""
        return await self._answer(request, ShowCheckpoint())

    async def inclusion(self, request: Request, parameters: Annotated[InclusionParameters, Query()]) -> Response:
        """That a record is in the log, as a proof file (C2SP tlog-proof)."""
        return await self._answer(request, ProveInclusion(parameters.index))

    async def consistency(self, request: Request, parameters: Annotated[ConsistencyParameters, Query()]) -> Response:
        """That the log begins with an older one (RFC 6962 section 2.1.2)."""
        return await self._answer(request, ProveConsistency(parameters.old, parameters.size))

    async def tile(self, request: Request, path: str) -> Response:
        """A tile of hashes or a bundle of records (C2SP tlog-tiles)."""
        return await self._answer(request, ShowTile(path), _FOR_EVER)

    async def export(self, request: Request, parameters: Annotated[ExportParameters, Query()]) -> Response:
        """Part of an export, as lines. Where there is more, the last line says where the next part begins."""
        return await self._answer(request, ExportLog(parameters.start, parameters.workload))

    async def _answer(self, request: Request, ask: AnyAsk, cache: str = "no-store") -> Response:
        reply = await self._authority.ask(Exchange.of(request), ask, LogReply)
        return Response(reply.content, headers={"content-type": reply.media_type, "cache-control": cache})
