"""How much and how long a client may send and read, and how much of it is held in memory. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """How much and how long one connection may send, and how long it may take to read.

    Attributes:
        body_bytes: for the path of a request target, how large a body may be.
        request_s: seconds for a whole request, from its first byte; for the first one from the end of the TLS handshake.
        idle_s: seconds between an answer and the next request.
        linger_s: seconds in which the rest of a body that is not taken is dropped, so that its sender gets to read the answer.
        linger_bytes: of it that are read at all in that time.
        answer_s: seconds in which an answer is to leave.
        answer_bytes_per_s: a large one has a second more for so many bytes.
        target_bytes: of the request target.
        header_bytes: names and values of all header fields, with four bytes for each.
        header_fields: how many.
    """

    body_bytes: Callable[[bytes], int]
    request_s: float = 8.0
    idle_s: float = 60.0
    linger_s: float = 1.0
    linger_bytes: int = 1024 * 1024
    answer_s: float = 8.0
    answer_bytes_per_s: int = 32 * 1024
    target_bytes: int = 8 * 1024
    header_bytes: int = 16 * 1024
    header_fields: int = 100


class ByteBudget:
    """Bytes that all connections together may hold at one time."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> bool:
        """Take a part; False, and nothing taken, if there is not as much left."""
        if size > self.left:
            return False
        self.left -= size
        return True

    def give_back(self, size: int) -> None:
        """Give back what was taken."""
        self.left += size
