"""A file that is read again when it changes, at the cost of one stat call while it does not."""

from __future__ import annotations

from pathlib import Path

from keybroker.errors import ConfigError

MAX_FILE_BYTES = 16 * 1024 * 1024

Fingerprint = tuple[int, ...]


class WatchedFile:
    """Remembers which state of a file was read last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: Fingerprint | None = None

    def read(self) -> bytes:
        """The content now.

        Raises:
            ConfigError: unreadable or too large.
        """
        try:
            self._seen = fingerprint(self.path)
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
        return fingerprint(self.path) != self._seen


def fingerprint(path: Path) -> Fingerprint:
    """Changes whenever the file behind a path does, links followed; empty while there is none."""
    try:
        state = path.stat()
    except OSError:
        return ()
    return (state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino, state.st_dev)
