"""The OpenAPI document: valid, whole, and no looser and no stricter than the code that reads requests."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any, cast

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openapi_spec_validator import OpenAPIV31SpecValidator

import keybroker
from keybroker.config import TelemetryConfig
from keybroker.errors import InvalidError
from keybroker.frontend import bodies, problems
from keybroker.frontend.app import Application
from keybroker.frontend.authority_link import AuthorityLink
from keybroker.frontend.exchange import Client, HttpRequest
from keybroker.frontend.metrics import FrontendMetrics
from keybroker.model.call import Problem
from keybroker.tracing import Tracer
from tests.unit.frontend.test_bodies import WRONG


def _fetch() -> dict[str, Any]:
    """The document as the application answers it; the authority is not asked for it."""
    app = Application(cast("AuthorityLink", None), FrontendMetrics(), Tracer("frontend", TelemetryConfig()))
    request = HttpRequest(Client((), "192.0.2.1"), "GET", "/v1/openapi.json", b"", [(b"host", b"broker")], b"")
    answer = asyncio.run(app.answer(request))
    assert answer.status == 200
    document: dict[str, Any] = json.loads(answer.body)
    return document


DOCUMENT = _fetch()
OPERATIONS = [(path, method, operation) for path, item in DOCUMENT["paths"].items() for method, operation in item.items()]
NAMES = [f"{method} {path}" for path, method, _ in OPERATIONS]


def validator(name: str) -> jsonschema.Draft202012Validator:
    """Of one schema of the document."""
    return jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]})


def test_document_is_valid_openapi_3_1() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    assert DOCUMENT["info"]["version"] == keybroker.__version__
    assert not list(OpenAPIV31SpecValidator(DOCUMENT).iter_errors())


def test_document_names_every_status_that_a_problem_can_have() -> None:
    assert set(DOCUMENT["components"]["responses"]) == {str(status) for status, _ in problems.RULES.values()}


def test_operations_have_names_of_their_own() -> None:
    ids = [operation["operationId"] for _, _, operation in OPERATIONS]
    assert len(ids) == len(set(ids)) >= 10


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS, ids=NAMES)
def test_operation_declares_what_can_go_wrong_on_any_route(path: str, method: str, operation: dict[str, Any]) -> None:
    declared = set(operation["responses"])
    assert {"200", "400", "401", "403", "404", "405", "408", "413", "414", "422", "431", "503"} <= declared
    assert ("415" in declared) == (method == "post")
    assert "x-shape" not in operation
    assert {each["name"] for each in operation.get("parameters", ()) if each["in"] == "path"} == {
        part[1:-1] for part in path.split("/") if part.startswith("{")
    }


@pytest.mark.parametrize("data", [b'{"algorithm":"ES256","message":"aGk="}', b'{"algorithm":"Ed25519","message":"","reason":"why"}'])
def test_schema_takes_what_the_code_takes(data: bytes) -> None:
    bodies.sign_body(data)
    assert validator("SignBody").is_valid(json.loads(data))
    assert validator("Batch").is_valid({"items": [json.loads(data)]})


# What a schema cannot say: lengths in bytes of what base64 holds, and which format goes with which algorithm.
BEYOND_SCHEMA = {"message too large", "format of RSA", "format of Ed25519"}


@pytest.mark.case(14)
@pytest.mark.parametrize("name", sorted(WRONG.keys() - BEYOND_SCHEMA))
def test_schema_refuses_what_the_code_refuses(name: str) -> None:
    assert not validator("SignBody").is_valid(json.loads(WRONG[name][0], parse_int=float))  # a number of any size


@given(st.text("ABQg01+/-_= ", max_size=8))
def test_schema_and_code_agree_on_base64(text: str) -> None:
    body = {"algorithm": "ES256", "message": text}
    try:
        bodies.sign_body(json.dumps(body).encode())
    except InvalidError:
        is_taken = False
    else:
        is_taken = base64.b64encode(base64.b64decode(text)).decode() == text
    assert validator("SignBody").is_valid(body) == is_taken


@pytest.mark.parametrize("code", problems.RULES)
def test_problem_document_is_as_its_schema_says(code: str) -> None:
    problem = Problem(code, "Why.", (("/a", "b"),), ("reason",), 1, "01J")
    validator("ProblemDocument").validate(json.loads(problems.render(problem, "01J").body))
