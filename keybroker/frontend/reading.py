"""Everything that is read over HTTP: who am I, which keys, their public halves, the record. FastAPI routes, declared for OpenAPI."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

import msgspec
from fastapi import APIRouter, Depends, Query
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import Response

from keybroker.clock import from_rfc3339
from keybroker.errors import InvalidError, NotFoundError
from keybroker.frontend import public_keys, signing
from keybroker.frontend.authority_link import AuthorityLink
from keybroker.frontend.exchange import Exchange
from keybroker.frontend.shapes import Key, Keys, Whoami
from keybroker.model.call import (
    KeyReply,
    KeysReply,
    ListJwks,
    ListKeys,
    PublicVersion,
    QueryRecords,
    RecordsReply,
    ShowKey,
    ShowRecord,
    WhoamiReply,
)
from keybroker.model.call import Whoami as AskWhoami
from keybroker.model.record import Outcome, RecordKind

MAX_PAGE = 1_000
MAX_INDEX = 2**53 - 1
_NUMBER = re.compile(r"0|[1-9][0-9]{0,15}")


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """A check that a parameter is one of these, or empty."""
    known = {"", *names}

    def check(text: str) -> str:
        if text not in known:
            raise PydanticCustomError("unknown_name", "one of {names}", {"names": ", ".join(sorted(known - {""}))})
        return text

    return check


def _moment(text: str) -> str:
    if text:
        try:
            from_rfc3339(text)
        except ValueError as err:
            raise PydanticCustomError("time", "an RFC 3339 time with an offset from UTC, such as 2026-11-24T08:00:00Z") from err
    return text


def _plainly(text: object) -> object:
    """One spelling of every number: no sign, no leading zero, no underscore, no fraction."""
    if isinstance(text, str) and not _NUMBER.fullmatch(text):
        raise PydanticCustomError("number", "a number in decimal digits")
    return text


Number = Annotated[int, BeforeValidator(_plainly)]
Moment = Annotated[str, AfterValidator(_moment), Field(max_length=40, description="RFC 3339, with an offset from UTC")]
Kind = Annotated[str, AfterValidator(one_of(each.value for each in RecordKind))]
Ended = Annotated[str, AfterValidator(one_of(each.value for each in Outcome))]


class Parameters(BaseModel):
    """Query parameters. Unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def refuse_parameters(query: bytes) -> None:
    """For a route that takes no query parameters.

    Raises:
        InvalidError: there is something in the query.
    """
    if query:
        names = [name[:64] for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True)][:20]
        raise InvalidError("This route takes no query parameters.", pointers=tuple((f"/{name}", "unknown") for name in names))


async def _takes_none(request: Request) -> None:
    refuse_parameters(request.scope["query_string"])


class PublicParameters(Parameters):
    """How to write a public key, and of which version; the one that signs, if absent."""

    format: Literal["pem", "jwk", "openssh"] = "pem"
    version: Number | None = Field(default=None, ge=1, le=MAX_INDEX)


class RecordParameters(Parameters):
    """Which records; what is empty does not filter."""

    workload: str = Field(default="", max_length=2_048, description="SPIFFE ID: the trail to read; or a pattern as in grants")
    key: str = Field(default="", max_length=64)
    key_version: Number = Field(default=0, ge=0, le=MAX_INDEX, description="with `key`; 0 for any")
    algorithm: str = Field(default="", max_length=16)
    grant: str = Field(default="", max_length=64, description="id of a grant that allowed it")
    svid: str = Field(default="", max_length=40, pattern="^[0-9a-fA-F]*$", description="serial number of the caller's certificate, hex")
    address: str = Field(default="", max_length=64, description="of the caller")
    content: str = Field(default="", max_length=1_024, description="a content field, NAME=VALUE")
    principal: str = Field(default="", max_length=2_048)
    kind: Kind = ""
    outcome: Ended = ""
    use: str = Field(default="", max_length=26, description="ULID of a use")
    since: Moment = ""
    until: Moment = ""
    cursor: str = Field(default="", max_length=64, description="`next` of the page before")
    limit: Number = Field(default=100, ge=1, le=MAX_PAGE)

    def ask(self) -> QueryRecords:
        """As the authority takes it."""
        return QueryRecords(
            workload=self.workload,
            key=self.key,
            principal=self.principal,
            kind=self.kind,
            outcome=self.outcome,
            use=self.use,
            key_version=self.key_version,
            algorithm=self.algorithm,
            grant=self.grant,
            svid=self.svid,
            address=self.address,
            content=self.content,
            since_us=_microseconds(self.since),
            until_us=_microseconds(self.until),
            cursor=self.cursor,
            limit=self.limit,
        )


class Reading:
    """Answers everything that uses no key."""

    def __init__(self, authority: AuthorityLink) -> None:
        self._authority = authority

    def router(self) -> APIRouter:
        """The routes under /v1."""
        router = APIRouter(prefix="/v1")
        plain = [Depends(_takes_none)]
        for path, endpoint, shape, dependencies in (
            ("/whoami", self.whoami, "Whoami", plain),
            ("/keys", self.keys, "Keys", plain),
            ("/keys/{key}", self.key, "Key", plain),
            ("/keys/{key}/public", self.public, "PublicKey", []),
            ("/jwks", self.jwks, "JwkSet", plain),
            ("/audit/records", self.records, "RecordPage", []),
            ("/audit/records/{index}", self.record, "Record", plain),
        ):
            router.add_api_route(
                path, endpoint, methods=["GET"], openapi_extra={"x-shape": shape}, response_model=None, dependencies=dependencies
            )
        return router

    async def whoami(self, request: Request) -> Response:
        """What the broker sees of the caller."""
        return _json(Whoami.of(await self._authority.ask(Exchange.of(request), AskWhoami(), WhoamiReply)))

    async def keys(self, request: Request) -> Response:
        """The keys that the caller may look at."""
        reply = await self._authority.ask(Exchange.of(request), ListKeys(), KeysReply)
        return _json(Keys(tuple(Key.of(key) for key in reply.keys)))

    async def key(self, request: Request, key: str) -> Response:
        """One key and its versions."""
        return _json(Key.of(await self._show(request, key)))

    async def public(self, request: Request, key: str, parameters: Annotated[PublicParameters, Query()]) -> Response:
        """The public key of one version, as PEM, JWK or a line of OpenSSH."""
        shown = await self._show(request, key)
        version = _version(shown, parameters.version)
        if parameters.format == "jwk":
            return _json(public_keys.jwk(shown, version))
        text = public_keys.pem(version.spki) if parameters.format == "pem" else public_keys.openssh(shown.name, version)
        media_type = "application/x-pem-file" if parameters.format == "pem" else "text/plain"
        return Response(text, media_type=media_type, headers={"cache-control": "no-store"})

    async def jwks(self, request: Request) -> Response:
        """The public keys that the caller may look at, as a JWK set."""
        reply = await self._authority.ask(Exchange.of(request), ListJwks(), KeysReply)
        return _json(public_keys.jwk_set(reply.keys))

    async def records(self, request: Request, parameters: Annotated[RecordParameters, Query()]) -> Response:
        """A page of the record, oldest first. That it was read is on record too."""
        reply = await self._authority.ask(Exchange.of(request), parameters.ask(), RecordsReply)
        return _json({"records": [msgspec.Raw(leaf) for leaf in reply.records], "next": reply.next or None})

    async def record(self, request: Request, index: Number) -> Response:
        """One record by its index in the log: the bytes that are hashed."""
        if not 0 <= index <= MAX_INDEX:
            raise NotFoundError("")
        reply = await self._authority.ask(Exchange.of(request), ShowRecord(index), RecordsReply)
        return _json(msgspec.Raw(reply.records[0]))

    async def _show(self, request: Request, key: str) -> KeyReply:
        return await self._authority.ask(Exchange.of(request), ShowKey(key), KeyReply)


def _json(shape: Any) -> Response:
    answer = signing.json_answer(shape)
    return Response(answer.body, answer.status, answer.headers)


def _version(key: KeyReply, wanted: int | None) -> PublicVersion:
    """The version with this number, or the one that signs.

    Raises:
        NotFoundError: there is none.
    """
    for version in reversed(key.versions):
        if wanted is None or version.version == wanted:
            return version
    raise NotFoundError("")


def _microseconds(text: str) -> int:
    return max(from_rfc3339(text), 1) if text else 0
