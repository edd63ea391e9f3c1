"""Many at once: the same request from fifty clients, clients that leave, and processes that are started twice."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import yaml

from keybroker.audit.chain import check
from keybroker.audit.leaf import decode, encode, leaf_hash
from keybroker.authority.store.faults import StoreConflictError
from keybroker.authority.store.sqlite import LeafRow, SqliteStore, TrailHead
from keybroker.clock import to_rfc3339
from keybroker.errors import StoreError
from keybroker.model.key import Algorithm
from keybroker.model.record import Draft, RecordKind, TrailFacts
from tests.brokers import read_leaves
from tests.clocks import START_US
from tests.faults.history import WORKLOAD, Attempt, Caller, Question, is_passing, public_keys
from tests.faults.model import Log, violations
from tests.worlds import PROGRAM, World, arguments, clean_environment, descendants, kill, served, until

CLIENTS = 50
TRAIL = "spiffe://example.org/a"


@pytest.fixture(scope="module")
def sturdy_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with served(tmp_path_factory.mktemp("sturdy") / "world") as world:
        yield world
        assert "Traceback" not in world.log.read_text()


@pytest.fixture
def own_world(sturdy_world: World) -> World:
    """A world in which a test may kill rooms: they come back."""
    until(lambda: signs(sturdy_world), seconds=20)
    return sturdy_world


def at_once(world: World, history: list[Attempt], questions: Sequence[Question], attempts: int = 1) -> list[Attempt]:
    """A client for each question, all at the same moment; the last attempt of each."""
    gate = threading.Barrier(len(questions))

    def ask(question: Question) -> Attempt:
        with Caller(world, history) as caller:
            gate.wait(30)
            attempt = caller.sign(question)
            while is_passing(attempt) and attempt.number < attempts:
                time.sleep(random.uniform(0.3, 0.6))
                attempt = caller.sign(question, attempt.number + 1)
        return attempt

    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(ask, questions))


@pytest.mark.case(20)
def test_same_request_of_fifty_clients_at_once_is_one_use_and_one_signature(world: World) -> None:
    question = Question(WORKLOAD, "orders", Algorithm.ES256, b"once, of fifty clients", "fifty-at-once")
    history: list[Attempt] = []
    attempts = at_once(world, history, [question] * CLIENTS)
    assert [attempt.status for attempt in attempts] == [200] * CLIENTS
    signed = {msgspec.json.encode(attempt.signed) for attempt in attempts}
    assert len(signed) == 1
    assert len(Log(world.leaves()).of(question)) == 1


@pytest.mark.case(20)
def test_different_requests_under_one_idempotency_key_at_once_are_one_use_and_a_mismatch_for_the_others(world: World) -> None:
    questions = [Question(WORKLOAD, "orders", Algorithm.ES256, f"body {number % 5}".encode(), "five-bodies") for number in range(CLIENTS)]
    history: list[Attempt] = []
    attempts = at_once(world, history, questions)
    winners = [attempt.question for attempt in attempts if attempt.status == 200]
    assert len(winners) == CLIENTS // 5
    assert len(set(winners)) == 1
    assert {attempt.code for attempt in attempts if attempt.status != 200} == {"idempotency-mismatch"}
    log = Log(world.leaves())
    assert [len(log.of(question)) for question in set(questions)].count(1) == 1
    assert sum(len(log.of(question)) for question in set(questions)) == 1


@pytest.mark.case(20)
@pytest.mark.parametrize("room", ["authority", "frontend", "hsm"])
def test_same_request_of_fifty_clients_is_one_signature_when_a_room_is_killed_meanwhile(own_world: World, room: str) -> None:
    question = Question(WORKLOAD, "orders", Algorithm.ES256, room.encode(), f"across-a-kill-of-{room}")
    history: list[Attempt] = []
    with ThreadPoolExecutor(1) as pool:
        with frozen(workers(own_world)):  # so that the first use is under way when the room dies
            answers = pool.submit(at_once, own_world, history, [question] * CLIENTS, 30)
            until(lambda: bool(Log(own_world.leaves()).of(question)))
            kill(own_world.rooms()[room])
        attempts = answers.result(60)
    assert [attempt.status for attempt in attempts] == [200] * CLIENTS
    assert any(attempt.status != 200 for attempt in history), "the kill was not felt"
    assert wrong(own_world, history) == []


@pytest.mark.case(64)
def test_fifty_clients_on_one_trail_leave_one_chain_in_the_order_of_their_answers(world: World) -> None:
    history: list[Attempt] = []
    for turn in range(5):
        questions = [Question(WORKLOAD, "orders", Algorithm.ES256, f"trail {turn} {number}".encode()) for number in range(CLIENTS)]
        assert [attempt.status for attempt in at_once(world, history, questions)] == [200] * CLIENTS
    asked = {attempt.question for attempt in history}
    log = Log(world.leaves())
    assert [len(log.of(question)) for question in asked] == [1] * len(asked)
    assert wrong(world, history) == []


@pytest.mark.case(65)
@pytest.mark.parametrize("is_abrupt", [True, False])
def test_use_of_a_client_that_leaves_after_its_intent_still_has_its_outcome(own_world: World, is_abrupt: bool) -> None:
    question = Question(WORKLOAD, "orders", Algorithm.ES256, f"left {is_abrupt}".encode(), f"left-{is_abrupt}")
    history: list[Attempt] = []
    with frozen(workers(own_world)):
        with Caller(own_world, history) as caller:
            caller.send(question)
            until(lambda: bool(Log(own_world.leaves()).of(question)))
            if is_abrupt:
                caller.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
        time.sleep(0.2)
        assert endings(own_world, question) == ["open"]
    until(lambda: endings(own_world, question) != ["open"])
    assert endings(own_world, question) == ["signed"]
    with Caller(own_world, history) as caller:
        assert caller.sign(question).status == 200  # whoever comes back with the same idempotency key gets that signature
    assert endings(own_world, question) == ["signed"]


@pytest.mark.case(67)
@pytest.mark.parametrize(
    ("room", "why"),
    [
        ("authority", "another broker is running on this state"),
        ("hsm", "another hsm room works for this socket"),
        ("frontend", "Address already in use"),
    ],
)
def test_second_process_of_a_room_refuses_to_start_and_the_first_goes_on(own_world: World, room: str, why: str) -> None:
    assert signs(own_world)
    before = descendants(own_world.serving.pid) if own_world.serving else []
    done = start_room(room, own_world.config_file)
    assert done.returncode == 78  # which tells a service manager not to try again
    assert why in done.stderr
    assert "Traceback" not in done.stderr
    assert own_world.serving is not None
    assert descendants(own_world.serving.pid) == before
    assert signs(own_world)
    kill(own_world.rooms()[room])  # the one that was refused took nothing with it: the first can come back
    until(lambda: not signs(own_world), seconds=5)
    until(lambda: signs(own_world), seconds=20)


@pytest.mark.case(67)
def test_second_authority_on_the_same_socket_refuses_to_start(own_world: World) -> None:
    config = own_world.config
    config["authority"]["state"] = "state2"
    other = own_world.directory / "other.yaml"
    other.write_text(yaml.safe_dump(config))
    done = start_room("authority", other)
    assert done.returncode == 78
    assert "another process listens there" in done.stderr
    assert signs(own_world)


@pytest.mark.case(64)
def test_trail_does_not_fork_when_eight_processes_append_to_it(tmp_path: Path) -> None:
    """One writer at a time has the store; who finds it taken tries again."""
    each = 10
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append_in_turn, args=(tmp_path, each)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    leaves = read_leaves(tmp_path)
    assert len(leaves) == 8 * each
    assert check(leaves) == []
    assert len({decode(leaf)["trail"]["previous"] for leaf in leaves}) == 8 * each  # one successor for each hash


@pytest.mark.case(64)
def test_store_refuses_a_fork_even_of_a_writer_that_got_past_the_lock(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path)
    try:
        with store.transaction():
            append_next(store)
        tail, head = store.tail(), store.trail_head(TRAIL)
        with store.transaction():
            append_next(store)
        with pytest.raises(StoreConflictError), store.transaction():  # as a second writer would, from what it read before
            store.append([row(tail.size + 1, head)])
        assert check(read_leaves(tmp_path)) == []
        assert len(read_leaves(tmp_path)) == 2
    finally:
        store.close()


def append_in_turn(state: Path, count: int) -> None:
    """What each of the processes does."""
    done, deadline = 0, time.monotonic() + 50
    while done < count and time.monotonic() < deadline:
        try:
            store = SqliteStore.open(state)
        except StoreError:
            time.sleep(random.uniform(0.001, 0.01))
            continue
        try:
            with store.transaction():
                append_next(store)
            done += 1
        finally:
            store.close()
    raise SystemExit(done != count)


def append_next(store: SqliteStore) -> None:
    store.append([row(store.tail().size, store.trail_head(TRAIL))])


def row(index: int, head: TrailHead) -> LeafRow:
    draft, trail = Draft(kind=RecordKind.READ, trail=TRAIL), TrailFacts(TRAIL, head.count, head.head)
    leaf = encode(draft, log="example.org/test", index=index, time=to_rfc3339(START_US), salt="", trail=trail)
    return LeafRow(index, START_US, "read", head.rowid, head.count, "", "", "", leaf_hash(leaf), leaf)


def wrong(world: World, history: list[Attempt]) -> list[str]:
    """What does not hold for these attempts, in a world in which others ask as well."""
    found = violations(history, world.leaves(), public_keys(world))
    return [each for each in found if "nobody asked for" not in each and "denials told" not in each]


def signs(world: World) -> bool:
    with Caller(world, []) as caller:
        return caller.sign(Question(WORKLOAD, "orders", Algorithm.ES256, b"x")).status == 200


def endings(world: World, question: Question) -> list[str]:
    log = Log(world.leaves())
    return [log.ending(intent) for intent in log.of(question)]


def start_room(room: str, config_file: Path) -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAM), room, "--config", str(config_file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=clean_environment())


def workers(world: World) -> list[int]:
    return [pid for pid in descendants(world.rooms()["hsm"]) if "keybroker.hsm.worker" in arguments(pid)]


@contextlib.contextmanager
def frozen(pids: Sequence[int]) -> Iterator[None]:
    """Processes that do nothing while the block runs."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
