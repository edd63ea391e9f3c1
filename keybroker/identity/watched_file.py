"""A file that is read again when it changes, at the cost of one stat call while it does not."""

from __future__ import annotations

from pathlib import Path

from keybroker.errors import ConfigError

MAX_FILE_BYTES = 16 * 1024 * 1024

Signature = tuple[int, int, int, int]


class WatchedFile:
    """Remembers which state of a file was read last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: Signature | None = None

    def read(self) -> bytes:
        """The content now.

        Raises:
            ConfigError: unreadable or too large.
        """
        try:
            self._seen = self._signature()
            with self.path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as err:
            msg = f"{self.path}: cannot be read: {err.strerror}"
            raise ConfigError(msg) from err
        if len(data) > MAX_FILE_BYTES:
            msg = f"{self.path}: larger than {MAX_FILE_BYTES} bytes"
            raise ConfigError(msg)
        return data

    def has_changed(self) -> bool:
        """Whether the file is another than the one that was read last; also when it has gone."""
        try:
            return self._signature() != self._seen
        except OSError:
            return True

    def _signature(self) -> Signature:
        stat = self.path.stat()
        return (stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_dev)
