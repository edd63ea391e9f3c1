"""The broker as an object: one method for each thing that can be asked of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import msgspec

from keybroker.client import problems
from keybroker.client.errors import BrokerAnswerError
from keybroker.client.results import Explanation, Key, Record, RecordPage, SignedUse, Whoami
from keybroker.client.transport import TIMEOUT_S, Transport
from keybroker.errors import InvalidError, RefusalError
from keybroker.model.identity import SpiffeId
from keybroker.model.key import KEY_NAME, Algorithm
from keybroker.model.request import Format, SignBody

PublicKeyFormat = Literal["pem", "jwk", "openssh"]
PAGE = 1_000

T = TypeVar("T")


class Client:
    """A client of one broker. Not for use by several threads at once; each can have its own.

    Every method raises `RefusalError` (the subclass of the problem's code) where the broker says no, `BrokerUnreachableError`
    where there is no answer, `BrokerIdentityError` where another than the broker answers, and `BrokerAnswerError` where the answer
    makes no sense.

    Args:
        url: `https://HOST:PORT`.
        svid: PEM file with our own chain and key; read again when it changes.
        bundle: file with the CA certificates of our trust domain; read again when it changes.
        broker_id: the SPIFFE ID that the broker must prove; `spiffe://<our trust domain>/keybroker` if None.
        timeout_s: seconds for one call, repeated attempts included.

    Raises:
        SettingsError: the URL cannot be used.
        ConfigError: the SVID or the bundle cannot be used.
    """

    def __init__(self, url: str, *, svid: Path, bundle: Path, broker_id: SpiffeId | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._transport = Transport(url, svid, bundle, broker_id, timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all connections."""
        self._transport.close()

    def whoami(self) -> Whoami:
        """What the broker sees of us."""
        return _decoded(self._transport.get("/v1/whoami"), Whoami)

    def keys(self) -> tuple[Key, ...]:
        """The keys that we may look at."""
        return _decoded(self._transport.get("/v1/keys"), _Keys).keys

    def key(self, name: str) -> Key:
        """One key and its versions."""
        return _decoded(self._transport.get(_path(name)), Key)

    def public_key(self, name: str, format: PublicKeyFormat = "pem") -> str:  # noqa: A002  the word that the broker uses
        """The public key of the version that signs, as text: PEM, JWK (RFC 7517) or OpenSSH."""
        return self._transport.get(f"{_path(name)}/public", {"format": format}).decode()

    def jwks(self) -> dict[str, Any]:
        """The public keys that we may look at, as a JWK set (RFC 7517 section 5)."""
        return _decoded(self._transport.get("/v1/jwks"), dict[str, Any])

    def sign(
        self,
        key: str,
        algorithm: Algorithm | str,
        *,
        message: bytes | None = None,
        digest: bytes | None = None,
        format: Format | None = None,  # noqa: A002  the word that the broker uses
        reason: str = "",
        media_type: str = "",
        idempotency_key: str = "",
    ) -> SignedUse:
        """Use a key once.

        Args:
            key: its name.
            algorithm: a JOSE name.
            message: what to sign, at most 256 KiB; the broker hashes it.
            digest: what to sign, already hashed; needs a grant of `sign-digest`. Exactly one of the two is given.
            format: of an ECDSA signature: `der` (if None) or `p1363`.
            reason: why, for people who read the record.
            media_type: of the message, for rules that look at it.
            idempotency_key: 1 to 64 characters of `[A-Za-z0-9_-]`. With one, a lost answer is asked for again, and no second use is made.
        """
        body = _body(algorithm, message, digest, format, reason, media_type)
        return _decoded(self._transport.post(f"{_path(key)}/sign", msgspec.json.encode(body), idempotency_key), SignedUse)

    def sign_batch(self, key: str, items: Sequence[SignBody], *, idempotency_key: str = "") -> tuple[SignedUse | RefusalError, ...]:
        """Use a key once for each of up to 1,000 items. One answer or refusal for each, in order; none of them is raised."""
        body = msgspec.json.encode({"items": items})
        answer = _decoded(self._transport.post(f"{_path(key)}/sign/batch", body, idempotency_key), _Batch)
        if len(answer.results) != len(items):
            raise BrokerAnswerError(f"{len(answer.results)} answers to {len(items)} items")
        return tuple(_result(each) for each in answer.results)

    def explain(
        self,
        key: str,
        algorithm: Algorithm | str,
        *,
        message: bytes | None = None,
        digest: bytes | None = None,
        format: Format | None = None,  # noqa: A002  the word that the broker uses
        reason: str = "",
        media_type: str = "",
    ) -> Explanation:
        """The decision that `sign` would get. No key is used; that it was asked is on record."""
        body = _body(algorithm, message, digest, format, reason, media_type)
        return _decoded(self._transport.post(f"{_path(key)}/sign/explain", msgspec.json.encode(body)), Explanation)

    def records(
        self,
        *,
        workload: str = "",
        key: str = "",
        kind: str = "",
        outcome: str = "",
        use: str = "",
        since: str = "",
        until: str = "",
        cursor: str = "",
        limit: int = 100,
    ) -> RecordPage:
        """A page of the record, oldest first; empty texts do not filter.

        Args:
            workload: a SPIFFE ID. Without it: everything that we may read.
            key: name of a key.
            kind: of record.
            outcome: `signed`, `failed`, `withheld` or `unknown`.
            use: ULID of a use.
            since: RFC 3339; not earlier.
            until: RFC 3339; earlier than this.
            cursor: `next` of the page before.
            limit: records at most, 1 to 1,000.
        """
        filters = {"workload": workload, "key": key, "kind": kind, "outcome": outcome, "use": use, "since": since, "until": until}
        parameters = {name: value for name, value in {**filters, "cursor": cursor}.items() if value}
        page = _decoded(self._transport.get("/v1/audit/records", {**parameters, "limit": str(limit)}), _Page)
        return RecordPage(tuple(_record(raw) for raw in page.records), page.next or None)

    def iter_records(
        self,
        *,
        workload: str = "",
        key: str = "",
        kind: str = "",
        outcome: str = "",
        use: str = "",
        since: str = "",
        until: str = "",
    ) -> Iterator[Record]:
        """All records that match, oldest first, page by page. Filters as for `records`."""
        cursor: str | None = ""
        while cursor is not None:
            page = self.records(
                workload=workload, key=key, kind=kind, outcome=outcome, use=use, since=since, until=until, cursor=cursor, limit=PAGE
            )
            yield from page.records
            cursor = page.next

    def record(self, index: int) -> Record:
        """One record by its index in the log."""
        return _record(self._transport.get(f"/v1/audit/records/{index}"))


class _Keys(msgspec.Struct, frozen=True):
    keys: tuple[Key, ...]


class _Page(msgspec.Struct, frozen=True):
    records: tuple[msgspec.Raw, ...]
    next: str | None


class _Batch(msgspec.Struct, frozen=True):
    results: tuple[msgspec.Raw, ...]


def _path(key: str) -> str:
    """The route of a key. Not a key name: no such key, and no other route either."""
    if not KEY_NAME.fullmatch(key):
        raise InvalidError(f"{key!r} is not a key name: lower-case letters, digits, `.`, `_` and `-`, at most 64")
    return f"/v1/keys/{quote(key)}"


def _body(
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


def _decoded(data: bytes, type_: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=type_)
    except (msgspec.MsgspecError, UnicodeError) as err:
        raise BrokerAnswerError(f"the answer is not one that this version understands: {err}") from err


def _record(raw: bytes | msgspec.Raw) -> Record:
    try:
        return Record.parse(bytes(raw))
    except (msgspec.MsgspecError, UnicodeError) as err:
        raise BrokerAnswerError(f"a record is not one that this version understands: {err}") from err


def _result(raw: msgspec.Raw) -> SignedUse | RefusalError:
    try:
        return msgspec.json.decode(raw, type=SignedUse)
    except (msgspec.MsgspecError, UnicodeError):
        return problems.of_document(_decoded(bytes(raw), problems.ProblemDocument))
