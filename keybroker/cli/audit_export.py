"""`keybroker audit export`, `verify` and `prove`: take the record away, and check it without us."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keybroker.cli import output
from keybroker.cli.connection import BrokerId, BundleFile, SvidFile, Url, connect
from keybroker.cli.exits import ExitStatus
from keybroker.cli.out_file import replaced
from keybroker.errors import ConfigError, KeyBrokerError

if TYPE_CHECKING:
    from keybroker.audit.export import Report
    from keybroker.audit.note import VerifierKey
    from keybroker.client import Client

_SHOWN = 20
_FILE = {"exists": True, "dir_okay": False}
_Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write it.", dir_okay=False)]
LogKey = Annotated[
    str,
    typer.Option(
        "--log-key", metavar="VKEY", help="The log's verifier key, or a file that holds it, such as log.vkey.", show_default=False
    ),
]


class UnverifiedError(KeyBrokerError):
    """It is not what was signed, or nobody signed it."""


def export(
    out: _Out,
    workload: Annotated[
        str, typer.Option("--workload", metavar="ID", help="Only the trail of this SPIFFE ID, with the proof that it is complete.")
    ] = "",
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Write the record to a file that can be verified without the broker.

    The whole record, or the trail of one workload; who may read only its own trail gets that. One JSON object a line, the bytes that
    are hashed, and the signed checkpoints that they must agree with. Every part that is fetched is itself recorded.

    Examples:

        keybroker audit export --out record.ndjson

        keybroker audit export --workload spiffe://example.org/payments/api --out trail.ndjson
    """
    records = 0
    with connect(url, svid, bundle, broker_id) as broker, replaced(out) as file, output.busy(f"writing {out.name}"):
        for line in _lines(broker, workload):
            file.write(line + b"\n")
            records += line.startswith(b'{"approvals":')
    output.note(f"{records} records in {output.visible(str(out))}")


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An export, or a proof of one record.", **_FILE)],
    log_key: LogKey,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option(
            "--checkpoint", metavar="FILE", help="A checkpoint that was kept earlier: the log must have grown from it. Repeatable.", **_FILE
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Verify an export or a proof, with the log's public key and nothing else: no broker, no network.

    Every record's bytes, place, time and chain; every statement about where the trails end; the Merkle tree over all of them; every
    signature of the log's key. Exit status 1 where anything is not as it was signed, with the first record that can be meant.

    Examples:

        keybroker audit verify record.ndjson --log-key log.vkey

        keybroker audit verify record.ndjson --log-key log.vkey --checkpoint last-month.checkpoint
    """
    from keybroker.audit import export as exports
    from keybroker.audit.note import NoteError
    from keybroker.audit.proof import HEADER

    key = verifier_key(log_key, "--log-key")
    with file.open("rb") as stream:
        is_proof = stream.read(len(HEADER)) == HEADER.encode()
        stream.seek(0)
        if is_proof:
            _verify_proof(stream.read(exports.MAX_LINE_BYTES), key, as_json=as_json)
            return
        try:
            with output.measured(stream, f"verifying {file.name}") as lines:
                report = exports.verify(lines, key, [path.read_bytes() for path in checkpoints or ()])
        except NoteError as err:
            raise UnverifiedError(f"--checkpoint: {err}") from err
    if as_json:
        output.json_object(_as_json(report))
    else:
        _show(report, key)
    if report.findings:
        raise typer.Exit(ExitStatus.FAILED)


def log_key(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="The configuration, with the section `hsm`.")],
) -> None:
    """Print the verifier key of the log whose key is in a token, for `authority.checkpoints.key` and for auditors.

    Logs in to the token once, as the hsm room's user.

    Examples:

        keybroker audit log-key --config /etc/keybroker/hsm.yaml > log.vkey
    """
    from keybroker import config as configuration
    from keybroker.cli.rooms import load_part

    keys = load_part("hsm", "keybroker.hsm.inspect").log_keys(config, configuration.load(config))
    if not keys:
        raise ConfigError(f"{config}: no token has a `log`; name the log's key under `hsm.tokens.NAME.log`")
    for key in keys:
        output.say(key)


def prove(
    index: Annotated[int, typer.Argument(metavar="INDEX", min=0, help="The record's index in the log.")],
    out: _Out,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Write a proof that one record is in the log (C2SP tlog-proof). The record itself is in it, as extra data.

    A record that is newer than the newest checkpoint can be proved a few seconds later.

    Examples:

        keybroker audit prove 812 --out 812.tlog-proof
    """
    from dataclasses import replace

    from keybroker.audit.proof import TlogProof

    with connect(url, svid, bundle, broker_id) as broker, replaced(out) as file:
        proof = TlogProof.parse(broker.inclusion_proof(index))
        file.write(bytes(replace(proof, extra=broker.record(index).raw)))
    output.note(f"proof of record {index} in {output.visible(str(out))}")


def _lines(broker: Client, workload: str) -> Iterator[bytes]:
    """The lines of an export, part by part."""
    import msgspec

    from keybroker.audit.export import NEXT_START, NextLine

    start: int | None = 0
    while start is not None:
        part, start = broker.export(start, workload), None
        for line in part.splitlines():
            if line.startswith(NEXT_START):
                start = msgspec.json.decode(line, type=NextLine).next
            else:
                yield line


def verifier_key(text: str, option: str) -> VerifierKey:
    """A verifier key, or what a file of that name holds.

    Raises:
        UnverifiedError: neither.
    """
    from keybroker.audit.note import NoteError, VerifierKey

    try:
        return VerifierKey.parse(text if "+" in text and not Path(text).exists() else Path(text).read_text().strip())
    except OSError as err:
        raise UnverifiedError(f"{option} {text}: {err.strerror}; give the key itself, NAME+ID+BASE64, or a file that holds it") from err
    except (NoteError, UnicodeDecodeError) as err:
        raise UnverifiedError(f"{option}: {err}") from err


def _verify_proof(data: bytes, key: VerifierKey, *, as_json: bool) -> None:
    from keybroker.audit.leaf import decode, leaf_hash
    from keybroker.audit.merkle import ProofError
    from keybroker.audit.note import NoteError
    from keybroker.audit.proof import TlogProof

    try:
        proof = TlogProof.parse(data)
        head = proof.verify(leaf_hash(proof.extra), key).checkpoint
        record = decode(proof.extra)
    except (NoteError, ProofError, ValueError) as err:
        raise UnverifiedError(f"not proved: {err}") from err
    if as_json:
        output.json_object({"verified": True, "index": proof.index, "log": key.name, "size": head.size, "record": record})
        return
    output.facts([("verified", f"record {proof.index} is among the first {head.size} of {key.name}")])
    output.say(output.indented(proof.extra))


def _show(report: Report, key: VerifierKey) -> None:
    head = report.checkpoint
    output.facts(
        [
            ("verified", "NO" if report.findings else "yes"),
            ("records", str(report.records)),
            ("of", f"the trail of {report.trail}" if report.trail else f"{report.trails} workloads and the broker itself"),
            ("log", key.name),
            ("signed", f"{report.covered} of them, by the checkpoint of size {head.size}" if head else "none of them"),
            ("sha256", report.digest),
        ]
    )
    for finding in report.findings[:_SHOWN]:
        place = f"record {finding.index}" if finding.index == finding.last else f"one of the records {finding.index} to {finding.last}"
        output.note(f"{place}: {finding.rule}")
    if report.first:
        output.note(f"the first bad index is {report.first.index}")


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "verified": not report.findings,
        "records": report.records,
        "covered": report.covered,
        "trail": report.trail,
        "workloads": report.trails,
        "size": report.checkpoint.size if report.checkpoint else 0,
        "findings": [{"index": each.index, "last": each.last, "rule": each.rule} for each in report.findings],
        "first_bad": report.first.index if report.first else None,
        "sha256": report.digest,
    }
