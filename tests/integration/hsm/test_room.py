"""The hsm room on a real SoftHSM: signs with every algorithm, refuses bad keys, outlives workers that die, hang or lose their session."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from keybroker.authority.selfcheck import Check, der_of_raw, verifies
from keybroker.model.key import Algorithm
from keybroker.model.task import Alive, KeyOpened, KeyRefused, OpenKey, RawSignature, SignTask, TaskFailed
from tests.bad_keys import BAD_KEYS, add_bad_keys
from tests.tokens import HsmRoom, WorkerConnection, make_room, served
from tests.worlds import is_alive, kill, until

MESSAGE = b"an order"
KEYS = {
    "p256": Algorithm.ES256,
    "p384": Algorithm.ES384,
    "p521": Algorithm.ES512,
    "rsa": Algorithm.PS256,
    "ed": Algorithm.ED25519,
}
NAME_OF = {Algorithm.ES256: "p256", Algorithm.ES384: "p384", Algorithm.ES512: "p521", Algorithm.ED25519: "ed"}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HsmRoom]:
    with served(make_room(tmp_path_factory.mktemp("hsm"), {"dev": KEYS})) as room:
        yield room


def data_of(algorithm: Algorithm) -> bytes:
    return MESSAGE if algorithm.signs_message else hashlib.new(algorithm.hash_name, MESSAGE).digest()


def signs(connection: WorkerConnection, name: str, algorithm: Algorithm, spki: bytes) -> bool:
    """Whether the worker makes a good signature."""
    product = connection.sign(name, algorithm, data_of(algorithm))
    assert isinstance(product, RawSignature), product
    released = der_of_raw(product.signature) if algorithm.is_ecdsa else product.signature
    return verifies(Check(spki, algorithm, data_of(algorithm), released))


@pytest.mark.parametrize("algorithm", Algorithm)
def test_every_algorithm_signs_and_verifies_with_another_library(room: HsmRoom, algorithm: Algorithm) -> None:
    name = NAME_OF.get(algorithm, "rsa")
    with room.connect() as connection:
        opened = connection.open(name)
        assert isinstance(opened, KeyOpened)
        assert opened.family == algorithm.family.value
        assert signs(connection, name, algorithm, opened.spki)


def test_probe_tells_the_token_and_a_key_must_be_opened_before_it_signs(room: HsmRoom) -> None:
    with room.connect() as connection:
        alive = connection.probe()
        assert isinstance(alive, Alive)
        assert (alive.label, len(alive.serial)) == ("dev", 16)
        failed = connection.sign("never-opened", Algorithm.ES256, bytes(32))
        assert failed == TaskFailed("key-not-open", may_have_signed=False, is_session_lost=False)


def test_tasks_are_done_in_order_when_they_come_together(room: HsmRoom) -> None:
    with room.connect() as connection:
        connection.send(OpenKey("p256/1", "p256", b""), *(SignTask("p256/1", Algorithm.ES256, bytes([n]) * 32) for n in range(50)))
        opened = connection.receive()
        assert isinstance(opened, KeyOpened)
        for number in range(50):
            product = connection.receive()
            assert isinstance(product, RawSignature)
            assert verifies(Check(opened.spki, Algorithm.ES256, bytes([number]) * 32, der_of_raw(product.signature)))


@pytest.mark.case(51)
def test_pkcs11_is_loaded_in_workers_alone_and_the_pin_is_in_no_argv_or_environment(room: HsmRoom) -> None:
    room.connect().socket.close()
    pin = (room.directory / "dev" / "pin").read_text().strip()
    assert room.process is not None
    for pid in (room.process.pid, *room.workers()):
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert ("softhsm" in maps) == (pid != room.process.pid)
        for name in ("cmdline", "environ"):
            assert pin not in Path(f"/proc/{pid}/{name}").read_text()
    assert pin not in room.text()
    code = "import sys, keybroker.hsm.room; sys.exit('pkcs11' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_killed_worker_is_replaced_and_signs_again(room: HsmRoom) -> None:
    with room.connect() as connection:
        connection.open("p256")
        (worker,) = room.workers()
        kill(worker)
        with pytest.raises((EOFError, ConnectionError)):
            connection.probe()
    took = until(lambda: worker not in room.workers() and _works(room), seconds=10)
    sys.stdout.write(f"a killed worker is replaced after {took * 1000:.0f} ms\n")
    assert took < 4


def _works(room: HsmRoom) -> bool:
    try:
        with WorkerConnection(room.sockets["dev"][0]) as connection:
            return isinstance(connection.probe(), Alive)
    except (OSError, EOFError):
        return False


def test_four_workers_of_one_token_start_every_time(tmp_path: Path) -> None:
    room = make_room(tmp_path, {"dev": {"p256": Algorithm.ES256}}, workers=4)
    for _ in range(5):
        with served(room):
            for index in range(4):
                with room.connect(index=index) as connection:
                    assert isinstance(connection.open("p256"), KeyOpened)
            assert room.stop() == 0
    assert "worker ended" not in room.text()


def test_two_tokens_in_one_room_and_one_of_them_without_its_pin(tmp_path: Path) -> None:
    room = make_room(tmp_path, {"dev": {"a": Algorithm.ES256}, "other": {"b": Algorithm.ED25519}})
    (tmp_path / "other" / "pin").write_text("wrong-pin-99\n")
    with served(room):
        with room.connect("dev") as connection:
            assert isinstance(connection.open("a"), KeyOpened)
            assert isinstance(connection.open("b"), KeyRefused)
        until(lambda: "an operator must look" in room.text())
        assert room.text().count("refused the PIN (CKR_PIN_INCORRECT)") == 1
        assert "wrong-pin-99" not in room.text()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda section: section.update(uri=section["uri"].replace("libsofthsm2", "nothing")), "does not exist; install it"),
        (lambda section: section.update(uri=re.sub(r"pin-source=file:\S+", "pin-value=1234", section["uri"])), "`pin-value` puts the PIN"),
        (lambda section: section.update(uri=section["uri"].replace("pin-source=file:", "pin-source=file:/nowhere")), "PIN cannot be read"),
    ],
)
def test_room_that_cannot_work_says_why_and_ends(tmp_path: Path, change: object, error: str) -> None:
    room = make_room(tmp_path, {"dev": {}})
    config = yaml.safe_load(room.config_file.read_text())
    assert callable(change)
    change(config["hsm"]["tokens"]["dev"])
    room.config_file.write_text(yaml.safe_dump(config))
    room.start()
    assert room.process is not None
    assert room.process.wait(20) == 78
    assert error in room.text()
    assert "Traceback" not in room.text()


def test_sigterm_ends_the_room_and_its_workers(tmp_path: Path) -> None:
    room = make_room(tmp_path, {"dev": {"p256": Algorithm.ES256}}, workers=2)
    with served(room):
        connections = [room.connect(index=index) for index in range(2)]
        workers = room.workers()
        assert room.stop() == 0
        assert [pid for pid in workers if is_alive(pid)] == []
        for connection in connections:
            connection.socket.close()
    assert not any(path.exists() for path in room.sockets["dev"])


# Keys that must not be used


@pytest.fixture(scope="module")
def bad_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HsmRoom]:
    room = make_room(tmp_path_factory.mktemp("bad"), {"dev": {"good": Algorithm.ES256}})
    add_bad_keys(room.directory / "dev", "dev")
    with served(room) as room:
        yield room


@pytest.mark.case(52)
@pytest.mark.parametrize(("name", "rule"), BAD_KEYS.items())
def test_key_that_must_not_be_used_is_refused_by_its_rule_and_the_good_one_serves(bad_keys: HsmRoom, name: str, rule: str) -> None:
    with bad_keys.connect() as connection:
        refused = connection.open(name)
        assert isinstance(refused, KeyRefused)
        assert refused.rule == rule
        assert refused.cure
        assert isinstance(connection.sign(name, Algorithm.ES256, bytes(32)), TaskFailed)
        assert isinstance(connection.open("good"), KeyOpened)
        assert isinstance(connection.sign("good", Algorithm.ES256, bytes(32)), RawSignature)


@pytest.mark.parametrize("bits", [3072, 4096])
@pytest.mark.parametrize("algorithm", [Algorithm.PS384, Algorithm.RS512])
def test_larger_rsa_keys_sign(bad_keys: HsmRoom, bits: int, algorithm: Algorithm) -> None:
    with bad_keys.connect() as connection:
        opened = connection.open(f"rsa-{bits}")
        assert isinstance(opened, KeyOpened)
        assert opened.bits == bits
        assert signs(connection, f"rsa-{bits}", algorithm, opened.spki)
