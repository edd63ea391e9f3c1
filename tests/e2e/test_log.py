"""The log of a whole broker, as an auditor gets it: exported, proved, and verified without the broker by two programs."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keybroker.audit.checkpoint import SignedCheckpoint
from keybroker.audit.leaf import leaf_hash
from keybroker.audit.merkle import check_consistency
from keybroker.audit.note import VerifierKey, decode_base64
from keybroker.audit.tiles import entries_in, hashes_in
from keybroker.client import AUTO
from tests.unit.audit import naive
from tests.worlds import PROGRAM, World, clean_environment, make_world, until

VERIFIER = Path(__file__).parents[2] / "tools" / "verify_export.py"
API = "spiffe://example.org/payments/api"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = make_world(tmp_path_factory.mktemp("log") / "world")
    world.sign_log_every(1)
    try:
        world.start()
        with world.client() as broker:
            for number in range(150):
                broker.sign("orders", "ES256", message=b"%d" % number, idempotency_key=AUTO)
        wait_for_checkpoint(world, 300)
        yield world
    finally:
        world.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def key_of(world: World) -> VerifierKey:
    return VerifierKey.parse((world.directory / "log.vkey").read_text().strip())


def signed_size(world: World) -> int:
    note = world.directory / "anchor" / "checkpoint"
    return SignedCheckpoint.open(note.read_bytes(), key_of(world)).checkpoint.size if note.exists() else 0


def wait_for_checkpoint(world: World, size: int) -> None:
    until(lambda: signed_size(world) >= size, 30, "no checkpoint in time")


def verifies(world: World, file: Path, *options: str) -> tuple[bool, bool]:
    """What the two programs say of an export."""
    ours = world.run("audit", "verify", str(file), "--log-key", str(world.directory / "log.vkey"), *options)
    command = [sys.executable, str(VERIFIER), str(file), "--log-key", str(world.directory / "log.vkey"), *options]
    theirs = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert ours.returncode in {0, 1}, ours.stderr
    assert theirs.returncode in {0, 1}, theirs.stderr
    return ours.returncode == 0, theirs.returncode == 0


def http(world: World, path: str, name: str = "auditor") -> tuple[int, str, bytes]:
    """Status, content type and body of a GET by curl."""
    body = world.directory.parent / "body"
    command = ["curl", "-s", "--path-as-is", "-o", str(body), "-w", "%{http_code} %{content_type}", "--cert", str(world.svid(name))]
    command += ["--cacert", str(world.directory / "ca.pem"), world.url.replace("127.0.0.1", "localhost") + path]
    status, _, kind = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.decode().partition(" ")
    return int(status), kind, body.read_bytes()


@pytest.mark.case(68)
def test_export_of_the_whole_log_is_verified_by_two_programs_and_an_edited_one_by_none(world: World, tmp_path: Path) -> None:
    file, kept = tmp_path / "record.ndjson", tmp_path / "kept"
    kept.write_bytes((world.directory / "anchor" / "checkpoint").read_bytes())
    assert world.run("audit", "export", "--out", str(file), name="auditor").returncode == 0
    lines = file.read_bytes().splitlines()
    leaves = [line for line in lines if line.startswith(b'{"approvals":')]
    assert leaves == world.leaves()[: len(leaves)]
    assert len(leaves) >= 300
    assert verifies(world, file, "--checkpoint", str(kept)) == (True, True)
    assert world.run("audit", "verify", str(file), "--log-key", str(key_of(world))).returncode == 0
    file.write_bytes(b"\n".join(lines).replace(b'"message"', b'"massage"', 1) + b"\n")
    assert verifies(world, file) == (False, False)
    said = world.run("audit", "verify", str(file), "--log-key", str(key_of(world)), "--json")
    first = next(index for index, leaf in enumerate(leaves) if b'"message"' in leaf)
    assert first <= json.loads(said.stdout)["first_bad"] <= first + 2


def test_auditor_of_one_workload_gets_its_trail_with_the_proof_that_it_is_complete(world: World, tmp_path: Path) -> None:
    file = tmp_path / "trail.ndjson"
    assert world.run("audit", "export", "--workload", API, "--out", str(file), name="auditor").returncode == 0
    assert verifies(world, file) == (True, True)
    lines = file.read_bytes().splitlines()
    assert all(json.loads(line)["trail"]["id"] == API for line in lines[1:-1])
    assert len(lines) >= 302
    file.write_bytes(b"\n".join([*lines[:-2], lines[-1]]) + b"\n")  # without the last record
    assert verifies(world, file) == (False, False)


def test_workload_gets_its_own_trail_and_nothing_of_others(world: World, tmp_path: Path) -> None:
    file = tmp_path / "own.ndjson"
    assert world.run("audit", "export", "--out", str(file), name="payments-api").returncode == 0
    assert file.read_bytes().startswith(b'{"trail_export":"' + API.encode())
    assert verifies(world, file) == (True, True)
    other = ("audit", "export", "--workload", "spiffe://example.org/human/auditor", "--out", str(tmp_path / "other"))
    assert world.run(*other, name="payments-api").returncode == 3
    assert not (tmp_path / "other").exists()
    assert http(world, "/v1/audit/tile/entries/000", "payments-api")[0] == 403
    assert http(world, "/v1/audit/proof/inclusion?index=0", "payments-api")[0] == 404


def test_trail_that_does_not_exist_is_proved_to_be_empty(world: World, tmp_path: Path) -> None:
    file = tmp_path / "nobody.ndjson"
    assert world.run("audit", "export", "--workload", "spiffe://example.org/nobody", "--out", str(file), name="auditor").returncode == 0
    assert len(file.read_bytes().splitlines()) == 2
    assert verifies(world, file) == (True, True)
    lie = tmp_path / "lie.ndjson"
    lie.write_bytes(file.read_bytes().replace(b"spiffe://example.org/nobody", API.encode()))
    assert verifies(world, lie) == (False, False)


def test_one_record_is_proved_by_a_file_that_is_verified_offline(world: World, tmp_path: Path) -> None:
    file = tmp_path / "9.tlog-proof"
    assert world.run("audit", "prove", "9", "--out", str(file), name="auditor").returncode == 0
    done = world.run("audit", "verify", str(file), "--log-key", str(world.directory / "log.vkey"), "--json")
    assert json.loads(done.stdout)["record"]["index"] == 9
    bad = tmp_path / "bad.tlog-proof"
    bad.write_bytes(file.read_bytes().replace(b"index 9", b"index 8"))
    assert world.run("audit", "verify", str(bad), "--log-key", str(world.directory / "log.vkey")).returncode == 1


def test_log_is_served_as_tiles(world: World) -> None:
    status, kind, note = http(world, "/v1/audit/checkpoint")
    head = SignedCheckpoint.open(note, key_of(world)).checkpoint
    assert (status, kind) == (200, "text/plain; charset=utf-8")
    status, kind, tile = http(world, "/v1/audit/tile/0/000")
    assert (status, kind) == (200, "application/octet-stream")
    status, kind, bundle = http(world, "/v1/audit/tile/entries/000")
    assert (status, kind) == (200, "application/octet-stream")
    assert [leaf_hash(entry) for entry in entries_in(bundle)] == hashes_in(tile)
    width = head.size % 256
    rest = hashes_in(http(world, f"/v1/audit/tile/0/001.p/{width}")[2])
    above = hashes_in(http(world, "/v1/audit/tile/1/000.p/1")[2])
    assert above == [naive.mth(hashes_in(tile))]
    assert naive.mth([*hashes_in(tile), *rest]) == head.root
    for missing in ("0/009", "0/1", "9/000", "entries/001", "../records", "0/001.p/255"):
        assert http(world, f"/v1/audit/tile/{missing}")[0] == 404, missing


def test_log_is_proved_to_have_grown_from_an_older_checkpoint(world: World) -> None:
    head = SignedCheckpoint.open(http(world, "/v1/audit/checkpoint")[2], key_of(world)).checkpoint
    status, kind, body = http(world, f"/v1/audit/proof/consistency?old=77&size={head.size}")
    assert (status, kind) == (200, "application/json")
    proof = [decode_base64(each) for each in json.loads(body)["proof"]]
    old = naive.mth([leaf_hash(leaf) for leaf in world.leaves()[:77]])
    check_consistency(77, old, head.size, head.root, proof)
    assert http(world, "/v1/audit/proof/consistency?old=77&size=76")[0] == 422
    assert http(world, "/v1/audit/proof/consistency?old=0&size=99999999")[0] == 422


def test_reading_the_record_by_the_log_is_itself_on_record(world: World, tmp_path: Path) -> None:
    before = len(world.leaves())
    world.run("audit", "export", "--out", str(tmp_path / "a"), name="auditor")
    read = [json.loads(leaf) for leaf in world.leaves()[before:]]
    assert ("read", "export 0") in [(record["kind"], record["body"].get("what")) for record in read]


@pytest.mark.case(69)
def test_witness_cosigns_what_grows_and_refuses_a_broker_whose_log_is_another(world: World, tmp_path: Path) -> None:
    port = free_port()
    command = [str(PROGRAM), "witness", "--name", "witness.example.org/w1", "--state", str(tmp_path / "w1")]
    command += ["--listen", f"127.0.0.1:{port}", "--log-key", str(world.directory / "log.vkey")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean_environment()) as process:
        try:
            assert process.stdout is not None
            ready, url, vkey = process.stdout.readline().split()
            assert ready == "ready"
            kept = tmp_path / "kept"
            words = ("audit", "cosign", "--witness", url, "--witness-key", vkey, "--log-key", str(key_of(world)), "--out", str(kept))
            sizes = []
            for number in range(2):
                done = world.run(*words, name="auditor")
                assert done.returncode == 0, done.stderr
                opened = SignedCheckpoint.open(kept.read_bytes(), key_of(world), [VerifierKey.parse(vkey)])
                assert list(opened.cosignatures) == [VerifierKey.parse(vkey)]
                sizes.append(opened.checkpoint.size)
                with world.client() as broker:
                    broker.sign("orders", "ES256", message=b"more %d" % number, idempotency_key=AUTO)
                wait_for_checkpoint(world, sizes[-1] + 1)
            assert sizes[0] < sizes[1]
            with sqlite3.connect(tmp_path / "w1" / "witness.db") as db:  # it has seen another log of this key: a longer one, or a fork
                db.execute("UPDATE latest SET size = 1000000")
            refused = world.run(*words, name="auditor")
            assert (refused.returncode, b"rolled back" in refused.stderr) == (1, True)
            with sqlite3.connect(tmp_path / "w1" / "witness.db") as db:
                db.execute("UPDATE latest SET size = ?, root = zeroblob(32)", (sizes[0],))
            refused = world.run(*words, name="auditor")
            assert (refused.returncode, b"does not cosign (422)" in refused.stderr) == (1, True)
        finally:
            process.terminate()
            process.wait(10)


def test_public_half_of_the_logs_key_is_printed_from_the_token(world: World) -> None:
    done = world.run("audit", "log-key", "--config", str(world.config_file))
    assert done.stdout.decode().strip() == str(key_of(world))
    assert world.run("check", "--config", str(world.config_file)).returncode == 0
