"""One use of one key, parsed and joined with the inventory: what the one order works on, and the records it leaves."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from keybroker.audit.leaf import canonical
from keybroker.authority.keyring import KeyEntry, ref_of
from keybroker.authority.limits import Subject
from keybroker.authority.operations import Operation
from keybroker.clock import to_rfc3339
from keybroker.errors import ApprovalMismatchError, InvalidError
from keybroker.model.decision import CallerInput, ContentInput, Decision, KeyInput, PolicyInput, TargetInput
from keybroker.model.identity import Caller
from keybroker.model.key import KEY_NAME, Algorithm, KeyVersion
from keybroker.model.record import EMPTY, Draft, KeyFacts, RecordKind, SvidFacts, Tbs
from keybroker.model.request import MAX_MESSAGE_BYTES, SignBody


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
        operation: as policy calls it: `sign` or `sign-digest`.
        content: what policy sees of what is signed.
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
    operation: str
    content: ContentInput
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
        operation = "sign-digest" if body.is_digest else "sign"
        content = ContentInput("digest" if body.is_digest else "message", len(body.content), body.media_type)
        digest = body.content if body.is_digest else hashlib.new(body.algorithm.hash_name, body.content).digest()
        data = body.content if body.algorithm.signs_message else digest
        return cls._made(asker, key_name, key, body, operation, content, digest, data)

    @classmethod
    def of_operation(cls, asker: Asker, operation: Operation, key: KeyEntry | None, message: bytes | None) -> KeyUse:
        """The use that an operation is about, asked for again by its requester.

        Args:
            message: what is signed, where the token needs it whole; an operation keeps digests only.

        Raises:
            InvalidError: the message is missing, or too large.
            ApprovalMismatchError: it is another one.
        """
        subject = operation.subject
        algorithm, digest = Algorithm(subject.algorithm), bytes.fromhex(subject.tbs.value)
        if message is None and algorithm.signs_message:
            raise InvalidError("This operation needs its message again.", pointers=(("/message", f"{algorithm.value} signs messages"),))
        if message is not None and len(message) > MAX_MESSAGE_BYTES:
            raise InvalidError("The message is too large.", pointers=(("/message", f"at most {MAX_MESSAGE_BYTES} bytes"),))
        if message is not None and hashlib.new(algorithm.hash_name, message).digest() != digest:
            raise ApprovalMismatchError("This is not the message that was asked for.", reasons=("another-message",))
        given = {"message": message} if message is not None and algorithm.signs_message else {"digest": digest}
        form = {"format": operation.format} if operation.format else {}
        media_type = subject.content.media_type
        body = msgspec.convert({"algorithm": algorithm, "reason": subject.reason, "media_type": media_type, **given, **form}, SignBody)
        content = ContentInput(subject.content.type, subject.content.size, media_type, dict(subject.content.fields))
        data = message if message is not None and algorithm.signs_message else digest
        return cls._made(asker, subject.key.name, key, body, subject.operation.kind, content, digest, data)

    @classmethod
    def _made(
        cls,
        asker: Asker,
        key_name: str,
        key: KeyEntry | None,
        body: SignBody,
        operation: str,
        content: ContentInput,
        digest: bytes,
        data: bytes,
    ) -> KeyUse:
        version = key.current if key else None
        ref = ref_of(version.name, version.version) if version else ""
        question = _question(asker, key_name, key, version, body, operation, content)
        return cls(asker, key_name, key, body, operation, content, digest, data, question, version, ref)

    def asked_by(self, asker: Asker) -> KeyUse:
        """The same use, asked for by this caller."""
        question = _question(asker, self.key_name, self.key, self.version, self.body, self.operation, self.content)
        return replace(self, asker=asker, policy_input=question)

    @property
    def format(self) -> str:
        """Of the signature: `der` or `p1363`; empty where there is no choice, or none was made."""
        return "" if self.body.format is msgspec.UNSET else str(self.body.format)

    @property
    def subject(self) -> Subject:
        """Whose use it is, for limits. No request can name a principal yet."""
        return Subject(self.asker.caller.id.text, self.key_name, "")

    @property
    def algorithm(self) -> str:
        """A JOSE name."""
        return self.body.algorithm.value

    @property
    def hash_name(self) -> str:
        """Of the digest."""
        return self.body.algorithm.hash_name

    @property
    def reason(self) -> str:
        """As the caller gives it."""
        return self.body.reason

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


def _question(
    asker: Asker, key_name: str, key: KeyEntry | None, version: KeyVersion | None, body: SignBody, operation: str, content: ContentInput
) -> bytes:
    """The policy input, canonical JSON."""
    return canonical(
        PolicyInput(
            caller=asker.policy_caller(),
            operation=operation,
            target=TargetInput("key", key_name),
            key=key_input(key.labels, version) if key and version else KeyInput(),
            algorithm=body.algorithm.value,
            content=content,
            reason=body.reason,
        )
    )


def key_input(labels: tuple[tuple[str, str], ...], version: KeyVersion) -> KeyInput:
    """The `key` of the policy input."""
    return KeyInput(version.name, version.version, version.family.value, dict(labels))
