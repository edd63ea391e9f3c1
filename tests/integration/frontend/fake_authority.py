"""An authority whose answers a test chooses. It speaks the real frames on a real Unix socket, and validates SVIDs as the real one does."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keybroker.errors import NotFoundError, SvidInvalidError
from keybroker.identity.x509_svid import SvidValidator
from keybroker.model.call import (
    MAX_CALL_BYTES,
    Answer,
    AnyAsk,
    AnyReply,
    ApprovalView,
    Approve,
    AskFreeze,
    AskImpact,
    AskUnfreeze,
    BatchReply,
    BreakGlass,
    Call,
    CloseGlass,
    Explain,
    ExplainReply,
    ExportLog,
    FreezeReply,
    FreezesReply,
    GlassesReply,
    GlassReply,
    GlassView,
    KeyReply,
    KeysReply,
    ListFreezes,
    ListGlasses,
    ListOperations,
    LogReply,
    OperationReply,
    OperationsReply,
    Pending,
    PolicyChanged,
    PolicyReply,
    Problem,
    ProposePolicy,
    ProveConsistency,
    ProveInclusion,
    PublicVersion,
    QueryRecords,
    RecordsReply,
    Redeem,
    ShowCheckpoint,
    ShowKey,
    ShowOperation,
    ShowPolicy,
    ShowRecord,
    ShowTile,
    Sign,
    SignBatch,
    Signed,
    StageView,
    Whoami,
    WhoamiReply,
)
from keybroker.model.freeze import Freeze
from keybroker.model.impact import Impact, Tally
from keybroker.wire import Channel, Listener
from tests.approvals import SUBJECT

SIGNED = Signed(b"signature", "orders", 1, "ES256", "01J", "example.org/1", 1, 2)
_SPKI = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
_VERSION = PublicVersion(1, "ec-p256", "enabled", _SPKI, hashlib.sha256(_SPKI).hexdigest())
_STAGE = StageView("release/1", 2, ("managers",), ("alice",), is_open=True)
_APPROVAL = ApprovalView("approve", "release/1", "alice", "spiffe://example.org/human/alice", "2030-01-01T00:00:00Z", 17, counts=True)
OPERATION = OperationReply(
    SUBJECT.operation.id, "pending", SUBJECT, "2030-01-01T00:00:00Z", "", (_STAGE,), (_APPROVAL,), "bob", ("release/1",), "", 16
)
PENDING = Pending(SUBJECT.operation.id, (_STAGE,), "2030-01-01T00:00:00Z", "")
FREEZE = Freeze(
    "01M88GD5FBBXSDAAJD4DJAQY07", "key", "orders", "incident 7", "spiffe://example.org/human/rita", "2026-11-25T08:00:00.000000Z"
)
GLASS = GlassView(
    FREEZE.id, "release", "incident 7", FREEZE.by, FREEZE.since, "2026-11-25T09:00:00.000000Z", is_open=True, is_reviewed=False
)
KEY = KeyReply("orders", {}, ("ES256",), (_VERSION,))

Answers = Callable[[Call], AnyReply | None]


class FakeAuthority:
    """Speaks the real frames on a real Unix socket.

    Attributes:
        answers: the reply to a call; None for none, ever.
        calls: everything that was asked.
    """

    def __init__(self, path: Path, validator: SvidValidator) -> None:
        self.validator = validator
        self.answers: Answers = self.allow
        self.calls: list[Call] = []
        self._path = path
        self._serving: contextlib.AsyncExitStack | None = None
        self._channels: set[Channel[Call, Answer]] = set()

    @property
    def asked(self) -> list[AnyAsk]:
        """What was asked, without who asked."""
        return [call.ask for call in self.calls]

    def allow(self, call: Call) -> AnyReply:  # noqa: C901, PLR0911, PLR0912  one line for each kind of ask
        """What an authority says that has one key, `orders`, and lets every valid SVID use it."""
        try:
            svid = self.validator.validate(call.chain)
        except SvidInvalidError as err:
            return Problem.of(err)
        match call.ask:
            case Sign("orders", _, _) | Redeem():
                return SIGNED
            case SignBatch("orders", items, _, _):
                return BatchReply((SIGNED,) * len(items))
            case Explain("orders", _):
                return ExplainReply(True, (), ("grant",), "digest", (), 3)  # noqa: FBT003  a row of the frame
            case Whoami():
                return WhoamiReply(str(svid.id), svid.id.trust_domain, svid.sha256, "2030-01-01T00:00:00Z", call.address, (), ())
            case ShowKey("orders"):
                return KEY
            case ListOperations():
                return OperationsReply((OPERATION,), "mark")
            case ShowOperation() | Approve():
                return OPERATION
            case AskFreeze() | AskUnfreeze():
                return FreezeReply(FREEZE)
            case ListFreezes():
                return FreezesReply((FREEZE,))
            case BreakGlass() | CloseGlass():
                return GlassReply(GLASS)
            case ListGlasses():
                return GlassesReply((GLASS,))
            case ShowPolicy():
                return PolicyReply(1, "00", "11", "2026-11-25T08:00:00.000000Z", {"a.yaml": "grants: []"})
            case ProposePolicy():
                return PolicyChanged(2, "22", "33")
            case AskImpact(question):
                tally = Tally(0, 0, 0, -1, -1, "", "")
                nothing = Impact("example.org/log", question, 0, "", tally, {}, (), (), (), (), (), (), (), (), (), (), {})
                return LogReply(msgspec.json.encode(nothing), "application/json")
            case ProveConsistency():
                return LogReply(b'{"old":1,"size":2,"proof":[]}', "application/json")
            case ShowTile():
                return LogReply(b"\x00" * 32, "application/octet-stream")
            case ExportLog():
                return LogReply(b'{"v":1}\n', "application/x-ndjson")
            case ShowCheckpoint() | ProveInclusion():
                return LogReply(b"example.org/log\n", "text/plain")
            case QueryRecords() | ShowRecord():
                return RecordsReply((b'{"v":1}',), "")
            case Sign() | SignBatch() | Explain() | ShowKey():
                return Problem.of(NotFoundError(""))
            case _:
                return KeysReply((KEY,))

    async def start(self) -> None:
        """Listen."""
        stack = contextlib.AsyncExitStack()
        listener = Listener[Call, Answer](self._path, os.getuid(), Call, MAX_CALL_BYTES, self._on_frame, self._on_end)
        await stack.enter_async_context(listener.serving())
        self._serving = stack

    async def stop(self) -> None:
        """Be absent."""
        if self._serving is not None:
            await self._serving.aclose()
            self._serving = None
        for channel in list(self._channels):
            channel.close()

    def _on_frame(self, channel: Channel[Call, Answer], call: Call) -> None:
        self._channels.add(channel)
        self.calls.append(call)
        reply = self.answers(call)
        if reply is not None:
            channel.send(Answer(call.id, reply))

    def _on_end(self, channel: Channel[Call, Answer], _why: Exception | None) -> None:
        self._channels.discard(channel)
