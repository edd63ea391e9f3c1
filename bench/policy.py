"""How long a decision takes: `python -m bench.policy`. Every request is new, so that no memory answers it.

Medians and 99th percentiles, one request at a time, of the embedded engine with few and many grants, and of a real OPA server on a
Unix socket with the same rules, through the engine that a broker uses. And how long new rules take until they can decide.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from rich.console import Console
from rich.table import Table

from keybroker.audit.leaf import canonical
from keybroker.authority.policy import bundle_maker, loader
from keybroker.authority.policy.compiler import compile_rules
from keybroker.authority.policy.engine import ENGINE, OPA, EmbeddedEngine, PolicyEngine
from keybroker.authority.policy.holder import BUILT_IN
from keybroker.authority.policy.opa_address import OpaAddress
from keybroker.authority.policy.opa_engine import OpaEngine
from keybroker.authority.policy.opa_server import OpaServer
from keybroker.authority.policy.wasm import WasmModule
from keybroker.model.decision import CallerInput, PolicyInput, TargetInput, Verdict

SIZES = (10, 1_000, 10_000)
REQUESTS = 2_000
_PROGRAM = Path(sys.executable).with_name("opa")


def text_of(size: int) -> str:
    """A grant file: each team signs with its own key."""
    return "grants:\n" + "".join(
        f'- id: g{number}\n  workloads: ["spiffe://example.org/team-{number}/*"]\n  keys: [key-{number}]\n'
        f"  operations: [sign]\n  algorithms: [ES256]\n"
        for number in range(size)
    )


def request_of(size: int, number: int) -> bytes:
    """A request that one grant allows, and that was never made before."""
    team = number % size
    path = (f"team-{team}", "api")
    return canonical(
        PolicyInput(
            caller=CallerInput(f"spiffe://example.org/{'/'.join(path)}", "example.org", path, ()),
            operation="sign",
            target=TargetInput("key", f"key-{team}"),
            algorithm="ES256",
            reason=f"request {number}",
        )
    )


async def decide_many(engine: PolicyEngine, size: int) -> tuple[float, float]:
    """Median and 99th percentile, microseconds."""
    took = []
    for number in range(REQUESTS):
        asked = request_of(size, number)
        started = time.perf_counter()
        decision = await engine.decide(asked)
        took.append((time.perf_counter() - started) * 1e6)
        if decision.verdict is not Verdict.ALLOW:
            raise RuntimeError(decision)
    return statistics.median(took), statistics.quantiles(took, n=100)[98]


def embedded(size: int) -> tuple[EmbeddedEngine, float]:
    """The engine, and the seconds from the text of the grants until it could decide."""
    module = WasmModule(BUILT_IN.read_bytes(), "policy.wasm")
    text = text_of(size).encode()
    started = time.perf_counter()
    rules = loader.load_texts({Path("a.yaml"): text}, frozenset())
    data, digest = compile_rules(rules, module.sha256, ENGINE)
    made = EmbeddedEngine(module, data, digest)
    return made, time.perf_counter() - started


@contextlib.contextmanager
def opa(size: int) -> Iterator[tuple[OpaAddress, str]]:
    """A server with these rules, in a bundle of revision 1; its address and the digest of the rules."""
    with tempfile.TemporaryDirectory(prefix="keybroker-bench.") as name:
        home = Path(name)
        (home / "grants").mkdir()
        (home / "grants" / "a.yaml").write_text(text_of(size))
        packed, rules = bundle_maker.make(home / "grants", 1, ec.generate_private_key(ec.SECP256R1()), "", None, frozenset())
        (home / "b.tar.gz").write_bytes(packed)
        rego = (BUILT_IN.parent / "keybroker.rego").read_bytes()
        _, digest = compile_rules(rules, hashlib.sha256(rego).hexdigest(), OPA)
        socket = home / "opa.sock"
        command = [str(_PROGRAM), "run", "--server", "--addr", f"unix://{socket}", "--bundle", str(home / "b.tar.gz"), "--skip-verify",
                   "--skip-version-check", "--log-level", "error"]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # noqa: S603  our own OPA
            try:
                yield OpaAddress.of(f"unix:{socket}", None, None), digest
            finally:
                process.kill()


async def ask_opa(size: int) -> tuple[float, float]:
    """The same, of a server."""
    with opa(size) as (address, digest):
        server = OpaServer(address, 10.0)
        engine = OpaEngine(server, digest, 1)
        for _ in range(200):
            if await engine.trouble() == "":
                break
            await asyncio.sleep(0.1)
        try:
            return await decide_many(engine, size)
        finally:
            await server.close()


async def measure() -> Table:
    """Everything."""
    table = Table("engine", "grants", "p50 us", "p99 us", "p50 / p50 with 10", "rules ready in ms", title="one decision, not remembered")
    for name in ("embedded", "opa"):
        base = 0.0
        for size in SIZES:
            ready = ""
            if name == "embedded":
                engine, seconds = embedded(size)
                ready = f"{seconds * 1e3:.0f}"
                p50, p99 = await decide_many(engine, size)
            else:
                p50, p99 = await ask_opa(size)
            base = base or p50
            table.add_row(name, f"{size:,}", f"{p50:.0f}", f"{p99:.0f}", f"{p50 / base:.2f}", ready)
    return table


if __name__ == "__main__":
    Console(width=None if sys.stdout.isatty() else 120).print(asyncio.run(measure()))
