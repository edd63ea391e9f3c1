"""Hostile connections against a served broker, and an honest client beside them."""

from __future__ import annotations

import base64
import contextlib
import json
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from keybroker.client import BrokerUnreachableError
from keybroker.frontend.admission import BURST, PER_SECOND, TOTAL_BURST, TOTAL_PER_SECOND
from keybroker.model.key import Algorithm
from keybroker.model.request import MAX_MESSAGE_BYTES, SignBody
from tests.hostile import (
    CLOSED_WITHIN,
    NOISE,
    ROUNDS,
    connect,
    context,
    failures,
    flood,
    is_unharmed,
    listening,
    metric,
    most_resident_bytes,
    open_connections,
    percentile,
    resident_bytes,
    seconds_of_signatures,
    shake_hands,
    slowest,
)
from tests.worlds import World, served, until


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16_384), hard))
    with served(tmp_path_factory.mktemp("hostile") / "world") as world:
        with world.client() as broker:
            for _ in range(8):
                broker.sign_batch("orders", [SignBody(algorithm=Algorithm.ES256, message=b"x")] * 100)
        yield world
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def seconds_until_closed(sock: socket.socket, drip: bytes = b"") -> float:
    """Sends a byte a second, if there is one to send, and waits for the end of the connection."""
    started = time.monotonic()
    sock.settimeout(1.0)
    with sock:
        while time.monotonic() - started < CLOSED_WITHIN + 10:
            try:
                if drip:
                    sock.sendall(drip)
                if not sock.recv(65_536):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
    return time.monotonic() - started


HEAD = b"POST /v1/keys/orders/sign HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def started_with(data: bytes) -> Callable[[World], socket.socket]:
    def begin(world: World) -> socket.socket:
        sock = shake_hands(world)
        sock.sendall(data)
        return sock

    return begin


PHASES: dict[str, tuple[Callable[[World], socket.socket], bytes]] = {
    "no handshake": (connect, b""),
    "half a handshake": (connect, b"\x16"),
    "idle after the handshake": (shake_hands, b""),
    "half a request line": (started_with(b"POST /v1/ke"), b""),
    "request line, dripping": (started_with(b"POST /v1/ke"), b"y"),
    "half the headers": (started_with(HEAD + b"X-A: "), b""),
    "headers, dripping": (started_with(HEAD + b"X-A: "), b"a"),
    "half a body": (started_with(HEAD + b"Content-Length: 100\r\n\r\n{"), b""),
    "body, dripping": (started_with(HEAD + b"Content-Length: 100\r\n\r\n{"), b" "),
    "chunked body, dripping": (started_with(HEAD + b"Transfer-Encoding: chunked\r\n\r\n"), b"1\r\n \r\n"),
}


@pytest.mark.case(76)
def test_every_slow_phase_is_closed_in_time(world: World) -> None:
    with ThreadPoolExecutor(len(PHASES)) as pool:
        running = {name: pool.submit(seconds_until_closed, begin(world), drip) for name, (begin, drip) in PHASES.items()}
        took = {name: future.result() for name, future in running.items()}
    assert {name: seconds for name, seconds in took.items() if seconds > CLOSED_WITHIN} == {}


@pytest.mark.case(76)
def test_client_that_does_not_read_its_answer_is_closed_in_time(world: World) -> None:
    before = open_connections(world)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    sock.connect(listening(world))
    with context(world, "auditor").wrap_socket(sock) as reader:
        reader.sendall(b"GET /v1/audit/records?limit=1000 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert reader.recv(1)
        assert until(lambda: open_connections(world) <= before, seconds=CLOSED_WITHIN + 10) <= CLOSED_WITHIN


@pytest.mark.case(76)
def test_two_thousand_slow_connections_leave_an_honest_client_unharmed(world: World) -> None:
    frontend = world.rooms()["frontend"]
    calm, memory = slowest(world), resident_bytes(frontend)
    with contextlib.ExitStack() as open_sockets:
        for number in range(2_000):
            source = f"127.0.0.{2 + number % 5}"
            sock = connect(world, source) if number % 4 else shake_hands(world, source=source)
            open_sockets.enter_context(sock)
            if number % 4 == 0:
                sock.sendall(HEAD)
        assert is_unharmed(world, calm)
        grown = resident_bytes(frontend) - memory
    assert grown < 2_000 * 128 * 1024
    until(lambda: open_connections(world) < 50, seconds=30)


@pytest.mark.case(77)
def test_flood_of_bad_handshakes_is_shed_and_leaves_an_honest_client_unharmed(world: World) -> None:
    calm = slowest(world)
    before = len(world.leaves())
    with flood(world, "no-certificate", prefix="127.9", seconds=8) as running:
        time.sleep(1)
        assert is_unharmed(world, calm)
        tries = running.wait()
    assert tries > 300
    until(lambda: failures(world, "127.9.0.1", before)[1] >= tries - 5, seconds=10)
    records, counted = failures(world, "127.9.0.1", before)
    assert records < 40
    assert counted <= tries


def seconds_to_sign(world: World) -> float:
    """Of an honest client that has to connect first; it tries once."""
    started = time.monotonic()
    with world.client() as broker:
        broker.sign("orders", "ES256", message=b"x")
    return time.monotonic() - started


@pytest.mark.case(76)
@pytest.mark.parametrize("addresses", [1, 40])  # the honest client's own among them: all places of it, all places that there are
def test_honest_client_gets_in_where_silent_connections_have_taken_every_place(world: World, addresses: int) -> None:
    calm = slowest(world)
    with flood(world, "silent", prefix="127.0", addresses=addresses, rate=1_500, seconds=6) as running:
        full = min(512 * addresses, 4_096)
        until(lambda: open_connections(world) >= full - 1, seconds=20)
        assert max(seconds_to_sign(world) for _ in range(10)) < CLOSED_WITHIN / 2
        assert is_unharmed(world, calm)
        assert running.wait() > full
    until(lambda: open_connections(world) < 50, seconds=30)


@pytest.mark.case(77)
@pytest.mark.parametrize("addresses", [1, 3_000])
def test_handshakes_that_begin_and_do_not_go_on_leave_an_honest_client_unharmed(world: World, addresses: int) -> None:
    calm = slowest(world)
    with flood(world, "hello", prefix="127.8", addresses=addresses, seconds=8):
        time.sleep(1)
        assert max(seconds_to_sign(world) for _ in range(10)) < CLOSED_WITHIN / 2
        assert is_unharmed(world, calm)
    until(lambda: open_connections(world) < 50, seconds=30)
    time.sleep(TOTAL_BURST / TOTAL_PER_SECOND)  # until strangers are welcome again and all is on record, for the tests that follow


@pytest.mark.case(77)
def test_flood_from_the_same_address_leaves_an_established_connection_unharmed(world: World) -> None:
    calm = slowest(world)
    with world.client() as broker:
        broker.sign("orders", "ES256", message=b"x")
        with flood(world, "no-certificate", prefix="127.0", seconds=8):
            until(lambda: metric(world, 'keybroker_handshakes_total{result="refused"}') > 0, seconds=10)
            took = [percentile(seconds_of_signatures(broker)) for _ in range(ROUNDS)]
        assert min(took) < 2 * calm + NOISE
    until(lambda: signs(world), seconds=20)  # and its address may connect again
    time.sleep(BURST / PER_SECOND)  # until it has a good name again, for the tests that follow


def signs(world: World) -> bool:
    with contextlib.suppress(BrokerUnreachableError):
        return seconds_to_sign(world) > 0
    return False


@pytest.mark.case(76)
def test_hundreds_of_connections_of_one_svid_and_address_are_served_at_once(world: World) -> None:
    count = 256
    ask = b"GET /v1/whoami HTTP/1.1\r\nHost: localhost\r\n\r\n"
    gate = threading.Barrier(16)

    def crowd() -> list[bytes]:
        gate.wait(20)
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(shake_hands(world)) for _ in range(count // 16)]
            gate.wait(60)
            for sock in socks:
                sock.sendall(ask)
            return [sock.recv(65_536)[:12] for sock in socks]

    with ThreadPoolExecutor(16) as pool:
        answers = [answer for future in [pool.submit(crowd) for _ in range(16)] for answer in future.result(120)]
    assert answers == [b"HTTP/1.1 200"] * count


BODIES_BUDGET = 64 * 1024 * 1024  # memory that the frontend has for bodies, of all connections together
MESSAGE = base64.b64encode(bytes(MAX_MESSAGE_BYTES))
LARGEST = b'{"algorithm": "ES256", "message": "%s"}' % MESSAGE


@pytest.mark.case(13)
def test_flood_of_largest_bodies_stays_within_twice_the_budget(world: World) -> None:
    frontend = world.rooms()["frontend"]
    count = BODIES_BUDGET // len(LARGEST)  # of which a third fits
    before, statuses = resident_bytes(frontend), []
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(shake_hands(world)) for _ in range(count)]
        for number, sock in enumerate(socks):
            length = b"Transfer-Encoding: chunked\r\n" if number % 2 else b"Content-Length: %d\r\n" % len(LARGEST)
            with contextlib.suppress(OSError):  # refused before it has sent everything
                sock.sendall(HEAD + length + b"\r\n" + (b"%x\r\n" % len(LARGEST) if number % 2 else b"") + LARGEST[:-1])
        for number, sock in enumerate(socks):  # now all become whole together
            with contextlib.suppress(OSError):
                sock.sendall(LARGEST[-1:] + (b"\r\n0\r\n\r\n" if number % 2 else b""))
        for sock in socks:
            with contextlib.suppress(OSError):
                statuses.append(int(sock.recv(65_536)[9:12]))
    assert most_resident_bytes(frontend) - before < 2 * BODIES_BUDGET
    assert set(statuses) == {200, 503}
    assert statuses.count(200) > count / 5
    assert seconds_to_sign(world) < CLOSED_WITHIN


@pytest.mark.case(1)
def test_handshake_without_a_certificate_is_on_record_counted(world: World) -> None:
    before = len(world.leaves())
    bare = ssl.create_default_context(cafile=str(world.directory / "bundle.pem"))
    bare.check_hostname = False

    def attempt() -> None:
        with contextlib.suppress(OSError), connect(world, "127.0.0.33") as sock, bare.wrap_socket(sock) as tls:
            tls.recv(1)

    threads = [threading.Thread(target=attempt) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    until(lambda: failures(world, "127.0.0.33", before)[1] == 12, seconds=10)
    assert failures(world, "127.0.0.33", before)[0] <= 6
    details = {json.loads(leaf)["body"]["detail"] for leaf in world.leaves()[before:] if b"127.0.0.33" in leaf}
    assert details == {"no-certificate from 127.0.0.33"}
