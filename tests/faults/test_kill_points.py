"""kill -9 exactly between two steps of the one order: before the intent, after it, after the signature, after the outcome, in mid-answer.

Nothing in keybroker knows of this. A relay stands on the Unix socket between two rooms, reads the frames, and kills a room when the
one it waits for passes; for the two commits themselves, strace kills the authority as it enters the sync.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest
import yaml

from keybroker.model.call import Answer, Call, Sign, Signed
from keybroker.model.key import Algorithm
from keybroker.model.task import RawSignature, Result, SignTask, Task
from keybroker.wire import HEADER_BYTES, _short_address, bind
from tests.faults.history import WORKLOAD, Attempt, Caller, Question, is_passing, public_keys
from tests.faults.model import Log, violations
from tests.worlds import PROGRAM, World, arguments, children, clean_environment, is_alive, kill, make_world, unmeasured_environment, until

Frame = Call | Answer | Task | Result
BACK_SECONDS = 20
SYNCS = ("-e", "trace=fdatasync")


@dataclass(slots=True)
class Trap:
    """Waits for one frame, then kills a room, once.

    Attributes:
        fits: whether a frame is the one.
        victim: name of the room, or `worker`.
        passes: how much of that frame goes on its way before the death: 0, 0.5 or 1. Where neither of its rooms dies, all of it
            must: between living rooms no frame is lost.
    """

    fits: Callable[[Frame], bool]
    victim: str
    passes: float = 0.0
    sprung: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class Post:
    """The place where traps are set: what all relays of a world look at."""

    world: World
    trap: Trap | None = None

    def on_frame(self, data: bytes, frame: Frame, sink: socket.socket) -> None:
        """Hand on a frame, or spring the trap that waits for it."""
        trap = self.trap
        if trap is None or trap.sprung.is_set() or not trap.fits(frame):
            sink.sendall(data)
            return
        trap.sprung.set()
        sink.sendall(data[: int(len(data) * trap.passes)])
        pid = self._pid(trap.victim)
        kill(pid)
        until(lambda: not is_alive(pid))

    def _pid(self, victim: str) -> int:
        rooms = self.world.rooms()
        if victim == "worker":
            return next(pid for pid in children(rooms["hsm"]) if "keybroker.hsm.worker" in arguments(pid))
        return rooms[victim]


class Relay:
    """Stands between a room and the one on its right, and shows each frame to the post.

    Args:
        here: where the left room connects.
        there: where the right room listens.
        types: of the frames to the right and to the left.
    """

    def __init__(self, post: Post, here: Path, there: Path, types: tuple[type[Any], type[Any]]) -> None:
        self._post = post
        self._there = there
        self._types = types
        self._listener = bind(here, os.getuid())
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                left, _ = self._listener.accept()
                right = socket.socket(socket.AF_UNIX)
                try:
                    with _short_address(self._there) as address:
                        right.connect(address)
                except OSError:
                    left.close()
                    right.close()
                    continue
                for source, sink, type_ in ((left, right, self._types[0]), (right, left, self._types[1])):
                    threading.Thread(target=self._pump, args=(source, sink, type_), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, type_: type[Frame]) -> None:
        """Frame by frame until either end is gone; then both are."""
        with contextlib.suppress(OSError), source.makefile("rb") as stream:
            while header := stream.read(HEADER_BYTES):
                body = stream.read(int.from_bytes(header))
                self._post.on_frame(header + body, msgspec.msgpack.decode(body, type=type_), sink)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        source.close()


@dataclass(slots=True)
class Stage:
    """A served world with relays, and what everybody has asked in it so far."""

    post: Post
    publics: dict[str, bytes]
    history: list[Attempt] = field(default_factory=list)

    @property
    def world(self) -> World:
        return self.post.world

    def endings(self, question: Question) -> list[str]:
        log = Log(self.world.leaves())
        return [log.ending(intent) for intent in log.of(question)]

    def violations(self) -> list[str]:
        return violations(self.history, self.world.leaves(), self.publics)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    world = make_world(tmp_path_factory.mktemp("points") / "world")
    run = world.directory / "run"
    config = world.config
    config["frontend"]["authority"] = "run/relay-authority.sock"
    config["authority"]["tokens"]["development"]["sockets"] = ["run/relay-hsm.sock"]
    config["hsm"]["tokens"]["development"]["sockets"] = ["run/hsm-1.sock"]
    world.config_file.write_text(yaml.safe_dump(config))
    post = Post(world)
    relays = [
        Relay(post, run / "relay-authority.sock", run / "authority.sock", (Call, Answer)),
        Relay(post, run / "relay-hsm.sock", run / "hsm-1.sock", (Task, Result)),
    ]
    try:
        world.start()
        yield Stage(post, public_keys(world))
        assert "Traceback" not in world.log.read_text()
    finally:
        world.kill()
        for relay in relays:
            relay.close()


def is_call(frame: Frame) -> bool:
    return isinstance(frame, Call) and isinstance(frame.ask, Sign)


def is_answer(frame: Frame) -> bool:
    return isinstance(frame, Answer) and isinstance(frame.reply, Signed)


def is_task(frame: Frame) -> bool:
    return isinstance(frame, Task) and isinstance(frame.work, SignTask)


def is_signature(frame: Frame) -> bool:
    return isinstance(frame, Result) and isinstance(frame.product, RawSignature)


POINTS: dict[str, tuple[Trap, list[str]]] = {
    "authority-before-it-sees-the-request": (Trap(is_call, "authority"), []),
    "authority-after-the-intent": (Trap(is_task, "authority"), ["unknown"]),
    "authority-while-the-token-signs": (Trap(is_task, "authority", passes=1), ["unknown"]),
    "authority-after-the-signature": (Trap(is_signature, "authority"), ["unknown"]),
    "authority-after-the-outcome": (Trap(is_answer, "authority"), ["signed"]),
    "authority-in-mid-answer": (Trap(is_answer, "authority", passes=0.5), ["signed"]),
    "frontend-after-the-intent": (Trap(is_task, "frontend", passes=1), ["signed"]),
    "frontend-after-the-outcome": (Trap(is_answer, "frontend"), ["signed"]),
    "worker-before-it-signs": (Trap(is_task, "worker"), ["unknown"]),
    "worker-after-it-signed": (Trap(is_signature, "worker"), ["unknown"]),
    "hsm-after-the-intent": (Trap(is_task, "hsm"), ["unknown"]),
}


@pytest.mark.case(55)
@pytest.mark.parametrize("point", POINTS)
def test_use_is_made_once_and_on_record_when_a_room_is_killed_between_two_steps(stage: Stage, point: str) -> None:
    trap, endings = POINTS[point]
    question = Question(WORKLOAD, "orders", Algorithm.ES256, point.encode(), point)
    until(lambda: serves(stage), BACK_SECONDS)
    stage.post.trap = trap
    with Caller(stage.world, stage.history) as caller:
        first = caller.sign(question)
        assert trap.sprung.is_set()
        assert is_passing(first), "the answer got through"
        until(lambda: serves(stage), BACK_SECONDS)
        until(lambda: stage.endings(question) == endings, what=f"{stage.endings(question)}, expected {endings}")
        again = caller.sign(question, 2)
        assert again.status == 200, again
        assert again.signed is not None
        assert caller.sign(question, 3).signed == again.signed
        other = caller.sign(Question(WORKLOAD, "orders", Algorithm.ES256, b"another " + point.encode(), point))
        assert other.code == "idempotency-mismatch"
    assert stage.endings(question) == (endings if "signed" in endings else [*endings, "signed"])
    assert stage.violations() == []


def serves(stage: Stage) -> bool:
    """Whether a signature can be had, asked without an idempotency key."""
    question = Question(WORKLOAD, "orders", Algorithm.ES256, f"probe {time.monotonic_ns()}".encode())
    with Caller(stage.world, stage.history) as caller:
        return caller.sign(question).status == 200


class Parts:
    """The rooms of a world, each started by itself, the authority under strace."""

    def __init__(self, world: World, *strace: str) -> None:
        self._world = world
        self.trace = world.directory / "strace"
        with world.log.open("a") as log:
            self._processes = [
                subprocess.Popen(
                    [*before, str(PROGRAM), room, "--config", str(world.config_file)], stderr=log, env=unmeasured_environment()
                )
                for room, before in (("hsm", ()), ("authority", ("strace", "-f", "-qq", "-o", str(self.trace), *strace)), ("frontend", ()))
            ]

    def __enter__(self) -> Self:
        until(self._is_ready, BACK_SECONDS, self._world.log.read_text())
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            for pid in (process.pid, *children(process.pid)):  # strace hands on no signal
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            process.wait(15)

    def syncs(self) -> list[str]:
        """The threads that have synced a file, one for each time."""
        return [line.split()[0] for line in self.trace.read_text().splitlines() if "fdatasync(" in line]

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self._world.operations}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@pytest.mark.case(55)
@pytest.mark.parametrize(("commit", "endings"), [("intent", ["unknown"]), ("outcome", ["signed"])])
def test_use_is_made_once_and_on_record_when_the_authority_is_killed_at_a_commit(tmp_path: Path, commit: str, endings: list[str]) -> None:
    world = make_world(tmp_path / "world")
    question = Question(WORKLOAD, "orders", Algorithm.ES256, b"at a commit", "at-a-commit")
    history: list[Attempt] = []
    try:
        world.start()  # the keys are pinned, so that later starts write the same few records
        publics = public_keys(world)
        assert world.stop() == 0
        with Parts(world, *SYNCS) as parts:
            before = max(Counter(parts.syncs()).values())
        number = before + 1 + (commit == "outcome")
        with Parts(world, *SYNCS, "-e", f"inject=fdatasync:signal=SIGKILL:when={number}") as parts, Caller(world, history) as caller:
            assert is_passing(caller.sign(question))
            until(lambda: "killed by SIGKILL" in parts.trace.read_text())
        world.start()
        log = Log(world.leaves())
        assert [log.ending(intent) for intent in log.of(question)] == endings  # written, though not synced: only a power loss takes it
        with Caller(world, history) as caller:
            again = caller.sign(question, 2)
            assert again.status == 200
            assert caller.sign(question, 3).signed == again.signed
        log = Log(world.leaves())
        assert [log.ending(intent) for intent in log.of(question)] == (endings if "signed" in endings else [*endings, "signed"])
        assert violations(history, world.leaves(), publics) == []
    finally:
        world.kill()
    assert "Traceback" not in world.log.read_text()


def test_worker_ends_without_a_word_when_its_room_was_killed_before_it_could_say_what_to_do() -> None:
    command = [sys.executable, "-m", "keybroker.hsm.worker"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=30, stdin=subprocess.DEVNULL, env=clean_environment())
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")
