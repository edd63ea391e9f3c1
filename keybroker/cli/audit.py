"""`keybroker audit`: the record."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from keybroker.cli import output
from keybroker.cli.connection import BrokerId, BundleFile, SvidFile, Url, connect
from keybroker.cli.moments import moment
from keybroker.clock import SystemClock

if TYPE_CHECKING:
    from keybroker.client import Client, Record

app = typer.Typer(no_args_is_help=True, help="Read the record of every use and every refusal.")

Workload = Annotated[str, typer.Option("--workload", metavar="ID", help="Only records of this SPIFFE ID.")]
KeyName = Annotated[str, typer.Option("--key", metavar="NAME", help="Only records about this key.")]
Kind = Annotated[str, typer.Option("--kind", help="Only this kind: intent, outcome, denial, read, security, admin, start.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print each record as stored, one JSON object a line.")]
_COLUMNS = ("INDEX", "TIME", "KIND", "WORKLOAD", "KEY", "WHAT", "USE")
_POLL_S = 1.0
_WINDOWS_S = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)


@app.command()
def query(
    workload: Workload = "",
    key: KeyName = "",
    kind: Kind = "",
    outcome: Annotated[str, typer.Option("--outcome", help="Only uses that ended like this: signed, failed, withheld, unknown.")] = "",
    use: Annotated[str, typer.Option("--use", metavar="ULID", help="Only records of this use.")] = "",
    since: Annotated[str, typer.Option("--since", metavar="TIME", help="Not before: 2h (ago), or 2026-11-24T08:00:00Z.")] = "",
    until: Annotated[str, typer.Option("--until", metavar="TIME", help="Before: 5m (ago), or 2026-11-24T18:00:00Z.")] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many records.")] = 100,
    is_all: Annotated[bool, typer.Option("--all", help="All records, however many.")] = False,
    as_json: JsonLines = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Find records, oldest first.

    Examples:

        keybroker audit query --key orders --since 2h

        keybroker audit query --kind denial --since 2026-11-24T00:00:00Z --json

        keybroker audit query --workload spiffe://example.org/payments/api --all
    """
    now_us = SystemClock().now_us()
    first, last = (moment(text, now_us) if text else "" for text in (since, until))
    with connect(url, svid, bundle, broker_id) as broker:
        found = broker.iter_records(workload=workload, key=key, kind=kind, outcome=outcome, use=use, since=first, until=last)
        _show(found if is_all else islice(found, limit), as_json=as_json)
        if not is_all and next(found, None) is not None:
            output.note(f"there are more than {limit}: --all, or a larger --limit, shows them")


@app.command()
def tail(
    count: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many records to begin with.")] = 10,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new records as they come, until interrupted.")] = False,
    workload: Workload = "",
    key: KeyName = "",
    kind: Kind = "",
    as_json: JsonLines = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Show the newest records, and follow the log.

    Reading the record is itself recorded. Our own reads are left out here, unless --kind read asks for them.

    Examples:

        keybroker audit tail

        keybroker audit tail -f --kind denial

        keybroker audit tail -f --json | jq 'select(.outcome == "signed")'
    """
    filters = {"workload": workload, "key": key, "kind": kind}
    with connect(url, svid, bundle, broker_id) as broker:
        ours = "" if kind == "read" else broker.whoami().spiffe_id
        newest = _newest(broker, filters, count, ours)
        _show(newest, as_json=as_json)
        if follow:
            _follow(broker, filters, newest[-1] if newest else None, ours, as_json=as_json)


@app.command()
def show(
    index: Annotated[int, typer.Argument(min=0, help="The record's index in the log.")],
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


def _newest(broker: Client, filters: dict[str, str], count: int, ours: str) -> list[Record]:
    """The newest records: looks back a second, then further and further, so that a long log is not read from its start."""
    now_us = SystemClock().now_us()
    found: deque[Record] = deque(maxlen=count)
    for seconds in (*_WINDOWS_S, 0):
        since = moment(f"{seconds}s", now_us) if seconds else ""
        found = deque(_others(broker.iter_records(**filters, since=since), ours), maxlen=count)
        if len(found) == count:
            break
    return list(found)


def _follow(broker: Client, filters: dict[str, str], last: Record | None, ours: str, *, as_json: bool) -> None:
    """Print what comes after a record, until interrupted. Times in the log never fall, so a time is a place to go on from."""
    index, since = (last.index, last.time) if last else (-1, moment("1s", SystemClock().now_us()))
    while True:
        time.sleep(_POLL_S)
        for record in broker.iter_records(**filters, since=since):
            is_new, index, since = record.index > index, max(record.index, index), record.time
            if is_new:
                _show(_others([record], ours), as_json=as_json)


def _others(records: Iterable[Record], ours: str) -> Iterator[Record]:
    return (record for record in records if record.kind != "read" or record.trail != ours)


def _show(records: Iterable[Record], *, as_json: bool) -> None:
    if as_json:
        for record in records:
            output.say(record.raw.decode())
    else:
        output.table(_COLUMNS, (_row(record) for record in records))


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
