"""Another process holds the database: requests are refused in bounded time, everything else goes on, and so do requests afterwards."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from keybroker.authority.store import fsck
from keybroker.model.call import Health, HealthReply, Problem, Signed
from tests.brokers import read_leaves
from tests.integration.authority.served import Asked, identity, served_authority
from tests.worlds import until

_HOLDER = """\
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held(database: Path) -> Iterator[None]:
    """The database, locked by another process while the block runs."""
    command = [sys.executable, "-c", _HOLDER, str(database)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield
        holder.communicate(timeout=10)


@pytest.mark.case(62)
def test_requests_get_503_and_the_loop_goes_on_while_another_process_holds_the_database(tmp_path: Path) -> None:
    with served_authority(tmp_path, identity()) as authority:
        authority.start()
        authority.wait_until_serving()
        refused: list[Asked] = []
        with authority.connect() as signing, authority.connect() as watching:
            with held(authority.state / "keybroker.db"):
                asked = threading.Thread(target=lambda: refused.extend(signing.sign(b"a", b"b")))
                asked.start()
                health = watching.ask(Health())
                assert asked.is_alive()  # the commit still waits for the lock, and the event loop does not
                assert isinstance(health, HealthReply)
                asked.join(10)
                refused += signing.sign(b"c")
                health = watching.ask(Health())
                assert isinstance(health, HealthReply)
                assert not health.ready
                assert health.parts["record"] == "cannot be written"
            assert [each.reply.code for each in refused if isinstance(each.reply, Problem)] == ["overloaded"] * 3
            assert max(each.seconds for each in refused) < 8  # bounded; one wait for the lock is a second
            until(authority.is_serving)  # by itself: nobody asks for anything
            (answered,) = signing.sign(b"d")
        assert isinstance(answered.reply, Signed)
        assert authority.worker.asked == [answered.digest]
        assert authority.stop() == 0
        assert fsck.check(authority.state).findings == []
        assert any(b'"event":"record-not-writable"' in leaf and b"SQLITE_BUSY" in leaf for leaf in read_leaves(authority.state))
