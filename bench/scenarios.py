"""What is asked for: keys, algorithms, connections, batches; and the requests, as bytes made beforehand."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

MESSAGE = b"one order, as long as orders are\n" * 4
BATCH = 100
_DISTINCT = 20_000  # more than the policy engine remembers


@dataclass(frozen=True, slots=True)
class Scenario:
    """One way to ask for signatures.

    Attributes:
        name: in tables and in JSON.
        short: over a column.
        batch: signatures of one request.
        is_new: no two requests have the same policy input, so that each is decided by the policy itself, not from memory.
    """

    name: str
    short: str
    algorithm: str = "ES256"
    key: str = "orders"
    connections: int = 1
    batch: int = 1
    is_new: bool = False

    def requests(self, round_number: int) -> tuple[bytes, ...]:
        """HTTP requests, to be sent in turn."""
        if not self.is_new:
            return (self._request(""),)
        return tuple(self._request(f"order {round_number}/{number:05}") for number in range(_DISTINCT))

    def _request(self, reason: str) -> bytes:
        item = {"algorithm": self.algorithm, "message": base64.b64encode(MESSAGE).decode()}
        if reason:
            item["reason"] = reason
        body = json.dumps(item if self.batch == 1 else {"items": [item] * self.batch}).encode()
        path = f"/v1/keys/{self.key}/sign" + ("" if self.batch == 1 else "/batch")
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body


ONE = Scenario("ES256, 1 connection", "1 conn.")
SOME = Scenario("ES256, 16 connections", "16 conn.", connections=16)
MANY = Scenario("ES256, 64 connections", "64 conn.", connections=64)
BATCHES = Scenario(f"ES256, batches of {BATCH}, 8 connections", "batches", connections=8, batch=BATCH)
NEW = Scenario("ES256, 64 connections, every decision new", "new", connections=64, is_new=True)
RSA = Scenario("PS256 (RSA-2048), 64 connections", "PS256", "PS256", "invoices", connections=64)
ED25519 = Scenario("Ed25519, 64 connections", "Ed25519", "Ed25519", "sessions", connections=64)

SCENARIOS = (ONE, SOME, MANY, BATCHES, NEW, RSA, ED25519)
ALONE = (ONE, SOME, MANY, BATCHES)  # what the frontend alone is asked
