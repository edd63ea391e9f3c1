"""The PIN: from a file that only its owner can read, to C_Login, and nowhere else."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path

from keybroker.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Pin:
    """A PIN that does not show itself."""

    text: str = field(repr=False)

    @classmethod
    def load(cls, path: Path) -> Pin:
        """Read a PIN file: one line.

        Raises:
            ConfigError: unreadable, open to others, or not one line of text. Never repeats the content.
        """
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(path.stat().st_mode)
                data = file.read(1024)
        except OSError as err:
            msg = f"{path}: the PIN cannot be read: {err.strerror}"
            raise ConfigError(msg) from err
        if mode & 0o077:
            msg = f"{path}: others can read the PIN (mode {mode:04o}); chmod 0600 it"
            raise ConfigError(msg)
        try:
            text = data.removesuffix(b"\n").decode()
        except UnicodeDecodeError as err:
            msg = f"{path}: the PIN is not text"
            raise ConfigError(msg) from err
        if not text or not text.isprintable():
            msg = f"{path}: must hold the PIN and nothing else, on one line"
            raise ConfigError(msg)
        return cls(text)
