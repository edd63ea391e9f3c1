"""The operations address: /livez, /readyz and /metrics, plain HTTP, for supervisors and Prometheus. Keep it on loopback."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Generator, Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from keybroker.errors import KeyBrokerError
from keybroker.frontend.authority_link import AuthorityLink
from keybroker.frontend.metrics import FrontendMetrics

_FAMILY = re.compile(r"^# HELP (\S+) .*$", re.MULTILINE)
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_MAX_CONNECTIONS = 64


class Operations:
    """Answers on the operations address.

    Args:
        is_draining: true once this room has been told to stop.
    """

    def __init__(self, authority: AuthorityLink, metrics: FrontendMetrics, is_draining: Callable[[], bool]) -> None:
        self._authority = authority
        self._metrics = metrics
        self._is_draining = is_draining

    def app(self) -> Starlette:
        """The three routes."""
        return Starlette(routes=[Route("/livez", self.livez), Route("/readyz", self.readyz), Route("/metrics", self.metrics)])

    async def livez(self, _request: Request) -> Response:
        """This process answers; nothing more."""
        return JSONResponse({"alive": True})

    async def readyz(self, _request: Request) -> Response:
        """200 while this broker can sign, 503 while it cannot; with what each part thinks of itself."""
        try:
            health = await self._authority.health()
        except (KeyBrokerError, TimeoutError):
            is_ready, parts = False, {"authority": "does not answer"}
        else:
            is_ready, parts = health.ready, health.parts
        if self._is_draining():
            is_ready, parts = False, {**parts, "frontend": "draining"}
        headers = {} if is_ready else {"retry-after": "1"}
        return JSONResponse({"ready": is_ready, "parts": parts}, 200 if is_ready else 503, headers)

    async def metrics(self, _request: Request) -> Response:
        """This room's metrics and the authority's, in Prometheus's text format."""
        try:
            of_authority = (await self._authority.metrics_text()).decode()
        except (KeyBrokerError, TimeoutError):
            of_authority = ""
        return Response(merged(self._metrics.text().decode(), of_authority), media_type=_PROMETHEUS)


class OperationsServer(uvicorn.Server):
    """uvicorn, without its hold on signals: the room decides when to stop."""

    @classmethod
    def of(cls, operations: Operations) -> OperationsServer:
        """Not started yet: `serve(sockets=[...])`."""
        return cls(
            uvicorn.Config(
                operations.app(),
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=_MAX_CONNECTIONS,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=1,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Capture none."""
        yield

    async def run_on(self, sock: socket.socket) -> None:
        """Serve on a bound socket until `should_exit`."""
        await self.serve(sockets=[sock])


def merged(*texts: str) -> str:
    """Several texts in Prometheus's format as one: a family that several have appears once, with the samples of all."""
    families: dict[str, list[str]] = {}
    for text in texts:
        for name, block in _families(text):
            known = families.setdefault(name, [])
            is_new = not known
            known.extend(line for line in block.splitlines() if is_new or not line.startswith("#"))
    return "".join(f"{line}\n" for lines in families.values() for line in lines)


def _families(text: str) -> Iterator[tuple[str, str]]:
    starts = [(match[1], match.start()) for match in _FAMILY.finditer(text)]
    ends = [*(start for _, start in starts[1:]), len(text)]
    for (name, start), end in zip(starts, ends, strict=False):  # a text without a family has an end and no start
        yield name, text[start:end]
