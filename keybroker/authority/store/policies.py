"""Versions of the rules in the store, where changes of the rules are operations. Each function is called inside a transaction."""

from __future__ import annotations

import hashlib
import sqlite3
from dataclasses import dataclass

import msgspec

from keybroker.audit.leaf import canonical


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """One version of the rules.

    Attributes:
        revision: 1, 2, 3 ...; never used twice.
        change: digest of the proposal that made it; empty for one that was read from the directory of grant files.
        files: grant files by name; none where the broker has gone back to files on disk.
        since: RFC 3339.
    """

    revision: int
    change: str
    files: dict[str, str]
    since: str

    @property
    def base(self) -> str:
        """What a proposal names as what it was written for: SHA-256 of revision and files, lower-case hex.

        The revision is in it, so that a proposal for an earlier version does not fit a later one with the same files.
        """
        return hashlib.sha256(canonical({"revision": self.revision, "files": self.files})).hexdigest()


def change_of(base: str, files: dict[str, str]) -> str:
    """The digest of a proposal: SHA-256 of what it was written for and of the new files, lower-case hex."""
    return hashlib.sha256(canonical({"base": base, "files": files})).hexdigest()


def newest(db: sqlite3.Connection) -> PolicyVersion | None:
    """The newest version, or None."""
    row = db.execute("SELECT revision, change, files, since FROM policy_version ORDER BY revision DESC LIMIT 1").fetchone()
    return PolicyVersion(row[0], row[1], msgspec.json.decode(row[2], type=dict[str, str]), row[3]) if row else None


def changes(db: sqlite3.Connection) -> frozenset[str]:
    """The digests of all proposals that have taken effect."""
    return frozenset(row[0] for row in db.execute("SELECT change FROM policy_version WHERE change <> ''"))


def add(db: sqlite3.Connection, version: PolicyVersion) -> None:
    """A version takes effect."""
    db.execute(
        "INSERT INTO policy_version (revision, change, files, since) VALUES (?,?,?,?)",
        (version.revision, version.change, msgspec.json.encode(version.files), version.since),
    )
