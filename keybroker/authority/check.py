"""`keybroker check`: everything that would keep this broker from serving, found without serving."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from keybroker.authority.policy.holder import PolicyHolder
from keybroker.authority.store.sqlite import SCHEMA_VERSION
from keybroker.config import AuthorityConfig
from keybroker.errors import ConfigError, KeyBrokerError
from keybroker.identity.bundle import TrustBundles
from keybroker.identity.deny_list import DenyList
from keybroker.process import uid_of


def problems(config: AuthorityConfig) -> list[str]:
    """What is wrong, each with its cure; empty if nothing is. Tokens and keys are the hsm room's to judge."""
    return [*_of_files(config), *_of_store(config.state), *_of_users(config)]


def _of_files(config: AuthorityConfig) -> Iterator[str]:
    try:
        TrustBundles.load(config.bundles)
    except ConfigError as err:
        yield str(err)
    try:
        if config.deny_list:
            DenyList.load(config.deny_list)
    except ConfigError as err:
        yield str(err)
    try:
        holder = asyncio.run(PolicyHolder.load(config.grants, config.policy, frozenset(config.keys)))
    except KeyBrokerError as err:
        yield str(err)
    else:
        yield from holder.warnings


def _of_store(state: Path) -> Iterator[str]:
    parent = next(each for each in (state, *state.parents) if each.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        yield f"{parent}: cannot be written by this user; run `check` as the authority's user, or give it the directory"
        return
    database = state / "keybroker.db"
    if not database.exists():
        return  # made at the first start
    try:
        db = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
        try:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                yield f"{database}: made by a newer keybroker (format {version}); upgrade this host"
            elif not _is_locked(state / "lock") and (answer := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                yield f"{database}: damaged ({answer}); restore it from a copy"
        finally:
            db.close()
    except sqlite3.Error as err:
        yield f"{database}: cannot be read ({getattr(err, 'sqlite_errorname', 'not a database')}); restore it from a copy"


def _is_locked(lock: Path) -> bool:
    """Whether a broker runs on this state; then its database is in use, and it checks that itself."""
    if not lock.exists():
        return False
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _of_users(config: AuthorityConfig) -> Iterator[str]:
    for user in (config.frontend_user, *(link.hsm_user for link in config.tokens.values())):
        try:
            uid_of(user)
        except ConfigError as err:
            yield str(err)
