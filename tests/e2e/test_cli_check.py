"""`keybroker check`, `serve` and the rooms: each thing that can be wrong is found, with its place and its cure, without serving."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from keybroker.hsm.softhsm import module_path
from tests.tokens import Shim
from tests.worlds import PROGRAM, World, clean_environment, make_world, served

EXTRACTABLE = """
import sys
import pkcs11
from pkcs11 import Attribute, KeyType
from pkcs11.util.ec import encode_named_curve_parameters

curve = {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
with pkcs11.lib(sys.argv[1]).get_token(token_label="keybroker-dev").open(user_pin=open(sys.argv[2]).read().strip(), rw=True) as session:
    domain = session.create_domain_parameters(KeyType.EC, curve, local=True)
    domain.generate_keypair(store=True, label="extractable", id=b"x", private_template={Attribute.EXTRACTABLE: True})
"""


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world that has been served, and is not any more."""
    with served(tmp_path_factory.mktemp("used") / "world") as world:
        with world.client() as broker:
            for number in range(100):
                broker.sign("orders", "ES256", message=b"%d" % number)
        assert world.stop() == 0
    return world


@pytest.fixture
def copy(used: World, tmp_path: Path) -> World:
    """The same, to be broken. The token is shared: SoftHSM's own configuration names it by its absolute path."""
    return World(Path(shutil.copytree(used.directory, tmp_path / "world", ignore=shutil.ignore_patterns("run"))))


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(PROGRAM), *words], capture_output=True, text=True, check=False, timeout=60, env=clean_environment())


def check(world: World) -> list[str]:
    """The problems that are found."""
    done = run("check", "--config", str(world.config_file))
    assert "Traceback" not in done.stderr
    found = done.stderr.splitlines()
    assert all(line.startswith("problem: ") for line in found), done.stderr
    assert done.returncode == (1 if found else 0)
    assert done.stdout == ("" if found else f"{world.config_file}: no problems\n")
    return [line.removeprefix("problem: ") for line in found]


def edit(world: World, old: str, new: str) -> None:
    text = world.config_file.read_text()
    assert re.search(old, text)
    world.config_file.write_text(re.sub(old, new, text, count=1))


def test_good_world_has_no_problems_used_or_not(used: World, tmp_path: Path) -> None:
    assert check(used) == []
    assert check(make_world(tmp_path / "fresh")) == []
    done = run("check", "--json", "--config", str(used.config_file))
    assert json.loads(done.stdout) == {"problems": []}


def test_broker_that_serves_is_not_disturbed(world: World) -> None:
    def uses() -> int:
        return sum(b'"kind":"outcome"' in leaf for leaf in world.leaves())

    before = uses()
    assert check(world) == []
    with world.client() as broker:
        broker.sign("orders", "ES256", message=b"x")
    assert uses() == before + 1


ADDRESS = r"frontend\.listen: .*for example 127\.0\.0\.1:8443"
BROKEN_CONFIGS = {
    "unknown key": (r"(\n  svid: .*\n)", r"\1  listne: x\n", r":6: frontend: .*unknown field `listne`"),
    "missing value": (r"  state: state\n", "", r":\d+: authority: .*`state`"),
    "not an address": (r"listen: 127\.0\.0\.1:\d+", "listen: localhost:http", rf":3: {ADDRESS}"),
    "unknown token": (r"orders: \{token: development", "orders: {token: x", r":\d+: .*no such token under authority\.tokens"),
    "not YAML": (r"frontend:", "frontend: [", r":\d+: not YAML"),
    "given twice": (r"(\n  svid: .*)\n", r"\1\1\n", r":6: 'svid' is given twice"),
}


@pytest.mark.parametrize("what", BROKEN_CONFIGS)
def test_broken_configuration_is_found_by_file_line_and_field(copy: World, what: str) -> None:
    old, new, told = BROKEN_CONFIGS[what]
    edit(copy, old, new)
    (problem,) = check(copy)
    assert re.search(rf"keybroker\.yaml{told}", problem), problem


def test_broken_configuration_is_told_by_everything_that_reads_it(copy: World) -> None:
    edit(copy, r"\nfrontend:\n", "\nfrontend:\n  listne: x\n")
    done = run("check", "--json", "--config", str(copy.config_file))
    assert done.returncode == 1
    (problem,) = json.loads(done.stdout)["problems"]
    for words, status in ((("serve",), 1), (("frontend",), 78), (("authority",), 78), (("hsm",), 78)):
        done = run(*words, "--config", str(copy.config_file))
        assert (done.returncode, done.stdout) == (status, "")  # 78, EX_CONFIG: a service manager need not try again
        assert f"error: {problem}" in done.stderr


@pytest.mark.parametrize("words", [("check",), ("serve",), ("frontend",), ("authority",), ("hsm",)])
def test_missing_configuration_is_told_by_name(tmp_path: Path, words: tuple[str, ...]) -> None:
    for path, told in ((tmp_path / "nowhere.yaml", "No such file"), (tmp_path, "Is a directory")):
        done = run(*words, "--config", str(path))
        assert done.returncode == (78 if words[0] in {"frontend", "authority", "hsm"} else 1)
        assert done.stdout == ""
        assert str(path) in done.stderr
        assert told in done.stderr
        assert "Traceback" not in done.stderr
    assert run(*words).returncode == 2


def test_serve_wants_all_sections_and_check_takes_what_there_is(copy: World) -> None:
    text = copy.config_file.read_text()
    copy.config_file.write_text(text[: text.index("\nhsm:")])
    done = run("serve", "--config", str(copy.config_file))
    assert done.returncode == 1
    assert "the section `hsm` is missing" in done.stderr
    assert check(copy) == []


def removed(name: str) -> Callable[[World], None]:
    return lambda world: (world.directory / name).unlink()


def written(name: str, text: str) -> Callable[[World], None]:
    def write(world: World) -> None:
        (world.directory / name).write_text(text)

    return write


def newer_format(world: World) -> None:
    with sqlite3.connect(world.state / "keybroker.db") as db:
        db.execute("PRAGMA user_version = 999")
    db.close()


def damaged(world: World) -> None:
    path = world.state / "keybroker.db"
    data = bytearray(path.read_bytes())
    assert len(data) > 50_000
    for start in range(8_192, len(data) - 4_096, 4_096):
        data[start : start + 1_000] = bytes(1_000)
    path.write_bytes(data)


def grant(keys: str = "orders", name: str = "x", more: str = "") -> str:
    workloads = "['spiffe://example.org/x']"
    return f"grants:\n  - {{id: {name}, workloads: {workloads}, operations: [sign], keys: [{keys}], algorithms: [ES256]{more}}}\n"


NO_DATABASE = "this is no database, but long enough to look at" * 100
BROKEN = [
    [
        (removed("svids/broker.pem"), r"broker\.pem.*No such file"),
        (written("grants/x.yaml", grant(more=", quorm: 2")), r"x\.yaml:2: .*quorm"),
        (newer_format, r"newer"),
        (removed("pin"), r"token development: .*pin: the PIN cannot be read"),
    ],
    [
        (written("svids/broker.pem", "nothing"), r"broker\.pem: not a PEM file"),
        (written("grants/x.yaml", grant("ordres")), r"x\.yaml:2: .*ordres"),
        (damaged, r"damaged|cannot be (read|opened)"),
        (lambda world: (world.directory / "pin").chmod(0o644), r"token development: .*chmod 0600"),
    ],
    [
        (removed("bundle.pem"), r"bundle\.pem: cannot be read"),
        (written("grants/x.yaml", grant("")), r"x\.yaml:2: "),
        (written("state/keybroker.db", NO_DATABASE), r"not a database|cannot be read|NOTADB"),
        (written("softhsm2.conf", "directories.tokendir = /nowhere\n"), r"token development: "),
    ],
    [
        (written("bundle.pem", "nothing"), r"bundle\.pem: neither PEM certificates nor"),
        (written("grants/x.yaml", grant(name="payments")), r"payments"),
    ],
]


@pytest.mark.parametrize("broken", BROKEN)
def test_everything_that_is_broken_is_found_at_once_with_its_place(copy: World, broken: list[tuple[Callable[[World], None], str]]) -> None:
    for break_it, _ in broken:
        break_it(copy)
    problems = check(copy)
    assert [told for _, told in broken if not any(re.search(told, problem) for problem in problems)] == [], problems


def test_token_that_is_not_there_is_named(copy: World) -> None:
    edit(copy, r"pkcs11:token=[a-z-]+", "pkcs11:token=another")
    (problem,) = check(copy)
    assert problem.startswith("token development: ")
    assert "name exactly one, by `token` or `serial`" in problem


def test_module_that_is_not_there_is_named(copy: World) -> None:
    edit(copy, r"module-path=[^&]+", "module-path=/nowhere/module.so")
    (problem,) = check(copy)
    assert "/nowhere/module.so" in problem


def test_module_that_crashes_does_not_crash_the_check(copy: World, tmp_path: Path) -> None:
    source = tmp_path / "crash.c"
    source.write_text("int C_GetFunctionList(void **list) { return *(volatile int *)0; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(tmp_path / "crash.so"), str(source)], check=True)
    edit(copy, r"module-path=[^&]+", f"module-path={tmp_path / 'crash.so'}")
    (problem,) = check(copy)
    assert "brought its process down" in problem


@pytest.mark.case(52)
def test_key_that_is_missing_is_named_with_the_cure(copy: World) -> None:
    edit(copy, r"object: invoices", "object: nobody")
    edit(copy, r"object: orders", "id: 00ff")
    assert check(copy) == [
        f"key {name}/1: key-missing: no private key matches; check `object` and `id` against the token" for name in ("orders", "invoices")
    ]


@pytest.mark.case(52)
def test_key_that_can_be_extracted_is_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    environment = clean_environment() | {"SOFTHSM2_CONF": str(world.directory / "softhsm2.conf")}
    command = [sys.executable, "-c", EXTRACTABLE, str(module_path()), str(world.directory / "pin")]
    subprocess.run(command, check=True, env=environment)
    edit(world, r"object: orders", "object: extractable")
    assert check(world) == ["key orders/1: key-extractable: CKA_EXTRACTABLE must be false; make a new key in the token"]


@pytest.mark.case(45)
def test_wrong_pin_is_tried_once(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    shim = Shim.make(tmp_path / "shim")
    edit(world, r"module-path=[^&]+", f"module-path={shim.module}")
    more = ", ".join(f"{name}: {json.dumps(value)}" for name, value in shim.environment.items())
    edit(world, r"module_environment: \{", f"module_environment: {{{more}, ")
    assert check(world) == []
    assert shim.calls("C_Login") == 1
    (world.directory / "pin").write_text("0" * 32 + "\n")
    (problem,) = check(world)
    assert problem.startswith("token development: ")
    assert "PIN" in problem
    assert shim.calls("C_Login") == 2
