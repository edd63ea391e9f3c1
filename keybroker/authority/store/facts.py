"""What a record can be found by, and how uses are told apart: read off one leaf, and nothing else of it is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec


class _Trail(msgspec.Struct, frozen=True):
    id: str = ""


class _Key(msgspec.Struct, frozen=True):
    name: str = ""
    version: int = 0


class _Svid(msgspec.Struct, frozen=True):
    serial: str = ""
    sha256: str = ""
    address: str = ""


class _Decision(msgspec.Struct, frozen=True):
    grants: tuple[str, ...] = ()


class _Content(msgspec.Struct, frozen=True):
    media_type: str = ""
    fields: dict[str, str] = {}


class _Target(msgspec.Struct, frozen=True):
    kind: str = ""
    id: str = ""


class _Request(msgspec.Struct, frozen=True):
    operation: str = ""
    algorithm: str = ""
    content: _Content = _Content()
    target: _Target = _Target()


class _Envelope(msgspec.Struct, frozen=True):
    payload: bytes = b""


class _Statement(msgspec.Struct, frozen=True):
    person: str = ""


class _Body(msgspec.Struct, frozen=True):
    code: str = ""
    count: int = 1


class Use(NamedTuple):
    """What is counted of uses and refusals: those that differ in any of this are counted apart.

    Attributes:
        key: its name, as it was asked for.
        content: media type, and fields as `NAME=VALUE`, a line each.
        grants: ids of the grants that let it, a line each.
        svid: serial number, lower-case hex.
        people: who approved it, a line each.
        ending: `signed`, `failed`, `withheld`, `unknown`, or `refused: CODE`.
    """

    workload: str
    key: str
    version: str
    operation: str
    algorithm: str
    content: str
    grants: str
    svid: str
    address: str
    people: str
    ending: str


class Facts(NamedTuple):
    """The parts of a record that somebody may ask for; many records have the same.

    Attributes:
        target: name of the key that was asked for, where `key` is empty because there is none.
        fields: content fields, `NAME=VALUE`.
        people: who approved it.
        code: of a refusal.
    """

    kind: str
    workload: str
    key: str
    version: int
    target: str
    operation: str
    algorithm: str
    media_type: str
    fields: tuple[str, ...]
    grants: tuple[str, ...]
    people: tuple[str, ...]
    svid: str
    svid_sha256: str
    address: str
    outcome: str
    code: str

    def words(self) -> Iterator[tuple[str, str]]:
        """Field and text of everything that the record can be found by."""
        pairs = (
            ("kind", self.kind),
            ("workload", self.workload),
            ("key", self.key),
            ("key_version", f"{self.key}/{self.version}" if self.key else ""),
            ("outcome", self.outcome),
            ("svid", self.svid),
            ("svid_sha256", self.svid_sha256),
            ("address", self.address),
            ("workload_key", f"{self.workload} {self.key}" if self.workload and self.key else ""),
            ("algorithm", self.algorithm),
            *(("grant", grant) for grant in self.grants),
            *(("content", field) for field in self.fields),
            *(("person", person) for person in self.people),
        )
        return (pair for pair in pairs if pair[1])

    def is_named(self, named: dict[str, str]) -> bool:
        """Whether this is of such a workload, key, certificate (`svid`), approver (`person`)."""
        own = {"workload": self.workload, "key": self.key or self.target, "svid": self.svid}
        return all(value in self.people if name == "person" else own[name] == value for name, value in named.items())

    def use(self, outcome: str) -> Use:
        """What was asked for, and how it ended: with this outcome, or, if that is empty, with a refusal."""
        return Use(
            workload=self.workload,
            key=self.key or self.target,
            version=str(self.version or ""),
            operation=self.operation,
            algorithm=self.algorithm,
            content="\n".join((self.media_type, *self.fields)),
            grants="\n".join(self.grants),
            svid=self.svid,
            address=self.address,
            people="\n".join(self.people),
            ending=outcome or f"refused: {self.code}",
        )


class Entry(NamedTuple):
    """One record: its facts, the use that it is about, and how many things alike it stands for."""

    facts: Facts
    use: str
    times: int


class _Leaf(msgspec.Struct, frozen=True):
    kind: str
    use: str
    outcome: str
    trail: _Trail
    key: _Key
    svid: _Svid
    decision: _Decision
    request: _Request
    body: _Body
    approvals: tuple[_Envelope, ...]


_decode = msgspec.json.Decoder(_Leaf).decode
_statement = msgspec.json.Decoder(_Statement).decode


def entry_of(leaf: bytes) -> Entry:
    """What a record can be found by.

    Raises:
        msgspec.MsgspecError: it is no record.
    """
    read = _decode(leaf)
    svid, request = read.svid, read.request
    content = request.content
    facts = Facts(
        read.kind,
        read.trail.id,
        read.key.name,
        read.key.version,
        request.target.id if request.target.kind == "key" else "",
        request.operation,
        request.algorithm,
        content.media_type,
        tuple(f"{name}={value}" for name, value in sorted(content.fields.items())) if content.fields else (),
        read.decision.grants,
        tuple(sorted({_person(each) for each in read.approvals} - {""})) if read.approvals else (),
        svid.serial,
        svid.sha256,
        svid.address,
        read.outcome,
        read.body.code if read.kind == "denial" else "",
    )
    return Entry(facts, read.use, read.body.count)


def _person(envelope: _Envelope) -> str:
    """Whose approval it is, as it says itself."""
    try:
        return _statement(envelope.payload).person
    except msgspec.MsgspecError:
        return ""
