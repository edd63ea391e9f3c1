"""A PKCS#11 module that fails on demand: what the authority is told, and how long until the worker signs again."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from keybroker.authority.selfcheck import Check, der_of_raw, verifies
from keybroker.hsm.softhsm import module_path
from keybroker.model.key import Algorithm
from keybroker.model.task import Alive, KeyOpened, RawSignature, SignTask, TaskFailed
from tests.tokens import HsmRoom, WorkerConnection, build_shim, make_room, served
from tests.worlds import until


@dataclass(frozen=True)
class Shimmed:
    """A room whose module obeys a file."""

    room: HsmRoom
    orders: Path
    logins: Path

    def order(self, text: str) -> None:
        self.orders.write_text(text + "\n")


@pytest.fixture
def shimmed(tmp_path: Path) -> Iterator[Shimmed]:
    room = make_room(tmp_path, {"dev": {"p256": Algorithm.ES256}}, deadline_ms=700)
    config = yaml.safe_load(room.config_file.read_text())
    section = config["hsm"]["tokens"]["dev"]
    orders, logins = tmp_path / "orders", tmp_path / "logins"
    orders.write_text("")
    logins.write_text("")
    section["uri"] = section["uri"].replace(str(module_path()), str(build_shim(tmp_path)))
    section["module_environment"] |= {
        "KEYBROKER_SHIM_MODULE": str(module_path()),
        "KEYBROKER_SHIM_ORDERS": str(orders),
        "KEYBROKER_SHIM_LOGINS": str(logins),
    }
    room.config_file.write_text(yaml.safe_dump(config))
    with served(room):
        yield Shimmed(room, orders, logins)


def signs(room: HsmRoom) -> bool:
    try:
        with WorkerConnection(room.sockets["dev"][0]) as connection:
            opened = connection.open("p256")
            made = connection.sign("p256", Algorithm.ES256, bytes(32))
    except (OSError, EOFError):
        return False
    if not isinstance(opened, KeyOpened) or not isinstance(made, RawSignature):
        return False
    return verifies(Check(opened.spki, Algorithm.ES256, bytes(32), der_of_raw(made.signature)))


CODES = [
    pytest.param(0xB3, "CKR_SESSION_HANDLE_INVALID", False, True, marks=pytest.mark.case(43)),
    pytest.param(0x82, "CKR_OBJECT_HANDLE_INVALID", False, True, marks=pytest.mark.case(43)),
    pytest.param(0x101, "CKR_USER_NOT_LOGGED_IN", False, True, marks=pytest.mark.case(43)),
    pytest.param(0xB0, "CKR_SESSION_CLOSED", False, True, marks=pytest.mark.case(43)),
    pytest.param(0x30, "CKR_DEVICE_ERROR", True, True, marks=pytest.mark.case(44)),
    pytest.param(0x32, "CKR_DEVICE_REMOVED", True, True, marks=pytest.mark.case(44)),
    pytest.param(0xE0, "CKR_TOKEN_NOT_PRESENT", False, True, marks=pytest.mark.case(44)),
    pytest.param(0x5, "CKR_GENERAL_ERROR", True, False, marks=pytest.mark.case(48)),
    pytest.param(0x6, "CKR_FUNCTION_FAILED", True, False, marks=pytest.mark.case(48)),
    pytest.param(0x90, "CKR_OPERATION_ACTIVE", False, True, marks=pytest.mark.case(50)),
    pytest.param(0x80000001, "0x80000001", True, False, marks=pytest.mark.case(53)),
    pytest.param(0x7777, "0x7777", True, False, marks=pytest.mark.case(53)),
    pytest.param(0xB1, "CKR_SESSION_COUNT", True, True, marks=pytest.mark.case(54)),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("code", "name", "may_have_signed", "is_session_lost"), CODES)
def test_failed_signature_is_told_by_name_and_the_next_one_is_good(
    shimmed: Shimmed, when: str, code: int, name: str, may_have_signed: object, is_session_lost: object
) -> None:
    with shimmed.room.connect() as connection:
        connection.open("p256")
        shimmed.order(f"C_Sign {when} {code:#x} 1")
        failed = connection.sign("p256", Algorithm.ES256, bytes(32))
    shimmed.order("")
    assert failed == TaskFailed(name, may_have_signed=bool(may_have_signed), is_session_lost=bool(is_session_lost))
    took = until(lambda: signs(shimmed.room), seconds=10)
    sys.stdout.write(f"{name} {when} the real call: good again after {took * 1000:.0f} ms\n")


@pytest.mark.case(46)
@pytest.mark.case(47)
def test_hanging_call_is_killed_at_its_deadline_and_the_next_worker_signs(shimmed: Shimmed) -> None:
    with shimmed.room.connect() as connection:
        connection.open("p256")
        (hung,) = shimmed.room.workers()
        shimmed.order("C_Sign hang 0 1")
        connection.send(SignTask("p256/1", Algorithm.ES256, bytes(32)))
        took = until(lambda: hung not in shimmed.room.workers(), seconds=5)
        shimmed.order("")
        with pytest.raises((EOFError, ConnectionError)):
            connection.receive()
    assert 0.5 < took < 2
    assert until(lambda: signs(shimmed.room), seconds=10) < 8
    assert "worker hangs in the module" in shimmed.room.text()


@pytest.mark.case(49)
@pytest.mark.parametrize("how", ["flip", "zero"])
def test_wrong_signature_does_not_verify(shimmed: Shimmed, how: str) -> None:
    with shimmed.room.connect() as connection:
        opened = connection.open("p256")
        assert isinstance(opened, KeyOpened)
        shimmed.order(f"C_Sign {how} 0 1")
        made = connection.sign("p256", Algorithm.ES256, bytes(32))
        assert isinstance(made, RawSignature)
        assert not verifies(Check(opened.spki, Algorithm.ES256, bytes(32), der_of_raw(made.signature)))
        assert isinstance(connection.probe(), Alive)


@pytest.mark.case(45)
@pytest.mark.parametrize("code", [0xA0, 0xA3, 0xA4])
def test_refused_pin_is_tried_once_and_again_only_when_an_operator_says_so(shimmed: Shimmed, code: int) -> None:
    until(lambda: signs(shimmed.room), seconds=15)
    before = shimmed.logins.stat().st_size
    shimmed.order(f"C_Login before {code:#x} -1")
    for worker in shimmed.room.workers():
        os.kill(worker, signal.SIGKILL)
    until(lambda: "an operator must look" in shimmed.room.text(), seconds=10)
    shimmed.order("")
    with pytest.raises(AssertionError):
        until(lambda: signs(shimmed.room), seconds=2)
    assert shimmed.logins.stat().st_size == before + 1
    assert shimmed.room.process is not None
    shimmed.room.process.send_signal(signal.SIGHUP)
    until(lambda: signs(shimmed.room), seconds=10)
