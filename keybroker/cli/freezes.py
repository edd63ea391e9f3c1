"""`keybroker freeze`, `keybroker unfreeze`, `keybroker freezes`: stop things, and let them go on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from keybroker.cli import output
from keybroker.cli.connection import BrokerId, BundleFile, Json, SvidFile, Url, connect

if TYPE_CHECKING:
    from keybroker.client.results import Freeze


def freeze(
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; stands in the record.")],
    workload: Annotated[str, typer.Option("--workload", metavar="ID", help="Stop this SPIFFE ID.")] = "",
    key: Annotated[str, typer.Option("--key", metavar="NAME", help="Stop this key, for everybody.")] = "",
    token: Annotated[str, typer.Option("--token", metavar="NAME", help="Stop all keys of this token.")] = "",
    everything: Annotated[bool, typer.Option("--everything", help="Stop all keys, for everybody.")] = False,
    as_json: Json = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Stop a workload, a key, a token or everything, at once.

    Uses that are under way are stopped too: nothing of them is released.

    Examples:

        keybroker freeze --workload spiffe://example.org/payments/api --reason "incident 7"

        keybroker freeze --everything --reason "incident 7"
    """
    with connect(url, svid, bundle, broker_id) as broker:
        made = broker.freeze(workload=workload, key=key, token=token, everything=everything, reason=reason)
    _show(made, "frozen", as_json=as_json)


def unfreeze(
    freeze: Annotated[str, typer.Argument(metavar="ID", help="The freeze, as `keybroker freezes` shows it.")],
    operation: Annotated[str, typer.Option("--operation", metavar="ID", help="What others have approved.")] = "",
    as_json: Json = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Lift a freeze.

    Where the rules want others to approve that, it begins an operation (exit status 4); repeat it with --operation when they have.

    Examples:

        keybroker unfreeze 01M88GD5FBBXSDAAJD4DJAQY07
    """
    with connect(url, svid, bundle, broker_id) as broker:
        lifted = broker.unfreeze(freeze, operation=operation)
    _show(lifted, "lifted", as_json=as_json)


def freezes(as_json: Json = False, url: Url = "", svid: SvidFile = "", bundle: BundleFile = "", broker_id: BrokerId = "") -> None:
    """List the freezes that are in force, of what we may freeze or unfreeze.

    Examples:

        keybroker freezes
    """
    with connect(url, svid, bundle, broker_id) as broker:
        found = broker.freezes()
    if as_json:
        output.json_object(found)
        return
    rows = ((each.id, each.kind, each.target, each.since, each.by, each.reason) for each in found)
    output.table(("FREEZE", "KIND", "TARGET", "SINCE", "BY", "REASON"), rows)


def _show(freeze: Freeze, done: str, *, as_json: bool) -> None:
    if as_json:
        output.json_object(freeze)
    else:
        output.facts([(done, f"{freeze.kind} {freeze.target}".rstrip()), ("freeze", freeze.id), ("reason", freeze.reason)])
