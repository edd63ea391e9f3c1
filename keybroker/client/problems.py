"""A problem document (RFC 9457) as the exception of its code."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from keybroker.client.errors import BrokerAnswerError
from keybroker.errors import RefusalError

MEDIA_TYPE = "application/problem+json"
_TYPE = "urn:keybroker:problem:"
_INSTANCE = "urn:keybroker:request:"


class ProblemPointer(msgspec.Struct, frozen=True):
    """One fault in a body: where (JSON pointer) and what."""

    pointer: str = ""
    detail: str = ""


class ProblemDocument(msgspec.Struct, frozen=True):
    """What the broker says when it says no. Members that are not known here are ignored (RFC 9457 section 3.2)."""

    type: str
    title: str = ""
    status: int = 0
    detail: str = ""
    instance: str = ""
    reasons: tuple[str, ...] = ()
    errors: tuple[ProblemPointer, ...] = ()
    use: str = ""


def refusal(status: int, headers: Mapping[str, str], body: bytes) -> RefusalError:
    """The exception for an answer that is not a success.

    Raises:
        BrokerAnswerError: the answer is not a problem document of a broker.
    """
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != MEDIA_TYPE:
        raise BrokerAnswerError(f"status {status}, and no problem document")
    try:
        document = msgspec.json.decode(body, type=ProblemDocument)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as err:
        raise BrokerAnswerError(f"status {status}, and a problem document that cannot be read") from err
    after = headers.get("retry-after", "")
    return of_document(document, int(after) if after.isdecimal() and len(after) < 10 else 0)


def of_document(document: ProblemDocument, retry_after: int = 0) -> RefusalError:
    """The exception of a problem's code; an outage where the code is not known.

    Raises:
        BrokerAnswerError: it is not a problem of a broker.
    """
    if not document.type.startswith(_TYPE):
        raise BrokerAnswerError("a problem document that is not a broker's")
    return RefusalError.of(document.type.removeprefix(_TYPE))(
        document.detail or document.title or document.type,
        pointers=tuple((each.pointer, each.detail) for each in document.errors),
        reasons=document.reasons,
        retry_after=retry_after,
        request_id=document.instance.removeprefix(_INSTANCE),
        use=document.use,
    )
