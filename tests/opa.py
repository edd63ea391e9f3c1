"""Signed bundles, and a real OPA server that takes them, as `deploy/opa` says."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import http.server
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from keybroker.authority.policy import bundle_maker
from keybroker.authority.policy.bundle_source import FILE_NAME
from keybroker.authority.policy.signatures import PrivateKey, signing_key
from keybroker.config import BundleConfig
from tests.policies import KEYS, OPA
from tests.worlds import until

DEPLOY = Path(__file__).parents[1] / "deploy" / "opa"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def write_keys(directory: Path, name: str = "signing", key: PrivateKey | None = None) -> PrivateKey:
    """A key pair, `NAME.pem` and `NAME.pub.pem`; a new P-256 one unless it is given."""
    made = key or ec.generate_private_key(ec.SECP256R1())
    (directory / f"{name}.pem").write_bytes(made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (directory / f"{name}.pub.pem").write_bytes(made.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return made


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves the published bundle, with an ETag; or whatever the publisher was told to answer instead."""

    protocol_version = "HTTP/1.1"
    publisher: Publisher

    def do_GET(self) -> None:
        publisher = self.publisher
        publisher.asked.append(self.headers.get("If-None-Match", ""))
        if publisher.answers is not None:
            self.wfile.write(publisher.answers)
            self.close_connection = True
            return
        data = publisher.published.read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        is_same = self.headers.get("If-None-Match") == etag
        self.send_response(304 if is_same else 200)
        self.send_header("ETag", etag)
        self.send_header("Content-Type", "application/gzip")
        self.send_header("Content-Length", "0" if is_same else str(len(data)))
        self.end_headers()
        self.wfile.write(b"" if is_same else data)

    def log_message(self, *_: object) -> None:
        pass


@dataclass(slots=True)
class Publisher:
    """A directory with a signing key and grant files, and a server of the bundle that is made of them.

    Attributes:
        answers: what the server sends instead of the bundle, HTTP and all.
        asked: the If-None-Match of each request.
    """

    directory: Path
    scope: str = ""
    own: bundle_maker.OwnPolicy | None = None
    revision: int = 0
    url: str = ""
    answers: bytes | None = None
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("grants", "published", "state"):
            (self.directory / name).mkdir(parents=True)
        write_keys(self.directory)

    @property
    def key(self) -> Path:
        return self.directory / "signing.pub.pem"

    @property
    def published(self) -> Path:
        return self.directory / "published" / FILE_NAME

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def bundle_url(self) -> str:
        return f"{self.url}/keybroker/{FILE_NAME}"

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Serve on loopback while the block runs."""
        handler = type("Handler", (_Handler,), {"publisher": self})
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            self.url = f"http://127.0.0.1:{server.server_address[1]}"
            server.daemon_threads = True
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            try:
                yield
            finally:
                server.shutdown()
                thread.join()

    def config(self, *, by_url: bool = False) -> BundleConfig:
        """Where a broker finds the bundle: in its file, or at the URL."""
        place = BundleConfig(url=self.bundle_url, keys=(), poll_ms=200) if by_url else BundleConfig(path=self.published, keys=())
        return msgspec.structs.replace(place, keys=(self.key,), scope=self.scope)

    def make(self, text: str, revision: int | None = None) -> bytes:
        """A bundle with one grant file; of the next revision, unless told otherwise."""
        (self.directory / "grants" / "a.yaml").write_text(text)
        self.revision = self.revision + 1 if revision is None else revision
        private = signing_key(self.directory / "signing.pem")
        packed, _ = bundle_maker.make(self.directory / "grants", self.revision, private, self.scope, self.own, KEYS)
        return packed

    def publish(self, text: str, revision: int | None = None) -> bytes:
        """The same, put where it is looked for."""
        packed = self.make(text, revision)
        self.put(packed)
        return packed

    def put(self, packed: bytes) -> None:
        """Any bytes, put where a bundle is looked for."""
        new = self.published.with_name(".new")
        new.write_bytes(packed)
        new.replace(self.published)


@dataclass(slots=True)
class OpaProcess:
    """An OPA server with `deploy/opa/opa.yaml`, as far as it goes on this host, and the bundle of a publisher."""

    publisher: Publisher
    address: str = ""
    options: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.address = self.address or f"127.0.0.1:{free_port()}"

    @property
    def url(self) -> str:
        """As keybroker's configuration has it."""
        return self.address.replace("unix://", "unix:") if self.address.startswith("unix:") else f"http://{self.address}"

    @property
    def log(self) -> Path:
        return self.publisher.directory / "opa.log"

    def start(self) -> None:
        config = yaml.safe_load((DEPLOY / "opa.yaml").read_text())
        config["services"]["policies"] = {"url": self.publisher.url}
        if self.publisher.scope:
            config["keys"]["policy"]["scope"] = config["bundles"]["keybroker"]["signing"]["scope"] = self.publisher.scope
        file = self.publisher.directory / "opa.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [str(OPA), "run", "--server", "--config-file", str(file), "--addr", self.address, "--authorization", "basic",
                   "--set-file", f"keys.policy.key={self.publisher.key}", "--skip-version-check", "--log-level", "error",
                   *self.options, str(DEPLOY / "authz.rego")]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self.is_well, 30, "no OPA server")

    def is_well(self) -> bool:
        """Whether it answers, bundle or not."""
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError), contextlib.closing(self._connection()) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    def _connection(self) -> http.client.HTTPConnection:
        if not self.address.startswith("unix://"):
            host, _, port = self.address.rpartition(":")
            return http.client.HTTPConnection(host, int(port), timeout=5)
        connection = http.client.HTTPConnection("localhost", timeout=5)
        connection.sock = socket.socket(socket.AF_UNIX)
        try:
            connection.sock.connect(self.address.removeprefix("unix://"))
        except OSError:
            connection.close()
            raise
        return connection

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Any request; status and body."""
        with contextlib.closing(self._connection()) as connection:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None


@contextlib.contextmanager
def opa_process(publisher: Publisher, address: str = "", *options: str) -> Iterator[OpaProcess]:
    """A server that has taken up what is published; killed when the block is left."""
    made = OpaProcess(publisher, address, list(options))
    try:
        made.start()
        yield made
    finally:
        made.kill()
