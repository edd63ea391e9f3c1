"""One fault in one system call of the authority's storage, and everything that must hold afterwards (the method is Tessera's).

A run has a phase, in which the fault strikes: `fresh` (the first start), `crashed` (a start on what a kill left), `serving`, `stopping`.
Then the authority is started again, unharmed, and client, token and record must agree.

strace can keep a call from being made. That a call is made and then reported failed takes a library in its place (storage_shim.c).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from keybroker.audit.leaf import decode
from keybroker.authority.store import fsck
from keybroker.model.call import Problem, Signed
from keybroker.process import EXIT_STORE
from tests.authorities import Authority, Issued
from tests.brokers import read_leaves
from tests.faults.strace import WRITING, Attached, Call, Injection, command, read
from tests.integration.authority.served import Asked, ServedAuthority, served_authority
from tests.worlds import children, is_alive, until

PHASES = ("fresh", "crashed", "serving", "stopping")
FAULTS = ("EIO", "ENOSPC", "SIGKILL")
SYNCS = frozenset({"fsync", "fdatasync"})
CHECKPOINT_FRAMES = 14  # a checkpoint after some three commits
_ONCE = "once"
_BUSY = frozenset({"policy-unavailable", "overloaded", "hsm-timeout"})  # what a slow host may add to any run
_FILES = ("lock", "keybroker.db", "keybroker.db-wal", "keybroker.db-shm", "keybroker.db-journal")


class Lie(Injection):
    """A call that is made, and then reported failed, or after which the process dies: EIO, SIGKILL, or EIO+SIGKILL.

    The last is reported failed, and the process is dead before anything else is written.
    """


LIES = ("EIO", "SIGKILL", "EIO+SIGKILL")


@dataclass(slots=True)
class Run:
    """What happened.

    Attributes:
        calls: what strace saw.
        has_lied: whether the library has, and whether that was before the process was told to stop.
        asked: in the order in which it was asked.
        status: of the process that was struck; None if it had to be told to stop.
        after: what the next request got from the same process; None if there was none to ask.
    """

    phase: str
    injection: Injection | None
    calls: list[Call] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    status: int | None = None
    after: Asked | None = None
    has_lied: bool = False
    has_lied_serving: bool = False

    @property
    def has_struck(self) -> bool:
        """Whether there was such an instance."""
        return self.has_lied or bool(self.hit)

    @property
    def hit(self) -> list[Call]:
        """The calls in which the fault struck."""
        # A process that is killed inside a call is not seen to leave it.
        return [call for call in self.calls if call.is_injected or (call.result in {"", "?"} and self.status == -9)]

    @property
    def answers(self) -> list[str]:
        """`signed`, the code of a problem, or `no answer`, in the order in which it was asked."""
        return [_answer(asked) for asked in self.asked]

    def row(self) -> str:
        """One line of the table: phase, call, instance, fault, where it struck, what clients saw, how it ended."""
        assert self.injection is not None
        answers = Counter(self.answers)
        where = {file_of(call) for call in self.hit} or {"-"}
        said = ", ".join(f"{count} {answer}" for answer, count in sorted(answers.items())) or "-"
        after = _answer(self.after) if self.after else "-"
        status = "ran on" if self.status is None else f"exit {self.status}"
        kind = f"{self.injection.fault} (done)" if isinstance(self.injection, Lie) else self.injection.fault
        columns = (
            self.phase,
            self.injection.call,
            self.injection.instance,
            kind,
            "+".join(sorted(where)),
            said,
            status,
            after,
        )
        return "\t".join(str(column) for column in columns)


def _answer(asked: Asked) -> str:
    match asked.reply:
        case Signed():
            return "signed"
        case Problem(code):
            return code
        case _:
            return "no answer"


def file_of(call: Call) -> str:
    """Which of the store's files a call is about: the part of its name after the directory's."""
    named = [part for part in call.arguments.replace('"', "<").replace(">", "<").split("<") if part.startswith("/")]
    name = named[-1].rpartition("/")[2] if named else ""
    return name.removeprefix("keybroker.") or "state"


class Scene:
    """A directory in which runs happen one after another, each on a fresh copy of what the phase begins with."""

    def __init__(self, authority: ServedAuthority) -> None:
        self.authority = authority
        self._crashed = authority.directory / "crashed"
        self._traces = 0

    def run(self, phase: str, injection: Injection | None) -> Run:
        """Strike once, start again, and hold everything against everything."""
        self.authority.kill()  # if a run before this one has failed half-way
        self._prepare(phase)
        run = Run(phase, injection)
        self.authority.worker.asked.clear()
        match phase:
            case "fresh" | "crashed":
                self._strike_start(run)
            case "serving":
                self._strike_serving(run)
            case _:
                self._strike_stop(run)
        self.authority.kill()
        verify(run, self.authority, self._again())
        return run

    def lie(self, lie: Lie, library: Path) -> Run:
        """The same, with a lie told while serving."""
        self._prepare("fresh")
        authority = self.authority
        authority.worker.asked.clear()
        seen = len(authority.text())
        run = Run("serving", lie)
        authority.environment = {"LD_PRELOAD": str(library), "KEYBROKER_STORAGE_SHIM": f"{lie.call} {lie.instance} {lie.fault}"}
        authority.start()
        authority.environment = {}
        authority.wait_until_serving()
        os.kill(authority.pid, signal.SIGUSR2)
        self._ask(run)
        run.has_lied_serving = "shim: " in authority.text()[seen:]
        status = authority.wait(5) if run.after is None else authority.stop()
        run.status = status or None  # a lie may also strike when it stops
        run.has_lied = "shim: " in authority.text()[seen:]
        verify(run, authority, self._again())
        return run

    def _prepare(self, phase: str) -> None:
        if phase == "crashed" and not self._crashed.exists():
            self._crash()
        shutil.rmtree(self.authority.state, ignore_errors=True)
        if phase == "crashed":
            shutil.copytree(self._crashed, self.authority.state)
        elif phase != "fresh":
            self.authority.start()
            self.authority.wait_until_serving()

    def _crash(self) -> None:
        """Leave behind what a kill leaves: a write-ahead log with commits in it, and a use without an outcome."""
        authority = self.authority
        shutil.rmtree(authority.state, ignore_errors=True)
        authority.start()
        authority.wait_until_serving()
        with authority.connect() as frontend:
            frontend.sign(b"before")
            authority.worker.gate.clear()
            asked = len(authority.worker.asked)
            waiting = threading.Thread(target=frontend.sign, args=(b"cut off",))
            waiting.start()
            until(lambda: len(authority.worker.asked) > asked)
            authority.kill()
            authority.worker.gate.set()
            waiting.join(20)
        shutil.copytree(authority.state, self._crashed)

    def _strike_start(self, run: Run) -> None:
        authority = self.authority
        # Stopping only at the calls that count is faster, and cannot deliver signals.
        faster = [] if run.injection is not None and run.injection.fault == "SIGKILL" else ["--seccomp-bpf"]
        authority.start(*command(self._trace(), WRITING, self._paths(), run.injection, *faster))
        until(lambda: authority.is_serving() or not authority.is_running(), 30, "neither serving nor ended")
        if authority.is_running():
            self._ask(run)
        if run.after is not None:
            run.status = authority.stop(children(authority.pid)[0]) or None
        else:
            run.status = authority.wait()
        run.calls = read(self._trace(new=False))

    def _strike_serving(self, run: Run) -> None:
        authority = self.authority
        with Attached([authority.pid], self._trace(), WRITING, self._paths(), run.injection):
            self._ask(run)
            if run.after is None:
                until(lambda: not is_alive(authority.pid), 5, "no answer from a process that lives")
        run.status = None if authority.is_running() else authority.wait()
        run.calls = read(self._trace(new=False))
        if authority.is_running():
            assert authority.stop() == 0

    def _strike_stop(self, run: Run) -> None:
        authority = self.authority
        with authority.connect() as frontend:
            run.asked += frontend.sign(b"m1")
        with Attached([authority.pid], self._trace(), WRITING, self._paths(), run.injection):
            run.status = authority.stop()
        run.calls = read(self._trace(new=False))

    def _ask(self, run: Run) -> None:
        """One alone, one with an idempotency key, some together; then one more, if the process is still there."""
        try:
            with self.authority.connect() as frontend:
                run.asked += frontend.sign(b"m1")
                run.asked += frontend.sign(b"m2", idempotency_key=_ONCE)
                run.asked += frontend.sign_batch(b"m3", b"m4", b"m5")
            with self.authority.connect() as frontend:
                (after,) = frontend.sign(b"m9")
                for again in (b"m10", b"m11"):
                    if isinstance(after.reply, Problem):  # the fault struck only now, or the host is slow
                        run.asked.append(after)
                        (after,) = frontend.sign(again)
                run.after = after if after.reply else None
        except OSError:
            return  # it has ended

    def _again(self) -> Asked:
        """Start unharmed and ask the question with the idempotency key once more; stopped again at the end."""
        authority = self.authority
        authority.start()
        authority.wait_until_serving()
        with authority.connect() as frontend:
            (asked,) = frontend.sign(b"m2", idempotency_key=_ONCE)
        assert authority.stop() == 0
        return asked

    def _paths(self) -> list[Path]:
        return [self.authority.state, *(self.authority.state / name for name in _FILES)]

    def _trace(self, *, new: bool = True) -> Path:
        self._traces += new
        return self.authority.directory / f"{self._traces}.trace"


def scenes(directory: Path, who: tuple[Authority, Issued]) -> Iterator[Scene]:
    """A scene; for a fixture."""
    with served_authority(directory, who, CHECKPOINT_FRAMES) as authority:
        yield Scene(authority)


def verify(run: Run, authority: ServedAuthority, again: Asked) -> None:
    """Everything that must hold after a fault, whatever it was."""
    report = fsck.check(authority.state)
    assert (report.findings, report.structure, report.open_uses) == ([], "ok", {}), run.injection
    records = [decode(leaf) for leaf in read_leaves(authority.state)]
    uses = _uses(records)
    asked = [*run.asked, *([run.after] if run.after else [])]
    for each in asked:
        _verify_answer(run, each, uses, records, authority)
    _verify_once(asked, again, uses)
    on_record = {bytes.fromhex(record["tbs"]["value"]) for record in records if record["kind"] == "intent"}
    assert set(authority.worker.asked) <= on_record, "a key was used without an intent on record"
    if run.has_struck:
        _verify_end(run)
    assert "Traceback" not in authority.text(), authority.text()


def _uses(records: list[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Intent and outcome of each use. That there is one of each, the check of the store has shown."""
    outcomes = {record["use"]: record for record in records if record["kind"] == "outcome"}
    return {record["use"]: (record, outcomes[record["use"]]) for record in records if record["kind"] == "intent"}


def _verify_answer(
    run: Run,
    asked: Asked,
    uses: dict[str, tuple[dict[str, Any], dict[str, Any]]],
    records: list[dict[str, Any]],
    authority: ServedAuthority,
) -> None:
    reply = asked.reply
    mine = [outcome["outcome"] for intent, outcome in uses.values() if intent["tbs"]["value"] == asked.digest.hex()]
    match reply:
        case Signed():
            intent, outcome = uses[reply.use]
            authority.worker.private.public_key().verify(reply.signature, asked.message, ec.ECDSA(hashes.SHA256()))
            assert intent["tbs"]["value"] == asked.digest.hex()
            assert outcome["signature_sha256"] == hashlib.sha256(reply.signature).hexdigest()
            assert (records[reply.intent], records[reply.outcome]) == (intent, outcome)
        case Problem():
            assert reply.code in {"audit-unavailable", *_BUSY}, reply
            # With an idempotency key the answer may have come later; and what was written, reported failed and never overwritten,
            # because the process died, is on record all the same: never a signature that nobody can account for.
            is_excused = asked.message == b"m2" or (isinstance(run.injection, Lie) and run.status == -9)
            assert "signed" not in mine or is_excused, "refused, and signed on record"
        case _:
            pass  # no answer: there may be no use, or one that ended in any way


def _verify_once(asked: list[Asked], again: Asked, uses: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """The same idempotency key: the same signature if there was one, or one new use that names the one before."""
    assert isinstance(again.reply, Signed), again
    first = next((each.reply for each in asked if each.message == b"m2" and isinstance(each.reply, Signed)), None)
    if first is not None:
        assert again.reply.signature == first.signature
        assert again.reply.use == first.use
    signed = [
        use for use, (intent, outcome) in uses.items() if intent["tbs"]["value"] == again.digest.hex() and outcome["outcome"] == "signed"
    ]
    assert signed == [again.reply.use], "one question with an idempotency key was signed twice"
    retried = uses[again.reply.use][0]["retry_of"]
    assert not retried or uses[retried][1]["outcome"] != "signed"


def _verify_end(run: Run) -> None:
    """A failed sync ends the process, and nothing is written after it; a failed write is an answer, and the next request works."""
    assert run.injection is not None
    struck = run.hit[0] if run.hit else None
    call, file = (struck.name, file_of(struck)) if struck else (run.injection.call, "db-wal")
    if run.injection.fault == "SIGKILL":
        assert run.status == -9, run.status
    elif run.injection.fault == "EIO+SIGKILL" and call not in SYNCS:
        assert run.status in {-9, None}, run.status  # None where it was the last of all writes
    elif call in SYNCS and run.phase != "stopping" and file in {"db", "db-wal"} and (run.has_lied_serving or struck):
        assert run.status == EXIT_STORE, run.status
        later = [each for each in run.calls if struck and each.began > struck.began and each.name in {*SYNCS, "pwrite64", "ftruncate"}]
        # A database that is only being made has no log yet, and nothing on record: SQLite takes back what it had begun.
        has_log = any(file_of(each) == "db-wal" and each.name == "pwrite64" for each in run.calls if struck and each.began < struck.began)
        assert later == [] or not has_log, "written after a failed sync"
    elif run.phase == "serving":
        assert run.status is None, run.status
        assert run.after is not None
        assert isinstance(run.after.reply, Signed), "the next request does not work"
    else:
        assert run.status in {None, 0, EXIT_STORE}, run.status
