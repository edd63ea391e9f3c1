"""One leaf of the log: canonical JSON (RFC 8785) and its hash (RFC 6962 section 2.1).

The bytes that are hashed are the bytes that are stored. msgspec's sorted JSON is RFC 8785 for what a leaf may hold: ASCII keys,
strings, booleans and integers below 2^53; the tests hold it against the `rfc8785` package.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from keybroker.model.record import (
    EMPTY,
    MAX_LEAF_BYTES,
    RECORD_VERSION,
    Draft,
    KeyFacts,
    SvidFacts,
    Tbs,
    TokenFacts,
    TrailFacts,
)

_encode = msgspec.json.Encoder(order="sorted").encode
_decode = msgspec.json.Decoder().decode


class LeafTooLargeError(ValueError):
    """A leaf would be larger than 65,535 bytes."""


class _Leaf(msgspec.Struct, frozen=True):
    approvals: tuple[msgspec.Raw, ...]
    body: dict[str, Any]
    decision: msgspec.Raw
    index: int
    key: KeyFacts | msgspec.Raw
    kind: str
    log: str
    operation_id: str
    outcome: str
    request: msgspec.Raw
    retry_of: str
    salt: str
    signature_sha256: str
    svid: SvidFacts | msgspec.Raw
    taken: tuple[dict[str, Any], ...]
    tbs: Tbs | msgspec.Raw
    time: str
    token: TokenFacts | msgspec.Raw
    trace_id: str
    trail: TrailFacts | msgspec.Raw
    use: str
    v: int


FIELDS: tuple[str, ...] = _Leaf.__struct_fields__
"""Every field that a leaf has; absent is empty, never missing."""


def encode(draft: Draft, *, log: str, index: int, time: str, salt: str, trail: TrailFacts | None) -> bytes:
    """The bytes of a draft that has been given its place.

    Args:
        draft: what is recorded.
        log: the origin of the log.
        index: position in the log, from 0.
        time: RFC 3339, UTC, microseconds; never earlier than the leaf before.
        salt: 32 hex digits of randomness, so that a hash in a proof cannot be guessed back.
        trail: place in the workload's chain; None for a record about the broker itself.

    Raises:
        LeafTooLargeError: more than 65,535 bytes.
    """
    leaf = _encode(
        _Leaf(
            approvals=draft.approvals,
            body=draft.body,
            decision=draft.decision,
            index=index,
            key=draft.key or EMPTY,
            kind=draft.kind.value,
            log=log,
            operation_id=draft.operation_id,
            outcome=draft.outcome.value if draft.outcome else "",
            request=draft.request,
            retry_of=draft.retry_of,
            salt=salt,
            signature_sha256=draft.signature_sha256,
            svid=draft.svid or EMPTY,
            taken=draft.taken,
            tbs=draft.tbs or EMPTY,
            time=time,
            token=draft.token or EMPTY,
            trace_id=draft.trace_id,
            trail=trail or EMPTY,
            use=draft.use,
            v=RECORD_VERSION,
        )
    )
    if len(leaf) > MAX_LEAF_BYTES:
        msg = f"a leaf of {len(leaf)} bytes"
        raise LeafTooLargeError(msg)
    return leaf


def leaf_hash(leaf: bytes) -> bytes:
    """SHA-256 of 0x00 and the leaf (RFC 6962 section 2.1); 32 bytes."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def decode(leaf: bytes) -> dict[str, Any]:
    """A leaf as plain values.

    Raises:
        ValueError: not a JSON object.
    """
    try:
        value = _decode(leaf)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as err:
        msg = "not JSON"
        raise ValueError(msg) from err
    if not isinstance(value, dict):
        msg = "not a JSON object"
        raise ValueError(msg)  # noqa: TRY004  the data is wrong, not the program
    return value


def canonical(value: Any) -> bytes:
    """Canonical JSON of plain values or structs whose keys are ASCII."""
    return _encode(value)
