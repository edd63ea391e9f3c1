"""What the courier is told: which records are news, and what is said about them. Nothing that a requester wrote freely."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import msgspec
import pytest

from keybroker.audit.leaf import canonical
from keybroker.authority.notices import NoticeDesk, notice_of
from keybroker.authority.store.reader import Page, Reader, RecordFilter
from keybroker.authority.tokens import TokenPool
from keybroker.errors import AuditUnavailableError, HsmUnavailableError
from keybroker.model.message_signature import content_digest
from keybroker.model.notice import AnyNoticeReply, ComposeNotice, News, NewsAfter, NoNotice, NoticeAnswer, NoticeCall, SignedNotice
from keybroker.model.task import AnyProduct, KeyRefused, NoticeSigned, SignNotice
from keybroker.wire import Channel
from tests.approvals import SUBJECT
from tests.clocks import FixedClock

TARGET = "https://hooks.example/a"
STAGES = [{"name": "release/1", "grant": "release", "approvals": 2, "of": ["release-managers"]}]
PLACE = {"log": "example.org/broker-1", "time": "2026-11-25T09:00:00.000000Z", "operation_id": SUBJECT.operation.id}


def record(index: int, kind: str, **body: Any) -> dict[str, Any]:
    return {**PLACE, "index": index, "kind": kind, "body": body}


REQUESTED = record(7, "operation", subject=msgspec.to_builtins(SUBJECT), stages=STAGES, person="", request_id="01J")
APPROVED = record(9, "approval", verdict="approve", stage="release/1", person="alice", chain=["..."])


class MemoryReader:
    """A log in memory, in pages of `limit` records, that may end early as those of the real one."""

    def __init__(self, records: list[dict[str, Any]], size: int, window: int = 1_000) -> None:
        self.records = {each["index"]: each for each in records}
        self.size = size
        self.window = window
        self.is_broken = False

    def page(self, wanted: RecordFilter) -> Page:
        if self.is_broken:
            raise AuditUnavailableError("No.")
        end = min(wanted.after + 1 + self.window, self.size)
        found = [each for each in range(wanted.after + 1, end) if each in self.records and self.records[each]["kind"] == wanted.kind]
        taken = found[: wanted.limit]
        last = taken[-1] if len(found) > wanted.limit else end - 1 if end < self.size else None
        return Page(tuple(canonical(self.records[each]) for each in taken), last)

    def leaf(self, index: int) -> bytes | None:
        return canonical(self.records[index]) if index in self.records else None


class NoticeTokens:
    """A token that signs, refuses, or is away."""

    def __init__(self, product: AnyProduct | Exception) -> None:
        self.product = product
        self.asked: list[SignNotice] = []

    async def sign_notice(self, _token: str, task: SignNotice) -> AnyProduct:
        self.asked.append(task)
        if isinstance(self.product, Exception):
            raise self.product
        return self.product


class Kept:
    """The courier's end."""

    def __init__(self) -> None:
        self.answers: list[NoticeAnswer] = []

    def send(self, answer: NoticeAnswer) -> None:
        self.answers.append(answer)


GOOD = NoticeSigned(bytes(64), b"spki")


async def asked(reader: MemoryReader, ask: NewsAfter | ComposeNotice, product: AnyProduct | Exception = GOOD) -> AnyNoticeReply:
    desk = NoticeDesk("main", cast("TokenPool", NoticeTokens(product)), cast("Reader", reader), FixedClock(7_000_000))
    kept = Kept()
    await desk._answer(cast("Channel[NoticeCall, NoticeAnswer]", kept), NoticeCall(3, ask))
    (answer,) = kept.answers
    assert answer.id == 3
    return answer.reply


def run(reader: MemoryReader, ask: NewsAfter | ComposeNotice, product: AnyProduct | Exception = GOOD) -> AnyNoticeReply:
    return asyncio.run(asked(reader, ask, product))


def test_first_question_learns_only_where_the_log_ends() -> None:
    assert run(MemoryReader([REQUESTED], 12), NewsAfter(-1)) == News((), 11)
    assert run(MemoryReader([], 0), NewsAfter(-1)) == News((), -1)


def test_news_are_records_about_operations_oldest_first_up_to_the_end() -> None:
    reader = MemoryReader([REQUESTED, APPROVED, record(8, "intent")], 12)
    assert run(reader, NewsAfter(0)) == News((7, 9), 11)
    assert run(reader, NewsAfter(7)) == News((9,), 11)
    assert run(reader, NewsAfter(11)) == News((), 11)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 100])
def test_nothing_is_left_out_or_told_twice_when_pages_end_early(window: int) -> None:
    records = [record(index, "operation" if index % 3 else "approval") for index in range(1, 40) if index % 7 < 4]
    reader, position, seen = MemoryReader(records, 50, window), 0, list[int]()
    for _ in range(100):
        news = run(reader, NewsAfter(position))
        assert isinstance(news, News)
        seen += news.records
        if news.position == position:
            break
        position = news.position
    assert seen == [each["index"] for each in records]
    assert position == 49


def test_log_that_is_shorter_than_before_is_no_step_back() -> None:
    assert run(MemoryReader([REQUESTED], 3), NewsAfter(20)) == News((), 20)


def test_notice_says_what_happened_and_is_signed_for_its_target_now() -> None:
    reply = run(MemoryReader([REQUESTED], 12), ComposeNotice(7, TARGET))
    assert isinstance(reply, SignedNotice)
    assert json.loads(reply.content) == {
        "v": 1, "event": "requested", "log": PLACE["log"], "record": 7, "time": PLACE["time"], "operation": SUBJECT.operation.id,
        "kind": "sign-digest", "key": "release", "requester": "spiffe://example.org/ci/release", "expires": SUBJECT.expires,
        "needs": [{"stage": "release/1", "approvals": 2, "of": ["release-managers"]}],
    }  # fmt: skip
    assert dict(reply.fields)["Content-Digest"] == content_digest(reply.content)
    assert "created=7;" in dict(reply.fields)["Signature-Input"]


def test_nothing_that_a_requester_wrote_freely_and_no_digest_is_said() -> None:
    said = json.dumps(notice_of(REQUESTED))
    assert SUBJECT.reason not in said
    assert SUBJECT.tbs.value not in said
    assert "2.1.0" not in said  # a field of the content


@pytest.mark.parametrize(("verdict", "event"), [("approve", "approved"), ("refuse", "refused")])
def test_approval_and_refusal_are_told_with_the_person(verdict: str, event: str) -> None:
    notice = notice_of(record(9, "approval", verdict=verdict, stage="release/1", person="alice", chain=[]))
    assert notice is not None
    assert (notice["event"], notice["person"], notice["stage"]) == (event, "alice", "release/1")


@pytest.mark.parametrize("ask", [ComposeNotice(8, TARGET), ComposeNotice(99, TARGET)])
def test_record_that_is_not_about_an_operation_is_never_told(ask: ComposeNotice) -> None:
    reply = run(MemoryReader([record(8, "intent")], 12), ask)
    assert isinstance(reply, NoNotice)
    assert reply.is_final


@pytest.mark.parametrize(
    "product", [HsmUnavailableError("No."), TimeoutError(), KeyRefused("notices", "key-missing", ""), RuntimeError("bug")]
)
def test_notice_that_cannot_be_signed_now_is_asked_for_again(product: AnyProduct | Exception) -> None:
    reply = run(MemoryReader([REQUESTED], 12), ComposeNotice(7, TARGET), product)
    assert isinstance(reply, NoNotice)
    assert not reply.is_final


def test_record_that_cannot_be_read_now_is_asked_for_again() -> None:
    reader = MemoryReader([REQUESTED], 12)
    reader.is_broken = True
    reply = run(reader, NewsAfter(0))
    assert isinstance(reply, NoNotice)
    assert not reply.is_final
