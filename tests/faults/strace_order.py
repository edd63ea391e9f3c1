"""The order oracle: what a trace says about when a record was on disk, and when a key was used and a signature left.

It knows nothing of the broker but its bytes: a leaf holds the digest in hex, a task for a worker holds it raw; an outcome holds the hash
of the signature in hex, an answer holds the signature raw. A power loss at any moment leaves what was synced before it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.faults.strace import Call

CALLS = ("write", "writev", "sendto", "sendmsg", "pwrite64", "fdatasync", "fsync")
OPTIONS = ("-xx", "-s", "65536")  # whole payloads, in hex
_HEX = re.compile(r"(?:\\x[0-9a-f]{2})+")
_SYNCS = frozenset({"fdatasync", "fsync"})


@dataclass(frozen=True, slots=True)
class Use:
    """What a client asked and got."""

    digest: bytes
    signature: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Payload:
    call: Call
    data: bytes = field(repr=False)


def violations(calls: Sequence[Call], uses: Iterable[Use]) -> list[str]:
    """Every use that broke the order, and how; empty if none did."""
    writes = [_Payload(call, _payload(call)) for call in calls if call.name not in _SYNCS]
    to_log = [write for write in writes if write.call.name == "pwrite64" and _is_log(write.call)]
    to_socket = [write for write in writes if "<UNIX" in _descriptor(write.call)]
    syncs = [call for call in calls if call.name in _SYNCS and _is_log(call) and call.succeeded]
    return [fault for use in uses for fault in _faults_of(use, to_log, to_socket, syncs)]


def _faults_of(use: Use, to_log: list[_Payload], to_socket: list[_Payload], syncs: list[Call]) -> Iterator[str]:
    digest, hashed = use.digest.hex(), hashlib.sha256(use.signature).hexdigest()
    steps = (
        ("intent", f'"value":"{digest}"', use.digest, "a key was used"),
        ("outcome", f'"signature_sha256":"{hashed}"', use.signature, "a signature was released"),
    )
    for kind, recorded, sent, what in steps:
        written = next((write.call for write in to_log if recorded.encode() in write.data), None)
        left = next((write.call for write in to_socket if sent in write.data), None)
        if written is None or left is None:
            yield f"{digest[:8]}: no trace of the {kind} or of what follows it"
            continue
        synced = next((sync for sync in syncs if sync.began > written.ended), None)
        if synced is None or not synced.ended < left.began:
            yield f"{digest[:8]}: {what} before its {kind} was on disk"


def _payload(call: Call) -> bytes:
    """All bytes of a call's arguments, its buffers and its file's name, one after another."""
    return _bytes_of(call.arguments)


def _is_log(call: Call) -> bool:
    return _bytes_of(_descriptor(call)).endswith(b"-wal")


def _descriptor(call: Call) -> str:
    """The first argument, with what strace says about the descriptor."""
    return call.arguments.partition(",")[0]


def _bytes_of(text: str) -> bytes:
    return b"".join(bytes.fromhex(each.replace("\\x", "")) for each in _HEX.findall(text))
