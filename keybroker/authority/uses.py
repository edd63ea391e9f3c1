"""One use of one key, parsed and joined with the inventory: what the one order works on, and the records it leaves."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import msgspec

from keybroker.audit.leaf import canonical
from keybroker.authority.keyring import KeyEntry, ref_of
from keybroker.authority.limits import Subject
from keybroker.clock import to_rfc3339
from keybroker.errors import InvalidError
from keybroker.model.decision import CallerInput, ContentInput, Decision, KeyInput, PolicyInput, TargetInput
from keybroker.model.identity import Caller
from keybroker.model.key import KEY_NAME, KeyVersion
from keybroker.model.record import EMPTY, Draft, KeyFacts, RecordKind, SvidFacts, Tbs
from keybroker.model.request import SignBody


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, validated, with what the record keeps of the request around it.

    Attributes:
        chain: the certificates, to be judged again when something changes under way.
        request_id: a ULID; what the caller sees as `instance`.
        traceparent: W3C trace context; empty if there is none.
        networks: names of the networks that the address is in.
    """

    caller: Caller
    chain: tuple[bytes, ...] = field(repr=False)
    request_id: str
    traceparent: str
    networks: tuple[str, ...]

    @property
    def trace_id(self) -> str:
        """The trace that the request is part of, 32 hex digits; empty if there is none."""
        return self.traceparent[3:35]

    def policy_caller(self) -> CallerInput:
        """The `caller` of the policy input."""
        identity = self.caller.id
        return CallerInput(identity.text, identity.trust_domain, identity.path, self.networks)

    def svid_facts(self) -> SvidFacts:
        """The `svid` of the record."""
        svid = self.caller.svid
        return SvidFacts(svid.sha256, svid.serial, to_rfc3339(svid.not_after * 1_000_000), self.caller.address)


@dataclass(frozen=True, slots=True)
class KeyUse:
    """A request for one use of one key, parsed and bounded; nothing is decided yet.

    Attributes:
        key_name: as asked; `key` is None where the inventory has no such key, which the caller must not learn.
        digest: what is signed, or for Ed25519 the SHA-512 of it.
        data: what goes to the token: the digest, or for Ed25519 the message.
        policy_input: canonical JSON.
        version: the key version that would sign.
        ref: the worker's name of that version; empty if there is none.
    """

    asker: Asker
    key_name: str
    key: KeyEntry | None
    body: SignBody
    digest: bytes = field(repr=False)
    data: bytes = field(repr=False)
    policy_input: bytes = field(repr=False)
    version: KeyVersion | None
    ref: str

    @classmethod
    def parse(cls, asker: Asker, key_name: str, key: KeyEntry | None, body: SignBody) -> KeyUse:
        """Check the body again (the frontend did; nobody here relies on it) and hash the message ourselves.

        Raises:
            InvalidError: a field that cannot be used, with its JSON pointer.
        """
        if not KEY_NAME.fullmatch(key_name):
            raise InvalidError("The key name cannot be one.", pointers=(("", "a key name is [a-z0-9][a-z0-9._-]{0,63}"),))
        body.check()
        content = body.content
        digest = content if body.is_digest else hashlib.new(body.algorithm.hash_name, content).digest()
        data = content if body.algorithm.signs_message else digest
        version = key.current if key else None
        ref = ref_of(version.name, version.version) if version else ""
        return cls(asker, key_name, key, body, digest, data, canonical(_policy_input(asker, key_name, key, body)), version, ref)

    @property
    def subject(self) -> Subject:
        """Whose use it is, for limits. No request can name a principal yet."""
        return Subject(self.asker.caller.id.text, self.key_name, "")

    def key_facts(self) -> KeyFacts | None:
        """The `key` of the record."""
        version = self.version
        return KeyFacts(version.name, version.version, version.spki_sha256) if version else None

    def draft(self, kind: RecordKind, decision: Decision, *, use: str = "", retry_of: str = "", **body: Any) -> Draft:
        """A record of this request and how it was decided: an intent, a denial, a read."""
        asker = self.asker
        return Draft(
            kind=kind,
            trail=asker.caller.id.text,
            use=use,
            retry_of=retry_of,
            request=msgspec.Raw(self.policy_input),
            svid=asker.svid_facts(),
            key=self.key_facts(),
            tbs=Tbs(self.body.algorithm.hash_name, self.digest.hex()),
            decision=msgspec.Raw(decision.record) if decision.record else EMPTY,
            trace_id=asker.trace_id,
            body={"request_id": asker.request_id, **body},
        )


def _policy_input(asker: Asker, key_name: str, key: KeyEntry | None, body: SignBody) -> PolicyInput:
    version = key.current if key else None
    return PolicyInput(
        caller=asker.policy_caller(),
        operation="sign-digest" if body.is_digest else "sign",
        target=TargetInput("key", key_name),
        key=key_input(key.labels, version) if key and version else KeyInput(),
        algorithm=body.algorithm.value,
        content=ContentInput("digest" if body.is_digest else "message", len(body.content), body.media_type),
        reason=body.reason,
    )


def key_input(labels: tuple[tuple[str, str], ...], version: KeyVersion) -> KeyInput:
    """The `key` of the policy input."""
    return KeyInput(version.name, version.version, version.family.value, dict(labels))
