"""Finding the one token that a URI names among the slots of a module, and what a failed call is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pkcs11
import pytest
from pkcs11 import exceptions as ckr

from keybroker.errors import TokenError
from keybroker.hsm.pkcs11_token import _find, ckr_name, failure_of
from keybroker.model.pkcs11_uri import Pkcs11Uri


class FakeToken:
    """What a token says of itself; SoftHSM pads with blanks, and some fields are bytes."""

    manufacturer_id = "maker   "
    model = b"model\0\0"

    def __init__(self, label: str, serial: str) -> None:
        self.label = label
        self.serial = serial.encode()


class FakeSlot:
    def __init__(self, answer: FakeToken | Exception) -> None:
        self._answer = answer

    def get_token(self) -> FakeToken:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


class FakeLibrary:
    """A module with these slots."""

    def __init__(self, *answers: FakeToken | Exception) -> None:
        self._answers = answers

    def get_slots(self, *, token_present: bool) -> list[FakeSlot]:
        assert token_present
        return [FakeSlot(answer) for answer in self._answers]


def uri(token: str = "", serial: str = "", model: str = "") -> Pkcs11Uri:
    return Pkcs11Uri(token, serial, "", model, Path("/m.so"), Path("/pin"))


ONE, TWO = FakeToken("one", "01"), FakeToken("two  ", "02")


@pytest.mark.case(44)
@pytest.mark.parametrize("broken", [ckr.DeviceError(), ckr.TokenNotPresent(), ckr.TokenNotRecognised(), pkcs11.PKCS11Error("0x80000001")])
def test_token_is_found_although_another_slot_is_broken(broken: Exception) -> None:
    assert _find(FakeLibrary(broken, ONE, TWO), uri("two")) is TWO
    assert _find(FakeLibrary(ONE, TWO, broken), uri(serial="01", model="model")) is ONE


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (uri("three"), "no token of /m.so match the URI"),
        (uri("one", "02"), "no token"),
        (uri(model="model"), "2 tokens of /m.so match the URI; name exactly one"),
    ],
)
def test_token_that_is_not_named_exactly_is_not_found(wanted: Pkcs11Uri, text: str) -> None:
    with pytest.raises(TokenError, match=text):
        _find(FakeLibrary(ONE, TWO), wanted)


def test_token_that_is_missing_names_the_slot_that_cannot_be_read() -> None:
    with pytest.raises(TokenError, match="a slot answers CKR_DEVICE_REMOVED"):
        _find(FakeLibrary(ckr.DeviceRemoved(), ONE), uri("two"))


def raised_by(error: Exception, function: Callable[[Exception], None]) -> pkcs11.PKCS11Error:
    try:
        function(error)
    except pkcs11.PKCS11Error as err:
        return err
    raise AssertionError


def _initiate(error: Exception) -> None:
    raise error


def sign_process_fully(error: Exception) -> None:
    raise error


@pytest.mark.case(48)
def test_failed_call_may_have_signed_unless_c_sign_was_not_called_or_never_touched_the_key() -> None:
    general, closed, vendor = ckr.GeneralError, ckr.SessionHandleInvalid, pkcs11.PKCS11Error
    assert failure_of(raised_by(general(), sign_process_fully)).may_have_signed
    assert failure_of(raised_by(vendor("0x80000001"), sign_process_fully)).may_have_signed
    assert not failure_of(raised_by(closed(), sign_process_fully)).may_have_signed
    assert not failure_of(raised_by(general(), _initiate)).may_have_signed
    assert not failure_of(raised_by(vendor("0x80000001"), _initiate)).may_have_signed
    assert failure_of(general()).may_have_signed  # raised nowhere: nothing is known


@pytest.mark.case(53)
@pytest.mark.parametrize(
    ("error", "name"),
    [
        (pkcs11.PKCS11Error("Unmapped error code 0x80000001"), "0x80000001"),
        (pkcs11.PKCS11Error("Unmapped error code 0x68"), "CKR_KEY_FUNCTION_NOT_PERMITTED"),
        (pkcs11.PKCS11Error("OS exception while loading /m.so: not an ELF file"), "OS exception while loading /m.so: not an ELF file"),
        (ckr.TokenNotRecognised(), "CKR_TOKEN_NOT_RECOGNIZED"),
        (ckr.RandomNoRNG(), "CKR_RANDOM_NO_RNG"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_failure_is_called_what_pkcs11_calls_it(error: Exception, name: str) -> None:
    assert ckr_name(error) == name
