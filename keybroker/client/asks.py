"""Everything that can be asked of a broker, as values: one function for each question, and no I/O.

`Client` and `AsyncClient` have these functions as their methods, and differ only in how they send what the functions return.
"""

from __future__ import annotations

import contextlib
import enum
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, Literal, TypedDict, TypeVar, Unpack
from urllib.parse import urlencode

import msgspec

from keybroker.client import problems
from keybroker.client.errors import BrokerAnswerError
from keybroker.client.results import (
    Explanation,
    Freeze,
    Glass,
    Key,
    Operation,
    OperationPage,
    Pending,
    Policy,
    PolicyVersion,
    Record,
    RecordPage,
    SignedUse,
    Whoami,
)
from keybroker.errors import InvalidError, RefusalError
from keybroker.model.impact import Impact
from keybroker.model.key import KEY_NAME, Algorithm
from keybroker.model.request import Format, SignBody

PublicKeyFormat = Literal["pem", "jwk", "openssh"]

BatchResult = SignedUse | Pending | RefusalError
"""What became of one item of a batch."""

T = TypeVar("T")

OPERATION_ID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
MAX_WAIT_S = 30
_IDEMPOTENCY_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_RANDOM_BYTES = 24
_ULID = re.compile(r"[0-9A-HJKMNP-TV-Z]{26}")


class Auto(enum.Enum):
    """The type of `AUTO`."""

    AUTO = "auto"


AUTO = Auto.AUTO
"""As an idempotency key: a new random one for each call, so that the call can be tried again without a second use of the key."""


class RecordFilters(TypedDict, total=False):
    """Which records; what is empty or absent does not filter.

    Attributes:
        workload: a SPIFFE ID, or a pattern of them (`*` is one segment, `**` at the end one or more). Without it: all that we may read.
        key: name of a key.
        key_version: with `key`.
        algorithm: JOSE name.
        grant: id of a grant that allowed it.
        svid: serial number of the caller's certificate, hex.
        address: of the caller.
        content: a content field, `NAME=VALUE`.
        kind: of record.
        outcome: `signed`, `failed`, `withheld` or `unknown`.
        use: ULID of a use.
        since: RFC 3339; not earlier.
        until: RFC 3339; earlier than this.
    """

    workload: str
    key: str
    key_version: int
    algorithm: str
    grant: str
    svid: str
    address: str
    content: str
    kind: str
    outcome: str
    use: str
    since: str
    until: str


@dataclass(frozen=True, slots=True)
class Ask(Generic[T]):
    """One question.

    Attributes:
        method: of HTTP.
        target: path and query, ASCII.
        decode: makes the answer's value of the body of a 200; raises `BrokerAnswerError` where that cannot be.
        body: JSON; empty where there is none.
        is_idempotent: asking twice does no more than asking once, by what is asked.
        idempotency_key: empty for none.
        wait_s: seconds for which the broker was asked to wait with its answer.
    """

    method: Literal["GET", "POST", "DELETE"]
    target: str
    decode: Callable[[bytes], T]
    body: bytes = field(default=b"", repr=False)
    idempotency_key: str = ""
    wait_s: int = 0
    is_idempotent: bool = False

    @property
    def is_repeatable(self) -> bool:
        """Whether asking twice does no more than asking once."""
        return self.method == "GET" or self.is_idempotent or bool(self.idempotency_key)

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The header fields that are this question's own."""
        fields = [("Content-Type", "application/json")] if self.method == "POST" else []
        return [*fields, ("Idempotency-Key", self.idempotency_key)] if self.idempotency_key else fields


def whoami() -> Ask[Whoami]:
    """What the broker sees of us."""
    return _get("/v1/whoami", partial(_decoded, Whoami))


def keys() -> Ask[tuple[Key, ...]]:
    """The keys that we may look at."""
    return _get("/v1/keys", lambda data: _decoded(_Keys, data).keys)


def key(name: str) -> Ask[Key]:
    """One key and its versions."""
    return _get(_path(name), partial(_decoded, Key))


def public_key(name: str, format: PublicKeyFormat = "pem", version: int | None = None) -> Ask[str]:  # noqa: A002  as the broker calls it
    """The public key of one version (of the one that signs, if None), as text: PEM, JWK (RFC 7517) or OpenSSH."""
    return _get(f"{_path(name)}/public", _text, format=format, **({} if version is None else {"version": str(version)}))


def jwks() -> Ask[dict[str, Any]]:
    """The public keys that we may look at, as a JWK set (RFC 7517 section 5)."""
    return _get("/v1/jwks", partial(_decoded, dict[str, Any]))


def sign(
    key: str,
    algorithm: Algorithm | str,
    *,
    message: bytes | None = None,
    digest: bytes | None = None,
    format: Format | None = None,  # noqa: A002  the word that the broker uses
    reason: str = "",
    media_type: str = "",
    idempotency_key: str | Auto = "",
) -> Ask[SignedUse]:
    """Use a key once.

    Args:
        key: its name.
        algorithm: a JOSE name.
        message: what to sign, at most 256 KiB; the broker hashes it.
        digest: what to sign, already hashed; needs a grant of `sign-digest`. Exactly one of the two is given.
        format: of an ECDSA signature: `der` (if None) or `p1363`.
        reason: why, for people who read the record.
        media_type: of the message, for rules that look at it.
        idempotency_key: `AUTO`, or 1 to 64 characters of `[A-Za-z0-9_-]`. With one, a lost answer is asked for again, and no second
            use is made. Without one, nothing is tried again.

    Raises (when it is sent):
        PendingError: others have to approve it first.
    """
    body = msgspec.json.encode(_sign_body(algorithm, message, digest, format, reason, media_type))
    return Ask("POST", f"{_path(key)}/sign", partial(_decoded, SignedUse), body, _idempotency_key(idempotency_key))


def sign_batch(key: str, items: Sequence[SignBody], *, idempotency_key: str | Auto = "") -> Ask[tuple[BatchResult, ...]]:
    """Use a key once for each of up to 1,000 items. One answer or refusal for each, in order; none of them is raised."""

    def decode(data: bytes) -> tuple[BatchResult, ...]:
        results = _decoded(_Batch, data).results
        if len(results) != len(items):
            raise BrokerAnswerError(f"{len(results)} answers to {len(items)} items")
        return tuple(map(_result, results))

    return Ask("POST", f"{_path(key)}/sign/batch", decode, msgspec.json.encode({"items": items}), _idempotency_key(idempotency_key))


def explain(
    key: str,
    algorithm: Algorithm | str,
    *,
    message: bytes | None = None,
    digest: bytes | None = None,
    format: Format | None = None,  # noqa: A002  the word that the broker uses
    reason: str = "",
    media_type: str = "",
) -> Ask[Explanation]:
    """The decision that `sign` would get. No key is used; that it was asked is on record."""
    body = msgspec.json.encode(_sign_body(algorithm, message, digest, format, reason, media_type))
    return Ask("POST", f"{_path(key)}/sign/explain", partial(_decoded, Explanation), body)


def operations(*, state: str = "", wait_s: int = 0, mark: str = "", limit: int = 100) -> Ask[OperationPage]:
    """The operations that we asked for or may approve, newest first.

    Args:
        state: only those in it; empty for all.
        wait_s: 0 to 30: let the broker wait so long for a list with another mark than `mark`.
        mark: of the list that we have; empty for none.
        limit: operations at most.
    """
    filters = {name: value for name, value in (("state", state), ("mark", mark)) if value}
    return _waiting("/v1/operations", partial(_decoded, OperationPage), wait_s, limit=str(limit), **filters)


def operation(id: str, *, wait_s: int = 0) -> Ask[Operation]:  # noqa: A002  as the broker calls it
    """One operation. With `wait_s` (0 to 30), the answer comes when it is not pending any more, or so many seconds later."""
    return _waiting(_operation_path(id), partial(_operation, id), wait_s)


def give_approval(id: str, envelope: bytes) -> Ask[Operation]:  # noqa: A002  as above
    """Hand in a signed approval or refusal (`keybroker.audit.approval`). `Client.approve` and `Client.refuse` make one and hand it in."""
    return Ask("POST", f"{_operation_path(id)}/approvals", partial(_operation, id), envelope, is_idempotent=True)


def redeem(id: str, *, message: bytes | None = None, idempotency_key: str | Auto = "") -> Ask[SignedUse]:  # noqa: A002  as above
    """Do what a complete quorum has approved, once: the same answer as `sign`.

    Args:
        id: of the operation, which we have asked for.
        message: the message again, where its key is an Ed25519 key; the broker keeps digests only.
        idempotency_key: as for `sign`.

    Raises (when it is sent):
        PendingError: an approval is missing, or a cool-off is not over.
    """
    body = msgspec.json.encode({} if message is None else {"message": message})
    return Ask("POST", f"{_operation_path(id)}/redeem", partial(_decoded, SignedUse), body, _idempotency_key(idempotency_key))


def pending(data: bytes) -> Pending:
    """What a 202 says.

    Raises:
        BrokerAnswerError: it makes no sense.
    """
    return _decoded(Pending, data)


def freezes() -> Ask[tuple[Freeze, ...]]:
    """The freezes in force of what we may freeze or unfreeze, oldest first."""
    return _get("/v1/freezes", lambda data: _decoded(_Freezes, data).freezes)


def freeze(*, workload: str = "", key: str = "", token: str = "", everything: bool = False, reason: str) -> Ask[Freeze]:
    """Stop something at once: exactly one of a workload (its SPIFFE ID), a key, a token and everything. Repeating it changes nothing.

    Args:
        reason: why, for people who read the record.
    """
    given = {name: value for name, value in (("workload", workload), ("key", key), ("token", token), ("everything", everything)) if value}
    if len(given) != 1:
        raise InvalidError("freeze exactly one of a workload, a key, a token and everything")
    body = msgspec.json.encode(given | {"reason": reason})
    return Ask("POST", "/v1/freezes", partial(_decoded, Freeze), body, is_idempotent=True)


def unfreeze(freeze: str, *, operation: str = "") -> Ask[Freeze]:
    """Lift a freeze, by its id.

    Args:
        operation: that others have approved; empty the first time.

    Raises (when it is sent):
        PendingError: others have to approve it first.
    """
    if not _ULID.fullmatch(freeze):
        raise InvalidError("a freeze is named by its id, 26 characters, as `keybroker freezes` shows it")
    query = f"?{urlencode({'operation': operation})}" if operation else ""
    return Ask("DELETE", f"/v1/freezes/{freeze}{query}", partial(_decoded, Freeze))


def glasses() -> Ask[tuple[Glass, ...]]:
    """What has been opened and not been reviewed, of what we may open or close, oldest first."""
    return _get("/v1/break-glass", lambda data: _decoded(_Glasses, data).glasses)


def break_glass(grant: str, *, seconds: int, reason: str) -> Ask[Glass]:
    """Waive hours, limits and quorum of a grant for a while. Somebody else has to review it.

    Args:
        grant: its id.
        seconds: how long.
        reason: why, for people who read the record.
    """
    body = msgspec.json.encode({"grant": grant, "seconds": seconds, "reason": reason})
    return Ask("POST", "/v1/break-glass", partial(_decoded, Glass), body)


def close_glass(glass: str, *, note: str) -> Ask[Glass]:
    """End it now. By somebody else than who opened it, this is the review.

    Args:
        note: what was found, for people who read the record.
    """
    if not _ULID.fullmatch(glass):
        raise InvalidError("it is named by its id, 26 characters, as `keybroker break-glass list` shows it")
    return Ask("POST", f"/v1/break-glass/{glass}/close", partial(_decoded, Glass), msgspec.json.encode({"note": note}))


def live_policy() -> Ask[Policy]:
    """The live rules, whole; for whoever may propose others."""
    return _get("/v1/admin/policy", partial(_decoded, Policy))


def propose_policy(base: str, files: dict[str, str], *, reason: str, operation: str = "") -> Ask[PolicyVersion]:
    """Put other rules in the place of the live ones. What only narrows access is in force at once.

    Args:
        base: of the live rules that they were written for.
        files: grant files by name; all of them.
        reason: why, for people who read the record.
        operation: that others have approved; empty the first time.

    Raises (when it is sent):
        PendingError: it may widen access: others have to approve it first.
    """
    body = msgspec.json.encode({"base": base, "files": files, "reason": reason} | ({"operation": operation} if operation else {}))
    return Ask("POST", "/v1/admin/policy/changes", partial(_decoded, PolicyVersion), body)


def records(*, cursor: str = "", limit: int = 100, **filters: Unpack[RecordFilters]) -> Ask[RecordPage]:
    """A page of the record, oldest first; it may be short, even empty, before the end. That it was read is on record too.

    Args:
        cursor: `next` of the page before.
        limit: records at most, 1 to 1,000.
        filters: which records; what is empty or absent does not filter.
    """
    unknown = filters.keys() - RecordFilters.__annotations__.keys()
    if unknown:
        raise TypeError(f"records are not filtered by {', '.join(sorted(unknown))}")
    parameters = {name: str(value) for name, value in filters.items() if value}
    return _get("/v1/audit/records", _page, **parameters, **({"cursor": cursor} if cursor else {}), limit=str(limit))


def record(index: int) -> Ask[Record]:
    """One record by its index in the log."""
    return _get(f"/v1/audit/records/{int(index)}", _record)


def impact(*, workload: str = "", key: str = "", svid: str = "", person: str = "", since: str = "", until: str = "") -> Ask[Impact]:
    """What an identity, a key, a certificate, a person or a time window did and tried to do. That it was asked is on record too.

    Args:
        workload: a SPIFFE ID.
        key: name of a key.
        svid: serial number of a certificate, hex.
        person: who approved.
        since: RFC 3339; not earlier.
        until: RFC 3339; earlier than this.
    """
    given = {"workload": workload, "key": key, "svid": svid, "person": person, "since": since, "until": until}
    return _get("/v1/audit/impact", partial(_decoded, Impact), **{name: value for name, value in given.items() if value})


def checkpoint() -> Ask[bytes]:
    """The newest signed checkpoint of the log: a note (C2SP tlog-checkpoint)."""
    return _get("/v1/audit/checkpoint", bytes)


def inclusion_proof(index: int) -> Ask[bytes]:
    """That a record is in the log: a proof file (C2SP tlog-proof), without the record."""
    return _get("/v1/audit/proof/inclusion", bytes, index=str(int(index)))


def consistency_proof(old: int, size: int) -> Ask[tuple[bytes, ...]]:
    """That the log at `size` records begins with its first `old`: the hashes of RFC 6962 section 2.1.2."""
    return _get("/v1/audit/proof/consistency", lambda data: _decoded(_Consistency, data).proof, old=str(int(old)), size=str(int(size)))


def export(start: int = 0, workload: str = "") -> Ask[bytes]:
    """Part of an export: lines. If the last one is `{"next": N}`, there is more from N on. That it was read is on record too.

    Args:
        start: where to begin; 0, or N of the part before.
        workload: whose trail; everything that we may read if empty.
    """
    return _get("/v1/audit/export", bytes, start=str(int(start)), **({"workload": workload} if workload else {}))


class _Consistency(msgspec.Struct, frozen=True):
    proof: tuple[bytes, ...]


class _Keys(msgspec.Struct, frozen=True):
    keys: tuple[Key, ...]


class _Glasses(msgspec.Struct, frozen=True):
    glasses: tuple[Glass, ...]


class _Freezes(msgspec.Struct, frozen=True):
    freezes: tuple[Freeze, ...]


class _Page(msgspec.Struct, frozen=True):
    records: tuple[msgspec.Raw, ...]
    next: str | None


class _Batch(msgspec.Struct, frozen=True):
    results: tuple[msgspec.Raw, ...]


def _get(path: str, decode: Callable[[bytes], T], **parameters: str) -> Ask[T]:
    return Ask("GET", f"{path}?{urlencode(parameters)}" if parameters else path, decode)


def _waiting(path: str, decode: Callable[[bytes], T], wait_s: int, **parameters: str) -> Ask[T]:
    """A question that the broker answers later, when there is something new."""
    waits = {"wait": str(_wait(wait_s))} if wait_s else {}
    return replace(_get(path, decode, **parameters, **waits), wait_s=wait_s)


def _wait(seconds: int) -> int:
    if not 0 <= seconds <= MAX_WAIT_S:
        raise InvalidError(f"a broker waits 0 to {MAX_WAIT_S} seconds; ask again for more")
    return seconds


def _operation_path(id_: str) -> str:
    """The route of an operation. Not a ULID: no such operation, and no other route either."""
    if not OPERATION_ID.fullmatch(id_):
        raise InvalidError(f"{id_!r} is not an operation: 26 digits and capital letters, as `keybroker operations list` shows them")
    return f"/v1/operations/{id_}"


def _path(name: str) -> str:
    """The route of a key. Not a key name: no such key, and no other route either."""
    if not KEY_NAME.fullmatch(name):
        raise InvalidError(f"{name!r} is not a key name: lower-case letters, digits, `.`, `_` and `-`, at most 64")
    return f"/v1/keys/{name}"


def _idempotency_key(given: str | Auto) -> str:
    if isinstance(given, Auto):
        return secrets.token_urlsafe(_RANDOM_BYTES)
    if given and not _IDEMPOTENCY_KEY.fullmatch(given):
        raise InvalidError("an idempotency key is 1 to 64 characters of A-Z, a-z, 0-9, `_` and `-`, or AUTO")
    return given


def _sign_body(
    algorithm: Algorithm | str, message: bytes | None, digest: bytes | None, format_: Format | None, reason: str, media_type: str
) -> SignBody:
    """A body that the broker will understand.

    Raises:
        InvalidError: it would not.
    """
    try:
        known = Algorithm(algorithm)
    except ValueError as err:
        raise InvalidError(f"the algorithm must be one of {', '.join(each.value for each in Algorithm)}") from err
    body = SignBody(
        algorithm=known,
        message=msgspec.UNSET if message is None else message,
        digest=msgspec.UNSET if digest is None else digest,
        format=format_ or msgspec.UNSET,
        reason=reason,
        media_type=media_type,
    )
    body.check()
    return body


def _decoded(type_: type[T], data: bytes) -> T:
    try:
        return msgspec.json.decode(data, type=type_)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as err:
        raise BrokerAnswerError(f"the answer is not one that this version understands: {err}") from err


def _operation(id_: str, data: bytes) -> Operation:
    """An operation, and the one that was asked for."""
    found = _decoded(Operation, data)
    if not found.id == found.subject.operation.id == id_:
        raise BrokerAnswerError("the answer is about another operation")
    return found


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeError as err:
        raise BrokerAnswerError("the answer is not text") from err


def _page(data: bytes) -> RecordPage:
    page = _decoded(_Page, data)
    return RecordPage(tuple(_record(bytes(raw)) for raw in page.records), page.next or None)


def _record(data: bytes) -> Record:
    try:
        return Record.parse(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as err:
        raise BrokerAnswerError(f"a record is not one that this version understands: {err}") from err


def _result(raw: msgspec.Raw) -> BatchResult:
    with contextlib.suppress(msgspec.MsgspecError, UnicodeError, RecursionError):
        return msgspec.json.decode(raw, type=SignedUse)
    with contextlib.suppress(msgspec.MsgspecError, UnicodeError, RecursionError):
        return msgspec.json.decode(raw, type=Pending)
    return problems.of_document(_decoded(problems.ProblemDocument, bytes(raw)))
