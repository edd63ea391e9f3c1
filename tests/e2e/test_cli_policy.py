"""`keybroker policy`, as a user runs it. No broker serves."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.policies import GOOD
from tests.worlds import PROGRAM, World, clean_environment, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("policy") / "world")


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
    assert done.stdout.endswith("nothing to say\n")


def test_check_fails_on_errors_and_only_when_strict_on_warnings(world: World, tmp_path: Path) -> None:
    unknown = write(tmp_path / "unknown", GOOD.replace("orders", "ordres"))
    assert run("check", unknown, "--config", world.config_file).returncode == 0
    done = run("check", unknown, "--config", world.config_file, "--strict", "--json")
    assert done.returncode == 1
    (finding,) = json.loads(done.stdout)["findings"]
    assert (finding["severity"], finding["code"], finding["where"]) == ("warning", "unknown-key", f"{unknown}/a.yaml:4")
    broken = run("check", write(tmp_path / "broken", GOOD + "grant: []\n"))
    assert broken.returncode == 1
    assert f"error: {tmp_path}/broken/a.yaml:7: grant: unknown field" in broken.stdout


def test_check_without_rules_or_configuration_is_wrong_usage(tmp_path: Path) -> None:
    done = run("check")
    assert (done.returncode, "--config" in done.stderr) == (2, True)
    write(tmp_path, "hsm:\n  tokens: {}\n", "hsm.yaml")
    assert run("check", "--config", tmp_path / "hsm.yaml").returncode == 2
