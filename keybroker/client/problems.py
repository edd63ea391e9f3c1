"""A problem document (RFC 9457) as the exception of its code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from keybroker.client.errors import BrokerAnswerError
from keybroker.errors import RefusalError

MEDIA_TYPE = "application/problem+json"
_TYPE = "urn:keybroker:problem:"
_SERVER_ERROR = 500


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
