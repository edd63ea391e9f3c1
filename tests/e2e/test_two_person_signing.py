"""docs/how-to/two-person-release-signing.md, pasted into a terminal; and the same with people who refuse, leave, or see another file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keybroker.audit import approval
from keybroker.audit.leaf import canonical
from keybroker.client import NothingToApproveError, Operation, PendingError, approving
from keybroker.errors import ApprovalConsumedError, ApprovalMismatchError, NotFoundError, RefusalError
from keybroker.identity.svid_file import SvidFile
from tests.approvals import spki_of
from tests.programs import environment
from tests.worlds import PROGRAM, World, served

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "two-person-release-signing.md"
DIGEST = bytes(range(32))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world of its own: this page looks at everything that waits."""
    with served(tmp_path_factory.mktemp("two-person") / "my-world") as made:
        yield made


def asked(world: World, reason: str = "") -> str:
    with world.client("ci-release") as broker, pytest.raises(PendingError) as caught:
        broker.sign("release", "ES256", digest=DIGEST, reason=reason)
    return caught.value.pending.operation


def approve(world: World, name: str, id_: str) -> Operation:
    with world.client(name) as broker:
        return broker.approve(broker.operation(id_))


def on_terminal(script: str, directory: Path, env: dict[str, str]) -> tuple[int, str]:
    """A script on a terminal, where somebody answers every question with yes."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(["bash", "-eu", "-c", script], stdin=follower, stdout=follower, stderr=follower, cwd=directory, env=env)
    os.close(follower)
    shown, answered = b"", 0
    started = time.monotonic()
    with contextlib.suppress(OSError):  # EIO when the script has ended
        while data := os.read(leader, 65_536):
            shown += data
            assert time.monotonic() - started < 250
            if shown.count(b"Type yes:") > answered:
                answered += 1
                os.write(leader, b"yes\n")
    os.close(leader)
    return process.wait(30), shown.decode(errors="replace")


@pytest.mark.timeout(300)  # a dozen programs, one after the other
def test_page_can_be_pasted(world: World) -> None:
    script = "\n".join(re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE))
    env = environment(world) | {"PATH": f"{PROGRAM.parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    status, shown = on_terminal(script, world.directory.parent, env)
    assert status == 0, shown
    assert "APPROVE" in shown
    assert shown.count("Type yes:") == 2
    assert "Verified OK: ES256 by release version 1" in shown
    records = [json.loads(line) for line in (world.directory.parent / "approvals.ndjson").read_text().splitlines()]
    assert [(each["body"]["verdict"], each["body"]["person"]) for each in records[-2:]] == [("approve", "alice"), ("approve", "bob")]
    for record, name in zip(records[-2:], ("alice", "bob"), strict=True):
        _, key = SvidFile.load_with_key(world.svid(name))
        (envelope,) = record["approvals"]
        statement = approval.verified(canonical(envelope), spki_of(key))
        assert (statement.person, statement.confirmed, statement.subject.reason) == (name, "file", "release 2.1")


def test_program_of_the_page_approves_what_it_knows(world: World) -> None:
    (world.directory.parent / "release.tar.gz").write_bytes(b"built here")
    with world.client("ci-release") as broker, pytest.raises(PendingError) as caught:
        broker.sign("release", "ES256", digest=hashlib.sha256(b"built here").digest())
    other = asked(world)
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=world.directory.parent, env=environment(world), capture_output=True, text=True, check=False
    )
    assert done.stdout == f"approved {caught.value.pending.operation}\n", done.stderr
    with world.client("carol") as broker:
        assert broker.operation(other).approvals == ()


def test_two_people_are_enough_and_the_signature_is_used_once(world: World) -> None:
    id_ = asked(world)
    assert approve(world, "alice", id_).state == "pending"
    assert approve(world, "bob", id_).state == "ready"
    with world.client("ci-release") as broker:
        assert broker.redeem(id_).key == "release"
        with pytest.raises(ApprovalConsumedError):
            broker.redeem(id_)


def test_one_person_is_not_enough(world: World) -> None:
    id_ = asked(world)
    approve(world, "alice", id_)
    with world.client("ci-release") as broker, pytest.raises(PendingError, match="1 more of release-managers"):
        broker.redeem(id_)
    with pytest.raises(NothingToApproveError, match="you have approved it"):
        approve(world, "alice", id_)


def test_one_refusal_ends_it(world: World) -> None:
    id_ = asked(world)
    approve(world, "alice", id_)
    with world.client("bob") as broker:
        assert broker.refuse(broker.operation(id_)).state == "refused"
    with world.client("ci-release") as broker, pytest.raises(RefusalError) as caught:
        broker.redeem(id_)
    assert not isinstance(caught.value, NotFoundError)


def test_approval_of_one_operation_is_none_of_another(world: World) -> None:
    first, second = asked(world, "one"), asked(world, "two")
    with world.client("alice") as broker:
        shown = broker.operation(first)
        (statement,) = broker.statements(shown, "approve", confirmed="prompt")
        envelope = approving.signed(statement, world.svid("alice"))
        with pytest.raises(ApprovalMismatchError):
            broker.give_approval(second, envelope)
        forged = approving.signed(statement, world.svid("alice")).replace(b"A", b"B", 1)
        with pytest.raises((ApprovalMismatchError, RefusalError)):
            broker.give_approval(first, forged)
        assert broker.operation(first).approvals == ()


def test_who_has_nothing_to_do_with_it_does_not_see_it(world: World) -> None:
    id_ = asked(world)
    with world.client("payments-api") as broker:
        with pytest.raises(NotFoundError):
            broker.operation(id_)
        assert broker.operations().operations == ()


def test_program_waits_for_the_signature(world: World, tmp_path: Path) -> None:
    file, out = tmp_path / "release.tar", tmp_path / "release.sig"
    file.write_bytes(b"release 2.2")
    words = [str(PROGRAM), "sign", "--key", "release", "--alg", "ES256", "--digest", "--wait", "--out", str(out), str(file)]
    process = subprocess.Popen(words, env=environment(world, "ci-release"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    waiting = process.stderr.readline()
    id_ = re.findall(r"operation ([0-9A-Z]{26})", waiting)[0]
    for name in ("carol", "bob"):
        approve(world, name, id_)
    assert process.wait(60) == 0
    process.communicate()
    verified = world.run("verify", "--key", "release", "--alg", "ES256", "--signature", str(out), str(file), name="ci-release")
    assert verified.returncode == 0
