"""Refusals as problem documents (RFC 9457): every code has a rule, and the text says no more than it may."""

from __future__ import annotations

import json

import pytest

from keybroker.errors import DeniedError, InvalidError, NotFoundError, RefusalError, SvidInvalidError
from keybroker.frontend import problems
from keybroker.frontend.exchange import HttpAnswer
from keybroker.model.call import Problem

REQUEST = "01JZZZZZZZZZZZZZZZZZZZZZZZ"
CODES = sorted(code for code, kind in RefusalError.registry.items() if kind.__module__ == RefusalError.__module__)


def rendered(problem: Problem) -> tuple[HttpAnswer, dict[str, object]]:
    made = problems.render(problem, REQUEST)
    return made, json.loads(made.body)


def test_every_code_has_a_rule_and_every_rule_a_code() -> None:
    assert set(problems.RULES) == set(CODES)


@pytest.mark.parametrize("code", CODES)
def test_problem_is_whole(code: str) -> None:
    made, document = rendered(Problem.of(RefusalError.of(code)("Why.")))
    status, title = problems.RULES[code]
    assert 400 <= status <= 504
    assert status != 500
    assert document == {
        "type": f"urn:keybroker:problem:{code}",
        "title": title,
        "status": status,
        "detail": document["detail"],
        "instance": f"urn:keybroker:request:{REQUEST}",
    }
    assert made.status == status
    assert made.headers["content-type"] == "application/problem+json"
    assert made.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("code", CODES)
def test_answer_says_when_to_try_again_if_it_is_503_or_429(code: str) -> None:
    made, _ = rendered(Problem(code, "Why."))
    assert ("retry-after" in made.headers) == (made.status in {429, 503})


@pytest.mark.parametrize("code", CODES)
def test_time_that_was_given_is_kept(code: str) -> None:
    made, _ = rendered(Problem(code, "Why.", retry_after=17))
    assert made.headers["retry-after"] == "17"


@pytest.mark.parametrize("code", CODES)
def test_connection_ends_if_the_identity_is_not_good(code: str) -> None:
    made, _ = rendered(Problem(code, "Why."))
    assert (made.headers.get("connection") == "close") == (made.status == 401)


@pytest.mark.case(18)
def test_not_found_says_the_same_whatever_the_reason() -> None:
    details = {json.dumps(rendered(Problem.of(NotFoundError(text)))[1]) for text in ("", "no such key", "the key of another")}
    assert len(details) == 1


@pytest.mark.parametrize("code", ["", "signed", "ok", "MALFORMED", "not-found "])
def test_unknown_code_is_an_outage(code: str) -> None:
    made, document = rendered(Problem(code, "Why."))
    assert (made.status, document["type"]) == (503, "urn:keybroker:problem:overloaded")
    assert made.headers["retry-after"] == "1"


def test_fault_of_ours_is_an_outage_that_says_nothing() -> None:
    made, document = rendered(problems.unexpected())
    assert (made.status, document["detail"]) == (503, "The request could not be finished.")


def test_parts_of_a_refusal_are_shown() -> None:
    err = InvalidError("Why.", pointers=(("/a", "missing"), ("", "no")), use="01J")
    _, document = rendered(Problem.of(err))
    assert document["errors"] == [{"pointer": "/a", "detail": "missing"}, {"pointer": "", "detail": "no"}]
    assert document["use"] == "01J"
    _, denied = rendered(Problem.of(DeniedError("No.", reasons=("hours", "quorum"))))
    assert denied["reasons"] == ["hours", "quorum"]
    assert "errors" not in denied


def test_pointers_of_an_item_begin_where_the_item_is() -> None:
    made = problems.document(Problem.of(InvalidError("Why.", pointers=(("/a", "x"), ("", "y")))), REQUEST, "/items/3")
    assert [each.pointer for each in made.errors] == ["/items/3/a", "/items/3"]


def test_refusal_of_the_authority_is_passed_on_as_it_is() -> None:
    problem = Problem("denied", "No.", (), ("hours",), 0, "01J")
    assert problems.problem_of(problems.ProblemError(problem)) is problem
    assert problems.problem_of(SvidInvalidError("No.", reasons=("expired",))) == Problem("svid-invalid", "No.", reasons=("expired",))


def test_header_that_is_given_is_there_too() -> None:
    made = problems.render(Problem("method-not-allowed", "No."), REQUEST, {"allow": "GET"})
    assert made.headers["allow"] == "GET"
