"""The frontend's process: everything it is made of, put together in one place, served until SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable

import uvloop

from keybroker.config import Config, FrontendConfig, TelemetryConfig, host_and_port
from keybroker.errors import ConfigError, WireError
from keybroker.frontend.app import Application
from keybroker.frontend.authority_link import AuthorityLink
from keybroker.frontend.failed_handshakes import FailedHandshakes
from keybroker.frontend.limits import ByteBudget, HttpLimits
from keybroker.frontend.listener import TlsListener
from keybroker.frontend.metrics import FrontendMetrics
from keybroker.frontend.operations import Operations, OperationsServer
from keybroker.frontend.places import SvidShares
from keybroker.frontend.protocol import BoundedHttpProtocol, Shared
from keybroker.frontend.signing import body_limit
from keybroker.frontend.tls import ServerTls
from keybroker.identity.bundle import TrustBundles
from keybroker.model.call import MAX_ANSWER_BYTES, Answer, Call
from keybroker.process import EXIT_CONFIG, allow_open_files, harden, uid_of
from keybroker.sandbox import Sandbox, around, own_temporary, python_paths
from keybroker.telemetry import configure, logger
from keybroker.tracing import Tracer, export_port
from keybroker.wire import Link

DRAIN_SECONDS = 10.0
_BODIES_BYTES = 64 * 1024 * 1024
_ANSWERS_BYTES = 64 * 1024 * 1024
_DRAIN_POLL_SECONDS = 0.05
_OTHER_FILES = 512  # handshakes hold two descriptors for a moment; sockets, logs and files of our own

_log = logger()


def run(config: Config) -> int:
    """Serve until SIGTERM; the exit status."""
    harden()
    configure("frontend", config.telemetry)
    try:
        if config.frontend is None:
            raise ConfigError("the section `frontend` is missing")
        allow_open_files(config.frontend.max_connections + _OTHER_FILES)
        _log.info("walled in", landlock_abi=sandbox(config.frontend, config.telemetry).enter())
        uvloop.run(_serve(config.frontend, config.telemetry))
    except (ConfigError, WireError) as err:
        sys.stderr.write(f"frontend: {err}\n")
        return EXIT_CONFIG
    return 0


def sandbox(config: FrontendConfig, telemetry: TelemetryConfig) -> Sandbox:
    """What this room may touch: its own SVID, the bundles, its two ports. No PIN, no database, no connection but where traces go."""
    ports = tuple(host_and_port(each)[1] for each in (config.listen, config.operations))
    reads = (*python_paths(), *around(config.svid, *config.bundles.values()))
    return Sandbox(reads=reads, writes=own_temporary(), binds=ports, connects=export_port(telemetry))


async def _serve(config: FrontendConfig, telemetry: TelemetryConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    metrics = FrontendMetrics()
    tracer = Tracer("frontend", telemetry)
    tls = ServerTls(config.svid, TrustBundles.load(config.bundles))
    service_socket = bind("listen", config.listen)
    operations_socket = bind("operations", config.operations)
    link = Link[Call, Answer](config.authority, uid_of(config.authority_user), Answer, MAX_ANSWER_BYTES, _on_link_change)
    authority = AuthorityLink(link)
    shared = Shared(ByteBudget(_BODIES_BYTES), ByteBudget(_ANSWERS_BYTES), SvidShares(config.max_connections_per_svid))
    failures = FailedHandshakes()
    listener = TlsListener(
        service_socket,
        lambda: tls.context,
        _protocol_factory(Application(authority, metrics, tracer), shared, metrics),
        max_connections=config.max_connections,
        max_per_address=config.max_connections_per_address,
        metrics=metrics,
        failures=failures,
    )
    operations = OperationsServer.of(Operations(authority, metrics, stop.is_set))

    link.start()
    listener.start()
    background = [asyncio.ensure_future(each) for each in (tls.keep_fresh(), failures.run(authority))]
    serving = asyncio.ensure_future(operations.run_on(operations_socket))
    _log.info("started", listen=config.listen, operations=config.operations)
    await stop.wait()
    await listener.stop()
    await _drain(shared)
    operations.should_exit = True
    for task in background:
        task.cancel()
    await asyncio.gather(serving, *background, return_exceptions=True)
    await failures.tell(authority)
    with contextlib.suppress(OSError):
        operations_socket.close()
    await link.stop()
    await asyncio.to_thread(tracer.stop)


def _protocol_factory(app: Application, shared: Shared, metrics: FrontendMetrics) -> Callable[[str, Callable[[], None]], asyncio.Protocol]:
    """Makes the protocol object of each connection."""
    limits = HttpLimits(body_bytes=body_limit)

    def make(address: str, on_lost: Callable[[], None]) -> asyncio.Protocol:
        return BoundedHttpProtocol(app.answer, limits=limits, shared=shared, metrics=metrics, address=address, on_lost=on_lost)

    return make


async def _drain(shared: Shared) -> None:
    """Let every connection finish the request that is under way, for a while."""
    for connection in list(shared.connections):
        connection.shutdown()
    deadline = asyncio.get_running_loop().time() + DRAIN_SECONDS
    while shared.connections and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110  it ends soon
        await asyncio.sleep(_DRAIN_POLL_SECONDS)


def bind(name: str, address: str) -> socket.socket:
    """A socket on `ADDRESS:PORT`, not listening yet.

    Args:
        name: of the field, for errors.

    Raises:
        ConfigError: somebody else listens there, or the address is not this host's.
    """
    host, port = host_and_port(address)
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as err:
        sock.close()
        raise ConfigError(f"frontend.{name}: cannot listen on {address}: {err.strerror}; stop what listens there, or name another") from err
    return sock


def _on_link_change(is_up: bool, why: Exception | None) -> None:  # noqa: FBT001  called by the link
    if is_up:
        _log.info("the authority is there")
    else:
        _log.warning("the authority is away", why=str(why or "closed"))
