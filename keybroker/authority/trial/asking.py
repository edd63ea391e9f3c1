"""Requests as people write them, and as records keep them, made into the policy input that the engine is asked with."""

from __future__ import annotations

import ipaddress
from typing import Any

import msgspec

from keybroker.audit.leaf import canonical
from keybroker.authority.policy.grants import Rules
from keybroker.authority.trial.region import APPROVE, KEY_OPERATIONS, OPERATIONS, SIGNING, TARGET_KINDS
from keybroker.errors import ConfigError
from keybroker.model.decision import CallerInput, ContentInput, KeyInput, PolicyInput, TargetInput
from keybroker.model.identity import SpiffeId, SpiffeIdError
from keybroker.model.key import KEY_NAME, Algorithm, KeyFamily

WHOLE_RECORD = "**"
_ALGORITHMS = tuple(each.value for each in Algorithm)
_FAMILIES = tuple(each.value for each in KeyFamily)


class AskingError(ConfigError):
    """The request makes no sense. Names the field, and says how to write it."""


class ShortRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A request in short form.

    Attributes:
        workload: the caller's SPIFFE ID.
        operation: `sign` if absent, or `read-audit` where a trail is named.
        trail: whose records are read; `**` is the whole record.
        requester: for `approve`: who asked for what would be approved.
        address: where it comes from; the candidate's own networks say in which of them that is.
        networks: or the names of the networks themselves.
        size: of what is signed, in bytes.
        version: of the key that would sign; `family` and `labels` are the key's too.
    """

    workload: str
    operation: str = ""
    key: str = ""
    trail: str = ""
    requester: str = ""
    algorithm: str = ""
    address: str = ""
    networks: tuple[str, ...] = ()
    reason: str = ""
    media_type: str = ""
    size: int = 0
    version: int = 0
    family: str = ""
    labels: dict[str, str] = {}

    def policy_input(self, rules: Rules) -> PolicyInput:
        """The whole input.

        Args:
            rules: of the candidate, whose networks an address is looked up in.

        Raises:
            AskingError: a field is missing, or cannot be.
        """
        caller = _identity("workload", self.workload)
        operation = self.operation or ("read-audit" if self.trail else "sign")
        _require("operation", _one_of(OPERATIONS), holds=operation in OPERATIONS)
        networks = self._networks(rules)
        asker = CallerInput(caller.text, caller.trust_domain, caller.path, networks)
        if operation == "read-audit":
            _require("trail", "a SPIFFE ID, or ** for the whole record", holds=bool(self.trail) and not self.key)
            trail = "" if self.trail == WHOLE_RECORD else _identity("trail", self.trail).text
            return PolicyInput(caller=asker, operation=operation, target=TargetInput("trail", "", trail))
        _require("operation", "give it as a whole input (--input), as docs/reference/policy.md shows it", holds=operation in KEY_OPERATIONS)
        _require("key", "the name of a key", holds=bool(KEY_NAME.fullmatch(self.key)) and not self.trail)
        _require("requester", "the SPIFFE ID that asked, for `approve` only", holds=bool(self.requester) == (operation == APPROVE))
        requester = _identity("requester", self.requester).text if self.requester else ""
        signs = operation in SIGNING
        _require(
            "algorithm", f"{_one_of(_ALGORITHMS)} for signing, none for reading", holds=self.algorithm in (_ALGORITHMS if signs else ("",))
        )
        _require("family", _one_of(_FAMILIES), holds=self.family in ("", *_FAMILIES))
        content = ContentInput("digest" if operation == "sign-digest" else "message", self.size, self.media_type)
        return PolicyInput(
            caller=asker,
            operation=operation,
            target=TargetInput("key", self.key, requester),
            key=KeyInput(self.key, self.version, self.family, self.labels) if self.version else KeyInput(),
            algorithm=self.algorithm,
            content=content if signs else ContentInput(),
            reason=self.reason,
        )

    def _networks(self, rules: Rules) -> tuple[str, ...]:
        if not self.address:
            for name in self.networks:
                _require(
                    "networks",
                    f"no network is named {name!r}; there are {', '.join(rules.networks) or 'none'}",
                    holds=name in rules.networks,
                )
            return self.networks
        _require("address", "give either an address or the names of networks", holds=not self.networks)
        try:
            ipaddress.ip_address(self.address)
        except ValueError as err:
            raise AskingError("address: an IP address such as 192.0.2.7") from err
        return rules.networks_of(self.address)


def read_input(data: bytes, rules: Rules) -> PolicyInput:
    """The policy input of a JSON document: one itself, or a record that holds one.

    A record's input comes with the address that it came from; in which networks that is, the candidate says.

    Raises:
        AskingError: it is neither.
    """
    try:
        document = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as err:
        raise AskingError("the input is not JSON; give a policy input as in docs/reference/policy.md, or a record") from err
    address = ""
    if isinstance(document, dict) and "request" in document and "kind" in document:
        svid = document.get("svid")
        address = str(svid.get("address", "")) if isinstance(svid, dict) else ""
        document = document["request"]
        if not document:
            raise AskingError("nothing was asked in this record; take one of the kind intent, denial or read")
    request = _typed(document)
    _check_identity(request)
    if not address:
        return request
    return msgspec.structs.replace(request, caller=msgspec.structs.replace(request.caller, networks=rules.networks_of(address)))


def bytes_of(request: PolicyInput) -> bytes:
    """What the engine is asked with."""
    return canonical(request)


def _typed(document: Any) -> PolicyInput:
    try:
        request = msgspec.convert(document, PolicyInput, strict=True)
    except msgspec.ValidationError as err:
        raise AskingError(f"not a policy input: {err}") from err
    if canonical(request) != canonical(document):
        raise AskingError("not a policy input: every field is there, and no other; docs/reference/policy.md shows one")
    return request


def _check_identity(request: PolicyInput) -> None:
    caller = _identity("caller.spiffe_id", request.caller.spiffe_id)
    is_same = (caller.trust_domain, caller.path) == (request.caller.trust_domain, request.caller.path)
    _require("caller", "spiffe_id, trust_domain and path name different identities", holds=is_same)
    if request.target.workload:
        _identity("target.workload", request.target.workload)
    _require("target.kind", _one_of(TARGET_KINDS), holds=request.target.kind in TARGET_KINDS)


def _identity(field: str, text: str) -> SpiffeId:
    try:
        return SpiffeId.parse(text)
    except SpiffeIdError as err:
        raise AskingError(f"{field}: {text!r} is not a SPIFFE ID ({err}); write spiffe://example.org/payments/api") from err


def _one_of(names: tuple[str, ...]) -> str:
    return f"one of {', '.join(names)}"


def _require(field: str, text: str, *, holds: bool) -> None:
    if not holds:
        raise AskingError(f"{field}: {text}")
