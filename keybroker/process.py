"""What every room does to its own process before it touches anything secret. Linux only: prctl(2), unix(7)."""

from __future__ import annotations

import ctypes
import gc
import os
import pwd
import resource
import signal

from keybroker.errors import ConfigError

EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h: starting again will not help
EXIT_STORE = 75  # EX_TEMPFAIL: the store failed under us; start again and verify

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38


def harden() -> None:
    """No core dumps, no ptrace by the same user, no way to gain privileges. Survives neither exec nor setuid, so each room calls it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    os.umask(0o077)


def collect_seldom() -> None:
    """Called once a room is made: what lives as long as the process is no longer looked through for cycles, and rounds are rare.

    The hot path makes no cycles; with Python's defaults a round comes every few requests, at a tenth of the room's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def allow_open_files(count: int) -> None:
    """Let this process have so many files and connections open, as far as the host's hard limit goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends.

    Args:
        parent: the process id that started this one, as the parent told it; closes the race of a parent that is already gone.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def uid_of(user: str) -> int:
    """The numeric id of a user name or number; of the current user for an empty text.

    Raises:
        ConfigError: no such user.
    """
    if not user:
        return os.getuid()
    if user.isdecimal():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError as err:
        msg = f"user {user!r} does not exist on this host; create it, or name another"
        raise ConfigError(msg) from err


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"prctl({option}): {os.strerror(errno)}")
