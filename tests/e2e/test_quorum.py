"""Quorums on a whole broker with a real token: over HTTPS, raced from many connections, and over kill -9 of its rooms."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import ssl
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from keybroker.audit.approval import signed
from keybroker.client import PendingError
from keybroker.clock import to_rfc3339
from keybroker.errors import ApprovalConsumedError, KeyBrokerError, RefusalError
from keybroker.model.approval import Statement, Subject
from keybroker.model.call import AnyReply, Approve, OperationReply, Pending, Problem, Redeem, ShowOperation, Sign
from keybroker.model.key import Algorithm
from keybroker.model.request import SignBody
from tests.faults.test_kill_rooms import settled
from tests.integration.authority.served import Frontend
from tests.worlds import World, kill, make_world, until

RACES = 1_000
AT_ONCE = 100  # operations that wait; as many as one workload may have
CONNECTIONS = 10
CI, ALICE = "spiffe://example.org/ci/release", "spiffe://example.org/human/alice"
ONE = """\
grants:
  - id: release
    workloads: ["spiffe://example.org/ci/release"]
    keys: [orders, sessions]
    operations: [sign, sign-digest]
    algorithms: [ES256, Ed25519]
    quorum: {approvals: 1, of: [managers], expires: 1h}
people: {alice: ["spiffe://example.org/human/alice"]}
groups: {managers: [alice]}
"""
TWO = (
    ONE.replace("approvals: 1", "approvals: 2")
    .replace('alice"]}', 'alice"], bob: ["spiffe://example.org/human/bob"]}')
    .replace("[alice]", "[alice, bob]")
)


@pytest.fixture(scope="module")
def own_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A broker for these tests."""
    world = make_world(tmp_path_factory.mktemp("quorum") / "world")
    (world.directory / "grants" / "release.yaml").write_text(ONE)
    try:
        world.start()
        yield world
    finally:
        world.kill()


class Person:
    """An SVID of the world, as its owner has it."""

    def __init__(self, world: World, name: str) -> None:
        pem = world.svid(name).read_bytes()
        self.chain = tuple(each.public_bytes(Encoding.DER) for each in x509.load_pem_x509_certificates(pem))
        self.key: Any = load_pem_private_key(pem[pem.index(b"-----BEGIN PRIVATE") :], None)

    def connect(self, world: World) -> Frontend:
        """A connection to the authority, as the frontend has one: so that a test of the authority is not one of TLS."""
        return Frontend(world.directory / "run" / "authority.sock", self.chain, 60)


def approval(reply: AnyReply | None, person: Person) -> Approve:
    assert isinstance(reply, OperationReply)
    now = to_rfc3339(time.time_ns() // 1_000)
    statement = Statement(
        reply.subject, "approve", ALICE, "alice", reply.stages[0].name, "prompt", now, reply.subject.expires, os.urandom(16).hex(), 1
    )
    return Approve(reply.id, signed(statement, person.key))


def ready(world: World, count: int) -> list[str]:
    """Operations with a complete quorum."""
    ci, alice = Person(world, "ci-release"), Person(world, "alice")
    with ci.connect(world) as requester, alice.connect(world) as approver:
        asked = requester.ask_together([Sign("orders", SignBody(algorithm=Algorithm.ES256, digest=os.urandom(32))) for _ in range(count)])
        operations = [reply.operation for reply in asked if isinstance(reply, Pending)]
        assert len(operations) == count, asked[:3]
        shown = approver.ask_together([ShowOperation(each) for each in operations])
        approved = approver.ask_together([approval(reply, alice) for reply in shown])
        assert {getattr(reply, "state", reply) for reply in approved} == {"ready"}
    return operations


def intents(world: World) -> dict[str, list[dict[str, Any]]]:
    """The intents of each operation."""
    found: dict[str, list[dict[str, Any]]] = {}
    for leaf in world.leaves():
        record = json.loads(leaf)
        if record["kind"] == "intent" and record["operation_id"]:
            found.setdefault(record["operation_id"], []).append(record)
    return found


@pytest.mark.case(34)
@pytest.mark.timeout(300)
def test_operation_is_spent_once_when_raced_a_thousand_times_from_many_connections(own_world: World) -> None:
    ci = Person(own_world, "ci-release")

    def race(operations: list[str]) -> list[AnyReply | None]:
        with ci.connect(own_world) as connection:
            return connection.ask_together([Redeem(each) for each in operations])

    raced: list[str] = []
    for _ in range(RACES // AT_ONCE):
        operations = ready(own_world, AT_ONCE)
        raced += operations
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            runs = list(pool.map(race, [operations] * CONNECTIONS))
        for operation, *replies in zip(operations, *runs, strict=True):
            kinds = Counter(reply.code if isinstance(reply, Problem) else type(reply).__name__ for reply in replies)
            assert kinds == {"Signed": 1, "approval-consumed": CONNECTIONS - 1}, operation
    spent = intents(own_world)
    assert len(set(raced)) == RACES
    assert {len(spent[each]) for each in raced} == {1}


@pytest.mark.case(34)
def test_operation_is_spent_once_when_raced_over_https(own_world: World) -> None:
    operations = ready(own_world, 5)

    def redeem(operation: str) -> str:
        with own_world.client("ci-release") as broker:
            try:
                return f"signed {broker.redeem(operation).use}"
            except RefusalError as err:
                return err.code

    for operation in operations:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(redeem, [operation] * 8))
        assert sorted(answers)[:7] == ["approval-consumed"] * 7
        assert sorted(answers)[7].startswith("signed ")


def test_ed25519_is_redeemed_with_its_message_and_with_no_other(own_world: World) -> None:
    message = b"a session"
    with own_world.client("ci-release") as requester, own_world.client("alice") as approver:
        with pytest.raises(PendingError) as waiting:
            requester.sign("sessions", "Ed25519", message=message)
        operation = waiting.value.pending.operation
        approver.approve(approver.operation(operation))
        for given in (None, b"another"):
            with pytest.raises(RefusalError) as refused:
                requester.redeem(operation, message=given)
            assert refused.value.code == ("invalid" if given is None else "approval-mismatch")
        made = requester.redeem(operation, message=message)
        public = serialization.load_der_public_key(requester.key("sessions").versions[-1].spki)
        assert isinstance(public, ed25519.Ed25519PublicKey)
        public.verify(made.signature, message)


class OperationView(msgspec.Struct):
    """Of an operation over HTTP, what an approver's program needs."""

    subject: Subject
    yours: tuple[str, ...]


def https(world: World, name: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
    """One request as any program would make it."""
    context = ssl.create_default_context(cafile=str(world.directory / "bundle.pem"))
    context.load_cert_chain(world.svid(name))
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    host, _, port = world.url.removeprefix("https://").partition(":")
    connection = http.client.HTTPSConnection(host, int(port), timeout=40, context=context)
    with contextlib.closing(connection):
        connection.request("GET" if body is None else "POST", path, data or None, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


@pytest.mark.case(28)
def test_use_waits_is_approved_and_redeemed_over_https(own_world: World) -> None:
    digest = hashlib.sha256(b"release 9").digest()
    body = {"algorithm": "ES256", "digest": base64.b64encode(digest).decode(), "reason": "release 9"}
    status, asked = https(own_world, "ci-release", "/v1/keys/orders/sign", body)
    assert (status, set(asked)) == (202, {"operation", "needs", "expires"})
    path = f"/v1/operations/{asked['operation']}"
    assert https(own_world, "ci-release", f"{path}/redeem", {})[0] == 202
    assert https(own_world, "bob", path)[0] == https(own_world, "bob", "/v1/operations/01JDGQ4F8M3Z6T9W2X5Y7ABCDE")[0] == 404
    mark = https(own_world, "alice", "/v1/operations?state=pending")[1]["mark"]
    with ThreadPoolExecutor(2) as pool:  # both wait, and hear of it at once
        waiting = pool.submit(https, own_world, "ci-release", f"{path}?wait=30")
        listing = pool.submit(https, own_world, "alice", f"/v1/operations?state=pending&wait=30&mark={mark}")
        time.sleep(0.5)
        started = time.monotonic()
        shown = msgspec.convert(https(own_world, "alice", path)[1], OperationView)
        statement = Statement(
            shown.subject, "approve", ALICE, "alice", shown.yours[0], "prompt", to_rfc3339(time.time_ns() // 1_000), shown.subject.expires,
            os.urandom(16).hex(), 1,
        )  # fmt: skip
        envelope = json.dumps(json.loads(signed(statement, Person(own_world, "alice").key)), indent=2).encode()
        status, approved = https(own_world, "alice", f"{path}/approvals", envelope)
        assert (status, approved["state"], approved["approvals"][0]["person"]) == (200, "ready", "alice")
        assert waiting.result(30)[1]["state"] == "ready"
        assert asked["operation"] not in [each["id"] for each in listing.result(30)[1]["operations"]]
        assert time.monotonic() - started < 25
    status, made = https(own_world, "ci-release", f"{path}/redeem", {}, **{"Idempotency-Key": "k-1"})
    assert (status, made["key"]) == (200, "orders")
    assert https(own_world, "ci-release", f"{path}/redeem", {}, **{"Idempotency-Key": "k-1"}) == (200, made)
    assert https(own_world, "ci-release", f"{path}/redeem", {})[1]["type"] == "urn:keybroker:problem:approval-consumed"
    assert https(own_world, "ci-release", path)[1]["use"] == made["use"]
    with urllib.request.urlopen(f"http://{own_world.operations}/metrics", timeout=5) as answer:
        assert b"\nkeybroker_pending_operations " in answer.read()


@pytest.mark.case(35)
@pytest.mark.timeout(300)
def test_operation_is_spent_once_over_kills_and_only_the_idempotent_retry_finishes_it(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    (world.directory / "grants" / "release.yaml").write_text(ONE)
    try:
        world.start()
        released: list[tuple[str, str]] = []
        for victim in ("authority", "hsm", "authority", "frontend", "authority"):
            released += kill_while_redeeming(world, victim)
        leaves = [json.loads(leaf) for leaf in settled(world)]
    finally:
        world.kill()
    outcomes = {record["use"]: record["outcome"] for record in leaves if record["kind"] == "outcome"}
    spent: dict[str, list[dict[str, Any]]] = {}
    for record in leaves:
        if record["kind"] == "intent" and record["operation_id"]:
            spent.setdefault(record["operation_id"], []).append(record)
    for operation, found in spent.items():
        assert [record["retry_of"] for record in found] == ["", *[record["use"] for record in found[:-1]]], operation
        assert len({record["tbs"]["value"] for record in found}) == 1
        endings = [outcomes[record["use"]] for record in found]
        assert endings.count("signed") <= 1
        assert "signed" not in endings[:-1]  # what was released is never tried again
    by_operation = Counter(operation for operation, _ in released)
    uses = {operation: {use for each, use in released if each == operation} for operation in by_operation}
    assert all(len(found) == 1 for found in uses.values())
    assert all(outcomes[next(iter(found))] == "signed" for found in uses.values())
    assert len(uses) >= 5 * 10  # the idempotent ones all came to their end


def kill_while_redeeming(world: World, victim: str) -> list[tuple[str, str]]:
    """Ten operations are redeemed with an idempotency key and ten without, while a room dies; (operation, use) of what was released."""
    operations = ready(world, 20)
    released: list[tuple[str, str]] = []

    def redeem(number: int) -> None:
        operation, key = operations[number], f"k-{number}" if number % 2 else ""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(KeyBrokerError), world.client("ci-release") as broker:
                try:
                    released.append((operation, broker.redeem(operation, idempotency_key=key).use))
                except ApprovalConsumedError:
                    assert not key  # only who has no key is told that it is too late
                return
            time.sleep(0.2)
        raise AssertionError(f"{operation} was not redeemed in time")

    with ThreadPoolExecutor(len(operations)) as pool:
        runs = [pool.submit(redeem, number) for number in range(len(operations))]
        time.sleep(0.05)
        kill(world.rooms()[victim])
        for run in runs:
            run.result(90)
    until(lambda: world.run("sign", "--key", "orders", "--alg", "ES256", "-", stdin=b"x").returncode == 0, 30, "it does not sign again")
    return released
