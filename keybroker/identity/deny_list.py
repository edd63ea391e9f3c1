"""Identities that are refused whatever their SVID says: one YAML file, read again when it changes.

```yaml
denied:
  - {spiffe_id: spiffe://example.org/payments/api, reason: "incident 7"}
  - {svid_serial: "5ef07b4ee16bb9386b99e009b31aa09d6f71d382", reason: "stolen laptop"}
```

One certificate is named by its serial number, which is signed, and not by a hash of its bytes, which is not enough: whoever holds an ECDSA
certificate can write its signature in another way (s as n - s) and has the same certificate with another hash.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import msgspec

from keybroker.errors import ConfigError
from keybroker.identity.watched_file import WatchedFile
from keybroker.model.identity import SpiffeId, SpiffeIdError, Svid
from keybroker.yaml_document import YamlDocument

_SERIAL = re.compile(r"[0-9a-fA-F:]{1,64}")


class Denial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry: an identity, or one certificate by its serial number (hex, as the record and openssl show it); and why, for people."""

    spiffe_id: str = ""
    svid_serial: str = ""
    reason: str = ""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    denied: tuple[Denial, ...]


class DenyList:
    """The entries in force.

    Attributes:
        problems: what is wrong with the file as it is now; the entries that were in force stay so, because a denial must not
            be forgotten by a slip of the pen.
    """

    def __init__(self, file: WatchedFile) -> None:
        self._file = file
        self._refused: frozenset[str] = frozenset()
        self.problems: list[str] = []
        self.digest = ""
        self._take(file.read())

    @classmethod
    def load(cls, path: Path) -> DenyList:
        """Read the list.

        Raises:
            ConfigError: the file is missing or cannot be used. An empty list is written `denied: []`.
        """
        return cls(WatchedFile(path))

    def denies(self, svid: Svid) -> bool:
        """Whether this identity, or this very certificate, is refused."""
        return svid.id.text in self._refused or svid.serial in self._refused

    def refresh(self) -> bool:
        """Read the file if it has changed. True if who is refused has changed."""
        if not self._file.has_changed():
            return False
        before = self.digest
        try:
            self._take(self._file.read())
        except ConfigError as err:
            self.problems = [str(err)]
            return False
        self.problems = []
        return self.digest != before

    def _take(self, data: bytes) -> None:
        document = YamlDocument.parse(self._file.path, data)
        entries = document.convert(_File).denied
        for index, entry in enumerate(entries):
            _check(document, index, entry)
        self._refused = frozenset(entry.spiffe_id or _plain(entry.svid_serial) for entry in entries)
        self.digest = hashlib.sha256("\n".join(sorted(self._refused)).encode()).hexdigest()


def _check(document: YamlDocument, index: int, entry: Denial) -> None:
    where = document.where(("denied", index))
    if bool(entry.spiffe_id) == bool(entry.svid_serial):
        msg = f"{where}: denied[{index}]: give exactly one of `spiffe_id` and `svid_serial`"
        raise ConfigError(msg)
    if entry.svid_serial and not _SERIAL.fullmatch(entry.svid_serial):
        msg = f"{where}: denied[{index}].svid_serial: a serial number in hex"
        raise ConfigError(msg)
    if entry.spiffe_id:
        try:
            SpiffeId.parse(entry.spiffe_id)
        except SpiffeIdError as err:
            msg = f"{where}: denied[{index}].spiffe_id: not a SPIFFE ID ({err.rule})"
            raise ConfigError(msg) from err


def _plain(serial: str) -> str:
    """Lower-case hex without colons and leading zeros, as `Svid.serial` is."""
    return serial.replace(":", "").lower().lstrip("0")
