"""Every return code of PKCS#11 at every call that matters, through a served broker: what is answered and recorded, how soon it signs again.

The suite runs one code of each kind. With `KEYBROKER_FAULT_CYCLES` set, that many of the whole matrix run, in the order that the seed
says; from its size on, all of it. The table is printed, and written to `hsm-matrix.txt` in the test's temporary directory.
"""

from __future__ import annotations

import hashlib
import os
import queue
import random
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from keybroker.audit.chain import ChainChecker
from keybroker.hsm.return_codes import PIN_REFUSED
from keybroker.model.key import Algorithm
from tests.hsm_worlds import Answer, Asker, ShimmedWorld, TokenPlan, make_shimmed_world, serving
from tests.worlds import until

MAX_RECOVERY_SECONDS = 10.0

CODES = {
    "CKR_CANCEL": 0x1, "CKR_HOST_MEMORY": 0x2, "CKR_SLOT_ID_INVALID": 0x3, "CKR_GENERAL_ERROR": 0x5, "CKR_FUNCTION_FAILED": 0x6,
    "CKR_ARGUMENTS_BAD": 0x7, "CKR_NO_EVENT": 0x8, "CKR_NEED_TO_CREATE_THREADS": 0x9, "CKR_CANT_LOCK": 0xA,
    "CKR_ATTRIBUTE_READ_ONLY": 0x10, "CKR_ATTRIBUTE_SENSITIVE": 0x11, "CKR_ATTRIBUTE_TYPE_INVALID": 0x12,
    "CKR_ATTRIBUTE_VALUE_INVALID": 0x13, "CKR_ACTION_PROHIBITED": 0x1B, "CKR_DATA_INVALID": 0x20, "CKR_DATA_LEN_RANGE": 0x21,
    "CKR_DEVICE_ERROR": 0x30, "CKR_DEVICE_MEMORY": 0x31, "CKR_DEVICE_REMOVED": 0x32, "CKR_ENCRYPTED_DATA_INVALID": 0x40,
    "CKR_ENCRYPTED_DATA_LEN_RANGE": 0x41, "CKR_FUNCTION_CANCELED": 0x50, "CKR_FUNCTION_NOT_PARALLEL": 0x51,
    "CKR_FUNCTION_NOT_SUPPORTED": 0x54, "CKR_KEY_HANDLE_INVALID": 0x60, "CKR_KEY_SIZE_RANGE": 0x62, "CKR_KEY_TYPE_INCONSISTENT": 0x63,
    "CKR_KEY_NOT_NEEDED": 0x64, "CKR_KEY_CHANGED": 0x65, "CKR_KEY_NEEDED": 0x66, "CKR_KEY_INDIGESTIBLE": 0x67,
    "CKR_KEY_FUNCTION_NOT_PERMITTED": 0x68, "CKR_KEY_NOT_WRAPPABLE": 0x69, "CKR_KEY_UNEXTRACTABLE": 0x6A, "CKR_MECHANISM_INVALID": 0x70,
    "CKR_MECHANISM_PARAM_INVALID": 0x71, "CKR_OBJECT_HANDLE_INVALID": 0x82, "CKR_OPERATION_ACTIVE": 0x90,
    "CKR_OPERATION_NOT_INITIALIZED": 0x91, "CKR_PIN_INCORRECT": 0xA0, "CKR_PIN_INVALID": 0xA1, "CKR_PIN_LEN_RANGE": 0xA2,
    "CKR_PIN_EXPIRED": 0xA3, "CKR_PIN_LOCKED": 0xA4, "CKR_SESSION_CLOSED": 0xB0, "CKR_SESSION_COUNT": 0xB1,
    "CKR_SESSION_HANDLE_INVALID": 0xB3, "CKR_SESSION_PARALLEL_NOT_SUPPORTED": 0xB4, "CKR_SESSION_READ_ONLY": 0xB5,
    "CKR_SESSION_EXISTS": 0xB6, "CKR_SESSION_READ_ONLY_EXISTS": 0xB7, "CKR_SESSION_READ_WRITE_SO_EXISTS": 0xB8,
    "CKR_SIGNATURE_INVALID": 0xC0, "CKR_SIGNATURE_LEN_RANGE": 0xC1, "CKR_TEMPLATE_INCOMPLETE": 0xD0, "CKR_TEMPLATE_INCONSISTENT": 0xD1,
    "CKR_TOKEN_NOT_PRESENT": 0xE0, "CKR_TOKEN_NOT_RECOGNIZED": 0xE1, "CKR_TOKEN_WRITE_PROTECTED": 0xE2,
    "CKR_UNWRAPPING_KEY_HANDLE_INVALID": 0xF0, "CKR_UNWRAPPING_KEY_SIZE_RANGE": 0xF1, "CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT": 0xF2,
    "CKR_USER_ALREADY_LOGGED_IN": 0x100, "CKR_USER_NOT_LOGGED_IN": 0x101, "CKR_USER_PIN_NOT_INITIALIZED": 0x102,
    "CKR_USER_TYPE_INVALID": 0x103, "CKR_USER_ANOTHER_ALREADY_LOGGED_IN": 0x104, "CKR_USER_TOO_MANY_TYPES": 0x105,
    "CKR_WRAPPED_KEY_INVALID": 0x110, "CKR_WRAPPED_KEY_LEN_RANGE": 0x112, "CKR_WRAPPING_KEY_HANDLE_INVALID": 0x113,
    "CKR_WRAPPING_KEY_SIZE_RANGE": 0x114, "CKR_WRAPPING_KEY_TYPE_INCONSISTENT": 0x115, "CKR_RANDOM_SEED_NOT_SUPPORTED": 0x120,
    "CKR_RANDOM_NO_RNG": 0x121, "CKR_DOMAIN_PARAMS_INVALID": 0x130, "CKR_CURVE_NOT_SUPPORTED": 0x140, "CKR_BUFFER_TOO_SMALL": 0x150,
    "CKR_SAVED_STATE_INVALID": 0x160, "CKR_INFORMATION_SENSITIVE": 0x170, "CKR_STATE_UNSAVEABLE": 0x180,
    "CKR_CRYPTOKI_NOT_INITIALIZED": 0x190, "CKR_CRYPTOKI_ALREADY_INITIALIZED": 0x191, "CKR_MUTEX_BAD": 0x1A0,
    "CKR_MUTEX_NOT_LOCKED": 0x1A1, "CKR_NEW_PIN_MODE": 0x1B0, "CKR_NEXT_OTP": 0x1B1, "CKR_EXCEEDED_MAX_ITERATIONS": 0x1B5,
    "CKR_FIPS_SELF_TEST_FAILED": 0x1B6, "CKR_LIBRARY_LOAD_FAILED": 0x1B7, "CKR_PIN_TOO_WEAK": 0x1B8, "CKR_PUBLIC_KEY_INVALID": 0x1B9,
    "CKR_FUNCTION_REJECTED": 0x200, "0x80000001": 0x80000001, "0x7777": 0x7777,
}  # fmt: skip
"""PKCS#11 2.40, all of it, then a vendor's code and one that nobody knows."""

PLACES = (("C_SignInit", "before"), ("C_Sign", "before"), ("C_Sign", "after"), ("C_OpenSession", "before"), ("C_Login", "before"))

# What C_Sign says before it touches the key (cases 43, 44, 50; the rest by the texts of PKCS#11 2.40, section 5.1).
NOTHING_SIGNED = {
    "CKR_SESSION_HANDLE_INVALID", "CKR_SESSION_CLOSED", "CKR_OBJECT_HANDLE_INVALID", "CKR_KEY_HANDLE_INVALID", "CKR_USER_NOT_LOGGED_IN",
    "CKR_OPERATION_ACTIVE", "CKR_OPERATION_NOT_INITIALIZED", "CKR_TOKEN_NOT_PRESENT", "CKR_CRYPTOKI_NOT_INITIALIZED", "CKR_DATA_INVALID",
    "CKR_DATA_LEN_RANGE", "CKR_MECHANISM_INVALID", "CKR_MECHANISM_PARAM_INVALID", "CKR_KEY_SIZE_RANGE", "CKR_KEY_TYPE_INCONSISTENT",
    "CKR_KEY_FUNCTION_NOT_PERMITTED", "CKR_CURVE_NOT_SUPPORTED", "CKR_FUNCTION_NOT_SUPPORTED", "CKR_ARGUMENTS_BAD",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """A code that a function returns from now on: instead of doing its work, or after it."""

    function: str
    when: str
    name: str

    @property
    def order(self) -> str:
        return f"{self.function} {self.when} {CODES[self.name]:#x} -1"

    @property
    def is_of_login(self) -> bool:
        return self.function in {"C_OpenSession", "C_Login"}


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one request under a fault, and how long signatures took to flow again."""

    fault: Fault
    answer: Answer
    recovery_s: float


MATRIX = [Fault(*place, name) for place in PLACES for name in CODES]

_KINDS = {
    ("C_SignInit", "before"): "GENERAL_ERROR SESSION_HANDLE_INVALID DEVICE_ERROR MECHANISM_INVALID BUFFER_TOO_SMALL 0x80000001",
    ("C_Sign", "before"): "SESSION_HANDLE_INVALID OBJECT_HANDLE_INVALID USER_NOT_LOGGED_IN SESSION_CLOSED DEVICE_ERROR DEVICE_REMOVED "
    "TOKEN_NOT_PRESENT OPERATION_ACTIVE SESSION_COUNT DATA_LEN_RANGE CRYPTOKI_NOT_INITIALIZED GENERAL_ERROR 0x80000001 0x7777",
    ("C_Sign", "after"): "GENERAL_ERROR DEVICE_REMOVED SESSION_HANDLE_INVALID BUFFER_TOO_SMALL 0x80000001",
    ("C_OpenSession", "before"): "SESSION_COUNT DEVICE_REMOVED 0x80000001",
    ("C_Login", "before"): "PIN_INCORRECT PIN_LOCKED PIN_EXPIRED DEVICE_ERROR GENERAL_ERROR USER_ALREADY_LOGGED_IN",
}
ONE_OF_EACH_KIND = [
    Fault(*place, name if name.startswith("0x") else f"CKR_{name}") for place, names in _KINDS.items() for name in names.split()
]


def expected(fault: Fault) -> tuple[str, str]:
    """Outcome and cause on record; a token without a session gets no intent at all."""
    if fault.is_of_login:
        return "none", ""
    if fault.function == "C_SignInit":
        # python-pkcs11 takes BUFFER_TOO_SMALL for no failure, and goes on to C_Sign.
        return "failed", "CKR_OPERATION_NOT_INITIALIZED" if fault.name == "CKR_BUFFER_TOO_SMALL" else fault.name
    return ("failed" if fault.name in NOTHING_SIGNED else "unknown"), fault.name


class Bench:
    """One token with one key and one session, and its client: faults one after another."""

    def __init__(self, world: ShimmedWorld, token: str) -> None:
        self._world = world
        self._token = token
        self._shim = world.shims[token]
        (self._key,) = (key for key, (name, _) in world.keys.items() if name == token)

    def run(self, faults: queue.SimpleQueue[Fault]) -> list[Row]:
        """Take faults until there are none."""
        rows: list[Row] = []
        with Asker(self._world) as asker:
            while True:
                try:
                    fault = faults.get_nowait()
                except queue.Empty:
                    return rows
                rows.append(self._inject(asker, fault))

    def _inject(self, asker: Asker, fault: Fault) -> Row:
        assert asker.signs(self._key)
        if fault.is_of_login:
            calls = self._shim.calls(fault.function)
            self._shim.order("C_Sign before 0x30 1", fault.order)
            assert asker.sign(self._key, b"the last one of this session").status == 503
            until(lambda: self._shim.calls(fault.function) > calls, MAX_RECOVERY_SECONDS, f"no login under {fault}")
        else:
            self._shim.order(fault.order)
        answer = asker.sign(self._key, fault.order.encode())
        started = time.monotonic()
        self._shim.clear()
        if fault.is_of_login and fault.name in PIN_REFUSED:
            until(lambda: self._needs_operator() or asker.signs(self._key), MAX_RECOVERY_SECONDS, f"no word of {fault}")
            os.kill(self._world.room, signal.SIGHUP)  # what an operator does
            started = time.monotonic()
        until(lambda: asker.signs(self._key), 3 * MAX_RECOVERY_SECONDS, f"no signature after {fault}")
        return Row(fault, answer, time.monotonic() - started)

    def _needs_operator(self) -> bool:
        """It says so, unless another bench's operator was here first: a SIGHUP is for all tokens."""
        return "needs an operator" in self._world.part(f"token {self._token}")


def run_matrix(world: ShimmedWorld, faults: list[Fault]) -> list[Row]:
    """All faults, shared out among the tokens."""
    waiting: queue.SimpleQueue[Fault] = queue.SimpleQueue()
    for fault in faults:
        waiting.put(fault)
    with ThreadPoolExecutor(len(world.shims)) as pool:
        benches = [pool.submit(Bench(world, token).run, waiting) for token in world.shims]
        return [row for bench in benches for row in bench.result()]


_NO_SESSION_LEFT = ("C_OpenSession", "CKR_SESSION_COUNT")


def table_of(rows: list[Row], outcomes: dict[str, list[tuple[str, str]]]) -> tuple[str, list[str]]:
    """The table, and what in it is not as it must be."""
    lines, faults = [], []
    for row in sorted(rows, key=lambda each: (CODES[each.fault.name], PLACES.index((each.fault.function, each.fault.when)))):
        fault, answer = row.fault, row.answer
        outcome, cause = next(iter(outcomes.get(hashlib.sha256(fault.order.encode()).hexdigest(), [])), ("none", ""))
        line = f"{fault.name:37} {fault.function:13} {fault.when:6} {answer.status} {answer.code:15} {outcome:8} {row.recovery_s:5.2f} s"
        lines.append(line)
        # A token without a session left is an overload as soon as the worker has said so, a moment after its login.
        codes = {"hsm-unavailable", "overloaded"} if (fault.function, fault.name) == _NO_SESSION_LEFT else {"hsm-unavailable"}
        is_right = answer.code in codes and (answer.status, outcome, cause) == (503, *expected(fault))
        if not is_right or answer.retry_after < 1 or row.recovery_s > MAX_RECOVERY_SECONDS:
            faults.append(f"{line} {cause}")
    return "\n".join(lines) + "\n", faults


@pytest.mark.case(43)
@pytest.mark.case(44)
@pytest.mark.case(45)
@pytest.mark.case(48)
@pytest.mark.case(50)
@pytest.mark.case(53)
@pytest.mark.timeout(1_200)
def test_no_return_code_releases_a_wrong_signature_or_stops_the_token_for_long(
    tmp_path: Path, cycles: Callable[[int], int], seed: int
) -> None:
    chosen = cycles(0)
    faults = random.Random(seed).sample(MATRIX, min(chosen, len(MATRIX))) if chosen else ONE_OF_EACH_KIND
    tokens = {f"t{number}": TokenPlan({f"k{number}": Algorithm.ES256}) for number in range(8 if chosen else 4)}
    started = time.monotonic()
    with serving(make_shimmed_world(tmp_path / "world", tokens)) as world:
        rows = run_matrix(world, faults)
        table, wrong = table_of(rows, world.outcomes())
        checker = ChainChecker()
        assert [fault for leaf in world.world.leaves() for fault in checker.take(leaf)] == []
        assert checker.open_uses == {}
    slowest = max(row.recovery_s for row in rows)
    summary = f"{len(rows)} faults in {time.monotonic() - started:.0f} s, slowest recovery {slowest:.2f} s, wrong releases 0\n"
    (tmp_path / "hsm-matrix.txt").write_text(table + summary)
    sys.stdout.write(f"{table}{summary}written to {tmp_path / 'hsm-matrix.txt'}\n")
    assert wrong == []
    assert len(rows) == len(faults)
