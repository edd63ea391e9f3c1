"""`keybroker audit`: the record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from keybroker.cli import audit_check, audit_export, audit_impact, output
from keybroker.cli.arguments import UsageError
from keybroker.cli.connection import BrokerId, BundleFile, SvidFile, Url, connect
from keybroker.cli.moments import moment
from keybroker.cli.witness import cosign
from keybroker.clock import SystemClock
from keybroker.model.key import Algorithm
from keybroker.model.record import Outcome, RecordKind

if TYPE_CHECKING:
    from keybroker.cli.log_end import LogEnd
    from keybroker.client import Client, Record, RecordFilters

app = typer.Typer(no_args_is_help=True, help="Read the record of every use and every refusal.")
app.command()(audit_check.check)
for _command in (audit_impact.impact, audit_export.export, audit_export.verify, audit_export.prove, audit_export.log_key, cosign):
    app.command()(_command)

Workload = Annotated[
    str,
    typer.Option(
        "--workload",
        metavar="ID",
        help="Only records of this SPIFFE ID, or of those that a pattern such as spiffe://example.org/ci/* fits.",
    ),
]
KeyName = Annotated[str, typer.Option("--key", metavar="NAME", help="Only records about this key.")]
KeyVersion = Annotated[int, typer.Option("--key-version", metavar="N", min=0, help="With --key: only this version.")]
AlgorithmName = Annotated[Algorithm | None, typer.Option("--alg", help="Only requests for this algorithm.")]
Grant = Annotated[str, typer.Option("--grant", metavar="ID", help="Only what this grant allowed.")]
Svid = Annotated[str, typer.Option("--serial", metavar="HEX", help="Only what this certificate asked for, by its serial number.")]
Address = Annotated[str, typer.Option("--address", metavar="IP", help="Only what came from this address.")]
Content = Annotated[str, typer.Option("--content", metavar="NAME=VALUE", help="Only requests with this content field.")]
Kind = Annotated[RecordKind | None, typer.Option("--kind", help="Only records of this kind.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print each record as stored, one JSON object a line.")]
_COLUMNS = (("INDEX", 8), ("TIME", 27), ("KIND", 8), ("WORKLOAD", 34), ("KEY", 10), ("WHAT", 24), ("USE", 26))
_PAGE = 1_000
Show = Callable[["Iterable[Record]"], None]


@app.command()
def query(
    workload: Workload = "",
    key: KeyName = "",
    key_version: KeyVersion = 0,
    algorithm: AlgorithmName = None,
    grant: Grant = "",
    serial: Svid = "",
    address: Address = "",
    content: Content = "",
    kind: Kind = None,
    outcome: Annotated[Outcome | None, typer.Option("--outcome", help="Only uses that ended like this.")] = None,
    use: Annotated[str, typer.Option("--use", metavar="ULID", help="Only records of this use.")] = "",
    since: Annotated[str, typer.Option("--since", metavar="TIME", help="Not before: 2h (ago), or 2026-11-24T08:00:00Z.")] = "",
    until: Annotated[str, typer.Option("--until", metavar="TIME", help="Before: 5m (ago), or 2026-11-24T18:00:00Z.")] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many records.")] = 100,
    is_all: Annotated[bool, typer.Option("--all", help="All records, however many.")] = False,
    as_json: JsonLines = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values, with a header.")] = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Find records, oldest first.

    Examples:

        keybroker audit query --key orders --since 2h

        keybroker audit query --kind denial --since 2026-11-24T00:00:00Z --json

        keybroker audit query --workload 'spiffe://example.org/ci/*' --outcome signed --since 7d --all --csv
    """
    if as_json and as_csv:
        raise UsageError("--json and --csv are two formats; choose one")
    now_us = SystemClock().now_us()
    filters: RecordFilters = {
        "workload": workload,
        "key": key,
        "key_version": key_version,
        "algorithm": algorithm.value if algorithm else "",
        "grant": grant,
        "svid": serial,
        "address": address,
        "content": content,
        "kind": kind.value if kind else "",
        "outcome": outcome.value if outcome else "",
        "use": use,
        "since": moment(since, now_us) if since else "",
        "until": moment(until, now_us) if until else "",
    }
    with connect(url, svid, bundle, broker_id) as broker:
        show = _shower(as_json=as_json, as_csv=as_csv)
        if is_all:
            show(broker.iter_records(**filters))
            return
        cursor = _show_pages(broker, filters, limit, show)
    if cursor:
        output.note(f"there are more than {limit}: --all, or a larger --limit, shows them")


@app.command()
def tail(
    count: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many records to begin with.")] = 10,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new records as they come, until interrupted.")] = False,
    workload: Workload = "",
    key: KeyName = "",
    kind: Kind = None,
    as_json: JsonLines = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Show the newest records, and follow the log.

    Every look at the record is itself recorded: two for the newest records, then, with --follow, one every second while
    there is news, and fewer, down to one in ten seconds, while there is none. Our own reads are left out here, unless
    --kind read asks for them, and so are the `heads` records that come before each checkpoint.

    Examples:

        keybroker audit tail

        keybroker audit tail -f --kind denial

        keybroker audit tail -f --json | jq 'select(.outcome == "signed")'
    """
    from keybroker.cli.log_end import LogEnd

    with connect(url, svid, bundle, broker_id) as broker:
        log = LogEnd(broker, {"workload": workload, "key": key, "kind": kind.value if kind else ""})
        _shower(as_json=as_json)(_newest_and_news(log, count, is_followed=follow))


@app.command()
def show(
    index: Annotated[int, typer.Argument(metavar="INDEX", min=0, help="The record's index in the log.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as stored, on one line.")] = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Show one record whole.

    Examples:

        keybroker audit show 812
    """
    with connect(url, svid, bundle, broker_id) as broker:
        record = broker.record(index)
    output.say(record.raw.decode() if as_json else output.indented(record.raw))


def _show_pages(broker: Client, filters: RecordFilters, limit: int, show: Show) -> str | None:
    """Show at most so many records, and fetch no more; where to go on, None if there are no others."""
    cursor: str | None = ""
    while cursor is not None and limit > 0:
        page = broker.records(**filters, cursor=cursor, limit=min(limit, _PAGE))
        show(page.records)
        cursor, limit = page.next, limit - len(page.records)
    return cursor


def _newest_and_news(log: LogEnd, count: int, *, is_followed: bool) -> Iterator[Record]:
    yield from log.newest(count)
    if is_followed:
        yield from log.following()


def _shower(*, as_json: bool = False, as_csv: bool = False) -> Show:
    """What prints records in one format, as they come."""
    columns = output.Csv([name.lower() for name, _ in _COLUMNS]) if as_csv else output.Columns(_COLUMNS)

    def show(records: Iterable[Record]) -> None:
        for record in records:
            if as_json:
                output.say(record.raw.decode())
            else:
                columns.add(_row(record))

    return show


def _row(record: Record) -> tuple[str, ...]:
    return (str(record.index), record.time, record.kind, record.trail, record.key, _what(record), record.use)


def _what(record: Record) -> str:
    """In a few words: how it ended, what was asked, or what happened."""
    fields = record.fields
    if record.outcome:
        return record.outcome
    request = fields.get("request") or {}
    body = fields.get("body") or {}
    words = [str(request.get(name, "")) for name in ("operation", "algorithm")]
    words += [str(body.get(name, "")) for name in ("event", "change", "what", "code", "detail")]
    words += [str(reason) for reason in (fields.get("decision") or {}).get("reasons", ())]
    return " ".join(word for word in words if word)
