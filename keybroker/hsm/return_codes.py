"""What the return codes of PKCS#11 mean to a broker (OASIS PKCS#11 2.40, section 5.1). Names only: this file knows no library.

Most codes become one thing, "it failed and may have signed": a module is free to answer CKR_GENERAL_ERROR or a code of its vendor
after the work is done, and a use that may have happened must count as one.
"""

from __future__ import annotations

PIN_REFUSED = frozenset(
    {"CKR_PIN_EXPIRED", "CKR_PIN_INCORRECT", "CKR_PIN_INVALID", "CKR_PIN_LEN_RANGE", "CKR_PIN_LOCKED", "CKR_USER_PIN_NOT_INITIALIZED"}
)
"""Answers of C_Login after which another attempt could lock the token."""

NO_SESSION_LEFT = "CKR_SESSION_COUNT"
"""The token has all the sessions that it can have, ours or another program's; it has not been asked for a PIN yet."""

SESSION_LOST = frozenset(
    {
        "CKR_CRYPTOKI_NOT_INITIALIZED",
        "CKR_DEVICE_ERROR",
        "CKR_DEVICE_MEMORY",
        "CKR_DEVICE_REMOVED",
        "CKR_KEY_HANDLE_INVALID",
        "CKR_OBJECT_HANDLE_INVALID",
        "CKR_OPERATION_ACTIVE",
        "CKR_OPERATION_NOT_INITIALIZED",
        "CKR_SESSION_CLOSED",
        "CKR_SESSION_COUNT",
        "CKR_SESSION_HANDLE_INVALID",
        "CKR_SLOT_ID_INVALID",
        "CKR_TOKEN_NOT_PRESENT",
        "CKR_TOKEN_NOT_RECOGNIZED",
        "CKR_USER_NOT_LOGGED_IN",
    }
)
"""These blame session, token or device: a fresh process with a fresh session may do better, this one will not."""

REQUEST_REFUSED = frozenset(
    {
        "CKR_ARGUMENTS_BAD",
        "CKR_CURVE_NOT_SUPPORTED",
        "CKR_DATA_INVALID",
        "CKR_DATA_LEN_RANGE",
        "CKR_FUNCTION_NOT_SUPPORTED",
        "CKR_KEY_FUNCTION_NOT_PERMITTED",
        "CKR_KEY_SIZE_RANGE",
        "CKR_KEY_TYPE_INCONSISTENT",
        "CKR_MECHANISM_INVALID",
        "CKR_MECHANISM_PARAM_INVALID",
    }
)
"""These blame what was asked: no reason to doubt the session, so that nobody can end it by asking for what the token cannot do."""

NOTHING_SIGNED = REQUEST_REFUSED | frozenset(
    {
        "CKR_CRYPTOKI_NOT_INITIALIZED",
        "CKR_KEY_HANDLE_INVALID",
        "CKR_OBJECT_HANDLE_INVALID",
        "CKR_OPERATION_ACTIVE",
        "CKR_OPERATION_NOT_INITIALIZED",
        "CKR_SESSION_CLOSED",
        "CKR_SESSION_HANDLE_INVALID",
        "CKR_TOKEN_NOT_PRESENT",
        "CKR_USER_NOT_LOGGED_IN",
    }
)
"""Answers of C_Sign that a module gives before it touches the key. Any answer of C_SignInit says the same."""

NAMES = {
    0x1: "CKR_CANCEL",
    0x9: "CKR_NEED_TO_CREATE_THREADS",
    0xA: "CKR_CANT_LOCK",
    0x1B: "CKR_ACTION_PROHIBITED",
    0x51: "CKR_FUNCTION_NOT_PARALLEL",
    0x65: "CKR_KEY_CHANGED",
    0x68: "CKR_KEY_FUNCTION_NOT_PERMITTED",
    0x140: "CKR_CURVE_NOT_SUPPORTED",
    0x160: "CKR_SAVED_STATE_INVALID",
    0x170: "CKR_INFORMATION_SENSITIVE",
    0x180: "CKR_STATE_UNSAVEABLE",
    0x1A0: "CKR_MUTEX_BAD",
    0x1A1: "CKR_MUTEX_NOT_LOCKED",
    0x1B0: "CKR_NEW_PIN_MODE",
    0x1B1: "CKR_NEXT_OTP",
    0x1B6: "CKR_FIPS_SELF_TEST_FAILED",
    0x1B7: "CKR_LIBRARY_LOAD_FAILED",
}
"""Codes for which python-pkcs11 has no exception of its own."""
