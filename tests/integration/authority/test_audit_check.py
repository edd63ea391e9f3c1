"""`keybroker audit check` as an operator runs it: on a store at rest, on a damaged one, and beside a broker."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from tests.integration.authority.served import identity, served_authority
from tests.unit.authority.store.logs import OPEN, SIZE, tampering, whole
from tests.worlds import PROGRAM, clean_environment


def check(state: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAM), "audit", "check", "--state", str(state), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=clean_environment())


def test_whole_store_is_said_to_be_whole(tmp_path: Path) -> None:
    done = check(whole(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    facts = dict(line.split("\t") for line in done.stdout.splitlines())
    assert facts.pop("seconds")
    assert facts == {
        "records": str(SIZE),
        "workloads": "2",
        "open uses": f"{OPEN} (intent 13)",
        "database": "ok",
        "findings": "none",
    }


@pytest.mark.case(68)
def test_damage_is_named_with_the_first_bad_index_and_exit_status_one(tmp_path: Path) -> None:
    with tampering(whole(tmp_path)) as db:
        db.execute("DELETE FROM record WHERE idx IN (4, 5)")
    done = check(tmp_path)
    assert done.returncode == 1
    assert "record 4: missing-record 2 of them" in done.stderr
    assert done.stderr.splitlines()[-1] == "the first bad index is 4"
    done = check(tmp_path, "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, done.stderr, report["first_bad"]) == (1, "", 4)
    assert report["findings"][0] == {"index": 4, "rule": "missing-record", "detail": "2 of them"}
    assert report["found"] == len(report["findings"])


def test_json_says_what_the_text_says(tmp_path: Path) -> None:
    report = json.loads(check(whole(tmp_path), "--json").stdout)
    assert report.pop("seconds") >= 0
    assert report == {
        "records": SIZE,
        "workloads": 2,
        "open_uses": [{"use": OPEN, "intent": 13}],
        "database": "ok",
        "found": 0,
        "findings": [],
        "first_bad": None,
    }


def test_directory_without_a_store_is_an_error_in_one_line(tmp_path: Path) -> None:
    done = check(tmp_path / "nowhere")
    assert done.returncode == 1
    assert "authority.state" in done.stderr
    assert "Traceback" not in done.stderr


def test_store_is_checked_while_a_broker_serves_and_nothing_is_written(tmp_path: Path) -> None:
    with served_authority(tmp_path, identity()) as authority:
        authority.start()
        authority.wait_until_serving()
        with authority.connect() as frontend:
            frontend.sign(b"a", b"b", b"c")
            done = check(authority.state, "--json")
            report = json.loads(done.stdout)
            assert (done.returncode, report["database"], report["records"]) == (0, "not checked", 8)
            frontend.sign(b"d")
        assert authority.stop() == 0
        before = {path.name: path.read_bytes() for path in authority.state.iterdir()}
        report = json.loads(check(authority.state, "--json").stdout)
        assert (report["database"], report["records"]) == ("ok", 10)
        after = {path.name: path.read_bytes() for path in authority.state.iterdir()}
        assert {name: data for name, data in after.items() if name in before} == before
        authority.start()  # and it does not keep a broker from starting
        authority.wait_until_serving()


def test_bar_is_drawn_on_a_terminal_only(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [str(PROGRAM), "audit", "check", "--state", str(whole(tmp_path))]
    environment = clean_environment() | {"TERM": "xterm", "COLUMNS": "80"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=False, timeout=60, env=environment)
    os.close(theirs)
    drawn = os.read(ours, 65_536)
    os.close(ours)
    assert done.returncode == 0
    assert b"checking" in drawn
    assert b"checking" not in done.stdout


def test_copy_on_a_read_only_file_system_is_checked(tmp_path: Path) -> None:
    assert os.getuid() == 0, "mounting a read-only file system needs root"
    whole(tmp_path / "state")
    mount = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    mounted = ["unshare", "--mount", "sh", "-c", mount, "sh", str(tmp_path / "state")]
    command = [*mounted, str(PROGRAM), "audit", "check", "--state", str(tmp_path / "state"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=clean_environment())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["database"] == "ok"
