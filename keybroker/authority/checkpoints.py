"""Signs the log as it grows, off the way of requests; and notices when the log is not the one that was signed before.

A checkpoint takes four steps, each durable before the next: a `heads` record is the last leaf; the worker signs size and root; the
store keeps the note; the anchor outside of the state directory keeps it too. Only then is it shown to anybody. After a crash between
signing and keeping, the worker remembers what the store does not: its note is taken over, if the log agrees with it.

The log that does not agree with a checkpoint of its own key has been changed, cut short, or replaced by an older copy. At the start
that is a reason not to start; later, a reason to sign nothing more.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from keybroker.audit.checkpoint import Checkpoint, SignedCheckpoint
from keybroker.audit.merkle import EMPTY_ROOT, Nodes, consistency_proof, root_at
from keybroker.audit.note import NoteError, VerifierKey
from keybroker.audit.tiles import TileError
from keybroker.authority.journal import Entry, Journal
from keybroker.authority.store.reader import Reader
from keybroker.authority.store.sqlite import SqliteStore
from keybroker.authority.tree import KeptCheckpoint, TreeHead
from keybroker.config import CheckpointsConfig
from keybroker.errors import AuditUnavailableError, ConfigError, HsmUnavailableError, StoreError
from keybroker.model.record import Draft, RecordKind
from keybroker.model.task import CheckpointRefused, CheckpointSigned, KeyRefused, LogOpened, SignCheckpoint
from keybroker.telemetry import logger

_LOOK_SECONDS = 0.2
_MAX_NOTE_BYTES = 65_536

Answer = TypeVar("Answer")

_log = logger()


class CheckpointSigner(Protocol):
    """Whatever reaches the worker that holds the log's key."""

    async def sign_checkpoint(self, token: str, task: SignCheckpoint) -> CheckpointSigned | CheckpointRefused:
        """A signed checkpoint, or why there is none."""
        ...


def log_key(path: Path, log: str) -> VerifierKey:
    """The log's verifier key from its file.

    Raises:
        ConfigError: there is none, or it is another log's.
    """
    try:
        key = VerifierKey.parse(path.read_text().strip())
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: cannot be read; `authority.checkpoints.key` is a file with the log's verifier key") from err
    except NoteError as err:
        raise ConfigError(f"{path}: {err}") from err
    if key.name != log:
        raise ConfigError(f"{path}: the key of {key.name}, but `authority.log` is {log}")
    return key


def read_anchor(path: Path | None) -> bytes:
    """The anchored checkpoint; empty if there is none yet.

    Raises:
        StoreError: it is there and cannot be read.
    """
    if path is None:
        return b""
    try:
        with path.open("rb") as file:
            return file.read(_MAX_NOTE_BYTES)
    except FileNotFoundError:
        return b""
    except OSError as err:
        raise StoreError(f"{path}: the anchor cannot be read ({err.strerror})") from err


def agree(size: int, nodes: Nodes, note: bytes, key: VerifierKey, where: str) -> Checkpoint | None:
    """What a checkpoint says, if the log agrees with it; None if there is none.

    Args:
        size: of the log.
        nodes: its tree.
        note: a signed note, or empty.
        key: the log's.
        where: the checkpoint was found, for people.

    Raises:
        StoreError: the log is not the one that was signed.
    """
    if not note:
        return None
    try:
        head = SignedCheckpoint.open(note, key).checkpoint
    except NoteError as err:
        raise StoreError(
            f"{where} is not signed by the key in `authority.checkpoints.key` ({err}): put the key there that this log has always had"
        ) from err
    if head.size > size:
        raise StoreError(
            f"the record has {size} records, but {where} is for {head.size}: it was cut short, or is an older copy; bring the newer back"
        )
    try:
        is_same = root_at(head.size, nodes) == head.root
    except TileError:
        is_same = False
    if not is_same:
        raise StoreError(
            f"the record is not the one that {where} was signed for: one of its first {head.size} records was changed."
            " `keybroker audit verify` on an export says which; bring a good copy back"
        )
    return head


def require_signed(config: CheckpointsConfig, key: VerifierKey, store: SqliteStore) -> bytes:
    """See that the log is the one that was signed, as far as store and anchor tell; the last checkpoint, empty if there is none.

    Raises:
        StoreError: it is not.
    """
    size = store.tail().size
    places = ((store.last_checkpoint(), "its last checkpoint"), (read_anchor(config.anchor), f"the anchor {config.anchor}"))
    found = [(head.size, note) for note, where in places if (head := agree(size, store.nodes(size), note, key, where))]
    return max(found, default=(0, b""))[1]


class Checkpoints:
    """Makes checkpoints, and keeps the last.

    Args:
        reader: used by this object's own thread only.
        last: what the store had kept.
    """

    def __init__(
        self,
        *,
        config: CheckpointsConfig,
        key: VerifierKey,
        journal: Journal,
        reader: Reader,
        last: bytes,
    ) -> None:
        self._config = config
        self._key = key
        self._journal = journal
        self._reader = reader
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._one_at_a_time = asyncio.Lock()
        self._head = SignedCheckpoint.open(last, key).checkpoint if last else Checkpoint(key.name, 0, EMPTY_ROOT)
        self._note = last
        self._pending: TreeHead | None = None
        self._shown: TreeHead | None = None
        self._trouble = ""
        self._due = asyncio.get_running_loop().time() + config.seconds

    @property
    def key(self) -> VerifierKey:
        """The log's key."""
        return self._key

    @property
    def size(self) -> int:
        """Records under the last checkpoint."""
        return self._head.size

    @property
    def latest(self) -> tuple[bytes, TreeHead | None]:
        """The last checkpoint, empty if there is none; and the tree head with the map of trails, once this process has made one."""
        return self._note, self._shown

    @property
    def trouble(self) -> str:
        """Why there is no newer checkpoint; empty if nothing is wrong."""
        return self._trouble

    def close(self) -> None:
        """End the reading thread."""
        self._thread.shutdown(wait=True)
        self._reader.close()

    async def judge(self, found: LogOpened | KeyRefused) -> bool:
        """Whether a worker signs for this log with this key. What it remembers is compared with the log."""
        if isinstance(found, KeyRefused):
            self._trouble = f"{found.rule}: {found.cure}"
            _log.error("the log cannot be signed", rule=found.rule)
            return False
        if found.key != str(self._key):
            self._trouble = "the token holds another key for the log than `authority.checkpoints.key`"
            _log.error("the token holds another key for the log")
            return False
        async with self._one_at_a_time:
            return await self._take_over(found.last)

    async def run(self, signer: CheckpointSigner) -> None:
        """Make a checkpoint whenever one is due."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if self._is_due():
                await self.make(signer)

    async def make(self, signer: CheckpointSigner) -> None:
        """Make a checkpoint of all that is on record now. What goes wrong is told in `trouble`, and tried again when the next is due."""
        self._due = asyncio.get_running_loop().time() + self._config.seconds
        if self._journal.halted:
            return
        try:
            async with self._one_at_a_time:
                await self._make(signer)
        except (AuditUnavailableError, HsmUnavailableError) as err:
            if not self._trouble:
                _log.warning("no checkpoint", why=str(err))
            self._trouble = str(err)
        else:
            self._trouble = self._journal.halted

    def _is_due(self) -> bool:
        size = self._journal.size
        if size == self._head.size:
            return False
        return size - self._head.size >= self._config.records or asyncio.get_running_loop().time() >= self._due

    async def _make(self, signer: CheckpointSigner) -> None:
        if self._pending is None:
            await self._journal.write(Entry(Draft(kind=RecordKind.HEADS)))
            self._pending = self._journal.head
        head = self._pending
        if head is None:
            return
        before = self._head.size
        proof = await self._in_thread(lambda: consistency_proof(before, head.size, self._reader.nodes(head.size)))
        product = await signer.sign_checkpoint(self._config.token, SignCheckpoint(head.size, head.root, self._note, tuple(proof)))
        if isinstance(product, CheckpointRefused):
            _log.error("the worker does not sign this checkpoint", rule=product.rule)
            if await self._take_over(product.last):
                self._trouble = product.rule
            return
        if self._opened(product.note) != Checkpoint(self._key.name, head.size, head.root):
            raise HsmUnavailableError("The token signed something else than the checkpoint.", retry_after=1)
        self._pending = None
        await self._keep(product.note, head.size)
        self._shown = head

    async def _take_over(self, note: bytes) -> bool:
        """Keep what a worker remembers and the store does not. False, and nothing is signed any more, if the log does not agree with it."""
        if not note or note == self._note:
            return True
        try:
            head = await self._in_thread(self._compare, note)
        except StoreError as err:
            self._trouble = str(err)
            self._journal.halt(str(err))
            return False
        if head is not None and head.size > self._head.size:
            self._pending = self._shown = None  # the one would be smaller, or have another last leaf; the other is of an older checkpoint
            await self._keep(note, head.size)
        return True

    async def _keep(self, note: bytes, size: int) -> None:
        await self._journal.keep(KeptCheckpoint(size, note))
        if self._config.anchor is not None:
            try:
                await self._in_thread(_write_anchor, self._config.anchor, note)
            except OSError as err:
                _log.exception("the anchor cannot be written", reason=err.strerror)
                raise AuditUnavailableError("The anchor cannot be written.", retry_after=1) from err
        self._note, self._head = note, self._opened(note)

    def _compare(self, note: bytes) -> Checkpoint | None:
        size = self._reader.size
        return agree(size, self._reader.nodes(size), note, self._key, "the checkpoint that a worker remembers")

    async def _in_thread(self, work: Callable[..., Answer], *arguments: Any) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _opened(self, note: bytes) -> Checkpoint:
        try:
            return SignedCheckpoint.open(note, self._key).checkpoint
        except NoteError as err:
            raise HsmUnavailableError("The token's signature on the log does not verify.", retry_after=1) from err


def _write_anchor(path: Path, note: bytes) -> None:
    """All of it or nothing, and on disk."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(note)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
