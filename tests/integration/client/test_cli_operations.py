"""`keybroker operations` and `keybroker sign --wait`, against a broker that a test plays: what is shown, asked, signed and said."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from keybroker.audit import approval
from keybroker.cli import main, redeeming
from keybroker.client import GivenApproval, Needs, Operation, Pending, Stage
from keybroker.clock import to_rfc3339
from keybroker.model.approval import Statement, SubjectDigest, SubjectOperation
from tests.approvals import OPERATION, operation, spki_of, subject
from tests.integration.client.servers import SIGNED, WORKLOAD, Connection, Place, Server, every, shape
from tests.worlds import PROGRAM, clean_environment

ID = OPERATION.id
FILE = b"release 2.1.0\n"


def moment(seconds: float) -> str:
    return to_rfc3339(time.time_ns() // 1_000 + int(seconds * 1_000_000))


def open_operation(**changes: Any) -> Operation:
    """One that waits for us, until in an hour, and would sign FILE."""
    about = {"tbs": SubjectDigest("sha256", hashlib.sha256(FILE).hexdigest()), "expires": moment(3_600)} | changes.pop("subject", {})
    return operation(subject=subject(**about), **changes)


@dataclass
class Broker:
    """Shows one operation, takes approvals and redemptions.

    Attributes:
        shown: the operation, as it stands.
        lists: what a list shows, one after another; the last goes on.
        redeems: answers to redemptions and signatures: a 202 for a Pending.
        given: envelopes that were handed in.
        spki: the approver's public key.
    """

    place: Place
    shown: Operation = field(default_factory=open_operation)
    lists: list[list[Operation]] = field(default_factory=list)
    redeems: list[Pending | dict[str, Any]] = field(default_factory=list)
    given: list[bytes] = field(default_factory=list)
    spki: bytes = b""
    requests: list[str] = field(default_factory=list)

    def answer(self, connection: Connection, request: bytes) -> None:
        head, _, body = request.partition(b"\r\n\r\n")
        line = head.split(b"\r\n")[0].decode().removesuffix(" HTTP/1.1")
        self.requests.append(line)
        if line.startswith("POST") and line.endswith("/approvals"):
            self.given.append(body)
            connection.answer(msgspec.json.encode(self.shown))
        elif line.startswith("POST"):
            answer = self.redeems.pop(0)
            is_pending = isinstance(answer, Pending)
            connection.answer(msgspec.json.encode(answer), "202 Accepted" if is_pending else "200 OK")
        elif line.startswith("GET /v1/operations?"):
            page = self.lists.pop(0) if self.lists else []
            if not self.lists and "mark=" in line:
                connection.server.stop.wait(0.05)
            connection.answer(msgspec.json.encode({"operations": page, "mark": str(len(self.requests))}))
        else:
            connection.answer(msgspec.json.encode(self.shown))

    @property
    def statements(self) -> list[Statement]:
        return [approval.verified(each, self.spki) for each in self.given]


@dataclass
class Played:
    """The program's end."""

    broker: Broker
    environment: dict[str, str]

    def run(self, *words: str) -> tuple[int, str, str]:
        """Status and streams, without a terminal: in this process, which is faster."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(redeeming, "_PAUSE_S", 0.01)
            patch.setattr(sys, "argv", ["keybroker", *words])
            patch.setattr(sys, "stdin", io.StringIO())
            for name in ("KEYBROKER_URL", "KEYBROKER_SVID", "KEYBROKER_BUNDLE"):
                patch.setenv(name, self.environment[name])
            with pytest.raises(SystemExit) as ended:
                sys.exit(main())
        return int(str(ended.value.code or 0)), out.getvalue(), err.getvalue()

    def run_on_terminal(self, typed: str, *words: str) -> tuple[int, str]:
        """Status and what a terminal of 100 columns shows, when somebody types a line once he is asked."""
        leader, follower = pty.openpty()
        process = subprocess.Popen(
            [str(PROGRAM), *words], stdin=follower, stdout=follower, stderr=follower, env=self.environment | {"COLUMNS": "100"}
        )
        os.close(follower)
        shown = b""
        with contextlib.suppress(OSError):  # EIO when the program has gone
            while data := os.read(leader, 65_536):
                shown += data
                if typed and b"Type yes:" in shown:
                    os.write(leader, typed.encode() + b"\n")
                    typed = ""
        os.close(leader)
        return process.wait(30), shown.decode().replace("\r\n", "\n")


@pytest.fixture
def played(place: Place) -> Iterator[Played]:
    issued = place.authority.issue(shape(WORKLOAD))
    place.write_svid(issued)
    broker = Broker(place, spki=spki_of(issued.key))  # type: ignore[arg-type]  # a P-256 key
    with Server(place.server_context(), every(broker.answer)) as server:
        own = {"KEYBROKER_URL": server.url, "KEYBROKER_SVID": str(place.svid), "KEYBROKER_BUNDLE": str(place.bundle)}
        yield Played(broker, clean_environment() | own)


def facts(text: str) -> dict[str, str]:
    return dict(line.split("\t", 1) for line in text.splitlines() if "\t" in line)


def test_show_prints_what_an_approval_signs_and_how_it_stands(played: Played) -> None:
    given = GivenApproval("approve", "release-signing/1", "bob\u202e", "spiffe://example.org/human/bob", moment(-60), 813, counts=True)
    stage = Stage("release-signing/1", 2, ("release-managers",), ("bob\u202e",), is_open=True)
    played.broker.shown = open_operation(subject={"reason": "ok\u202e\x1b[2J"}, approvals=(given,), stages=(stage,))
    status, out, err = played.run("operations", "show", ID)
    assert (status, err) == (0, "")
    shown = facts(out)
    about = played.broker.shown.subject
    assert shown["verdict"] == "APPROVE"
    assert shown["digest"] == f"sha256 {about.tbs.value}"
    assert shown["reason"] == r'"ok\u202e\x1b[2J"'
    assert (shown["approver"], shown["person"], shown["stage"]) == (WORKLOAD, '"alice"', "release-signing/1")
    assert (shown["state"], shown["record"]) == ("pending", "812")
    assert shown["needs"] == r'release-signing/1: 1 of 2 of release-managers: "bob\u202e"'
    assert "approve of release-signing/1 by spiffe://example.org/human/bob" in shown["given"]
    assert "\u202e" not in out
    assert "\x1b" not in out


def test_show_says_that_nothing_waits_for_us_where_that_is_so(played: Played) -> None:
    played.broker.shown = open_operation(yours=(), state="redeemed", use="01JDGQ4F8M3Z6T9W2X5Y7ABCDF")
    status, out, _ = played.run("operations", "show", ID)
    assert status == 0
    assert "does not wait for you: it is redeemed" in out
    assert "verdict" not in facts(out)
    assert facts(out)["use"] == "01JDGQ4F8M3Z6T9W2X5Y7ABCDF"


def test_json_of_an_operation_is_the_brokers_answer(played: Played) -> None:
    status, out, _ = played.run("operations", "show", "--json", ID)
    assert status == 0
    assert msgspec.json.decode(out, type=Operation) == played.broker.shown


def test_approve_shows_asks_and_signs_what_it_showed(played: Played) -> None:
    status, shown = played.run_on_terminal("yes", "operations", "approve", ID)
    assert status == 0, shown
    (statement,) = played.broker.statements
    assert (statement.verdict, statement.confirmed, statement.subject) == ("approve", "prompt", played.broker.shown.subject)
    before, _, after = shown.partition("Sign this and approve? Type yes:")
    assert "APPROVE" in before
    assert statement.subject.tbs.value in before
    assert "state" in after


def test_nothing_is_signed_unless_somebody_says_yes(played: Played) -> None:
    status, shown = played.run_on_terminal("y", "operations", "approve", ID)
    assert status == 1
    assert "nothing was signed" in shown
    assert played.broker.given == []


def test_nothing_is_signed_where_nobody_can_be_asked(played: Played) -> None:
    status, out, err = played.run("operations", "approve", ID)
    assert status == 2
    assert "--yes signs without asking" in err
    assert "APPROVE" in out
    assert played.broker.given == []


def test_yes_flag_signs_and_says_so_in_the_statement(played: Played) -> None:
    status, out, _ = played.run("operations", "approve", "--yes", ID)
    assert status == 0
    assert facts(out)["confirmed"] == "yes-flag: by a flag or a program: nobody is asked"
    assert [each.confirmed for each in played.broker.statements] == ["yes-flag"]


def test_file_that_would_be_signed_is_said_to_have_been_checked(played: Played, tmp_path: Path) -> None:
    file = tmp_path / "release.tar"
    file.write_bytes(FILE)
    status, shown = played.run_on_terminal("yes", "operations", "approve", "--file", str(file), ID)
    assert status == 0, shown
    assert [each.confirmed for each in played.broker.statements] == ["file"]


@pytest.mark.parametrize("flags", [("--yes",), ()])
def test_another_file_is_not_approved(played: Played, tmp_path: Path, flags: tuple[str, ...]) -> None:
    file = tmp_path / "release.tar"
    file.write_bytes(FILE + b" ")
    status, out, err = played.run("operations", "approve", *flags, "--file", str(file), ID)
    assert (status, out) == (1, "")
    assert "is not what would be signed" in err
    assert played.broker.given == []


def test_file_that_cannot_be_read_is_not_approved(played: Played, tmp_path: Path) -> None:
    status, _, err = played.run("operations", "approve", "--yes", "--file", str(tmp_path / "none"), ID)
    assert status == 2
    assert "No such file" in err
    assert played.broker.given == []


def test_every_stage_that_waits_is_approved_and_shown(played: Played) -> None:
    played.broker.shown = open_operation(yours=("a/1", "b/1"))
    status, out, _ = played.run("operations", "approve", "--yes", ID)
    assert status == 0
    assert facts(out)["stage"] == "a/1, b/1"
    assert [each.stage for each in played.broker.statements] == ["a/1", "b/1"]
    assert played.run("operations", "approve", "--yes", "--stage", "b/1", ID)[0] == 0
    assert [each.stage for each in played.broker.statements[2:]] == ["b/1"]


def test_deny_signs_one_refusal(played: Played) -> None:
    played.broker.shown = open_operation(yours=("a/1", "b/1"))
    status, out, _ = played.run("operations", "deny", "--yes", "--json", ID)
    assert status == 0
    assert json.loads(out)["id"] == ID
    assert [each.verdict for each in played.broker.statements] == ["refuse"]


def test_what_does_not_wait_for_us_is_denied(played: Played) -> None:
    played.broker.shown = open_operation(yours=())
    for words in (("approve", "--yes"), ("deny", "--yes")):
        status, out, err = played.run("operations", *words, ID)
        assert (status, out) == (3, "")
        assert "does not wait for you" in err


def test_list_shows_one_operation_a_line(played: Played) -> None:
    played.broker.lists = [[open_operation()]]
    status, out, _ = played.run("operations", "list", "--state", "pending")
    assert status == 0
    cells = out.rstrip("\n").split("\t")
    assert cells[:7] == [ID, "pending", "sign-digest", "spiffe://example.org/ci/release", "release", "0/2", "release-signing/1"]
    assert played.broker.requests == ["GET /v1/operations?limit=100&state=pending"]


def test_watch_shows_what_is_new_and_what_changes(played: Played) -> None:
    later = open_operation(id="01JDGQ4F8M3Z6T9W2X5Y7ZZZZZ", subject={"operation": SubjectOperation("01JDGQ4F8M3Z6T9W2X5Y7ZZZZZ", "sign")})
    first = played.broker.shown
    done = msgspec.structs.replace(first, state="ready")
    played.broker.lists = [[first], [first], [later, first], [later, done]] + [[later, done]] * 5_000
    process = subprocess.Popen(
        [str(PROGRAM), "operations", "list", "--watch", "--json"], env=played.environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        seen = [json.loads(process.stdout.readline()) for _ in range(3)]
    finally:
        process.kill()
        process.communicate(timeout=30)
    assert [(each["id"], each["state"]) for each in seen] == [(ID, "pending"), (later.id, "pending"), (ID, "ready")]
    assert "wait=30" not in played.broker.requests[0]
    assert all("wait=30" in request for request in played.broker.requests[1:])


NEEDS = Needs(OPERATION.stages)


def test_sign_that_waits_for_approvals_ends_with_status_4(played: Played, tmp_path: Path) -> None:
    file, out_file = tmp_path / "file", tmp_path / "sig"
    file.write_bytes(FILE)
    words = ("sign", "--key", "release", "--alg", "ES256", "--out", str(out_file), str(file))
    played.broker.redeems = [Pending(ID, NEEDS, moment(3_600))] * 2
    status, out, err = played.run(*words)
    assert (status, out) == (4, "")
    assert err.startswith(f"pending: operation {ID} is pending: it needs 2 more of release-managers")
    assert "keybroker operations redeem" in err
    status, out, _ = played.run(*words, "--json")
    assert status == 4
    assert json.loads(out)["operation"] == ID
    assert not out_file.exists()


def test_sign_that_waits_redeems_what_was_approved(played: Played, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(FILE)
    played.broker.shown = open_operation(state="ready")
    cooling = Pending(ID, Needs(OPERATION.stages, moment(0.2)), moment(3_600))
    played.broker.redeems = [Pending(ID, NEEDS, moment(3_600)), cooling, SIGNED]
    status, out, _ = played.run("sign", "--key", "release", "--alg", "ES256", "--wait", str(file))
    assert (status, out) == (0, "c2ln\n")
    assert [each for each in played.broker.requests if each.startswith("POST")] == [
        "POST /v1/keys/release/sign",
        f"POST /v1/operations/{ID}/redeem",
        f"POST /v1/operations/{ID}/redeem",
    ]


def test_redeem_writes_the_signature_whole(played: Played, tmp_path: Path) -> None:
    played.broker.redeems = [SIGNED]
    out = tmp_path / "sig"
    status, text, _ = played.run("operations", "redeem", "--out", str(out), ID)
    assert status == 0
    assert out.read_bytes() == b"sig"
    assert "on record: use 01J" in text


def test_redeem_without_enough_approvals_ends_with_status_4(played: Played, tmp_path: Path) -> None:
    played.broker.redeems = [Pending(ID, NEEDS, moment(3_600))]
    status, out, err = played.run("operations", "redeem", "--out", str(tmp_path / "sig"), ID)
    assert (status, out) == (4, "")
    assert "2 more of release-managers" in err
    assert list(tmp_path.glob("*sig*")) == []


def test_redeem_of_a_message_takes_it_again_and_no_other(played: Played, tmp_path: Path) -> None:
    digest = SubjectDigest("sha512", hashlib.sha512(FILE).hexdigest())
    played.broker.shown = open_operation(subject={"algorithm": "Ed25519", "tbs": digest})
    file = tmp_path / "file"
    file.write_bytes(FILE)
    played.broker.redeems = [SIGNED]
    status, _, err = played.run("operations", "redeem", ID)
    assert status == 2
    assert "give the message again with --file" in err
    assert played.run("operations", "redeem", "--file", str(file), ID)[0] == 0
    file.write_bytes(b"another")
    status, _, err = played.run("operations", "redeem", "--file", str(file), ID)
    assert status == 2
    assert "is not what was approved" in err
    assert len([each for each in played.broker.requests if each.startswith("POST")]) == 1
