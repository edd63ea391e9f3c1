"""Bare python-pkcs11: one process, one session, one call after another, on the keys that the broker uses. What a broker is compared to.

As a program (`python -m bench.bare CONFIG`) it logs in to the token of a development world, says so, and does one job for each line
on standard input.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Self

import msgspec
import pkcs11
from pkcs11 import MGF, Attribute, Mechanism, ObjectClass

from bench.generator import GeneratorError
from bench.latency import Latencies, bucket_of
from keybroker import config as configuration
from keybroker.hsm.pin import Pin

_PSS = (Mechanism.SHA256, MGF.SHA256, 32)


class Job(msgspec.Struct, frozen=True):
    """Sign with a key for some seconds."""

    key: str
    algorithm: str
    message: bytes
    seconds: float


class Done(msgspec.Struct, frozen=True):
    """How many signatures in how many seconds, how many of those on a core, and latencies by bucket."""

    signatures: int
    seconds: float
    cpu: float
    buckets: dict[str, int]

    @property
    def us(self) -> float:
        """Microseconds for each signature."""
        return self.seconds / self.signatures * 1e6

    @property
    def latencies(self) -> Latencies:
        """Of the calls."""
        return Latencies({int(bucket): count for bucket, count in self.buckets.items()})


class Bare:
    """The other process."""

    def __init__(self, config: Path) -> None:
        command = [sys.executable, "-m", "bench.bare", str(config)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603  ourselves
        self._answer()  # it has logged in

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def sign(self, job: Job) -> Done:
        """Do one job.

        Raises:
            GeneratorError: the process has ended.
        """
        if self._process.stdin is not None:
            self._process.stdin.write(msgspec.json.encode(job) + b"\n")
            self._process.stdin.flush()
        return msgspec.json.decode(self._answer(), type=Done)

    def _answer(self) -> bytes:
        line = self._process.stdout.readline() if self._process.stdout else b""
        if not line:
            raise GeneratorError("bare PKCS#11 has ended")
        return line


def main() -> int:
    """Log in, then one job per line until standard input ends."""
    config = configuration.load(Path(sys.argv[1]))
    if config.hsm is None:
        raise SystemExit("bench.bare: no section `hsm`")
    token = next(iter(config.hsm.tokens.values()))
    os.environ.update({name: str(path) for name, path in token.module_environment.items()})
    library = pkcs11.lib(str(token.uri.module_path))
    session = library.get_token(token_label=token.uri.token).open(user_pin=Pin.load(token.uri.pin_file).text)
    sys.stdout.write("logged in\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.buffer.write(msgspec.json.encode(_do(session, msgspec.json.decode(line, type=Job))) + b"\n")
        sys.stdout.buffer.flush()
    return 0


def _do(session: Any, job: Job) -> Done:
    (key,) = session.get_objects({Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.LABEL: job.key})
    digest = hashlib.sha256(job.message).digest()
    ways: dict[str, tuple[bytes, dict[str, Any]]] = {
        "ES256": (digest, {"mechanism": Mechanism.ECDSA}),
        "PS256": (digest, {"mechanism": Mechanism.RSA_PKCS_PSS, "mechanism_param": _PSS}),
        "Ed25519": (job.message, {"mechanism": Mechanism.EDDSA}),
    }
    data, how = ways[job.algorithm]
    took: list[int] = []
    clock = time.perf_counter_ns
    cpu = time.process_time()
    started = now = clock()
    until = started + int(job.seconds * 1e9)
    while now < until:
        key.sign(data, **how)
        before, now = now, clock()
        took.append(now - before)
    cpu = time.process_time() - cpu
    buckets = Counter(bucket_of(each / 1e3) for each in took)
    return Done(len(took), (now - started) / 1e9, cpu, {str(bucket): count for bucket, count in buckets.items()})


if __name__ == "__main__":
    sys.exit(main())
