"""Nothing that a caller sends comes back in a refusal, and nothing of it is in a log: only names of fields, cut short, in pointers."""

from __future__ import annotations

import base64
import itertools
import json
import ssl
from typing import Any

from tests.hostile import shake_hands
from tests.worlds import World

_numbers = itertools.count()
MAX_NAME = 64


class Marks:
    """Words that nobody else says."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, before: str = "", after: str = "") -> str:
        word = f"{before}zq{next(_numbers):04d}xj{after}"
        self.made.append(word.removeprefix(before).removesuffix(after))
        return word


def ask(method: str, target: str, *fields: str, body: bytes | None = None) -> bytes:
    length = [] if body is None else [f"Content-Length: {len(body)}"]
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: localhost", *fields, *length, "", ""]).encode("latin-1") + (body or b"")


def sign(value: Any, *fields: str, target: str = "/v1/keys/orders/sign") -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return ask("POST", target, "Content-Type: application/json", *fields, body=body)


def good(**changes: Any) -> dict[str, Any]:
    return {"algorithm": "ES256", "message": base64.b64encode(b"x").decode(), **changes}


def requests(mark: Marks) -> list[bytes]:
    """A mark in every place that a request has, of requests that are refused."""
    long = "n" * 80
    return [
        ask("GET", f"/{mark()}"),
        ask("GET", f"/v1/keys/{mark()}"),
        ask("GET", f"/v1/keys/{mark('%27OR%201=1--')}"),
        ask("GET", f"/v1/audit/records/{mark()}"),
        ask("GET", f"/v1/audit/records?{mark()}={mark()}"),
        ask("GET", f"/v1/audit/records?kind={mark()}"),
        ask("GET", f"/v1/audit/records?since={mark()}"),
        ask("GET", f"/v1/audit/records?limit={mark()}"),
        ask("GET", f"/v1/audit/records?cursor={mark()}"),
        ask("GET", f"/v1/audit/records?workload={mark('spiffe://example.org/')}"),
        ask("GET", f"/v1/audit/records?use={mark()}&use={mark()}"),
        ask("GET", f"/v1/audit/records?{mark(after=long)}=1"),
        ask("GET", f"/v1/keys/orders/public?format={mark()}"),
        ask(mark(), "/v1/whoami"),
        ask("DELETE", f"/v1/keys/{mark()}"),
        ask("GET", "/v1/whoami", f"Transfer-Encoding: {mark()}"),
        ask("GET", "/v1/whoami", f"Host: {mark()}"),
        ask("GET", "/v1/whoami", f"{mark()} {mark()}"),
        ask("GET", "/v1/whoami", f"Upgrade: {mark()}", "Connection: upgrade"),
        ask("GET", f"/v1/{mark(after='y' * 9_000)}"),
        ask("GET", "/v1/nothing", f"X-{mark()}: {mark(after='y' * 17_000)}"),
        ask("GET", "/v1/nothing", f"traceparent: {mark()}", f"X-Request-Id: {mark()}", f"X-SPIFFE-ID: {mark()}", f"Cookie: {mark()}"),
        ask("POST", "/v1/keys/orders/sign", f"Content-Type: application/{mark()}", body=mark().encode()),
        sign(good(), f"Idempotency-Key: {mark('!')}"),
        sign(mark().encode()),
        sign(f'{{"{mark()}": {mark()}}}'.encode()),
        sign(good(**{mark(): mark()})),
        sign(good(**{mark(after=long): 1})),
        sign(good(algorithm=mark())),
        sign(good(algorithm="RS256", reason=mark(), media_type=mark("text/"))),
        sign(good(message=mark("=="))),
        sign(good(message=base64.b64encode(mark().encode()).decode() + "!")),
        sign(good(format=mark())),
        sign({"algorithm": "ES256", "digest": base64.b64encode(mark().encode()).decode()}),
        sign(good(reason=mark(after=long * 20))),
        sign(good(media_type=mark("ö"))),
        sign(good(reason=mark(), message=base64.b64encode(mark().encode()).decode()), target=f"/v1/keys/{mark()}/sign"),
        sign({mark(): [good()]}, target="/v1/keys/orders/sign/batch"),
        sign({"items": [good(algorithm=mark()), good(**{mark(): 1}), mark()]}, target=f"/v1/keys/{mark()}/sign/batch"),
        sign(good(reason=mark()), target=f"/v1/keys/{mark()}/sign/explain"),
        sign(good(format=mark()), target="/v1/keys/orders/sign/explain"),
    ]  # fmt: skip


def whole_answer(sock: ssl.SSLSocket) -> tuple[int, bytes, bytes]:
    """Status, head and body."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += _some(sock)
    head, _, body = received.partition(b"\r\n\r\n")
    size = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(body) < size:
        body += _some(sock)
    return int(head.split()[1]), head, body


def _some(sock: ssl.SSLSocket) -> bytes:
    piece = sock.recv(65_536)
    assert piece, "the server closed before it answered"
    return piece


def without_names(document: dict[str, Any]) -> str:
    """A problem without the names of fields that its pointers may hold."""
    for fault in document.get("errors", []):
        parts = fault["pointer"].split("/")
        assert all(len(part) <= MAX_NAME for part in parts)
        del fault["pointer"]
    return json.dumps(document)


def test_nothing_that_was_sent_and_no_secret_is_in_a_refusal_or_a_log(world: World) -> None:
    mark = Marks()
    statuses = set()
    secrets = ((world.directory / "pin").read_text().strip(), str(world.directory), "SELECT", "sqlite", "Traceback", "CKR_")
    for data in requests(mark):
        with shake_hands(world) as sock:
            sock.sendall(data)
            status, head, body = whole_answer(sock)
        document = json.loads(body)
        problems = document.get("results", [document])
        statuses |= {status, *(problem["status"] for problem in problems)}
        said = head.decode() + "".join(without_names(problem) for problem in problems)
        assert [word for word in (*mark.made, *secrets) if word in said] == [], data[:200]
    assert statuses == {200, 400, 403, 404, 405, 414, 415, 422, 431}  # 200 for the batch, whose items are all refused
    log = world.log.read_text()
    assert all(f'"{room}"' in log for room in ("frontend", "authority", "hsm"))
    encoded = [base64.b64encode(word.encode()).decode()[:12] for word in mark.made]
    assert [word for word in (*mark.made, *encoded, secrets[0]) if word in log] == []
