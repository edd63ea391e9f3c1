"""The OpenAPI document against the server: every route that it declares is there, and answers as declared; no other method does."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from keybroker.errors import RefusalError
from keybroker.model.call import Problem
from tests.integration.frontend.fake_authority import FREEZE
from tests.integration.frontend.served import Answered, Served, request

BODY = {"algorithm": "ES256", "message": "aGk="}
ENVELOPE = {"payload": "aGk=", "payloadType": "text/plain", "signatures": [{"keyid": "ab" * 32, "sig": "aGk="}]}
BODIES = {
    "SignBody": BODY,
    "Batch": {"items": [BODY, {"algorithm": "ES256"}]},
    "Envelope": ENVELOPE,
    "Redemption": {},
    "ProposalBody": {"base": "00", "files": {"a.yaml": "grants: []"}, "reason": "less"},
    "GlassBody": {"grant": "release", "seconds": 60, "reason": "incident 7"},
    "NoteBody": {"note": "as planned"},
    "FreezeBody": {"everything": True, "reason": "incident 7"},
}
QUERIES = {"/v1/audit/proof/inclusion": "?index=1", "/v1/audit/proof/consistency": "?old=1", "/v1/audit/impact": "?key=orders"}
NAMES = {
    "key": "orders", "index": 1, "operation": "01JDGQ4F8M3Z6T9W2X5Y7ABCDE", "freeze": FREEZE.id, "glass": FREEZE.id, "path": "0/000",
}  # fmt: skip
METHODS = ["get", "head", "options", "post", "put", "patch", "delete", "trace"]


def document_of(served: Served) -> dict[str, Any]:
    (answer,) = served.ask(request("/v1/openapi.json", close=True))
    document: dict[str, Any] = json.loads(answer.body)
    return document


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, operation) for path, item in document["paths"].items() for method, operation in item.items()]


def ask(served: Served, path: str, method: str, operation: dict[str, Any]) -> Answered:
    target = path.format(**NAMES) + QUERIES.get(path, "")
    fields, body = [], None
    if "requestBody" in operation:
        (media_type,) = operation["requestBody"]["content"]
        name = operation["requestBody"]["content"][media_type]["schema"]["$ref"].rpartition("/")[2]
        fields, body = [f"Content-Type: {media_type}"], json.dumps(BODIES[name]).encode()
    (answer,) = served.ask(request(target, *fields, method=method.upper(), body=body, close=True), is_head=method == "head")
    return answer


def check(document: dict[str, Any], operation: dict[str, Any], answer: Answered) -> None:
    """The answer's status, media type and body are declared."""
    response = operation["responses"][str(answer.status)]
    if "$ref" in response:
        response = document["components"]["responses"][response["$ref"].rpartition("/")[2]]
    media_type = answer.headers["content-type"].partition(";")[0]
    schema = response["content"][media_type]["schema"]
    shown = json.loads(answer.body) if media_type.endswith(("/json", "+json")) else answer.body.decode()
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(shown)


def test_every_declared_operation_answers_as_declared(served: Served) -> None:
    document = document_of(served)
    for path, method, operation in operations(document):
        answer = ask(served, path, method, operation)
        assert answer.status == 200, (path, answer)
        check(document, operation, answer)


def test_every_format_of_a_public_key_is_as_declared(served: Served) -> None:
    document = document_of(served)
    operation = document["paths"]["/v1/keys/{key}/public"]["get"]
    (parameter,) = [each for each in operation["parameters"] if each["name"] == "format"]
    assert parameter["schema"]["enum"] == ["pem", "jwk", "openssh"]
    for name in parameter["schema"]["enum"]:
        (answer,) = served.ask(request(f"/v1/keys/orders/public?format={name}", close=True))
        assert answer.status == 200
        check(document, operation, answer)


@pytest.mark.parametrize("code", ["denied", "not-found", "svid-invalid", "policy-error", "policy-unavailable", "overloaded"])
def test_every_declared_operation_is_refused_as_declared(served: Served, code: str) -> None:
    document = document_of(served)
    served.authority.answers = lambda _call: Problem.of(RefusalError.of(code)("No.", reasons=("rule",)))
    for path, method, operation in operations(document):
        answer = ask(served, path, method, operation)
        assert json.loads(answer.body)["type"] == f"urn:keybroker:problem:{code}"
        check(document, operation, answer)


def test_method_that_is_not_declared_gets_405_as_declared(served: Served) -> None:
    document = document_of(served)
    for path, _, operation in operations(document):
        allowed = ", ".join(sorted(each.upper() for each in document["paths"][path]))
        for method in METHODS:
            if method in document["paths"][path]:
                continue
            answer = ask(served, path, method, {})
            assert (answer.status, answer.headers["allow"]) == (405, allowed)
            if method != "head":
                check(document, operation, answer)
    assert not served.authority.calls
