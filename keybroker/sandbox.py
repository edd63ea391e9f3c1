"""What a room may touch on this host, told to the kernel before it reads its first byte: Landlock (landlock(7), ABI 1 and later).

Other users, file modes and systemd keep the rooms apart; this is one wall more, which stands even where all rooms run as one user. It
binds the process for good: what is not named cannot be opened, no program can be executed, no TCP port bound or connected to. Where
the kernel is older, fewer of these are enforced; where it has no Landlock, none.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from keybroker.errors import ConfigError

# linux/landlock.h
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION = 1
_BENEATH, _PORT = 1, 2
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 15
_BIND, _CONNECT = 1 << 0, 1 << 1
_ALL_SCOPES = 0b11  # abstract Unix sockets and signals stay inside
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many rights over files an ABI knows; 16 from ABI 5 on
_NO_LANDLOCK = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})  # not built in, not switched on, or kept from us by a container

# What Python, OpenSSL and the C library read on their own.
_SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ssl", "/etc/localtime", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/ld.so.cache",
           "/dev/urandom", "/dev/null", "/proc/self", "/proc/stat", "/proc/sys/kernel/random")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sandbox:
    """The walls of one room. Directories hold for everything in them; what does not exist is left out.

    Attributes:
        reads: files and directories.
        writes: directories to read, write, make and remove in; made if they are missing.
        binds: TCP ports.
        connects: TCP ports on any host; None for any port.
    """

    reads: tuple[Path, ...]
    writes: tuple[Path, ...] = ()
    binds: tuple[int, ...] = ()
    connects: tuple[int, ...] | None = ()

    def enter(self) -> int:
        """Go in, for good: this thread and all that it starts from now on. Call it before there are others.

        Returns:
            The kernel's Landlock ABI; 0 where there is none, and no wall.

        Raises:
            ConfigError: the kernel has Landlock and refuses to build the walls.
        """
        abi = landlock_abi()
        if abi == 0:
            return 0
        try:
            self._enter(abi)
        except OSError as err:
            msg = f"Landlock (ABI {abi}) refuses this process: {err.strerror}; report it, with the kernel's version"
            raise ConfigError(msg) from err
        return abi

    def _enter(self, abi: int) -> None:
        rights = (1 << _FS_BITS.get(abi, 16)) - 1
        ports = 0 if abi < 4 else _BIND if self.connects is None else _BIND | _CONNECT
        scopes = _ALL_SCOPES if abi >= 6 else 0
        attributes = b"".join(value.to_bytes(8, sys.byteorder) for value in (rights, ports, scopes))
        size = 8 if abi < 4 else 16 if abi < 6 else 24
        ruleset = _call(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
        try:
            for path in self.reads:
                _allow_path(ruleset, path, rights & (_READ_FILE | _READ_DIR))
            for path in self.writes:
                with contextlib.suppress(OSError):  # whoever needs it says better what is wrong with it
                    path.mkdir(mode=0o700, parents=True, exist_ok=True)
                _allow_path(ruleset, path, rights & ~_EXECUTE)
            for access, numbers in ((_BIND, self.binds), (_CONNECT, self.connects or ())):
                for number in numbers if ports & access else ():
                    rule = access.to_bytes(8, sys.byteorder) + number.to_bytes(8, sys.byteorder)
                    _call(_ADD_RULE, ruleset, _PORT, rule, 0)
            _call(_RESTRICT_SELF, ruleset, 0)
        finally:
            os.close(ruleset)


def landlock_abi() -> int:
    """The version of Landlock that this kernel speaks; 0 for none."""
    try:
        return _call(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    except OSError as err:
        if err.errno in _NO_LANDLOCK:
            return 0
        raise


def python_paths() -> tuple[Path, ...]:
    """What the interpreter and this program read of themselves, and of the system. Not the directory that they were started in."""
    entries = (Path(entry) for entry in sys.path if entry)
    own = (Path(sys.prefix), Path(sys.base_prefix), Path(__file__).parent, *(entry for entry in entries if entry != Path.cwd()))
    return (*own, *(Path(name) for name in _SYSTEM))


def own_temporary() -> tuple[Path, ...]:
    """The directory for temporary files that TMPDIR names; /tmp, which all share, is none."""
    named = os.environ.get("TMPDIR", "")
    return (Path(named),) if named else ()


def around(*files: Path | None) -> Iterator[Path]:
    """The directories of files that are replaced by renaming, and of what they are links to."""
    for file in files:
        if file is not None:
            yield file.parent
            yield file.resolve().parent


def _allow_path(ruleset: int, path: Path, access: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not path.is_dir():
            access &= _ON_FILES
        _call(_ADD_RULE, ruleset, _BENEATH, access.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder, signed=True), 0)
    finally:
        os.close(opened)


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    done: int = libc.syscall(number, *arguments)
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return done
