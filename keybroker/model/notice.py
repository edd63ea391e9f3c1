"""Frames between the courier and the authority. The courier learns what is to be told to whom, signed; it asks for nothing else."""

from __future__ import annotations

from typing import Annotated

import msgspec

from keybroker.model.message_signature import MAX_TARGET_CHARACTERS

MAX_NOTICE_CALL_BYTES = 16 * 1024
MAX_NOTICE_ANSWER_BYTES = 256 * 1024
MAX_NEWS = 1_000

Index = Annotated[int, msgspec.Meta(ge=-1, lt=2**53)]


class NoticeAsk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """The root of everything that the courier may ask."""


class NewsAfter(NoticeAsk, frozen=True):
    """Which records after this one are about operations. Without a position (-1): none of them, and where the log ends now."""

    position: Index


class ComposeNotice(NoticeAsk, frozen=True):
    """What to say about a record to a receiver, signed now."""

    record: Index
    target: Annotated[str, msgspec.Meta(max_length=MAX_TARGET_CHARACTERS)]


class NoticeCall(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One ask."""

    id: int
    ask: NewsAfter | ComposeNotice


class NoticeReply(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """The root of everything that the authority may answer."""


class News(NoticeReply, frozen=True):
    """Records about operations, oldest first; `position` is the last record that was looked at."""

    records: tuple[int, ...]
    position: int


class SignedNotice(NoticeReply, frozen=True):
    """A notice as it is sent.

    Attributes:
        content: JSON.
        fields: header fields that carry digest and signature.
        spki: the public key that it verifies with, DER SubjectPublicKeyInfo.
    """

    content: bytes
    fields: tuple[tuple[str, str], ...]
    spki: bytes


class NoNotice(NoticeReply, frozen=True):
    """There is none. `is_final`: there never will be."""

    why: str
    is_final: bool


AnyNoticeReply = News | SignedNotice | NoNotice


class NoticeAnswer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The reply to the call with the same id."""

    id: int
    reply: AnyNoticeReply
