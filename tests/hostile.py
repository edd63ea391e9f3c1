"""Hostile clients, and an honest one beside them."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from keybroker.client import Client
from tests.worlds import World, clean_environment

CLOSED_WITHIN = 10.0
NOISE = 0.06  # seconds that a shared machine may add to any answer
SIGNATURES = 150
ROUNDS = 3  # of which the best counts, because the machine is shared

# Connects from many addresses in turn and leaves each connection as the mode says; prints how many it made.
_FLOOD = """
import collections, socket, ssl, sys, time
host, port, mode, prefix, addresses, rate, seconds = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], *map(float, sys.argv[5:])
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
try:
    context.wrap_bio(incoming, outgoing).do_handshake()
except ssl.SSLWantReadError:
    hello = outgoing.read()
tries, held, started = 0, collections.deque(), time.monotonic()
while time.monotonic() < started + seconds and tries < 30_000:
    if tries > (time.monotonic() - started) * rate:
        time.sleep(0.001)
        continue
    number = int(tries % addresses)
    tries += 1
    sock = socket.socket()
    sock.settimeout(5)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00")
    try:
        sock.bind((f"{prefix}.{number // 250}.{number % 250 + 1}", 0))
        sock.connect((host, port))
        if mode == "no-certificate":
            with context.wrap_socket(sock) as tls:
                tls.recv(1)
        elif mode == "hello":
            sock.sendall(hello)
    except OSError:
        pass
    held.append(sock)
    if mode == "no-certificate" or len(held) > 6_000:
        held.popleft().close()
print(tries)
"""


class Flood:
    """A process that connects and connects. Its result is there once the block is left."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.tries = 0

    def wait(self) -> int:
        """How many connections it has made."""
        output, _ = self._process.communicate(timeout=60)
        self.tries = int(output)
        return self.tries


@contextlib.contextmanager
def flood(world: World, mode: str, *, prefix: str, addresses: int = 1, rate: float = 1_000, seconds: float = 6) -> Iterator[Flood]:
    """A flood from a process of its own.

    Args:
        world: against whom.
        mode: `silent`, `hello` (begins a handshake and does not go on) or `no-certificate`.
        prefix: the first two numbers of its addresses.
        addresses: how many it connects from in turn.
        rate: connections a second.
        seconds: how long.
    """
    host, port = listening(world)
    command = [sys.executable, "-c", _FLOOD, host, str(port), mode, prefix, str(addresses), str(rate), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean_environment()) as process:
        try:
            yield Flood(process)
        finally:
            process.kill()


def listening(world: World) -> tuple[str, int]:
    """Where the service is."""
    host, _, port = world.url.removeprefix("https://").partition(":")
    return host, int(port)


def connect(world: World, source: str = "127.0.0.1") -> socket.socket:
    """A TCP connection."""
    return socket.create_connection(listening(world), timeout=CLOSED_WITHIN + 20, source_address=(source, 0))


def context(world: World, name: str = "payments-api") -> ssl.SSLContext:
    """A client's, with an SVID."""
    made = ssl.create_default_context(cafile=str(world.directory / "bundle.pem"))
    made.check_hostname = False
    made.load_cert_chain(world.svid(name))
    return made


def shake_hands(world: World, name: str = "payments-api", source: str = "127.0.0.1") -> ssl.SSLSocket:
    """A TLS connection."""
    return context(world, name).wrap_socket(connect(world, source))


def seconds_of_signatures(broker: Client, count: int = SIGNATURES) -> list[float]:
    """How long each of some signatures takes, one after another."""
    took = []
    for _ in range(count):
        started = time.monotonic()
        broker.sign("orders", "ES256", message=b"x")
        took.append(time.monotonic() - started)
    return took


def percentile(took: list[float]) -> float:
    """The 99th."""
    return sorted(took)[int(len(took) * 0.99) - 1]


def slowest(world: World) -> float:
    """The 99th percentile of an honest client's signatures on one new connection, seconds."""
    with world.client() as broker:
        broker.sign("orders", "ES256", message=b"x")
        return percentile(seconds_of_signatures(broker))


def is_unharmed(world: World, calm: float) -> bool:
    """Whether an honest client gets in, and is served in less than twice the time of calm."""
    return any(slowest(world) < 2 * calm + NOISE for _ in range(ROUNDS))


def metric(world: World, line: str) -> float:
    """A metric's value by everything that stands before it; 0 if it is not there."""
    with urllib.request.urlopen(f"http://{world.operations}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return next((float(each.rpartition(" ")[2]) for each in lines if each.rpartition(" ")[0] == line), 0.0)


def open_connections(world: World) -> int:
    """Of clients, handshakes included."""
    return int(metric(world, "keybroker_connections"))


def failures(world: World, address: str, after: int) -> tuple[int, int]:
    """How many records of failed handshakes from an address there are, and how many handshakes they count."""
    bodies = [json.loads(leaf)["body"] for leaf in world.leaves()[after:] if b'"handshake-failed"' in leaf]
    counts = [body["count"] for body in bodies if body["detail"].endswith(f"from {address}")]
    return len(counts), sum(counts)


def resident_bytes(pid: int) -> int:
    """The memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def most_resident_bytes(pid: int) -> int:
    """The most memory that a process has had so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
