"""What approvers are told: notices of what happens to operations, composed from the record and signed by a key that does nothing else.

The courier asks on a socket of its own. It never tells us what to say, only what about and where to: a taken-over courier can withhold
notices and send them elsewhere, and make up none.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

from keybroker.audit.leaf import canonical, decode
from keybroker.authority.store.reader import Reader, RecordFilter
from keybroker.authority.tokens import TokenPool
from keybroker.clock import Clock
from keybroker.errors import AuditUnavailableError, HsmUnavailableError, OverloadedError
from keybroker.model.message_signature import content_digest, header_fields
from keybroker.model.notice import (
    MAX_NEWS,
    AnyNoticeReply,
    ComposeNotice,
    News,
    NewsAfter,
    NoNotice,
    NoticeAnswer,
    NoticeCall,
    SignedNotice,
)
from keybroker.model.record import RecordKind
from keybroker.model.task import NoticeSigned, SignNotice
from keybroker.telemetry import logger
from keybroker.wire import Channel

NOTICE_VERSION = 1

_log = logger()


class NoticeDesk:
    """Answers the courier.

    Args:
        token: that holds the key of notices.
        tokens: asked to sign.
        reader: of the record; for this desk alone.
        clock: for `created`.
    """

    def __init__(self, token: str, tokens: TokenPool, reader: Reader, clock: Clock) -> None:
        self._token = token
        self._tokens = tokens
        self._reader = reader
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()

    def on_call(self, channel: Channel[NoticeCall, NoticeAnswer], call: NoticeCall) -> None:
        """Begin to answer a call."""
        task = asyncio.get_running_loop().create_task(self._answer(channel, call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def on_end(self, _channel: Channel[NoticeCall, NoticeAnswer], why: Exception | None) -> None:
        """The courier has gone; it will ask again."""
        if why is not None:
            _log.warning("courier connection ended", why=str(why))

    def close(self) -> None:
        """Let go of the record, and of whoever still waits for it: the courier will ask again."""
        for task in self._tasks:
            task.cancel()
        self._reader.close()

    async def _answer(self, channel: Channel[NoticeCall, NoticeAnswer], call: NoticeCall) -> None:
        reply: AnyNoticeReply
        try:
            reply = self._news(call.ask) if isinstance(call.ask, NewsAfter) else await self._compose(call.ask)
        except AuditUnavailableError:
            reply = NoNotice("the record cannot be read now", is_final=False)
        except (HsmUnavailableError, OverloadedError, TimeoutError):
            reply = NoNotice("no session of the token is in service", is_final=False)
        except Exception:  # noqa: BLE001  a fault of ours must be an answer, not a silence
            _log.exception("notice failed")
            reply = NoNotice("the notice could not be composed", is_final=False)
        channel.send(NoticeAnswer(call.id, reply))

    def _news(self, ask: NewsAfter) -> News:
        size = self._reader.size
        if ask.position < 0:
            return News((), size - 1)
        found: list[int] = []
        position = size - 1  # up to where both kinds are known; the rest comes with the next question
        for kind in (RecordKind.OPERATION, RecordKind.APPROVAL):
            page = self._reader.page(RecordFilter(kind=kind.value, after=ask.position, limit=MAX_NEWS))
            found += [int(decode(leaf)["index"]) for leaf in page.leaves]
            position = position if page.last is None else min(position, page.last)
        return News(tuple(sorted(index for index in found if index <= position)), max(position, ask.position))

    async def _compose(self, ask: ComposeNotice) -> SignedNotice | NoNotice:
        leaf = self._reader.leaf(ask.record)
        notice = notice_of(decode(leaf)) if leaf is not None else None
        if notice is None:
            return NoNotice("this record is not about an operation", is_final=True)
        content = canonical(notice)
        digest = content_digest(content)
        created = self._clock.now_us() // 1_000_000
        signed = await self._tokens.sign_notice(self._token, SignNotice(ask.target, digest, created))
        if not isinstance(signed, NoticeSigned):
            return NoNotice("the token has not signed", is_final=False)
        key_id = hashlib.sha256(signed.spki).hexdigest()
        return SignedNotice(content, header_fields(digest, created, key_id, signed.signature), signed.spki)


def notice_of(record: dict[str, Any]) -> dict[str, Any] | None:
    """What is said about a record; None where there is nothing to say.

    Nothing that a requester wrote freely is in it, and no digest: receivers are told to look, not what to approve.
    """
    body = record["body"]
    if record["kind"] == RecordKind.OPERATION.value:
        event, subject = "requested", body["subject"]
        about = {"kind": subject["operation"]["kind"], "key": subject["key"]["name"], "expires": subject["expires"]}
        needs = [{"stage": each["name"], "approvals": each["approvals"], "of": each["of"]} for each in body["stages"]]
        more = {**about, "requester": subject["workload"], "needs": needs}
    elif record["kind"] == RecordKind.APPROVAL.value:
        event = {"approve": "approved", "refuse": "refused"}[body["verdict"]]
        more = {"stage": body["stage"], "person": body["person"]}
    else:
        return None
    place = {"log": record["log"], "record": record["index"], "time": record["time"], "operation": record["operation_id"]}
    return {"v": NOTICE_VERSION, "event": event, **place, **more}
