"""The witness's process: its key, its memory, its HTTP. Put a TLS proxy before it where others shall reach it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path

import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from keybroker.audit.note import VerifierKey
from keybroker.clock import SystemClock
from keybroker.config import host_and_port
from keybroker.errors import ConfigError
from keybroker.witness.rules import MAX_BODY_BYTES, Witness, WitnessAnswer

_KEY_FILE = "witness-key.pem"
_MEMORY = "witness.db"


def open_witness(name: str, state: Path, logs: Iterable[VerifierKey]) -> Witness:
    """The witness of a state directory; made with a fresh key if there is none.

    Raises:
        ConfigError: the directory cannot be used.
    """
    path = state / _KEY_FILE
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _make_key(path)
        private = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as err:
        raise ConfigError(f"{path}: cannot be used ({err})") from err
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(f"{path}: not an Ed25519 key")
    return Witness(name, private, logs, state / _MEMORY, SystemClock())


def serve(witness: Witness, listen: str) -> None:
    """Serve until SIGTERM; prints one line when it is ready."""
    host, port = host_and_port(listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as sock:
        sys.stdout.write(f"ready http://{listen} {witness.key}\n")
        sys.stdout.flush()
        config = uvicorn.Config(
            application(witness), lifespan="off", log_config=None, access_log=False, server_header=False, timeout_keep_alive=30
        )
        uvicorn.Server(config).run(sockets=[sock])


def application(witness: Witness) -> Starlette:
    """The two routes. Both are done in the event loop, one after another."""

    async def add_checkpoint(request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                return Response("the request is too large\n", 413, media_type="text/plain")
        return _response(witness.add_checkpoint(bytes(body)))

    async def latest(request: Request) -> Response:
        return _response(witness.latest(request.path_params["origin"]))

    return Starlette(
        routes=[Route("/add-checkpoint", add_checkpoint, methods=["POST"]), Route("/{origin}/checkpoint", latest, methods=["GET"])]
    )


def _response(answer: WitnessAnswer) -> Response:
    return Response(answer.body, answer.status, {"content-type": answer.media_type, "cache-control": "no-store"})


def _make_key(path: Path) -> None:
    data = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
