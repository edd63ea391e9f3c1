"""`keybroker witness` and `keybroker audit cosign`: somebody else remembers the log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keybroker.cli.audit_export import LogKey, UnverifiedError, verifier_key
from keybroker.cli.connection import BrokerId, BundleFile, SvidFile, Url, connect
from keybroker.cli.out_file import replaced
from keybroker.errors import ConfigError, KeyBrokerError

if TYPE_CHECKING:
    from keybroker.audit.note import VerifierKey
    from keybroker.client import Client

_SECONDS = 20.0
_CONFLICT, _DONE = 409, 200


class WitnessRefusedError(KeyBrokerError):
    """The witness did not cosign."""


def witness(
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="This witness's name, such as witness.example.org/w1.")],
    state: Annotated[
        Path, typer.Option("--state", metavar="DIR", help="Its key and its memory; made if it does not exist.", file_okay=False)
    ],
    logs: Annotated[
        list[str], typer.Option("--log-key", metavar="VKEY", help="Verifier key of a log, or a file that holds it. Repeatable.")
    ],
    listen: Annotated[str, typer.Option("--listen", metavar="ADDRESS:PORT", help="Where to listen, plain HTTP.")] = "127.0.0.1:8600",
) -> None:
    """Run a witness (C2SP tlog-witness): remember the last checkpoint of each log, cosign only what continues it.

    Run it elsewhere than the broker, by other people. Prints one line, `ready URL VKEY`. Never restore its state from a backup.

    Examples:

        keybroker witness --name witness.example.org/w1 --state w1 --log-key log.vkey
    """
    from keybroker.audit.note import is_key_name
    from keybroker.witness import room

    if not is_key_name(name):
        raise ConfigError("--name: not empty, without spaces and `+`")
    room.serve(room.open_witness(name, state, [verifier_key(text, "--log-key") for text in logs]), listen)


def cosign(
    address: Annotated[str, typer.Option("--witness", metavar="URL", help="The witness, http(s)://...")],
    witness_key: Annotated[str, typer.Option("--witness-key", metavar="VKEY", help="The witness's verifier key, or a file that holds it.")],
    log_key: LogKey,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write the cosigned checkpoint.", dir_okay=False)],
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Have a witness cosign the newest checkpoint, and keep it.

    Run it regularly, say every minute, as whoever may read the log. Exit status 1 where the witness does not cosign: then the log
    is not the one that it saw before, or the witness has lost its memory.

    Examples:

        keybroker audit cosign --witness http://127.0.0.1:8600 --witness-key w1.vkey --log-key log.vkey --out log.checkpoint
    """
    from keybroker.audit.checkpoint import SignedCheckpoint
    from keybroker.audit.note import NoteError

    log, key = verifier_key(log_key, "--log-key"), verifier_key(witness_key, "--witness-key")
    with connect(url, svid, bundle, broker_id) as broker, replaced(out) as file:
        note = broker.checkpoint()
        try:
            head = SignedCheckpoint.open(note, log).checkpoint
        except NoteError as err:
            raise UnverifiedError(f"the broker's checkpoint: {err}") from err
        file.write(_cosigned(broker, address, key, log, note, head.size))


def _cosigned(broker: Client, address: str, key: VerifierKey, log: VerifierKey, note: bytes, size: int) -> bytes:
    """The note with the witness's signature. Asked from size 0 first, which tells what the witness remembers."""
    import httpcore

    from keybroker.audit.checkpoint import SignedCheckpoint
    from keybroker.audit.note import Note, NoteError, NoteSignature, parse_decimal
    from keybroker.witness.rules import AddCheckpoint

    def ask(old: int, proof: tuple[bytes, ...]) -> tuple[int, bytes]:
        timeout = dict.fromkeys(("connect", "read", "write", "pool"), _SECONDS)
        content = bytes(AddCheckpoint(old, proof, note))
        answer = httpcore.request("POST", f"{address.rstrip('/')}/add-checkpoint", content=content, extensions={"timeout": timeout})
        return answer.status, answer.content

    try:
        status, body = ask(0, ())
        if status == _CONFLICT:
            old = parse_decimal(body.decode().removesuffix("\n"))
            if old > size:
                raise WitnessRefusedError(f"the witness has seen {old} records, and the broker's log has {size}: it was rolled back")
            status, body = ask(old, broker.consistency_proof(old, size))
        if status != _DONE:
            raise WitnessRefusedError(f"the witness does not cosign ({status}): {body[:200].decode(errors='replace').strip()}")
        parsed = Note.parse(note)
        lines = body.decode().split("\n")[:-1]
        cosigned = bytes(Note(parsed.text, (*parsed.signatures, *map(NoteSignature.parse, lines))))
        if key not in SignedCheckpoint.open(cosigned, log, [key]).cosignatures:
            raise WitnessRefusedError("the witness did not sign with the key in --witness-key")
    except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, httpcore.UnsupportedProtocol) as err:
        raise WitnessRefusedError(f"{address}: no answer ({type(err).__name__})") from err
    except (NoteError, UnicodeDecodeError) as err:
        raise WitnessRefusedError(f"the witness's answer: {err}") from err
    return cosigned
