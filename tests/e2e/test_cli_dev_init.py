"""`keybroker dev init`: what it makes, what it refuses, and that it leaves nothing behind when it fails."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keybroker import config
from tests.worlds import PROGRAM, World, clean_environment, make_world, served

FILES = {
    "keybroker.yaml": 0o644, "ca.pem": 0o644, "ca-key.pem": 0o600, "bundle.pem": 0o644, "pin": 0o600, "softhsm2.conf": 0o600,
    "grants/development.yaml": 0o644, "grants/release.yaml": 0o644, "log.vkey": 0o644, "denied.yaml": 0o644,
}  # fmt: skip
IDENTITIES = {
    "payments-api": "payments/api", "ci-release": "ci/release", "alice": "human/alice", "bob": "human/bob", "carol": "human/carol",
    "auditor": "human/auditor", "admin": "human/admin", "broker": "keybroker",
}  # fmt: skip
SPY = """
import os, sys

def spy(event, arguments):
    if event in {"subprocess.Popen", "os.exec", "os.posix_spawn"}:
        _, argv, _, environment = (*arguments, None, None)[:4] if event == "subprocess.Popen" else (None, arguments[1], None, arguments[2])
        with open(os.environ["SPY_FILE"], "a") as file:
            file.write(repr((argv, environment)) + "\\n")

sys.addaudithook(spy)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world that nobody serves or changes."""
    return make_world(
        tmp_path_factory.mktemp("made") / "my world", "--workload", "spiffe://example.org/shop/checkout", "--key", "null:ES512"
    )


def init(*words: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAM), "dev", "init", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=cwd, env=clean_environment() | more)


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def test_files_have_their_modes_and_private_ones_are_private(made: World) -> None:
    expected = FILES | {f"svids/{name}.pem": 0o600 for name in (*IDENTITIES, "checkout")}
    found = {name: stat.S_IMODE((made.directory / name).stat().st_mode) for name in expected}
    assert found == expected
    for name in ("", "svids", "grants", "state", "run", "anchor", "token"):
        assert stat.S_IMODE((made.directory / name).stat().st_mode) == 0o700, name
    top = {path.name for path in made.directory.iterdir()}
    assert top == {"svids", "grants", "state", "run", "anchor", "token", *(name for name in FILES if "/" not in name)}


def test_identities_are_those_of_the_contract_for_openssl_too(made: World) -> None:
    for name, path in (IDENTITIES | {"checkout": "shop/checkout"}).items():
        svid = made.svid(name)
        verify = ["openssl", "verify", "-CAfile", str(made.directory / "bundle.pem"), str(svid)]
        assert subprocess.run(verify, capture_output=True, check=False).returncode == 0
        text = subprocess.run(["openssl", "x509", "-in", str(svid), "-noout", "-text"], capture_output=True, text=True, check=True).stdout
        assert f"URI:spiffe://example.org/{path}" in text
        assert ("DNS:localhost, IP Address:127.0.0.1" in text) is (name == "broker")
        same_key = ["openssl", "pkey", "-in", str(svid), "-pubout"]
        public = subprocess.run(same_key, capture_output=True, text=True, check=True).stdout
        shown = subprocess.run(["openssl", "x509", "-in", str(svid), "-noout", "-pubkey"], capture_output=True, text=True, check=True)
        assert shown.stdout == public


def test_configuration_is_relative_and_its_ports_are_free(made: World) -> None:
    loaded = config.load(made.config_file)
    assert loaded.frontend is not None
    assert loaded.authority is not None
    assert set(loaded.authority.keys) == {"orders", "release", "invoices", "sessions", "null"}
    assert str(made.directory) not in made.config_file.read_text()
    ports = {config.host_and_port(listen)[1] for listen in (loaded.frontend.listen, loaded.frontend.operations)}
    assert len(ports) == 2
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_development_grants_leave_quorums_off(made: World) -> None:
    assert made.run("check", "--config", str(made.config_file)).returncode == 0
    assert "quorum" not in (made.directory / "grants" / "development.yaml").read_text()
    assert "quorum" in (made.directory / "grants" / "release.yaml").read_text()


def test_what_it_says_can_be_copied_and_pasted(tmp_path: Path) -> None:
    done = init("a world; $HOME 'here'", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    (serve,) = [line for line in said if line.strip().startswith("keybroker serve")]
    assert Path(shlex.split(serve)[3]) == tmp_path / "a world; $HOME 'here'" / "keybroker.yaml"
    (export,) = [line for line in said if line.strip().startswith("export")]
    pasted = subprocess.run(["sh", "-c", f'{export}\nprintf "%s" "$KEYBROKER_SVID"'], capture_output=True, text=True, check=True)
    assert Path(pasted.stdout).is_file()


def test_json_says_where_it_is(tmp_path: Path) -> None:
    done = init("world", "--json", cwd=tmp_path)
    said = json.loads(done.stdout)
    assert said["directory"] == str(tmp_path / "world")
    assert said["url"] == f"https://{World(tmp_path / 'world').config['frontend']['listen']}"
    assert set(said["identities"]) == set(IDENTITIES)
    assert set(said["keys"]) == {"orders", "release", "invoices", "sessions"}


def test_pin_is_in_its_file_and_in_no_argv_and_no_environment(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SPY)
    spied = tmp_path / "spied"
    command = [str(PROGRAM), "dev", "init", str(tmp_path / "world")]
    environment = clean_environment() | {"PYTHONPATH": str(tmp_path), "SPY_FILE": str(spied)}
    seen: set[str] = set()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            seen.update(arguments_of_everybody())
            time.sleep(0.001)
    assert process.returncode == 0
    pin = (tmp_path / "world" / "pin").read_text().strip()
    assert len(pin) == 32
    calls = spied.read_text()
    assert "softhsm2-util" in calls
    assert "keybroker.hsm.softhsm" in calls
    assert any("--init-token" in each for each in seen)
    assert pin not in calls
    assert not any(pin in each for each in seen)


def arguments_of_everybody() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_text(errors="replace")
        except OSError:
            continue


def test_directory_with_anything_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file", "."):
        done = init(name, cwd=tmp_path)
        assert done.returncode == 1
        assert "is not an empty directory; name a new one" in done.stderr
        assert "Traceback" not in done.stderr
    assert names(tmp_path) == {"full", "full/mine", "file"}


def test_empty_directory_is_filled_and_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir(mode=0o750)
    assert init("empty", cwd=tmp_path).returncode == 0
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o750


@pytest.mark.parametrize(
    "words",
    [
        ["--workload", "checkout"],
        ["--workload", "spiffe://other.example/x"],
        ["--workload", "spiffe://example.org/x", "--workload", "spiffe://example.org/y/x"],
        ["--workload", "spiffe://example.org/" + "x" * 65],
        ["--key", "receipts"],
        ["--key", "receipts:HS256"],
        ["--key", "orders:ES256"],
        ["--key", "../../etc:ES256"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_in_it_is_wrong_usage_and_nothing_is_made(tmp_path: Path, words: list[str]) -> None:
    done = init("world", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {words[0]}")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("break_after", ["before", "after"])
def test_nothing_is_left_behind_where_softhsm_fails(tmp_path: Path, break_after: str) -> None:
    """`softhsm2-util` fails at once, or after it has made a token and before that has its keys."""
    programs = tmp_path / "programs"
    programs.mkdir()
    real = shutil.which("softhsm2-util")
    fake = programs / "softhsm2-util"
    first = f'{real} "$@"' if break_after == "after" else ":"
    fake.write_text(f"#!/bin/sh\n{first}\necho no such luck >&2\nexit 1\n")
    fake.chmod(0o755)
    (tmp_path / "empty").mkdir()
    for name in ("new/and/deep", "empty"):
        done = init(name, cwd=tmp_path, PATH=f"{programs}:{os.environ['PATH']}")
        assert done.returncode == 1
        assert "no such luck" in done.stderr
        assert "Traceback" not in done.stderr
    assert names(tmp_path) == {"programs", "programs/softhsm2-util", "empty"}


def test_missing_softhsm_is_told_with_the_cure(tmp_path: Path) -> None:
    done = init("world", cwd=tmp_path, PATH=str(Path(sys.executable).parent))
    assert done.returncode == 1
    assert "apt-get install softhsm2" in done.stderr
    assert names(tmp_path) == set()


def test_interruption_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [str(PROGRAM), "dev", "init", str(tmp_path / "world"), "--key", "a:RS256", "--key", "b:RS256", "--key", "c:RS256"]
    with subprocess.Popen(command, env=clean_environment(), stderr=subprocess.PIPE, start_new_session=True) as process:
        while not (tmp_path / "world" / "token").exists() and process.poll() is None:
            time.sleep(0.005)
        os.killpg(process.pid, 2)  # as a terminal does: to the whole group
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 130
    assert names(tmp_path) == set()


def test_world_with_a_long_name_works_and_still_does_after_it_was_moved(tmp_path: Path) -> None:
    """All paths but the token's are relative to the configuration, and sockets may lie deeper than the kernel's 107 bytes."""
    first = tmp_path / ("a long name with spaces " * 6).strip()
    with served(first) as world, world.client() as broker:
        before = broker.sign("orders", "ES256", message=b"x")
    assert len(str(first / "run" / "authority.sock")) > 150
    second = first.rename(tmp_path / "moved")
    conf = second / "softhsm2.conf"
    conf.write_text(conf.read_text().replace(str(first), str(second)))
    moved = World(second)
    try:
        moved.start()
        with moved.client() as broker:
            after = broker.sign("orders", "ES256", message=b"x")
            assert after.key == before.key
        with moved.client("auditor") as auditor:
            assert auditor.record(before.records.outcome).fields["use"] == before.use
    finally:
        moved.kill()


def test_curl_works_with_it(world: World) -> None:
    def curl(url: str, *words: str, name: str = "payments-api") -> subprocess.CompletedProcess[str]:
        own = ["--cacert", str(world.directory / "bundle.pem"), "--cert", str(world.svid(name))]
        command = ["curl", "--silent", "--show-error", "--noproxy", "*", *own, url, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)

    port = world.url.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost"):
        assert json.loads(curl(f"https://{host}:{port}/v1/whoami").stdout)["spiffe_id"] == "spiffe://example.org/payments/api"
    body = '{"algorithm": "Ed25519", "message": "aGVsbG8="}'
    signed = curl(f"{world.url}/v1/keys/sessions/sign", "-H", "Content-Type: application/json", "-d", body)
    assert json.loads(signed.stdout)["algorithm"] == "Ed25519"
    denied = curl(f"{world.url}/v1/keys/sessions/sign", "-H", "Content-Type: application/json", "-d", body, name="ci-release")
    assert json.loads(denied.stdout)["type"] == "urn:keybroker:problem:not-found"
    other = curl(f"https://broker.example.org:{port}/v1/whoami", "--resolve", f"broker.example.org:{port}:127.0.0.1")
    assert other.returncode == 60  # the name is not in the certificate
