"""One `keybroker authority`, served alone: a client in the frontend's place, and a token in software in the hsm room's."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import yaml
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keybroker.audit.note import SignatureType, VerifierKey
from keybroker.hsm.log_signer import LogSigner
from keybroker.model.call import MAX_ANSWER_BYTES, Answer, AnyAsk, AnyReply, BatchReply, Call, Health, Sign, SignBatch
from keybroker.model.key import Algorithm
from keybroker.model.request import SignBody
from keybroker.model.task import (
    MAX_TASK_BYTES,
    Alive,
    AnyProduct,
    AnyWork,
    KeyOpened,
    KeyRefused,
    OpenKey,
    OpenLog,
    Probe,
    RawSignature,
    Result,
    SignCheckpoint,
    SignNotice,
    SignTask,
    Task,
)
from keybroker.supervisor import PARENT_VARIABLE
from keybroker.wire import FrameReader, frame_bytes
from tests.authorities import CA_SHAPE, Authority, Issued, Shape
from tests.worlds import unmeasured_environment, until

LOG = "example.org/served"
WORKLOAD = "spiffe://example.org/payments/api"
_HOUR = datetime.timedelta(hours=1)
_GRANTS = f"""\
grants:
  - {{id: payments, workloads: ["{WORKLOAD}"], keys: [orders], operations: [sign, sign-digest], algorithms: [ES256]}}
"""

# The program as it is installed, but for how soon the write-ahead log is moved into the database: tests are too short to fill it.
_PROGRAM = """\
import sys
from keybroker.authority.store import sqlite
sqlite.CHECKPOINT_FRAMES = {frames}
sys.argv[0] = "keybroker"
from keybroker.cli import main
sys.exit(main())
"""


def identity() -> tuple[Authority, Issued]:
    """An authority of `example.org` and the workload's SVID, valid now."""
    start = datetime.datetime.now(datetime.UTC) - _HOUR
    end = start + 25 * _HOUR
    authority = Authority(shape=replace(CA_SHAPE, not_before=start, not_after=end))
    return authority, authority.issue(Shape(uris=(WORKLOAD,), not_before=start, not_after=end))


def log_signer(origin: str = LOG) -> tuple[VerifierKey, LogSigner]:
    """A key for a log, in memory, and what signs with it as a worker does."""
    private = ed25519.Ed25519PrivateKey.generate()
    key = VerifierKey(origin, SignatureType.ED25519, private.public_key().public_bytes_raw())
    return key, LogSigner(key, private.sign)


class SoftwareWorker:
    """Speaks an hsm worker's frames and signs with a key in memory. Lives on when the authority dies.

    Attributes:
        asked: the digests that it was asked to sign, in order.
        gate: cleared, it takes tasks and does not answer them.
        log_key: signs the checkpoints of the log.
        log: has it, and remembers.
    """

    def __init__(self, path: Path) -> None:
        self.private = ec.generate_private_key(ec.SECP256R1())
        self.spki = self.private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.log_key, self.log = log_signer()
        self.asked: list[bytes] = []
        self.gate = threading.Event()
        self.gate.set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(8)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.gate.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        reader = FrameReader(Task, MAX_TASK_BYTES)
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(262_144):
                for task in reader.feed(data):
                    connection.sendall(frame_bytes(Result(task.id, self._do(task.work))))

    def _do(self, work: AnyWork) -> AnyProduct:
        match work:
            case OpenLog():
                return self.log.opened()
            case SignCheckpoint():
                return self.log.sign(work)
            case Probe():
                return Alive("01", "software", 1)
            case OpenKey(ref):
                return KeyOpened(ref, "ec-p256", 256, self.spki)
            case SignTask(_, _, data):
                self.asked.append(data)
                self.gate.wait(30)
                r, s = utils.decode_dss_signature(self.private.sign(data, ec.ECDSA(utils.Prehashed(hashes.SHA256()))))
                return RawSignature(r.to_bytes(32) + s.to_bytes(32), 1)
            case SignNotice():
                return KeyRefused("notices", "notice-key-not-here", "there is none")


@dataclass(frozen=True, slots=True)
class Asked:
    """One thing that was asked to be signed, and what came back: a reply, or None where the connection ended first."""

    message: bytes
    reply: AnyReply | None
    seconds: float

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.message).digest()


class Frontend:
    """The frontend's end of the socket, blocking."""

    def __init__(self, path: Path, chain: tuple[bytes, ...], seconds: float = 15) -> None:
        self._chain = chain
        self._number = 0
        self._reader = FrameReader(Answer, MAX_ANSWER_BYTES)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(seconds)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, ask: AnyAsk) -> AnyReply:
        """One answer; EOFError if the authority goes first."""
        reply = self.ask_together([ask])[0]
        if reply is None:
            raise EOFError
        return reply

    def ask_together(self, asks: Sequence[AnyAsk]) -> list[AnyReply | None]:
        """Ask all at once, in one write; the answers in the order of the asks."""
        chain = self._chain
        calls = [
            Call(self._number + place, ask, () if isinstance(ask, Health) else chain, "127.0.0.1", "", f"01TEST{self._number + place:020}")
            for place, ask in enumerate(asks, 1)
        ]
        self._number += len(calls)
        answers: dict[int, AnyReply] = {}
        with contextlib.suppress(OSError):  # it has gone: what it had answered before still counts
            self._socket.sendall(b"".join(map(frame_bytes, calls)))
            while len(answers) < len(calls) and (data := self._socket.recv(262_144)):
                answers |= {answer.id: answer.reply for answer in self._reader.feed(data)}
        return [answers.get(call.id) for call in calls]

    def sign(self, *messages: bytes, idempotency_key: str = "") -> list[Asked]:
        """Sign messages, all asked at once."""
        started = time.monotonic()
        asks = [Sign("orders", SignBody(algorithm=Algorithm.ES256, message=message), idempotency_key) for message in messages]
        replies = self.ask_together(asks)
        took = time.monotonic() - started
        return [Asked(message, reply, took) for message, reply in zip(messages, replies, strict=True)]

    def sign_batch(self, *messages: bytes) -> list[Asked]:
        """Sign messages in one batch."""
        started = time.monotonic()
        bodies = tuple(SignBody(algorithm=Algorithm.ES256, message=message) for message in messages)
        (reply,) = self.ask_together([SignBatch("orders", bodies)])
        replies = reply.results if isinstance(reply, BatchReply) else [reply] * len(messages)
        return [Asked(message, each, time.monotonic() - started) for message, each in zip(messages, replies, strict=True)]


@dataclass(slots=True)
class ServedAuthority:
    """An authority of its own directory, started and ended as often as a test likes.

    Attributes:
        checkpoint_frames: of the write-ahead log, after which it is moved into the database; None for what is built in.
        hsm: the socket of the worker that it asks; the software token's, unless told otherwise.
        environment: what the next start finds in its environment besides.
    """

    directory: Path
    identity: tuple[Authority, Issued]
    worker: SoftwareWorker
    checkpoint_frames: int | None = None
    process: subprocess.Popen[bytes] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    hsm: Path = field(init=False)
    config_file: Path = field(init=False)
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.hsm = self.directory / "hsm.sock"
        self.config_file = self.directory / "keybroker.yaml"
        self.log = self.directory / "authority.log"
        (self.directory / "grants").mkdir()
        (self.directory / "grants" / "grants.yaml").write_text(_GRANTS)
        (self.directory / "bundle.pem").write_bytes(self.identity[0].pem)

    def configure(self) -> None:
        """Write the configuration; each start does."""
        section = {
            "socket": "authority.sock",
            "state": "state",
            "log": LOG,
            "bundles": {"example.org": "bundle.pem"},
            "grants": "grants",
            "tokens": {"software": {"sockets": [str(self.hsm)]}},
            "keys": {"orders": {"token": "software", "versions": [{"version": 1, "object": "orders"}]}},
        }
        self.config_file.write_text(yaml.safe_dump({"authority": section}))

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def command(self) -> list[str]:
        frames = self.checkpoint_frames
        program = ["-m", "keybroker"] if frames is None else ["-c", _PROGRAM.format(frames=frames)]
        return [sys.executable, *program, "authority", "--config", str(self.config_file)]

    def start(self, *before: str) -> None:
        """Start it; `before` is a program that starts it in its turn."""
        self.configure()
        # It ends with the tests, however they end; not where strace is its parent, which ends it in that case itself.
        bond = {} if "strace" in before else {PARENT_VARIABLE: str(os.getpid())}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*before, *self.command], stdout=log, stderr=log, env=unmeasured_environment() | bond | self.environment
            )

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def is_serving(self) -> bool:
        """Whether it says of itself that it can sign."""
        try:
            with self.connect() as frontend:
                reply = frontend.ask(Health())
        except (OSError, EOFError):
            return False
        return bool(getattr(reply, "ready", False))

    def wait_until_serving(self) -> None:
        until(lambda: self.is_serving() or not self.is_running(), 20, f"not serving\n{self.text()}")
        assert self.is_running(), self.text()

    def connect(self, seconds: float = 15) -> Frontend:
        return Frontend(self.directory / "authority.sock", self.identity[1].chain, seconds)

    def stop(self, pid: int = 0) -> int:
        """SIGTERM; the exit status. `pid` where the process that was started is not the authority."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid or self.process.pid, signal.SIGTERM)
        return self.wait()

    def wait(self, seconds: float = 20) -> int:
        """The exit status, once it has ended."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait(10)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


SHIM = Path(__file__).with_name("storage_shim.c")


def build_storage_shim(directory: Path) -> Path:
    """Compile the library that lies about one call; its order is in KEYBROKER_STORAGE_SHIM."""
    library = directory / "storage_shim.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(SHIM), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


@contextlib.contextmanager
def served_authority(directory: Path, who: tuple[Authority, Issued], checkpoint_frames: int | None = None) -> Iterator[ServedAuthority]:
    """An authority with its software token; not started yet, ended when the block is left."""
    worker = SoftwareWorker(directory / "hsm.sock")
    authority = ServedAuthority(directory, who, worker, checkpoint_frames)
    try:
        yield authority
    finally:
        authority.kill()
        worker.close()
