"""A start that cannot keep the record's promise ends with a status that tells a service manager not to try again, and says the cure."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from keybroker.authority.store.opening import DATABASE
from keybroker.process import EXIT_CONFIG, EXIT_STORE
from tests.integration.authority.served import ServedAuthority, identity, served_authority
from tests.unit.authority.store.logs import tampering


def be_newer(state: Path) -> None:
    with tampering(state) as db:
        db.execute("PRAGMA user_version = 999")


def be_something_else(state: Path) -> None:
    (state / DATABASE).write_bytes(b"something else, long enough to be sure of it" * 100)


def be_cut_short(state: Path) -> None:
    os.truncate(state / DATABASE, 3 * 4096)


def be_forged(state: Path) -> None:
    with tampering(state) as db:
        db.execute("UPDATE record SET outcome = 'failed' WHERE kind = 'outcome'")


def end_of_start(authority: ServedAuthority, *before: str) -> tuple[int, str]:
    """Start it; its exit status, and what it said meanwhile."""
    said = len(authority.text())
    authority.start(*before)
    return authority.wait(), authority.text()[said:]


@pytest.mark.case(61)
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (be_newer, "made by a newer keybroker"),
        (be_something_else, "cannot be opened (SQLITE_NOTADB)"),
        (be_cut_short, "restore"),
        (be_forged, "the record is damaged at index"),
    ],
)
def test_broker_refuses_to_start_on_a_store_that_is_not_whole(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    with served_authority(tmp_path, identity()) as authority:
        authority.start()
        authority.wait_until_serving()
        with authority.connect() as frontend:
            frontend.sign(b"x")
        assert authority.stop() == 0
        damage(authority.state)
        status, said = end_of_start(authority)
        assert status == EXIT_CONFIG
        assert words in said
        assert "Traceback" not in said


@pytest.mark.case(61)
def test_broker_refuses_to_start_where_it_cannot_write(tmp_path: Path) -> None:
    assert os.getuid() == 0, "mounting a read-only file system needs root"
    with served_authority(tmp_path, identity()) as authority:
        authority.start()
        authority.wait_until_serving()
        assert authority.stop() == 0
        mount = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
        status, said = end_of_start(authority, "unshare", "--mount", "sh", "-c", mount, "sh", str(authority.state))
        assert status == EXIT_CONFIG
        assert "the authority's user must be able to write there" in said
        assert "Traceback" not in said


@pytest.mark.case(57)
def test_start_on_a_full_disk_ends_with_a_status_that_says_try_again(tmp_path: Path) -> None:
    assert os.getuid() == 0, "mounting a small file system needs root"
    with served_authority(tmp_path, identity()) as authority:
        authority.state.mkdir()
        mount = 'mount -t tmpfs -o size=16k tmpfs "$1" && shift && exec "$@"'
        status, said = end_of_start(authority, "unshare", "--mount", "sh", "-c", mount, "sh", str(authority.state))
        assert status == EXIT_STORE
        assert "Traceback" not in said
