"""Start, stop, die and come back: each room, the supervisor, and a second broker. Files that change while it serves."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from keybroker.audit.chain import ChainChecker
from keybroker.client import BrokerUnreachableError, Client
from keybroker.errors import KeyBrokerError, NotFoundError, RefusalError, SvidInvalidError
from tests.worlds import PROGRAM, World, clean_environment, descendants, is_alive, kill, make_world, served, until


@pytest.fixture
def own_world(tmp_path: Path) -> Iterator[World]:
    """A world that a test may break."""
    with served(tmp_path / "world") as world:
        yield world


def signs(world: World, name: str = "payments-api") -> bool:
    try:
        with world.client(name) as broker:
            broker.sign("orders", "ES256", message=b"x")
    except KeyBrokerError:
        return False
    return True


def check_record(world: World) -> ChainChecker:
    checker = ChainChecker()
    assert [fault for leaf in world.leaves() for fault in checker.take(leaf)] == []
    return checker


def get(world: World, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{world.operations}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as err:
        with err:
            return err.code, err.read().decode()


@pytest.mark.case(66)
def test_sigterm_under_load_drains_and_ends_with_zero_and_every_use_has_its_outcome(own_world: World) -> None:
    stop = threading.Event()
    held: list[str] = []

    def load() -> None:
        with own_world.client() as broker:
            while not stop.is_set():
                with contextlib.suppress(KeyBrokerError):
                    held.append(broker.sign("orders", "ES256", message=b"x").use)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(held) > 50)
    serving = own_world.serving
    assert serving is not None
    processes = descendants(serving.pid)
    started = time.monotonic()
    status = own_world.stop()
    assert time.monotonic() - started < 16
    stop.set()
    for thread in threads:
        thread.join(20)
    assert status == 0
    assert [pid for pid in processes if is_alive(pid)] == []
    assert check_record(own_world).open_uses == {}
    outcomes = {json.loads(leaf)["use"] for leaf in own_world.leaves() if b'"outcome":"signed"' in leaf}
    assert set(held) <= outcomes


@pytest.mark.parametrize("room", ["frontend", "authority", "hsm"])
def test_dead_room_comes_back_within_four_seconds(own_world: World, room: str) -> None:
    assert signs(own_world)
    kill(own_world.rooms()[room])
    until(lambda: not signs(own_world), seconds=2)
    took = until(lambda: signs(own_world), seconds=8)
    assert took < 4
    assert own_world.stop() == 0
    assert check_record(own_world).open_uses == {}


@pytest.mark.parametrize("room", ["authority", "hsm"])
def test_others_answer_503_while_a_room_is_gone(own_world: World, room: str) -> None:
    os.kill(own_world.rooms()[room], signal.SIGSTOP)  # gone, and not even restarted
    for worker in descendants(own_world.rooms()["hsm"]) if room == "hsm" else []:
        kill(worker)
    problems: list[RefusalError] = []

    def refused() -> bool:
        try:
            with own_world.client() as broker:
                broker.sign("orders", "ES256", message=b"x")
        except RefusalError as err:
            problems.append(err)
            return True
        except BrokerUnreachableError:
            return False
        return False

    until(refused, seconds=40)
    assert problems[-1].code in {"overloaded", "hsm-unavailable", "hsm-timeout"}
    assert get(own_world, "/livez")[0] == 200
    until(lambda: get(own_world, "/readyz")[0] == 503, seconds=15)
    os.kill(own_world.rooms()[room], signal.SIGCONT)
    until(lambda: signs(own_world), seconds=15)


def test_children_die_with_the_supervisor(own_world: World) -> None:
    serving = own_world.serving
    assert serving is not None
    processes = descendants(serving.pid)
    assert len(processes) >= 5
    own_world.kill()
    until(lambda: not any(map(is_alive, processes)), seconds=5)


@pytest.mark.case(67)
def test_second_broker_on_the_same_state_refuses_to_start(own_world: World, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    text = own_world.config_file.read_text()
    for name in ("listen", "operations"):
        port = int(own_world.config["frontend"][name].rpartition(":")[2])
        text = text.replace(str(port), str(port + 7 if port < 60_000 else port - 7))
    other = own_world.directory / "other.yaml"
    other.write_text(text.replace("run/", "run2/"))
    done = subprocess.run(
        [str(PROGRAM), "serve", "--config", str(other)], capture_output=True, text=True, timeout=60, check=False, env=clean_environment()
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "another broker is running on this state" in done.stderr
    assert signs(own_world)


def test_serve_says_what_is_wrong_and_ends_where_the_config_cannot_work(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    grants = world.directory / "grants" / "broken.yaml"
    grants.write_text("grants:\n  - id: x\n    workloads: []\n    operations: [sign]\n")
    command = [str(PROGRAM), "serve", "--config", str(world.config_file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=clean_environment())
    assert done.returncode == 1
    assert re.search(r"broken\.yaml:\d+", done.stderr)
    assert "Traceback" not in done.stderr


def test_changed_grants_are_live_within_a_second_and_on_record(own_world: World) -> None:
    grants = own_world.directory / "grants" / "ci.yaml"
    assert not signs(own_world, "ci-release")
    grants.write_text(
        'grants:\n  - {id: ci, workloads: ["spiffe://example.org/ci/release"], keys: [orders], operations: [sign], algorithms: [ES256]}\n'
    )
    assert until(lambda: signs(own_world, "ci-release"), seconds=5) < 1.5
    grants.unlink()
    assert until(lambda: not signs(own_world, "ci-release"), seconds=5) < 1.5
    grants.write_text("grants: [{id: broken}]\n")
    time.sleep(1)
    assert signs(own_world)  # the running policy stays
    assert own_world.stop() == 0
    changes = [json.loads(leaf)["body"] for leaf in own_world.leaves() if b'"change":"policy"' in leaf]
    assert len(changes) == 2
    assert changes[0]["to"] == changes[1]["from"]
    (detail,) = {json.loads(leaf)["body"]["detail"] for leaf in own_world.leaves() if b"file-refused" in leaf}
    assert detail.startswith(f"{grants.name}:1: ")  # the file and the line, and not where on this host it is
    assert str(own_world.directory) not in detail


@pytest.mark.case(8)
def test_denied_identity_is_refused_within_a_second_on_its_open_connection(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    denied = world.directory / "denied.yaml"
    try:
        world.start()
        with world.client() as broker:
            broker.sign("orders", "ES256", message=b"x")
            denied.write_text("denied: [{spiffe_id: spiffe://example.org/payments/api, reason: incident 7}]\n")

            def refused() -> bool:
                try:
                    broker.sign("orders", "ES256", message=b"x")
                except SvidInvalidError:
                    return True
                return False

            assert until(refused, seconds=5) < 1.5
        assert signs(world, "auditor") is False
        assert get(world, "/readyz")[0] == 200
    finally:
        world.kill()


def test_operations_address_tells_health_and_metrics(own_world: World) -> None:
    assert signs(own_world)
    assert get(own_world, "/livez")[0] == 200
    status, text = get(own_world, "/readyz")
    assert status == 200
    assert json.loads(text)
    status, text = get(own_world, "/metrics")
    assert status == 200
    assert 'keybroker_sign_total{key="orders",outcome="signed"} 1.0' in text
    assert 'keybroker_hsm_sessions{state="serving"' in text
    assert "spiffe://" not in text
    assert get(own_world, "/v1/keys")[0] == 404


def test_server_certificate_is_reloaded_without_a_restart(own_world: World, tmp_path: Path) -> None:
    def serial() -> str:
        host = own_world.url.removeprefix("https://")
        command = ["openssl", "s_client", "-connect", host, "-cert", str(own_world.svid("payments-api"))]
        session = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20, stdin=subprocess.DEVNULL)
        if "BEGIN CERTIFICATE" not in session.stdout:
            return ""
        command = ["openssl", "x509", "-noout", "-serial"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, input=session.stdout).stdout

    other = make_world(tmp_path / "other")
    before = serial()
    assert before.startswith("serial=")
    # Both worlds' authorities are trusted, then the broker shows an SVID of the other one.
    both = (own_world.directory / "bundle.pem").read_text() + (other.directory / "bundle.pem").read_text()
    (own_world.directory / "bundle.pem").write_text(both)
    shutil.copy(other.svid("broker"), own_world.svid("broker"))
    until(lambda: serial() not in {before, ""}, seconds=10)
    assert signs(own_world)


@pytest.mark.case(7)
def test_identity_is_refused_on_an_open_connection_when_its_bundle_loses_its_authority(own_world: World, tmp_path: Path) -> None:
    other = make_world(tmp_path / "other")
    clients_own = Path(shutil.copy(own_world.directory / "bundle.pem", tmp_path / "bundle.pem"))
    with Client(own_world.url, svid=own_world.svid("payments-api"), bundle=clients_own) as broker:
        broker.sign("orders", "ES256", message=b"x")
        shutil.copy(other.directory / "bundle.pem", own_world.directory / "bundle.pem")

        def refused() -> bool:
            try:
                broker.sign("orders", "ES256", message=b"x")
            except SvidInvalidError:
                return True
            return False

        assert until(refused, seconds=5) < 1.5


def test_check_finds_nothing_in_a_fresh_world_and_names_what_is_broken(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    good = world.run("check", "--config", str(world.config_file))
    assert good.returncode == 0, good.stderr
    text = world.config_file.read_text()
    world.config_file.write_text(re.sub(r"object: orders\b", "object: nobody", text))
    bad = world.run("check", "--config", str(world.config_file))
    assert bad.returncode == 1
    assert b"orders" in bad.stderr + bad.stdout
    assert b"Traceback" not in bad.stderr


def test_broken_key_is_refused_and_the_others_serve(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    world.config_file.write_text(re.sub(r"object: invoices\b", "object: nobody", world.config_file.read_text()))
    try:
        world.start()
        assert signs(world)
        with world.client() as broker, pytest.raises((RefusalError, NotFoundError)) as caught:
            broker.sign("invoices", "PS256", message=b"x")
        assert caught.value.code == "hsm-unavailable"
        assert "key-missing" in get(world, "/readyz")[1]
    finally:
        world.kill()
