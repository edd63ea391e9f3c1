"""`keybroker sign`: one use of one key."""

from __future__ import annotations

import base64
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keybroker.cli import output
from keybroker.cli.arguments import AlgorithmName, Form, InputFile, KeyName, Wait, opened
from keybroker.cli.connection import BrokerId, BundleFile, Json, SvidFile, Url, connect
from keybroker.cli.exits import ExitStatus
from keybroker.cli.out_file import replaced
from keybroker.errors import InvalidError, TooLargeError
from keybroker.model.key import Algorithm
from keybroker.model.request import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from keybroker.client import Explanation, SignedUse


def sign(
    file: InputFile,
    key: KeyName,
    algorithm: AlgorithmName,
    is_digest: Annotated[
        bool, typer.Option("--digest", help="Hash FILE here and send only its digest. Needs a grant of sign-digest.")
    ] = False,
    form: Form = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the signature's bytes there.")] = None,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, for people who read the record.")] = "",
    media_type: Annotated[str, typer.Option("--media-type", metavar="TYPE", help="Of FILE, for rules that look at it.")] = "",
    idempotency_key: Annotated[
        str, typer.Option("--idempotency-key", metavar="TEXT", help="Asking again with the same text is the same use, for 24 hours.")
    ] = "",
    is_question: Annotated[
        bool, typer.Option("--explain", help="Show the decision and use no key. Exit status 3 where it would be denied.")
    ] = False,
    is_patient: Wait = False,
    as_json: Json = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Sign a file with a key of the broker.

    Prints the signature in base64, or writes its bytes to --out, whole or not at all. An answer that is lost on the way is
    asked for again, and is the same use of the key.

    Where others have to approve it first, nothing is signed, and the exit status is 4. With --wait, the approvals are waited for,
    and then used.

    Examples:

        keybroker sign --key orders --alg ES256 --out order.sig order.json

        keybroker sign --key release --alg ES256 --digest --reason "release 2.1" big.tar.gz

        keybroker sign --key release --alg ES256 --digest --wait --out release.sig release.tar.gz

        echo hello | keybroker sign --key sessions --alg Ed25519 -
    """
    from keybroker.cli.redeeming import wait_and_redeem
    from keybroker.client import AUTO, PendingError

    content = _content(file, algorithm, is_digest=is_digest)
    message, digest = (None, content) if is_digest else (content, None)
    with contextlib.ExitStack() as stack:
        # Before the key is used: a signature that cannot be written is a use for nothing.
        target = stack.enter_context(replaced(out)) if out is not None and not is_question else None
        broker = stack.enter_context(connect(url, svid, bundle, broker_id))
        if is_question:
            explanation = broker.explain(key, algorithm, message=message, digest=digest, format=form, reason=reason, media_type=media_type)
            _show_explanation(explanation, as_json=as_json)
            raise typer.Exit(ExitStatus.DONE if explanation.allow else ExitStatus.DENIED)
        try:
            signed = broker.sign(
                key,
                algorithm,
                message=message,
                digest=digest,
                format=form,
                reason=reason,
                media_type=media_type,
                idempotency_key=idempotency_key or AUTO,
            )
        except PendingError as err:
            if not is_patient:
                if as_json:
                    output.json_object(err.pending)
                raise
            output.note(f"waiting: {output.visible(str(err))}")
            signed = wait_and_redeem(broker, err.pending.operation, content if algorithm.signs_message else None)
        if target is not None:
            target.write(signed.signature)
    show_signed(signed, out, as_json=as_json)


def _content(file: Path, algorithm: Algorithm, *, is_digest: bool) -> bytes:
    """The message, or its digest.

    Raises:
        TooLargeError: the message is larger than a broker takes.
        InvalidError: the same, of an algorithm that has no digest form.
    """
    from keybroker.client.verify import signed_content

    with opened(file) as stream:
        if is_digest and not algorithm.signs_message:
            return signed_content(algorithm, stream)
        message = stream.read(MAX_MESSAGE_BYTES + 1)
    if algorithm.signs_message and (is_digest or len(message) > MAX_MESSAGE_BYTES):
        raise InvalidError(f"{algorithm.value} signs whole messages of at most {MAX_MESSAGE_BYTES} bytes; there is no --digest for it")
    if len(message) > MAX_MESSAGE_BYTES:
        raise TooLargeError(f"the message is larger than {MAX_MESSAGE_BYTES} bytes")
    return message


def show_signed(signed: SignedUse, out: Path | None, *, as_json: bool) -> None:
    """A signature that is not in a file yet, and where its use is on record."""
    if as_json:
        output.json_object(signed)
    elif out is not None:
        places = signed.records
        output.say(f"{output.visible(str(out))}: {signed.algorithm.value} by {signed.key} version {signed.version}")
        output.say(f"on record: use {signed.use}, records {places.intent} and {places.outcome} of {places.log}")
    else:
        output.say(base64.b64encode(signed.signature).decode())


def _show_explanation(explanation: Explanation, *, as_json: bool) -> None:
    if as_json:
        output.json_object(explanation)
        return
    output.facts(
        [
            ("decision", "allowed" if explanation.allow else "denied"),
            ("reasons", ", ".join(explanation.reasons)),
            ("grants", ", ".join(explanation.grants)),
            ("needs", ", ".join(explanation.needs)),
            *[
                (f"limit of {each.grant}", f"{each.left} of {each.max} left in {each.window_s} s, per {each.per}")
                for each in explanation.limits
            ],
            ("policy", explanation.policy),
        ]
    )
