"""Asks the rules of a real OPA server, through opa-python-client, with everything that it leaves open closed.

One attempt, to one address, within one deadline: no redirect, proxy, .netrc, cookie or retry, no compression, no answer beyond
`MAX_ANSWER_BYTES`. Plain HTTP goes to loopback or a Unix socket alone; everything else is TLS with a CA that was named for it. OPA
answers with the digest of its rules and the revision of its bundle, which `OpaEngine` holds against its own.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
from opa_client import AsyncOpaClient

from keybroker.authority.policy.opa_address import OpaAddress
from keybroker.authority.policy.opa_engine import BrokenRuleError, NoAnswerError, OpaReply

MAX_ANSWER_BYTES = 256 * 1024
MAX_CONNECTIONS = 64
_PIECE_BYTES = 64 * 1024
_QUERY = {"provenance": True, "strict-builtin-errors": True}


class _Trouble(msgspec.Struct, frozen=True):
    code: str


_decode_reply = msgspec.json.Decoder(OpaReply).decode
_decode_trouble = msgspec.json.Decoder(_Trouble).decode


class _Answer:
    """The part of aiohttp's response that `AsyncOpaClient.query_rule` uses, of a body that has been read within its bounds."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self._body = body

    def raise_for_status(self) -> None:
        if self.status == 200:
            return
        with contextlib.suppress(msgspec.MsgspecError, UnicodeError, RecursionError):
            if self.status == 500 and _decode_trouble(self._body).code == "internal_error":  # OPA's for rules that cannot be evaluated
                raise BrokenRuleError
        raise NoAnswerError(f"status {self.status}")

    async def json(self) -> OpaReply:
        try:
            return _decode_reply(self._body)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as err:
            raise NoAnswerError("not an answer of OPA") from err


class _Client(AsyncOpaClient):  # type: ignore[misc]  # there are no types for it
    """`AsyncOpaClient`, with its session and its one way to make a request replaced."""

    def __init__(self, address: OpaAddress) -> None:
        super().__init__(address.host, address.port, ssl=address.tls is not None, retries=0)
        self._address = address

    async def _init_session(self) -> None:
        address = self._address
        headers = {"Accept-Encoding": "identity"}
        if address.token:
            headers["Authorization"] = f"Bearer {address.token}"
        connector: aiohttp.BaseConnector
        if address.unix_socket:
            connector = aiohttp.UnixConnector(address.unix_socket, limit=MAX_CONNECTIONS)
        else:
            tls: ssl.SSLContext | bool = address.tls if address.tls is not None else True
            connector = aiohttp.TCPConnector(ssl=tls, limit=MAX_CONNECTIONS)
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(),  # `OpaServer.ask` has one for everything
        )

    @contextlib.asynccontextmanager
    async def _request(self, method: str, url: str, **given: Any) -> AsyncIterator[_Answer]:
        body = msgspec.json.encode(given["json"])
        headers = {"Content-Type": "application/json"}
        async with self._session.request(method, url, data=body, headers=headers, allow_redirects=False) as response:
            try:
                read = bytearray()
                async for piece in response.content.iter_chunked(_PIECE_BYTES):
                    read += piece
                    if len(read) > MAX_ANSWER_BYTES:
                        raise NoAnswerError("the answer is too large")
            except BaseException:
                response.close()  # the rest of it is not waited for
                raise
        yield _Answer(response.status, bytes(read))


class OpaServer:
    """One OPA server; its connections serve every version of the rules.

    Args:
        address: where it is.
        deadline_s: seconds for a decision, connecting included.
    """

    def __init__(self, address: OpaAddress, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self._client = _Client(address)
        self._is_open = False

    async def ask(self, asked: bytes) -> OpaReply:
        """OPA's answer to one policy input.

        Raises:
            Exception: there is none. `BrokenRuleError` where that is the rules' own doing.
        """
        if not self._is_open:
            await self._client._init_session()  # noqa: SLF001  our own, see above
            self._is_open = True
        reply: OpaReply = await self._client.query_rule(msgspec.Raw(asked), "keybroker", "decision", _QUERY)
        return reply

    async def close(self) -> None:
        """End its connections."""
        if self._is_open:
            await self._client.close_connection()
            self._is_open = False
