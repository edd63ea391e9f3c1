"""A broker with a shadow policy that traps on every request: it signs as ever, and what the candidate would do is on record."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from pathlib import Path

import yaml

from tests.policies import compile_rego
from tests.unit.authority.test_shadow import LOOP
from tests.worlds import PROGRAM, clean_environment, make_world, until


def test_broker_signs_beside_a_candidate_that_traps_and_records_what_it_would_change(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    (world.directory / "trap.wasm").write_bytes(compile_rego(tmp_path, LOOP))
    config = world.config
    config["authority"]["shadow"] = {"grants": "grants", "module": "trap.wasm"}
    world.config_file.write_text(yaml.safe_dump(config))
    world.start()
    try:
        until(lambda: any(b'"change":"shadow"' in leaf for leaf in world.leaves()), 30, "the candidate was never loaded")
        with world.client() as client:
            for number in range(20):
                assert client.sign("orders", "ES256", message=b"%d" % number).signature
        until(lambda: any(b'"event":"shadow-differs"' in leaf for leaf in world.leaves()), 60, "no difference was ever recorded")
        with urllib.request.urlopen(f"http://{world.operations}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        assert 'keybroker_sign_total{key="orders",outcome="signed"} 20.0' in metrics
        assert 'keybroker_shadow_total{result="failed"}' in metrics
        assert world.stop() == 0
        command = [str(PROGRAM), "policy", "shadow", "--state", str(world.state), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=clean_environment())
        seen = {each["detail"]: each for each in json.loads(done.stdout)}
        about = seen["allow to failed: spiffe://example.org/payments/api sign orders"]
        assert about["decisions"] >= 1
        record = json.loads(world.leaves()[about["example"]])
        assert (record["decision"]["allow"], record["request"]["target"]["id"]) == (False, "orders")
    finally:
        world.kill()
