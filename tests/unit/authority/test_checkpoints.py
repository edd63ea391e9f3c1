"""The log is signed as it grows; and a log that is not the one that was signed is noticed, at the start and later."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keybroker.audit.chain import check
from keybroker.audit.checkpoint import Checkpoint, SignedCheckpoint
from keybroker.audit.leaf import decode, leaf_hash
from keybroker.audit.note import Note, NoteSignature, SignatureType, VerifierKey
from keybroker.authority import checkpoints as module
from keybroker.authority.checkpoints import Checkpoints, agree, log_key, read_anchor
from keybroker.authority.journal import Entry, Journal
from keybroker.authority.store import fsck
from keybroker.authority.store.reader import Reader
from keybroker.authority.store.sqlite import SqliteStore
from keybroker.config import CheckpointsConfig
from keybroker.errors import AuditUnavailableError, ConfigError, HsmUnavailableError, StoreError
from keybroker.hsm.log_signer import LogSigner
from keybroker.model.record import Draft, RecordKind
from keybroker.model.task import CheckpointRefused, CheckpointSigned, KeyRefused, LogOpened, SignCheckpoint
from tests.brokers import read_leaves
from tests.unit.audit import naive
from tests.unit.authority.store.logs import LOG, A, B, intent, journal_on, outcome, tampering

PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(32))
KEY = VerifierKey(LOG, SignatureType.ED25519, PRIVATE.public_key().public_bytes_raw())


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that awaits, as one that does not."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(test(*arguments, **named))

    return run


@dataclass(slots=True)
class Token:
    """The log's token: the real rules, with a key in memory."""

    log: LogSigner = field(default_factory=lambda: LogSigner(KEY, PRIVATE.sign))
    is_down: bool = False
    loses_answers: bool = False
    asked: list[SignCheckpoint] = field(default_factory=list)

    async def sign_checkpoint(self, token: str, task: SignCheckpoint) -> CheckpointSigned | CheckpointRefused:
        assert token == "main"
        self.asked.append(task)
        if self.is_down:
            raise HsmUnavailableError("down", retry_after=1)
        product = self.log.sign(task)
        if self.loses_answers:
            raise HsmUnavailableError("lost", retry_after=1)
        return product


@dataclass(slots=True)
class Broker:
    journal: Journal
    checkpoints: Checkpoints
    token: Token
    state: Path

    async def use(self, name: str, trail: str = A) -> None:
        await self.journal.write(intent(name, trail))
        await self.journal.write(outcome(name, trail))

    async def sign(self) -> None:
        await self.checkpoints.make(self.token)

    @property
    def head(self) -> Checkpoint:
        return SignedCheckpoint.open(self.checkpoints.latest[0], KEY).checkpoint

    def root(self, size: int) -> bytes:
        return naive.mth([leaf_hash(leaf) for leaf in read_leaves(self.state)[:size]])


def config_of(state: Path) -> CheckpointsConfig:
    return CheckpointsConfig(token="main", key=state.parent / "log.vkey", anchor=state.parent / "anchor")


@contextlib.asynccontextmanager
async def broker_on(state: Path, token: Token | None = None) -> AsyncIterator[Broker]:
    """As the authority starts: the log must be the one that was signed."""
    config = config_of(state)
    async with journal_on(state) as (journal, store):
        last = module.require_signed(config, KEY, store)
        made = Checkpoints(config=config, key=KEY, journal=journal, reader=Reader(state), last=last)
        try:
            yield Broker(journal, made, token or Token(), state)
        finally:
            made.close()


async def write_and_sign(state: Path, token: Token, uses: int = 4) -> Path:
    """A log under a checkpoint."""
    async with broker_on(state, token) as broker:
        start = broker.journal.size
        await asyncio.gather(*(broker.use(f"use-{start}-{number}", (A, B)[number % 2]) for number in range(uses)))
        await broker.sign()
        assert broker.checkpoints.trouble == ""
    return state


@in_a_loop
async def test_checkpoint_is_the_root_of_the_record_whose_last_leaf_maps_the_trails(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with broker_on(state) as broker:
        for number in range(5):
            await broker.use(f"use-{number}", (A, B)[number % 2])
        await broker.sign()
        assert (broker.head.size, broker.head.root) == (11, broker.root(11))
        heads = decode(read_leaves(state)[10])
        assert heads["kind"] == "heads"
        ends = {}
        for leaf in read_leaves(state)[:10]:
            ends[decode(leaf)["trail"]["id"]] = (decode(leaf)["trail"]["index"] + 1, leaf_hash(leaf))
        assert heads["body"] == {"root": naive.map_root(ends).hex(), "trails": 2}
        assert (state.parent / "anchor").read_bytes() == broker.checkpoints.latest[0]
        await broker.use("more", B)
        await broker.sign()
        assert (broker.head.size, broker.head.root) == (14, broker.root(14))
    assert check(read_leaves(state)) == []


@in_a_loop
async def test_log_goes_on_under_the_same_key_after_a_restart(tmp_path: Path) -> None:
    state, token = tmp_path / "state", Token()
    for uses in (3, 1, 140):
        await write_and_sign(state, token, uses)
    async with broker_on(state) as broker:  # a worker that remembers nothing
        await broker.use("last")
        await broker.sign()
        assert broker.checkpoints.trouble == ""
        assert (broker.head.size, broker.head.root) == (broker.journal.size, broker.root(broker.journal.size))
    assert check(read_leaves(state)) == []


@in_a_loop
async def test_checkpoint_comes_when_enough_is_new_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    async with journal_on(tmp_path / "state") as (journal, _):
        config = CheckpointsConfig(token="main", key=tmp_path, records=6, seconds=3_600)
        made = Checkpoints(config=config, key=KEY, journal=journal, reader=Reader(tmp_path / "state"), last=b"")
        token = Token()
        running = asyncio.ensure_future(made.run(token))
        for number in range(2):
            await journal.write(intent(f"{number}"))
            await journal.write(outcome(f"{number}"))
        await asyncio.sleep(0.1)
        assert (token.asked, made.size) == ([], 0)
        await journal.write(intent("2"))
        await journal.write(outcome("2"))
        for _ in range(500):
            if made.size:
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert (len(token.asked), made.size, journal.size) == (1, 7, 7)
        running.cancel()
        made.close()


@in_a_loop
async def test_token_that_is_away_costs_one_heads_record_and_no_signature_of_workloads(tmp_path: Path) -> None:
    async with broker_on(tmp_path / "state", Token(is_down=True)) as broker:
        await broker.use("one")
        for _ in range(3):
            await broker.sign()
        assert (broker.journal.size, broker.checkpoints.size) == (3, 0)
        assert broker.checkpoints.trouble
        assert broker.checkpoints.latest == (b"", None)
        await broker.use("two")
        broker.token.is_down = False
        await broker.sign()
        assert (broker.head.size, broker.checkpoints.trouble) == (3, "")
        await broker.sign()
        assert (broker.head.size, broker.head.root) == (6, broker.root(6))


@in_a_loop
async def test_checkpoint_that_was_signed_and_not_kept_is_taken_over_from_the_worker(tmp_path: Path) -> None:
    state, token = tmp_path / "state", Token()
    async with broker_on(state, token) as broker:
        await broker.use("one")
        token.loses_answers = True
        await broker.sign()
        assert broker.checkpoints.size == 0
        assert token.log.opened().last
    token.loses_answers = False
    async with broker_on(state, token) as broker:
        assert await broker.checkpoints.judge(token.log.opened())
        assert broker.checkpoints.size == 3
        await broker.use("two")
        await broker.sign()
        assert (broker.head.size, broker.checkpoints.trouble) == (6, "")
    async with broker_on(state, token) as broker:
        token.log.sign(SignCheckpoint(6, broker.root(6), broker.checkpoints.latest[0]))
        await broker.use("three")
        await broker.sign()
        assert broker.head.size == 9


@pytest.mark.case(68)
@pytest.mark.parametrize("has_anchor", [True, False])
@in_a_loop
async def test_nothing_is_signed_when_the_state_is_an_older_copy(tmp_path: Path, *, has_anchor: bool) -> None:
    """Yesterday's backup is found by the anchor at the start; where there is none, by what the worker remembers."""
    state, token = tmp_path / "state", Token()
    await write_and_sign(state, token)
    shutil.copytree(state, tmp_path / "yesterday")
    await write_and_sign(state, token)
    shutil.rmtree(state)
    (tmp_path / "yesterday").rename(state)
    if has_anchor:
        with pytest.raises(StoreError, match="cut short, or is an older copy"):
            async with broker_on(state, token):
                pass
        return
    (tmp_path / "anchor").unlink()
    async with broker_on(state, token) as broker:
        await broker.use("before the worker is there")
        assert not await broker.checkpoints.judge(token.log.opened())
        with pytest.raises(AuditUnavailableError):
            await broker.journal.write(intent("after"))
        assert "older copy" in broker.journal.halted
        await broker.journal.write(Entry(Draft(kind=RecordKind.DENIAL, trail=A)))


@pytest.mark.case(68)
@in_a_loop
async def test_nothing_is_signed_when_another_log_has_grown_past_what_the_worker_remembers(tmp_path: Path) -> None:
    state, token = tmp_path / "state", Token()
    await write_and_sign(state, token)
    shutil.copytree(state, tmp_path / "yesterday")
    await write_and_sign(state, token, 2)
    shutil.rmtree(state)
    (tmp_path / "yesterday").rename(state)
    (tmp_path / "anchor").unlink()
    async with broker_on(state, token) as broker:
        for number in range(9):
            await broker.use(f"other-{number}")
        await broker.sign()
        assert "was changed" in broker.journal.halted
        with pytest.raises(AuditUnavailableError):
            await broker.journal.write(intent("after"))
        size = broker.journal.size
        await broker.sign()
        assert (broker.journal.size, broker.head.size) == (size, 9)


@pytest.mark.case(68)
@pytest.mark.parametrize("place", [0, 3, 8])
@in_a_loop
async def test_broker_does_not_start_when_a_signed_record_was_changed(tmp_path: Path, place: int) -> None:
    """Leaf and hash together, as somebody would who knows how they go together."""
    state = await write_and_sign(tmp_path / "state", Token())
    with tampering(state) as db:
        leaf = db.execute("SELECT leaf FROM record WHERE idx = ?", (place,)).fetchone()[0]
        leaf = leaf.replace(b'"salt":"', b'"salt":"0')[: len(leaf)]
        db.execute("UPDATE record SET hash = ? WHERE idx = ?", (leaf_hash(leaf), place))
    with pytest.raises(StoreError):
        async with broker_on(state):
            pass


@pytest.mark.case(68)
@in_a_loop
async def test_broker_does_not_start_when_the_end_is_cut_off(tmp_path: Path) -> None:
    state = await write_and_sign(tmp_path / "state", Token())
    with tampering(state) as db:
        db.execute("DELETE FROM record WHERE idx >= 8")
    with pytest.raises(StoreError, match="cut short"):
        async with broker_on(state):
            pass


@pytest.mark.case(70)
@in_a_loop
async def test_broker_does_not_start_when_the_checkpoint_is_not_the_logs_own(tmp_path: Path) -> None:
    state = await write_and_sign(tmp_path / "state", Token())
    note = (tmp_path / "anchor").read_bytes()
    text = Note.parse(note).text
    stranger = Ed25519PrivateKey.generate()
    for bad in (
        bytes(Note(text, (NoteSignature(LOG, KEY.id, stranger.sign(text.encode())),))),
        text.encode(),
        note.replace(b"\n9\n", b"\n8\n"),
        b"\xff",
    ):
        (tmp_path / "anchor").write_bytes(bad)
        with pytest.raises(StoreError, match="not signed by the key"):
            async with broker_on(state):
                pass
    (tmp_path / "anchor").write_bytes(note)
    with tampering(state) as db:
        db.execute("UPDATE checkpoint SET note = ?", (text.encode(),))
    with pytest.raises(StoreError, match="not signed by the key"):
        async with broker_on(state):
            pass


@pytest.mark.case(70)
@in_a_loop
async def test_token_with_another_key_signs_nothing_of_the_log(tmp_path: Path) -> None:
    other = Ed25519PrivateKey.generate()
    key = VerifierKey(LOG, SignatureType.ED25519, other.public_key().public_bytes_raw())
    async with broker_on(tmp_path / "state", Token(LogSigner(key, other.sign))) as broker:
        assert not await broker.checkpoints.judge(LogOpened(str(key), b""))
        assert "another key" in broker.checkpoints.trouble
        assert not await broker.checkpoints.judge(KeyRefused("log", "key-missing", "make one"))
        assert "key-missing" in broker.checkpoints.trouble
        await broker.use("one")
        await broker.sign()
        assert (broker.checkpoints.size, broker.checkpoints.trouble) == (0, "The token's signature on the log does not verify.")
        assert await broker.checkpoints.judge(LogOpened(str(KEY), b""))


@in_a_loop
async def test_checkpoint_that_cannot_be_anchored_is_not_shown(tmp_path: Path) -> None:
    async with broker_on(tmp_path / "state") as broker:
        await broker.use("one")
        (tmp_path / "anchor.new").mkdir()
        await broker.sign()
        assert (broker.checkpoints.latest, broker.checkpoints.trouble) == ((b"", None), "The anchor cannot be written.")
        (tmp_path / "anchor.new").rmdir()
        await broker.sign()
        await broker.sign()
        assert (broker.checkpoints.trouble, broker.head.root) == ("", broker.root(broker.head.size))
        assert read_anchor(tmp_path / "anchor") == broker.checkpoints.latest[0]


@in_a_loop
async def test_log_that_was_written_before_there_was_a_tree_gets_one(tmp_path: Path) -> None:
    state = tmp_path / "state"
    await write_and_sign(state, Token(), 300)
    with tampering(state) as db:
        before = db.execute("SELECT * FROM tile_hash ORDER BY 1, 2").fetchall()
        assert [row[:2] for row in before] == [(1, 0), (1, 1)]
        db.execute("DELETE FROM tile_hash WHERE idx > 0")
    async with broker_on(state) as broker:
        await broker.use("more")
        await broker.sign()
        assert broker.head.root == broker.root(broker.head.size)
    with tampering(state) as db:
        assert db.execute("SELECT * FROM tile_hash ORDER BY 1, 2").fetchall() == before


@in_a_loop
async def test_refused_entries_leave_no_trace_in_the_tree(tmp_path: Path) -> None:
    """Entries that fail, with and without their group, between entries that do not."""
    async with broker_on(tmp_path / "state") as broker:
        write = broker.journal.write
        await write(intent("a"))
        results = await asyncio.gather(
            write(outcome("never begun")), write(intent("b", B)), write(intent("a")), write(intent("c")), return_exceptions=True
        )
        assert [isinstance(each, Exception) for each in results] == [True, False, True, False]
        await broker.sign()
        assert broker.head.root == broker.root(broker.head.size)
    assert check(read_leaves(tmp_path / "state")) == []


@pytest.mark.case(68)
def test_stored_tree_and_checkpoints_are_compared_with_the_record_at_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsck, "MAX_FINDINGS", 1_000)
    state = asyncio.run(write_and_sign(tmp_path / "state", Token(), 150))

    def found() -> list[tuple[int, str]]:  # the key of these records is pinned nowhere, which the check says too
        return [(each.index, each.rule) for each in fsck.check(state).findings if each.rule != "key-is-not-the-pinned-one"]

    assert found() == []
    with tampering(state) as db:
        db.execute("UPDATE tile_hash SET hash = zeroblob(32)")
        assert found() == [(255, "wrong-tile")]
        db.execute("DELETE FROM tile_hash")
        assert found() == [(255, "wrong-tile")]
        db.execute("UPDATE checkpoint SET note = CAST(replace(CAST(note AS TEXT), '301', '300') AS BLOB)")
        assert found() == [(255, "wrong-tile"), (300, "wrong-checkpoint")]
        db.execute("DROP TABLE tile_hash")  # as in a copy of an older format
        assert found() == []


def test_log_key_file_must_be_of_this_log(tmp_path: Path) -> None:
    path = tmp_path / "log.vkey"
    path.write_text(f"{KEY}\n")
    assert log_key(path, LOG) == KEY
    for bad, log in ((str(KEY), "example.org/other"), ("nonsense", LOG), (str(KEY)[:-4], LOG)):
        path.write_text(bad)
        with pytest.raises(ConfigError):
            log_key(path, log)
    with pytest.raises(ConfigError):
        log_key(tmp_path / "nothing", LOG)


def test_missing_tile_is_a_log_that_was_changed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    asyncio.run(write_and_sign(state, Token(), 150))
    note = (tmp_path / "anchor").read_bytes()
    store = SqliteStore.open(state)
    try:
        size = store.tail().size
        assert agree(size, store.nodes(size), b"", KEY, "it") is None
        assert agree(size, store.nodes(size), note, KEY, "it") == SignedCheckpoint.open(note, KEY).checkpoint
        with tampering(state) as db:
            db.execute("DELETE FROM tile_hash")
        with pytest.raises(StoreError, match="was changed"):
            agree(size, store.nodes(size), note, KEY, "it")
    finally:
        store.close()
