"""`keybroker policy`, as a user runs it: it asks no broker, and reads the record beside one that serves."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

from tests.policies import GOOD
from tests.worlds import PROGRAM, World, clean_environment


def run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAM), "policy", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=cwd, env=clean_environment())


def write(directory: Path, text: str, name: str = "a.yaml") -> Path:
    directory.mkdir(exist_ok=True, parents=True)
    (directory / name).write_text(text)
    return directory


def test_check_passes_the_development_world(world: World) -> None:
    done = run("check", "--config", world.config_file, "--strict")
    assert (done.returncode, done.stderr) == (0, "")
    assert "error" not in done.stdout
    assert "warning" not in done.stdout


def test_check_fails_on_errors_and_only_when_strict_on_warnings(world: World, tmp_path: Path) -> None:
    unknown = write(tmp_path / "unknown", GOOD.replace("orders", "ordres"))
    assert run("check", unknown, "--config", world.config_file).returncode == 0
    done = run("check", unknown, "--config", world.config_file, "--strict", "--json")
    assert done.returncode == 1
    finding, _ = json.loads(done.stdout)["findings"]
    assert (finding["severity"], finding["code"], finding["where"]) == ("warning", "unknown-key", f"{unknown}/a.yaml:4")
    cannot = write(tmp_path / "cannot", GOOD.replace("ES256", "PS256"))
    assert "it is a key of the family ec-p256, which cannot do PS256" in run("check", cannot, "--config", world.config_file).stdout
    broken = run("check", write(tmp_path / "broken", GOOD + "grant: []\n"))
    assert broken.returncode == 1
    assert f"error: {tmp_path}/broken/a.yaml:7: grant: unknown field" in broken.stdout


def test_check_without_rules_or_configuration_is_wrong_usage(tmp_path: Path) -> None:
    done = run("check")
    assert (done.returncode, "--config" in done.stderr) == (2, True)
    write(tmp_path, "hsm:\n  tokens: {}\n", "hsm.yaml")
    assert run("check", "--config", tmp_path / "hsm.yaml").returncode == 2


CASES = """\
cases:
  - {name: signs, workload: spiffe://example.org/payments/api, key: orders, algorithm: ES256, expect: allow}
  - {name: strangers, workload: spiffe://example.org/x, key: orders, algorithm: ES256, expect: EXPECTED}
"""


def test_cases_of_a_directory_pass_or_fail_with_the_answer_that_came(tmp_path: Path) -> None:
    grants = write(tmp_path / "g", GOOD)
    assert run("test", grants).returncode == 1
    write(grants / "tests", CASES.replace("EXPECTED", "deny"))
    done = run("test", grants)
    assert (done.returncode, done.stdout) == (0, "2 passed, 0 failed\n")
    write(grants / "tests", CASES.replace("EXPECTED", "allow"))
    done = run("test", grants)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"failed: {grants}/tests/a.yaml:3: strangers", "  expected allow, got deny (no-grant)", "1 passed, 1 failed",
    ]  # fmt: skip
    answer = json.loads(run("test", grants, "--json", "--tests", grants / "tests" / "a.yaml").stdout)
    assert (answer["passed"], answer["failed"], answer["cases"][1]["passed"]) == (1, 1, False)


def test_simulate_shows_verdict_and_reasoning_and_exits_as_sign_would(tmp_path: Path) -> None:
    grants = write(tmp_path / "g", GOOD)
    asked = ("--workload", "spiffe://example.org/payments/api", "--key", "orders")
    allowed = run("simulate", grants, *asked, "--alg", "ES256")
    assert (allowed.returncode, allowed.stdout.splitlines()[:2]) == (0, ["verdict\tallow", "grants\tpayments"])
    denied = run("simulate", grants, *asked, "--alg", "ES384")
    assert denied.returncode == 3
    assert "  NO   algorithms: ES384 is not in ES256" in denied.stdout.splitlines()
    answer = json.loads(run("simulate", grants, *asked, "--alg", "ES384", "--json").stdout)
    assert (answer["verdict"], answer["reasons"], answer["is_explained"]) == ("deny", ["algorithm-not-granted"], True)
    (tmp_path / "input.json").write_text(json.dumps(answer["input"] | {"algorithm": "ES256"}))
    assert run("simulate", grants, "--input", tmp_path / "input.json").returncode == 0


def test_diff_says_who_gains_and_who_loses(tmp_path: Path) -> None:
    old = write(tmp_path / "old", GOOD)
    new = write(tmp_path / "new", GOOD.replace("payments/*", "payments/api").replace("ES256", "ES384"))
    done = run("diff", old, new)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == (
        "+ spiffe://example.org/payments/api may now sign with orders (ES384): the grant payments has changed"
    )
    assert {line["change"] for line in json.loads(run("diff", old, new, "--json").stdout)["lines"]} == {"gained", "lost"}
    same = run("diff", old, old)
    assert (same.returncode, same.stdout, same.stderr) == (0, "", "no difference: every request gets the same answer\n")


def test_replay_beside_a_broker_says_what_a_candidate_would_change(world: World, tmp_path: Path) -> None:
    with world.client() as client:
        signed = client.sign("orders", "ES256", message=b"replay me")
    live = world.directory / "grants"
    done = run("replay", live, "--config", world.config_file, "--since", "1h", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    same = json.loads(done.stdout)
    assert same["decisions"] > 0
    assert [each for each in same["changes"] if each["target"] == "orders" and each["change"] == "allow to deny"] == []
    strict = write(tmp_path / "strict", GOOD.replace("ES256", "ES384"))
    changed = run("replay", strict, "--state", world.state, "--fail-on-change", "--json")
    assert changed.returncode == 1
    lost = {(each["change"], each["target"]): each for each in json.loads(changed.stdout)["changes"] if each["operation"] == "sign"}
    orders = lost["allow to deny", "orders"]
    assert (orders["workload"], orders["would_be"]) == ("spiffe://example.org/payments/api", ["algorithm-not-granted"])
    assert orders["last"]["index"] >= signed.records.intent
    shown = run("replay", strict, "--state", world.state)
    assert shown.returncode == 0
    assert "allow to deny" in shown.stdout
    assert "note: what is demanded is replayed" in shown.stderr
    simulated = run("simulate", strict, "--record", signed.records.intent, "--config", world.config_file)
    assert (simulated.returncode, "algorithm-not-granted" in simulated.stdout) == (3, True)


def test_shell_completes_the_commands_and_their_options() -> None:
    for words, wanted in (("keybroker policy ", "replay"), ("keybroker policy diff --", "--json")):
        environment = clean_environment() | {
            "_KEYBROKER_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        }
        done = subprocess.run([str(PROGRAM)], capture_output=True, text=True, check=False, timeout=60, env=environment)
        assert wanted in done.stdout.split(), done


def test_commands_of_the_how_to_work_when_pasted_one_after_the_other(world: World, tmp_path: Path) -> None:
    with world.client() as client:
        asked = client.sign("orders", "ES256", message=b"paste me").records.intent
    (tmp_path / "my-world").symlink_to(world.directory)
    environment = clean_environment() | {"PATH": f"{PROGRAM.parent}:{os.environ['PATH']}"}
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "try-a-policy-change.md").read_text()
    blocks = re.findall(r"^```(sh|yaml)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    for kind, block in blocks:
        if block.startswith("cases:"):
            write(tmp_path / "candidate" / "tests", block, "orders.yaml")
        if kind == "sh":
            script = block.replace("--record 5", f"--record {asked}")
            done = subprocess.run(
                ["bash", "-eu", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
            )
            assert done.returncode == 0, (block, done.stdout, done.stderr)
    assert sum(kind == "sh" for kind, _ in blocks) >= 8
