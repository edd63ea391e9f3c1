"""From approvals to a signature: `keybroker operations redeem`, and `keybroker sign --wait`."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keybroker.cli import output
from keybroker.cli.arguments import UsageError, Wait, digest_of
from keybroker.cli.connection import BrokerId, BundleFile, Json, SvidFile, Url, connect
from keybroker.cli.operations import Id
from keybroker.cli.out_file import replaced
from keybroker.cli.sign import show_signed
from keybroker.clock import SystemClock, from_rfc3339
from keybroker.model.key import Algorithm

if TYPE_CHECKING:
    from keybroker.client import Client, SignedUse

_PAUSE_S = 1.0
_WAIT_S = 300.0


def redeem(
    id_: Id,
    file: Annotated[Path | None, typer.Option("--file", metavar="FILE", help="The message again: Ed25519 needs it.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the signature's bytes there.")] = None,
    is_patient: Wait = False,
    idempotency_key: Annotated[
        str, typer.Option("--idempotency-key", metavar="TEXT", help="Asking again with the same text is the same use, for 24 hours.")
    ] = "",
    as_json: Json = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Use what was approved, once: the same answer as `keybroker sign`.

    Exit status 4 where an approval is missing or a cool-off is not over.

    Examples:

        keybroker operations redeem 01JDGQ4F8M3Z6T9W2X5Y7ABCDE --out release.sig

        keybroker operations redeem --wait 01JDGQ4F8M3Z6T9W2X5Y7ABCDE
    """
    from keybroker.client import AUTO, PendingError

    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(connect(url, svid, bundle, broker_id))
        subject = broker.operation(id_).subject
        message = _message(file, subject.algorithm, subject.tbs.hash, subject.tbs.value)
        target = stack.enter_context(replaced(out)) if out is not None else None
        try:
            if is_patient:
                signed = wait_and_redeem(broker, id_, message, idempotency_key)
            else:
                signed = broker.redeem(id_, message=message, idempotency_key=idempotency_key or AUTO)
        except PendingError as err:
            if as_json:
                output.json_object(err.pending)
            raise
        if target is not None:
            target.write(signed.signature)
    show_signed(signed, out, as_json=as_json)


def wait_and_redeem(broker: Client, id_: str, message: bytes | None, idempotency_key: str = "") -> SignedUse:
    """Wait until an operation is decided and cooled off, and redeem it. It ends: every operation expires.

    Raises:
        RefusalError: it was refused, or has expired.
    """
    from keybroker.client import AUTO, PendingError

    key = idempotency_key or AUTO
    while True:
        while broker.wait_for(id_, timeout_s=_WAIT_S).state == "pending":
            pass  # the broker ends it with its expiry
        try:
            return broker.redeem(id_, message=message, idempotency_key=key)
        except PendingError as err:
            moment = err.pending.needs.not_before
        left = (from_rfc3339(moment) - SystemClock().now_us()) / 1_000_000 if moment else 0.0
        time.sleep(min(max(left, _PAUSE_S), _WAIT_S))


def _message(file: Path | None, algorithm: str, hash_name: str, digest: str) -> bytes | None:
    """The message, where the algorithm signs messages.

    Raises:
        UsageError: it is needed and not given, or it is not what was approved.
    """
    if file is None:
        if algorithm == Algorithm.ED25519.value:
            raise UsageError("Ed25519 signs whole messages, and the broker keeps digests only: give the message again with --file")
        return None
    found = digest_of(file, hash_name)
    if found != digest:
        raise UsageError(f"{file} is not what was approved: its {hash_name} is {found}, not {digest}")
    return file.read_bytes() if algorithm == Algorithm.ED25519.value else None
