"""Exports: the record in a file, with the checkpoints that it must agree with; and what does not agree (docs/reference/log.md).

One line for each leaf, byte for byte, and JSON lines that are no leaves. In the export of a log: `{"checkpoint": NOTE}` after the last
leaf that it is for. In the export of one trail: `{"trail_export": ID}` first and `{"trail_proof": ...}` last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from keybroker.audit import leaf as leaves
from keybroker.audit.chain import ChainChecker, is_canonical
from keybroker.audit.checkpoint import Checkpoint, SignedCheckpoint
from keybroker.audit.map import MapProof, TrailEnd
from keybroker.audit.merkle import Frontier, ProofError, check_inclusion
from keybroker.audit.note import NoteError, VerifierKey

CHECKPOINT_START = b'{"checkpoint":'
TRAIL_START = b'{"trail_export":'
NEXT_START = b'{"next":'
PROOF_START = b'{"trail_proof":'
MAX_LINE_BYTES = 1_048_576
MAX_FINDINGS = 100


class CheckpointLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A signed checkpoint among the records."""

    checkpoint: str


class TrailLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line of the export of one trail: whose."""

    trail_export: str


class TrailProof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shows that the records before it are all that one trail has, up to a checkpoint.

    Attributes:
        trail: whose.
        count: records of the trail.
        head: leaf hash of the last, hex; empty where there are none.
        siblings: of the map proof, hex.
        other: of the map proof where the trail is absent: key and value, hex; or nothing.
        heads: the leaf that holds the map's root: the last one under the checkpoint.
        inclusion: its audit path, hex.
        checkpoint: the signed note.
    """

    trail: str
    count: int
    head: str
    siblings: tuple[str, ...]
    other: tuple[str, ...]
    heads: str
    inclusion: tuple[str, ...]
    checkpoint: str


class NextLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last line of a part of an export that goes on: where the next part begins. Not in a finished export."""

    next: int


class TrailProofLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last line of the export of one trail."""

    trail_proof: TrailProof


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong.

    Attributes:
        index: the first record that can be meant: of the log, or of the trail in the export of a trail.
        last: the last one that can be meant; the same where it is known which.
        rule: what does not hold.
    """

    index: int
    last: int
    rule: str


@dataclass(slots=True)
class Report:
    """What a verification found.

    Attributes:
        records: leaves in the export.
        covered: how many of them a signed checkpoint has been found to agree with.
        checkpoint: the last of these.
        trail: whose export it is; empty for the whole log.
        trails: how many workloads have records in it.
        findings: what is wrong, in reading order; at most a hundred.
        digest: SHA-256 of everything that was read.
    """

    records: int = 0
    covered: int = 0
    checkpoint: Checkpoint | None = None
    trail: str = ""
    trails: int = 0
    findings: list[Finding] = field(default_factory=list)
    digest: str = ""

    @property
    def first(self) -> Finding | None:
        """The first thing that was found, reading from the start; None if nothing is wrong. What comes after it may be its consequence."""
        return self.findings[0] if self.findings else None

    def found(self, index: int, last: int, rule: str) -> None:
        """Something is wrong."""
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(Finding(index, max(index, last), rule))


def verify(lines: Iterable[bytes], key: VerifierKey, kept: Iterable[bytes] = ()) -> Report:
    """Verify an export, whichever of the two kinds it is.

    Args:
        lines: of the file, with or without their newlines.
        key: the log's.
        kept: checkpoints that were signed before, from an anchor, a witness, or an earlier export: the log must have grown from them.

    Raises:
        NoteError: one of the kept checkpoints is not the log's.
    """
    heads = sorted((SignedCheckpoint.open(note, key).checkpoint for note in kept), key=lambda head: head.size)
    whole, digest = _Whole(key, heads), hashlib.sha256()
    for line in lines:
        digest.update(line)
        whole.take(line.removesuffix(b"\n"))
    report = whole.end()
    report.digest = digest.hexdigest()
    return report


class _Whole:
    """Takes an export line by line. Memory grows with the number of trails, not with that of records."""

    def __init__(self, key: VerifierKey, kept: list[Checkpoint]) -> None:
        self._key = key
        self._kept = kept
        self._report = Report()
        self._chain = ChainChecker(closed=_Unchecked())
        self._frontier = Frontier()
        self._trail: _Trail | None = None
        self._is_ended = False

    def take(self, line: bytes) -> None:
        if self._is_ended:
            self._report.found(self._report.records, self._report.records, "line-after-the-end")
        elif line.startswith(CHECKPOINT_START):
            self._take_checkpoint(line)
        elif line.startswith(TRAIL_START) and not self._report.records and self._trail is None:
            self._begin_trail(line)
        elif line.startswith(PROOF_START):
            self._is_ended = True
            self._take_proof(line)
        else:
            self._take_leaf(line)

    def _take_leaf(self, line: bytes) -> None:
        report = self._report
        report.records += 1
        if self._trail is not None:
            self._trail.take(line)
            return
        examined = self._chain.examine(line)
        for fault in examined.faults:
            report.found(fault.index, fault.index, fault.rule)
        if examined.record.get("log") != self._key.name:
            report.found(report.records - 1, report.records - 1, "other-log")
        self._frontier.append(examined.digest)
        while self._kept and self._kept[0].size <= self._frontier.size:
            self._compare(self._kept.pop(0), "not-what-was-signed-before")

    def _take_checkpoint(self, line: bytes) -> None:
        report = self._report
        try:
            note = msgspec.json.decode(line, type=CheckpointLine).checkpoint.encode()
            head = SignedCheckpoint.open(note, self._key).checkpoint
        except (msgspec.MsgspecError, UnicodeError, NoteError):
            report.found(report.covered, report.records - 1, "checkpoint-not-signed")
            return
        if head.size != self._frontier.size:
            report.found(min(head.size, self._frontier.size), report.records - 1, "checkpoint-of-another-size")
            return
        self._compare(head, "not-what-was-signed")

    def _compare(self, head: Checkpoint, rule: str) -> None:
        report = self._report
        if head.size == self._frontier.size and head.root == self._frontier.root():
            if rule == "not-what-was-signed":
                report.covered, report.checkpoint = head.size, head
        else:
            report.found(min(report.covered, head.size), head.size - 1, rule)

    def _begin_trail(self, line: bytes) -> None:
        report = self._report
        self._trail = _Trail(report)
        try:
            report.trail = msgspec.json.decode(line, type=TrailLine).trail_export
        except (msgspec.MsgspecError, UnicodeError):
            report.found(0, 0, "first-line-not-readable")

    def _take_proof(self, line: bytes) -> None:
        report = self._report
        try:
            proof = msgspec.json.decode(line, type=TrailProofLine).trail_proof
        except (msgspec.MsgspecError, UnicodeError):
            report.found(report.records, report.records, "trail-proof-not-readable")
            return
        if self._trail is None:
            report.found(0, 0, "not-the-export-of-a-trail")
            return
        self._trail.end(proof, self._key)

    def end(self) -> Report:
        report = self._report
        if self._trail is not None:
            if not self._is_ended:
                report.found(report.records, report.records, "no-trail-proof")
            return report
        report.trails = self._chain.trails
        if report.checkpoint is None and not report.findings:
            report.found(0, report.records - 1, "no-checkpoint")
        elif report.records > report.covered and not report.findings:
            report.found(report.covered, report.records - 1, "after-the-last-checkpoint")
        for head in self._kept:
            report.found(report.records, head.size - 1, "ends-before-what-was-signed")
        return report


class _Trail:
    """The records of one workload: a chain of their own."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._head = b""
        self._count = 0
        self._place = -1

    def take(self, line: bytes) -> None:
        number = self._count
        digest, self._count = leaves.leaf_hash(line), number + 1
        try:
            record = leaves.decode(line)
        except ValueError:
            record = {}
        for rule, holds in self._rules(line, record, number):
            if not holds:
                self._report.found(number, number, rule)
        self._head = digest
        index = record.get("index")
        self._place = index if isinstance(index, int) else self._place

    def _rules(self, line: bytes, record: dict[str, Any], number: int) -> Iterable[tuple[str, bool]]:
        trail = record.get("trail")
        trail = trail if isinstance(trail, dict) else {}
        name, index = trail.get("id"), record.get("index")
        yield "not-canonical", is_canonical(line, record)
        yield "other-trail", name == self._report.trail
        yield "trail-index", trail.get("index") == number
        yield "trail-previous", trail.get("previous") == self._head.hex()
        yield "wrong-index", isinstance(index, int) and index > self._place

    def end(self, proof: TrailProof, key: VerifierKey) -> None:
        report = self._report
        report.trails = int(self._count > 0)
        rule = self._rule_broken(proof, key)
        if rule:
            report.found(min(proof.count, self._count), max(proof.count, self._count) - 1, rule)
        elif not report.findings:
            report.covered = self._count

    def _rule_broken(self, proof: TrailProof, key: VerifierKey) -> str:
        """What the proof does not show; empty if nothing."""
        report = self._report
        if proof.trail != report.trail:
            return "proof-of-another-trail"
        if (proof.count, proof.head) != (self._count, self._head.hex()):
            return "not-where-the-trail-ends"
        try:
            head = SignedCheckpoint.open(proof.checkpoint.encode(), key).checkpoint
            heads = leaves.decode(proof.heads.encode())
            end = TrailEnd(self._count, self._head) if self._count else None
            other = tuple(map(bytes.fromhex, proof.other))
            siblings = tuple(map(bytes.fromhex, proof.siblings))
            inclusion = list(map(bytes.fromhex, proof.inclusion))
            check_inclusion(leaves.leaf_hash(proof.heads.encode()), head.size - 1, head.size, head.root, inclusion)
            if heads.get("kind") != "heads" or heads.get("log") != key.name or len(other) not in {0, 2}:
                return "not-a-heads-record"
            body = heads.get("body")
            root = bytes.fromhex(str(body.get("root"))) if isinstance(body, dict) else b""
            MapProof(siblings, (other[0], other[1]) if other else None).check(root, proof.trail, end)
        except NoteError:
            return "checkpoint-not-signed"
        except (ProofError, ValueError, UnicodeError):
            return "not-shown-by-the-proof"
        report.checkpoint = head
        return ""


class _Unchecked:
    """Which uses have had their outcome is not asked of an export: memory would grow with it."""

    def __contains__(self, use: object, /) -> bool:
        return False

    def add(self, use: str, /) -> None:
        """Forget it."""
