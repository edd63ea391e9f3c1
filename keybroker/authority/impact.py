"""Adds up what an identity, a key, a certificate, a person or a time window did: from the catalog's hours, and exactly at their edges.

Whole hours that the catalog covers are added from it. The rest (parts of hours at `since` and `until`, and the end of the log) is read
record by record.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from keybroker.authority.store.catalog import HOUR_US, Counted
from keybroker.authority.store.reader import Reader
from keybroker.clock import from_rfc3339, to_rfc3339
from keybroker.model.impact import MAX_ROWS, ElsewhereRow, Hour, Impact, KeyRow, Question, Row, SvidRow, Tally

_MAX_SVIDS = 500  # of which other uses are looked for
_END_OF_TIME_US = 2**62
_KINDS = ("signed", "other", "refused")

_P = TypeVar("_P", bound=Hashable)
_R = TypeVar("_R")


def impact_of(reader: Reader, log: str, question: Question) -> Impact:
    """Answer a question.

    Raises:
        AuditUnavailableError: the record cannot be read now.
    """
    size, time_us = reader.end()
    since = from_rfc3339(question.since) if question.since else 0
    until = from_rfc3339(question.until) if question.until else _END_OF_TIME_US
    parts = _Parts()
    for counted in reader.counted(_named(question), since, until):
        parts.add(counted)
    for hour, ending, times in reader.counted_by_hour(_named(question), since, until):
        parts.add_hour(hour, ending, times)
    return parts.answer(reader, log, question, size, to_rfc3339(time_us) if size else "")


def _named(question: Question) -> dict[str, str]:
    """The parts of a use that must be so."""
    named = {"workload": question.workload, "key": question.key, "svid": question.svid, "person": question.person}
    return {name: value for name, value in named.items() if value}


@dataclass(slots=True)
class _Sum:
    """A tally that grows."""

    signed: int = 0
    other: int = 0
    refused: int = 0
    first: int = -1
    last: int = -1
    first_us: int = 0
    last_us: int = 0

    def add(self, counted: Counted) -> None:
        kind = _kind(counted.use.ending)
        setattr(self, kind, getattr(self, kind) + counted.times)
        if self.first < 0 or counted.first < self.first:
            self.first, self.first_us = counted.first, counted.first_us
        if counted.last > self.last:
            self.last, self.last_us = counted.last, counted.last_us

    def tally(self) -> Tally:
        times = (to_rfc3339(self.first_us), to_rfc3339(self.last_us)) if self.first >= 0 else ("", "")
        return Tally(self.signed, self.other, self.refused, self.first, self.last, *times)


def _kind(ending: str) -> str:
    if ending.startswith("refused"):
        return "refused"
    return "signed" if ending == "signed" else "other"


def _sums() -> defaultdict[_P, _Sum]:
    return defaultdict(_Sum)


@dataclass(slots=True)
class _Parts:
    """Everything that is added up, by what it is told apart by."""

    total: _Sum = field(default_factory=_Sum)
    endings: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    keys: defaultdict[tuple[str, str, str, str], _Sum] = field(default_factory=_sums)
    workloads: defaultdict[str, _Sum] = field(default_factory=_sums)
    contents: defaultdict[str, _Sum] = field(default_factory=_sums)
    fields: defaultdict[str, _Sum] = field(default_factory=_sums)
    grants: defaultdict[str, _Sum] = field(default_factory=_sums)
    people: defaultdict[str, _Sum] = field(default_factory=_sums)
    addresses: defaultdict[str, _Sum] = field(default_factory=_sums)
    svids: defaultdict[tuple[str, str], _Sum] = field(default_factory=_sums)
    hours: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0]))

    def add(self, counted: Counted) -> None:
        """One more row of what was counted."""
        use = counted.use
        media_type, *fields = use.content.split("\n")
        self.total.add(counted)
        self.endings[use.ending] += counted.times
        self.keys[use.key, use.version, use.operation, use.algorithm].add(counted)
        self.svids[use.svid, use.workload].add(counted)
        several = (
            (self.workloads, [use.workload]),
            (self.contents, [media_type]),
            (self.fields, fields),
            (self.grants, _lines(use.grants)),
            (self.people, _lines(use.people)),
            (self.addresses, [use.address]),
        )
        for sums, values in several:
            for value in values:
                sums[value].add(counted)
        if counted.hour >= 0:
            self.add_hour(counted.hour, use.ending, counted.times)

    def add_hour(self, hour: int, ending: str, times: int) -> None:
        """So many in one hour."""
        self.hours[hour][_KINDS.index(_kind(ending))] += times

    def answer(self, reader: Reader, log: str, question: Question, size: int, time: str) -> Impact:
        """What was added up, most of it first."""
        elsewhere = self._elsewhere(reader, question)
        more: dict[str, int] = {}

        def rows(name: str, found: Iterable[_R]) -> tuple[_R, ...]:
            listed = tuple(found)
            if len(listed) > MAX_ROWS:
                more[name] = len(listed) - MAX_ROWS
            return listed[:MAX_ROWS]

        named = ("workloads", "contents", "fields", "grants", "people", "addresses")
        simple = {name: rows(name, (Row(value, each.tally()) for value, each in _ranked(getattr(self, name)))) for name in named}
        hours = sorted(self.hours.items())
        return Impact(
            log=log,
            question=question,
            records=size,
            time=time,
            total=self.total.tally(),
            endings=dict(sorted(self.endings.items())),
            keys=rows("keys", (KeyRow(*place, each.tally()) for place, each in _ranked(self.keys))),
            svids=rows("svids", (SvidRow(*place, each.tally()) for place, each in _ranked(self.svids))),
            elsewhere=rows("elsewhere", elsewhere),
            timeline=tuple(Hour(to_rfc3339(hour * HOUR_US), *counts) for hour, counts in hours),
            more=more,
            **simple,
        )

    def _elsewhere(self, reader: Reader, question: Question) -> Iterator[ElsewhereRow]:
        """What the same certificates did that a question about a key or a person leaves out, at any time."""
        serials = sorted({serial for serial, _ in self.svids if serial})
        if not (question.key or question.person) or len(serials) > _MAX_SVIDS:
            return
        sums: defaultdict[tuple[str, str, str], _Sum] = _sums()
        for serial in serials:
            for counted in reader.counted({"svid": serial}, 0, _END_OF_TIME_US):
                use = counted.use
                if question.workload not in {"", use.workload}:
                    continue
                if (question.key and use.key != question.key) or (question.person and question.person not in _lines(use.people)):
                    sums[serial, use.workload, use.key].add(counted)
        for place, each in _ranked(sums):
            yield ElsewhereRow(*place, each.tally())


def _lines(text: str) -> list[str]:
    return text.split("\n") if text else []


def _ranked(sums: dict[_P, _Sum]) -> list[tuple[_P, _Sum]]:
    """Most signatures first, then most refusals, then as they came."""
    return sorted(sums.items(), key=lambda pair: (-pair[1].signed, -pair[1].refused, pair[1].first))
