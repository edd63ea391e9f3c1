"""The OpenAPI 3.1 document: FastAPI's own for what is read, ours for the plain routes, one set of problems for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from keybroker.audit.dsse import Envelope
from keybroker.frontend import problems
from keybroker.frontend.bodies import Redemption
from keybroker.frontend.breaking import GlassBody, NoteBody
from keybroker.frontend.changing import ProposalBody
from keybroker.frontend.freezing import FreezeBody
from keybroker.frontend.shapes import (
    Explanation,
    Freeze,
    Freezes,
    Glass,
    Glasses,
    Key,
    Keys,
    Operations,
    PendingUse,
    Policy,
    PolicyVersion,
    ProblemDocument,
    SignedUse,
    Whoami,
)
from keybroker.model.impact import Impact
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
    "rate-limited",
    "frozen",
)
_ENDED = ("approval-mismatch", "approval-consumed", "approval-stale", "approval-expired")
_APPROVING = (*_ENDED, "self-approval", "audit-unavailable", "unsupported-media-type", "rate-limited")
_WAITING = ("rate-limited",)


@dataclass(frozen=True, slots=True)
class _Post:
    """A route that takes a body. `may_wait`: it may answer 202."""

    path: str
    name: str
    summary: str
    takes: str
    gives: str
    is_idempotent: bool = False
    may_wait: bool = False
    codes: tuple[str, ...] = _SIGNING


_READING_RECORD = ("audit-unavailable", "clock-untrusted")
_ACTING = ("in-progress", "frozen", "audit-unavailable", "clock-untrusted", "stale-base", "replayed")
_TAKING = ("unsupported-media-type",)
_POSTS = (
    _Post("/v1/keys/{key}/sign", "sign", "Sign one thing with a key.", "SignBody", "SignedUse", is_idempotent=True, may_wait=True),
    _Post(
        "/v1/keys/{key}/sign/batch",
        "sign_batch",
        "Sign up to 1,000 things, each a use of its own.",
        "Batch",
        "BatchResults",
        is_idempotent=True,
    ),
    _Post("/v1/keys/{key}/sign/explain", "explain", "Show the decision that `sign` would get.", "SignBody", "Explanation"),
    _Post("/v1/operations/{operation}/approvals", "approve", "Approve or refuse an operation.", "Envelope", "Operation", codes=_APPROVING),
    _Post(
        "/v1/operations/{operation}/redeem",
        "redeem",
        "Do what a complete quorum has approved, once.",
        "Redemption",
        "SignedUse",
        is_idempotent=True,
        may_wait=True,
        codes=(*_SIGNING, *_ENDED),
    ),
)
_TEXT = {"type": "string"}
_OBJECT = {"type": "object"}
_NUMBER = {"type": "integer"}
_LOG_MEDIA = {
    "Checkpoint": "text/plain",
    "InclusionProof": "text/plain",
    "Tile": "application/octet-stream",
    "Export": "application/x-ndjson",
}
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
        for method, operation in item.items():
            _describe(path, method, operation)
    for post in _POSTS:
        paths[post.path] = {"post": _described(post)}
    made["components"] = {"schemas": _schemas(), "responses": _problem_responses()}
    return made


def _describe(path: str, method: str, operation: dict[str, Any]) -> None:
    """What a FastAPI route takes and answers, by what it says of itself."""
    codes = _ANY_PLACE + _ANY_REQUEST + (_READING_RECORD if "/audit/" in path else ())
    codes += _WAITING if "/operations" in path else ()
    codes += (_ACTING if method != "get" else ()) + (_TAKING if method == "post" else ())
    waits = {"202": _answer("PendingUse", "Others have to approve it first.")} if operation.pop("x-waits", None) else {}
    codes += (*_ENDED, "rate-limited") if waits else ()
    operation["responses"] = {"200": _answer(operation.pop("x-shape")), **waits, **_refusals(codes)}
    takes = operation.pop("x-body", None)
    if takes:
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": _reference(takes)}}}


def _described(post: _Post) -> dict[str, Any]:
    name = post.path.partition("{")[2].partition("}")[0]
    parameters: list[dict[str, Any]] = [{"name": name, "in": "path", "required": True, "schema": _TEXT}]
    if post.is_idempotent:
        schema = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
        text = "The same key and body give the same use and signature for 24 hours."
        parameters.append({"name": "Idempotency-Key", "in": "header", "required": False, "schema": schema, "description": text})
    waits = {"202": _answer("PendingUse", "Others have to approve it first.")} if post.may_wait else {}
    return {
        "summary": post.summary,
        "operationId": post.name,
        "parameters": parameters,
        "requestBody": {"required": True, "content": {_JSON: {"schema": _reference(post.takes)}}},
        "responses": {"200": _answer(post.gives), **waits, **_refusals(_ANY_PLACE + _ANY_REQUEST + post.codes)},
    }


def _answer(shape: str, description: str = "Done.") -> dict[str, Any]:
    content: dict[str, Any] = {_LOG_MEDIA.get(shape, _JSON): {"schema": _TEXT if shape in _LOG_MEDIA else _reference(shape)}}
    if shape == "PublicKey":
        content = {
            "application/x-pem-file": {"schema": _TEXT},
            "text/plain": {"schema": _TEXT},
            _JSON: {"schema": _reference("Jwk")},
        }
    return {"description": description, "content": content}


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
    shapes = [Impact, Whoami, Keys, Key, SignedUse, PendingUse, Explanation, Operations, Envelope, Redemption, ProblemDocument, SignBody]
    shapes += [Freeze, Freezes, FreezeBody, Policy, PolicyVersion, ProposalBody]
    shapes += [Glass, Glasses, GlassBody, NoteBody]
    _, schemas = msgspec.json.schema_components(shapes, ref_template="#/components/schemas/{name}")
    for schema in schemas.values():
        if "description" in schema:
            schema["description"] = schema["description"].split("\n")[0]
    schemas["Redemption"]["properties"]["message"] |= {"pattern": _BASE64}
    body = schemas["SignBody"]
    for name in ("message", "digest"):
        body["properties"][name] |= {"pattern": _BASE64}
    body["properties"]["reason"] |= {"maxLength": MAX_REASON_CHARACTERS}
    body["properties"]["media_type"] |= {"maxLength": MAX_MEDIA_TYPE_CHARACTERS, "pattern": "^[ -~]*$"}
    body["oneOf"] = [{"required": ["message"]}, {"required": ["digest"]}]
    one_or_the_other = {"anyOf": [_reference(name) for name in ("SignedUse", "PendingUse", "ProblemDocument")]}
    return {
        **schemas,
        "Batch": _object(items={"type": "array", "items": _reference("SignBody"), "minItems": 1, "maxItems": MAX_BATCH_ITEMS}),
        "BatchResults": _object(results={"type": "array", "items": one_or_the_other}),
        "ConsistencyProof": _object(old=_NUMBER, size=_NUMBER, proof={"type": "array", "items": _TEXT}),
        "Jwk": _OBJECT,
        "JwkSet": _object(keys={"type": "array", "items": _reference("Jwk")}),
        "Record": _OBJECT,
        "RecordPage": _object(records={"type": "array", "items": _reference("Record")}, next={"type": ["string", "null"]}),
    }


def _object(**members: Any) -> dict[str, Any]:
    return {"type": "object", "properties": members, "required": list(members)}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
