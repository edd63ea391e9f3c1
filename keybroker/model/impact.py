"""What an identity, a key, a certificate, a person or a time window did and tried to do: the answer to "what is the damage?"."""

from __future__ import annotations

import msgspec

MAX_ROWS = 1_000  # of each part; `more` says how many there are besides


class Question(msgspec.Struct, frozen=True):
    """Whose deeds are asked for. Empty text does not narrow; times are RFC 3339, `until` is not included.

    Attributes:
        svid: serial number of a certificate, lower-case hex.
        person: who approved.
    """

    workload: str = ""
    key: str = ""
    svid: str = ""
    person: str = ""
    since: str = ""
    until: str = ""


class Tally(msgspec.Struct, frozen=True):
    """How often, when, and where on record: `first` and `last` are indexes, their times RFC 3339. `other` is failed, withheld, unknown."""

    signed: int
    other: int
    refused: int
    first: int
    last: int
    first_time: str
    last_time: str


class KeyRow(msgspec.Struct, frozen=True):
    """One way to use one key version. `version` is empty where a refusal came before one was chosen."""

    key: str
    version: str
    operation: str
    algorithm: str
    tally: Tally


class Row(msgspec.Struct, frozen=True):
    """One value: a workload, grant, certificate, address, person, content type, content field, or the code of a refusal."""

    value: str
    tally: Tally


class SvidRow(msgspec.Struct, frozen=True):
    """One certificate and who held it."""

    serial: str
    workload: str
    tally: Tally


class ElsewhereRow(msgspec.Struct, frozen=True):
    """What else one of these certificates was used for."""

    serial: str
    workload: str
    key: str
    tally: Tally


class Hour(msgspec.Struct, frozen=True):
    """One hour in which something was done. `start` is RFC 3339."""

    start: str
    signed: int
    other: int
    refused: int


class Impact(msgspec.Struct, frozen=True):
    """The whole answer.

    Attributes:
        log: origin of the log.
        question: what was asked.
        records: how many the log had then; what came later is not in here.
        time: of the last of them, RFC 3339.
        endings: how uses ended and refusals were called, with how many.
        elsewhere: of a question about a key or a person: what else the same certificates did, at any time.
        more: by name of a part, how many rows it has besides those that are here.
    """

    log: str
    question: Question
    records: int
    time: str
    total: Tally
    endings: dict[str, int]
    keys: tuple[KeyRow, ...]
    workloads: tuple[Row, ...]
    contents: tuple[Row, ...]
    fields: tuple[Row, ...]
    grants: tuple[Row, ...]
    people: tuple[Row, ...]
    addresses: tuple[Row, ...]
    svids: tuple[SvidRow, ...]
    elsewhere: tuple[ElsewhereRow, ...]
    timeline: tuple[Hour, ...]
    more: dict[str, int]
