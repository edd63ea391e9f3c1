"""How a database of an older format becomes one of the newest: wholly or not at all, and with all that is in it."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from keybroker.audit.chain import check
from keybroker.authority.store import schema
from keybroker.authority.store.opening import DATABASE
from keybroker.authority.store.sqlite import SqliteStore
from tests.brokers import read_leaves
from tests.unit.authority.store.logs import OPEN, PIN, SIZE, whole

# Migrates, and ends itself with SIGKILL before the statement of that number.
DYING = """\
import os, signal, sqlite3, sys
from keybroker.authority.store import schema

seen = 0

def count(_statement):
    global seen
    seen += 1
    if seen == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA journal_mode = WAL")
db.set_trace_callback(count)
schema.migrate(db)
"""


def old_store(directory: Path, version: int) -> Path:
    """A state directory as that version of keybroker would have left it, with a bit of everything in it."""
    new = whole(directory / "new") / DATABASE
    state = directory / "old"
    state.mkdir()
    with contextlib.closing(sqlite3.connect(state / DATABASE, isolation_level=None)) as db:
        schema.migrate(db, schema.STEPS[:version])
        db.execute("ATTACH ? AS new", (str(new),))
        tables = [row[0] for row in db.execute("SELECT name FROM main.sqlite_schema WHERE type = 'table' AND sql <> ''")]
        for table in tables:
            db.execute(f"INSERT INTO main.{table} SELECT * FROM new.{table}")  # noqa: S608  names of ours
    return state


def version_of(state: Path) -> int:
    with contextlib.closing(sqlite3.connect(state / DATABASE)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def tables_of(state: Path) -> set[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(state / DATABASE)) as db:
        return set(db.execute("SELECT name, sql FROM sqlite_schema WHERE sql <> ''"))


def require_everything(state: Path) -> None:
    leaves = read_leaves(state)
    assert (len(leaves), check(leaves)) == (SIZE, [])
    store = SqliteStore.open(state)
    try:
        assert [use for use, _ in store.open_uses()] == [OPEN]
        assert store.pins() == [PIN]
    finally:
        store.close()


@pytest.mark.case(78)
@pytest.mark.parametrize("version", range(1, len(schema.STEPS)))
def test_database_of_an_older_version_is_brought_forward_without_loss(tmp_path: Path, version: int) -> None:
    state = old_store(tmp_path, version)
    assert version_of(state) == version
    require_everything(state)
    assert version_of(state) == len(schema.STEPS)
    assert tables_of(state) == tables_of(tmp_path / "new")
    require_everything(state)


@pytest.mark.case(78)
def test_kill_in_the_middle_leaves_one_version_or_the_next_and_the_next_start_goes_on(tmp_path: Path) -> None:
    template = old_store(tmp_path, 1)
    seen: set[int] = set()
    ended = False
    for number in range(1, 200):
        state = tmp_path / f"killed-{number}"
        state.mkdir()
        (state / DATABASE).write_bytes((template / DATABASE).read_bytes())
        done = subprocess.run([sys.executable, "-c", DYING, str(state / DATABASE), str(number)], check=False, timeout=60)
        version = version_of(state)
        seen.add(version)
        assert tables_of(state) == of_version(tmp_path, version)
        require_everything(state)
        assert version_of(state) == len(schema.STEPS)
        ended = done.returncode == 0
        if ended:
            break
    assert ended
    assert seen == set(range(1, len(schema.STEPS) + 1))


def of_version(directory: Path, version: int) -> set[tuple[str, str]]:
    """The tables that a version has."""
    state = directory / f"version-{version}"
    state.mkdir(exist_ok=True)
    with contextlib.closing(sqlite3.connect(state / DATABASE, isolation_level=None)) as db:
        schema.migrate(db, schema.STEPS[:version])
    return tables_of(state)


@pytest.mark.case(78)
def test_step_that_fails_leaves_the_version_before(tmp_path: Path) -> None:
    state = old_store(tmp_path, 1)
    with contextlib.closing(sqlite3.connect(state / DATABASE, isolation_level=None)) as db, pytest.raises(sqlite3.OperationalError):
        schema.migrate(db, (*schema.STEPS[:1], "CREATE TABLE half (a) STRICT; CREATE TABLE record (a);"))
    assert (version_of(state), tables_of(state)) == (1, of_version(tmp_path, 1))
    require_everything(state)
