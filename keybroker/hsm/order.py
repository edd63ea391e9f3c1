"""What the room and its workers agree on: orders, exit statuses, and the page that shows what a worker is doing."""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

import msgspec

from keybroker.model.pkcs11_uri import Pkcs11Uri

EXIT_PIN_REFUSED = 64
EXIT_TOKEN = 65
EXIT_SESSION_LOST = 66
EXIT_LOGIN = 67
ENDINGS = {
    EXIT_PIN_REFUSED: "the token refused the PIN",
    EXIT_TOKEN: "no such token",
    EXIT_SESSION_LOST: "the session was lost",
    EXIT_LOGIN: "no session",
}
READY = b"ready\n"
FULL = b"full\n"
REFUSED = b"refused "

_CLOCK = struct.Struct("Q")


class LogOrder(msgspec.Struct, frozen=True):
    """The log whose checkpoints a worker signs.

    Attributes:
        origin: of the log.
        object: CKA_LABEL of its key; empty to ignore.
        id: CKA_ID of its key, in hex; empty to ignore.
    """

    origin: str
    object: str
    id: str


class NoticeOrder(msgspec.Struct, frozen=True):
    """The key that signs notices: CKA_LABEL and CKA_ID (hex) of its private half; empty to ignore."""

    object: str
    id: str


class WorkerOrder(msgspec.Struct, frozen=True):
    """What a worker is started with, as JSON on standard input. No secret: the PIN is in the file that the URI names.

    Attributes:
        parent: the room's process id.
        socket: where to listen.
        authority_uid: the only user that is heard.
        environment: variables that the module reads its configuration from.
        busy_fd: descriptor of the shared page.
        deadline_ms: a call that takes longer ends with this worker's death.
        is_careful: the attempt before this one failed.
        notices: the key of this token that signs notices, if there is one.
        needs_operator: why nobody may log in now; then the worker touches no token, and only tells the authority so. Empty to work.
        log: the log that is signed for with a key of this token, if there is one.
    """

    parent: int
    uri: Pkcs11Uri
    socket: Path
    authority_uid: int
    environment: dict[str, str]
    busy_fd: int
    deadline_ms: int
    is_careful: bool = False
    needs_operator: str = ""
    log: LogOrder | None = None
    notices: NoticeOrder | None = None

    @classmethod
    def from_bytes(cls, data: bytes) -> WorkerOrder:
        """Read what `to_bytes` wrote."""
        return msgspec.json.decode(data, type=cls, dec_hook=_decode)

    def to_bytes(self) -> bytes:
        """JSON."""
        return msgspec.json.encode(self, enc_hook=str)


def _decode(type_: type, value: str) -> Path | Pkcs11Uri:
    return Pkcs11Uri.parse(value, Path("/")) if type_ is Pkcs11Uri else Path(value)


class BusyClock:
    """The shared page: CLOCK_MONOTONIC nanoseconds at which the call under way began, or zero."""

    def __init__(self, fd: int) -> None:
        self._page = mmap.mmap(fd, mmap.PAGESIZE)

    @staticmethod
    def create() -> int:
        """A descriptor of a fresh page."""
        fd = os.memfd_create("keybroker-busy", 0)
        os.ftruncate(fd, mmap.PAGESIZE)
        return fd

    @property
    def since_ns(self) -> int:
        """When the call under way began; zero if none is."""
        value: int = _CLOCK.unpack_from(self._page)[0]
        return value

    def begin(self) -> None:
        """A call into the module begins."""
        _CLOCK.pack_into(self._page, 0, time.monotonic_ns())

    def end(self) -> None:
        """It has returned."""
        _CLOCK.pack_into(self._page, 0, 0)
