"""Frames over real Unix sockets: pairing, deadlines, lost rooms, strangers, and bytes that are no frames."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keybroker.errors import RoomUnavailableError, WireError
from keybroker.model.call import Answer, Call, Health, HealthReply, ShowKey
from keybroker.wire import BlockingChannel, Channel, FrameReader, Link, Listener, bind, frame_bytes, peer_uid

MAX = 4096
Handler = Callable[[Channel[Call, Answer], Call], None]


def answer_at_once(channel: Channel[Call, Answer], call: Call) -> None:
    name = call.ask.key if isinstance(call.ask, ShowKey) else ""
    channel.send(Answer(call.id, HealthReply(ready=True, parts={"key": name})))


def say_nothing(_channel: Channel[Call, Answer], _call: Call) -> None:
    return


@contextlib.asynccontextmanager
async def linked(path: Path, handler: Handler, peer: int | None = None) -> AsyncIterator[Link[Call, Answer]]:
    listener = Listener[Call, Answer](path, os.getuid() if peer is None else peer, Call, MAX, handler, lambda _channel, _why: None)
    async with listener.serving():
        link = Link[Call, Answer](path, os.getuid(), Answer, MAX)
        link.start()
        await until(lambda: link.is_up)
        try:
            yield link
        finally:
            await link.stop()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


async def ask(link: Link[Call, Answer], key: str, deadline_s: float = 5) -> str:
    reply = (await link.ask(lambda number: Call(number, ShowKey(key)), deadline_s)).reply
    assert isinstance(reply, HealthReply)
    return reply.parts["key"]


@pytest.mark.parametrize("directory", ["s", "a-directory-with-a-long-name" * 5])
def test_answers_are_paired_with_their_calls_on_paths_of_any_length(tmp_path: Path, directory: str) -> None:
    async def main() -> None:
        async with linked(tmp_path / directory / "room.sock", answer_at_once) as link:
            names = [f"key-{number}" for number in range(500)]
            assert await asyncio.gather(*(ask(link, name) for name in names)) == names
            assert link.in_flight == 0

    asyncio.run(main())


def test_ask_times_out_when_the_room_says_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with linked(tmp_path / "room.sock", say_nothing) as link:
            with pytest.raises(TimeoutError):
                await ask(link, "x", deadline_s=0.05)
            assert link.in_flight == 0

    asyncio.run(main())


def test_ask_fails_at_once_when_the_room_goes_away_and_works_when_it_is_back(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "room.sock"
        channels: list[Channel[Call, Answer]] = []
        async with linked(path, lambda channel, _call: channels.append(channel)) as link:
            waiting = asyncio.ensure_future(ask(link, "x"))
            await until(lambda: bool(channels))
            channels[0].close()
            with pytest.raises(RoomUnavailableError):
                await waiting
            await until(lambda: link.is_up)  # it has come back by itself
            waiting = asyncio.ensure_future(ask(link, "y"))
            await until(lambda: len(channels) == 2)
            answer_at_once(channels[1], Call(2, ShowKey("y")))
            assert await waiting == "y"

    asyncio.run(main())


def test_ask_is_refused_when_there_is_no_room(tmp_path: Path) -> None:
    async def main() -> None:
        link = Link[Call, Answer](tmp_path / "nobody.sock", os.getuid(), Answer, MAX)
        link.start()
        with pytest.raises(RoomUnavailableError):
            await ask(link, "x")
        await link.stop()

    asyncio.run(main())


def test_peer_of_another_user_is_not_heard(tmp_path: Path) -> None:
    async def main() -> None:
        async with linked(tmp_path / "room.sock", answer_at_once, peer=os.getuid() + 1) as link:
            with pytest.raises((RoomUnavailableError, TimeoutError)):
                await ask(link, "x", deadline_s=1)

    asyncio.run(main())


def test_second_listener_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    path = tmp_path / "room.sock"
    first = bind(path, os.getuid())
    with pytest.raises(WireError, match="another process listens"):
        bind(path, os.getuid())
    first.close()
    bind(path, os.getuid()).close()  # the leftover of a dead process is replaced


def test_socket_is_for_its_owner_alone_and_for_the_group_where_the_peer_is_another_user(tmp_path: Path) -> None:
    bind(tmp_path / "own.sock", os.getuid()).close()
    bind(tmp_path / "other.sock", os.getuid() + 1).close()
    assert (tmp_path / "own.sock").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "other.sock").stat().st_mode & 0o777 == 0o660


def test_blocking_channel_speaks_the_same_frames() -> None:
    near, far = socket.socketpair()
    with near, far:
        channel = BlockingChannel[Call, Answer](near, Call, MAX)
        far.sendall(frame_bytes(Call(1, Health())) + frame_bytes(Call(2, Health()))[:3])
        assert [call.id for call in channel.receive()] == [1]
        far.sendall(frame_bytes(Call(2, Health()))[3:])
        assert [call.id for call in channel.receive()] == [2]
        channel.send(Answer(2, HealthReply(ready=False, parts={})))
        assert FrameReader(Answer, MAX).feed(far.recv(MAX)).__next__().id == 2
        assert peer_uid(near) == os.getuid()
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            channel.receive()


@pytest.mark.parametrize(
    "data",
    [
        (MAX + 1).to_bytes(4),
        b"\xff\xff\xff\xff",
        (3).to_bytes(4) + b"\xc1\xc1\xc1",
        (0).to_bytes(4),
        (1).to_bytes(4) + b"\x01",
        frame_bytes(Answer(1, HealthReply(ready=True, parts={}))),
    ],
)
def test_bytes_that_are_no_frame_end_the_connection(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(WireError):
        list(FrameReader(Call, MAX).feed(data))

    async def main() -> None:
        async with linked(tmp_path / "room.sock", answer_at_once) as link:
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "room.sock"))
            writer.write(data)
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
            assert await ask(link, "others-are-unharmed") == "others-are-unharmed"

    asyncio.run(main())


@settings(max_examples=300)
@given(st.binary(max_size=200), st.lists(st.integers(1, 60), max_size=6))
def test_reader_never_fails_otherwise_than_with_a_wire_error(data: bytes, cuts: list[int]) -> None:
    reader = FrameReader(Call, MAX)
    try:
        for cut in cuts:
            list(reader.feed(data[:cut]))
            data = data[cut:]
        list(reader.feed(data))
    except WireError:
        pass


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=5), st.integers(1, 50))
def test_reader_yields_the_same_frames_however_the_stream_is_cut(names: list[str], step: int) -> None:
    calls = [Call(number, ShowKey(name)) for number, name in enumerate(names)]
    stream = b"".join(map(frame_bytes, calls))
    reader = FrameReader(Call, MAX)
    read = [call for start in range(0, len(stream), step) for call in reader.feed(stream[start : start + step])]
    assert read == calls
