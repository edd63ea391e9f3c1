"""Policies for tests: grant files, Rego compiled by the real OPA, requests, and an OPA server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from keybroker.audit.leaf import canonical
from keybroker.authority.policy import loader
from keybroker.authority.policy.compiler import compile_rules
from keybroker.authority.policy.engine import ENGINE, EmbeddedEngine
from keybroker.authority.policy.grants import Rules
from keybroker.authority.policy.holder import BUILT_IN
from keybroker.authority.policy.wasm import WasmModule
from keybroker.errors import ConfigError
from keybroker.model.decision import CallerInput, Decision, PolicyInput, TargetInput
from keybroker.model.identity import SpiffeId
from tests.worlds import until

OPA = Path(sys.executable).with_name("opa")
REGO = Path(__file__).parents[1] / "policies" / "keybroker.rego"
ENTRYPOINT = "keybroker/decision"

Compile = Callable[..., bytes]

KEYS = frozenset({"orders", "release", "invoices"})
GOOD = """\
grants:
  - id: payments
    workloads: ["spiffe://example.org/payments/*"]
    keys: [orders]
    operations: [sign]
    algorithms: [ES256]
"""


def load(directory: Path, **files: str | bytes) -> Rules:
    """Rules of files that are named by keyword: `a` is `a.yaml`."""
    directory.mkdir(exist_ok=True)
    for name, text in files.items():
        (directory / f"{name}.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return loader.load(directory, KEYS)


def refusal(directory: Path, **files: str | bytes) -> list[str]:
    """The lines of the error, without the directory in front."""
    with pytest.raises(ConfigError) as caught:
        load(directory, **files)
    return str(caught.value).replace(f"{directory}/", "").splitlines()


def edited(old: str, new: str) -> str:
    """The good file with one part replaced."""
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def role(operation: str, selectors: str = "") -> str:
    """A file with one grant `r` of an operation that uses no key, for anybody, on line 2."""
    return f"grants:\n- {{id: r, workloads: ['**'], operations: [{operation}]{', ' * bool(selectors)}{selectors}}}\n"


def deny(text: str) -> str:
    """A file with one deny, for anybody, on line 2."""
    return f"denies:\n- {{id: d, workloads: ['**'], {text}}}\n"


def compile_rego(directory: Path, source: str, entrypoint: str = ENTRYPOINT) -> bytes:
    """A policy as the real OPA compiles it. Takes some 30 ms."""
    (directory / "policy.rego").write_text(source)
    command = [str(OPA), "build", "-t", "wasm", "-e", entrypoint, "-o", "bundle.tar.gz", "policy.rego"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    unpacked = subprocess.run(
        ["tar", "-xzPOf", "bundle.tar.gz", "/policy.wasm"], cwd=directory, capture_output=True, check=True, timeout=60
    )
    return unpacked.stdout


def request(
    operation: str = "sign",
    key: str = "orders",
    *,
    workload: str = "spiffe://example.org/payments/api",
    trail: str | None = None,
    algorithm: str = "ES256",
    networks: tuple[str, ...] = (),
    reason: str = "",
) -> bytes:
    """A policy input, as the authority makes it. Reading a trail names no key; only signing names an algorithm."""
    caller = SpiffeId.parse(workload)
    target = TargetInput("key", key) if trail is None else TargetInput("trail", "", trail)
    return canonical(
        PolicyInput(
            caller=CallerInput(caller.text, caller.trust_domain, caller.path, networks),
            operation=operation if trail is None else "read-audit",
            target=target,
            algorithm=algorithm if operation.startswith("sign") and trail is None else "",
            reason=reason,
        )
    )


@functools.cache
def default_module() -> WasmModule:
    """The policy that is built in."""
    return WasmModule(BUILT_IN.read_bytes(), "policy.wasm")


def compiled_default(rules: Rules) -> tuple[bytes, str]:
    """Data and digest of the policy that is built in, with these rules."""
    return compile_rules(rules, default_module().sha256, ENGINE)


def default_engine(rules: Rules) -> EmbeddedEngine:
    """The policy that is built in, with these rules."""
    data, digest = compiled_default(rules)
    return EmbeddedEngine(default_module(), data, digest)


def decide(engine: EmbeddedEngine, asked: bytes) -> Decision:
    """One decision, from where no event loop runs."""
    return asyncio.run(engine.decide(asked))


@dataclass(slots=True)
class OpaServer:
    """A real `opa run --server` with the default Rego; one keep-alive connection to it."""

    connection: http.client.HTTPConnection

    def ask(self, method: str, path: str, body: bytes) -> bytes:
        self.connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        text = answer.read()
        assert answer.status in {200, 204}, text
        return text

    def load(self, data: bytes) -> None:
        """Put rules in the place of those before, byte for byte."""
        self.ask("PUT", "/v1/data", data)

    def decide(self, asked: bytes) -> bytes:
        """OPA's answer, `{"result": ...}`, to a request, byte for byte."""
        return self.ask("POST", "/v1/data/keybroker/decision", b'{"input":%s}' % asked)


@contextlib.contextmanager
def opa_server(log: Path) -> Iterator[OpaServer]:
    """A server on loopback, ended when the block is left."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    command = [str(OPA), "run", "--server", "--addr", f"127.0.0.1:{port}", "--log-level", "error", "--skip-version-check", str(REGO)]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                connection.connect()
                return True
            return False

        try:
            until(answers, 30, "no OPA server")
            yield OpaServer(connection)
        finally:
            connection.close()
            process.kill()
