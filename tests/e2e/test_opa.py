"""A whole broker whose rules come in signed bundles and are decided by a real OPA server, inside its walls."""

from __future__ import annotations

import http.client
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from keybroker.errors import RefusalError
from tests.opa import OpaProcess, Publisher, opa_process
from tests.worlds import PROGRAM, World, clean_environment, make_world, until

OTHER_ID = "orders-again"


def bundle(world: World, publisher: Publisher, revision: int) -> None:
    """`keybroker policy bundle`, as a user runs it."""
    command = [str(PROGRAM), "policy", "bundle", "--grants", str(world.directory / "grants"), "--out", str(publisher.published),
               "--signing-key", str(publisher.directory / "signing.pem"), "--revision", str(revision), "--scope", publisher.scope,
               "--config", str(world.config_file)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=clean_environment())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{publisher.published}: revision {revision}, ")


def use_bundles(world: World, publisher: Publisher, opa: OpaProcess | None) -> None:
    """The same world, with its rules from the publisher; from its URL, and decided by OPA where there is one."""
    config = world.config
    del config["authority"]["grants"]
    by_name = publisher.bundle_url.replace("127.0.0.1", "localhost")  # the resolver works inside the walls, too
    place = {"url": by_name, "poll_ms": 200} if opa else {"path": str(publisher.published)}
    policy: dict[str, Any] = {"bundle": {**place, "keys": [str(publisher.key)], "scope": publisher.scope}}
    if opa:
        policy |= {"engine": "opa", "opa": {"url": opa.url, "deadline_ms": 2_000}}
    config["authority"]["policy"] = policy
    world.config_file.write_text(yaml.safe_dump(config))


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[Publisher]:
    made = Publisher(tmp_path / "p", scope="production")
    with made.serving():
        yield made


def records(world: World, **wanted: str) -> list[dict[str, Any]]:
    found = [json.loads(leaf) for leaf in world.leaves()]
    return [each for each in found if all(each[name] == value for name, value in wanted.items())]


def is_ready(world: World) -> bool:
    """What /readyz says, of the whole and of the policy."""
    connection = http.client.HTTPConnection(world.operations, timeout=10)
    connection.request("GET", "/readyz")
    said = json.loads(connection.getresponse().read())
    connection.close()
    assert said["ready"] is (said["parts"]["policy"] == "decides"), said
    return bool(said["ready"])


def sign(world: World, **options: Any) -> str:
    """Sign once; "signed", or the code of the refusal."""
    with world.client() as client:
        try:
            client.sign("orders", "ES256", message=b"message", **options)
        except RefusalError as err:
            return err.code
        return "signed"


def swap_under_load(world: World, publisher: Publisher) -> str:
    """Another id for the grant of payments-api, while it signs; each record is held to one policy. The digest of the new one."""
    stop, answers = threading.Event(), list[str]()

    def work() -> None:
        while not stop.is_set():
            answers.append(sign(world))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    try:
        grants = world.directory / "grants" / "development.yaml"
        grants.write_text(grants.read_text().replace("id: payments\n", f"id: {OTHER_ID}\n"))
        bundle(world, publisher, 2)
        until(lambda: any(each["body"]["change"] == "policy" for each in records(world, kind="admin")), 60)
        seen = len(answers)
        until(lambda: len(answers) > seen + 8, 60)
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert set(answers) == {"signed"}
    (start,) = records(world, kind="start")
    (change,) = (each["body"] for each in records(world, kind="admin") if each["body"]["change"] == "policy")
    assert change["from"] == start["body"]["policy"] != change["to"]
    decisions = [each["decision"] for each in records(world, kind="intent")]
    used = {(each["policy"], *each["grants"]) for each in decisions}
    assert used == {(change["from"], "payments"), (change["to"], OTHER_ID)}
    assert {each["engine"] for each in decisions} == {"opa/1.22.2"}
    return str(change["to"])


@pytest.mark.case(22)
@pytest.mark.case(26)
def test_broker_with_opa_signs_and_fails_closed_and_each_record_names_one_policy(tmp_path: Path, publisher: Publisher) -> None:
    world = make_world(tmp_path / "world")
    bundle(world, publisher, 1)
    with opa_process(publisher, f"unix://{tmp_path}/opa.sock") as opa:
        use_bundles(world, publisher, opa)
        until(lambda: world.run("check", "--config", str(world.config_file)).returncode == 0, 30)
        world.start()
        try:
            assert sign(world) == "signed"
            policy = swap_under_load(world, publisher)
            opa.kill()
            uses = len(records(world, kind="intent"))
            assert sign(world) == "policy-unavailable"
            (denial,) = records(world, kind="denial")
            assert denial["body"]["code"] == "policy-unavailable"
            assert (denial["decision"]["policy"], denial["decision"]["allow"]) == (policy, False)
            keys = world.run("keys", "list")
            assert (keys.returncode, b"rules could not be asked" in keys.stderr) == (5, True)
            assert world.run("keys", "show", "orders").returncode == 5
            assert len(records(world, kind="intent")) == uses
            until(lambda: not is_ready(world))
            opa.start()
            until(lambda: is_ready(world), 30)
            until(lambda: sign(world) == "signed", 30)
        finally:
            world.stop()
    checked = world.run("check", "--config", str(world.config_file))
    assert checked.returncode == 1
    assert b"OPA gives no answer" in checked.stderr


@pytest.mark.case(25)
def test_broker_takes_signed_bundles_of_a_file_refuses_others_and_starts_without_them(tmp_path: Path, publisher: Publisher) -> None:
    world = make_world(tmp_path / "world")
    bundle(world, publisher, 1)
    use_bundles(world, publisher, None)
    world.start()
    try:
        assert sign(world) == "signed"
        digest = records(world, kind="intent")[-1]["decision"]["policy"]
        (world.directory / "grants" / "none.yaml").write_text("denies: [{id: nobody, workloads: ['**'], keys: [orders]}]\n")
        mallory = Publisher(tmp_path / "mallory", scope="production")
        bundle(world, mallory, 9)
        publisher.put(mallory.published.read_bytes())
        until(lambda: any(each["body"]["event"] == "file-refused" for each in records(world, kind="security")))
        assert sign(world) == "signed"
        assert records(world, kind="intent")[-1]["decision"]["policy"] == digest
        bundle(world, publisher, 2)
        until(lambda: sign(world) == "denied")
        publisher.published.unlink()
        world.stop()
        world.start()
        assert sign(world) == "denied"
    finally:
        world.stop()


def test_wrong_use_of_policy_bundle_is_said(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(PROGRAM), "policy", "bundle", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=clean_environment())

    publisher = Publisher(tmp_path / "p")
    good = ["--grants", str(publisher.directory / "grants"), "--signing-key", str(publisher.directory / "signing.pem")]
    out = tmp_path / "b.tar.gz"
    done = run(*good, "--out", str(out))
    assert (done.returncode, out.exists()) == (1, False)
    assert "there is no grant file" in done.stderr
    (publisher.directory / "grants" / "a.yaml").write_text("grants: []\n")
    done = run(*good, "--out", str(out), "--rego", "x.rego")
    assert (done.returncode, out.exists()) == (2, False)
    assert "--rego and --module go together" in done.stderr
    done = run(*good[:2], "--signing-key", str(publisher.key), "--out", str(out))
    assert (done.returncode, "not an unencrypted private key in PEM" in done.stderr) == (1, True)
    done = run(*good, "--out", str(out), "--json")
    made = json.loads(done.stdout)
    assert (done.returncode, made["grants"], made["denies"], abs(made["revision"] - time.time()) < 600) == (0, 0, 0, True)
