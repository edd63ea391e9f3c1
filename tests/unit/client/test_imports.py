"""The SDK and the program need nothing but the base dependencies: no room's own packages, and no type information that is missing."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import keybroker

ROOT = Path(keybroker.__file__).parent
PYPROJECT = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
MODULES = {"python-ulid": "ulid", "prometheus-client": "prometheus_client", "python-pkcs11": "pkcs11"}
EXTRAS = sorted(
    {
        MODULES.get(name := re.split(r"[\[>=]", line)[0], name)
        for extra in ("frontend", "authority", "hsm")
        for line in PYPROJECT["project"]["optional-dependencies"][extra]
    }
)
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    text = BLOCKED.format(blocked=set(EXTRAS)) + code
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=60)


def test_extras_are_what_is_blocked() -> None:
    assert {"fastapi", "prometheus_client", "pkcs11", "ulid", "uvicorn", "uvloop", "wasmtime"} <= set(EXTRAS)
    done = run("import wasmtime")
    assert "wasmtime is blocked" in done.stderr


def test_sdk_loads_with_the_base_dependencies_alone() -> None:
    done = run(
        "import keybroker.client as sdk\n"
        "for name in sdk.__all__: getattr(sdk, name)\n"
        "import pathlib, importlib\n"
        "for path in pathlib.Path(sdk.__file__).parent.glob('*.py'): importlib.import_module(f'keybroker.client.{path.stem}')\n"
        "assert not any(name.startswith(('keybroker.frontend', 'keybroker.authority', 'keybroker.hsm')) for name in sys.modules)\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["sign", "--help"], ["audit", "tail", "--help"], ["serve", "--help"], ["check", "--help"]])
def test_program_loads_with_the_base_dependencies_alone(words: list[str]) -> None:
    done = run(f"from keybroker.cli import main\nsys.argv = ['keybroker', *{words}]\nsys.exit(main())\n")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--help"], {"anyio", "asyncio", "cryptography", "httpcore", "pydantic", "ssl", "yaml"}),
        (["sign", "--help"], {"anyio", "httpcore", "yaml"}),
    ],
)
def test_help_loads_little_because_it_is_to_be_there_at_once(words: list[str], absent: set[str]) -> None:
    done = run(
        f"from keybroker.cli import main\nsys.argv = ['keybroker', *{words}]\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print('loaded:', *(sys.modules.keys() & {absent}), file=sys.stderr)\n"
    )
    assert done.stderr.strip() == "loaded:"


def test_room_without_its_extra_says_how_to_install_it(tmp_path: Path) -> None:
    config = tmp_path / "keybroker.yaml"
    config.write_text("frontend: {listen: '127.0.0.1:1', svid: s, bundles: {example.org: b}, authority: a}\n")
    done = run(f"from keybroker.cli import main\nsys.argv = ['keybroker', 'frontend', '--config', {str(config)!r}]\nsys.exit(main())\n")
    assert done.returncode == 1
    assert "pip install 'keybroker[frontend]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_types_are_shipped() -> None:
    assert (ROOT / "py.typed").exists()
