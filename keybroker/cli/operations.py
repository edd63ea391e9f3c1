"""`keybroker operations`: what waits for approvals."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from keybroker.cli import approval_text, output
from keybroker.cli.arguments import UsageError, digest_of
from keybroker.cli.connection import BrokerId, BundleFile, Json, SvidFile, Url, connect
from keybroker.cli.exits import ExitStatus
from keybroker.errors import KeyBrokerError

if TYPE_CHECKING:
    from keybroker.client import Client, Operation
    from keybroker.model.approval import Answer, Confirmation, Statement, Subject

app = typer.Typer(no_args_is_help=True, help="Approve what others ask for, and use what was approved.")

Id = Annotated[str, typer.Argument(metavar="ID", help="The operation, as `keybroker operations list` shows it.")]
Yes = Annotated[bool, typer.Option("--yes", help="Sign without asking. The statement says so.")]
State = Literal["pending", "ready", "redeemed", "refused", "expired"]
_COLUMNS = (
    ("OPERATION", 26),
    ("STATE", 8),
    ("KIND", 11),
    ("REQUESTER", 34),
    ("KEY", 10),
    ("APPROVED", 8),
    ("WAITS FOR ME", 20),
    ("ENDS", 27),
)
_WATCH_S = 30


class FileDiffersError(KeyBrokerError):
    """The file is not what would be signed."""


@app.command("list")
def list_(
    state: Annotated[State | None, typer.Option("--state", help="Only operations in this state.")] = None,
    is_watched: Annotated[bool, typer.Option("--watch", "-w", help="Go on with what is new or changes, until interrupted.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100, help="At most so many operations.")] = 100,
    as_json: Json = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """List the operations that we asked for or may approve, newest first.

    With --watch, what was there comes first; then each operation again whenever it changes. With --json, one a line.

    Examples:

        keybroker operations list --state pending

        keybroker operations list --watch

        keybroker operations list --json | jq -r '.operations[] | select(.yours != []) | .id'
    """
    with connect(url, svid, bundle, broker_id) as broker:
        if not is_watched:
            page = broker.operations(state=state or "", limit=limit)
            if as_json:
                output.json_object(page)
            else:
                output.table([name for name, _ in _COLUMNS], map(_row, page.operations))
            return
        columns = output.Columns(_COLUMNS)
        for operation in _changes(broker, state or "", limit):
            if as_json:
                output.json_line(operation)
            else:
                columns.add(_row(operation))


@app.command()
def show(
    id_: Id,
    wait_s: Annotated[int, typer.Option("--wait", metavar="SECONDS", min=0, help="Wait so long for it to be decided.")] = 0,
    as_json: Json = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Show one operation: exactly what an approval of it signs, and how it stands.

    Examples:

        keybroker operations show 01JDGQ4F8M3Z6T9W2X5Y7ABCDE

        keybroker operations show 01JDGQ4F8M3Z6T9W2X5Y7ABCDE --wait 60
    """
    from keybroker.client import NothingToApproveError

    with connect(url, svid, bundle, broker_id) as broker:
        operation = broker.wait_for(id_, timeout_s=wait_s) if wait_s else broker.operation(id_)
        if as_json:
            output.json_object(operation)
            return
        try:
            statements = broker.statements(operation, "approve", confirmed="prompt")
        except NothingToApproveError as err:
            _print(approval_text.subject_words(operation.subject))
            output.say()
            output.say(output.visible(str(err)))
        else:
            _print_statements(statements)
    output.say()
    _print_standing(operation)


@app.command()
def approve(
    id_: Id,
    is_agreed: Yes = False,
    file: Annotated[Path | None, typer.Option("--file", metavar="FILE", help="Check first that FILE is what would be signed.")] = None,
    stages: Annotated[list[str] | None, typer.Option("--stage", metavar="NAME", help="Only this stage (repeatable).")] = None,
    as_json: Json = False,
    url: Url = "",
    svid: SvidFile = "",
    bundle: BundleFile = "",
    broker_id: BrokerId = "",
) -> None:
    """Approve an operation: print what will be signed, ask, and sign it with the key of our own SVID.

    Examples:

        keybroker operations approve 01JDGQ4F8M3Z6T9W2X5Y7ABCDE

        keybroker operations approve --file release.tar.gz 01JDGQ4F8M3Z6T9W2X5Y7ABCDE

        keybroker operations approve --yes 01JDGQ4F8M3Z6T9W2X5Y7ABCDE
    """
    confirmed: Confirmation = "yes-flag" if is_agreed else "file" if file else "prompt"
    with connect(url, svid, bundle, broker_id) as broker:
        operation = broker.operation(id_)
        if file is not None:
            _require_same(file, operation.subject)
        _decide(broker, operation, "approve", confirmed, stages or (), as_json=as_json)


@app.command()
def deny(
    id_: Id, is_agreed: Yes = False, as_json: Json = False,
    url: Url = "", svid: SvidFile = "", bundle: BundleFile = "", broker_id: BrokerId = "",
) -> None:  # fmt: skip
    """Refuse an operation, which ends it: print what will be signed, ask, and sign it with the key of our own SVID.

    Examples:

        keybroker operations deny 01JDGQ4F8M3Z6T9W2X5Y7ABCDE

        keybroker operations deny --yes 01JDGQ4F8M3Z6T9W2X5Y7ABCDE
    """
    with connect(url, svid, bundle, broker_id) as broker:
        _decide(broker, broker.operation(id_), "refuse", "yes-flag" if is_agreed else "prompt", (), as_json=as_json)


def _decide(
    broker: Client, operation: Operation, verdict: Answer, confirmed: Confirmation, stages: Sequence[str], *, as_json: bool
) -> None:
    """Show, ask, sign, hand in: in that order, and what is signed is what was shown."""
    statements = broker.statements(operation, verdict, confirmed=confirmed, stages=stages)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        _print_statements(statements)
    if confirmed != "yes-flag" and not _agrees(verdict):
        output.note("nothing was signed")
        raise typer.Exit(ExitStatus.FAILED)
    for statement in statements:
        operation = broker.give(statement)
    if as_json:
        output.json_object(operation)
    else:
        output.say()
        _print_standing(operation)


def _agrees(verdict: Answer) -> bool:
    """The answer of whoever sits at the terminal; anything but a yes is a no.

    Raises:
        UsageError: nobody sits there.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("standard input is no terminal, so nobody can be asked; --yes signs without asking, and says so in the statement")
    sys.stderr.write(f"\nSign this and {verdict}? Type yes: ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() == "yes"


def _require_same(file: Path, subject: Subject) -> None:
    """Raises FileDiffersError where the digest of a file is not the one that is approved."""
    found = digest_of(file, subject.tbs.hash)
    if found != subject.tbs.value:
        raise FileDiffersError(f"{file} is not what would be signed: its {subject.tbs.hash} is {found}, not {subject.tbs.value}")


def _print_statements(statements: Sequence[Statement]) -> None:
    _print(approval_text.words(statements[0], [each.stage for each in statements]))


def _print(pairs: Iterator[tuple[str, str]]) -> None:
    if output.is_terminal():
        for line in approval_text.lines(pairs):
            output.say(line)
    else:
        output.facts(pairs)


def _print_standing(operation: Operation) -> None:
    """Who has approved, and what is missing."""
    pairs = [("state", operation.state), ("requested", operation.requested)]
    if operation.not_before:
        pairs.append(("not before", operation.not_before))
    for stage in operation.stages:
        who = f": {', '.join(map(approval_text.quoted, stage.given))}" if stage.given else ""
        pairs.append(("needs", f"{stage.name}: {len(stage.given)} of {stage.approvals} of {', '.join(stage.of)}{who}"))
    for given in operation.approvals:
        worth = "" if given.counts or given.verdict == "refuse" else ", which counts no more"
        who = f"{given.approver} ({approval_text.quoted(given.person)})"
        pairs.append(("given", f"{given.verdict} of {given.stage} by {who} at {given.given}, record {given.record}{worth}"))
    if operation.use:
        pairs.append(("use", operation.use))
    output.facts([*pairs, ("record", str(operation.record))])


def _changes(broker: Client, state: str, limit: int) -> Iterator[Operation]:
    """What there is, oldest first, and then whatever becomes different."""
    seen: dict[str, Operation] = {}
    mark = ""
    while True:
        page = broker.operations(state=state, limit=limit, mark=mark, wait_s=_WATCH_S if mark else 0)
        for operation in reversed(page.operations):
            if seen.get(operation.id) != operation:
                yield operation
        seen, mark = {each.id: each for each in page.operations}, page.mark


def _row(operation: Operation) -> tuple[str, ...]:
    subject = operation.subject
    approved = f"{sum(len(each.given) for each in operation.stages)}/{sum(each.approvals for each in operation.stages)}"
    waits = ", ".join(operation.yours)
    return operation.id, operation.state, subject.operation.kind, subject.workload, subject.key.name, approved, waits, subject.expires
