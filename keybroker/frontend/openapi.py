"""The OpenAPI 3.1 document: FastAPI's own for what is read, ours for the plain routes, one set of problems for all."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from keybroker.frontend import problems
from keybroker.frontend.shapes import Explanation, Key, Keys, ProblemDocument, SignedUse, Whoami
from keybroker.model.request import MAX_BATCH_ITEMS, MAX_MEDIA_TYPE_CHARACTERS, MAX_REASON_CHARACTERS, SignBody

_JSON = "application/json"
_ANY_REQUEST = ("unauthenticated", "svid-invalid", "denied", "not-found", "overloaded", "policy-unavailable", "policy-error")
_ANY_PLACE = ("malformed", "method-not-allowed", "request-timeout", "too-large", "uri-too-long", "headers-too-large", "invalid")
_SIGNING = (
    "in-progress",
    "unsupported-media-type",
    "idempotency-mismatch",
    "rate-limited",
    "clock-untrusted",
    "hsm-unavailable",
    "hsm-timeout",
    "audit-unavailable",
    "signature-self-check-failed",
)
_READING_RECORD = ("audit-unavailable", "clock-untrusted")
_SIGN_ROUTES = (
    ("/v1/keys/{key}/sign", "sign", "Sign one thing with a key.", "SignBody", "SignedUse", True),
    ("/v1/keys/{key}/sign/batch", "sign_batch", "Sign up to 1,000 things, each a use of its own.", "Batch", "BatchResults", True),
    ("/v1/keys/{key}/sign/explain", "explain", "Show the decision that `sign` would get.", "SignBody", "Explanation", False),
)
_TEXT = {"type": "string"}
_OBJECT = {"type": "object"}
_BASE64 = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?$"


def document(app: FastAPI) -> dict[str, Any]:
    """The whole document."""
    made = get_openapi(
        title=app.title,
        version=app.version,
        openapi_version="3.1.0",
        summary="Decides and records every use of a key that lives in an HSM.",
        description="mTLS only: the caller is the X.509-SVID that it connects with. Bytes are base64 (RFC 4648 section 4, with padding).",
        routes=app.routes,
    )
    paths = made["paths"]
    for path, item in paths.items():
        codes = _ANY_PLACE + _ANY_REQUEST + (_READING_RECORD if "/audit/" in path else ())
        shape = item["get"].pop("x-shape")
        item["get"]["responses"] = {"200": _answer(shape), **_refusals(codes)}
    for path, name, summary, takes, gives, is_idempotent in _SIGN_ROUTES:
        paths[path] = {"post": _sign_route(name, summary, takes, gives, is_idempotent)}
    made["components"] = {"schemas": _schemas(), "responses": _problem_responses()}
    return made


def _sign_route(name: str, summary: str, takes: str, gives: str, is_idempotent: bool) -> dict[str, Any]:  # noqa: FBT001  a row of a table
    parameters: list[dict[str, Any]] = [{"name": "key", "in": "path", "required": True, "schema": _TEXT}]
    if is_idempotent:
        schema = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
        text = "The same key and body give the same use and signature for 24 hours."
        parameters.append({"name": "Idempotency-Key", "in": "header", "required": False, "schema": schema, "description": text})
    return {
        "summary": summary,
        "operationId": name,
        "parameters": parameters,
        "requestBody": {"required": True, "content": {_JSON: {"schema": _reference(takes)}}},
        "responses": {"200": _answer(gives), **_refusals(_ANY_PLACE + _ANY_REQUEST + _SIGNING)},
    }


def _answer(shape: str) -> dict[str, Any]:
    content: dict[str, Any] = {_JSON: {"schema": _reference(shape)}}
    if shape == "PublicKey":
        content = {
            "application/x-pem-file": {"schema": _TEXT},
            "text/plain": {"schema": _TEXT},
            _JSON: {"schema": _reference("Jwk")},
        }
    return {"description": "Done.", "content": content}


def _refusals(codes: tuple[str, ...]) -> dict[str, Any]:
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted({problems.RULES[code][0] for code in codes})}


def _problem_responses() -> dict[str, Any]:
    """One response for each status, with the codes that it may carry."""
    codes: dict[int, list[str]] = {}
    for code, (status, _) in problems.RULES.items():
        codes.setdefault(status, []).append(code)
    content = {problems.MEDIA_TYPE: {"schema": _reference("ProblemDocument")}}
    return {str(status): {"description": ", ".join(names), "content": content} for status, names in codes.items()}


def _schemas() -> dict[str, Any]:
    shapes = [Whoami, Keys, Key, SignedUse, Explanation, ProblemDocument, SignBody]
    _, schemas = msgspec.json.schema_components(shapes, ref_template="#/components/schemas/{name}")
    for schema in schemas.values():
        if "description" in schema:
            schema["description"] = schema["description"].split("\n")[0]
    body = schemas["SignBody"]
    for name in ("message", "digest"):
        body["properties"][name] |= {"pattern": _BASE64}
    body["properties"]["reason"] |= {"maxLength": MAX_REASON_CHARACTERS}
    body["properties"]["media_type"] |= {"maxLength": MAX_MEDIA_TYPE_CHARACTERS, "pattern": "^[ -~]*$"}
    body["oneOf"] = [{"required": ["message"]}, {"required": ["digest"]}]
    one_or_the_other = {"anyOf": [_reference("SignedUse"), _reference("ProblemDocument")]}
    return {
        **schemas,
        "Batch": _object(items={"type": "array", "items": _reference("SignBody"), "minItems": 1, "maxItems": MAX_BATCH_ITEMS}),
        "BatchResults": _object(results={"type": "array", "items": one_or_the_other}),
        "Jwk": _OBJECT,
        "JwkSet": _object(keys={"type": "array", "items": _reference("Jwk")}),
        "Record": _OBJECT,
        "RecordPage": _object(records={"type": "array", "items": _reference("Record")}, next={"type": ["string", "null"]}),
    }


def _object(**members: Any) -> dict[str, Any]:
    return {"type": "object", "properties": members, "required": list(members)}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
