"""`keybroker check`: everything that would keep this broker from serving, found without serving."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from keybroker.authority.checkpoints import log_key
from keybroker.authority.policy import loading
from keybroker.authority.store import acknowledgement, opening
from keybroker.authority.store.faults import name_of
from keybroker.config import AuthorityConfig
from keybroker.errors import ConfigError, KeyBrokerError, StoreError
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
        if config.checkpoints:
            log_key(config.checkpoints.key, config.log)
    except ConfigError as err:
        yield f"{err}; `keybroker audit log-key` prints what belongs there"
    yield from asyncio.run(_of_policy(config))


async def _of_policy(config: AuthorityConfig) -> list[str]:
    try:
        holder = await loading.load(config, is_kept=False)
    except KeyBrokerError as err:
        return str(err).splitlines()
    try:
        trouble = await holder.trouble()
    finally:
        await holder.close()
    return [*holder.warnings, *holder.problems, *([trouble] if trouble else [])]


def _of_store(state: Path) -> Iterator[str]:
    parent = next(each for each in (state, *state.parents) if each.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        yield f"{parent}: cannot be written by this user; run `check` as the authority's user, or give it the directory"
        return
    if not (state / opening.DATABASE).exists():
        return  # made at the first start
    is_alone = not opening.is_locked(state)  # a broker that runs has its database in use, and checks it itself
    try:
        db = opening.reader(state)
    except StoreError as err:
        yield str(err)
        return
    try:
        if is_alone and (answer := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            yield f"{state}: the database is damaged ({answer}); `keybroker audit check` says where, restore it from a copy"
        saw = acknowledgement.distrusted(state).partition(" ")[2]
        if saw:
            yield f"{state}: {saw}; set it right, and run `keybroker clock acknowledge --state {state}`"
    except StoreError as err:
        yield str(err)
    except sqlite3.Error as err:
        yield f"{state}: the database cannot be read ({name_of(err)}); restore it from a copy"
    finally:
        db.close()


def _of_users(config: AuthorityConfig) -> Iterator[str]:
    for user in (config.frontend_user, *(link.hsm_user for link in config.tokens.values())):
        try:
            uid_of(user)
        except ConfigError as err:
            yield str(err)
