"""`keybroker policy test`: what a policy must answer, written down as cases, and asked of the real engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from keybroker.authority.trial.asking import AskingError, ShortRequest, bytes_of
from keybroker.authority.trial.candidate import Candidate
from keybroker.authority.trial.words import listed
from keybroker.errors import ConfigError
from keybroker.model.decision import Decision, Obligation, Verdict
from keybroker.yaml_document import YamlDocument

DIRECTORY = "tests"
"""The directory of test files beside grant files; the broker does not look into it."""


class Case(ShortRequest, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A request, and what must come of it. What is not given is not checked.

    Attributes:
        name: says what the case shows.
        expect: the verdict.
        grants: with an allow: exactly these grants match.
        reasons: with a deny: exactly these reasons.
        needs: exactly these kinds of demands come with the allow; the empty list means none.
    """

    name: str
    expect: Literal["allow", "deny"]
    grants: tuple[str, ...] | None = None
    reasons: tuple[str, ...] | None = None
    needs: tuple[str, ...] | None = None


class CaseFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file of cases."""

    cases: tuple[Case, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a case.

    Attributes:
        faults: what is not as expected; empty for a case that passed.
    """

    case: str
    where: str
    faults: tuple[str, ...]


def run(candidate: Candidate, place: Path) -> list[Result]:
    """Run every case of a file, or of the `*.yaml` files of a directory.

    Raises:
        ConfigError: a file cannot be used, or there are no cases: then nothing is shown.
    """
    try:
        paths = sorted(path for path in place.iterdir() if path.suffix == ".yaml") if place.is_dir() else [place]
    except OSError as err:
        raise ConfigError(f"{place}: cannot be read: {err.strerror}") from err
    results = [result for path in paths for result in _run_file(candidate, YamlDocument.load(path))]
    if not results:
        raise ConfigError(f"{place}: there are no cases, so nothing is shown; write a file with `cases`, or name it with --tests")
    return results


def needs_of(obligations: tuple[Obligation, ...]) -> set[str]:
    """The kinds of demands that come with an allow."""
    return {name for each in obligations for name in each.__struct_fields__ if name != "grant" and getattr(each, name)}


def _run_file(candidate: Candidate, document: YamlDocument) -> list[Result]:
    results = []
    names: dict[str, str] = {}
    for index, case in enumerate(document.convert(CaseFile).cases):
        where = document.where(("cases", index))
        if case.name in names:
            raise ConfigError(f"{where}: the name {case.name!r} is taken by {names[case.name]}")
        names[case.name] = where
        try:
            request = case.policy_input(candidate.rules)
        except AskingError as err:
            raise ConfigError(f"{where}: {err}") from err
        results.append(Result(case.name, where, tuple(_faults(case, candidate.engine.decide_now(bytes_of(request))))))
    return results


def _faults(case: Case, decision: Decision) -> list[str]:
    if decision.verdict.value != case.expect:
        why = f" ({listed(decision.reasons)})" if decision.reasons else f" by {listed(decision.grants)}" if decision.grants else ""
        return [f"expected {case.expect}, got {decision.verdict.value}{why}"]
    faults = []
    wanted = (("grants", case.grants, set(decision.grants)), ("reasons", case.reasons, set(decision.reasons)))
    needs = needs_of(decision.obligations) if decision.verdict is Verdict.ALLOW else set()
    for name, expected, got in (*wanted, ("needs", case.needs, needs)):
        if expected is not None and set(expected) != got:
            faults.append(f"{name}: expected {listed(sorted(expected))}, got {listed(sorted(got))}")
    return faults
