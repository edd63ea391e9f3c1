"""`keybroker break-glass`: go without what a grant demands for a while, and review that."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from keybroker.cli import output
from keybroker.cli.arguments import UsageError
from keybroker.cli.connection import BrokerId, BundleFile, Json, SvidFile, Url, connect

if TYPE_CHECKING:
    from keybroker.client.results import Glass

app = typer.Typer(no_args_is_help=True, help="In an emergency: waive what a grant demands, for a while.")

_DURATION = re.compile(r"([1-9][0-9]{0,5})([smh])")


@app.command("open")
def open_(
    grant: Annotated[str, typer.Option("--grant", metavar="ID", help="The grant whose hours, limits and quorum are waived.")],
    duration: Annotated[str, typer.Option("--for", metavar="TIME", help="How long: 90s, 30m, 1h.")],
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; stands in the record.")],
    as_json: Json = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Waive hours, limits and quorum of a grant for a while. It ends by itself, and somebody else has to review it.

    Examples:

        keybroker break-glass open --grant release --for 30m --reason "incident 7: nobody else can be reached"
    """
    found = _DURATION.fullmatch(duration)
    if not found:
        raise UsageError(f"{output.visible(duration)} is no duration; write it like 90s, 30m or 1h")
    seconds = int(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
    with connect(url, svid, bundle, broker_id) as broker:
        glass = broker.break_glass(grant, seconds=seconds, reason=reason)
    _show(glass, as_json=as_json)


@app.command()
def close(
    glass: Annotated[str, typer.Argument(metavar="ID", help="Which, as `keybroker break-glass list` shows it.")],
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="What was found; stands in the record.")],
    as_json: Json = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """End it now. By somebody else than who opened it, this is the review.

    Examples:

        keybroker break-glass close 01M88GD5FBBXSDAAJD4DJAQY07 --note "three releases, all as planned"
    """
    with connect(url, svid, bundle, broker_id) as broker:
        closed = broker.close_glass(glass, note=note)
    _show(closed, as_json=as_json)


@app.command("list")
def list_(as_json: Json = False, url: Url = "", svid: SvidFile = "", bundle: BundleFile = "", broker_id: BrokerId = "") -> None:
    """List what has been opened and not been reviewed yet, of what we may open or close.

    Examples:

        keybroker break-glass list
    """
    with connect(url, svid, bundle, broker_id) as broker:
        found = broker.glasses()
    if as_json:
        output.json_object(found)
        return
    rows = ((each.id, each.grant, "open" if each.is_open else "to review", each.until, each.by, each.reason) for each in found)
    output.table(("ID", "GRANT", "STATE", "UNTIL", "BY", "REASON"), rows)


def _show(glass: Glass, *, as_json: bool) -> None:
    if as_json:
        output.json_object(glass)
        return
    state = "open" if glass.is_open else "reviewed" if glass.is_reviewed else "ended; somebody else has to review it"
    output.facts([("break-glass", glass.id), ("grant", glass.grant), ("state", state), ("until", glass.until), ("reason", glass.reason)])
