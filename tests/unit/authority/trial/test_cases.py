"""Cases of a policy: each expectation that is not met is a fault, and what cannot be run is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from keybroker.authority.trial import candidate as candidates
from keybroker.authority.trial import cases
from keybroker.authority.trial.candidate import Candidate
from keybroker.errors import ConfigError
from tests.policies import GOOD

EXAMPLES = Path(__file__).parents[4] / "policies" / "examples"
DENY = 'denies:\n  - {id: not-ci, workloads: ["spiffe://example.org/ci/**"]}\n'
SIGNS = "workload: spiffe://example.org/payments/api, key: orders, algorithm: ES256"
CI = "workload: spiffe://example.org/ci/x, key: orders, algorithm: ES256"


@pytest.fixture
def candidate(tmp_path: Path) -> Candidate:
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "a.yaml").write_text(GOOD + DENY)
    return candidates.load(tmp_path / "g")


def results(candidate: Candidate, place: Path, *lines: str) -> list[tuple[str, ...]]:
    place.write_text("cases:\n" + "".join(f"  - {{name: c{number}, {line}}}\n" for number, line in enumerate(lines)))
    return [each.faults for each in cases.run(candidate, place)]


def test_cases_pass_where_the_engine_answers_as_expected(candidate: Candidate, tmp_path: Path) -> None:
    lines = (
        f"{SIGNS}, expect: allow",
        f"{SIGNS}, expect: allow, grants: [payments], needs: []",
        f"{CI}, expect: deny, reasons: ['denied-by:not-ci', no-grant]",
        "workload: spiffe://example.org/a, trail: spiffe://example.org/a, expect: allow, grants: [own-trail]",
        "workload: spiffe://example.org/a, trail: '**', expect: deny, reasons: [no-grant]",
        "workload: spiffe://example.org/payments/api, key: orders, operation: read-key, expect: allow",
    )
    assert results(candidate, tmp_path / "c.yaml", *lines) == [()] * len(lines)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{SIGNS}, expect: deny", "expected deny, got allow by payments"),
        (f"{CI}, expect: allow", "expected allow, got deny (no-grant and denied-by:not-ci)"),
        (f"{SIGNS}, expect: allow, grants: [orders]", "grants: expected orders, got payments"),
        (f"{CI}, expect: deny, reasons: [no-grant]", "reasons: expected no-grant, got denied-by:not-ci and no-grant"),
        (f"{SIGNS}, expect: allow, needs: [quorum]", "needs: expected quorum, got nothing"),
    ],
)
def test_case_that_is_not_met_says_what_came_instead(candidate: Candidate, tmp_path: Path, line: str, says: str) -> None:
    assert results(candidate, tmp_path / "c.yaml", line) == [(says,)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cases: []\n", "there are no cases"),
        (f"cases:\n  - {{name: a, {SIGNS}}}\n", "c.yaml:2: cases\\[0\\]: object missing required field `expect`"),
        (f"cases:\n  - {{name: a, {SIGNS}, expect: perhaps}}\n", "c.yaml:2: cases\\[0\\].expect: invalid enum value"),
        (f"cases:\n  - {{name: a, {SIGNS}, expect: allow, grant: [x]}}\n", "c.yaml:2: .*unknown field `grant`"),
        ("cases:\n  - {name: a, workload: api, expect: allow}\n", "c.yaml:2: workload: 'api' is not a SPIFFE ID"),
        (f"cases:\n  - {{name: a, {SIGNS}, expect: allow}}\n  - {{name: a, {SIGNS}, expect: allow}}\n", "c.yaml:3: the name 'a' is taken"),
    ],
)
def test_file_that_cannot_be_run_is_an_error_with_its_line(candidate: Candidate, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        cases.run(candidate, tmp_path / "c.yaml")


def test_files_of_a_directory_are_run_all_together(candidate: Candidate, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for name in ("a", "b"):
        (tmp_path / "t" / f"{name}.yaml").write_text(f"cases:\n  - {{name: x, {SIGNS}, expect: allow}}\n")
    assert [each.where for each in cases.run(candidate, tmp_path / "t")] == [f"{tmp_path}/t/a.yaml:2", f"{tmp_path}/t/b.yaml:2"]
    with pytest.raises(ConfigError, match="cannot be read"):
        cases.run(candidate, tmp_path / "gone")


def test_examples_answer_as_their_cases_say() -> None:
    results = cases.run(candidates.load(EXAMPLES), EXAMPLES / cases.DIRECTORY)
    assert len(results) > 5
    assert [each for each in results if each.faults] == []


def test_tests_beside_grants_are_not_read_as_grants(candidate: Candidate, tmp_path: Path) -> None:
    (tmp_path / "g" / "tests").mkdir()
    (tmp_path / "g" / "tests" / "a.yaml").write_text(f"cases:\n  - {{name: x, {SIGNS}, expect: allow}}\n")
    assert candidates.load(tmp_path / "g").engine.digest == candidate.engine.digest
