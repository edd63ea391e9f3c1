"""Typed frames on Unix sockets: the only codec between rooms.

A frame is four bytes of length, big-endian, and that many bytes of MessagePack of one closed union of structs (`model/call.py`,
`model/task.py`). The receiver knows the largest frame it takes and refuses a larger one before reading it. Both ends check who
is on the other (SO_PEERCRED, unix(7)). Whatever breaks a rule ends the connection: between our own rooms there is no bad input, only a
bug or an intruder.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from keybroker.errors import RoomUnavailableError, WireError

HEADER_BYTES = 4
_MAX_SUN_PATH = 107  # bytes of sockaddr_un.sun_path, less the final NUL
_PEERCRED = struct.Struct("3i")
_encode = msgspec.msgpack.Encoder().encode


class Numbered(Protocol):
    """Every frame says which request it belongs to."""

    @property
    def id(self) -> int:
        """Unique among the requests under way on one connection."""
        ...


In = TypeVar("In", bound=Numbered)
Out = TypeVar("Out", bound=Numbered)


class FrameReader(Generic[In]):
    """Cuts a stream of bytes into frames of one type. No I/O."""

    def __init__(self, type_: type[In], max_bytes: int) -> None:
        self._decode: Callable[[bytes], In] = msgspec.msgpack.Decoder(type_).decode
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[In]:
        """The frames that these bytes complete, in order.

        Raises:
            WireError: a frame is larger than allowed or not of the type.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= HEADER_BYTES:
            size = int.from_bytes(buffer[start : start + HEADER_BYTES])
            if size > self._max_bytes:
                msg = f"a frame of {size} bytes; at most {self._max_bytes} are taken"
                raise WireError(msg)
            end = start + HEADER_BYTES + size
            if len(buffer) < end:
                break
            body = bytes(buffer[start + HEADER_BYTES : end])
            start = end
            try:
                frame = self._decode(body)
            except (msgspec.MsgspecError, UnicodeError) as err:
                msg = f"a frame that is not of its type: {type(err).__name__}"
                raise WireError(msg) from err
            yield frame
        del buffer[:start]


def frame_bytes(frame: Numbered) -> bytes:
    """A frame as it goes over the wire."""
    body = _encode(frame)
    return len(body).to_bytes(HEADER_BYTES) + body


class Channel(asyncio.Protocol, Generic[In, Out]):
    """One connection. Calls `on_frame` for each frame and `on_end` once."""

    def __init__(
        self,
        type_: type[In],
        max_bytes: int,
        peer_uid: int,
        on_frame: Callable[[Channel[In, Out], In], None],
        on_end: Callable[[Channel[In, Out], Exception | None], None],
    ) -> None:
        self._reader = FrameReader(type_, max_bytes)
        self._peer_uid = peer_uid
        self._on_frame = on_frame
        self._on_end = on_end
        self._transport: asyncio.Transport | None = None
        self._pending: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._fault: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Refuse a peer that runs as another user than expected."""
        self._transport = transport  # type: ignore[assignment]  # a stream transport is an asyncio.Transport
        uid = peer_uid(transport.get_extra_info("socket"))
        if uid != self._peer_uid:
            self._refuse(WireError(f"the peer runs as user {uid}, expected {self._peer_uid}"))

    def data_received(self, data: bytes) -> None:
        """Hand on each whole frame; a broken one ends the connection."""
        if self._fault is not None:
            return
        try:
            for frame in self._reader.feed(data):
                self._on_frame(self, frame)
        except WireError as err:
            self._refuse(err)

    def send(self, frame: Out) -> None:
        """Queue a frame. All frames queued in one turn of the event loop leave in one system call."""
        if not self._pending:
            self._loop.call_soon(self._flush)
        self._pending.append(frame_bytes(frame))

    def close(self) -> None:
        """Send what is queued, then end the connection."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the owner, once."""
        self._transport = None
        self._pending.clear()
        self._on_end(self, self._fault or exc)

    def _flush(self) -> None:
        if self._pending and self._transport is not None:
            self._transport.write(b"".join(self._pending))
        self._pending.clear()

    def _refuse(self, fault: WireError) -> None:
        self._fault = fault
        if self._transport is not None:
            self._transport.abort()


class Link(Generic[Out, In]):
    """The way to the room on the right: one connection, many requests at once, made again whenever it is lost.

    Args:
        path: the other room's socket.
        peer_uid: the user that the other room runs as.
        answer_type: what comes back; paired with its request by id.
        max_bytes: the largest answer that is taken.
        on_change: called with True when the link is up and with False when it is lost.
        on_answer: called with each answer, also with one that nobody waits for any more.
    """

    RETRY_SECONDS = (0.02, 0.05, 0.1, 0.2)  # the last one again and again: it is time in which nobody is served

    def __init__(
        self,
        path: Path,
        peer_uid: int,
        answer_type: type[In],
        max_bytes: int,
        on_change: Callable[[bool, Exception | None], None] = lambda _up, _why: None,
        on_answer: Callable[[In], None] = lambda _answer: None,
    ) -> None:
        self._path = path
        self._peer_uid = peer_uid
        self._type = answer_type
        self._max_bytes = max_bytes
        self._on_change = on_change
        self._on_answer = on_answer
        self._channel: Channel[In, Out] | None = None
        self._waiting: dict[int, asyncio.Future[In]] = {}
        self._next_id = 0
        self._lost = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        """Whether there is a connection now."""
        return self._channel is not None

    @property
    def in_flight(self) -> int:
        """Requests without an answer."""
        return len(self._waiting)

    def start(self) -> None:
        """Connect, and go on connecting, in the background."""
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    async def stop(self) -> None:
        """Disconnect for good."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        channel, self._channel = self._channel, None  # so that its end is no news to anybody
        if channel is not None:
            channel.close()
        self._give_up_waiting()

    async def ask(self, build: Callable[[int], Out], deadline_s: float) -> In:
        """Send one request and wait for its answer.

        Args:
            build: makes the frame from its id.
            deadline_s: seconds; an answer that comes later is dropped unread.

        Raises:
            RoomUnavailableError: there is no connection, or it broke before the answer.
            TimeoutError: no answer in time.
        """
        if self._channel is None:
            msg = "the room is not there"
            raise RoomUnavailableError(msg)
        self._next_id += 1
        number = self._next_id
        loop = asyncio.get_running_loop()
        future: asyncio.Future[In] = loop.create_future()
        self._waiting[number] = future
        timer = loop.call_later(deadline_s, _expire, future)
        try:
            self._channel.send(build(number))
            return await future
        finally:
            timer.cancel()
            self._waiting.pop(number, None)

    def break_off(self) -> None:
        """End this connection and make a new one: what is under way on it is not trusted any more."""
        if self._channel is not None:
            self._channel.close()

    async def _keep(self) -> None:
        attempt = 0
        while True:
            self._lost.clear()
            try:
                await self._connect()
            except OSError:
                await asyncio.sleep(self.RETRY_SECONDS[min(attempt, len(self.RETRY_SECONDS) - 1)])
                attempt += 1
                continue
            attempt = 0
            await self._lost.wait()

    async def _connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _short_address(self._path) as address:
                sock.connect(address)
            sock.settimeout(0)
            loop = asyncio.get_running_loop()
            _, channel = await loop.create_connection(
                lambda: Channel[In, Out](self._type, self._max_bytes, self._peer_uid, self._on_frame, self._on_end), sock=sock
            )
        except BaseException:
            sock.close()
            raise
        self._channel = channel
        self._on_change(True, None)  # noqa: FBT003  the callback's one argument is the fact itself

    def _on_frame(self, _channel: Channel[In, Out], frame: In) -> None:
        self._on_answer(frame)
        future = self._waiting.get(frame.id)
        if future is not None and not future.done():
            future.set_result(frame)

    def _on_end(self, channel: Channel[In, Out], why: Exception | None) -> None:
        if self._channel is not channel:
            self._lost.set()
            return
        self._channel = None
        self._give_up_waiting()
        self._lost.set()
        self._on_change(False, why)  # noqa: FBT003  as above

    def _give_up_waiting(self) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(RoomUnavailableError("the room went away before it answered"))


class Listener(Generic[In, Out]):
    """Takes connections on a Unix socket from one user.

    Args:
        on_frame: called for each frame, with the channel to answer on.
        on_end: called when a connection has ended, with what broke it, if anything did.
    """

    def __init__(
        self,
        path: Path,
        peer_uid: int,
        type_: type[In],
        max_bytes: int,
        on_frame: Callable[[Channel[In, Out], In], None],
        on_end: Callable[[Channel[In, Out], Exception | None], None],
    ) -> None:
        self._path = path
        self._peer_uid = peer_uid
        self._type = type_
        self._max_bytes = max_bytes
        self._on_frame = on_frame
        self._on_end = on_end

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Listen until the block is left; then the socket file is gone.

        Raises:
            WireError: somebody else listens there.
        """
        sock = bind(self._path, self._peer_uid)
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(
            lambda: Channel[In, Out](self._type, self._max_bytes, self._peer_uid, self._on_frame, self._on_end), sock=sock, backlog=64
        )
        try:
            yield
        finally:
            server.close()
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()


class BlockingChannel(Generic[In, Out]):
    """One connection in a process without an event loop (an hsm worker)."""

    def __init__(self, sock: socket.socket, type_: type[In], max_bytes: int) -> None:
        self._sock = sock
        self._reader = FrameReader(type_, max_bytes)

    def receive(self) -> list[In]:
        """Wait for bytes; the frames that are complete now, possibly none. Raises EOFError when the other side has closed."""
        data = self._sock.recv(256 * 1024)
        if not data:
            raise EOFError
        return list(self._reader.feed(data))

    def send(self, frame: Out) -> None:
        """Send one frame, waiting until the kernel has taken it."""
        self._sock.sendall(frame_bytes(frame))


def bind(path: Path, peer_uid: int) -> socket.socket:
    """A listening Unix socket; a dead process's leftover is replaced.

    The directory decides who can reach the socket, SO_PEERCRED who is heard. Where the peer is another user, the socket is
    open to its group: give the directory the peer's group and the set-group-ID bit.

    Raises:
        WireError: a live process listens there.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _short_address(path) as address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(address)
            except FileNotFoundError:
                pass
            except OSError:
                path.unlink(missing_ok=True)
            else:
                msg = f"{path.name}: another process listens there; is a second broker running?"
                raise WireError(msg)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(address)
    path.chmod(0o600 if peer_uid == os.getuid() else 0o660)
    sock.listen(64)
    return sock


def peer_uid(sock: Any) -> int:
    """The user id of the process that made the other end of a Unix socket."""
    _, uid, _ = _PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
    return int(uid)


def _expire(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())


@contextlib.contextmanager
def _short_address(path: Path) -> Iterator[str]:
    """An address for a path of any length: through a descriptor of its directory where sun_path is too short."""
    text = str(path)
    if len(os.fsencode(text)) <= _MAX_SUN_PATH:
        yield text
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
