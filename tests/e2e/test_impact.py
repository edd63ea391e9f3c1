"""What did it sign? Asked of a running broker, as text, as reports and as a list to work through."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.worlds import World


def done(world: World, *words: str, name: str = "auditor") -> str:
    finished = world.run("audit", "impact", *words, name=name)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.decode()


def test_impact_says_what_a_workload_signed_and_lists_each_use(world: World, tmp_path: Path) -> None:
    who = "spiffe://example.org/payments/api"
    with world.client() as broker:
        signed = [broker.sign("orders", "ES256", message=b"order %d" % number) for number in range(3)]
    page, text, uses = tmp_path / "a.html", tmp_path / "a.md", tmp_path / "a.ndjson"
    found = json.loads(done(world, "--workload", who, "--html", str(page), "--markdown", str(text), "--uses", str(uses), "--json"))
    assert found["total"]["signed"] >= 3
    assert found["total"]["signed"] == sum(hour["signed"] for hour in found["timeline"])
    assert [row["value"] for row in found["workloads"]] == [who]
    listed = {use["use"]: use for use in map(json.loads, uses.read_text().splitlines())}
    assert len(listed) == found["total"]["signed"] + found["total"]["other"]
    for number, each in enumerate(signed):
        use = listed[each.use]
        assert use["tbs"] == {"hash": "sha256", "value": hashlib.sha256(b"order %d" % number).hexdigest()}
        assert use["signature_sha256"] == hashlib.sha256(each.signature).hexdigest()
        assert use["records"] == {"intent": each.records.intent, "outcome": each.records.outcome}
    assert "<svg" in page.read_text()
    assert "orders" in text.read_text()
    assert "signed" in done(world, "--key", "orders", "--since", "1h")


def test_certificate_is_named_by_its_file(world: World) -> None:
    with world.client() as broker:
        broker.sign("orders", "ES256", message=b"by this certificate")
    svid = world.directory / "svids" / "payments-api.pem"
    found = json.loads(done(world, "--certificate", str(svid), "--json"))
    assert found["total"]["signed"] >= 1
    assert len(found["svids"]) == 1


def test_whoever_may_not_read_the_record_is_not_told(world: World) -> None:
    assert world.run("audit", "impact", "--key", "orders", name="payments-api").returncode == 3
    assert world.run("audit", "impact", "--workload", "spiffe://example.org/payments/api", name="ci-release").returncode == 3
    assert world.run("audit", "impact", "--workload", "spiffe://example.org/payments/api", name="payments-api").returncode == 0


def test_question_about_nobody_is_wrong_usage(world: World) -> None:
    finished = world.run("audit", "impact", name="auditor")
    assert finished.returncode == 2
    assert b"--workload" in finished.stderr
    assert world.run("audit", "impact", "--workload", "spiffe://example.org/*", name="auditor").returncode == 2
