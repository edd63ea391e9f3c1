"""Approvers are told: a real broker, a courier, and a receiver that first fails. What arrives is verified by OpenSSL alone."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from keybroker.client import PendingError
from tests.integration.client.servers import Connection, Place, Server, every
from tests.integration.courier.test_delivery import receiver
from tests.worlds import PROGRAM, World, clean_environment, make_world, until


@dataclass
class Receiver:
    """Takes notices, but for the first, which it refuses."""

    requests: list[bytes] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, connection: Connection, request: bytes) -> None:
        with self.lock:
            self.requests.append(request)
            is_first = len(self.requests) == 1
        connection.answer(b"", "503 Later" if is_first else "200 OK")

    def events(self) -> list[dict[str, object]]:
        with self.lock:
            return [json.loads(each.partition(b"\r\n\r\n")[2]) for each in self.requests]


@dataclass
class Told:
    """A served world whose approvers are told."""

    world: World
    receiver: Receiver
    url: str


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    place = Place(tmp_path_factory.mktemp("receiver"))
    taking = Receiver()
    with Server(receiver(place), every(taking.answer)) as server:
        url = f"https://localhost:{server.port}/approvals?team=release"
        world = make_world(tmp_path_factory.mktemp("webhooks") / "world", "--key", "notices:ES256")
        config = yaml.safe_load(world.config_file.read_text())
        del config["authority"]["keys"]["notices"]
        config["authority"]["notices"] = {"socket": "run/notices.sock", "token": "development"}
        config["hsm"]["tokens"]["development"]["notices"] = {"object": "notices"}
        hooks = {"team": {"url": url, "ca": str(place.bundle)}}
        config["courier"] = {"authority": "run/notices.sock", "state": "courier", "hooks": hooks}
        world.config_file.write_text(yaml.safe_dump(config))
        try:
            world.start()
            until(lambda: "courier" in world.rooms(), 30)
            yield Told(world, taking, url)
        finally:
            world.kill()


def looked_from(world: World) -> int:
    """The last record that the courier has looked at; -1 before the first."""
    path = world.directory / "courier" / "outbox.db"
    if not path.exists():
        return -1
    with contextlib.closing(sqlite3.connect(path, timeout=5)) as base, contextlib.suppress(sqlite3.Error):
        row = base.execute("SELECT record FROM place").fetchone()
        return int(row[0]) if row else -1
    return -1


def verified_by_openssl(request: bytes, url: str, key: Path, directory: Path) -> bool:
    """RFC 9421, as a receiver has to do it: the base is put together from the request, and nothing of keybroker is used."""
    head, _, content = request.partition(b"\r\n\r\n")
    fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
    label, _, parameters = fields["Signature-Input"].partition("=")
    base = "\n".join(
        [
            f'"@method": {head.decode().split()[0]}',
            f'"@target-uri": {url}',
            f'"content-digest": sha-256=:{digest}:',
            f'"@signature-params": {parameters}',
        ]
    )
    raw = base64.b64decode(fields["Signature"].removeprefix(f"{label}=:").removesuffix(":"))
    (directory / "base").write_text(base)
    (directory / "sig").write_bytes(der(raw))
    command = ["openssl", "dgst", "-sha256", "-verify", str(key), "-signature", "sig", "base"]
    return subprocess.run(command, cwd=directory, capture_output=True, check=False, timeout=30).returncode == 0


def der(raw: bytes) -> bytes:
    """SEQUENCE of two INTEGERs (RFC 3279 section 2.2.3)."""

    def integer(data: bytes) -> bytes:
        data = data.lstrip(b"\0") or b"\0"
        data = b"\0" + data if data[0] & 0x80 else data
        return bytes([2, len(data)]) + data

    body = integer(raw[:32]) + integer(raw[32:])
    return bytes([0x30, len(body)]) + body


@pytest.mark.timeout(240)
def test_approvers_are_told_what_happens_although_the_receiver_fails_at_first(told: Told, tmp_path: Path) -> None:
    world, taking = told.world, told.receiver
    until(lambda: looked_from(world) >= 0, 60)  # from where on what happens is news
    with world.client("ci-release") as broker, pytest.raises(PendingError) as caught:
        broker.sign("release", "ES256", digest=bytes(32), reason="do not tell \u202e anybody")
    id_ = caught.value.pending.operation
    with world.client("alice") as broker:
        broker.approve(broker.operation(id_))
    with world.client("bob") as broker:
        broker.refuse(broker.operation(id_))
    until(lambda: len(taking.events()) == 4, 90)  # three, and the one that was refused once more
    assert {each["operation"] for each in taking.events()} == {id_}
    assert sorted(str(each["event"]) for each in taking.events()) == ["approved", "refused", "requested", "requested"]
    by_event = {str(each["event"]): each for each in taking.events()}
    requested = by_event["requested"]
    assert (requested["key"], requested["requester"], requested["kind"]) == ("release", "spiffe://example.org/ci/release", "sign-digest")
    assert (by_event["approved"]["person"], by_event["refused"]["person"]) == ("alice", "bob")
    key = world.directory / "courier" / "notice-key.pem"
    for request in taking.requests:
        assert b"tell" not in request  # nothing that a requester writes freely
        assert verified_by_openssl(request, told.url, key, tmp_path)
    assert not verified_by_openssl(taking.requests[0], told.url.replace("release", "other"), key, tmp_path)
    assert not verified_by_openssl(taking.requests[0] + b" ", told.url, key, tmp_path)


def test_workload_cannot_use_the_key_of_notices(told: Told) -> None:
    done = told.world.run("keys", "list", "--json")
    assert "notices" not in {each["name"] for each in json.loads(done.stdout)}


def test_dead_letters_are_listed_and_sent_again(told: Told) -> None:
    config = str(told.world.config_file)
    done = subprocess.run(
        [str(PROGRAM), "webhooks", "dead-letters", "--config", config, "--json"],
        capture_output=True, check=False, timeout=60, env=clean_environment(),
    )  # fmt: skip
    assert (done.returncode, json.loads(done.stdout)) == (0, [])
    done = subprocess.run(
        [str(PROGRAM), "webhooks", "resend", "--config", config], capture_output=True, check=False, timeout=60, env=clean_environment()
    )
    assert (done.returncode, done.stdout) == (0, b"0 to be sent again\n")
