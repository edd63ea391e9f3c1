"""`keybroker policy simulate`: one request against a candidate, with its reasoning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keybroker.cli import output
from keybroker.cli.arguments import UsageError
from keybroker.cli.candidates import ConfigFile, Grants, authority_of, loaded, trial
from keybroker.cli.connection import Json
from keybroker.cli.exits import ExitStatus

if TYPE_CHECKING:
    from keybroker.authority.trial.candidate import Candidate
    from keybroker.authority.trial.simulate import Reading, Simulation
    from keybroker.model.decision import PolicyInput

_NEAR = 5  # rules that are shown although they do not match
_MAX_INPUT_BYTES = 1024 * 1024


def simulate(
    directory: Grants,
    workload: Annotated[str, typer.Option("--workload", metavar="ID", help="The caller's SPIFFE ID.")] = "",
    key: Annotated[str, typer.Option("--key", metavar="NAME", help="The key.")] = "",
    algorithm: Annotated[str, typer.Option("--alg", metavar="ALG", help="The signature algorithm, for signing.")] = "",
    operation: Annotated[str, typer.Option("--operation", metavar="NAME", help="`sign` if absent; `read-audit` with --trail.")] = "",
    trail: Annotated[str, typer.Option("--trail", metavar="ID", help="Whose records would be read; ** is the whole record.")] = "",
    requester: Annotated[str, typer.Option("--requester", metavar="ID", help="For `approve`: who asked for the use of the key.")] = "",
    address: Annotated[str, typer.Option("--address", metavar="IP", help="Where the request comes from.")] = "",
    networks: Annotated[list[str] | None, typer.Option("--network", metavar="NAME", help="Or the named network. Repeatable.")] = None,
    reason: Annotated[str, typer.Option("--reason", help="As the caller gives it.")] = "",
    media_type: Annotated[str, typer.Option("--media-type", help="As the caller gives it.")] = "",
    size: Annotated[int, typer.Option("--size", metavar="BYTES", min=0, help="Of the message.")] = 0,
    document: Annotated[Path | None, typer.Option("--input", metavar="FILE", help="A policy input or a record, JSON; - is stdin.")] = None,
    record: Annotated[int | None, typer.Option("--record", metavar="INDEX", min=0, help="What was asked in this record.")] = None,
    state: Annotated[Path | None, typer.Option("--state", metavar="DIR", help="The state directory with the record.")] = None,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Ask a candidate one request, and show how its rules lead to the answer. Exit status 3 where it would be denied.

    Examples:

        keybroker policy simulate candidate --workload spiffe://example.org/payments/api --key orders --alg ES256

        keybroker policy simulate candidate --record 812 --config my-world/keybroker.yaml

        keybroker audit show 812 --json | keybroker policy simulate candidate --input -
    """
    candidate = loaded(directory, config)
    short = {
        "workload": workload,
        "key": key,
        "algorithm": algorithm,
        "operation": operation,
        "trail": trail,
        "requester": requester,
        "address": address,
        "networks": tuple(networks or ()),
        "reason": reason,
        "media_type": media_type,
        "size": size,
    }
    data = _given(document, record, state, config)
    if data is not None and any(short.values()):
        raise UsageError("give the request in one way: with options, with --input, or with --record")
    if data is None and not workload:
        raise UsageError("say who asks, with --workload; or give the request with --input or --record")
    request = _request(candidate, short, data)
    simulation: Simulation = trial("simulate").simulate(candidate, request)
    if as_json:
        output.json_object(_as_json(simulation))
    else:
        _show(simulation)
    if simulation.decision.verdict.value != "allow":
        raise typer.Exit(ExitStatus.DENIED if simulation.decision.verdict.value == "deny" else ExitStatus.FAILED)


def _request(candidate: Candidate, short: dict[str, Any], data: bytes | None) -> PolicyInput:
    """What is asked.

    Raises:
        UsageError: it makes no sense.
    """
    asking = trial("asking")
    try:
        request: PolicyInput
        if data is not None:
            request = asking.read_input(data, candidate.rules)
        else:
            request = asking.ShortRequest(**short).policy_input(candidate.rules)
    except asking.AskingError as err:
        raise UsageError(str(err)) from err
    return request


def _given(document: Path | None, record: int | None, state: Path | None, config: Path | None) -> bytes | None:
    """The JSON that holds the request, if one is named."""
    if document is not None and record is not None:
        raise UsageError("give the request in one way: with --input or with --record")
    if document is not None:
        from keybroker.cli.arguments import opened

        with opened(document) as file:
            return file.read(_MAX_INPUT_BYTES)
    if record is None:
        return None
    authority = authority_of(config)
    directory = state or (authority.state if authority else None)
    if directory is None:
        raise UsageError("say where the record is, with --state or --config; or pipe `audit show INDEX --json` into --input -")
    leaf: bytes = trial("recorded").leaf(directory, record)
    return leaf


def _show(simulation: Simulation) -> None:
    decision, request = simulation.decision, simulation.request
    output.facts(
        [
            ("verdict", decision.verdict.value),
            ("grants", ", ".join(decision.grants)),
            ("reasons", ", ".join(decision.reasons)),
            ("networks", ", ".join(request.caller.networks)),
            *(("needs", each) for each in simulation.needs),
            ("policy", decision.policy),
        ]
    )
    if not simulation.is_explained:
        output.note("the compiled policy does not answer as the grants read, so they do not explain this answer")
    matching = [each for each in simulation.readings if each.matches]
    near = [each for each in simulation.readings if not each.matches and each.is_about_target]
    near += [each for each in simulation.readings if not each.matches and each not in near and sum(not fit.fits for fit in each.fits) == 1]
    for each in (*matching, *near[:_NEAR]):
        _show_reading(each)
    if len(near) > _NEAR:
        output.note(f"and {len(near) - _NEAR} more rules that nearly match; --json shows all")


def _show_reading(reading: Reading) -> None:
    what = "deny" if reading.is_deny else "grant"
    output.say()
    output.say(output.visible(f"{what} {reading.rule} {'matches' if reading.matches else 'does not match'}  ({reading.where})"))
    for each in reading.fits:
        output.say(output.visible(f"  {'yes' if each.fits else 'NO '}  {each.selector}: {each.text}"))


def _as_json(simulation: Simulation) -> dict[str, Any]:
    decision = simulation.decision
    return {
        "verdict": decision.verdict.value,
        "grants": decision.grants,
        "reasons": decision.reasons,
        "obligations": decision.obligations,
        "needs": simulation.needs,
        "policy": decision.policy,
        "is_explained": simulation.is_explained,
        "input": simulation.request,
        "rules": [
            {
                "rule": each.rule,
                "kind": "deny" if each.is_deny else "grant",
                "where": each.where,
                "matches": each.matches,
                "selectors": [{"selector": fit.selector, "fits": fit.fits, "text": fit.text} for fit in each.fits],
            }
            for each in simulation.readings
        ],
    }
