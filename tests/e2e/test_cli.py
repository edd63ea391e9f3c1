"""The program as a user runs it: what each command prints, and its exit status. Never a traceback."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest

from keybroker.model.key import Algorithm
from tests.programs import environment, lines, loaded, refused, run
from tests.worlds import PROGRAM, World, clean_environment

SIGN = ("sign", "--key", "orders", "--alg", "ES256")
OUTAGE = "https://127.0.0.1:9"  # the discard port: nobody is there


@pytest.fixture
def order(tmp_path: Path) -> Path:
    path = tmp_path / "order.json"
    path.write_bytes(b'{"order": 4711}\n')
    return path


def test_signature_is_printed_in_base64_alone(world: World, order: Path, tmp_path: Path) -> None:
    (line,) = lines(world.run(*SIGN, str(order)))
    (tmp_path / "sig").write_bytes(base64.b64decode(line, validate=True))
    (tmp_path / "base64").write_text(line + "\n")
    for name in ("sig", "base64"):
        verified = world.run("verify", "--key", "orders", "--alg", "ES256", "--signature", str(tmp_path / name), str(order))
        assert lines(verified) == ["Verified OK: ES256 by orders version 1"]


def test_signature_of_standard_input_is_one_of_the_same_bytes(world: World, tmp_path: Path, order: Path) -> None:
    (line,) = lines(world.run(*SIGN, "-", stdin=order.read_bytes()))
    (tmp_path / "sig").write_text(line)
    verify = ("verify", "--key", "orders", "--alg", "ES256", "--signature", str(tmp_path / "sig"), "--json")
    expected = {"verified": True, "key": "orders", "version": 1, "algorithm": "ES256"}
    assert loaded(world.run(*verify, str(order))) == expected
    assert loaded(world.run(*verify, "-", stdin=order.read_bytes())) == expected
    bad = world.run(*verify, "-", stdin=b"another")
    assert bad.returncode == 1
    assert json.loads(bad.stdout) == {"verified": False, "key": "orders", "algorithm": "ES256"}
    assert b"not a signature of this file" in bad.stderr


def test_json_of_a_signature_is_the_brokers_answer(world: World, order: Path) -> None:
    answer = loaded(world.run(*SIGN, "--json", str(order)))
    assert set(answer) == {"signature", "key", "version", "algorithm", "use", "records"}
    assert set(answer["records"]) == {"log", "intent", "outcome"}
    base64.b64decode(answer["signature"], validate=True)


def test_written_signature_is_whole_and_said_where(world: World, order: Path, tmp_path: Path) -> None:
    out = tmp_path / "order.sig"
    out.write_bytes(b"old" * 1_000)
    said = lines(world.run(*SIGN, "--out", str(out), str(order)))
    assert said[0] == f"{out}: ES256 by orders version 1"
    assert re.fullmatch(r"on record: use [0-9A-Z]{26}, records \d+ and \d+ of example\.org/broker-1", said[1])
    assert out.read_bytes()[:1] == b"\x30"
    assert {path.name for path in tmp_path.iterdir()} == {"order.sig", "order.json"}


def test_digest_is_made_here_of_a_file_of_any_size(world: World, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(1_000_000))
    text = refused(world.run(*SIGN, str(big)), 2)
    assert "cure: a message is at most 256 KiB: use --digest" in text
    done = world.run(*SIGN, "--digest", "--format", "p1363", "--out", str(tmp_path / "sig"), str(big))
    assert lines(done)
    assert (tmp_path / "sig").stat().st_size == 64
    verify = ("verify", "--key", "orders", "--alg", "ES256", "--signature", str(tmp_path / "sig"))
    assert lines(world.run(*verify, "--format", "p1363", str(big)))
    assert refused(world.run(*verify, str(big)), 1)


def test_explanation_uses_no_key(world: World, order: Path) -> None:
    before = len(world.leaves())
    facts = dict(line.split("\t") for line in lines(world.run(*SIGN, "--explain", str(order))))
    assert facts["decision"] == "allowed"
    assert "payments" in facts["grants"]
    explained = loaded(world.run(*SIGN, "--explain", "--json", str(order)))
    assert explained["allow"] is True
    denied = world.run("sign", "--key", "orders", "--alg", "ES384", "--explain", "--json", str(order))
    assert denied.returncode == 3
    assert json.loads(denied.stdout)["allow"] is False
    assert not any(b'"kind":"intent"' in leaf for leaf in world.leaves()[before:])


def test_whoami_says_what_the_broker_sees(world: World) -> None:
    facts = dict(line.split("\t") for line in lines(world.run("whoami")))
    assert facts["SPIFFE ID"] == "spiffe://example.org/payments/api"
    assert facts["roles"] == "workload"
    seen = loaded(world.run("whoami", "--json", name="auditor"))
    assert (seen["spiffe_id"], seen["roles"], seen["address"]) == ("spiffe://example.org/human/auditor", ["auditor"], "127.0.0.1")


def test_keys_are_listed_shown_and_exported(world: World) -> None:
    rows = [line.split("\t") for line in lines(world.run("keys", "list"))]
    assert ["orders", "1", "ec-p256", "ES256", "owner=payments"] in rows
    assert {key["name"] for key in loaded(world.run("keys", "list", "--json"))} >= {"orders", "invoices", "sessions"}
    shown = loaded(world.run("keys", "show", "invoices", "--json"))
    spki = base64.b64decode(shown["versions"][0]["spki"])
    assert shown["versions"][0]["spki_sha256"] == hashlib.sha256(spki).hexdigest()
    assert any(shown["versions"][0]["spki_sha256"] in line for line in lines(world.run("keys", "show", "invoices")))
    pem = lines(world.run("keys", "public", "invoices"))
    assert pem[0] == "-----BEGIN PUBLIC KEY-----"
    assert base64.b64decode("".join(pem[1:-1])) == spki
    assert loaded(world.run("keys", "public", "sessions", "--format", "jwk"))["crv"] == "Ed25519"
    assert lines(world.run("keys", "public", "orders", "--format", "openssh"))[0].startswith("ecdsa-sha2-nistp256 ")
    assert loaded(world.run("keys", "public", "invoices", "--json"))["public_key"] == "\n".join(pem)
    assert lines(world.run("keys", "public", "orders", "--version", "1"))
    assert "cure" in refused(world.run("keys", "public", "orders", "--version", "2"), 3)


def test_caller_without_keys_is_shown_none(world: World) -> None:
    assert lines(world.run("keys", "list", name="carol")) == []
    assert loaded(world.run("keys", "list", "--json", name="carol")) == []


def test_record_is_queried_and_shown(world: World, order: Path) -> None:
    places = loaded(world.run(*SIGN, "--json", "--reason", "for the record", str(order)))
    use = places["use"]
    by_use = lines(world.run("audit", "query", "--use", use, name="auditor"))
    assert [line.split("\t")[2:6] for line in by_use] == [
        ["intent", "spiffe://example.org/payments/api", "orders", "sign ES256"],
        ["outcome", "spiffe://example.org/payments/api", "orders", "signed"],
    ]
    as_stored = [json.loads(line) for line in lines(world.run("audit", "query", "--use", use, "--json", name="auditor"))]
    assert [record["index"] for record in as_stored] == [places["records"]["intent"], places["records"]["outcome"]]
    index = str(places["records"]["intent"])
    shown = world.run("audit", "show", index, "--json", name="auditor")
    assert loaded(shown) == as_stored[0]
    assert shown.stdout.rstrip(b"\n") in world.leaves()
    assert json.loads("\n".join(lines(world.run("audit", "show", index, name="auditor")))) == as_stored[0]
    assert as_stored[0]["request"]["reason"] == "for the record"


def test_query_filters_and_stops_at_its_limit(world: World, order: Path) -> None:
    for _ in range(3):
        lines(world.run(*SIGN, str(order)))
    limited = world.run("audit", "query", "--kind", "outcome", "--outcome", "signed", "--since", "1h", "--limit", "2", name="auditor")
    assert len(lines(limited)) == 2
    assert b"there are more than 2: --all" in limited.stderr
    everything = world.run("audit", "query", "--kind", "outcome", "--since", "1h", "--all", name="auditor")
    assert len(lines(everything)) > 2
    assert everything.stderr == b""
    assert lines(world.run("audit", "query", "--until", "2020-01-01T00:00:00Z", name="auditor")) == []
    own = lines(world.run("audit", "query", "--all"))
    assert {line.split("\t")[3] for line in own} == {"spiffe://example.org/payments/api"}


def test_denied_is_3_with_reasons_and_cure(world: World, order: Path) -> None:
    text = refused(world.run("sign", "--key", "orders", "--alg", "ES384", str(order)), 3)
    assert text.startswith("error: ")
    assert "  reasons: " in text
    assert "`keybroker sign --explain`" in text
    assert re.search(r"^  request: [0-9A-Z]{26}$", text, re.MULTILINE)
    stranger = refused(world.run(*SIGN, str(order), name="ci-release"), 3)
    assert "keybroker keys list" in stranger
    assert refused(world.run("keys", "show", "release"), 3)
    assert refused(world.run("audit", "query", "--workload", "spiffe://example.org/human/alice"), 3)
    assert refused(world.run("audit", "show", "0"), 3)
    assert refused(world.run("audit", "show", "9007199254740991", name="auditor"), 3)


WRONG_USAGE = {
    "no command": ([], "Usage"),
    "unknown command": (["sing"], "No such command"),
    "no file": (["sign", "--key", "orders", "--alg", "ES256"], "FILE"),
    "no algorithm": (["sign", "--key", "orders", "-"], "--alg"),
    "unknown algorithm": (["sign", "--key", "orders", "--alg", "HS256", "-"], "ES256"),
    "file is missing": ([*SIGN, "/nowhere/at/all"], "/nowhere/at/all: No such file or directory; name a file"),
    "file is a directory": ([*SIGN, "/"], "Is a directory; name a file"),
    "signature is missing": (["verify", "--key", "k", "--alg", "ES256", "--signature", "/nowhere", "-"], "does not exist"),
    "key is no name": (["keys", "show", "../whoami"], "is not a key name"),
    "digest of Ed25519": (["sign", "--key", "sessions", "--alg", "Ed25519", "--digest", "-"], "signs whole messages"),
    "format of RSA": (["sign", "--key", "invoices", "--alg", "PS256", "--format", "der", "-"], "/format: only ECDSA"),
    "idempotency key": ([*SIGN, "--idempotency-key", "two words", "-"], "idempotency key"),
    "time": (["audit", "query", "--since", "yesterday"], "write 2h for two hours ago"),
    "kind": (["audit", "query", "--kind", "secrets"], "intent"),
    "limit": (["audit", "query", "--limit", "0"], "--limit"),
    "index": (["audit", "show", "x"], "INDEX"),
    "url": (["whoami", "--url", "http://127.0.0.1:1"], "must be https://HOST:PORT"),
    "broker id": (["whoami", "--broker-id", "example.org"], "is not a SPIFFE ID"),
}


@pytest.mark.parametrize("what", WRONG_USAGE)
def test_wrong_usage_is_2_and_says_what_to_write(world: World, what: str) -> None:
    words, told = WRONG_USAGE[what]
    done = run(*words, env=environment(world, COLUMNS="200"), input=b"")
    assert done.returncode == 2, done.stderr
    assert b"Traceback" not in done.stderr
    assert told in (done.stderr + done.stdout).decode()


@pytest.mark.parametrize(("missing", "flag"), [("KEYBROKER_URL", "--url"), ("KEYBROKER_SVID", "--svid"), ("KEYBROKER_BUNDLE", "--bundle")])
def test_missing_setting_is_2_and_names_flag_and_variable(world: World, missing: str, flag: str, tmp_path: Path) -> None:
    env = environment(world, HOME=str(tmp_path))
    del env[missing]
    text = refused(run("whoami", env=env), 2)
    assert flag in text
    assert missing in text


@pytest.mark.parametrize("content", [None, b"", b"not PEM", "bundle"])
def test_svid_that_cannot_be_used_is_1_and_says_where_to_look(world: World, tmp_path: Path, content: bytes | str | None) -> None:
    svid = tmp_path / "svid.pem"
    if content is not None:
        svid.write_bytes((world.directory / "bundle.pem").read_bytes() if isinstance(content, str) else content)
    text = refused(run("whoami", env=environment(world, KEYBROKER_SVID=str(svid))), 1)
    assert "svid.pem" in text
    assert "cure: check --svid (KEYBROKER_SVID)" in text


def test_svid_that_is_a_directory_is_1(world: World, tmp_path: Path) -> None:
    assert "directory" in refused(run("whoami", env=environment(world, KEYBROKER_SVID=str(tmp_path))), 1)


def test_another_broker_than_expected_is_1_and_nothing_is_sent(world: World) -> None:
    text = refused(world.run("whoami", "--broker-id", "spiffe://example.org/another"), 1)
    assert "is spiffe://example.org/keybroker, not spiffe://example.org/another" in text
    assert "nothing was sent" in text


@pytest.mark.parametrize("words", [("whoami",), ("keys", "list"), (*SIGN, "-"), ("audit", "tail"), ("audit", "query")])
def test_unreachable_broker_is_5(world: World, words: tuple[str, ...]) -> None:
    text = refused(run(*words, "--url", OUTAGE, env=environment(world), input=b""), 5)
    assert "cure: is the broker running? check --url (KEYBROKER_URL)" in text


def on_a_terminal(world: World, *words: str, name: str = "payments-api") -> str:
    """What a person sees."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [str(PROGRAM), *words], stdout=theirs, stderr=theirs, env=environment(world, name, COLUMNS="200", TERM="dumb")
    ) as process:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # Linux says EIO when the other end is closed
            while data := os.read(ours, 65_536):
                seen += data
        assert process.wait(20) == 0, seen
    os.close(ours)
    return seen.decode()


def test_people_get_tables_with_headers(world: World, order: Path) -> None:
    lines(world.run(*SIGN, str(order)))
    assert re.search(r"^KEY +VERSION +FAMILY", on_a_terminal(world, "keys", "list"), re.MULTILINE)
    assert re.search(r"^INDEX +TIME +KIND", on_a_terminal(world, "audit", "tail", name="auditor"), re.MULTILINE)
    assert re.search(r"^SPIFFE ID +spiffe://", on_a_terminal(world, "whoami"), re.MULTILINE)
    assert '{\r\n  "spiffe_id"' in on_a_terminal(world, "whoami", "--json")
    assert "VERSION" in on_a_terminal(world, "keys", "show", "orders")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown_and_installed(tmp_path: Path, shell: str) -> None:
    env = clean_environment() | {"HOME": str(tmp_path), "SHELL": f"/bin/{shell}"}
    assert b"_KEYBROKER_COMPLETE=complete_" in run("--show-completion", shell, env=env).stdout
    done = run("--install-completion", env=env)
    assert done.returncode == 0, done.stderr
    assert any("keybroker" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("si", {"sign"}),
        ("audit ", {"tail", "query", "show"}),
        ("sign --al", {"--alg"}),
        ("sign --alg ", {each.value for each in Algorithm}),
        ("sign --format ", {"der", "p1363"}),
        ("audit query --kind de", {"denial"}),
        ("keys public --format ", {"pem", "jwk", "openssh"}),
    ],
)
def test_completion_offers_commands_options_and_values(typed: str, offered: set[str]) -> None:
    words = f"keybroker {typed}"
    position = len(words.split(" ")) - 1
    env = clean_environment() | {"_KEYBROKER_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    assert offered <= set(run(env=env).stdout.decode().split())


def test_version_is_told(world: World) -> None:
    assert re.fullmatch(r"keybroker \d+\.\d+\S*", lines(world.run("--version"))[0])


@pytest.mark.parametrize("words", ["", "sign", "keys", "audit tail", "dev init"])
def test_help_is_help_everywhere(words: str) -> None:
    done = run(*words.split(), "--help", env=clean_environment())
    assert done.returncode == 0
    assert b"Usage: keybroker" in done.stdout
    assert done.stderr == b""
