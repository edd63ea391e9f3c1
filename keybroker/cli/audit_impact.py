"""`keybroker audit impact`: what did it sign, for whom, by which rule; as text, as a report, and as a list to work through."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from keybroker.cli import output
from keybroker.cli.arguments import UsageError
from keybroker.cli.connection import BrokerId, BundleFile, Json, SvidFile, Url, connect
from keybroker.cli.moments import moment
from keybroker.cli.out_file import replaced
from keybroker.clock import SystemClock

if TYPE_CHECKING:
    from keybroker.client import Client, Record
    from keybroker.model.impact import Impact


def impact(
    workload: Annotated[str, typer.Option("--workload", metavar="ID", help="What this SPIFFE ID did.")] = "",
    key: Annotated[str, typer.Option("--key", metavar="NAME", help="What was done with this key.")] = "",
    serial: Annotated[str, typer.Option("--serial", metavar="HEX", help="What this certificate did, by its serial number.")] = "",
    certificate: Annotated[
        Path | None, typer.Option("--certificate", metavar="FILE", help="The same, by the certificate (PEM).", exists=True, dir_okay=False)
    ] = None,
    person: Annotated[str, typer.Option("--person", metavar="NAME", help="What this person approved.")] = "",
    since: Annotated[str, typer.Option("--since", metavar="TIME", help="Not before: 2h (ago), or 2026-11-24T08:00:00Z.")] = "",
    until: Annotated[str, typer.Option("--until", metavar="TIME", help="Before: 5m (ago), or 2026-11-24T18:00:00Z.")] = "",
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a report with a picture, one HTML file.")] = None,
    text: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write a report in Markdown.")] = None,
    uses: Annotated[
        Path | None, typer.Option("--uses", metavar="FILE", help="Write every use, one JSON object a line: what to revoke or to look at.")
    ] = None,
    as_json: Json = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Say what an identity, a key, a certificate, a person or a time window signed and tried to sign.

    What is given narrows together. By key and content, with first and last use, the grants that let it, who approved, from where, with
    which certificates; and for a key or a person, what else the same certificates did.

    Examples:

        keybroker audit impact --workload spiffe://example.org/payments/api --since 7d

        keybroker audit impact --key release --html release.html --uses release.ndjson

        keybroker audit impact --certificate stolen.pem --json
    """
    from keybroker.cli import impact_report

    if certificate is not None:
        if serial:
            raise UsageError("--serial and --certificate say the same; give one of them")
        serial = _serial_of(certificate)
    now_us = SystemClock().now_us()
    question = {
        "workload": workload,
        "key": key,
        "svid": serial.lower(),
        "person": person,
        "since": moment(since, now_us) if since else "",
        "until": moment(until, now_us) if until else "",
    }
    if not any(question.values()):
        raise UsageError("of whom, or when? Give --workload, --key, --serial, --certificate, --person, --since or --until")
    with connect(url, svid, bundle, broker_id) as broker:
        with output.busy("adding up"):
            found = broker.impact(**question)
        if page:
            _write(page, impact_report.page(found).encode())
        if text:
            _write(text, impact_report.markdown(found).encode())
        if uses:
            with replaced(uses) as file, output.busy(f"writing {uses.name}"):
                for use in _uses(broker, question):
                    file.write(msgspec.json.encode(use) + b"\n")
    if as_json:
        output.json_object(found)
    else:
        _show(found)


def _show(found: Impact) -> None:
    from keybroker.cli import impact_report

    output.facts(impact_report.facts(found))
    for title, header, rows in impact_report.tables(found):
        output.say()
        output.say(title)
        output.table(header, rows)


def _write(file: Path, data: bytes) -> None:
    with replaced(file) as out:
        out.write(data)


def _uses(broker: Client, question: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Every use that has ended, with what was signed; an intent and its outcome as one."""
    same = ("workload", "key", "since", "until")
    intents: dict[str, Record] = {}
    for record in broker.iter_records(**{name: question[name] for name in same}):  # type: ignore[arg-type]  # names of filters
        if record.kind == "intent" and _fits(record, question):
            intents[record.use] = record
        elif record.kind == "outcome" and record.use in intents:
            yield _use(intents.pop(record.use), record)


def _fits(record: Record, question: dict[str, str]) -> bool:
    fields = record.fields
    is_of_svid = question["svid"] in {"", fields["svid"].get("serial")}
    return is_of_svid and (not question["person"] or question["person"] in _people(fields))


def _people(fields: dict[str, Any]) -> list[str]:
    """Who approved, as their statements say (DSSE envelopes; docs/reference/approvals.md)."""
    return [json.loads(base64.b64decode(each["payload"]))["person"] for each in fields["approvals"]]


def _use(intent: Record, outcome: Record) -> dict[str, Any]:
    fields, request = intent.fields, intent.fields["request"]
    return {
        "use": intent.use,
        "time": intent.time,
        "outcome": outcome.outcome,
        "workload": intent.trail,
        "key": fields["key"].get("name", ""),
        "version": fields["key"].get("version", 0),
        "operation": request.get("operation", ""),
        "algorithm": request.get("algorithm", ""),
        "tbs": fields["tbs"],
        "signature_sha256": outcome.fields["signature_sha256"],
        "media_type": request.get("content", {}).get("media_type", ""),
        "fields": request.get("content", {}).get("fields", {}),
        "reason": request.get("reason", ""),
        "grants": fields["decision"].get("grants", []),
        "approved_by": _people(fields),
        "svid": fields["svid"],
        "records": {"intent": intent.index, "outcome": outcome.index},
    }


def _serial_of(file: Path) -> str:
    """The serial number of the first certificate in a file, lower-case hex as in the record."""
    from cryptography import x509

    try:
        return format(x509.load_pem_x509_certificates(file.read_bytes())[0].serial_number, "x")
    except (OSError, ValueError) as err:
        raise UsageError(f"{file}: not a PEM file with a certificate") from err
