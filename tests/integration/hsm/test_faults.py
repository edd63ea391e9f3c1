"""A PKCS#11 module that fails on demand: what the authority is told, and how long until the worker signs again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from keybroker.authority.selfcheck import Check, der_of_raw, verifies
from keybroker.hsm.room import BACKOFF_SECONDS
from keybroker.model.key import Algorithm
from keybroker.model.task import Alive, KeyOpened, NeedsOperator, RawSignature, SignTask, TaskFailed
from tests.tokens import HsmRoom, Shim, WorkerConnection, make_room, served
from tests.worlds import until


@dataclass(frozen=True)
class Shimmed:
    """A room whose module obeys a file."""

    room: HsmRoom
    shim: Shim


@pytest.fixture
def shimmed(tmp_path: Path, shim_module: Path) -> Iterator[Shimmed]:
    shim = Shim.make(tmp_path / "shim", shim_module)
    with served(make_room(tmp_path, {"dev": {"p256": Algorithm.ES256}}, deadline_ms=700, shims={"dev": shim})) as room:
        yield Shimmed(room, shim)


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


@pytest.mark.case(46)
@pytest.mark.case(47)
@pytest.mark.parametrize("order", ["C_SignInit hang", "C_Sign_length hang", "C_Sign hang", "C_Sign hung"])
def test_hanging_call_is_killed_at_its_deadline_and_the_next_worker_signs(shimmed: Shimmed, order: str) -> None:
    with shimmed.room.connect() as connection:
        connection.open("p256")
        (hung,) = shimmed.room.workers()
        shimmed.shim.order(f"{order} 0 1")
        connection.send(SignTask("p256/1", Algorithm.ES256, bytes(32)))
        took = until(lambda: hung not in shimmed.room.workers(), seconds=5)
        shimmed.shim.clear()
        with pytest.raises((EOFError, ConnectionError)):
            connection.receive()
    assert 0.5 < took < 5
    assert until(lambda: signs(shimmed.room), seconds=10) < 8
    assert "worker hangs in the module" in shimmed.room.text()


@pytest.mark.case(49)
@pytest.mark.parametrize("how", ["flip", "zero", "short", "long", "nothing"])
def test_wrong_signature_does_not_verify(shimmed: Shimmed, how: str) -> None:
    with shimmed.room.connect() as connection:
        opened = connection.open("p256")
        assert isinstance(opened, KeyOpened)
        shimmed.shim.order(f"C_Sign {how} 2 1")
        made = connection.sign("p256", Algorithm.ES256, bytes(32))
        assert isinstance(made, RawSignature)
        assert not verifies(Check(opened.spki, Algorithm.ES256, bytes(32), der_of_raw(made.signature)))
        assert isinstance(connection.probe(), Alive)


@pytest.mark.case(45)
@pytest.mark.parametrize(("code", "name"), [(0xA0, "CKR_PIN_INCORRECT"), (0xA3, "CKR_PIN_EXPIRED"), (0xA4, "CKR_PIN_LOCKED")])
def test_refused_pin_is_tried_once_and_again_only_when_an_operator_says_so(shimmed: Shimmed, code: int, name: str) -> None:
    until(lambda: signs(shimmed.room), seconds=15)
    before = shimmed.shim.calls("C_Login")
    shimmed.shim.order(f"C_Login before {code:#x} -1")
    for worker in shimmed.room.workers():
        os.kill(worker, signal.SIGKILL)
    until(lambda: "an operator must look" in shimmed.room.text(), seconds=10)
    shimmed.shim.clear()
    with shimmed.room.connect() as connection:  # to a worker that touches no token
        assert connection.probe() == NeedsOperator(name)
        assert connection.open("p256") == NeedsOperator(name)
        assert connection.sign("p256", Algorithm.ES256, bytes(32)) == NeedsOperator(name)
    (worker,) = shimmed.room.workers()
    assert "shim" not in Path(f"/proc/{worker}/maps").read_text()
    with pytest.raises(AssertionError):
        until(lambda: signs(shimmed.room), seconds=1.5)
    assert shimmed.shim.calls("C_Login") == before + 1
    assert shimmed.room.process is not None
    shimmed.room.process.send_signal(signal.SIGHUP)
    until(lambda: signs(shimmed.room), seconds=10)
    assert shimmed.shim.calls("C_Login") == before + 2


@pytest.mark.case(47)
@pytest.mark.parametrize("function", ["C_Initialize", "C_GetSlotList", "C_OpenSession", "C_Login"])
def test_login_that_hangs_is_killed_and_holds_up_no_other_token(tmp_path: Path, shim_module: Path, function: str) -> None:
    shim = Shim.make(tmp_path / "shim", shim_module)
    shim.order(f"{function} hang 0 1")
    room = make_room(tmp_path, {"dev": {"p256": Algorithm.ES256}, "other": {"b": Algorithm.ES256}}, deadline_ms=2000, shims={"dev": shim})
    with served(room):
        until(lambda: shim.calls(function) == 1)
        with room.connect("other", seconds=10) as connection:
            assert isinstance(connection.open("b"), KeyOpened)
        assert "worker hangs" not in room.text()
        until(lambda: signs(room), seconds=20)
        assert room.text().count("worker hangs in the module") == 1


@pytest.mark.case(47)
def test_worker_that_hangs_while_it_ends_is_killed(shimmed: Shimmed) -> None:
    with shimmed.room.connect() as connection:
        connection.open("p256")
        (worker,) = shimmed.room.workers()
        shimmed.shim.order("C_Sign before 0x30 1", "C_Finalize hang 0 1", "C_Logout hang 0 1")
        assert isinstance(connection.sign("p256", Algorithm.ES256, bytes(32)), TaskFailed)
    until(lambda: worker not in shimmed.room.workers(), seconds=5)
    until(lambda: signs(shimmed.room), seconds=10)
    assert shimmed.shim.calls("C_Finalize") == 1
    assert shimmed.room.stop() == 0
    assert shimmed.shim.calls("C_Logout") == 1


@pytest.mark.case(52)
@pytest.mark.parametrize("function", ["C_FindObjectsInit", "C_FindObjects", "C_GetAttributeValue"])
def test_key_that_cannot_be_looked_for_is_not_judged(shimmed: Shimmed, function: str) -> None:
    with shimmed.room.connect() as connection:
        shimmed.shim.order(f"{function} before 0x5 -1")
        assert connection.open("p256") == TaskFailed("CKR_GENERAL_ERROR", may_have_signed=False, is_session_lost=False)
        assert connection.sign("p256", Algorithm.ES256, bytes(32)) == TaskFailed(
            "key-not-open", may_have_signed=False, is_session_lost=False
        )
        shimmed.shim.clear()
        assert isinstance(connection.open("p256"), KeyOpened)
        shimmed.shim.order(f"{function} before 0x5 -1")
        assert isinstance(connection.open("p256"), TaskFailed)
        assert isinstance(connection.sign("p256", Algorithm.ES256, bytes(32)), TaskFailed), "a key that cannot be seen any more"


def test_session_ends_after_three_failures_in_a_row_whatever_the_code(shimmed: Shimmed) -> None:
    with shimmed.room.connect() as connection:
        connection.open("p256")
        shimmed.shim.order("C_SignInit before 0x5 2")
        first = [connection.sign("p256", Algorithm.ES256, bytes(32)) for _ in range(3)]
        assert [isinstance(each, TaskFailed) for each in first] == [True, True, False]
        shimmed.shim.order("C_SignInit before 0x80000001 -1")
        failed = [connection.sign("p256", Algorithm.ES256, bytes(32)) for _ in range(3)]
    assert [each.is_session_lost for each in failed if isinstance(each, TaskFailed)] == [False, False, True]
    shimmed.shim.clear()
    until(lambda: signs(shimmed.room), seconds=10)


@pytest.mark.parametrize("code", [0x70, 0x71, 0x20, 0x21, 0x68])
def test_session_outlives_any_number_of_requests_that_the_token_cannot_do(shimmed: Shimmed, code: int) -> None:
    with shimmed.room.connect() as connection:
        connection.open("p256")
        shimmed.shim.order(f"C_SignInit before {code:#x} -1")
        for _ in range(8):
            failed = connection.sign("p256", Algorithm.ES256, bytes(32))
            assert isinstance(failed, TaskFailed)
            assert not failed.is_session_lost
            assert not failed.may_have_signed
        shimmed.shim.clear()
        assert isinstance(connection.sign("p256", Algorithm.ES256, bytes(32)), RawSignature)


@pytest.mark.case(44)
def test_token_that_is_away_is_asked_for_ever_more_slowly(shimmed: Shimmed) -> None:
    until(lambda: signs(shimmed.room), seconds=15)
    shimmed.shim.order("C_GetTokenInfo before 0xe0 -1")
    before = shimmed.shim.calls("C_Initialize")
    for worker in shimmed.room.workers():
        os.kill(worker, signal.SIGKILL)
    time.sleep(4.5)
    assert 2 <= shimmed.shim.calls("C_Initialize") - before <= len(BACKOFF_SECONDS)
    assert sum(BACKOFF_SECONDS) > 4.5
    assert (60 - sum(BACKOFF_SECONDS)) / BACKOFF_SECONDS[-1] + len(BACKOFF_SECONDS) < 20  # what the room's description promises
    assert shimmed.shim.calls("C_Login") == before
    assert "a slot answers CKR_TOKEN_NOT_PRESENT" in shimmed.room.text()


@pytest.mark.case(51)
def test_shim_finds_a_fork(tmp_path: Path, shim_module: Path) -> None:
    """What the other tests rely on when they say that nobody forks."""
    shim = Shim.make(tmp_path / "shim", shim_module)
    code = (
        "import os, sys, pkcs11\n"
        "lib = pkcs11.lib(sys.argv[1])\n"
        "lib.get_slots()\n"
        "if os.fork() == 0:\n"
        "    try:\n"
        "        lib.get_slots()\n"
        "    except pkcs11.PKCS11Error as err:\n"
        "        os._exit(7 if type(err).__name__ == 'GeneralError' else 1)\n"
        "    os._exit(0)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    (tmp_path / "softhsm2.conf").write_text(f"directories.tokendir = {tmp_path}\n")
    environment = {**os.environ, **shim.environment, "SOFTHSM2_CONF": str(tmp_path / "softhsm2.conf")}
    done = subprocess.run([sys.executable, "-c", code, str(shim.module)], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert shim.calls("forked") == 1


@pytest.mark.case(51)
def test_nobody_forks_after_the_module_is_initialised(shimmed: Shimmed) -> None:
    for _ in range(3):
        assert until(lambda: signs(shimmed.room), seconds=15) >= 0
        for worker in shimmed.room.workers():
            os.kill(worker, signal.SIGKILL)
    until(lambda: signs(shimmed.room), seconds=15)
    assert shimmed.shim.calls("C_Initialize") == 4
    assert shimmed.shim.calls("forked") == 0
